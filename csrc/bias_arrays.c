/* Door 2 for relative biases: rows of values spread over matrices, and back.
 *
 * The Python layer has checked shapes, types and overlap and brought everything to one
 * form; what does not keep to it is an error of ours, not of the user.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "door.h"

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

PyMethodDef bias_methods[] = {
    {"bias_arrays", FASTCALL(bias_spread), "(values, logits or None, out)"},
    {"bias_collect_arrays", FASTCALL(bias_collect), "(grad, sums)"},
    {NULL, NULL, 0, NULL},
};
