/* The kernels for x86-64-v4.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "isa.h"

#ifdef POSENC_X86_64
#ifdef __clang__
#pragma clang attribute push(                                                      \
    __attribute__((                                                                \
        target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#endif

#define SIMD_NAME "v4"
#define WIDE_BYTES 64
#define WIDE_LANES_F32 16
#define WIDE_LANES_F64 8
#define HELD 8
#define STREAM(to, value) _mm512_stream_si512((__m512i *)(to), (__m512i)(value))
#define FENCE() _mm_sfence()
#define KERNEL_TABLE kernels_v4
#include "kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
