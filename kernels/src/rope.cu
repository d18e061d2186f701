// Rotary position embedding of queries and keys in one launch; see rope.rs.

#include "common.cuh"

struct Rope {
    const void* x[2];  // (T, heads[i] · K); heads[1] is 0 if there is only one
    void* y[2];
    const float* cos;  // (P, K/2)
    const float* sin;  // (P, K/2)
    const uint32_t* positions;  // (T)
    int64_t rows;
    int32_t heads[2];
    int32_t head_width, type;
    float direction;
};

// A thread rotates V adjacent pairs.
template <class T, int V>
__global__ void rope(Rope a) {
    const int half = a.head_width / 2, vectors = half / V, heads = a.heads[0] + a.heads[1];
    const int64_t count = a.rows * heads * vectors;
    for (int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
        const int i = int(at % vectors) * V;
        const int64_t t = at / vectors / heads;
        // A dynamic index into the arguments would make the compiler copy them to local memory.
        int head = int(at / vectors % heads);
        const bool second = head >= a.heads[0];
        if (second) head -= a.heads[0];
        const T* x = static_cast<const T*>(second ? a.x[1] : a.x[0]);
        T* y = static_cast<T*>(second ? a.y[1] : a.y[0]);
        const int64_t from = (t * (second ? a.heads[1] : a.heads[0]) + head) * a.head_width + i;
        const int64_t angle = int64_t(a.positions[t]) * half + i;
        float low[V], high[V], cos[V], sin[V];
        load<V>(x + from, low);
        load<V>(x + from + half, high);
        load<V>(a.cos + angle, cos);
        load<V>(a.sin + angle, sin);
#pragma unroll
        for (int k = 0; k < V; k++) {
            const float a0 = low[k], a1 = high[k], s = a.direction * sin[k];
            low[k] = a0 * cos[k] - a1 * s;
            high[k] = a1 * cos[k] + a0 * s;
        }
        store<V>(y + from, low);
        store<V>(y + from + half, high);
    }
}

template <class T, int V>
static int rope_in(const Rope& a, cudaStream_t stream) {
    const int64_t count = a.rows * (a.heads[0] + a.heads[1]) * (a.head_width / 2 / V);
    return launch(Launch(blocks_for(count, 256), 256, 0, stream), rope<T, V>, a);
}

template <class T>
static int rope_of(const Rope& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    if (whole_vectors<T>(a.head_width / 2, a.x[0], a.x[1], a.y[0], a.y[1])) return rope_in<T, V>(a, stream);
    return rope_in<T, 1>(a, stream);
}

ENTRY(rope, Rope) { WITH_TYPE(arguments->type, return rope_of<T>(*arguments, stream);) }
