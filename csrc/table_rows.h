/* Rows of tables added to data: tiles of rows as a job for threads.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_TABLE_ROWS_H
#define POSENC_TABLE_ROWS_H

#include "nest.h"
#include "posenc.h"

/* The operands of its nests, in this order; the table's place is taken by positions. */
enum { ADD_X, ADD_POSITION, ADD_MASK, ADD_OUT };

/* One sum.  Rows of data whose axes move the positions and rows that share them are
 * nests of their own: every row of one goes with every row of the other. */
typedef struct {
    nest moved, shared; /* the first one has the places of all operands */
    int type;           /* of the data                                  */
    size_t n_channel;
    double scale;
    ptrdiff_t x_channel, out_channel;
    bool has_mask, stream;

    const char *table; /* learned: its positions are int64_t; or NULL for a sinusoidal
                          one, whose positions are double */
    int table_type;
    ptrdiff_t table_row, table_channel;

    const char *inv_freq; /* n_pair doubles */
    ptrdiff_t inv_freq_pair;
    size_t n_pair; /* 2 * n_pair <= n_channel: what is beyond gets 0 */
    bool interleaved, cos_first;
} row_sum;

/* Start a sum of rows. */
void row_sum_begin(row_sum *sum, char *const base[NEST_N_OPERAND]);

/* Add an axis of rows inside the others. */
void row_sum_add_axis(row_sum *sum, size_t size, const ptrdiff_t step[NEST_N_OPERAND]);

/* Stream the result, of n_byte, on the grounds that rotations have. */
void row_sum_choose_stores(row_sum *sum, bool in_place, size_t n_byte);

/* Add; false, with nothing done, if memory is short. */
bool row_sum_run(row_sum *sum);

#endif
