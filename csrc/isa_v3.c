/* The kernels for x86-64-v3.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "isa.h"

#ifdef POSENC_X86_64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2,f16c")
#endif

#define SIMD_NAME "v3"
#define WIDE_BYTES 32
#define WIDE_LANES_F32 8
#define WIDE_LANES_F64 4
#define WIDE_WORDS 16
#define HELD 4
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_pd(a, b, c)
#define STREAM(to, value) _mm256_stream_si256((__m256i *)(to), (__m256i)(value))
#define STREAM_HALF(to, half) _mm_stream_si128((__m128i *)(to), (__m128i)(half))
#define ANY_WIDE(value) (!_mm256_testz_si256((__m256i)(value), (__m256i)(value)))
#define TAKE_PRODUCT_WIDE(v, a, b) \
    ((vec_wide)_mm256_fnmadd_ps((__m256)(a), (__m256)(b), (__m256)(v)))
#define FENCE() _mm_sfence()
#define WIDEN_WORDS_WIDE(half) _mm256_cvtepu16_epi32((__m128i)(half))
#define HALF_TO_FLOAT_WIDE(half) _mm256_cvtph_ps((__m128i)(half))
#define FLOAT_TO_HALF_WIDE(value) \
    _mm256_cvtps_ph((__m256)(value), _MM_FROUND_TO_NEAREST_INT)
#define HALF_TO_FLOAT_QUAD(half) _mm_cvtph_ps((__m128i){(long long)(half), 0})
#define FLOAT_TO_HALF_QUAD(value) \
    ((__v2di)_mm_cvtps_ph((__m128)(value), _MM_FROUND_TO_NEAREST_INT))[0]
#define GATHER_WIDE(table, index) \
    ((vec_wide)_mm256_i32gather_ps(table, (__m256i)(index), 4))
#define PRODUCT_ROWS 6
#define FUSED_F32(a, b, c) _mm256_fmadd_ps(a, b, c)
#define FUSED_F64(a, b, c) _mm256_fmadd_pd(a, b, c)
#define ROUNDED_F32(value) _mm256_round_ps(value, 8)
#define ROUNDED_F64(value) _mm256_round_pd(value, 8)
#define GREATER_F32(a, b) _mm256_max_ps(a, b)
#define GREATER_F64(a, b) _mm256_max_pd(a, b)
#define GATHER_F32(old, mask, table, index) \
    _mm256_mask_i32gather_ps(old, table, (__m256i)(index), (__m256)(mask), 4)
#define GATHER_F64(old, mask, table, index) \
    _mm256_mask_i64gather_pd(old, table, (__m256i)(index), (__m256d)(mask), 8)
#define KERNEL_TABLE kernels_v3
#include "kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
