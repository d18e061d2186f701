// A kernel with a fault for each `kind`, and without one for kind 0, to test the emulator.

#include "mma.cuh"

struct Fault {
    float* buffer;  // (count)
    int32_t count, kind;
};

__global__ void fault(Fault a) {
    Arena arena;
    Shared<float> tile = arena.take<float>(64);
    const int t = threadIdx.x, lane = t % 32;
    switch (a.kind) {
        case 0:  // no fault: a barrier or an operation of the warp orders each exchange between threads
            tile[t] = float(t);
            __syncwarp();
            a.buffer[t] = tile[t ^ 1];
            __syncthreads();
            tile[63 - t] = a.buffer[t] + __shfl_xor_sync(ALL_LANES, 0.0f, 1);
            __syncthreads();
            a.buffer[t] = tile[t];
            break;
        case 1:
            if (t < 32) __syncthreads();
            break;
        case 2:
            if (t < 32) {
                __syncthreads();
            } else {
                __syncthreads();
            }
            break;
        case 3: a.buffer[t] = tile[t]; break;
        case 4:
            tile[t] = 1;
            a.buffer[t] = tile[63 - t];
            break;
        case 5:
            tile[t] = 1;
            __syncthreads();
            a.buffer[t] = tile[63 - t];
            tile[t] = 2;
            break;
        case 6: a.buffer[t + 1] = 1; break;
        case 7: a.buffer[t] = a.buffer[t - 1000]; break;
        case 8: tile[t + 1] = 1; break;
        case 9:
            copy_async(tile, t / 4 * 4, a.buffer + t / 4 * 4, false);
            break;
        case 10:
            if (t % 4 == 0) copy_async(tile, t, a.buffer + t, false);
            commit_copies();
            wait_for_copies<1>();
            __syncthreads();
            a.buffer[t] = tile[t];
            break;
        case 11:
            if (lane < 16) {
                __syncwarp();
            } else {
                __any_sync(ALL_LANES, 1);
            }
            break;
        case 12:
            if (lane < 16) __syncwarp();
            break;
        case 13: arena.take<float>(1)[0] = 1; break;
        case 14: {
            float x[4];
            load<4>(a.buffer + 1, x);
            a.buffer[0] = x[0];
            break;
        }
    }
}

ENTRY(fault, Fault) { return launch(Launch(2, 64, 64 * sizeof(float), stream), fault, *arguments); }
