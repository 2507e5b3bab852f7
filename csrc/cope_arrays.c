/* Door 2 for the bias of CoPE, which gufuncs cannot give: causal rows and masks.
 *
 * The Python layer has checked shapes, types and overlap and brought everything to one
 * form; what does not keep to it is an error of ours, not of the user.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "door.h"

#include "dispatch.h"
#include "tasks.h"

enum { LOGITS, Z, MASK, GRAD, OUT = GRAD, DLOGITS, DZ, N_COPE_OPERAND };

/* Rows are counted through the leading axes and the queries: a nest of one axis. */
typedef struct {
    cope_strip within;
    int type, n_axis; /* the axes before the keys; the last is that of the queries */
    bool causal, is_backward;
    const npy_intp *shape;
    view operand[N_COPE_OPERAND];
} cope_rows;

/* The address of a row of an operand, or NULL of a mask that is not there. */
static char *
row_of(const cope_rows *rows, int operand, size_t row)
{
    const view *v = &rows->operand[operand];
    char *address = v->data;
    for (int i = rows->n_axis - 1; i >= 0 && address != NULL; i--) {
        size_t size = (size_t)rows->shape[i];
        address += (ptrdiff_t)(row % size) * v->step[i];
        row /= size;
    }
    return address;
}

static ptrdiff_t
step_of(const cope_rows *rows, int operand)
{
    const view *v = &rows->operand[operand];
    return v->data == NULL ? 0 : v->step[rows->n_axis - 1];
}

static void
run_kernel(const cope_rows *rows, const cope_strip *strip, size_t row)
{
    const char *logits = row_of(rows, LOGITS, row), *z = row_of(rows, Z, row);
    const char *mask = row_of(rows, MASK, row);
    if (rows->is_backward) {
        kernels->cope_bias_backward[rows->type](
            strip, logits, z, mask, row_of(rows, GRAD, row), row_of(rows, DLOGITS, row),
            row_of(rows, DZ, row));
    } else {
        kernels->cope_bias[rows->type](strip, logits, z, mask, row_of(rows, OUT, row));
    }
}

/* A strip is a run of numbers of rows: base[0] is the task and the number in bytes. */
static void
rows_strip(void *task, size_t n_row, char *const base[NEST_N_OPERAND],
           const ptrdiff_t step[NEST_N_OPERAND], const ptrdiff_t ahead[NEST_N_OPERAND])
{
    (void)step, (void)ahead;
    const cope_rows *rows = task;
    const size_t n_query = (size_t)rows->shape[rows->n_axis - 1];
    size_t row = (size_t)(base[0] - (char *)task);
    while (n_row > 0) {
        const size_t query = row % n_query, left = n_query - query;
        cope_strip strip = rows->within;
        strip.n_row = n_row < left ? n_row : left;
        if (rows->causal) {
            strip.n_visible += (ptrdiff_t)(query + 1) - (ptrdiff_t)n_query;
        }
        run_kernel(rows, &strip, row);
        row += strip.n_row;
        n_row -= strip.n_row;
    }
}

static void
rows_finish(void *task)
{
    if (((const cope_rows *)task)->within.stream) {
        kernels->finish_stores();
    }
}

/* Operands by number; False for None where that may be. */
static bool
take_view(PyObject *object, int operand, cope_rows *rows)
{
    view *v = &rows->operand[operand];
    v->data = NULL;
    if (operand == MASK) {
        return object == Py_None || (view_of(object, v) && v->type == BOOL_8);
    }
    return view_of(object, v);
}

/* All operands have the axes of the logits but for the last, which z and its gradient
 * have their own of. */
static bool
fit_together(const cope_rows *rows, int n_operand)
{
    const view *logits = &rows->operand[LOGITS], *z = &rows->operand[Z];
    for (int i = 0; i < n_operand; i++) {
        const view *v = &rows->operand[i];
        if (v->data == NULL) {
            continue;
        }
        const view *like = i == Z || i == DZ ? z : logits;
        if (v->n_axis != logits->n_axis ||
            !agree_in_shape(v, logits, logits->n_axis - 1) ||
            last_of(v, v->shape) != last_of(like, like->shape)) {
            return false;
        }
    }
    return logits->n_axis >= 2 && logits->type < N_REAL && last_of(z, z->shape) > 0;
}

/* Types and memory of the results. */
static bool
has_results(const cope_rows *rows)
{
    const view *operand = rows->operand, *out = &operand[OUT];
    int type = operand[LOGITS].type, z_type = operand[Z].type;
    if ((z_type != type && z_type != REAL_F32) ||
        (type == REAL_F64 && z_type != type) || out->type != type) {
        return false;
    }
    if (!rows->is_backward) {
        return out->is_writeable;
    }
    const int real = type == REAL_F64 ? REAL_F64 : REAL_F32;
    for (int i = DLOGITS; i <= DZ; i++) {
        const view *v = &operand[i];
        if (v->type != real || !v->is_writeable ||
            (last_of(v, v->shape) > 1 && last_of(v, v->step) != item_size(real))) {
            return false;
        }
    }
    return true;
}

/* Take the operands, in their order; -1 with an error if they are not as agreed. */
static int
take_operands(const char *name, PyObject *const *operands, int n, PyObject *causal,
              cope_rows *rows)
{
    bool is_good = PyBool_Check(causal);
    for (int i = 0; i < n && is_good; i++) {
        is_good = take_view(operands[i], i, rows);
    }
    if (!is_good || !fit_together(rows, n) || !has_results(rows)) {
        refuse(name);
        return -1;
    }
    const view *operand = rows->operand, *logits = &operand[LOGITS];
    rows->type = logits->type;
    rows->n_axis = logits->n_axis - 1;
    rows->shape = logits->shape;
    rows->causal = causal == Py_True;
    rows->within = (cope_strip){
        .n_key = (size_t)last_of(logits, logits->shape),
        .n_position = (size_t)last_of(&operand[Z], operand[Z].shape),
        .z_type = operand[Z].type,
        .n_visible = last_of(logits, logits->shape),
        .visible_row = rows->causal,
        .key_row = step_of(rows, LOGITS),
        .z_row = step_of(rows, Z),
        .mask_row = step_of(rows, MASK),
        .out_row = step_of(rows, OUT),
        .key = last_of(logits, logits->step),
        .z_position = last_of(&operand[Z], operand[Z].step),
        .mask_key = operand[MASK].data == NULL
                        ? 0
                        : last_of(&operand[MASK], operand[MASK].step),
        .out_key = last_of(&operand[OUT], operand[OUT].step),
        .dlogit_row = rows->is_backward ? step_of(rows, DLOGITS) : 0,
        .dz_row = rows->is_backward ? step_of(rows, DZ) : 0,
    };
    return 0;
}

static void
run_all(cope_rows *rows)
{
    size_t n_row = 1;
    for (int i = 0; i < rows->n_axis; i++) {
        n_row *= (size_t)rows->shape[i];
    }
    size_t row_size = rows->within.n_key + rows->within.n_position;
    char *base[NEST_N_OPERAND] = {(char *)rows};
    ptrdiff_t step[NEST_N_OPERAND] = {1};
    nest loops;
    nest_begin(&loops, base);
    nest_add_axis(&loops, n_row, step);
    nest_job job = {&loops, rows_strip, rows_finish, rows, row_size};
    if (n_row > 0) {
        run_jobs(&job, 1, (npy_intp)(n_row * row_size));
    }
}

/* cope_bias(logits, z, mask, causal, out) */
static PyObject *
cope_bias(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    const char *name = "cope_bias_arrays";
    cope_rows rows = {.is_backward = false};
    if (!has_arguments(name, n_arg, 5)) {
        return NULL;
    }
    PyObject *operands[] = {args[0], args[1], args[2], args[4]};
    if (take_operands(name, operands, OUT + 1, args[3], &rows) < 0) {
        return NULL;
    }
    const view *out = &rows.operand[OUT];
    cope_task stores = {.type = rows.type};
    cope_task_choose_stores(&stores, out->data == rows.operand[LOGITS].data,
                            (size_t)(size_of(out) * item_size(out->type)));
    rows.within.stream = stores.within.stream;
    run_all(&rows);
    Py_RETURN_NONE;
}

/* cope_bias_backward(logits, z, mask, causal, grad_out, dlogits, dz) */
static PyObject *
cope_bias_backward(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    const char *name = "cope_bias_backward_arrays";
    cope_rows rows = {.is_backward = true};
    if (!has_arguments(name, n_arg, 7)) {
        return NULL;
    }
    PyObject *operands[] = {args[0], args[1], args[2], args[4], args[5], args[6]};
    if (take_operands(name, operands, N_COPE_OPERAND, args[3], &rows) < 0) {
        return NULL;
    }
    run_all(&rows);
    Py_RETURN_NONE;
}

PyMethodDef cope_methods[] = {
    {"cope_bias_arrays", FASTCALL(cope_bias), "(logits, z, mask, causal, out)"},
    {"cope_bias_backward_arrays", FASTCALL(cope_bias_backward),
     "(logits, z, mask, causal, grad_out, dlogits, dz)"},
    {NULL, NULL, 0, NULL},
};
