// The embedding layer; see embedding.rs.

#include "common.cuh"

struct EmbeddingForward {
    const uint32_t* ids;   // (T)
    const void* word;      // (V, D)
    const void* position;  // (P, D) or null
    const void* token_type;      // (types, D) or null
    void* x;               // (T, D)
    Packing packing;
    int32_t width, position_offset, type;
};

template <class T, int V>
__global__ void embedding_forward(EmbeddingForward a) {
    const int64_t t = blockIdx.x;
    const T* word = static_cast<const T*>(a.word) + int64_t(a.ids[t]) * a.width;
    const T* position = static_cast<const T*>(a.position);
    if (position) position += int64_t(a.position_offset + a.packing.positions[t]) * a.width;
    for (int d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
        float x[V], more[V];
        load<V>(word + d, x);
        if (position) {
            load<V>(position + d, more);
#pragma unroll
            for (int i = 0; i < V; i++) x[i] += more[i];
        }
        if (a.token_type) {
            load<V>(static_cast<const T*>(a.token_type) + d, more);
#pragma unroll
            for (int i = 0; i < V; i++) x[i] += more[i];
        }
        store<V>(static_cast<T*>(a.x) + t * a.width + d, x);
    }
}

template <class T>
static int embedding_of(const EmbeddingForward& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    const Launch how(unsigned(a.packing.tokens), 128, 0, stream);
    if (whole_vectors<T>(a.width, a.word, a.position, a.token_type, a.x)) return launch(how, embedding_forward<T, V>, a);
    return launch(how, embedding_forward<T, 1>, a);
}

ENTRY(embedding_forward, EmbeddingForward) { WITH_TYPE(arguments->type, return embedding_of<T>(*arguments, stream);) }

struct EmbeddingBackward {
    const void* dx;       // (T, D)
    const uint32_t* ids;  // (T)
    float* d_word;         // (V, D), added to, or null
    float* d_position;     // (P, D), added to, or null
    Packing packing;
    int32_t width, position_offset, type;
};

// The block of the first token with an id adds all tokens with that id, in their order, without atomics and
// without sorting.
template <class T>
__global__ void add_word_gradients(EmbeddingBackward a) {
    const int t = blockIdx.x;
    const uint32_t id = a.ids[t];
    for (int base = 0; base < t; base += 32) {
        const int s = base + threadIdx.x % 32;
        if (__any_sync(ALL_LANES, s < t && a.ids[s] == id)) return;
    }
    const int d = blockIdx.y * blockDim.x + threadIdx.x;
    float sum = 0;
    for (int base = t; base < a.packing.tokens; base += 32) {
        const int s = base + threadIdx.x % 32;
        unsigned hits = __ballot_sync(ALL_LANES, s < a.packing.tokens && a.ids[s] == id);
        for (int i = 0; hits; i++, hits >>= 1) {
            if ((hits & 1) && d < a.width) sum += to_float(static_cast<const T*>(a.dx)[int64_t(base + i) * a.width + d]);
        }
    }
    if (d < a.width) a.d_word[int64_t(id) * a.width + d] += sum;
}

// One block for each position.
template <class T>
__global__ void add_position_gradients(EmbeddingBackward a) {
    const uint32_t position = blockIdx.x;
    for (int d = threadIdx.x; d < a.width; d += blockDim.x) {
        float sum = 0;
        for (int n = 0; n < a.packing.count; n++) {
            const uint32_t t = a.packing.offsets[n] + position;
            if (t < a.packing.offsets[n + 1]) sum += to_float(static_cast<const T*>(a.dx)[int64_t(t) * a.width + d]);
        }
        a.d_position[int64_t(a.position_offset + position) * a.width + d] += sum;
    }
}

template <class T>
static int backward_of(const EmbeddingBackward& a, cudaStream_t stream) {
    int error = 0;
    if (a.d_word) {
        const dim3 grid(unsigned(a.packing.tokens), unsigned(ceil_div(a.width, 256)));
        error = launch(Launch(grid, 256, 0, stream), add_word_gradients<T>, a);
    }
    if (!error && a.d_position) {
        error = launch(Launch(unsigned(a.packing.longest), 256, 0, stream), add_position_gradients<T>, a);
    }
    return error;
}

ENTRY(embedding_backward, EmbeddingBackward) { WITH_TYPE(arguments->type, return backward_of<T>(*arguments, stream);) }
