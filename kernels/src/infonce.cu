// The softmax of InfoNCE and its gradient over rows of similarities; see infonce.rs for the formulas.
//
// The similarities of a tile are computed by cuBLASLt and overwritten by the next tile. Those of listed
// candidates are computed here. A row of a tile has `columns` scores, and its first column is `first`; a row
// of lists has the length of its list.

#include "common.cuh"

struct Scores {
    float* scores;                 // (B, columns), or of all lists
    const uint32_t* offsets;       // (B+1) of lists, or null
    const uint32_t* positives;     // (B) column of the positive; with lists its index in the list, or 2^32 − 1
    const uint32_t* excluded_offsets;  // (B+1) offsets of the excluded columns, which are sorted; or null
    const uint32_t* excluded;
    const float* positive_scores;  // (B)
    float* maxima;                 // (B) the largest z so far, with that of the positive, which is 0
    double* sums;                  // (B) Σ exp(z − maximum) so far, without the positive
    float* losses;                 // (B)
    int64_t rows, first;
    int32_t columns;
    float scale, margin, gradient_factor;  // gradient_factor: weight · scale
};

struct Row {
    float* scores;
    int64_t count, first;
};

__device__ __forceinline__ Row row_of(const Scores& a, int64_t i) {
    if (a.offsets) return {a.scores + a.offsets[i], int64_t(a.offsets[i + 1]) - a.offsets[i], 0};
    return {a.scores + i * a.columns, a.columns, a.first};
}

// Sets the excluded scores of a row to −∞. Returns the index of the positive, which the callers treat
// separately, or −1.
__device__ __forceinline__ int64_t mask(const Scores& a, int64_t i, const Row& row) {
    if (a.excluded_offsets) {
        for (int64_t h = a.excluded_offsets[i] + threadIdx.x; h < a.excluded_offsets[i + 1]; h += blockDim.x) {
            const int64_t at = int64_t(a.excluded[h]) - row.first;
            if (at >= 0 && at < row.count) row.scores[at] = -INFINITY;
        }
    }
    __syncthreads();
    const int64_t at = int64_t(a.positives[i]) - row.first;
    return at >= 0 && at < row.count ? at : -1;
}

// z = scale · (s − score of the positive), or −∞ if the margin drops the column.
__device__ __forceinline__ float logit(const Scores& a, int64_t i, float s) {
    const float positive = a.positive_scores[i];
    return s > positive + a.margin ? -INFINITY : a.scale * (s - positive);
}

// Adds each row to its running sum, one block for each row.
__global__ void infonce_sums(Scores a) {
    Arena arena;
    Shared<float> scratch = arena.take<float>(64);
    const int64_t i = blockIdx.x;
    const Row row = row_of(a, i);
    const int64_t positive = mask(a, i, row);
    float row_max = a.maxima[i], sum[1] = {0};
    const float before = row_max;
    for (int64_t j = threadIdx.x; j < row.count; j += blockDim.x) {
        const float z = j == positive ? -INFINITY : logit(a, i, row.scores[j]);
        row_max = z > row_max ? z : row_max;  // a NaN makes the sum NaN instead
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) row_max = fmaxf(row_max, __shfl_xor_sync(ALL_LANES, row_max, lanes));
    if (threadIdx.x % 32 == 0) scratch[32 + threadIdx.x / 32] = row_max;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; w++) row_max = fmaxf(row_max, scratch[32 + w]);
    for (int64_t j = threadIdx.x; j < row.count; j += blockDim.x) {
        const float z = j == positive ? -INFINITY : logit(a, i, row.scores[j]);
        sum[0] += expf(z - row_max);
    }
    sum_of_block(sum, scratch);
    if (threadIdx.x == 0) {
        a.sums[i] = a.sums[i] * exp(double(before - row_max)) + double(sum[0]);
        a.maxima[i] = row_max;
    }
}

__global__ void infonce_losses(Scores a) {
    const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (i >= a.rows) return;
    // The loss is log Σ exp(z) = maximum + log(exp(−maximum) + sum), where exp(−maximum) is the positive.
    // With expm1 and log1p it is accurate for a small loss, whose maximum is 0 and whose sum is small.
    a.losses[i] = float(double(a.maxima[i]) + log1p(a.sums[i] + expm1(-double(a.maxima[i]))));
}

// Replaces the scores by their gradients.
__global__ void infonce_gradients(Scores a) {
    const int64_t i = blockIdx.x;
    const Row row = row_of(a, i);
    const int64_t positive = mask(a, i, row);
    const float loss = a.losses[i];
    for (int64_t j = threadIdx.x; j < row.count; j += blockDim.x) {
        // expm1(−loss) is softmax − 1 of the positive without cancellation.
        row.scores[j] = j == positive ? a.gradient_factor * expm1f(-loss) : a.gradient_factor * expf(logit(a, i, row.scores[j]) - loss);
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

// The similarities of listed pairs: entry e is the pair of row `rows[e]` and column `columns[e]`.
struct ListedScores {
    const float* q;           // (B, D)
    const float* c;           // (M, D)
    const uint32_t* rows;     // (E)
    const uint32_t* columns;  // (E)
    float* values;            // (E)
    int64_t count;
    int32_t width;
};

// values = q · c, one warp for each entry
__global__ void listed_scores(ListedScores a) {
    const int64_t e = blockIdx.x * int64_t(blockDim.x / 32) + threadIdx.x / 32;
    if (e >= a.count) return;
    const float *q = a.q + int64_t(a.rows[e]) * a.width, *c = a.c + int64_t(a.columns[e]) * a.width;
    float sum = 0;
    for (int d = threadIdx.x % 32; d < a.width; d += 32) sum += q[d] * c[d];
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) a.values[e] = sum;
}

ENTRY(listed_scores, ListedScores) {
    return launch(Launch(unsigned(ceil_div(arguments->count, 8)), 256, 0, stream), listed_scores, *arguments);
}

struct ListedSums {
    const float* from;        // (·, D)
    const float* values;
    const uint32_t* offsets;  // (N+1) row n of `to` has the entries offsets[n]..offsets[n + 1]
    const uint32_t* rows;     // the row of `from` of each entry
    const uint32_t* entries;  // the index of the value of each entry; null if they are in order
    float* to;                // (N, D)
    int64_t count;
    int32_t width;
};

// to = Σ value · row of `from`, in the order of the entries
__global__ void listed_sums(ListedSums a) {
    const int64_t n = blockIdx.x;
    for (int d = threadIdx.x; d < a.width; d += blockDim.x) {
        float sum = 0;
        for (int64_t e = a.offsets[n]; e < a.offsets[n + 1]; e++) {
            sum += a.values[a.entries ? a.entries[e] : e] * a.from[int64_t(a.rows[e]) * a.width + d];
        }
        a.to[n * a.width + d] = sum;
    }
}

ENTRY(listed_sums, ListedSums) {
    return launch(Launch(unsigned(arguments->count), 256, 0, stream), listed_sums, *arguments);
}
