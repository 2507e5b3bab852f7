/* The kernels for what every processor of the architecture has.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "isa.h"

#define SIMD_NAME "baseline"
#define WIDE_BYTES 16
#define WIDE_LANES_F32 4
#define WIDE_LANES_F64 2
#define WIDE_WORDS 8
#define HELD 4
#ifdef POSENC_X86_64
#define STREAM(to, value) _mm_stream_si128((__m128i *)(to), (__m128i)(value))
#define STREAM_HALF(to, half) _mm_stream_si64((long long *)(to), (long long)(half))
#define FENCE() _mm_sfence()
#endif
#define PRODUCT_ROWS 6
#define FUSED_F32(a, b, c) ((a) * (b) + (c))
#define FUSED_F64(a, b, c) ((a) * (b) + (c))
#define KERNEL_TABLE kernels_baseline
#include "kernels.inc"
