// Sums over rows: each block stores a partial sum, and a second kernel adds the partial sums in the order of
// the blocks. So the result does not depend on the order in which the blocks run.
#pragma once

#include "common.cuh"

// The maximum number of partial sums. It is a constant, so that the result does not depend on the GPU either.
constexpr int PARTIALS = 512;

// to (width) += Σ_b partial (count, stride)
static __global__ void add_partials(const float* partial, int count, int64_t stride, float* to, int width) {
    const int d = blockIdx.x * blockDim.x + threadIdx.x;
    if (d >= width) return;
    float sum = 0;
    for (int b = 0; b < count; b++) sum += partial[b * stride + d];
    to[d] += sum;
}

static int launch_add_partials(const float* partial, int count, int64_t stride, float* to, int width, cudaStream_t stream) {
    return launch(Launch(unsigned(ceil_div(width, 128)), 128, 0, stream), add_partials, partial, count, stride, to, width);
}
