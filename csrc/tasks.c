/* SPDX-License-Identifier: BSD-3-Clause */
#include "tasks.h"

#include "dispatch.h"

/* Results of more bytes are streamed: below it a cache may keep them. At 5 MB that
 * costs half as much again, at 10 MB nothing, at 20 MB and more it saves a third. */
#define MIN_STREAM_SIZE ((size_t)8 << 20)

/* The same of results that nothing is read for, which have the caches for themselves:
 * at 13 MB streaming takes twice as long, at 28 MB as long, at 50 MB it saves a fifth.
 */
#define MIN_STREAM_SIZE_ALONE ((size_t)24 << 20)

bool
stores_pass_caches(bool in_place, size_t n_byte)
{
    return !in_place && n_byte >= MIN_STREAM_SIZE;
}

void
rope_task_choose_stores(rope_task *task, bool in_place, size_t result_bytes)
{
    task->within.stream = stores_pass_caches(in_place, result_bytes);
}

void
rope_task_finish(void *task)
{
    if (((const rope_task *)task)->within.stream) {
        kernels->finish_stores();
    }
}

void
rope_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                const ptrdiff_t step[NEST_N_OPERAND],
                const ptrdiff_t ahead[NEST_N_OPERAND])
{
    const rope_task *rope = task;
    rope_strip strip = rope->within;
    strip.x_row = step[ROPE_X];
    strip.out_row = step[ROPE_OUT];
    strip.x_ahead = ahead != NULL ? ahead[ROPE_X] : 0;
    strip.out_ahead = ahead != NULL ? ahead[ROPE_OUT] : 0;
    if (rope->cos == NULL) {
        strip.n_row = n_row;
        strip.cos_row = step[ROPE_COS];
        strip.sin_row = step[ROPE_SIN];
        rope->kernel(&strip, base[ROPE_X], base[ROPE_COS], base[ROPE_SIN],
                     base[ROPE_OUT]);
        return;
    }
    /* Rows that share their position go together. */
    size_t shared = step[ROPE_COS] == 0 ? n_row : 1;
    strip.n_row = shared;
    strip.cos_row = strip.sin_row = 0;
    for (size_t row = 0; row < n_row; row += shared) {
        ptrdiff_t r = (ptrdiff_t)row;
        int64_t position = *(const int64_t *)(base[ROPE_COS] + r * step[ROPE_COS]);
        rope->kernel(&strip, base[ROPE_X] + r * step[ROPE_X],
                     rope->cos + position * rope->cos_table,
                     rope->sin + position * rope->sin_table,
                     base[ROPE_OUT] + r * step[ROPE_OUT]);
    }
}

void
table_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                 const ptrdiff_t step[NEST_N_OPERAND],
                 const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)ahead;
    cos_sin_strip strip = *(const cos_sin_strip *)task;
    strip.n_row = n_row;
    strip.position_row = step[TABLE_POSITION];
    strip.inv_freq_row = step[TABLE_INV_FREQ];
    strip.cos_row = step[TABLE_COS];
    strip.sin_row = step[TABLE_SIN];
    kernels->cos_sin(&strip, base[TABLE_POSITION], base[TABLE_INV_FREQ],
                     base[TABLE_COS], base[TABLE_SIN]);
}

void
decay_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                 const ptrdiff_t step[NEST_N_OPERAND],
                 const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)ahead;
    decay_strip strip = *(const decay_strip *)task;
    strip.n_row = n_row;
    strip.distance_row = step[DECAY_DISTANCE];
    strip.inv_freq_row = step[DECAY_INV_FREQ];
    strip.out_row = step[DECAY_OUT];
    kernels->rope_decay(&strip, base[DECAY_DISTANCE], base[DECAY_INV_FREQ],
                        base[DECAY_OUT]);
}

void
sinusoidal_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                      const ptrdiff_t step[NEST_N_OPERAND],
                      const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)ahead;
    const sinusoidal_task *rows = task;
    sinusoidal_strip strip = rows->within;
    strip.n_row = n_row;
    strip.x_row = step[SINUSOIDAL_X];
    strip.position_row = step[SINUSOIDAL_POSITION];
    strip.inv_freq_row = step[SINUSOIDAL_INV_FREQ];
    strip.out_row = step[SINUSOIDAL_OUT];
    kernels->add_sinusoidal[rows->type](
        &strip, base[SINUSOIDAL_X], base[SINUSOIDAL_POSITION],
        base[SINUSOIDAL_INV_FREQ], base[SINUSOIDAL_OUT]);
}

void
cope_task_choose_stores(cope_task *task, bool in_place, size_t n_byte)
{
    task->within.stream = stores_pass_caches(in_place, n_byte);
}

void
cope_task_finish(void *task)
{
    if (((const cope_task *)task)->within.stream) {
        kernels->finish_stores();
    }
}

static cope_strip
cope_strip_of(const cope_task *task, size_t n_row, const ptrdiff_t step[NEST_N_OPERAND])
{
    cope_strip strip = task->within;
    strip.n_row = n_row;
    strip.key_row = step[COPE_LOGITS];
    strip.z_row = step[COPE_Z];
    strip.mask_row = step[COPE_MASK];
    strip.out_row = step[COPE_OUT];
    return strip;
}

void
cope_bias_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                     const ptrdiff_t step[NEST_N_OPERAND],
                     const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)ahead;
    cope_strip strip = cope_strip_of(task, n_row, step);
    kernels->cope_bias[((const cope_task *)task)->type](
        &strip, base[COPE_LOGITS], base[COPE_Z], NULL, base[COPE_OUT]);
}

void
cope_interpolate_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                            const ptrdiff_t step[NEST_N_OPERAND],
                            const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)ahead;
    cope_strip strip = cope_strip_of(task, n_row, step);
    kernels->cope_interpolate[((const cope_task *)task)->type](
        &strip, base[COPE_Z], base[COPE_LOGITS], base[COPE_OUT]);
}

void
cope_positions_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                          const ptrdiff_t step[NEST_N_OPERAND],
                          const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)ahead;
    cope_strip strip = cope_strip_of(task, n_row, step);
    kernels->cope_positions[((const cope_task *)task)->type](
        &strip, base[COPE_LOGITS], base[COPE_Z], base[COPE_OUT]);
}

void
gates_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                 const ptrdiff_t step[NEST_N_OPERAND],
                 const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)ahead;
    const gates_task *gates = task;
    for (size_t row = 0; row < n_row; row++) {
        ptrdiff_t r = (ptrdiff_t)row;
        kernels->cope_gates[gates->type](
            gates->n, base[COPE_LOGITS] + r * step[COPE_LOGITS], gates->step,
            base[COPE_OUT] + r * step[COPE_OUT], gates->out_step);
    }
}

void
bucket_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                  const ptrdiff_t step[NEST_N_OPERAND],
                  const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)step, (void)ahead;
    const bucket_task *todo = task;
    const ptrdiff_t *steps = todo->step, first = base[0] - (char *)task;
    const bool is_shared =
        steps[BUCKET_N] == 0 && steps[BUCKET_MAX] == 0 && steps[BUCKET_BOTH] == 0;
    const size_t run = is_shared ? n_row : 1;
    for (size_t row = 0; row < n_row; row += run) {
        const ptrdiff_t r = first + (ptrdiff_t)row;
        const t5_buckets buckets = {
            *(const int64_t *)(todo->base[BUCKET_N] + r * steps[BUCKET_N]),
            *(const int64_t *)(todo->base[BUCKET_MAX] + r * steps[BUCKET_MAX]),
            *(todo->base[BUCKET_BOTH] + r * steps[BUCKET_BOTH]) != 0,
        };
        kernels->t5_bucket(
            &buckets, run, todo->base[BUCKET_POSITION] + r * steps[BUCKET_POSITION],
            steps[BUCKET_POSITION], todo->base[BUCKET_OUT] + r * steps[BUCKET_OUT],
            steps[BUCKET_OUT]);
    }
}

void
bias_task_choose_stores(bias_task *task, bool in_place, size_t n_byte)
{
    const bool is_read = task->adds;
    task->within.stream = is_read ? stores_pass_caches(in_place, n_byte)
                                  : n_byte >= MIN_STREAM_SIZE_ALONE;
}

void
bias_task_finish(void *task)
{
    if (((const bias_task *)task)->within.stream) {
        kernels->finish_stores();
    }
}

void
bias_task_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
                const ptrdiff_t step[NEST_N_OPERAND],
                const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)ahead;
    const bias_task *bias = task;
    bias_strip strip = bias->within;
    strip.n_row = n_row;
    strip.value_row = step[BIAS_VALUES];
    strip.logit_row = step[BIAS_LOGITS];
    strip.out_row = step[BIAS_OUT];
    if (bias->adds) {
        kernels->bias_add[bias->type](&strip, base[BIAS_VALUES], base[BIAS_LOGITS],
                                      base[BIAS_OUT]);
    } else {
        kernels->bias_spread(&strip, base[BIAS_VALUES], base[BIAS_OUT]);
    }
}
