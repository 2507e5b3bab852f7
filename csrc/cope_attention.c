/* Door 2 for attention with contextual positions: whole arrays, all heads at once.
 *
 * The Python layer has checked kinds, types, shapes and overlap; here they are only
 * read.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "view.h"

#include <string.h>

#include "dispatch.h"
#include "parallel.h"

/* The axes of heads: batch, key heads, and the query heads of one key head. */
enum { N_HEAD_AXIS = 3 };

/* Where one operand of a head starts. */
typedef struct {
    char *data;
    ptrdiff_t step[N_HEAD_AXIS];
} head_places;

typedef struct {
    cope_attention_shape shape;
    size_t n_head[N_HEAD_AXIS], n_block;
    head_places q, k, v, gate_key, embedding, mask, out, statistics;
    char *scratch;
    size_t scratch_size;
} attention_job;

static char *
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

/* Parts take blocks by turns, from the first on in one head and from the last on in
 * the next: the later a block, the more keys it sees. */
static void
attend_part(void *job, int part, int n_part)
{
    const attention_job *a = job;
    int real = a->shape.type == REAL_F64;
    char *scratch = a->scratch + (size_t)part * a->scratch_size;
    size_t n_unit = a->n_head[0] * a->n_head[1] * a->n_head[2] * a->n_block;
    for (size_t unit = (size_t)part; unit < n_unit; unit += (size_t)n_part) {
        size_t number = unit / a->n_block, block = unit % a->n_block;
        size_t head[N_HEAD_AXIS] = {number / a->n_head[2] / a->n_head[1],
                                    number / a->n_head[2] % a->n_head[1],
                                    number % a->n_head[2]};
        block = number % 2 == 0 ? block : a->n_block - 1 - block;
        cope_attention_operands operands = {
            .q = place_of(&a->q, head),
            .k = place_of(&a->k, head),
            .v = place_of(&a->v, head),
            .gate_key = place_of(&a->gate_key, head),
            .embedding = place_of(&a->embedding, head),
            .mask = place_of(&a->mask, head),
            .out = place_of(&a->out, head),
            .statistics = place_of(&a->statistics, head),
        };
        kernels->cope_attention[real].run(
            &a->shape, &operands, block * kernels->cope_attention[real].block, scratch);
    }
}

/* Describe an operand: (batch, key head, head, row, column), or without the head. */
static bool
take(PyObject *object, int n_axis, view *seen, head_places *places)
{
    if (object == Py_None) {
        *places = (head_places){.data = NULL};
        return true;
    }
    if (!view_of(object, seen) || seen->n_axis != n_axis) {
        PyErr_Format(PyExc_TypeError,
                     "cope_attention_arrays: operands must be plain arrays of %d axes",
                     n_axis);
        return false;
    }
    *places = (head_places){.data = seen->data};
    for (int i = 0; i < n_axis - 2; i++) {
        places->step[i] = seen->step[i];
    }
    return true;
}

static ptrdiff_t
row_step(const view *seen)
{
    return seen->step[seen->n_axis - 2];
}

static bool
take_number(PyObject *object, double *value)
{
    *value = PyFloat_AsDouble(object);
    return *value != -1.0 || !PyErr_Occurred();
}

static int
run_attention(attention_job *job, npy_intp n_unit)
{
    int n_part = parallel_n_thread();
    n_part = n_unit < n_part ? (int)n_unit : n_part;
    if (n_part == 0) {
        return 0;
    }
    const kernel_table *table = kernels;
    int real = job->shape.type == REAL_F64;
    size_t size = table->cope_attention[real].scratch_size(&job->shape);
    job->scratch_size = (size + 4095) / 4096 * 4096;
    char *memory = PyMem_RawMalloc(job->scratch_size * (size_t)n_part + 64);
    if (memory == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    job->scratch = memory + (0 - (size_t)(uintptr_t)memory) % 64;
    NPY_BEGIN_THREADS_DEF;
    NPY_BEGIN_THREADS;
    parallel_run(attend_part, job, n_part);
    NPY_END_THREADS;
    PyMem_RawFree(memory);
    return 0;
}

/* cope_attention_arrays(q, k, v, gate_key, embedding, mask, scale, position_scale,
 * causal, out, statistics) */
static PyObject *
cope_attention(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (n_arg != 11) {
        PyErr_Format(PyExc_TypeError,
                     "cope_attention_arrays: arguments must number 11; got %zd", n_arg);
        return NULL;
    }
    view q, k, v, gate_key, embedding, mask, out, statistics;
    attention_job job;
    cope_attention_shape *a = &job.shape;
    *a = (cope_attention_shape){.causal = args[8] == Py_True};
    if (!take(args[0], 5, &q, &job.q) || !take(args[1], 4, &k, &job.k) ||
        !take(args[2], 4, &v, &job.v) || !take(args[3], 4, &gate_key, &job.gate_key) ||
        !take(args[4], 4, &embedding, &job.embedding) ||
        !take(args[5], 5, &mask, &job.mask) || !take_number(args[6], &a->scale) ||
        !take_number(args[7], &a->position_scale) ||
        !take(args[9], 5, &out, &job.out) ||
        !take(args[10], 5, &statistics, &job.statistics)) {
        return NULL;
    }
    /* The embedding has no batch. */
    memmove(job.embedding.step + 1, job.embedding.step, 2 * sizeof(ptrdiff_t));
    job.embedding.step[0] = 0;
    a->type = q.type;
    a->n_query = (size_t)q.shape[3];
    a->n_key = (size_t)k.shape[2];
    a->n_channel = (size_t)q.shape[4];
    a->n_position = (size_t)embedding.shape[3];
    a->q_row = row_step(&q), a->q_channel = last_of(&q, q.step);
    a->k_row = row_step(&k), a->k_channel = last_of(&k, k.step);
    a->v_row = row_step(&v), a->v_channel = last_of(&v, v.step);
    a->embedding_channel = row_step(&embedding);
    a->embedding_position = last_of(&embedding, embedding.step);
    a->out_row = row_step(&out), a->out_channel = last_of(&out, out.step);
    if (job.gate_key.data != NULL) {
        a->gate_row = row_step(&gate_key);
        a->gate_channel = last_of(&gate_key, gate_key.step);
    }
    if (job.mask.data != NULL) {
        a->mask_row = row_step(&mask), a->mask_key = last_of(&mask, mask.step);
    }
    npy_intp n_unit = 1;
    for (int i = 0; i < N_HEAD_AXIS; i++) {
        job.n_head[i] = (size_t)q.shape[i];
        n_unit *= q.shape[i];
    }
    size_t block = kernels->cope_attention[a->type == REAL_F64].block;
    job.n_block = (a->n_query + block - 1) / block;
    if (run_attention(&job, n_unit * (npy_intp)job.n_block) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyMethodDef cope_attention_methods[] = {
    {"cope_attention_arrays", (PyCFunction)(void (*)(void))cope_attention,
     METH_FASTCALL,
     "(q, k, v, gate_key, embedding, mask, scale, position_scale, causal, out, "
     "statistics)"},
    {NULL, NULL, 0, NULL},
};
