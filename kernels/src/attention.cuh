// What the kernels of attention share: their arguments, who sees whom, and attention without tensor cores.
#pragma once

#include "mma.cuh"

struct Attention {
    const void* q;       // (T, H·K)
    const void* k;       // (T, G·K)
    const void* v;       // (T, G·K)
    void* o;             // (T, H·K), an input of backward
    float* lse;          // (H, T), an input of backward
    const void* d_o;     // (T, H·K), of backward, as all below
    float* delta;        // (H, T) Σ do∘o of each row
    void* dq;            // (T, H·K)
    void* dk;            // (T, G·K)
    void* dv;            // (T, G·K)
    const float* bias;   // (H, 2·reach + 1) added to a score by j − i, cut off at ±reach; or null
    float* dbias;        // (H, 2·reach + 1) or null
    Packing packing;
    Dropout dropout;
    int32_t heads, kv_heads, head_width, type;
    int32_t left, right;  // token i sees j with i − left ≤ j ≤ i + right
    int32_t drops, reach;
    float scale;

    __device__ __forceinline__ bool sees(int i, int j) const { return j >= i - left && j <= i + right; }
};

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr int NO_LIMIT = 1 << 28;

// The probability's factor, 0 or 1/(1 − p), at row i and column j of a head's matrix.
__device__ __forceinline__ float kept(const Attention& a, uint32_t sequence, int h, int64_t tokens, int i, int j) {
    return a.dropout.of(sequence, uint64_t((h * tokens + i) * tokens + j));
}

// Where a row of a head begins in q, o, do and dq; and in k, v, dk and dv.
__device__ __forceinline__ int64_t wide(const Attention& a, int64_t t, int h) {
    return (t * a.heads + h) * a.head_width;
}
__device__ __forceinline__ int64_t narrow(const Attention& a, int64_t t, int g) {
    return (t * a.kv_heads + g) * a.head_width;
}

// Σ do∘o, a warp a row.
template <class T>
__global__ void attention_delta(Attention a) {
    const int64_t row = blockIdx.x * int64_t(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= int64_t(a.packing.tokens) * a.heads) return;
    float sum = 0;
    for (int d = threadIdx.x % 32; d < a.head_width; d += 32) {
        const int64_t at = row * a.head_width + d;
        sum += to_float(static_cast<const T*>(a.o)[at]) * to_float(static_cast<const T*>(a.d_o)[at]);
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) a.delta[row % a.heads * a.packing.tokens + row / a.heads] = sum;
}

// Attention without tensor cores, for f32 and for heads wider than the tiles of the others: a warp a row, 32 columns at a
// time, each lane the scores of a column, and then each lane some elements of the row.
constexpr int WIDEST = 256;
constexpr int OWN = WIDEST / 32;

template <class T>
__device__ __forceinline__ float dot(const T* x, const T* y, int width) {
    float sum = 0;
    for (int d = 0; d < width; d++) sum += to_float(x[d]) * to_float(y[d]);
    return sum;
}

// acc += weight_l · row of lane l, over all lanes l below `count`
template <class T>
__device__ __forceinline__ void add_rows(float (&acc)[OWN], float weight, const T* row, int64_t stride, int count, int width) {
    for (int l = 0; l < count; l++) {
        const float w = __shfl_sync(ALL_LANES, weight, l);
#pragma unroll
        for (int n = 0; n < OWN; n++) {
            const int d = n * 32 + threadIdx.x % 32;
            if (d < width) acc[n] += w * to_float(row[l * stride + d]);
        }
    }
}

template <class T>
__device__ __forceinline__ void write_own(T* to, const float (&acc)[OWN], float factor, int width) {
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const int d = n * 32 + threadIdx.x % 32;
        if (d < width) to[d] = from_float<T>(acc[n] * factor);
    }
}

template <class T>
__global__ void plain_forward(Attention a) {
    const int64_t row = blockIdx.x * int64_t(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= int64_t(a.packing.tokens) * a.heads) return;
    const int h = int(row % a.heads), g = h / (a.heads / a.kv_heads), lane = threadIdx.x % 32, width = a.head_width;
    const int64_t t = row / a.heads;
    const uint32_t n = a.packing.sequences[t], start = a.packing.offsets[n];
    const int tokens = int(a.packing.offsets[n + 1] - start), i = int(a.packing.positions[t]);
    const T* q = static_cast<const T*>(a.q) + wide(a, t, h);
    const int64_t stride = int64_t(a.kv_heads) * width;
    float acc[OWN] = {}, top = -INFINITY, total = 0;
    const int first = max(0, i - a.left), end = min(tokens, i + a.right + 1);
    for (int base = first; base < end; base += 32) {
        const int count = min(32, end - base), j = base + lane;
        const int64_t key = narrow(a, start + base, g);
        float s = -INFINITY;
        if (lane < count) {
            s = a.scale * dot(q, static_cast<const T*>(a.k) + key + lane * stride, width);
            if (a.bias) s += a.bias[h * (2 * a.reach + 1) + a.reach + max(-a.reach, min(a.reach, j - i))];
        }
        float highest = s;
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, lanes));
        highest = fmaxf(highest, top);
        float p = expf(s - highest);
        const float shrink = expf(top - highest);
        top = highest;
        total = total * shrink + sum_of_warp(p);
#pragma unroll
        for (int k = 0; k < OWN; k++) acc[k] *= shrink;
        if (a.drops && lane < count) p *= kept(a, a.packing.numbers[n], h, tokens, i, j);
        add_rows(acc, p, static_cast<const T*>(a.v) + key, stride, count, width);
    }
    write_own(static_cast<T*>(a.o) + wide(a, t, h), acc, 1.0f / total, width);
    if (lane == 0) a.lse[int64_t(h) * a.packing.tokens + t] = top + logf(total);
}

// KEYS: a row is a key and gives dk and dv; otherwise a query, which gives dq.
template <class T, bool KEYS>
__global__ void plain_backward(Attention a) {
    const int rows = KEYS ? a.kv_heads : a.heads, group = a.heads / a.kv_heads, lane = threadIdx.x % 32;
    const int64_t row = blockIdx.x * int64_t(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= int64_t(a.packing.tokens) * rows) return;
    const int width = a.head_width, own_head = int(row % rows);
    const int64_t t = row / rows;
    const uint32_t n = a.packing.sequences[t], start = a.packing.offsets[n];
    const int tokens = int(a.packing.offsets[n + 1] - start), r = int(a.packing.positions[t]);
    const int before = KEYS ? a.right : a.left, after = KEYS ? a.left : a.right;
    const int first = max(0, r - before), end = min(tokens, r + after + 1);
    const int64_t stride = int64_t(KEYS ? a.heads : a.kv_heads) * width;
    const T *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
    const T* d_o = static_cast<const T*>(a.d_o);
    float of_first[OWN] = {}, of_second[OWN] = {};
    for (int member = 0; member < (KEYS ? group : 1); member++) {
        const int h = KEYS ? own_head * group + member : own_head, g = h / group;
        for (int base = first; base < end; base += 32) {
            const int count = min(32, end - base), other = base + lane;
            const int i = KEYS ? other : r, j = KEYS ? r : other;
            float ds = 0, p = 0;
            if (lane < count) {
                const int64_t query = wide(a, start + i, h), key = narrow(a, start + j, g);
                const int64_t sum = int64_t(h) * a.packing.tokens + start + i;
                float s = a.scale * dot(q + query, k + key, width);
                const int distance = a.reach + max(-a.reach, min(a.reach, j - i));
                if (a.bias) s += a.bias[h * (2 * a.reach + 1) + distance];
                const float probability = expf(s - a.lse[sum]);
                const float factor = a.drops ? kept(a, a.packing.numbers[n], h, tokens, i, j) : 1.0f;
                p = probability * factor;
                ds = probability * (factor * dot(d_o + query, v + key, width) - a.delta[sum]);
            }
            if (KEYS) {
                add_rows(of_first, ds, q + wide(a, start + base, h), stride, count, width);
                add_rows(of_second, p, d_o + wide(a, start + base, h), stride, count, width);
            } else {
                add_rows(of_first, ds, k + narrow(a, start + base, g), stride, count, width);
            }
        }
    }
    if (KEYS) {
        write_own(static_cast<T*>(a.dk) + narrow(a, t, own_head), of_first, a.scale, width);
        write_own(static_cast<T*>(a.dv) + narrow(a, t, own_head), of_second, 1.0f, width);
    } else {
        write_own(static_cast<T*>(a.dq) + wide(a, t, own_head), of_first, a.scale, width);
    }
}

// The gradient of the bias, a block a head and a distance: Σ ds over all pairs at that distance, in their order.
template <class T>
__global__ void bias_backward(Attention a) {
    Arena arena;
    Shared<float> scratch = arena.take<float>(32);
    const int h = blockIdx.y, column = blockIdx.x, g = h / (a.heads / a.kv_heads), lane = threadIdx.x % 32;
    const T *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
    float total[1] = {0};
    for (int64_t t = threadIdx.x / 32; t < a.packing.tokens; t += blockDim.x / 32) {
        const uint32_t n = a.packing.sequences[t], start = a.packing.offsets[n];
        const int tokens = int(a.packing.offsets[n + 1] - start), i = int(a.packing.positions[t]);
        // The outermost columns stand for all distances beyond them.
        int first = column == 0 ? 0 : i + column - a.reach;
        int last = column == 2 * a.reach ? tokens - 1 : i + column - a.reach;
        first = max(max(first, 0), i - a.left);
        last = min(min(last, tokens - 1), i + a.right);
        const int64_t query = wide(a, t, h), sum = int64_t(h) * a.packing.tokens + t;
        for (int j = first; j <= last; j++) {
            const int64_t key = narrow(a, start + j, g);
            float s = 0, dp = 0;
            for (int d = lane; d < a.head_width; d += 32) {
                s += to_float(q[query + d]) * to_float(k[key + d]);
                dp += to_float(static_cast<const T*>(a.d_o)[query + d]) * to_float(v[key + d]);
            }
            s = a.scale * sum_of_warp(s) + a.bias[h * (2 * a.reach + 1) + column];
            dp = sum_of_warp(dp);
            if (lane == 0) {
                const float factor = a.drops ? kept(a, a.packing.numbers[n], h, tokens, i, j) : 1.0f;
                total[0] += expf(s - a.lse[sum]) * (factor * dp - a.delta[sum]);
            }
        }
    }
    sum_of_block(total, scratch);
    if (threadIdx.x == 0) a.dbias[h * (2 * a.reach + 1) + column] = total[0];
}
