/* The kernels for x86-64-v3.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "isa.h"

#ifdef POSENC_X86_64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif

#define SIMD_NAME "v3"
#define WIDE_BYTES 32
#define WIDE_LANES_F32 8
#define WIDE_LANES_F64 4
#define HELD 4
#define STREAM(to, value) _mm256_stream_si256((__m256i *)(to), (__m256i)(value))
#define FENCE() _mm_sfence()
#define KERNEL_TABLE kernels_v3
#include "kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
