// The arguments of the attention kernels, and the kernels without tensor cores.
#pragma once

#include "mma.cuh"

struct Attention {
    const void* q;       // (T, H·K)
    const void* k;       // (T, G·K)
    const void* v;       // (T, G·K)
    void* o;             // (T, H·K), an input of backward
    float* lse;          // (H, T), an input of backward
    const void* d_o;     // (T, H·K); this and the following pointers are only for backward
    float* delta;        // (H, T) Σ do∘o of each row, which backward computes first
    void* dq;            // (T, H·K)
    void* dk;            // (T, G·K)
    void* dv;            // (T, G·K)
    const float* bias;   // (H, 2·max_distance + 1) added to a score by j − i, clamped to ±max_distance; or null
    float* dbias;        // (H, 2·max_distance + 1) or null
    Packing packing;
    Dropout dropout;
    int32_t heads, kv_heads, head_width, type;
    int32_t left, right;  // token i attends to j if i − left ≤ j ≤ i + right
    int32_t has_dropout, max_distance;
    float scale;

    __device__ __forceinline__ bool sees(int i, int j) const { return j >= i - left && j <= i + right; }
    // The bias of query i and key j in head h.
    __device__ __forceinline__ float bias_of(int h, int i, int j) const {
        return bias[h * (2 * max_distance + 1) + max_distance + max(-max_distance, min(max_distance, j - i))];
    }
};

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr int NO_LIMIT = 1 << 28;

// The dropout factor, 0 or 1/(1 − p), of the probability of query i and key j in head h.
__device__ __forceinline__ float dropout_factor(const Attention& a, uint32_t sequence, int h, int64_t tokens, int i, int j) {
    return a.dropout.of(sequence, uint64_t((h * tokens + i) * tokens + j));
}

// The offset of the row of token t and head h in q, o, do and dq; and of key-value head g in k, v, dk and dv.
__device__ __forceinline__ int64_t q_row(const Attention& a, int64_t t, int h) {
    return (t * a.heads + h) * a.head_width;
}
__device__ __forceinline__ int64_t kv_row(const Attention& a, int64_t t, int g) {
    return (t * a.kv_heads + g) * a.head_width;
}

// delta = Σ do∘o, one warp for each row.
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

// Attention without tensor cores, for f32 and for heads that are larger than the tiles of the tensor-core
// kernels. A warp computes one row, 32 columns at a time: first each lane computes the score of one column,
// then some elements of the row.
constexpr int MAX_HEAD_WIDTH = 256;
constexpr int LANE_ELEMENTS = MAX_HEAD_WIDTH / 32;  // of a row in each lane

template <class T>
__device__ __forceinline__ float dot(const T* x, const T* y, int width) {
    float sum = 0;
    for (int d = 0; d < width; d++) sum += to_float(x[d]) * to_float(y[d]);
    return sum;
}

// acc += Σ weight_l · row l over the lanes l below `count`
template <class T>
__device__ __forceinline__ void add_rows(float (&acc)[LANE_ELEMENTS], float weight, const T* row, int64_t stride, int count, int width) {
    for (int l = 0; l < count; l++) {
        const float w = __shfl_sync(ALL_LANES, weight, l);
#pragma unroll
        for (int n = 0; n < LANE_ELEMENTS; n++) {
            const int d = n * 32 + threadIdx.x % 32;
            if (d < width) acc[n] += w * to_float(row[l * stride + d]);
        }
    }
}

template <class T>
__device__ __forceinline__ void write_elements(T* to, const float (&acc)[LANE_ELEMENTS], float factor, int width) {
#pragma unroll
    for (int n = 0; n < LANE_ELEMENTS; n++) {
        const int d = n * 32 + threadIdx.x % 32;
        if (d < width) to[d] = from_float<T>(acc[n] * factor);
    }
}

template <class T>
__global__ void scalar_forward(Attention a) {
    const int64_t row = blockIdx.x * int64_t(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= int64_t(a.packing.tokens) * a.heads) return;
    const int h = int(row % a.heads), g = h / (a.heads / a.kv_heads), lane = threadIdx.x % 32, width = a.head_width;
    const int64_t t = row / a.heads;
    const uint32_t n = a.packing.sequences[t], start = a.packing.offsets[n];
    const int tokens = int(a.packing.offsets[n + 1] - start), i = int(a.packing.positions[t]);
    const T* q = static_cast<const T*>(a.q) + q_row(a, t, h);
    const int64_t stride = int64_t(a.kv_heads) * width;
    float acc[LANE_ELEMENTS] = {}, row_max = -INFINITY, row_sum = 0;
    const int first = max(0, i - a.left), end = min(tokens, i + a.right + 1);
    for (int base = first; base < end; base += 32) {
        const int count = min(32, end - base), j = base + lane;
        const int64_t key = kv_row(a, start + base, g);
        float s = -INFINITY;
        if (lane < count) {
            s = a.scale * dot(q, static_cast<const T*>(a.k) + key + lane * stride, width);
            if (a.bias) s += a.bias_of(h, i, j);
        }
        float new_max = s;
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, lanes));
        new_max = fmaxf(new_max, row_max);
        float p = expf(s - new_max);
        const float rescale = expf(row_max - new_max);
        row_max = new_max;
        row_sum = row_sum * rescale + sum_of_warp(p);
#pragma unroll
        for (int k = 0; k < LANE_ELEMENTS; k++) acc[k] *= rescale;
        if (a.has_dropout && lane < count) p *= dropout_factor(a, a.packing.numbers[n], h, tokens, i, j);
        add_rows(acc, p, static_cast<const T*>(a.v) + key, stride, count, width);
    }
    write_elements(static_cast<T*>(a.o) + q_row(a, t, h), acc, 1.0f / row_sum, width);
    if (lane == 0) a.lse[int64_t(h) * a.packing.tokens + t] = row_max + logf(row_sum);
}

// With KEYS a row is a key, and the kernel computes dk and dv; otherwise a row is a query, and it computes
// dq.
template <class T, bool KEYS>
__global__ void scalar_backward(Attention a) {
    const int rows = KEYS ? a.kv_heads : a.heads, group = a.heads / a.kv_heads, lane = threadIdx.x % 32;
    const int64_t row = blockIdx.x * int64_t(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= int64_t(a.packing.tokens) * rows) return;
    const int width = a.head_width, head = int(row % rows);
    const int64_t t = row / rows;
    const uint32_t n = a.packing.sequences[t], start = a.packing.offsets[n];
    const int tokens = int(a.packing.offsets[n + 1] - start), r = int(a.packing.positions[t]);
    const int before = KEYS ? a.right : a.left, after = KEYS ? a.left : a.right;
    const int first = max(0, r - before), end = min(tokens, r + after + 1);
    const int64_t stride = int64_t(KEYS ? a.heads : a.kv_heads) * width;
    const T *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
    const T* d_o = static_cast<const T*>(a.d_o);
    float acc1[LANE_ELEMENTS] = {}, acc2[LANE_ELEMENTS] = {};  // dq; with KEYS dk and dv
    for (int member = 0; member < (KEYS ? group : 1); member++) {
        const int h = KEYS ? head * group + member : head, g = h / group;
        for (int base = first; base < end; base += 32) {
            const int count = min(32, end - base), other = base + lane;
            const int i = KEYS ? other : r, j = KEYS ? r : other;
            float ds = 0, p = 0;
            if (lane < count) {
                const int64_t query = q_row(a, start + i, h), key = kv_row(a, start + j, g);
                const int64_t query_row = int64_t(h) * a.packing.tokens + start + i;
                float s = a.scale * dot(q + query, k + key, width);
                if (a.bias) s += a.bias_of(h, i, j);
                const float probability = expf(s - a.lse[query_row]);
                const float factor = a.has_dropout ? dropout_factor(a, a.packing.numbers[n], h, tokens, i, j) : 1.0f;
                p = probability * factor;
                ds = probability * (factor * dot(d_o + query, v + key, width) - a.delta[query_row]);
            }
            if (KEYS) {
                add_rows(acc1, ds, q + q_row(a, start + base, h), stride, count, width);
                add_rows(acc2, p, d_o + q_row(a, start + base, h), stride, count, width);
            } else {
                add_rows(acc1, ds, k + kv_row(a, start + base, g), stride, count, width);
            }
        }
    }
    if (KEYS) {
        write_elements(static_cast<T*>(a.dk) + kv_row(a, t, head), acc1, a.scale, width);
        write_elements(static_cast<T*>(a.dv) + kv_row(a, t, head), acc2, 1.0f, width);
    } else {
        write_elements(static_cast<T*>(a.dq) + q_row(a, t, head), acc1, a.scale, width);
    }
}

// The gradient of the bias, one block for each head and distance: Σ ds over all pairs at that distance, in a
// fixed order.
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
        // The first and the last column also stand for all distances beyond them.
        int first = column == 0 ? 0 : i + column - a.max_distance;
        int last = column == 2 * a.max_distance ? tokens - 1 : i + column - a.max_distance;
        first = max(max(first, 0), i - a.left);
        last = min(min(last, tokens - 1), i + a.right);
        const int64_t query = q_row(a, t, h), query_row = int64_t(h) * a.packing.tokens + t;
        for (int j = first; j <= last; j++) {
            const int64_t key = kv_row(a, start + j, g);
            float s = 0, dp = 0;
            for (int d = lane; d < a.head_width; d += 32) {
                s += to_float(q[query + d]) * to_float(k[key + d]);
                dp += to_float(static_cast<const T*>(a.d_o)[query + d]) * to_float(v[key + d]);
            }
            s = a.scale * sum_of_warp(s) + a.bias[h * (2 * a.max_distance + 1) + column];
            dp = sum_of_warp(dp);
            if (lane == 0) {
                const float factor = a.has_dropout ? dropout_factor(a, a.packing.numbers[n], h, tokens, i, j) : 1.0f;
                total[0] += expf(s - a.lse[query_row]) * (factor * dp - a.delta[query_row]);
            }
        }
    }
    sum_of_block(total, scratch);
    if (threadIdx.x == 0) a.dbias[h * (2 * a.max_distance + 1) + column] = total[0];
}
