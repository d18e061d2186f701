// Sums over rows: blocks leave what they have summed, and a second kernel adds that up in the order of the blocks. So the
// result does not depend on which block came first.
#pragma once

#include "common.cuh"

// Blocks that share the rows of one sum. A constant, so that results do not depend on the GPU either.
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
