/* What the doors of attention with contextual positions share: forward, backward.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_COPE_ATTENTION_H
#define POSENC_COPE_ATTENTION_H

#include "view.h"

/* The axes of heads: batch, key heads, and the query heads of one key head. */
enum { N_HEAD_AXIS = 3 };

/* Where one operand of a head starts. */
typedef struct {
    char *data;
    ptrdiff_t step[N_HEAD_AXIS];
} head_places;

char *place_of(const head_places *p, const size_t head[N_HEAD_AXIS]);

/* Describe an operand: (batch, key head, head, row, column), or without the head. */
bool take_heads(PyObject *object, int n_axis, view *seen, head_places *places);

ptrdiff_t row_step(const view *seen);

bool take_number(PyObject *object, double *value);

#endif
