/* What the doors of attention with contextual positions share: forward, backward.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_COPE_ATTENTION_H
#define POSENC_COPE_ATTENTION_H

#include "door.h"

#include "attention.h"

/* Describe an operand: (batch, key head, head, row, column), or without the head. */
bool take_heads(PyObject *object, int n_axis, view *seen, head_places *places);

/* The same of the embedding, which has no batch. */
bool take_embedding(PyObject *object, view *seen, head_places *places);

ptrdiff_t row_step(const view *seen);

bool take_number(PyObject *object, double *value);

#endif
