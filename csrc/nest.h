/* A strided loop nest over rows: arrange it, cut it into equal parts, run it.
 * Knows steps and threads; knows neither Python nor what a row holds.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_NEST_H
#define POSENC_NEST_H

#include <stdbool.h>
#include <stddef.h>

enum { NEST_MAX_AXIS = 64, NEST_N_OPERAND = 4 };

typedef struct {
    int n_axis;
    size_t size[NEST_MAX_AXIS];                    /* outermost axis first  */
    ptrdiff_t step[NEST_MAX_AXIS][NEST_N_OPERAND]; /* bytes                 */
    char *base[NEST_N_OPERAND];
    bool is_tiled; /* the innermost axis is a tile of another */
} nest;

/* Visit n_row rows; operand i starts at base[i] and goes on by step[i].  If ahead
 * is not NULL, the strip after this one likely starts ahead[i] further on. */
typedef void nest_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                        const ptrdiff_t step[NEST_N_OPERAND],
                        const ptrdiff_t ahead[NEST_N_OPERAND]);

/* What a thread does after its last strip. */
typedef void nest_finish(void *task);

/* A nest and what to do with its rows. */
typedef struct {
    const nest *loops;
    nest_strip *strip;
    nest_finish *finish; /* or NULL */
    void *task;
    size_t row_size; /* elements per row, to weigh the work */
} nest_job;

/* Start a nest without axes: one row. */
void nest_begin(nest *loops, char *const base[NEST_N_OPERAND]);

/* Add an axis inside the others. */
void nest_add_axis(nest *loops, size_t size, const ptrdiff_t step[NEST_N_OPERAND]);

/* Reorder the axes for memory: by falling step of the last operand, and axes that
 * continue each other merged.  The operands in `held` (a bit set) are worth
 * keeping near: if the innermost axis moves them while axes outside it do not, it
 * is cut into tiles and those axes go around the tiles.  The rows of a last,
 * shorter tile are a nest of their own, rest.  Returns how many nests there are:
 * 1, or 2 with the rest. */
int nest_arrange(nest *loops, unsigned held, nest *rest);

/* How many rows there are. */
size_t nest_n_row(const nest *loops);

/* Where part `part` of n_part equal ones begins: total * part / n_part. */
size_t nest_cut(size_t total, size_t part, size_t n_part);

/* How many parts to make of so many elements. */
int nest_n_part(size_t work);

/* Run the jobs, all at once, cut into equal parts for the threads.  The rows
 * are independent, so the parts do not change the result. */
void nest_run(const nest_job *jobs, int n_job);

#endif
