// LayerNorm and RMSNorm of x + residual, one block for each row; see norm.rs for the formulas.
//
// A thread keeps its elements of the row in registers: at most VECTORS vectors of V elements. Memory is read
// and written once.

#include "partials.cuh"

constexpr int VECTORS = 4;

struct NormForward {
    const void* x;         // (T, D)
    const void* residual;  // (T, D) or null
    const float* w;        // (D)
    const float* b;        // (D) or null
    void* y;               // (T, D)
    void* sum;             // (T, D), written with a residual
    float* mean;           // (T), only of LayerNorm
    float* rstd;           // (T)
    int64_t rows;
    int32_t width, type, centred;
    float eps;
};

// Writes row `row` of y = (s − mean)·rstd·w + b.
template <int V, class T>
__device__ __forceinline__ void write_row(const NormForward& a, int64_t row, const float (&s)[VECTORS][V], float mean,
                                          float rstd) {
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        const int d = (n * blockDim.x + threadIdx.x) * V;
        if (d >= a.width) break;
        float w[V], b[V], y[V];
        load<V>(a.w + d, w);
        if (a.b) load<V>(a.b + d, b);
#pragma unroll
        for (int i = 0; i < V; i++) y[i] = (s[n][i] - mean) * rstd * w[i] + (a.b ? b[i] : 0.0f);
        store<V>(static_cast<T*>(a.y) + row * a.width + d, y);
    }
}

template <class T, int V>
__global__ void norm_forward(NormForward a) {
    Arena arena;
    Shared<float> scratch = arena.take<float>(32);
    const int64_t row = blockIdx.x;
    float s[VECTORS][V], total[1] = {0};
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        const int d = (n * blockDim.x + threadIdx.x) * V;
        if (d >= a.width) break;
        load<V>(static_cast<const T*>(a.x) + row * a.width + d, s[n]);
        if (a.residual) {
            float r[V];
            load<V>(static_cast<const T*>(a.residual) + row * a.width + d, r);
            // The kernel normalises the rounded sum, because backward reads that sum from the tape.
#pragma unroll
            for (int i = 0; i < V; i++) s[n][i] = to_float(from_float<T>(s[n][i] + r[i]));
            store<V>(static_cast<T*>(a.sum) + row * a.width + d, s[n]);
        }
#pragma unroll
        for (int i = 0; i < V; i++) total[0] += s[n][i];
    }
    float mean = 0;
    if (a.centred) {
        sum_of_block(total, scratch);
        mean = total[0] / a.width;
    }
    float squares[1] = {0};
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (int((n * blockDim.x + threadIdx.x) * V) >= a.width) break;
#pragma unroll
        for (int i = 0; i < V; i++) squares[0] += (s[n][i] - mean) * (s[n][i] - mean);
    }
    sum_of_block(squares, scratch);
    const float rstd = 1.0f / sqrtf(squares[0] / a.width + a.eps);
    if (threadIdx.x == 0) {
        if (a.centred) a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
    write_row<V, T>(a, row, s, mean, rstd);
}

// Recomputes y from the tape. The argument `x` is the tape's sum, and `residual` is not read.
template <class T, int V>
__global__ void norm_recompute(NormForward a) {
    const int64_t row = blockIdx.x;
    float s[VECTORS][V];
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        const int d = (n * blockDim.x + threadIdx.x) * V;
        if (d < a.width) load<V>(static_cast<const T*>(a.x) + row * a.width + d, s[n]);
    }
    write_row<V, T>(a, row, s, a.centred ? a.mean[row] : 0.0f, a.rstd[row]);
}

struct NormBackward {
    const void* sum;    // (T, D)
    const float* mean;  // (T), only of LayerNorm
    const float* rstd;  // (T)
    const float* w;     // (D)
    const void* dy;     // (T, D)
    const void* dsum;   // (T, D) or null
    void* dx;           // (T, D)
    float* dw;          // (D), added to, or null
    float* db;          // (D), added to, or null
    float* partials;    // (PARTIALS, 2, D) if dw or db is not null
    int64_t rows;
    int32_t width, type, centred;
};

// A block processes every gridDim.x-th row. With PARAMETERS it stores the partial sums of dw and db over its
// rows.
template <class T, int V, bool PARAMETERS>
__global__ void norm_backward(NormBackward a) {
    Arena arena;
    Shared<float> scratch = arena.take<float>(64);
    float dw[VECTORS][V] = {}, db[VECTORS][V] = {};
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const float mean = a.centred ? a.mean[row] : 0.0f, rstd = a.rstd[row];
        // n and g of the formulas, and the sums of g and of g·n.
        float normalised[VECTORS][V], g[VECTORS][V], sums[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < VECTORS; n++) {
            const int d = (n * blockDim.x + threadIdx.x) * V;
            if (d >= a.width) break;
            float w[V];
            load<V>(static_cast<const T*>(a.sum) + row * a.width + d, normalised[n]);
            load<V>(static_cast<const T*>(a.dy) + row * a.width + d, g[n]);
            load<V>(a.w + d, w);
#pragma unroll
            for (int i = 0; i < V; i++) {
                normalised[n][i] = (normalised[n][i] - mean) * rstd;
                if (PARAMETERS) {
                    dw[n][i] += g[n][i] * normalised[n][i];
                    db[n][i] += g[n][i];
                }
                g[n][i] *= w[i];
                sums[0] += g[n][i];
                sums[1] += g[n][i] * normalised[n][i];
            }
        }
        sum_of_block(sums, scratch);
        const float mean_g = a.centred ? sums[0] / a.width : 0.0f, mean_gn = sums[1] / a.width;
#pragma unroll
        for (int n = 0; n < VECTORS; n++) {
            const int d = (n * blockDim.x + threadIdx.x) * V;
            if (d >= a.width) break;
            float dx[V];
            if (a.dsum) load<V>(static_cast<const T*>(a.dsum) + row * a.width + d, dx);
#pragma unroll
            for (int i = 0; i < V; i++) {
                dx[i] = (a.dsum ? dx[i] : 0.0f) + rstd * (g[n][i] - mean_g - normalised[n][i] * mean_gn);
            }
            store<V>(static_cast<T*>(a.dx) + row * a.width + d, dx);
        }
    }
    if (PARAMETERS) {
#pragma unroll
        for (int n = 0; n < VECTORS; n++) {
            const int d = (n * blockDim.x + threadIdx.x) * V;
            if (d >= a.width) break;
            float* partial = a.partials + int64_t(blockIdx.x) * 2 * a.width + d;
            store<V>(partial, dw[n]);
            store<V>(partial + a.width, db[n]);
        }
    }
}

// The number of threads for rows of `width` elements in vectors of `vector` elements; 0 if a row is too wide.
static unsigned threads_for(int width, int vector) {
    const int64_t threads = ceil_div(ceil_div(width, vector * VECTORS), 32) * 32;
    return threads > 1024 ? 0 : unsigned(threads);
}

template <class T, int V>
static int forward_in(const NormForward& a, bool recompute, cudaStream_t stream) {
    const Launch how(unsigned(a.rows), threads_for(a.width, V), 32 * sizeof(float), stream);
    return recompute ? launch(how, norm_recompute<T, V>, a) : launch(how, norm_forward<T, V>, a);
}

template <class T>
static int forward_of(const NormForward& a, bool recompute, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    if (whole_vectors<T>(a.width, a.x, a.residual, a.w, a.b, a.y, a.sum)) return forward_in<T, V>(a, recompute, stream);
    return forward_in<T, 1>(a, recompute, stream);
}

ENTRY(norm_forward, NormForward) { WITH_TYPE(arguments->type, return forward_of<T>(*arguments, false, stream);) }
ENTRY(norm_recompute, NormForward) { WITH_TYPE(arguments->type, return forward_of<T>(*arguments, true, stream);) }

template <class T, int V>
static int backward_in(const NormBackward& a, cudaStream_t stream) {
    const unsigned threads = threads_for(a.width, V), bytes = 64 * sizeof(float);
    if (!a.dw && !a.db) return launch(Launch(unsigned(a.rows), threads, bytes, stream), norm_backward<T, V, false>, a);
    const int blocks = int(a.rows < PARTIALS ? a.rows : PARTIALS);
    int error = launch(Launch(unsigned(blocks), threads, bytes, stream), norm_backward<T, V, true>, a);
    if (!error && a.dw) error = launch_add_partials(a.partials, blocks, 2 * a.width, a.dw, a.width, stream);
    if (!error && a.db) error = launch_add_partials(a.partials + a.width, blocks, 2 * a.width, a.db, a.width, stream);
    return error;
}

template <class T>
static int backward_of(const NormBackward& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    if (whole_vectors<T>(a.width, a.sum, a.w, a.dy, a.dsum, a.dx, a.partials)) return backward_in<T, V>(a, stream);
    return backward_in<T, 1>(a, stream);
}

ENTRY(norm_backward, NormBackward) { WITH_TYPE(arguments->type, return backward_of<T>(*arguments, stream);) }
