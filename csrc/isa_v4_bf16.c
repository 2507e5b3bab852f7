/* The kernels for x86-64-v4 with the instructions for bfloat16.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "isa.h"

#ifdef POSENC_X86_64
#ifdef __clang__
#pragma clang attribute push(                                                 \
    __attribute__((target("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512cd," \
                          "avx512dq,avx512vl,avx512bf16"))),                  \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq")
#pragma GCC target("avx512vl,avx512bf16")
#endif

#define SIMD_NAME "v4_bf16"
#define PACK_BF16_WIDE(low, high) _mm512_cvtne2ps_pbh((__m512)(high), (__m512)(low))
#define NARROW_BF16_WIDE(value) _mm512_cvtneps_pbh((__m512)(value))
#define ANY_NAN_OR_SUBNORMAL_WIDE(value) \
    (_mm512_fpclass_ps_mask((__m512)(value), 0xa1) != 0)
#define KERNEL_TABLE kernels_v4_bf16
#include "isa_v4.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
