/* What the instruction-set files share: every header, before any target pragma,
 * and the tables they define.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_ISA_H
#define POSENC_ISA_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"
#include "posenc.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define POSENC_X86_64 1
#include <immintrin.h>
#endif

extern const kernel_table kernels_baseline;
#ifdef POSENC_X86_64
extern const kernel_table kernels_v3;
extern const kernel_table kernels_v4;
extern const kernel_table kernels_v4_bf16;
#endif

#endif
