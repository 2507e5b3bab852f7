/* The kernels for x86-64-v4.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "isa.h"

#ifdef POSENC_X86_64
#ifdef __clang__
#pragma clang attribute push(                                                    \
    __attribute__((target(                                                       \
        "avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#endif

#define SIMD_NAME "v4"
#define KERNEL_TABLE kernels_v4
#include "isa_v4.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
