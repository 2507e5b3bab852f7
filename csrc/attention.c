/* SPDX-License-Identifier: BSD-3-Clause */
#include "attention.h"

#include <stdint.h>
#include <stdlib.h>

#include "dispatch.h"
#include "parallel.h"

enum { ALIGNMENT = 64, PAGE = 4096 };

char *
place_of(const head_places *p, const size_t head[N_HEAD_AXIS])
{
    if (p->data == NULL) {
        return NULL;
    }
    char *at = p->data;
    for (int i = 0; i < N_HEAD_AXIS; i++) {
        at += (ptrdiff_t)head[i] * p->step[i];
    }
    return at;
}

bool
scratch_begin(scratch_space *scratch, size_t size, int n)
{
    /* Whole pages, so that threads do not share a line. */
    scratch->size = (size + PAGE - 1) / PAGE * PAGE;
    if (scratch->size < size || scratch->size > (SIZE_MAX - ALIGNMENT) / (size_t)n) {
        return false;
    }
    scratch->memory = malloc(scratch->size * (size_t)n + ALIGNMENT);
    if (scratch->memory == NULL) {
        return false;
    }
    size_t skipped = (0 - (size_t)(uintptr_t)scratch->memory) % ALIGNMENT;
    scratch->start = (char *)scratch->memory + skipped;
    return true;
}

void *
scratch_of(const scratch_space *scratch, int part)
{
    return scratch->start + (size_t)part * scratch->size;
}

void
scratch_end(scratch_space *scratch)
{
    free(scratch->memory);
}

static size_t
n_unit(const attention_job *job)
{
    return job->n_head[0] * job->n_head[1] * job->n_head[2] * job->n_block;
}

/* Parts take blocks by turns, from the first on in one head and from the last on in
 * the next: the later a block, the more keys it sees. */
static void
attend_part(void *task, int part, int n_part)
{
    const attention_job *job = task;
    int real = job->shape.type == REAL_F64;
    size_t per_head = job->n_block;
    for (size_t unit = (size_t)part; unit < n_unit(job); unit += (size_t)n_part) {
        size_t number = unit / per_head, block = unit % per_head;
        size_t head[N_HEAD_AXIS] = {number / job->n_head[2] / job->n_head[1],
                                    number / job->n_head[2] % job->n_head[1],
                                    number % job->n_head[2]};
        block = number % 2 == 0 ? block : per_head - 1 - block;
        cope_attention_operands operands = {
            .q = place_of(&job->q, head),
            .k = place_of(&job->k, head),
            .v = place_of(&job->v, head),
            .gate_key = place_of(&job->gate_key, head),
            .embedding = place_of(&job->embedding, head),
            .mask = place_of(&job->mask, head),
            .out = place_of(&job->out, head),
            .statistics = place_of(&job->statistics, head),
        };
        kernels->cope_attention[real].run(&job->shape, &operands,
                                          block * kernels->cope_attention[real].block,
                                          scratch_of(&job->scratch, part));
    }
}

bool
attention_run(attention_job *job)
{
    int real = job->shape.type == REAL_F64, n_part = parallel_n_thread();
    size_t block = kernels->cope_attention[real].block;
    job->n_block = (job->shape.n_query + block - 1) / block;
    size_t n = n_unit(job);
    if (n == 0) {
        return true;
    }
    n_part = n < (size_t)n_part ? (int)n : n_part;
    size_t size = kernels->cope_attention[real].scratch_size(&job->shape);
    if (!scratch_begin(&job->scratch, size, n_part)) {
        return false;
    }
    parallel_run(attend_part, job, n_part);
    scratch_end(&job->scratch);
    return true;
}
