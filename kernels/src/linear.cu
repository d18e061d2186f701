// The operations of a linear layer beside its matrix products, which cuBLASLt computes; see linear.rs.

#include "partials.cuh"

struct BiasBackward {
    const void* dy;   // (T, O)
    float* db;        // (O), added to
    float* partials;  // (PARTIALS, O)
    int64_t rows;
    int32_t width, type;
};

// One thread for each column; block y of the grid sums every gridDim.y-th row from row y on.
template <class T>
__global__ void sum_columns(BiasBackward a) {
    const int d = blockIdx.x * blockDim.x + threadIdx.x;
    if (d >= a.width) return;
    float sum = 0;
    for (int64_t t = blockIdx.y; t < a.rows; t += gridDim.y) sum += to_float(static_cast<const T*>(a.dy)[t * a.width + d]);
    a.partials[int64_t(blockIdx.y) * a.width + d] = sum;
}

template <class T>
static int bias_of(const BiasBackward& a, cudaStream_t stream) {
    const int blocks = int(a.rows < PARTIALS ? a.rows : PARTIALS);
    const dim3 grid(unsigned(ceil_div(a.width, 128)), unsigned(blocks));
    const int error = launch(Launch(grid, 128, 0, stream), sum_columns<T>, a);
    return error ? error : launch_add_partials(a.partials, blocks, a.width, a.db, a.width, stream);
}

ENTRY(bias_backward, BiasBackward) { WITH_TYPE(arguments->type, return bias_of<T>(*arguments, stream);) }

// y (T, O) += bias (O).
struct BiasForward {
    void* y;
    const float* bias;
    int64_t rows;
    int32_t width, type;
};

template <class T, int V>
__global__ void add_bias(BiasForward a) {
    const int vectors = a.width / V;
    for (int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; at < a.rows * vectors;
         at += int64_t(gridDim.x) * blockDim.x) {
        const int d = int(at % vectors) * V;
        T* p = static_cast<T*>(a.y) + at / vectors * a.width + d;
        float y[V], bias[V];
        load<V>(p, y);
        load<V>(a.bias + d, bias);
#pragma unroll
        for (int i = 0; i < V; i++) y[i] += bias[i];
        store<V>(p, y);
    }
}

template <class T>
static int add_bias_of(const BiasForward& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    if (whole_vectors<T>(a.width, a.y, a.bias)) {
        return launch(Launch(blocks_for(a.rows * (a.width / V), 256), 256, 0, stream), add_bias<T, V>, a);
    }
    return launch(Launch(blocks_for(a.rows * a.width, 256), 256, 0, stream), add_bias<T, 1>, a);
}

ENTRY(add_bias, BiasForward) { WITH_TYPE(arguments->type, return add_bias_of<T>(*arguments, stream);) }

// Converts `count` elements to another type, rounded to nearest: for example f32 parameters to the compute
// type.
struct Convert {
    const void* x;
    void* y;
    int64_t count;
    int32_t from, to;
};

template <class T, class U>
__global__ void convert(const T* x, U* y, int64_t count) {
    for (int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
        y[at] = from_float<U>(to_float(x[at]));
    }
}

template <class U>
static int convert_to(const Convert& a, cudaStream_t stream) {
    const Launch how(blocks_for(a.count, 256), 256, 0, stream);
    U* y = static_cast<U*>(a.y);
    WITH_TYPE(a.from, return launch(how, convert<T, U>, static_cast<const T*>(a.x), y, a.count);)
}

ENTRY(convert, Convert) { WITH_TYPE(arguments->to, return convert_to<T>(*arguments, stream);) }
