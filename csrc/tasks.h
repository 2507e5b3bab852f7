/* What both doors ask for: rotations, tables, contextual positions and relative
 * biases as jobs over nests.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_TASKS_H
#define POSENC_TASKS_H

#include <stdint.h>

#include "nest.h"
#include "posenc.h"

/* The operands of a rotation's nest, in this order.  Where rows are gathered,
 * the cosine's place is taken by the positions, and the sine's stands still. */
enum { ROPE_X, ROPE_COS, ROPE_SIN, ROPE_OUT };
#define ROPE_HELD (1u << ROPE_COS | 1u << ROPE_SIN)

typedef struct {
    rope_strip within; /* steps within a row; those between rows come from the nest */
    rope_kernel *kernel;
    const char *cos, *sin;          /* if rows are gathered, else NULL            */
    ptrdiff_t cos_table, sin_table; /* ... their steps from row to row            */
} rope_task;

/* Stream the result if it is so large that no cache would keep it, and is not x
 * itself, which the caches hold anyway. */
void rope_task_choose_stores(rope_task *task, bool in_place, size_t result_bytes);

/* Strips of a rope_task, and the end of a thread's strips. */
nest_strip rope_task_strip;
nest_finish rope_task_finish;

/* The operands of a table's nest, in this order. */
enum { TABLE_POSITION, TABLE_INV_FREQ, TABLE_COS, TABLE_SIN };

/* Strips of a cos_sin_strip, used as the task. */
nest_strip table_task_strip;

/* The operands of the nest of rope_decay, in this order. */
enum { DECAY_DISTANCE, DECAY_INV_FREQ, DECAY_OUT };

/* Strips of a decay_strip, used as the task. */
nest_strip decay_task_strip;

/* The operands of the nest that adds rows of a table, in this order.  Where rows are
 * gathered, the table's place is taken by the positions. */
enum { ADD_X, ADD_TABLE, ADD_MASK, ADD_OUT };
#define ADD_HELD (1u << ADD_TABLE)

typedef struct {
    add_strip within; /* steps within a row                */
    int type;         /* of the data: which kernel         */
    bool has_mask;
    const char *table; /* if rows are gathered, else NULL  */
    ptrdiff_t table_row;
} add_task;

nest_strip add_task_strip;
nest_finish add_task_finish;

/* Stream the result, of n_byte, on the grounds that rotations have. */
void add_task_choose_stores(add_task *task, bool in_place, size_t n_byte);

/* The operands of add_sinusoidal's nest, in this order. */
enum { SINUSOIDAL_X, SINUSOIDAL_POSITION, SINUSOIDAL_INV_FREQ, SINUSOIDAL_OUT };

typedef struct {
    sinusoidal_strip within;
    int type;
} sinusoidal_task;

nest_strip sinusoidal_task_strip;

/* The operands of the nests of cope_bias, cope_interpolate (its positions stand for the
 * logits) and cope_positions (gates and n_position), in this order. */
enum { COPE_LOGITS, COPE_Z, COPE_MASK, COPE_OUT };

typedef struct {
    cope_strip within; /* steps within a row */
    int type;          /* of the data: which kernel */
} cope_task;

/* Stream the result, of n_byte, on the grounds that rotations have. */
void cope_task_choose_stores(cope_task *task, bool in_place, size_t n_byte);

/* Strips of a cope_task. */
nest_strip cope_bias_task_strip, cope_interpolate_task_strip, cope_positions_task_strip;
nest_finish cope_task_finish;

/* Gates of runs of n numbers: operands COPE_LOGITS and COPE_OUT. */
typedef struct {
    size_t n;
    ptrdiff_t step, out_step;
    int type;
} gates_task;

nest_strip gates_task_strip;

/* The operands of t5_bucket, in this order. */
enum {
    BUCKET_POSITION,
    BUCKET_N,
    BUCKET_MAX,
    BUCKET_BOTH,
    BUCKET_OUT,
    N_BUCKET_OPERAND
};

/* Buckets of offsets.  More operands than a nest has: its rows are counted from the
 * address of the task on, in bytes. */
typedef struct {
    char *base[N_BUCKET_OPERAND];
    ptrdiff_t step[N_BUCKET_OPERAND];
} bucket_task;

nest_strip bucket_task_strip;

/* The operands of the nest of a spread bias, in this order. */
enum { BIAS_VALUES, BIAS_LOGITS, BIAS_OUT = NEST_N_OPERAND - 1 };

typedef struct {
    bias_strip within; /* steps within a row */
    int type;
    bool adds; /* to logits */
} bias_task;

/* Stream the result, of n_byte, on the grounds that rotations have. */
void bias_task_choose_stores(bias_task *task, bool in_place, size_t n_byte);

/* Strips of a bias_task. */
nest_strip bias_task_strip;
nest_finish bias_task_finish;

#endif
