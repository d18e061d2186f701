// AdamW over the flat buffer, and the norm of its gradients; see adamw.rs.

#include "common.cuh"

constexpr int NORM_BLOCKS = 1024;

struct Norm {
    const float* grads;  // (P)
    double* partials;    // (NORM_BLOCKS)
    double* norm;        // (1)
    int64_t count;
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

__global__ void sum_squares(Norm a) {
    Arena arena;
    Shared<double> scratch = arena.take<double>(32);
    double sum = 0;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < a.count; i += int64_t(gridDim.x) * blockDim.x) {
        sum += double(a.grads[i]) * double(a.grads[i]);
    }
    sum = sum_of_block(sum, scratch);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum;
}

__global__ void root_of_sum(Norm a) {
    Arena arena;
    Shared<double> scratch = arena.take<double>(32);
    double sum = 0;
    for (int i = threadIdx.x; i < NORM_BLOCKS; i += blockDim.x) sum += a.partials[i];
    sum = sum_of_block(sum, scratch);
    if (threadIdx.x == 0) *a.norm = sqrt(sum);
}

ENTRY(norm, Norm) {
    const int error = launch(Launch(NORM_BLOCKS, 256, 32 * sizeof(double), stream), sum_squares, *arguments);
    return error ? error : launch(Launch(1, 256, 32 * sizeof(double), stream), root_of_sum, *arguments);
}

struct AdamW {
    float* params;       // (P), as the moments
    const float* grads;
    float* m;
    float* v;
    int64_t count, decayed;
    float grad_scale, keep, weight1, beta2, weight2, correction2, epsilon, size;
};

template <int V>
__global__ void adamw(AdamW a) {
    for (int64_t at = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * V; at < a.count;
         at += int64_t(gridDim.x) * blockDim.x * V) {
        float p[V], g[V], m[V], v[V];
        load<V>(a.params + at, p);
        load<V>(a.grads + at, g);
        load<V>(a.m + at, m);
        load<V>(a.v + at, v);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float gradient = g[i] * a.grad_scale;
            m[i] += a.weight1 * (gradient - m[i]);
            v[i] = a.beta2 * v[i] + a.weight2 * gradient * gradient;
            const float decayed = at + i < a.decayed ? p[i] * a.keep : p[i];
            p[i] = decayed - a.size * m[i] / (sqrtf(v[i]) / a.correction2 + a.epsilon);
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
