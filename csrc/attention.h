/* Attention over heads: its blocks as a job for threads, and their scratch memory.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_ATTENTION_H
#define POSENC_ATTENTION_H

#include "posenc.h"

/* The axes of heads: batch, key heads, and the query heads of one key head. */
enum { N_HEAD_AXIS = 3 };

/* Where one operand of each head starts; data is NULL if there is no such operand. */
typedef struct {
    char *data;
    ptrdiff_t step[N_HEAD_AXIS];
} head_places;

/* The start of a head's operand, or NULL. */
char *place_of(const head_places *p, const size_t head[N_HEAD_AXIS]);

/* Memory for threads, a part for each. */
typedef struct {
    void *memory;
    char *start;
    size_t size; /* of a part */
} scratch_space;

/* Get n parts of at least `size` bytes, aligned to 64; false if memory is short. */
bool scratch_begin(scratch_space *scratch, size_t size, int n);
void *scratch_of(const scratch_space *scratch, int part);
void scratch_end(scratch_space *scratch);

/* One attention of all heads. */
typedef struct {
    cope_attention_shape shape;
    size_t n_head[N_HEAD_AXIS];
    head_places q, k, v, gate_key, embedding, mask, out, statistics;
    size_t n_block; /* the rest is attention_run's */
    scratch_space scratch;
} attention_job;

/* Attend; false, with nothing done, if memory is short. */
bool attention_run(attention_job *job);

#endif
