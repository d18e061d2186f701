// Tensor-core products of 16-bit elements, and asynchronous copies to shared memory.
//
// A warp multiplies a 16 × 16 tile A by a 16 × 8 tile B into a 16 × 8 tile of f32 (mma.sync.m16n8k16). With g
// = lane / 4 and t = lane % 4, a lane holds rows g and g + 8, columns 2t and 2t + 1 of the result; rows g and
// g + 8, columns 2t, 2t + 1, 2t + 8 and 2t + 9 of A; and column g, rows 2t, 2t + 1, 2t + 8 and 2t + 9 of B
// (PTX ISA, "Matrix fragments").
#pragma once

#include "common.cuh"

// Two elements in one register; the first one is in the low half.
template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
    Pack<T, 2> both = {{from_float<T>(low), from_float<T>(high)}};
    uint32_t bits;
    memcpy(&bits, &both, 4);
    return bits;
}

#ifdef EMULATOR

template <class T>
inline float element_of(uint32_t pair, int which) {
    uint16_t bits = uint16_t(pair >> (16 * which));
    T value;
    memcpy(&value, &bits, 2);
    return to_float(value);
}

// d += a · b
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct {
        uint32_t a[4], b[2];
    } local, of[32];
    memcpy(local.a, a, sizeof(local.a));
    memcpy(local.b, b, sizeof(local.b));
    const char* contributions = emulator::exchange(emulator::MMA, &local, sizeof(local));
    for (int l = 0; l < 32; l++) memcpy(&of[l], contributions + l * emulator::CONTRIBUTION_BYTES, sizeof(local));
    const int g = emulator::coordinates.lane / 4, t = emulator::coordinates.lane % 4;
    for (int i = 0; i < 4; i++) {
        const int column = 2 * t + i % 2;
        double sum = 0;
        for (int k = 0; k < 16; k++) {
            const uint32_t x = of[g * 4 + k % 8 / 2].a[i / 2 + k / 8 * 2], y = of[column * 4 + k % 8 / 2].b[k / 8];
            sum += double(element_of<T>(x, k % 2)) * double(element_of<T>(y, k % 2));
        }
        d[i] += float(sum);
    }
}

// Loads four 8 × 8 matrices (ldmatrix). Lane l passes the index of the first element of row l % 8 of matrix l
// / 8. A lane receives row g, columns 2t and 2t + 1 of each matrix, or column g, rows 2t and 2t + 1 if
// TRANSPOSED.
template <bool TRANSPOSED, class T>
inline void load_matrices(uint32_t (&registers)[4], const Shared<T>& tile, int index) {
    if (tile.at(index, 8) % 16) emulator::fail("a row of a matrix at byte %zu of shared memory", tile.at(index, 8));
    const char* contributions = emulator::exchange(emulator::LDMATRIX, &index, sizeof(index));
    const int g = emulator::coordinates.lane / 4, t = emulator::coordinates.lane % 4;
    for (int m = 0; m < 4; m++) {
        uint16_t halves[2];
        for (int i = 0; i < 2; i++) {
            const int row = TRANSPOSED ? 2 * t + i : g, column = TRANSPOSED ? g : 2 * t + i;
            int start;
            memcpy(&start, contributions + (m * 8 + row) * emulator::CONTRIBUTION_BYTES, sizeof(start));
            T element = tile[start + column];
            memcpy(&halves[i], &element, 2);
        }
        registers[m] = halves[0] | uint32_t(halves[1]) << 16;
    }
}

// Starts an asynchronous copy of 16 bytes, or of zeros, to element `index` of an array in shared memory
// (cp.async).
template <class T>
inline void copy_async(const Shared<T>& to, int index, const T* from, bool zeros) {
    emulator::copy_async(to.at(index, 16 / sizeof(T)), from, 16, zeros ? 16 : 0);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int GROUPS>
inline void wait_for_copies() {
    emulator::wait_for_copies(GROUPS);
}

#else

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool TRANSPOSED, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const Shared<T>& tile, int index) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(tile.elements + index));
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    }
}

template <class T>
__device__ __forceinline__ void copy_async(const Shared<T>& to, int index, const T* from, bool zeros) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(to.elements + index));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(zeros ? 0 : 16) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

#endif
