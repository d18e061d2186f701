// Pooling with normalisation, one block for each sequence; see pool.rs.

#include "common.cuh"

constexpr float MIN_NORM = 1e-12f;
constexpr int ROWS = 16;  // rows that a block writes in backward

struct PoolForward {
    const void* x;           // (T, D)
    const uint32_t* starts;  // (N) the first row of each span
    const uint32_t* ends;    // (N)
    float* e;                // (N, D)
    float* norms;            // (N)
    int32_t count, width, type, normalize;
};

template <class T, int V>
__global__ void pool_forward(PoolForward a) {
    Arena arena;
    Shared<float> scratch = arena.take<float>(32);
    const int64_t n = blockIdx.x, start = a.starts[n], end = a.ends[n];
    float* e = a.e + n * a.width;
    const float rows = float(end - start);
    float square[1] = {0};
    for (int d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
        float sum[V] = {};
#pragma unroll 4
        for (int64_t t = start; t < end; t++) {
            float x[V];
            load<V>(static_cast<const T*>(a.x) + t * a.width + d, x);
#pragma unroll
            for (int i = 0; i < V; i++) sum[i] += x[i];
        }
#pragma unroll
        for (int i = 0; i < V; i++) {
            sum[i] /= rows;
            square[0] += sum[i] * sum[i];
        }
        store<V>(e + d, sum);
    }
    sum_of_block(square, scratch);
    const float norm = sqrtf(square[0]);
    if (threadIdx.x == 0) a.norms[n] = norm;
    if (!a.normalize) return;
    const float divisor = norm < MIN_NORM ? MIN_NORM : norm;  // NaN stays NaN
    // Each thread reads only elements that it has written itself.
    for (int d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
        float x[V];
        load<V>(e + d, x);
#pragma unroll
        for (int i = 0; i < V; i++) x[i] /= divisor;
        store<V>(e + d, x);
    }
}

struct PoolBackward {
    const float* e;          // (N, D)
    const float* norms;      // (N)
    const float* de;         // (N, D)
    const uint32_t* starts;  // (N)
    const uint32_t* ends;    // (N)
    void* dx;                // (T, D), zeros
    int32_t count, width, longest, type, normalize;  // longest: rows of the longest span
};

template <class T, int V>
__global__ void pool_backward(PoolBackward a) {
    Arena arena;
    Shared<float> scratch = arena.take<float>(32);
    const int64_t n = blockIdx.x, start = a.starts[n], end = a.ends[n], first = start + int64_t(blockIdx.y) * ROWS;
    const float* e = a.e + n * a.width;
    const float* de = a.de + n * a.width;
    const bool radially = a.normalize && !(a.norms[n] < MIN_NORM);  // below the limit the divisor is a constant
    float radial[1] = {0};
    if (radially) {
        for (int d = threadIdx.x; d < a.width; d += blockDim.x) radial[0] += e[d] * de[d];
    }
    sum_of_block(radial, scratch);
    const float norm = !a.normalize ? 1.0f : a.norms[n] < MIN_NORM ? MIN_NORM : a.norms[n];
    const float divisor = norm * float(end - start);
    const int64_t last = first + ROWS < end ? first + ROWS : end;
    for (int d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
        float x[V], gradient[V];
        load<V>(e + d, x);
        load<V>(de + d, gradient);
#pragma unroll
        for (int i = 0; i < V; i++) gradient[i] = (gradient[i] - x[i] * radial[0]) / divisor;
        for (int64_t t = first; t < last; t++) store<V>(static_cast<T*>(a.dx) + t * a.width + d, gradient);
    }
}

template <class T>
static int forward_of(const PoolForward& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    const Launch how(unsigned(a.count), 256, 32 * sizeof(float), stream);
    if (whole_vectors<T>(a.width, a.x, a.e)) return launch(how, pool_forward<T, V>, a);
    return launch(how, pool_forward<T, 1>, a);
}

template <class T>
static int backward_of(const PoolBackward& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    const Launch how(dim3(unsigned(a.count), unsigned(ceil_div(a.longest, ROWS))), 256, 32 * sizeof(float), stream);
    if (whole_vectors<T>(a.width, a.e, a.de, a.dx)) return launch(how, pool_backward<T, V>, a);
    return launch(how, pool_backward<T, 1>, a);
}

ENTRY(pool_forward, PoolForward) { WITH_TYPE(arguments->type, return forward_of<T>(*arguments, stream);) }
ENTRY(pool_backward, PoolBackward) { WITH_TYPE(arguments->type, return backward_of<T>(*arguments, stream);) }
