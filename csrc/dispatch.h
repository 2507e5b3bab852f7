/* Which instruction set runs.  Knows neither Python nor NumPy.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_DISPATCH_H
#define POSENC_DISPATCH_H

#include "posenc.h"

/* The chosen kernels; set by dispatch_init, constant afterwards. */
extern const kernel_table *kernels;

/* Pick the widest set that this processor has, or the one called `wanted` if
 * that is not NULL or empty.  Returns 0, or -1 if `wanted` names no set that
 * can run here. */
int dispatch_init(const char *wanted);

#endif
