/* SPDX-License-Identifier: BSD-3-Clause */
#include "nest.h"

#include <string.h>

#include "parallel.h"

/* Elements per thread below which a thread costs more than it brings. */
#define MIN_PART_SIZE 32768

/* Rows of a tile: the table rows of one, 16 x 64 pairs of floats, are 8 KiB. */
#define TILE 16

enum { LAST = NEST_N_OPERAND - 1 };

void
nest_begin(nest *loops, char *const base[NEST_N_OPERAND])
{
    loops->n_axis = 0;
    loops->is_tiled = false;
    memcpy(loops->base, base, sizeof(loops->base));
}

static void
set_axis(nest *loops, int axis, size_t size, const ptrdiff_t step[NEST_N_OPERAND])
{
    loops->size[axis] = size;
    memmove(loops->step[axis], step, sizeof(loops->step[axis]));
}

void
nest_add_axis(nest *loops, size_t size, const ptrdiff_t step[NEST_N_OPERAND])
{
    if (size != 1) {
        set_axis(loops, loops->n_axis++, size, step);
    }
}

static bool
stands_still(const ptrdiff_t step[NEST_N_OPERAND], unsigned operands)
{
    for (int i = 0; i < NEST_N_OPERAND; i++) {
        if ((operands >> i & 1) && step[i] != 0) {
            return false;
        }
    }
    return true;
}

static size_t
last_step(const nest *loops, int axis)
{
    ptrdiff_t step = loops->step[axis][LAST];
    return step < 0 ? 0 - (size_t)step : (size_t)step;
}

static void
swap_axes(nest *loops, int a, int b)
{
    size_t size = loops->size[a];
    ptrdiff_t step[NEST_N_OPERAND];
    memcpy(step, loops->step[a], sizeof(step));
    set_axis(loops, a, loops->size[b], loops->step[b]);
    set_axis(loops, b, size, step);
}

/* True if the axis after `axis` run to its end is one step of `axis`. */
static bool
continues(const nest *loops, int axis)
{
    for (int i = 0; i < NEST_N_OPERAND; i++) {
        size_t inner = (size_t)loops->step[axis + 1][i] * loops->size[axis + 1];
        if ((size_t)loops->step[axis][i] != inner) {
            return false;
        }
    }
    return true;
}

static void
merge_axes(nest *loops)
{
    int kept = 0;
    for (int axis = 1; axis < loops->n_axis; axis++) {
        set_axis(loops, kept + 1, loops->size[axis], loops->step[axis]);
        if (continues(loops, kept)) {
            size_t size = loops->size[kept] * loops->size[kept + 1];
            set_axis(loops, kept, size, loops->step[kept + 1]);
        } else {
            kept++;
        }
    }
    loops->n_axis = loops->n_axis > 0 ? kept + 1 : 0;
}

size_t
nest_n_row(const nest *loops)
{
    size_t total = 1;
    for (int axis = 0; axis < loops->n_axis; axis++) {
        total *= loops->size[axis];
    }
    return total;
}

/* Move an axis outwards. */
static void
move_axis(nest *loops, int from, int to)
{
    for (int axis = from; axis > to; axis--) {
        swap_axes(loops, axis, axis - 1);
    }
}

/* Cut the innermost axis into tiles of TILE rows, all but the last `rest`. */
static void
split_inner(nest *loops, nest *rest)
{
    int inner = loops->n_axis - 1;
    size_t n_tile = loops->size[inner] / TILE;
    *rest = *loops;
    rest->size[inner] = loops->size[inner] % TILE;
    ptrdiff_t step[NEST_N_OPERAND];
    for (int i = 0; i < NEST_N_OPERAND; i++) {
        step[i] = loops->step[inner][i] * TILE;
        rest->base[i] += step[i] * (ptrdiff_t)n_tile;
    }
    set_axis(loops, inner + 1, TILE, loops->step[inner]);
    set_axis(loops, inner, n_tile, step);
    loops->n_axis++;
    loops->is_tiled = true;
}

int
nest_arrange(nest *loops, unsigned held, nest *rest)
{
    for (int last = 1; last < loops->n_axis; last++) {
        int to = last;
        while (to > 0 && last_step(loops, last) > last_step(loops, to - 1)) {
            to--;
        }
        move_axis(loops, last, to);
    }
    merge_axes(loops);

    int inner = loops->n_axis - 1, n_held = 0;
    for (int axis = 0; axis < inner; axis++) {
        n_held += stands_still(loops->step[axis], held);
    }
    if (n_held == 0 || stands_still(loops->step[inner], held) ||
        loops->n_axis == NEST_MAX_AXIS) {
        return 1;
    }
    /* (B, H, T) with H held becomes (B, T / TILE, H, TILE). */
    split_inner(loops, rest);
    for (int axis = 0, to = 0; axis <= inner; axis++) {
        if (!stands_still(loops->step[axis], held)) {
            move_axis(loops, axis, to++);
        }
    }
    return nest_n_row(rest) > 0 ? 2 : 1;
}

/* Rows [begin, end) of a job, strip by strip along the innermost axis. */
static void
run_rows(const nest_job *job, size_t begin, size_t end)
{
    static const ptrdiff_t no_step[NEST_N_OPERAND];
    const nest *loops = job->loops;
    int inner = loops->n_axis - 1;
    size_t inner_size = inner >= 0 ? loops->size[inner] : 1;
    const ptrdiff_t *inner_step = inner >= 0 ? loops->step[inner] : no_step;
    const ptrdiff_t *ahead = loops->is_tiled ? loops->step[inner - 1] : NULL;
    size_t index[NEST_MAX_AXIS];
    char *base[NEST_N_OPERAND];
    memcpy(base, loops->base, sizeof(base));

    size_t rest = begin;
    for (int axis = inner; axis >= 0; axis--) {
        index[axis] = rest % loops->size[axis];
        rest /= loops->size[axis];
        for (int i = 0; i < NEST_N_OPERAND; i++) {
            base[i] += (ptrdiff_t)index[axis] * loops->step[axis][i];
        }
    }
    while (begin < end) {
        size_t start = inner >= 0 ? index[inner] : 0;
        size_t count = inner_size - start;
        count = count < end - begin ? count : end - begin;
        job->strip(job->task, count, base, inner_step, ahead);
        begin += count;
        if (begin == end) {
            return;
        }
        /* Back to the start of the innermost axis, then one step outside it. */
        for (int i = 0; i < NEST_N_OPERAND; i++) {
            base[i] -= (ptrdiff_t)start * inner_step[i];
        }
        index[inner] = 0;
        for (int axis = inner - 1; axis >= 0; axis--) {
            bool wraps = ++index[axis] == loops->size[axis];
            ptrdiff_t move = wraps ? 1 - (ptrdiff_t)loops->size[axis] : 1;
            for (int i = 0; i < NEST_N_OPERAND; i++) {
                base[i] += move * loops->step[axis][i];
            }
            if (!wraps) {
                break;
            }
            index[axis] = 0;
        }
    }
}

typedef struct {
    const nest_job *jobs;
    int n_job;
} job_list;

size_t
nest_cut(size_t total, size_t part, size_t n_part)
{
    return total / n_part * part + total % n_part * part / n_part;
}

static void
run_part(void *list, int part, int n_part)
{
    const job_list *todo = list;
    for (int i = 0; i < todo->n_job; i++) {
        const nest_job *job = &todo->jobs[i];
        size_t total = nest_n_row(job->loops);
        size_t begin = nest_cut(total, (size_t)part, (size_t)n_part);
        size_t end = nest_cut(total, (size_t)part + 1, (size_t)n_part);
        if (begin < end) {
            run_rows(job, begin, end);
            if (job->finish != NULL) {
                job->finish(job->task);
            }
        }
    }
}

int
nest_n_part(size_t work)
{
    if (work < 2 * (size_t)MIN_PART_SIZE) {
        return 1;
    }
    size_t most = work / MIN_PART_SIZE;
    int n_thread = parallel_n_thread();
    return most < (size_t)n_thread ? (int)most : n_thread;
}

void
nest_run(const nest_job *jobs, int n_job)
{
    size_t work = 0;
    for (int i = 0; i < n_job; i++) {
        work += nest_n_row(jobs[i].loops) * jobs[i].row_size;
    }
    job_list todo = {jobs, n_job};
    parallel_run(run_part, &todo, nest_n_part(work));
}
