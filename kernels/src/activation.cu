// The activation functions of a feed-forward layer, plain and gated; see activation.rs.

#include "common.cuh"

enum Function { GELU, GELU_TANH, SILU, RELU };

struct Activation {
    const void* gate;  // x if there is no gate
    const void* up;    // or null
    const void* dy;    // or null in forward
    void* y;           // act(gate)·up, or the gradient of gate
    void* dup;         // the gradient of up, or null
    int64_t count;
    int32_t function, type;
};

// The value and the derivative at x.
template <int FUNCTION>
__device__ __forceinline__ void evaluate(float x, float& value, float& slope) {
    if constexpr (FUNCTION == GELU) {
        // Φ(x) = erfc(−x/√2)/2 is accurate for large negative x.
        const float below = 0.5f * erfcf(-0.70710678f * x);
        value = x * below;
        slope = below + x * 0.39894228f * expf(-0.5f * x * x);
    } else if constexpr (FUNCTION == RELU) {
        value = x <= 0.0f ? 0.0f : x;  // NaN stays NaN
        slope = x > 0.0f ? 1.0f : 0.0f;
    } else {
        // 1/2·(1 + tanh(z/2)) = σ(z)
        constexpr float SCALE = 1.5957692f, CUBIC = 0.044715f * SCALE;
        const float z = FUNCTION == SILU ? x : x * (SCALE + CUBIC * x * x);
        const float s = 1.0f / (1.0f + expf(-z));
        const float steep = FUNCTION == SILU ? 1.0f : SCALE + 3.0f * CUBIC * x * x;
        value = x * s;
        slope = s + x * s * (1.0f - s) * steep;
    }
}

template <class T, int V, int FUNCTION>
__global__ void activate(Activation a) {
    for (int64_t at = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * V; at < a.count;
         at += int64_t(gridDim.x) * blockDim.x * V) {
        float x[V], up[V], dy[V], y[V], dup[V];
        load<V>(static_cast<const T*>(a.gate) + at, x);
        if (a.up) load<V>(static_cast<const T*>(a.up) + at, up);
        if (a.dy) load<V>(static_cast<const T*>(a.dy) + at, dy);
#pragma unroll
        for (int i = 0; i < V; i++) {
            float value, slope;
            evaluate<FUNCTION>(x[i], value, slope);
            const float factor = a.up ? up[i] : 1.0f;
            y[i] = a.dy ? dy[i] * factor * slope : value * factor;
            dup[i] = a.dy ? dy[i] * value : 0.0f;
        }
        store<V>(static_cast<T*>(a.y) + at, y);
        if (a.dup) store<V>(static_cast<T*>(a.dup) + at, dup);
    }
}

template <class T, int V>
static int activate_in(const Activation& a, cudaStream_t stream) {
    const Launch how(blocks_for(ceil_div(a.count, V), 256), 256, 0, stream);
    switch (a.function) {
        case GELU: return launch(how, activate<T, V, GELU>, a);
        case GELU_TANH: return launch(how, activate<T, V, GELU_TANH>, a);
        case SILU: return launch(how, activate<T, V, SILU>, a);
        default: return launch(how, activate<T, V, RELU>, a);
    }
}

template <class T>
static int activate_of(const Activation& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    if (whole_vectors<T>(a.count, a.gate, a.up, a.dy, a.y, a.dup)) return activate_in<T, V>(a, stream);
    return activate_in<T, 1>(a, stream);
}

ENTRY(activation, Activation) { WITH_TYPE(arguments->type, return activate_of<T>(*arguments, stream);) }
