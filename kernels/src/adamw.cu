// AdamW on the flat buffer, and the norm of its gradients, which stays on the device; see adamw.rs.

#include "common.cuh"

constexpr int NORM_BLOCKS = 1024;

struct Clip {
    const float* grads;   // (P)
    const float* losses;  // (B)
    double* partials;     // (NORM_BLOCKS)
    double* norm;         // (1)
    float* scale;         // (1) min(1, max_norm / (norm + 1e-6)); NaN if the norm or a loss is not finite
    int64_t count, rows;
    double max_norm;  // infinite for no limit
};

__device__ __forceinline__ double sum_of_block(double x, Shared<double> scratch) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) x += scratch[w];
    return x;
}

template <int V>
__global__ void sum_squares(Clip a) {
    Arena arena;
    Shared<double> scratch = arena.take<double>(32);
    double sum = 0;
    for (int64_t at = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * V; at < a.count;
         at += int64_t(gridDim.x) * blockDim.x * V) {
        float g[V];
        load<V>(a.grads + at, g);
#pragma unroll
        for (int i = 0; i < V; i++) sum += double(g[i]) * double(g[i]);
    }
    sum = sum_of_block(sum, scratch);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum;
}

__global__ void norm_and_scale(Clip a) {
    Arena arena;
    Shared<double> scratch = arena.take<double>(64);
    double sum = 0, nothing = 0;
    for (int i = threadIdx.x; i < NORM_BLOCKS; i += blockDim.x) sum += a.partials[i];
    // 0 · x is NaN if x is not finite.
    for (int64_t i = threadIdx.x; i < a.rows; i += blockDim.x) nothing += 0.0 * double(a.losses[i]);
    sum = sum_of_block(sum, scratch.from(0, 32));
    nothing = sum_of_block(nothing, scratch.from(32, 32));
    if (threadIdx.x != 0) return;
    const double norm = sqrt(sum);
    *a.norm = norm;
    *a.scale = float(fmin(a.max_norm / (norm + 1e-6), 1.0) + 0.0 * norm + nothing);
}

ENTRY(clip_scale, Clip) {
    const Clip& a = *arguments;
    const Launch how(NORM_BLOCKS, 256, 32 * sizeof(double), stream);
    const int error = whole_vectors<float>(a.count, a.grads) ? launch(how, sum_squares<4>, a) : launch(how, sum_squares<1>, a);
    return error ? error : launch(Launch(1, 256, 64 * sizeof(double), stream), norm_and_scale, a);
}

struct AdamW {
    float* params;       // (P), as the gradients and moments
    const float* grads;
    float* m;
    float* v;
    const float* scale;  // (1) the factor of the gradients; if it is NaN, nothing changes
    int64_t count, decayed;
    float decay, one_minus_beta1, beta2, one_minus_beta2, sqrt_bias_correction2, epsilon, step_size;
};

template <int V>
__global__ void adamw(AdamW a) {
    const float scale = *a.scale;
    if (scale != scale) return;
    for (int64_t at = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * V; at < a.count;
         at += int64_t(gridDim.x) * blockDim.x * V) {
        float p[V], g[V], m[V], v[V];
        load<V>(a.params + at, p);
        load<V>(a.grads + at, g);
        load<V>(a.m + at, m);
        load<V>(a.v + at, v);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float gradient = g[i] * scale;
            m[i] += a.one_minus_beta1 * (gradient - m[i]);
            v[i] = a.beta2 * v[i] + a.one_minus_beta2 * gradient * gradient;
            const float decayed = at + i < a.decayed ? p[i] * a.decay : p[i];
            p[i] = decayed - a.step_size * m[i] / (sqrtf(v[i]) / a.sqrt_bias_correction2 + a.epsilon);
        }
        store<V>(a.params + at, p);
        store<V>(a.m + at, m);
        store<V>(a.v + at, v);
    }
}

ENTRY(adamw, AdamW) {
    const AdamW& a = *arguments;
    if (whole_vectors<float>(a.count, a.params, a.grads, a.m, a.v)) {
        return launch(Launch(blocks_for(a.count / 4, 256), 256, 0, stream), adamw<4>, a);
    }
    return launch(Launch(blocks_for(a.count, 256), 256, 0, stream), adamw<1>, a);
}
