/* Threads: the only place that knows OpenMP.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_PARALLEL_H
#define POSENC_PARALLEL_H

#include <stdbool.h>

/* Part `part` of `n_part` equal parts of a job. */
typedef void parallel_body(void *job, int part, int n_part);

/* True if compiled with OpenMP. */
extern const bool parallel_has_openmp;

/* Arrange for forked children to run serially: a team does not survive a fork.
 * Call once per process; returns 0, or an errno value. */
int parallel_init(void);

/* Run body once for each part, at the same time where threads allow. */
void parallel_run(parallel_body *body, void *job, int n_part);

/* The most parts worth making now: asked of OpenMP each time, 1 inside another
 * parallel region and after a fork. */
int parallel_n_thread(void);

/* Use at most n threads; 0 goes back to what OpenMP says. */
void parallel_set_n_thread(int n);

#endif
