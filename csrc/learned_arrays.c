/* Door 2 for rows of tables added to arrays: learned positions, and pieces of
 * sinusoidal tables.
 *
 * The Python layer has checked shapes, types, positions and overlap and brought
 * everything to one form; what does not keep to it is an error of ours, not of the
 * user.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "door.h"

#include "dispatch.h"
#include "tasks.h"

typedef struct {
    view x, table, positions, mask, out;
    bool has_positions, has_mask;
} add_operands;

/* Data and result are of one shape, the table has rows of their width, and positions
 * and mask one element for each row. */
static bool
fit_together(const add_operands *given)
{
    const view *x = &given->x, *table = &given->table, *out = &given->out;
    const bool is_short = x->type == REAL_F16 || x->type == REAL_BF16;
    if (x->n_axis == 0 || x->type >= N_REAL || out->type != x->type ||
        !have_same_shape(x, out) || !out->is_writeable ||
        (table->type != x->type && !(is_short && table->type == REAL_F32)) ||
        table->n_axis == 0 || last_of(table, table->shape) != last_of(x, x->shape)) {
        return false;
    }
    const int n = x->n_axis - 1;
    if (given->has_mask && (given->mask.type != BOOL_8 || given->mask.n_axis != n ||
                            !agree_in_shape(&given->mask, x, n))) {
        return false;
    }
    if (given->has_positions) {
        return given->positions.type == INT_64 && given->positions.n_axis == n &&
               agree_in_shape(&given->positions, x, n) && table->n_axis == 2;
    }
    return have_same_shape(table, x);
}

static bool
take_operands(PyObject *const *args, add_operands *given)
{
    given->has_positions = args[2] != Py_None;
    given->has_mask = args[3] != Py_None;
    return view_of(args[0], &given->x) && view_of(args[1], &given->table) &&
           (!given->has_positions || view_of(args[2], &given->positions)) &&
           (!given->has_mask || view_of(args[3], &given->mask)) &&
           view_of(args[6], &given->out) && fit_together(given);
}

static void
add_all(const add_operands *given, double scale, size_t n_byte)
{
    const view *x = &given->x, *out = &given->out, *mask = &given->mask;
    const view *rows = given->has_positions ? &given->positions : &given->table;
    add_task task = {
        .within = {.n_channel = (size_t)last_of(x, x->shape),
                   .scale = scale,
                   .table_type = given->table.type,
                   .x_channel = last_of(x, x->step),
                   .table_channel = last_of(&given->table, given->table.step),
                   .out_channel = last_of(out, out->step)},
        .type = x->type,
        .has_mask = given->has_mask,
        .table = given->has_positions ? given->table.data : NULL,
        .table_row = given->has_positions ? given->table.step[0] : 0,
    };
    add_task_choose_stores(&task, x->data == out->data, n_byte);
    char *base[NEST_N_OPERAND] = {
        [ADD_X] = x->data,
        [ADD_TABLE] = rows->data,
        [ADD_MASK] = given->has_mask ? mask->data : x->data,
        [ADD_OUT] = out->data,
    };
    nest loops[2];
    nest_begin(&loops[0], base);
    for (int i = 0; i < x->n_axis - 1; i++) {
        ptrdiff_t step[NEST_N_OPERAND] = {
            [ADD_X] = x->step[i],
            [ADD_TABLE] = rows->step[i],
            [ADD_MASK] = given->has_mask ? mask->step[i] : 0,
            [ADD_OUT] = out->step[i],
        };
        nest_add_axis(&loops[0], (size_t)x->shape[i], step);
    }
    const size_t n = task.within.n_channel;
    const int n_nest = nest_arrange(&loops[0], ADD_HELD, &loops[1]);
    nest_job jobs[] = {{&loops[0], add_task_strip, add_task_finish, &task, n},
                       {&loops[1], add_task_strip, add_task_finish, &task, n}};
    run_jobs(jobs, n_nest, size_of(out));
}

/* add_rows(x, table, positions, mask, scale, n_byte, out): n_byte is the size of the
 * whole result, of which this may be a piece. */
static PyObject *
add_rows(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    const char *name = "add_rows_arrays";
    if (!has_arguments(name, n_arg, 7)) {
        return NULL;
    }
    double scale = PyFloat_AsDouble(args[4]);
    if (scale == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    size_t n_byte = PyLong_AsSize_t(args[5]);
    if (n_byte == (size_t)-1 && PyErr_Occurred()) {
        return NULL;
    }
    add_operands given;
    if (!take_operands(args, &given)) {
        return refuse(name);
    }
    if (size_of(&given.out) > 0) {
        add_all(&given, scale, n_byte);
    }
    Py_RETURN_NONE;
}

PyMethodDef learned_methods[] = {
    {"add_rows_arrays", FASTCALL(add_rows),
     "(x, table, positions, mask, scale, n_byte, out)"},
    {NULL, NULL, 0, NULL},
};
