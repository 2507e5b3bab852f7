/* Door 2 for relative biases: rows of values spread over matrices, and back; T5's
 * values; and which positions are consecutive.
 *
 * The Python layer has checked shapes, types and overlap and brought everything to one
 * form; what does not keep to it is an error of ours, not of the user.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "door.h"

#include <math.h>

#include "dispatch.h"
#include "tasks.h"

/* The axes before the queries are rows of a nest, and so are the queries of a spread.
 */
typedef struct {
    view values, logits, matrix;
} bias_views;

/* Values (..., T + S - 1) and a matrix (..., T, S), neither empty; values side by side
 * and of a type. */
static bool
fit_together(const view *values, const view *matrix, int value_type)
{
    const int n = matrix->n_axis;
    if (n < 2 || values->n_axis != n - 1 || !agree_in_shape(values, matrix, n - 2) ||
        matrix->type >= N_REAL || values->type != value_type || size_of(matrix) == 0) {
        return false;
    }
    const npy_intp n_value = last_of(values, values->shape);
    return n_value == matrix->shape[n - 2] + matrix->shape[n - 1] - 1 &&
           (n_value == 1 || last_of(values, values->step) == item_size(values->type));
}

/* The step of a view along an axis, 0 if it is not there. */
static ptrdiff_t
step_along(const view *v, int axis)
{
    return v->data == NULL ? 0 : v->step[axis];
}

static void
run(nest *loops, nest_strip *strip, nest_finish *finish, void *task, size_t row_size,
    npy_intp size)
{
    nest rest;
    nest_arrange(loops, 0, &rest);
    nest_job job = {loops, strip, finish, task, row_size};
    run_jobs(&job, 1, size);
}

/* bias_arrays(values, logits or None, out) */
static PyObject *
bias_spread(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    const char *name = "bias_arrays";
    if (!has_arguments(name, n_arg, 3)) {
        return NULL;
    }
    bias_views views;
    view *values = &views.values, *logits = &views.logits, *out = &views.matrix;
    const bool adds = args[1] != Py_None;
    logits->data = NULL;
    if (!view_of(args[0], values) || !view_of(args[2], out) || !out->is_writeable ||
        (adds && (!view_of(args[1], logits) || !have_same_shape(logits, out) ||
                  logits->type != out->type))) {
        return refuse(name);
    }
    const int wide = out->type == REAL_F64 ? REAL_F64 : REAL_F32;
    if (!fit_together(values, out, adds ? wide : out->type)) {
        return refuse(name);
    }
    const int n = out->n_axis;
    const npy_intp value = item_size(values->type), n_query = out->shape[n - 2];
    bias_task task = {
        .within = {.n_key = (size_t)out->shape[n - 1],
                   .element_size = (size_t)item_size(out->type),
                   .logit_key = step_along(logits, n - 1),
                   .out_key = out->step[n - 1]},
        .type = out->type,
        .adds = adds,
    };
    bias_task_choose_stores(&task, adds && logits->data == out->data,
                            (size_t)(size_of(out) * item_size(out->type)));
    char *base[NEST_N_OPERAND] = {[BIAS_VALUES] = values->data + (n_query - 1) * value,
                                  [BIAS_LOGITS] = logits->data,
                                  [BIAS_OUT] = out->data};
    nest loops;
    nest_begin(&loops, base);
    for (int axis = 0; axis < n - 1; axis++) {
        ptrdiff_t step[NEST_N_OPERAND] = {
            [BIAS_VALUES] = axis < n - 2 ? values->step[axis] : -value,
            [BIAS_LOGITS] = step_along(logits, axis),
            [BIAS_OUT] = out->step[axis]};
        nest_add_axis(&loops, (size_t)out->shape[axis], step);
    }
    run(&loops, bias_task_strip, bias_task_finish, &task, task.within.n_key,
        size_of(out));
    Py_RETURN_NONE;
}

typedef struct {
    bias_strip within; /* all queries of a matrix */
    int type;
} collect_task;

/* Each row of the nest is a matrix: one thread adds it up. */
static void
collect_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
              const ptrdiff_t step[NEST_N_OPERAND],
              const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)ahead;
    const collect_task *collect = task;
    for (size_t row = 0; row < n_row; row++) {
        const ptrdiff_t r = (ptrdiff_t)row;
        kernels->bias_collect[collect->type](&collect->within,
                                             base[BIAS_LOGITS] + r * step[BIAS_LOGITS],
                                             base[BIAS_OUT] + r * step[BIAS_OUT]);
    }
}

/* bias_collect_arrays(grad, sums): sums += the sums along the diagonals */
static PyObject *
bias_collect(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    const char *name = "bias_collect_arrays";
    if (!has_arguments(name, n_arg, 2)) {
        return NULL;
    }
    bias_views views;
    view *sums = &views.values, *grad = &views.matrix;
    if (!view_of(args[0], grad) || !view_of(args[1], sums) || !sums->is_writeable ||
        !fit_together(sums, grad, REAL_F64)) {
        return refuse(name);
    }
    const int n = grad->n_axis;
    const npy_intp sum = item_size(REAL_F64), n_query = grad->shape[n - 2];
    collect_task task = {
        .within = {.n_row = (size_t)n_query,
                   .n_key = (size_t)grad->shape[n - 1],
                   .value_row = -sum,
                   .logit_row = grad->step[n - 2],
                   .logit_key = grad->step[n - 1]},
        .type = grad->type,
    };
    char *base[NEST_N_OPERAND] = {
        [BIAS_LOGITS] = grad->data, [BIAS_OUT] = sums->data + (n_query - 1) * sum};
    nest loops;
    nest_begin(&loops, base);
    for (int axis = 0; axis < n - 2; axis++) {
        ptrdiff_t step[NEST_N_OPERAND] = {
            [BIAS_LOGITS] = grad->step[axis], [BIAS_OUT] = sums->step[axis]};
        nest_add_axis(&loops, (size_t)grad->shape[axis], step);
    }
    run(&loops, collect_strip, NULL, &task, task.within.n_row * task.within.n_key,
        size_of(grad));
    Py_RETURN_NONE;
}

/* Values of T5 are made in a nest whose rows are offsets; its operands. */
enum { T5_OFFSETS, T5_VALUES = NEST_N_OPERAND - 1 };

typedef struct {
    t5_table table;
    const char *weight;
} values_task;

static void
values_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
             const ptrdiff_t step[NEST_N_OPERAND],
             const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)step, (void)ahead;
    const values_task *todo = task;
    kernels->t5_values(&todo->table, n_row, base[T5_OFFSETS], todo->weight,
                       base[T5_VALUES]);
}

/* True if there are n elements, side by side along an axis. */
static bool
are_packed(const view *v, int axis, npy_intp n)
{
    return v->shape[axis] == n && n > 0 &&
           (n == 1 || v->step[axis] == item_size(v->type));
}

/* Weight (n_bucket, H), offsets (n,) and values (H, n). */
static bool
make_values(const view *weight, const view *offsets, const view *values)
{
    return weight->n_axis == 2 && offsets->n_axis == 1 && values->n_axis == 2 &&
           values->type < N_REAL && weight->type == values->type &&
           values->is_writeable && offsets->type == INT_64 &&
           are_packed(offsets, 0, offsets->shape[0]) &&
           are_packed(values, 1, offsets->shape[0]) &&
           values->shape[0] == weight->shape[1];
}

/* True if the kernel finds buckets, which are rows of the weight. */
static bool
are_good(const t5_buckets *buckets)
{
    const int64_t n_exact = buckets->n_bucket / (buckets->bidirectional ? 4 : 2);
    return n_exact >= 1 && buckets->max_distance > n_exact;
}

/* t5_values_arrays(weight, offsets, max_distance, bidirectional, values) */
static PyObject *
t5_values(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    const char *name = "t5_values_arrays";
    if (!has_arguments(name, n_arg, 5)) {
        return NULL;
    }
    view weight, offsets, values;
    const int64_t max_distance = PyLong_AsLongLong(args[2]);
    if (max_distance == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (!view_of(args[0], &weight) || !view_of(args[1], &offsets) ||
        !view_of(args[4], &values) || !make_values(&weight, &offsets, &values)) {
        return refuse(name);
    }
    values_task task = {
        .table = {.buckets = {weight.shape[0], max_distance, args[3] == Py_True},
                  .n_head = (size_t)weight.shape[1],
                  .element_size = (size_t)item_size(values.type),
                  .weight_bucket = weight.step[0],
                  .weight_head = weight.step[1],
                  .value_head = values.step[0]},
        .weight = weight.data,
    };
    if (!are_good(&task.table.buckets)) {
        return refuse(name);
    }
    char *base[NEST_N_OPERAND] = {
        [T5_OFFSETS] = offsets.data, [T5_VALUES] = values.data};
    ptrdiff_t step[NEST_N_OPERAND] = {
        [T5_OFFSETS] = item_size(INT_64), [T5_VALUES] = item_size(values.type)};
    nest loops;
    nest_begin(&loops, base);
    nest_add_axis(&loops, (size_t)offsets.shape[0], step);
    run(&loops, values_strip, NULL, &task, task.table.n_head, size_of(&values));
    Py_RETURN_NONE;
}

/* Beyond it doubles skip whole numbers. */
#define MOST_WHOLE ((int64_t)1 << 53)

/* True if each is one more than that before it, and a double can hold all. */
static bool
are_consecutive_integers(const view *v)
{
    const npy_intp n = v->shape[0], step = v->step[0];
    for (npy_intp i = 1; i < n; i++) {
        const char *at = v->data + i * step;
        if (*(const uint64_t *)at - *(const uint64_t *)(at - step) != 1) {
            return false;
        }
    }
    const int64_t first = *(const int64_t *)v->data;
    return first >= -MOST_WHOLE && first <= MOST_WHOLE - (n - 1);
}

/* True if the first is whole, each one more than that before it, and none beyond. */
static bool
are_consecutive_doubles(const view *v)
{
    const npy_intp n = v->shape[0], step = v->step[0];
    const double first = *(const double *)v->data, most = (double)MOST_WHOLE;
    if (!(first >= -most && first <= most - (double)(n - 1)) || floor(first) != first) {
        return false;
    }
    for (npy_intp i = 1; i < n; i++) {
        const char *at = v->data + i * step;
        if (*(const double *)at - *(const double *)(at - step) != 1.0) {
            return false;
        }
    }
    return true;
}

/* consecutive(positions): the range that they are, or None */
static PyObject *
consecutive(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("consecutive", n_arg, 1)) {
        return NULL;
    }
    view v;
    if (!view_of(args[0], &v) || v.n_axis != 1 || v.shape[0] == 0 ||
        !(v.type == INT_64 ? are_consecutive_integers(&v)
                           : v.type == REAL_F64 && are_consecutive_doubles(&v))) {
        Py_RETURN_NONE;
    }
    PyObject *first = v.type == INT_64 ? PyLong_FromLongLong(*(const int64_t *)v.data)
                                       : PyLong_FromDouble(*(const double *)v.data);
    PyObject *n = PyLong_FromSsize_t(v.shape[0]);
    PyObject *stop = first != NULL && n != NULL ? PyNumber_Add(first, n) : NULL;
    PyObject *range = NULL;
    if (stop != NULL) {
        range =
            PyObject_CallFunctionObjArgs((PyObject *)&PyRange_Type, first, stop, NULL);
    }
    Py_XDECREF(first);
    Py_XDECREF(n);
    Py_XDECREF(stop);
    return range;
}

PyMethodDef bias_methods[] = {
    {"bias_arrays", FASTCALL(bias_spread), "(values, logits or None, out)"},
    {"bias_collect_arrays", FASTCALL(bias_collect), "(grad, sums)"},
    {"t5_values_arrays", FASTCALL(t5_values),
     "(weight, offsets, max_distance, bidirectional, values)"},
    {"consecutive", FASTCALL(consecutive), "(positions) -> range or None"},
    {NULL, NULL, 0, NULL},
};
