/* Door 2 for the backward of attention with contextual positions: whole arrays, all
 * heads at once.
 *
 * The Python layer has checked kinds, types, shapes and overlap; here they are only
 * read.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "cope_attention.h"

#include <stdatomic.h>

#include "dispatch.h"
#include "parallel.h"

/* Units of work: more of them keep more threads busy, and cost memory and sums. */
enum { WANTED_UNITS = 8, MIN_CHUNK_ROWS = 256 };

/* Arrays of gradients, each the size of so many reals per unit. */
typedef struct {
    char *data;
    size_t size; /* bytes of one unit */
} unit_places;

typedef struct {
    cope_attention_shape shape;
    cope_attention_gradients gradients;
    size_t n_batch, n_group; /* units are (chunk, batch, group) */
    head_places q, k, v, gate_key, embedding, mask, out, grad_out;
    unit_places statistics, dq, dk, dv, dgate, dembedding;
    scratch_space scratch;
    atomic_size_t n_taken;
} backward_job;

static void *
place_in(const unit_places *p, size_t unit)
{
    return p->data == NULL ? NULL : p->data + unit * p->size;
}

static void
run_unit(const backward_job *a, size_t unit, void *scratch)
{
    size_t n_pair = a->n_batch * a->n_group, pair = unit % n_pair;
    size_t head[N_HEAD_AXIS] = {pair / a->n_group, pair % a->n_group, 0};
    cope_attention_operands operands = {
        .q = place_of(&a->q, head),
        .k = place_of(&a->k, head),
        .v = place_of(&a->v, head),
        .gate_key = place_of(&a->gate_key, head),
        .embedding = place_of(&a->embedding, head),
        .mask = place_of(&a->mask, head),
        .out = place_of(&a->out, head),
        .statistics = place_in(&a->statistics, pair),
    };
    cope_attention_gradients gradients = a->gradients;
    gradients.share = unit / n_pair;
    gradients.grad_out = place_of(&a->grad_out, head);
    gradients.dq = place_in(&a->dq, pair);
    gradients.dk = place_in(&a->dk, unit);
    gradients.dv = place_in(&a->dv, unit);
    gradients.dgate = place_in(&a->dgate, unit);
    gradients.dembedding = place_in(&a->dembedding, unit);
    kernels->cope_attention[a->shape.type == REAL_F64].backward(&a->shape, &operands,
                                                                &gradients, scratch);
}

/* Parts take units as they come: who does one leaves no trace in its result. */
static void
run_part(void *job, int part, int Py_UNUSED(n_part))
{
    backward_job *a = job;
    void *scratch = scratch_of(&a->scratch, part);
    size_t n_unit = a->gradients.n_share * a->n_batch * a->n_group;
    for (;;) {
        size_t unit = atomic_fetch_add(&a->n_taken, 1);
        if (unit >= n_unit) {
            return;
        }
        run_unit(a, unit, scratch);
    }
}

static int
run_backward(backward_job *job)
{
    size_t n_unit = job->gradients.n_share * job->n_batch * job->n_group;
    int n_part = parallel_n_thread();
    n_part = n_unit < (size_t)n_part ? (int)n_unit : n_part;
    if (n_part == 0) {
        return 0;
    }
    int real = job->shape.type == REAL_F64;
    size_t size = kernels->cope_attention[real].backward_scratch_size(&job->shape);
    if (!scratch_begin(&job->scratch, size, n_part)) {
        PyErr_NoMemory();
        return -1;
    }
    atomic_init(&job->n_taken, 0);
    NPY_BEGIN_THREADS_DEF;
    NPY_BEGIN_THREADS;
    parallel_run(run_part, job, n_part);
    NPY_END_THREADS;
    scratch_end(&job->scratch);
    return 0;
}

/* Take a contiguous array of reals whose units are its first n_axis axes. */
static bool
take_units(PyObject *object, int n_axis, unit_places *places)
{
    view seen;
    places->data = NULL;
    if (object == Py_None) {
        return true;
    }
    if (!view_of(object, &seen) || seen.n_axis < n_axis) {
        PyErr_SetString(PyExc_TypeError,
                        "cope_attention_backward_arrays: gradients and statistics must "
                        "be plain arrays");
        return false;
    }
    places->data = seen.data;
    places->size = (size_t)item_size(seen.type);
    for (int i = n_axis; i < seen.n_axis; i++) {
        places->size *= (size_t)seen.shape[i];
    }
    return true;
}

/* The operands but those of the gradients. */
static bool
take_operands(PyObject *const *args, backward_job *job)
{
    view q, k, v, gate_key, embedding, mask, out, grad_out;
    cope_attention_shape *a = &job->shape;
    cope_attention_gradients *g = &job->gradients;
    if (!take_heads(args[0], 5, &q, &job->q) || !take_heads(args[1], 4, &k, &job->k) ||
        !take_heads(args[2], 4, &v, &job->v) ||
        !take_heads(args[3], 4, &gate_key, &job->gate_key) ||
        !take_embedding(args[4], &embedding, &job->embedding) ||
        !take_heads(args[5], 5, &mask, &job->mask) ||
        !take_heads(args[9], 5, &out, &job->out) ||
        !take_heads(args[11], 5, &grad_out, &job->grad_out)) {
        return false;
    }
    a->type = q.type;
    job->n_batch = (size_t)q.shape[0], job->n_group = (size_t)q.shape[1];
    g->n_head = (size_t)q.shape[2];
    a->n_query = (size_t)q.shape[3], a->n_key = (size_t)k.shape[2];
    a->n_channel = (size_t)q.shape[4], a->n_position = (size_t)embedding.shape[3];
    g->q_head = q.step[2], a->q_row = q.step[3], a->q_channel = q.step[4];
    a->k_row = k.step[2], a->k_channel = k.step[3];
    a->v_row = v.step[2], a->v_channel = v.step[3];
    g->embedding_head = embedding.step[1];
    a->embedding_channel = embedding.step[2], a->embedding_position = embedding.step[3];
    g->out_head = out.step[2], a->out_row = out.step[3], a->out_channel = out.step[4];
    g->grad_head = grad_out.step[2];
    g->grad_row = grad_out.step[3], g->grad_channel = grad_out.step[4];
    if (job->gate_key.data != NULL) {
        a->gate_row = gate_key.step[2], a->gate_channel = gate_key.step[3];
    }
    if (job->mask.data != NULL) {
        g->mask_head = mask.step[2];
        a->mask_row = mask.step[3], a->mask_key = mask.step[4];
    }
    return true;
}

/* cope_attention_backward_arrays(q, k, v, gate_key, embedding, mask, scale,
 * position_scale, causal, out, statistics, grad_out, dq, dk, dv, dgate, dembedding) */
static PyObject *
cope_attention_backward(PyObject *Py_UNUSED(module), PyObject *const *args,
                        Py_ssize_t n_arg)
{
    if (!has_arguments("cope_attention_backward_arrays", n_arg, 17)) {
        return NULL;
    }
    backward_job job;
    job.gradients = (cope_attention_gradients){0};
    job.shape = (cope_attention_shape){.causal = args[8] == Py_True};
    if (!take_operands(args, &job) || !take_number(args[6], &job.shape.scale) ||
        !take_number(args[7], &job.shape.position_scale) ||
        !take_units(args[10], 2, &job.statistics) ||
        !take_units(args[12], 2, &job.dq) || !take_units(args[13], 3, &job.dk) ||
        !take_units(args[14], 3, &job.dv) || !take_units(args[15], 3, &job.dgate) ||
        !take_units(args[16], 3, &job.dembedding)) {
        return NULL;
    }
    view dk;
    job.gradients.n_share = view_of(args[13], &dk) ? (size_t)dk.shape[0] : 1;
    if (run_backward(&job) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* cope_attention_chunks(n_group, n_row): into how many chunks the rows of each group
 * are dealt.  Sizes alone decide, never threads: the sums of chunks are the result. */
static PyObject *
cope_attention_chunks(PyObject *Py_UNUSED(module), PyObject *const *args,
                      Py_ssize_t n_arg)
{
    if (!has_arguments("cope_attention_chunks", n_arg, 2)) {
        return NULL;
    }
    Py_ssize_t n_group = PyLong_AsSsize_t(args[0]);
    if (n_group == -1 && PyErr_Occurred()) {
        return NULL;
    }
    Py_ssize_t n_row = PyLong_AsSsize_t(args[1]);
    if (n_row == -1 && PyErr_Occurred()) {
        return NULL;
    }
    Py_ssize_t most = n_row / MIN_CHUNK_ROWS;
    Py_ssize_t wanted = n_group > 0 ? (WANTED_UNITS + n_group - 1) / n_group : 1;
    wanted = wanted < most ? wanted : most;
    return PyLong_FromSsize_t(wanted > 1 ? wanted : 1);
}

PyMethodDef cope_attention_backward_methods[] = {
    {"cope_attention_backward_arrays", FASTCALL(cope_attention_backward),
     "(q, k, v, gate_key, embedding, mask, scale, position_scale, causal, out, "
     "statistics, grad_out, dq, dk, dv, dgate, dembedding)"},
    {"cope_attention_chunks", FASTCALL(cope_attention_chunks), "(n_group, n_row)"},
    {NULL, NULL, 0, NULL},
};
