// Attention inside each sequence of a packing, on tensor cores; see attention.rs for the formulas.
//
// A block of four warps computes 64 rows of one head, 16 rows for each warp. It iterates over tiles of the
// columns that are visible to at least one row, and copies the next tile while it multiplies the current one.
// Scores are kept in registers. Backward has two kernels, one whose rows are queries and one whose rows are
// keys. They compute two fifths more products than one kernel with atomic additions would, and give the same
// bits each time.

#include "attention.cuh"

constexpr int THREADS = 128, ROWS = 64;

// The distance of rows in shared memory, which are padded with zeros to WIDTH elements and by another 16
// bytes, so that the rows of an 8 × 8 matrix are in different banks.
template <int WIDTH>
constexpr int STRIDE = WIDTH + 8;

// Starts copying COUNT rows to shared memory. `source` is the first row; rows from index `rows` on are filled
// with zeros.
template <int COUNT, int WIDTH, class T>
__device__ __forceinline__ void copy_rows(Shared<T> tile, const T* source, int64_t stride, int rows, int width, bool vectors) {
    constexpr int VECTORS = WIDTH / 8;
    for (int c = threadIdx.x; c < COUNT * VECTORS; c += THREADS) {
        const int row = c / VECTORS, d = c % VECTORS * 8, to = row * STRIDE<WIDTH> + d;
        if (vectors) {
            const bool inside = row < rows && d < width;
            copy_async(tile, to, inside ? source + row * stride + d : source, !inside);
        } else {
            for (int i = 0; i < 8; i++) {
                const bool inside = row < rows && d + i < width;
                tile[to + i] = inside ? source[row * stride + d + i] : from_float<T>(0.0f);
            }
        }
    }
}

// s (16, COLUMNS) = rows `row`.. of a (·, WIDTH) times b (COLUMNS, WIDTH) transposed
template <int COLUMNS, int WIDTH, class T>
__device__ __forceinline__ void multiply(float (&s)[COLUMNS / 8][4], Shared<T> a, int row, Shared<T> b) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
        uint32_t x[4];
        load_matrices<false>(x, a, (row + lane % 16) * STRIDE<WIDTH> + k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 16) {
            uint32_t y[4];
            load_matrices<false>(y, b, (n + lane / 16 * 8 + lane % 8) * STRIDE<WIDTH> + k + lane / 8 % 2 * 8);
            mma<T>(s[n / 8], x, {y[0], y[1]});
            mma<T>(s[n / 8 + 1], x, {y[2], y[3]});
        }
    }
}

// acc (16, WIDTH) += p (16, COLUMNS) times b (COLUMNS, WIDTH)
template <int COLUMNS, int WIDTH, class T>
__device__ __forceinline__ void accumulate(float (&acc)[WIDTH / 8][4], const float (&p)[COLUMNS / 8][4], Shared<T> b) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < COLUMNS; k += 16) {
        // The fragments of a result have the layout of the fragments of a left factor.
        const float(&low)[4] = p[k / 8], (&high)[4] = p[k / 8 + 1];
        const uint32_t x[4] = {pair<T>(low[0], low[1]), pair<T>(low[2], low[3]), pair<T>(high[0], high[1]),
                               pair<T>(high[2], high[3])};
#pragma unroll
        for (int d = 0; d < WIDTH; d += 16) {
            uint32_t y[4];
            load_matrices<true>(y, b, (k + lane % 16) * STRIDE<WIDTH> + d + lane / 16 * 8);
            mma<T>(acc[d / 8], x, {y[0], y[1]});
            mma<T>(acc[d / 8 + 1], x, {y[2], y[3]});
        }
    }
}

// Writes 16 rows, multiplied by their factors. `to` is the first row; this lane holds rows g and g + 8.
template <int WIDTH, class T>
__device__ __forceinline__ void write_rows(T* to, int64_t stride, int rows, int width, const float (&acc)[WIDTH / 8][4],
                                           const float (&factors)[2]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = g + i / 2 * 8, d = n * 8 + 2 * t + i % 2;
            if (row < rows && d < width) to[row * stride + d] = from_float<T>(acc[n][i] * factors[i / 2]);
        }
    }
}

constexpr int TILE_KEYS = 64;  // of a tile in forward

// The launch bounds ask for one block per multiprocessor, because ptxas would spill registers for more.
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS, 1) attention_forward(Attention a, bool vectors) {
    const int h = blockIdx.y, g = h / (a.heads / a.kv_heads), warp_row = threadIdx.x / 32 * 16;
    const int64_t start = a.packing.offsets[blockIdx.z];
    const int tokens = int(a.packing.offsets[blockIdx.z + 1] - start), first = blockIdx.x * ROWS;
    if (first >= tokens) return;
    const uint32_t sequence = a.packing.numbers[blockIdx.z];
    const int last = min(first + ROWS, tokens) - 1;
    const int begin = max(0, first - a.left), end = min(tokens, last + a.right + 1);

    Arena arena;
    constexpr int TILE = TILE_KEYS * STRIDE<WIDTH>;
    Shared<T> q = arena.take<T>(ROWS * STRIDE<WIDTH>);
    Shared<T> k = arena.take<T>(2 * TILE), v = arena.take<T>(2 * TILE);
    const int64_t stride = int64_t(a.heads) * a.head_width, kv_stride = int64_t(a.kv_heads) * a.head_width;
    auto copy_tile = [&](int at, int buffer) {
        const int64_t from = kv_row(a, start + at, g);
        copy_rows<TILE_KEYS, WIDTH>(k.from(buffer * TILE, TILE), static_cast<const T*>(a.k) + from, kv_stride, end - at,
                                    a.head_width, vectors);
        copy_rows<TILE_KEYS, WIDTH>(v.from(buffer * TILE, TILE), static_cast<const T*>(a.v) + from, kv_stride, end - at,
                                    a.head_width, vectors);
        commit_copies();
    };
    copy_rows<ROWS, WIDTH>(q, static_cast<const T*>(a.q) + q_row(a, start + first, h), stride, tokens - first, a.head_width,
                           vectors);
    copy_tile(begin, 0);

    // This lane has rows g and g + 8 of its warp, and columns 2t and 2t + 1 of every 8 columns.
    const int row = first + warp_row + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    float acc[WIDTH / 8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};
    const float scale = a.scale * LOG2_E;
    for (int at = begin, buffer = 0; at < end; at += TILE_KEYS, buffer ^= 1) {
        if (at + TILE_KEYS < end) {
            copy_tile(at + TILE_KEYS, buffer ^ 1);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();
        float s[TILE_KEYS / 8][4];
        multiply<TILE_KEYS, WIDTH>(s, q, warp_row, k.from(buffer * TILE, TILE));
        const bool all_seen = at + TILE_KEYS <= end && at >= last - a.left && at + TILE_KEYS - 1 <= first + a.right;
        float new_max[2] = {row_max[0], row_max[1]};
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 8; n++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const int i = row + x / 2 * 8, j = at + n * 8 + column + x % 2;
                s[n][x] *= scale;
                if (a.bias) s[n][x] += LOG2_E * a.bias_of(h, i, j);
                if (!all_seen && !(j < end && a.sees(i, j))) s[n][x] = -INFINITY;
                new_max[x / 2] = fmaxf(new_max[x / 2], s[n][x]);
            }
        }
        float reference[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(ALL_LANES, new_max[r], 1));
            new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(ALL_LANES, new_max[r], 2));
            reference[r] = new_max[r] == -INFINITY ? 0.0f : new_max[r];  // a row without a visible column so far
            const float rescale = exp2f(row_max[r] - reference[r]);
            row_max[r] = new_max[r];
            row_sum[r] *= rescale;
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++) {
                acc[n][2 * r] *= rescale;
                acc[n][2 * r + 1] *= rescale;
            }
        }
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 8; n++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                s[n][x] = exp2f(s[n][x] - reference[x / 2]);
                row_sum[x / 2] += s[n][x];
                if (a.has_dropout) {
                    s[n][x] *= dropout_factor(a, sequence, h, tokens, row + x / 2 * 8, at + n * 8 + column + x % 2);
                }
            }
        }
        accumulate<TILE_KEYS, WIDTH>(acc, s, v.from(buffer * TILE, TILE));
        __syncthreads();
    }

    float factors[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        row_sum[r] += __shfl_xor_sync(ALL_LANES, row_sum[r], 1);
        row_sum[r] += __shfl_xor_sync(ALL_LANES, row_sum[r], 2);
        factors[r] = 1.0f / row_sum[r];
        const int i = row + r * 8;
        if (column == 0 && i < tokens) {
            a.lse[int64_t(h) * a.packing.tokens + start + i] = (row_max[r] + log2f(row_sum[r])) * LN_2;
        }
    }
    write_rows<WIDTH>(static_cast<T*>(a.o) + q_row(a, start + first + warp_row, h), stride, tokens - first - warp_row,
                      a.head_width, acc, factors);
}

constexpr int COLUMNS = 32;  // of a tile in backward, which needs more registers for its sums

// With KEYS the rows are keys, the columns are the queries of all heads that share them, and the kernel
// computes dk and dv. Otherwise the rows are queries, and it computes dq.
template <class T, int WIDTH, bool KEYS>
__global__ void __launch_bounds__(THREADS, 1) attention_backward(Attention a, bool vectors) {
    const int group = a.heads / a.kv_heads, warp_row = threadIdx.x / 32 * 16;
    const int64_t start = a.packing.offsets[blockIdx.z];
    const int tokens = int(a.packing.offsets[blockIdx.z + 1] - start), first = blockIdx.x * ROWS;
    if (first >= tokens) return;
    const uint32_t sequence = a.packing.numbers[blockIdx.z];
    const int last = min(first + ROWS, tokens) - 1;
    // The columns from row − before to row + after are visible.
    const int before = KEYS ? a.right : a.left, after = KEYS ? a.left : a.right;
    const int begin = max(0, first - before), end = min(tokens, last + after + 1);
    const int tiles = (end - begin + COLUMNS - 1) / COLUMNS, all_tiles = KEYS ? tiles * group : tiles;

    Arena arena;
    constexpr int TILE = COLUMNS * STRIDE<WIDTH>;
    // The rows are those of q and do, the columns those of k and v; with KEYS the other way round.
    Shared<T> rows1 = arena.take<T>(ROWS * STRIDE<WIDTH>), rows2 = arena.take<T>(ROWS * STRIDE<WIDTH>);
    Shared<T> columns1 = arena.take<T>(2 * TILE), columns2 = arena.take<T>(2 * TILE);
    const int64_t q_stride = int64_t(a.heads) * a.head_width, kv_stride = int64_t(a.kv_heads) * a.head_width;
    const T *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
    const T* d_o = static_cast<const T*>(a.d_o);
    auto head_of = [&](int tile) { return KEYS ? int(blockIdx.y) * group + tile / tiles : int(blockIdx.y); };
    auto copy_tile = [&](int tile) {
        const int at = begin + tile % tiles * COLUMNS, h = head_of(tile), buffer = tile % 2 * TILE;
        const int64_t from = KEYS ? q_row(a, start + at, h) : kv_row(a, start + at, h / group);
        const int64_t stride = KEYS ? q_stride : kv_stride;
        copy_rows<COLUMNS, WIDTH>(columns1.from(buffer, TILE), (KEYS ? q : k) + from, stride, end - at, a.head_width, vectors);
        copy_rows<COLUMNS, WIDTH>(columns2.from(buffer, TILE), (KEYS ? d_o : v) + from, stride, end - at, a.head_width,
                                  vectors);
        commit_copies();
    };
    const int64_t row_stride = KEYS ? kv_stride : q_stride;
    const int64_t row_start = KEYS ? kv_row(a, start + first, blockIdx.y) : q_row(a, start + first, blockIdx.y);
    copy_rows<ROWS, WIDTH>(rows1, (KEYS ? k : q) + row_start, row_stride, tokens - first, a.head_width, vectors);
    copy_rows<ROWS, WIDTH>(rows2, (KEYS ? v : d_o) + row_start, row_stride, tokens - first, a.head_width, vectors);
    copy_tile(0);

    const int row = first + warp_row + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    float acc1[WIDTH / 8][4] = {}, acc2[KEYS ? WIDTH / 8 : 1][4] = {};  // dq; with KEYS dk and dv
    const float scale = a.scale * LOG2_E;
    for (int tile = 0; tile < all_tiles; tile++) {
        if (tile + 1 < all_tiles) {
            copy_tile(tile + 1);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();
        const int at = begin + tile % tiles * COLUMNS, h = head_of(tile), buffer = tile % 2 * TILE;
        const float* lse = a.lse + int64_t(h) * a.packing.tokens + start;
        const float* delta = a.delta + int64_t(h) * a.packing.tokens + start;
        float s[COLUMNS / 8][4], ds[COLUMNS / 8][4];
        multiply<COLUMNS, WIDTH>(s, rows1, warp_row, columns1.from(buffer, TILE));
        multiply<COLUMNS, WIDTH>(ds, rows2, warp_row, columns2.from(buffer, TILE));
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const int r = row + x / 2 * 8, c = at + n * 8 + column + x % 2, i = KEYS ? c : r, j = KEYS ? r : c;
                if (r >= tokens || c >= end || !a.sees(i, j)) {
                    s[n][x] = ds[n][x] = 0;
                    continue;
                }
                s[n][x] *= scale;
                if (a.bias) s[n][x] += LOG2_E * a.bias_of(h, i, j);
                const float p = exp2f(s[n][x] - LOG2_E * lse[i]);
                const float factor = a.has_dropout ? dropout_factor(a, sequence, h, tokens, i, j) : 1.0f;
                s[n][x] = p * factor;
                ds[n][x] = p * (factor * ds[n][x] - delta[i]);
            }
        }
        accumulate<COLUMNS, WIDTH>(acc1, ds, columns1.from(buffer, TILE));
        if constexpr (KEYS) accumulate<COLUMNS, WIDTH>(acc2, s, columns2.from(buffer, TILE));
        __syncthreads();
    }

    const int left = tokens - first - warp_row;
    const int64_t to = row_start + warp_row * row_stride;
    write_rows<WIDTH>(static_cast<T*>(KEYS ? a.dk : a.dq) + to, row_stride, left, a.head_width, acc1, {a.scale, a.scale});
    if constexpr (KEYS) {
        write_rows<WIDTH>(static_cast<T*>(a.dv) + to, row_stride, left, a.head_width, acc2, {1.0f, 1.0f});
    }
}

static dim3 grid_for(const Attention& a, int heads) {
    return dim3(unsigned(ceil_div(a.packing.longest, ROWS)), unsigned(heads), unsigned(a.packing.count));
}

template <class T, int WIDTH>
static int forward_in(const Attention& a, cudaStream_t stream) {
    const bool vectors = whole_vectors<T>(a.head_width, a.q, a.k, a.v);
    const size_t bytes = (ROWS + 4 * TILE_KEYS) * STRIDE<WIDTH> * sizeof(T);
    return launch(Launch(grid_for(a, a.heads), THREADS, bytes, stream), attention_forward<T, WIDTH>, a, vectors);
}

template <class T, int WIDTH>
static int backward_in(const Attention& a, cudaStream_t stream) {
    const bool vectors = whole_vectors<T>(a.head_width, a.q, a.k, a.v, a.d_o);
    const size_t bytes = (2 * ROWS + 4 * COLUMNS) * STRIDE<WIDTH> * sizeof(T);
    const int error = launch(Launch(grid_for(a, a.heads), THREADS, bytes, stream), attention_backward<T, WIDTH, false>, a,
                             vectors);
    if (error) return error;
    return launch(Launch(grid_for(a, a.kv_heads), THREADS, bytes, stream), attention_backward<T, WIDTH, true>, a, vectors);
}

static Launch warp_per_row(int64_t rows, cudaStream_t stream) {
    return Launch(unsigned(ceil_div(rows, THREADS / 32)), THREADS, 0, stream);
}

template <class T>
static int forward_of(const Attention& a, cudaStream_t stream) {
    if constexpr (sizeof(T) == 2) {
        if (a.head_width <= 32) return forward_in<T, 32>(a, stream);
        if (a.head_width <= 64) return forward_in<T, 64>(a, stream);
        if (a.head_width <= 128) return forward_in<T, 128>(a, stream);
    }
    return launch(warp_per_row(int64_t(a.packing.tokens) * a.heads, stream), scalar_forward<T>, a);
}

template <class T>
static int backward_of(const Attention& a, cudaStream_t stream) {
    const int64_t queries = int64_t(a.packing.tokens) * a.heads, keys = int64_t(a.packing.tokens) * a.kv_heads;
    int error = launch(warp_per_row(queries, stream), attention_delta<T>, a);
    if (!error && a.dbias) {
        const dim3 grid(unsigned(2 * a.max_distance + 1), unsigned(a.heads));
        error = launch(Launch(grid, 256, 32 * sizeof(float), stream), bias_backward<T>, a);
    }
    if (error) return error;
    if constexpr (sizeof(T) == 2) {
        if (a.head_width <= 32) return backward_in<T, 32>(a, stream);
        if (a.head_width <= 64) return backward_in<T, 64>(a, stream);
        if (a.head_width <= 128) return backward_in<T, 128>(a, stream);
    }
    error = launch(warp_per_row(queries, stream), scalar_backward<T, false>, a);
    return error ? error : launch(warp_per_row(keys, stream), scalar_backward<T, true>, a);
}

ENTRY(attention_forward, Attention) { WITH_TYPE(arguments->type, return forward_of<T>(*arguments, stream);) }
ENTRY(attention_backward, Attention) { WITH_TYPE(arguments->type, return backward_of<T>(*arguments, stream);) }
