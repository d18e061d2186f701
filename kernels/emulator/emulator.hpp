// A small SIMT machine on a CPU: enough of CUDA to compile the .cu files of this crate with a C++ compiler and to run
// them, one block at a time, each thread of a block a fiber.
//
// It is stricter than a GPU. Fibers and blocks run in random order. Shared memory is reached through `Shared`, which
// knows for each two bytes who wrote and who read them last, and between which barriers: a read of what nobody wrote,
// of a copy still in flight, or of what another thread wrote without a barrier in between is an error, in whatever order the
// threads happened to run; so is a barrier that not all threads reach. Global memory comes from `emulated_allocate`: it
// starts as NaNs, and a page that may not be touched lies on either side.
//
// An error ends the launch; `emulated_error` tells what it was.
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
#define __restrict__ __restrict

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

// Where the running fiber is.
struct Place {
    dim3 thread, block, block_size, grid;
    int lane;
};
extern thread_local Place place;

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    const char* name;
    Launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const char* name = __builtin_FUNCTION())
        : grid(grid), block(block), shared_bytes(shared_bytes), name(name) {}
};

// Runs `body` for every thread of every block; 0, or 1 after an error.
int run(const Launch& launch, const std::function<void()>& body);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// All threads of the block meet.
void barrier(const char* file, int line);

// What lanes of a warp meet for. They must all have come for the same.
enum Meeting { SHUFFLE, VOTE, SYNC, LDMATRIX, MMA };
constexpr int DEPOSIT = 64;  // bytes a lane can bring to a meeting

// All lanes of the warp meet, each with `bytes` of its own; the deposit of lane l is at `result + l * DEPOSIT`.
const char* meet(Meeting meeting, const void* deposit, size_t bytes);

// The address of `bytes` of shared memory from `offset` on, once it is sure that this thread may read or write them.
const char* readable(size_t offset, size_t bytes);
char* writable(size_t offset, size_t bytes);
size_t shared_bytes();

// cp.async: the copy is in flight until this thread waits for its group.
void copy_async(size_t offset, const void* from, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(int groups_in_flight);

inline void expect_aligned(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("an access of %zu bytes at an address that is no multiple", bytes);
}

}  // namespace emulator

#define threadIdx (emulator::place.thread)
#define blockIdx (emulator::place.block)
#define blockDim (emulator::place.block_size)
#define gridDim (emulator::place.grid)
#define __syncthreads() emulator::barrier(__FILE__, __LINE__)

// An array in shared memory, bounds and accesses checked.
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

// The dynamic shared memory of a block, handed out from its start.
struct Arena {
    size_t next = 0;
    template <class T>
    Shared<T> take(int count) {
        next = (next + 15) / 16 * 16;
        Shared<T> array{next, count};
        next += size_t(count) * sizeof(T);
        if (next > emulator::shared_bytes())
            emulator::fail("%zu bytes of shared memory are used, the launch has %zu", next, emulator::shared_bytes());
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
    memcpy(&result, emulator::meet(emulator::SHUFFLE, &value, sizeof(T)) + (lane & 31) * emulator::DEPOSIT, sizeof(T));
    return result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return __shfl_sync(mask, value, emulator::place.lane ^ lanes);
}
inline unsigned __ballot_sync(unsigned, int yes) {
    const char* votes = emulator::meet(emulator::VOTE, &yes, sizeof(yes));
    unsigned result = 0;
    for (int l = 0; l < 32; l++) {
        int vote;
        memcpy(&vote, votes + l * emulator::DEPOSIT, sizeof(vote));
        result |= unsigned(vote != 0) << l;
    }
    return result;
}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline void __syncwarp(unsigned = ~0u) { emulator::meet(emulator::SYNC, "", 1); }

inline float atomicAdd(float* to, float value) {
    float before = *to;
    *to = before + value;
    return before;
}
inline unsigned atomicAdd(unsigned* to, unsigned value) {
    unsigned before = *to;
    *to = before + value;
    return before;
}

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
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
T __ldg(const T* p) {
    return *p;
}
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
