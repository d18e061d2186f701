// Dropout as a pure function of the element, with the same mask as on a CPU; see dropout.rs.

#include "common.cuh"

struct DropoutApply {
    const void* x;  // (T, D)
    void* y;        // (T, D)
    Packing packing;
    Dropout dropout;
    int32_t width, type, add;  // add: y += dropout(x)
};

// V is 1, or a multiple of 4 to use all four words of a Philox counter.
template <class T, int V>
__global__ void dropout(DropoutApply a) {
    const int vectors = a.width / V;
    const int64_t count = int64_t(a.packing.tokens) * vectors;
    for (int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; at < count; at += int64_t(gridDim.x) * blockDim.x) {
        const int64_t t = at / vectors, d = at % vectors * V, from = t * a.width + d;
        const uint32_t sequence = a.packing.numbers[a.packing.sequences[t]];
        const uint64_t element = uint64_t(a.packing.positions[t]) * a.width + d;
        float x[V], y[V];
        load<V>(static_cast<const T*>(a.x) + from, x);
        if (a.add) load<V>(static_cast<const T*>(a.y) + from, y);
        if constexpr (V == 1) {
            y[0] = (a.add ? y[0] : 0.0f) + x[0] * a.dropout.of(sequence, element);
        } else {
#pragma unroll
            for (int i = 0; i < V; i += 4) {
                const Words words = a.dropout.words(sequence, uint32_t((element + i) / 4));
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    y[i + k] = (a.add ? y[i + k] : 0.0f) + x[i + k] * a.dropout.factor(words.at[k]);
                }
            }
        }
        store<V>(static_cast<T*>(a.y) + from, y);
    }
}

template <class T, int V>
static int dropout_in(const DropoutApply& a, cudaStream_t stream) {
    const int64_t count = int64_t(a.packing.tokens) * (a.width / V);
    return launch(Launch(blocks_for(count, 256), 256, 0, stream), dropout<T, V>, a);
}

template <class T>
static int dropout_of(const DropoutApply& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    return whole_vectors<T>(a.width, a.x, a.y) ? dropout_in<T, V>(a, stream) : dropout_in<T, 1>(a, stream);
}

ENTRY(dropout, DropoutApply) { WITH_TYPE(arguments->type, return dropout_of<T>(*arguments, stream);) }
