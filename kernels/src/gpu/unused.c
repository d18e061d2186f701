// Stubs for candle's CUDA kernels for quantised weights and mixtures of experts, which this program never
// calls.
//
// Why they exist: candle-core with the feature `cuda` refers to these symbols, so the linker needs a
// definition of each. The real kernels are most of the build time and would be most of the program, so
// scripts/cuda.sh leaves them out of the build, and these stubs take their place. A call of one ends the
// program with a message.
//
// The list is kept by hand, because candle has no feature that leaves these kernels out. It has to match the
// version of candle in Cargo.lock. After an update of candle, the linker reports each missing symbol
// (undefined reference): add it here. A stub that candle no longer refers to does no harm.
#include <stdio.h>
#include <stdlib.h>

#define UNUSED(name)                                                                    \
    __attribute__((visibility("hidden"))) void name(void) {                             \
        fputs("candle's kernel " #name " is not part of this program: see kernels/src/gpu/unused.c\n", stderr);       \
        abort();                                                                        \
    }
#define EACH_TYPE(of, before, after)                                                    \
    of(before, q4_0, after) of(before, q4_1, after) of(before, q5_0, after)             \
    of(before, q5_1, after) of(before, q8_0, after) of(before, q2_k, after)             \
    of(before, q3_k, after) of(before, q4_k, after) of(before, q5_k, after)             \
    of(before, q6_k, after)
#define JOINED(before, type, after) UNUSED(before##type##after)

UNUSED(moe_gemm_wmma)
UNUSED(moe_gemm_gguf)
UNUSED(moe_gemm_gguf_prefill)
EACH_TYPE(JOINED, launch_mmvq_gguf_, _bf16_plain)
EACH_TYPE(JOINED, launch_mmvq_gguf_, _f16_plain)
EACH_TYPE(JOINED, launch_mmvq_gguf_, _f32_plain)
EACH_TYPE(JOINED, launch_mmq_gguf_, )
UNUSED(launch_mmvq_gguf_quantize_q8_1_bf16)
UNUSED(launch_mmvq_gguf_quantize_q8_1_f16)
UNUSED(launch_mmvq_gguf_quantize_q8_1_f32)
UNUSED(launch_mmq_quantize_q8_1_D4)
UNUSED(launch_mmq_quantize_q8_1_DS4)
UNUSED(launch_mmq_quantize_q8_1_D2S6)
