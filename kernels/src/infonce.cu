// The softmax of InfoNCE and its gradient over rows of similarities; see infonce.rs for the formulas.
//
// The similarities of a tile are a product of cuBLASLt's and live until the next tile; of listed candidates they are computed here.
// A row of scores is `columns` long in a tile, whose first column is `first`; of lists it is what its offsets say.

#include "common.cuh"

struct Scores {
    float* scores;                 // (B, columns), or of all lists
    const uint32_t* offsets;       // (B+1) of lists, or null
    const uint32_t* positives;     // (B) column of a row's positive; of lists its place in the row, or 2^32 − 1
    const uint32_t* hidden_from;   // (B+1) offsets of the columns that do not count, sorted; or null
    const uint32_t* hidden;
    const float* positive_scores;  // (B)
    float* tops;                   // (B) with sums: Σ exp(z) so far is exp(top)·(exp(−top) + sum)
    double* sums;                  // (B)
    float* losses;                 // (B)
    int64_t rows, first;
    int32_t columns;
    float scale, margin, size;  // size: weight · scale
};

struct Row {
    float* scores;
    int64_t count, first;
};

__device__ __forceinline__ Row row_of(const Scores& a, int64_t i) {
    if (a.offsets) return {a.scores + a.offsets[i], int64_t(a.offsets[i + 1]) - a.offsets[i], 0};
    return {a.scores + i * a.columns, a.columns, a.first};
}

// Hides what does not count, as −∞, and the positive, which is summed apart. Returns where the positive is, or −1.
__device__ __forceinline__ int64_t hide(const Scores& a, int64_t i, const Row& row) {
    if (a.hidden_from) {
        for (int64_t h = a.hidden_from[i] + threadIdx.x; h < a.hidden_from[i + 1]; h += blockDim.x) {
            const int64_t at = int64_t(a.hidden[h]) - row.first;
            if (at >= 0 && at < row.count) row.scores[at] = -INFINITY;
        }
    }
    __syncthreads();
    const int64_t at = int64_t(a.positives[i]) - row.first;
    return at >= 0 && at < row.count ? at : -1;
}

// z = scale · (s − s of the positive), −∞ for what counts as an unlabelled positive.
__device__ __forceinline__ float logit(const Scores& a, int64_t i, float s) {
    const float positive = a.positive_scores[i];
    return s > positive + a.margin ? -INFINITY : a.scale * (s - positive);
}

// Adds a row to its running sum, a block a row.
__global__ void infonce_sums(Scores a) {
    Arena arena;
    Shared<float> scratch = arena.take<float>(64);
    const int64_t i = blockIdx.x;
    const Row row = row_of(a, i);
    const int64_t positive = hide(a, i, row);
    float top = a.tops[i], sum[1] = {0};
    const float before = top;
    for (int64_t j = threadIdx.x; j < row.count; j += blockDim.x) {
        const float z = j == positive ? -INFINITY : logit(a, i, row.scores[j]);
        top = z > top ? z : top;  // a NaN reaches the sum instead
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lanes));
    if (threadIdx.x % 32 == 0) scratch[32 + threadIdx.x / 32] = top;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; w++) top = fmaxf(top, scratch[32 + w]);
    for (int64_t j = threadIdx.x; j < row.count; j += blockDim.x) {
        const float z = j == positive ? -INFINITY : logit(a, i, row.scores[j]);
        sum[0] += expf(z - top);
    }
    sum_of_block(sum, scratch);
    if (threadIdx.x == 0) {
        a.sums[i] = a.sums[i] * exp(double(before - top)) + double(sum[0]);
        a.tops[i] = top;
    }
}

__global__ void infonce_losses(Scores a) {
    const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (i >= a.rows) return;
    // 1 + rest, of which log1p keeps all digits where the positive is on top.
    a.losses[i] = float(double(a.tops[i]) + log1p(a.sums[i] + expm1(-double(a.tops[i]))));
}

// From scores to their gradients, in place.
__global__ void infonce_gradients(Scores a) {
    const int64_t i = blockIdx.x;
    const Row row = row_of(a, i);
    const int64_t positive = hide(a, i, row);
    const float loss = a.losses[i];
    for (int64_t j = threadIdx.x; j < row.count; j += blockDim.x) {
        // softmax − 1 of the positive keeps its digits this way.
        row.scores[j] = j == positive ? a.size * expm1f(-loss) : a.size * expf(logit(a, i, row.scores[j]) - loss);
    }
}

ENTRY(infonce_sums, Scores) {
    return launch(Launch(unsigned(arguments->rows), 256, 64 * sizeof(float), stream), infonce_sums, *arguments);
}
ENTRY(infonce_losses, Scores) {
    return launch(Launch(unsigned(ceil_div(arguments->rows, 256)), 256, 0, stream), infonce_losses, *arguments);
}
ENTRY(infonce_gradients, Scores) {
    return launch(Launch(unsigned(arguments->rows), 256, 0, stream), infonce_gradients, *arguments);
}

// Products along lists of pairs: entry e is in row r = rows[e] and names column `columns[e]`.
struct Listed {
    const float* q;           // (B, D)
    const float* c;           // (M, D)
    const uint32_t* rows;     // (E)
    const uint32_t* columns;  // (E)
    float* values;            // (E)
    int64_t count;
    int32_t width;
};

// values = q · c, a warp an entry
__global__ void listed_scores(Listed a) {
    const int64_t e = blockIdx.x * int64_t(blockDim.x / 32) + threadIdx.x / 32;
    if (e >= a.count) return;
    const float *q = a.q + int64_t(a.rows[e]) * a.width, *c = a.c + int64_t(a.columns[e]) * a.width;
    float sum = 0;
    for (int d = threadIdx.x % 32; d < a.width; d += 32) sum += q[d] * c[d];
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) a.values[e] = sum;
}

ENTRY(listed_scores, Listed) {
    return launch(Launch(unsigned(ceil_div(arguments->count, 8)), 256, 0, stream), listed_scores, *arguments);
}

struct Gather {
    const float* from;        // (·, D)
    const float* values;
    const uint32_t* offsets;  // (N+1) of the entries of each row of `to`
    const uint32_t* rows;     // of `from`, by entry
    const uint32_t* entries;  // where an entry's value is, or null: at its own place
    float* to;                // (N, D)
    int64_t count;
    int32_t width;
};

// to = Σ value · row of `from`, in the order of the entries
__global__ void listed_sums(Gather a) {
    const int64_t n = blockIdx.x;
    for (int d = threadIdx.x; d < a.width; d += blockDim.x) {
        float sum = 0;
        for (int64_t e = a.offsets[n]; e < a.offsets[n + 1]; e++) {
            sum += a.values[a.entries ? a.entries[e] : e] * a.from[int64_t(a.rows[e]) * a.width + d];
        }
        a.to[n * a.width + d] = sum;
    }
}

ENTRY(listed_sums, Gather) {
    return launch(Launch(unsigned(arguments->count), 256, 0, stream), listed_sums, *arguments);
}
