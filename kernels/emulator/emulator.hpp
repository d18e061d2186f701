// An emulator of CUDA on a CPU. It implements the part of CUDA that the .cu files of this crate use, so that
// a C++ compiler can compile them. It runs one block at a time, with a fiber for each thread of the block.
//
// It is stricter than a GPU. Fibers and blocks run in random order. `Shared` records for each two bytes of
// shared memory which threads wrote and read them last, and between which barriers. Reading memory that was
// not written, that is the target of a copy in flight, or that another thread wrote without a barrier in
// between is an error, in any order of the threads. A barrier that not all threads reach is an error too.
// Global memory comes from `emulated_allocate`: it is initialised with NaNs and lies between two guard pages.
//
// An error ends the launch; `emulated_error` returns the message.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef void* cudaStream_t;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __nv_bfloat16 {
    uint16_t bits;
};

struct __half {
    uint16_t bits;
};

namespace emulator {

// The coordinates of the running fiber.
struct Coordinates {
    dim3 thread, block, block_size, grid;
    int lane;
};
extern thread_local Coordinates coordinates;

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    const char* name;
    Launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const char* name = __builtin_FUNCTION())
        : grid(grid), block(block), shared_bytes(shared_bytes), name(name) {}
};

// Runs `body` for each thread of each block. Returns 0, or 1 after an error.
int run(const Launch& launch, const std::function<void()>& body);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads: waits for all threads of the block.
void barrier(const char* file, int line);

// The operations of a warp. All lanes must reach the same one.
enum WarpOperation { SHUFFLE, VOTE, SYNC, LDMATRIX, MMA };
constexpr int CONTRIBUTION_BYTES = 64;  // the bytes that a lane can contribute to an operation

// Waits for all lanes of the warp and exchanges `bytes` bytes of each. The contribution of lane l is at
// `result + l * CONTRIBUTION_BYTES`.
const char* exchange(WarpOperation operation, const void* contribution, size_t bytes);

// Checks that this thread may read or write `bytes` bytes of shared memory from `offset` on, and returns
// their address.
const char* readable(size_t offset, size_t bytes);
char* writable(size_t offset, size_t bytes);
size_t shared_bytes();

// cp.async: a copy is in flight until this thread waits for its group.
void copy_async(size_t offset, const void* from, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(int groups_in_flight);

inline void expect_aligned(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("an access of %zu bytes at an address that is not a multiple of that", bytes);
}

}  // namespace emulator

#define threadIdx (emulator::coordinates.thread)
#define blockIdx (emulator::coordinates.block)
#define blockDim (emulator::coordinates.block_size)
#define gridDim (emulator::coordinates.grid)
#define __syncthreads() emulator::barrier(__FILE__, __LINE__)

// An array in shared memory, with checks of bounds and of races.
template <class T>
struct Shared {
    size_t offset;
    int count;

    struct Element {
        size_t offset;
        operator T() const {
            T value;
            memcpy(&value, emulator::readable(offset, sizeof(T)), sizeof(T));
            return value;
        }
        T operator=(T value) const {
            memcpy(emulator::writable(offset, sizeof(T)), &value, sizeof(T));
            return value;
        }
        T operator=(const Element& other) const { return *this = T(other); }
        T operator+=(T value) const { return *this = T(*this) + value; }
    };

    size_t at(int i, int length = 1) const {
        if (i < 0 || i + length > count)
            emulator::fail("elements %d..%d of a shared array of %d", i, i + length, count);
        return offset + size_t(i) * sizeof(T);
    }
    Element operator[](int i) const { return {at(i)}; }
    Shared from(int i, int length) const { return {at(i, length), length}; }
};

// Allocates the dynamic shared memory of a block from its start.
struct Arena {
    size_t next = 0;
    template <class T>
    Shared<T> take(int count) {
        next = (next + 15) / 16 * 16;
        Shared<T> array{next, count};
        next += size_t(count) * sizeof(T);
        if (next > emulator::shared_bytes())
            emulator::fail("the kernel uses %zu bytes of shared memory, but the launch has %zu", next, emulator::shared_bytes());
        return array;
    }
};

template <class... P, class... A>
int launch(const emulator::Launch& how, void (*kernel)(P...), A... arguments) {
    return emulator::run(how, [&] { kernel(arguments...); });
}
using emulator::Launch;

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    T result;
    memcpy(&result, emulator::exchange(emulator::SHUFFLE, &value, sizeof(T)) + (lane & 31) * emulator::CONTRIBUTION_BYTES, sizeof(T));
    return result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return __shfl_sync(mask, value, emulator::coordinates.lane ^ lanes);
}
inline unsigned __ballot_sync(unsigned, int yes) {
    const char* votes = emulator::exchange(emulator::VOTE, &yes, sizeof(yes));
    unsigned result = 0;
    for (int l = 0; l < 32; l++) {
        int vote;
        memcpy(&vote, votes + l * emulator::CONTRIBUTION_BYTES, sizeof(vote));
        result |= unsigned(vote != 0) << l;
    }
    return result;
}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline void __syncwarp(unsigned = ~0u) { emulator::exchange(emulator::SYNC, "", 1); }

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

// Rounds to nearest, ties to even; a NaN stays one.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

inline __half __float2half_rn(float x) {
    uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above
    if (magnitude < 0x38800000) {  // below 2^-14 halves are multiples of 2^-24
        return {uint16_t(sign | uint32_t(nearbyintf(__uint_as_float(magnitude) * 16777216.0f)))};
    }
    return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}
inline float __half2float(__half x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
    if (exponent == 0) {
        float tiny = float(mantissa) / 16777216.0f;
        return sign ? -tiny : tiny;
    }
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
