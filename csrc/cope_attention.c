/* Door 2 for attention with contextual positions: whole arrays, all heads at once.
 *
 * The Python layer has checked kinds, types, shapes and overlap; here they are only
 * read.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "cope_attention.h"

#include <string.h>

bool
take_heads(PyObject *object, int n_axis, view *seen, head_places *places)
{
    if (object == Py_None) {
        *places = (head_places){.data = NULL};
        return true;
    }
    if (!view_of(object, seen) || seen->n_axis != n_axis) {
        PyErr_Format(PyExc_TypeError,
                     "cope_attention: operands must be plain arrays of %d axes",
                     n_axis);
        return false;
    }
    *places = (head_places){.data = seen->data};
    for (int i = 0; i < n_axis - 2; i++) {
        places->step[i] = seen->step[i];
    }
    return true;
}

bool
take_embedding(PyObject *object, view *seen, head_places *places)
{
    if (!take_heads(object, 4, seen, places)) {
        return false;
    }
    memmove(places->step + 1, places->step, 2 * sizeof(ptrdiff_t));
    places->step[0] = 0;
    return true;
}

ptrdiff_t
row_step(const view *seen)
{
    return seen->step[seen->n_axis - 2];
}

bool
take_number(PyObject *object, double *value)
{
    *value = PyFloat_AsDouble(object);
    return *value != -1.0 || !PyErr_Occurred();
}

/* cope_attention_arrays(q, k, v, gate_key, embedding, mask, scale, position_scale,
 * causal, out, statistics) */
static PyObject *
cope_attention(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("cope_attention_arrays", n_arg, 11)) {
        return NULL;
    }
    view q, k, v, gate_key, embedding, mask, out, statistics;
    attention_job job;
    cope_attention_shape *a = &job.shape;
    *a = (cope_attention_shape){.causal = args[8] == Py_True};
    if (!take_heads(args[0], 5, &q, &job.q) || !take_heads(args[1], 4, &k, &job.k) ||
        !take_heads(args[2], 4, &v, &job.v) ||
        !take_heads(args[3], 4, &gate_key, &job.gate_key) ||
        !take_embedding(args[4], &embedding, &job.embedding) ||
        !take_heads(args[5], 5, &mask, &job.mask) || !take_number(args[6], &a->scale) ||
        !take_number(args[7], &a->position_scale) ||
        !take_heads(args[9], 5, &out, &job.out) ||
        !take_heads(args[10], 5, &statistics, &job.statistics)) {
        return NULL;
    }
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
    for (int i = 0; i < N_HEAD_AXIS; i++) {
        job.n_head[i] = (size_t)q.shape[i];
    }
    bool is_done;
    Py_BEGIN_ALLOW_THREADS;
    is_done = attention_run(&job);
    Py_END_ALLOW_THREADS;
    if (!is_done) {
        return PyErr_NoMemory();
    }
    Py_RETURN_NONE;
}

PyMethodDef cope_attention_methods[] = {
    {"cope_attention_arrays", FASTCALL(cope_attention),
     "(q, k, v, gate_key, embedding, mask, scale, position_scale, causal, out, "
     "statistics)"},
    {NULL, NULL, 0, NULL},
};
