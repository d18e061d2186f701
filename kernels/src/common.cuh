// Definitions that all kernels use: element types, vector loads, sums over a block, random numbers.
//
// The same source runs on a GPU and, compiled by a C++ compiler, on the emulator. So kernels allocate shared
// memory from an `Arena` and access it through `Shared`. Instructions that C++ does not have are defined
// twice: here and in emulator.hpp.
#pragma once

#include <stdint.h>

#ifdef EMULATOR
#include "emulator.hpp"
#define EXPECT_ALIGNED(pointer, bytes) emulator::expect_aligned(pointer, bytes)
#define JOIN(prefix, name) prefix##name
#define JOINED(prefix, name) JOIN(prefix, name)
#define ENTRY(name, Arguments) extern "C" int JOINED(PREFIX, name)(const Arguments* arguments, cudaStream_t stream)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define EXPECT_ALIGNED(pointer, bytes)
#define ENTRY(name, Arguments) extern "C" int lodestone_##name(const Arguments* arguments, cudaStream_t stream)

template <class T>
struct Shared {
    T* elements;
    __device__ __forceinline__ T& operator[](int i) const { return elements[i]; }
    __device__ __forceinline__ Shared from(int i, int) const { return {elements + i}; }
};

extern __shared__ __align__(16) char shared_memory[];

// Allocates the dynamic shared memory of a block from its start.
struct Arena {
    size_t next = 0;
    template <class T>
    __device__ __forceinline__ Shared<T> take(int count) {
        next = (next + 15) / 16 * 16;
        Shared<T> array{reinterpret_cast<T*>(shared_memory + next)};
        next += size_t(count) * sizeof(T);
        return array;
    }
};

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
    Launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream)
        : grid(grid), block(block), shared_bytes(shared_bytes), stream(stream) {}
};

template <class... P, class... A>
int launch(const Launch& how, void (*kernel)(P...), A... arguments) {
    if (how.shared_bytes > (48 << 10)) {
        cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_bytes));
        if (error != cudaSuccess) return error;
    }
    kernel<<<how.grid, how.block, how.shared_bytes, how.stream>>>(arguments...);
    return cudaGetLastError();
}
#endif

typedef __nv_bfloat16 bf16;
typedef __half f16;

// The numbers of the element types in the arguments of an entry: `dtype_code` of gpu.rs.
enum Type { F32, BF16, F16 };

// Runs the statements with `T` defined as the element type with the number `type`.
#define WITH_TYPE(type, ...)                  \
    switch (type) {                           \
        case F32: {                           \
            typedef float T;                  \
            __VA_ARGS__                       \
        }                                     \
        case BF16: {                          \
            typedef bf16 T;                   \
            __VA_ARGS__                       \
        }                                     \
        default: {                            \
            typedef f16 T;                    \
            __VA_ARGS__                       \
        }                                     \
    }

constexpr unsigned ALL_LANES = 0xffffffffu;

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of blocks for `count` elements in a grid-stride loop; at most 4096, which fills any GPU.
inline unsigned blocks_for(int64_t count, int threads) {
    const int64_t blocks = ceil_div(count, threads);
    return unsigned(blocks < 4096 ? blocks : 4096);
}

// Conversion to f32 and back, rounded to nearest.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
    return __float2half_rn(x);
}

// N elements that one instruction reads or writes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// Loads N elements and converts them to f32. The address must be a multiple of 16 bytes, or of the size of
// the N elements if that is less.
template <int N, class T>
__device__ __forceinline__ void load(const T* p, float (&x)[N]) {
    if constexpr (sizeof(T) * N > 16) {
        constexpr int HALF = N / 2;
        float low[HALF], high[HALF];
        load<HALF>(p, low);
        load<HALF>(p + HALF, high);
#pragma unroll
        for (int i = 0; i < HALF; i++) x[i] = low[i], x[HALF + i] = high[i];
    } else {
        EXPECT_ALIGNED(p, sizeof(T) * N);
        Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = to_float(pack.at[i]);
    }
}

// Converts N elements from f32 and stores them. The address must be aligned as for `load`.
template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&x)[N]) {
    if constexpr (sizeof(T) * N > 16) {
        constexpr int HALF = N / 2;
        float low[HALF], high[HALF];
#pragma unroll
        for (int i = 0; i < HALF; i++) low[i] = x[i], high[i] = x[HALF + i];
        store<HALF>(p, low);
        store<HALF>(p + HALF, high);
    } else {
        EXPECT_ALIGNED(p, sizeof(T) * N);
        Pack<T, N> pack;
#pragma unroll
        for (int i = 0; i < N; i++) pack.at[i] = from_float<T>(x[i]);
        *reinterpret_cast<Pack<T, N>*>(p) = pack;
    }
}

// Whether rows of `width` elements at all these addresses can be accessed as vectors of 16 bytes.
template <class T, class... Pointers>
bool whole_vectors(int64_t width, const Pointers*... pointers) {
    return width % (16 / sizeof(T)) == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// The sum of x over the lanes of a warp.
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

// The sums of N numbers over the threads of a one-dimensional block, in a fixed order. `scratch` has 32 · N
// elements and can be reused afterwards.
template <int N>
__device__ __forceinline__ void sum_of_block(float (&x)[N], Shared<float> scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = sum_of_warp(x[i]);
        if (lane == 0) scratch[warp * N + i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = 0;
        for (int w = 0; w < warps; w++) x[i] += scratch[w * N + i];
    }
    __syncthreads();
}

// The four words that Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) computes from a counter.
struct Words {
    uint32_t at[4];
};

__device__ __forceinline__ Words philox(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t low, uint32_t high) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t even_high = __umulhi(a, 0xd2511f53u), even = a * 0xd2511f53u;
        const uint32_t odd_high = __umulhi(c, 0xcd9e8d57u), odd = c * 0xcd9e8d57u;
        a = odd_high ^ b ^ low;
        b = odd;
        c = even_high ^ d ^ high;
        d = even;
        low += 0x9e3779b9u;
        high += 0xbb67ae85u;
    }
    return {{a, b, c, d}};
}

// One dropout, see dropout.rs. A `threshold` of 0 keeps every element.
struct Dropout {
    uint32_t seed_low, seed_high, step, site;
    uint32_t threshold;  // p · 2^32
    float kept;          // 1/(1 − p)

    // The random words of the elements 4 · block to 4 · block + 3 of a sequence.
    __device__ __forceinline__ Words words(uint32_t sequence, uint32_t block) const {
        return philox(block, site, sequence, step, seed_low, seed_high);
    }
    __device__ __forceinline__ float factor(uint32_t word) const { return word >= threshold ? kept : 0.0f; }
    __device__ __forceinline__ float of(uint32_t sequence, uint64_t element) const {
        const Words w = words(sequence, uint32_t(element / 4));
        const uint32_t i = uint32_t(element % 4);
        return factor(i == 0 ? w.at[0] : i == 1 ? w.at[1] : i == 2 ? w.at[2] : w.at[3]);
    }
};

// The packing of a chunk on the device. Token t is at position `positions[t]` of sequence `sequences[t]`.
// Sequence n has the rows `offsets[n]..offsets[n + 1]` and the index `numbers[n]` in the global batch.
struct Packing {
    const uint32_t* offsets;    // (N+1)
    const uint32_t* numbers;    // (N)
    const uint32_t* sequences;  // (T)
    const uint32_t* positions;  // (T)
    int32_t tokens, count, longest;
};
