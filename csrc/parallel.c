/* SPDX-License-Identifier: BSD-3-Clause */
#include "parallel.h"

#include <stdatomic.h>
#include <stddef.h>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

const bool parallel_has_openmp = true;
#else
const bool parallel_has_openmp = false;
#endif

static atomic_int n_thread_wanted; /* 0: whatever OpenMP says */

void
parallel_set_n_thread(int n)
{
    atomic_store_explicit(&n_thread_wanted, n, memory_order_relaxed);
}

#ifdef _OPENMP

static atomic_bool is_forked;

static void
mark_forked(void)
{
    atomic_store(&is_forked, true);
}

int
parallel_init(void)
{
    static atomic_flag is_done = ATOMIC_FLAG_INIT;
    return atomic_flag_test_and_set(&is_done) ? 0
                                              : pthread_atfork(NULL, NULL, mark_forked);
}

int
parallel_n_thread(void)
{
    if (atomic_load_explicit(&is_forked, memory_order_relaxed) || omp_in_parallel()) {
        return 1;
    }
    int wanted = atomic_load_explicit(&n_thread_wanted, memory_order_relaxed);
    return wanted > 0 ? wanted : omp_get_max_threads();
}

/* How the calling thread rounds, and whether it flushes subnormals: the team is to
 * do as it does, or results would depend on the number of threads. */
static unsigned
get_float_mode(void)
{
#ifdef __SSE__
    return _mm_getcsr();
#else
    return 0;
#endif
}

static void
set_float_mode(unsigned mode)
{
#ifdef __SSE__
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}

void
parallel_run(parallel_body *body, void *job, int n_part)
{
    /* Even a region of one thread costs a third of a microsecond. */
    if (n_part == 1) {
        body(job, 0, 1);
        return;
    }
    /* A loop, not one part per thread: the team may be smaller than asked for. */
    unsigned mode = get_float_mode();
#pragma omp parallel for num_threads(n_part) schedule(static, 1)
    for (int part = 0; part < n_part; part++) {
        unsigned own = get_float_mode();
        set_float_mode(mode);
        body(job, part, n_part);
        set_float_mode(own);
    }
}

#else

int
parallel_init(void)
{
    return 0;
}

int
parallel_n_thread(void)
{
    return 1;
}

void
parallel_run(parallel_body *body, void *job, int n_part)
{
    for (int part = 0; part < n_part; part++) {
        body(job, part, n_part);
    }
}

#endif
