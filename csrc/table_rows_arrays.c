/* Door 2 for rows of tables added to arrays: learned tables and sinusoidal ones.
 *
 * Plain arrays and tensors of one form are taken; everything else, what is wrong
 * included, is declined by NotImplemented with nothing done: the Python layer brings it
 * to that form or raises.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "door.h"

#include <stdlib.h>

#include "table_rows.h"

/* Whole numbers up to this are doubles. */
#define MAX_WHOLE ((int64_t)1 << 53)

typedef struct {
    view x, mask, out;
    bool has_mask, is_in_place;
    PyObject *result; /* a new reference */
} row_operands;

/* The positions, copied: side by side in memory of their own. */
typedef struct {
    void *memory;
    int n_axis; /* 1, of the tokens, or one for each axis of rows */
    npy_intp shape[NPY_MAXDIMS];
} row_positions;

/* True if an array of some of the rows' axes, with sizes of 1 too, has an element for
 * each row. */
static bool
spreads_over_rows(int n_axis, const npy_intp *shape, const view *x)
{
    const int n = x->n_axis - 1;
    if (n_axis != n && n_axis != 1) {
        return false;
    }
    for (int i = 0; i < n_axis; i++) {
        if (shape[i] != 1 && shape[i] != x->shape[n - n_axis + i]) {
            return false;
        }
    }
    return true;
}

/* The step along axis i of the rows, of n, of an array that spreads over them. */
static npy_intp
step_over_rows(int n_axis, const npy_intp *shape, const npy_intp *step, int n, int i)
{
    const int own = i - (n - n_axis);
    return own < 0 || shape[own] == 1 ? 0 : step[own];
}

/* Memory for n positions; false with an error if there is none. */
static bool
allocate_positions(npy_intp n, row_positions *positions)
{
    positions->memory = malloc((size_t)n * sizeof(double) + 1);
    if (positions->memory == NULL) {
        PyErr_NoMemory();
    }
    return positions->memory != NULL;
}

/* Positions from `start` on, of the tokens.  1; 0 if they are not doubles' whole
 * numbers; -1 with an error. */
static int
count_positions(PyObject *start, const view *x, bool whole, row_positions *positions)
{
    int overflow = 0;
    if (!PyLong_CheckExact(start)) {
        return 0;
    }
    const int64_t first = PyLong_AsLongLongAndOverflow(start, &overflow);
    const npy_intp n = x->shape[x->n_axis - 2];
    if (overflow != 0 || first < -MAX_WHOLE || first > MAX_WHOLE - n) {
        return 0;
    }
    positions->n_axis = 1;
    positions->shape[0] = n;
    if (!allocate_positions(n, positions)) {
        return -1;
    }
    for (npy_intp i = 0; i < n; i++) {
        if (whole) {
            ((int64_t *)positions->memory)[i] = first + i;
        } else {
            ((double *)positions->memory)[i] = (double)(first + i);
        }
    }
    return 1;
}

/* Copy positions: whole numbers, of doubles' if doubles are asked for; or doubles.  1;
 * 0 if they are others; -1 with an error. */
static int
copy_positions(const view *given, bool whole, row_positions *positions)
{
    const npy_intp n = size_of(given);
    npy_intp index[NPY_MAXDIMS] = {0};
    positions->n_axis = given->n_axis;
    for (int i = 0; i < given->n_axis; i++) {
        positions->shape[i] = given->shape[i];
    }
    if (!allocate_positions(n, positions)) {
        return -1;
    }
    const char *at = given->data;
    for (npy_intp k = 0; k < n; k++) {
        if (given->type == REAL_F64) {
            ((double *)positions->memory)[k] = *(const double *)at;
        } else {
            const int64_t position = *(const int64_t *)at;
            if (position > MAX_WHOLE || position < -MAX_WHOLE) {
                return 0;
            }
            if (whole) {
                ((int64_t *)positions->memory)[k] = position;
            } else {
                ((double *)positions->memory)[k] = (double)position;
            }
        }
        for (int i = given->n_axis - 1; i >= 0; i--) {
            at += given->step[i];
            if (++index[i] < given->shape[i]) {
                break;
            }
            at -= index[i] * given->step[i];
            index[i] = 0;
        }
    }
    return 1;
}

/* 1; 0 if positions are declined; -1 with an error. */
static int
take_positions(PyObject *object, PyObject *start, bool whole, const view *x,
               row_positions *positions)
{
    if (object == Py_None) {
        return count_positions(start, x, whole, positions);
    }
    view given;
    const bool is_good = view_of(object, &given) &&
                         (given.type == INT_64 || (!whole && given.type == REAL_F64)) &&
                         spreads_over_rows(given.n_axis, given.shape, x);
    return is_good ? copy_positions(&given, whole, positions) : 0;
}

static bool
take_data(PyObject *x, PyObject *mask, row_operands *given)
{
    given->has_mask = mask != Py_None;
    if (!view_of(x, &given->x) || given->x.n_axis < 2 || given->x.type >= N_REAL) {
        return false;
    }
    return !given->has_mask ||
           (view_of(mask, &given->mask) && given->mask.type == BOOL_8 &&
            spreads_over_rows(given->mask.n_axis, given->mask.shape, &given->x));
}

/* Take or make the result.  1; 0 if it is declined; -1 with an error. */
static int
take_result(PyObject *x, PyObject *out, row_operands *given)
{
    given->is_in_place = false;
    if (out == Py_None) {
        given->result = new_like(x, &given->x, &given->out);
        return given->result == NULL ? -1 : 1;
    }
    if (!view_of(out, &given->out) || given->out.type != given->x.type ||
        !given->out.is_writeable || given->out.is_tensor != given->x.is_tensor ||
        !have_same_shape(&given->x, &given->out) ||
        !has_distinct_elements(&given->out, item_size(given->out.type)) ||
        (given->has_mask && may_overlap(&given->out, &given->mask))) {
        return 0;
    }
    given->is_in_place = are_identical(&given->x, &given->out);
    if (!given->is_in_place && may_overlap(&given->out, &given->x)) {
        return 0;
    }
    if (given->out.is_tensor) {
        PyObject *tensors = PyTuple_Pack(1, out);
        const int status = tensors == NULL ? -1 : mark_changed(tensors);
        Py_XDECREF(tensors);
        if (status < 0) {
            return -1;
        }
    }
    given->result = Py_NewRef(out);
    return 1;
}

/* Complete a sum and run it.  0, or -1 with an error. */
static int
run_sum(row_sum *sum, const row_operands *given, const row_positions *positions)
{
    const view *x = &given->x, *out = &given->out, *mask = &given->mask;
    const int n = x->n_axis - 1;
    sum->type = x->type;
    sum->n_channel = (size_t)last_of(x, x->shape);
    sum->x_channel = last_of(x, x->step), sum->out_channel = last_of(out, out->step);
    sum->has_mask = given->has_mask;
    row_sum_choose_stores(sum, given->is_in_place,
                          (size_t)(size_of(out) * item_size(out->type)));
    char *base[NEST_N_OPERAND] = {
        [ADD_X] = x->data,
        [ADD_POSITION] = positions->memory,
        [ADD_MASK] = given->has_mask ? mask->data : x->data,
        [ADD_OUT] = out->data,
    };
    npy_intp position_step[NPY_MAXDIMS], item = sizeof(double);
    for (int i = positions->n_axis - 1; i >= 0; i--) {
        position_step[i] = item;
        item *= positions->shape[i];
    }
    row_sum_begin(sum, base);
    for (int i = 0; i < n; i++) {
        ptrdiff_t step[NEST_N_OPERAND] = {
            [ADD_X] = x->step[i],
            [ADD_POSITION] = step_over_rows(positions->n_axis, positions->shape,
                                            position_step, n, i),
            [ADD_MASK] = given->has_mask ? step_over_rows(mask->n_axis, mask->shape,
                                                          mask->step, n, i)
                                         : 0,
            [ADD_OUT] = out->step[i],
        };
        row_sum_add_axis(sum, (size_t)x->shape[i], step);
    }
    bool is_done;
    if (size_of(out) <= MIN_SIZE_WITHOUT_GIL) {
        is_done = row_sum_run(sum);
    } else {
        Py_BEGIN_ALLOW_THREADS;
        is_done = row_sum_run(sum);
        Py_END_ALLOW_THREADS;
    }
    if (!is_done) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

/* The result of a sum whose operands were taken; NotImplemented or NULL. */
static PyObject *
finish_sum(int status, row_sum *sum, row_operands *given, row_positions *positions)
{
    if (status == 1 && size_of(&given->out) > 0) {
        status = run_sum(sum, given, positions) < 0 ? -1 : 1;
    }
    free(positions->memory);
    if (status == 1) {
        return given->result;
    }
    Py_XDECREF(given->result);
    if (status < 0) {
        return NULL;
    }
    Py_RETURN_NOTIMPLEMENTED;
}

/* add_sinusoidal_arrays(x, inv_freq, interleaved, cos_first, positions, start, mask,
 * scale, out): positions are doubles or whole numbers, or None for those from start. */
static PyObject *
add_sinusoidal(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("add_sinusoidal_arrays", n_arg, 9)) {
        return NULL;
    }
    row_sum sum = {.interleaved = args[2] == Py_True, .cos_first = args[3] == Py_True};
    sum.scale = PyFloat_AsDouble(args[7]);
    if (sum.scale == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    row_operands given = {.result = NULL};
    row_positions positions = {.memory = NULL};
    view inv_freq;
    int status = take_data(args[0], args[6], &given) && view_of(args[1], &inv_freq) &&
                 inv_freq.type == REAL_F64 && inv_freq.n_axis == 1 &&
                 2 * inv_freq.shape[0] <= last_of(&given.x, given.x.shape);
    if (status == 1) {
        status = take_positions(args[4], args[5], false, &given.x, &positions);
    }
    if (status == 1) {
        sum.table_type = given.x.type == REAL_F64 ? REAL_F64 : REAL_F32;
        sum.inv_freq = inv_freq.data;
        sum.inv_freq_pair = inv_freq.step[0];
        sum.n_pair = (size_t)inv_freq.shape[0];
        status = take_result(args[0], args[8], &given);
    }
    return finish_sum(status, &sum, &given, &positions);
}

/* True if all positions are rows of a table. */
static bool
are_rows(const row_positions *positions, npy_intp n_row)
{
    npy_intp n = 1;
    for (int i = 0; i < positions->n_axis; i++) {
        n *= positions->shape[i];
    }
    const int64_t *row = positions->memory;
    for (npy_intp i = 0; i < n; i++) {
        if (row[i] < 0 || row[i] >= n_row) {
            return false;
        }
    }
    return true;
}

/* True if rows of a table can be added to x and the result can be written. */
static bool
is_table_of(const view *table, const row_operands *given)
{
    const view *x = &given->x;
    const bool is_short = x->type == REAL_F16 || x->type == REAL_BF16;
    return (table->type == x->type || (is_short && table->type == REAL_F32)) &&
           table->n_axis == 2 && table->shape[1] == last_of(x, x->shape);
}

/* add_learned_arrays(x, table, positions, start, mask, scale, out) */
static PyObject *
add_learned(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("add_learned_arrays", n_arg, 7)) {
        return NULL;
    }
    row_sum sum = {.n_pair = 0};
    sum.scale = PyFloat_AsDouble(args[5]);
    if (sum.scale == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    row_operands given = {.result = NULL};
    row_positions positions = {.memory = NULL};
    view table, out;
    int status =
        take_data(args[0], args[4], &given) && view_of(args[1], &table) &&
        is_table_of(&table, &given) &&
        (args[6] == Py_None || (view_of(args[6], &out) && !may_overlap(&out, &table)));
    if (status == 1) {
        status = take_positions(args[2], args[3], true, &given.x, &positions);
    }
    if (status == 1) {
        status = are_rows(&positions, table.shape[0]);
    }
    if (status == 1) {
        sum.table = table.data;
        sum.table_type = table.type;
        sum.table_row = table.step[0];
        sum.table_channel = table.step[1];
        status = take_result(args[0], args[6], &given);
    }
    return finish_sum(status, &sum, &given, &positions);
}

PyMethodDef table_rows_methods[] = {
    {"add_sinusoidal_arrays", FASTCALL(add_sinusoidal),
     "(x, inv_freq, interleaved, cos_first, positions, start, mask, scale, out)"},
    {"add_learned_arrays", FASTCALL(add_learned),
     "(x, table, positions, start, mask, scale, out)"},
    {NULL, NULL, 0, NULL},
};
