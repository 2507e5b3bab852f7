/* Door 2: functions on whole arrays, which see the full broadcast nest.
 *
 * They take what is common and answer NotImplemented to everything else: other
 * kinds of arrays, mixed types, odd alignment, overlap, wrong shapes.  The Python
 * layer then words the error or goes through the gufuncs, so no rule is written
 * here that is not checked there too, and nothing is written before all holds.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "door.h"

#include <string.h>

#include "dispatch.h"
#include "tasks.h"

/* The sequence axis unless said otherwise; a lone row has none to name. */
#define DEFAULT_AXIS (-2)

/* The table of a rotation: planar or complex, gathered by positions or not. */
typedef struct {
    view cos, sin;
    npy_intp cos_pair, sin_pair; /* bytes from angle to angle                  */
    npy_intp n_pair;
    PyArrayObject *positions; /* owned int64 copy, C order, or NULL         */
    view rows;                /* the axes of its rows: of cos, or positions */
    npy_intp offset;          /* the row of the first token, or -1: see rows */
} table;

/* Copy the positions, so that what was checked is what is used.  Returns 1, or 0
 * to decline, or -1 with an error. */
static int
take_positions(PyObject *object, table *t)
{
    view seen;
    PyObject *array = object;
    if (t->cos.n_axis != 2) {
        return 0;
    }
    if (!PyArray_CheckExact(object)) {
        array = view_of(object, &seen) ? ndarray_of(&seen) : NULL;
    } else {
        Py_INCREF(array);
    }
    if (array == NULL || !PyTypeNum_ISSIGNED(PyArray_TYPE((PyArrayObject *)array))) {
        Py_XDECREF(array);
        return PyErr_Occurred() ? -1 : 0;
    }
    t->positions = (PyArrayObject *)PyArray_FROMANY(
        array, NPY_INT64, 0, 0, NPY_ARRAY_CARRAY | NPY_ARRAY_ENSURECOPY);
    Py_DECREF(array);
    if (t->positions == NULL) {
        return -1;
    }
    if (!view_of((PyObject *)t->positions, &t->rows)) {
        return 0;
    }
    const npy_int64 *position = PyArray_DATA(t->positions);
    for (npy_intp i = 0; i < size_of(&t->rows); i++) {
        if (position[i] < 0 || position[i] >= t->cos.shape[0]) {
            return 0;
        }
    }
    return 1;
}

/* The axes of the table's rows, or of the positions that choose them.  An int is the
 * position of the first token. */
static int
take_rows(PyObject *positions, table *t)
{
    t->offset = -1;
    if (PyLong_CheckExact(positions)) {
        t->offset = PyLong_AsSsize_t(positions);
        PyErr_Clear();
        if (t->offset < 0 || t->cos.n_axis != 2) {
            return 0;
        }
    } else if (positions != Py_None) {
        return take_positions(positions, t);
    }
    t->rows = t->cos;
    t->rows.n_axis--;
    return 1;
}

/* Take the table of cosines and sines; returns as take_positions does. */
static int
take_planar_table(PyObject *cos, PyObject *sin, PyObject *positions, table *t)
{
    if (!view_of(cos, &t->cos) || !view_of(sin, &t->sin) || t->cos.n_axis == 0 ||
        t->cos.type != t->sin.type || t->cos.type >= N_REAL ||
        !have_same_shape(&t->cos, &t->sin)) {
        return 0;
    }
    t->n_pair = last_of(&t->cos, t->cos.shape);
    t->cos_pair = last_of(&t->cos, t->cos.step);
    t->sin_pair = last_of(&t->sin, t->sin.step);
    return take_rows(positions, t);
}

/* Take a complex table as its real and imaginary parts. */
static int
take_complex_table(PyObject *cis, PyObject *positions, table *t)
{
    if (!view_of(cis, &t->cos) || t->cos.n_axis == 0 ||
        (t->cos.type != COMPLEX_F32 && t->cos.type != COMPLEX_F64)) {
        return 0;
    }
    t->cos.type = t->cos.type == COMPLEX_F32 ? REAL_F32 : REAL_F64;
    t->sin = t->cos;
    t->sin.data += item_size(t->cos.type);
    t->n_pair = last_of(&t->cos, t->cos.shape);
    t->cos_pair = t->sin_pair = last_of(&t->cos, t->cos.step);
    return take_rows(positions, t);
}

/* Which axis of the table's rows goes with each axis of x's rows, or -1.
 * Rows (T,) lie along the sequence axis, (B, T) along the first and it; rows with
 * as many axes as x's are broadcast. */
static bool
match_axes(const view *x, const view *rows, int axis, int row_axis[NPY_MAXDIMS])
{
    int n_axis = x->n_axis - 1;
    bool is_full = rows->n_axis == n_axis;
    axis += axis < 0 ? x->n_axis : 0;
    bool is_default = n_axis == 0 && axis == DEFAULT_AXIS + 1;
    if ((axis < 0 || axis >= n_axis) && !is_default) {
        return false;
    }
    for (int i = 0; i < n_axis; i++) {
        row_axis[i] = is_full ? i : -1;
    }
    if (!is_full) {
        int last = rows->n_axis - 1;
        if (n_axis == 0 || last < 0 || last > 1 || axis < last ||
            rows->shape[last] != x->shape[axis]) {
            return false;
        }
        row_axis[axis] = last;
        if (last == 1) {
            row_axis[0] = 0;
        }
    }
    for (int i = 0; i < n_axis; i++) {
        npy_intp size = row_axis[i] < 0 ? 1 : rows->shape[row_axis[i]];
        if (size != 1 && size != x->shape[i]) {
            return false;
        }
    }
    return true;
}

/* The options that all rotations share. */
typedef struct {
    int layout, axis, rounding;
    npy_intp start;
    bool adjoint;
    bool is_twin; /* the call is transformers', with its shapes and types */
} rope_options;

/* One rotation: its operands, and the result it will give. */
typedef struct {
    view x, out;
    PyObject *result; /* owned */
    npy_intp start;
    rope_task task;
    nest loops[2]; /* the second: what the tiles of the first leave */
    int n_nest;
} rotation;

/* Describe the rotation of x into out. */
static bool
plan_rotation(rotation *r, const table *t, const rope_options *options)
{
    const view *x = &r->x, *out = &r->out;
    view rows = t->rows;
    char *sin = t->sin.data;
    npy_intp n_token;
    int row_axis[NPY_MAXDIMS];
    if (t->offset >= 0) {
        int axis = options->axis + (options->axis < 0 ? x->n_axis : 0);
        if (axis < 0 || axis >= x->n_axis - 1 ||
            x->shape[axis] > rows.shape[0] - t->offset) {
            return false;
        }
        n_token = x->shape[axis];
        rows.shape = &n_token;
        rows.data += t->offset * rows.step[0];
        sin += t->offset * t->sin.step[0];
    }
    if (!match_axes(x, &rows, options->axis, row_axis)) {
        return false;
    }
    r->task = (rope_task){
        .kernel = kernels->rope[options->layout][options->rounding][x->type],
        .within =
            {
                .head_dim = (size_t)last_of(x, x->shape),
                .first = (size_t)r->start,
                .n_pair = (size_t)t->n_pair,
                .table_type = t->cos.type,
                .adjoint = options->adjoint,
                .x_channel = last_of(x, x->step),
                .out_channel = last_of(out, out->step),
                .cos_pair = t->cos_pair,
                .sin_pair = t->sin_pair,
            },
    };
    if (t->positions != NULL) {
        r->task.cos = t->cos.data;
        r->task.sin = t->sin.data;
        r->task.cos_table = t->cos.step[0];
        r->task.sin_table = t->sin.step[0];
    }
    char *base[NEST_N_OPERAND] = {x->data, rows.data, sin, out->data};
    nest_begin(&r->loops[0], base);
    for (int i = 0; i < x->n_axis - 1; i++) {
        ptrdiff_t step[NEST_N_OPERAND] = {x->step[i], 0, 0, out->step[i]};
        if (row_axis[i] >= 0 && rows.shape[row_axis[i]] > 1) {
            step[ROPE_COS] = rows.step[row_axis[i]];
            step[ROPE_SIN] = t->positions == NULL ? t->sin.step[row_axis[i]] : 0;
        }
        nest_add_axis(&r->loops[0], (size_t)x->shape[i], step);
    }
    r->n_nest = nest_arrange(&r->loops[0], ROPE_HELD, &r->loops[1]);
    return true;
}

/* 16-bit data may have tables of float. */
static bool
fit_together(int x_type, int table_type)
{
    bool is_short = x_type == REAL_F16 || x_type == REAL_BF16;
    return x_type == table_type || (is_short && table_type == REAL_F32);
}

/* Take x and where its rotation goes: `out`, or a new array in x's memory order.
 * Returns as take_positions does. */
static int
take_operand(PyObject *x, PyObject *out, const table *t, const rope_options *options,
             rotation *r)
{
    if (!view_of(x, &r->x) || r->x.n_axis == 0 || r->x.type >= N_REAL ||
        !fit_together(r->x.type, t->cos.type)) {
        return 0;
    }
    npy_intp head_dim = last_of(&r->x, r->x.shape);
    if (options->is_twin && (r->x.n_axis != 4 || t->cos.n_axis != 3 ||
                             r->x.type != t->cos.type || head_dim != 2 * t->n_pair)) {
        return 0;
    }
    npy_intp start = options->start + (options->start < 0 ? head_dim : 0);
    if (start < 0 || start > head_dim || t->n_pair > (head_dim - start) / 2) {
        return 0;
    }
    r->start = start;
    if (out == Py_None) {
        r->result = new_like(x, &r->x, &r->out);
        return r->result == NULL ? -1 : 1;
    }
    bool is_seen = out == x;
    if (is_seen) {
        r->out = r->x;
    }
    if ((!is_seen && !view_of(out, &r->out)) || r->out.type != r->x.type ||
        !r->out.is_writeable || r->out.is_tensor != r->x.is_tensor ||
        !have_same_shape(&r->x, &r->out) ||
        !has_distinct_elements(&r->out, item_size(r->out.type)) ||
        may_overlap(&r->out, &t->cos) || may_overlap(&r->out, &t->sin) ||
        (!are_identical(&r->x, &r->out) && may_overlap(&r->out, &r->x))) {
        return 0;
    }
    r->result = Py_NewRef(out);
    return 1;
}

/* True if the result of one rotation touches an array of the other. */
static bool
disturb_each_other(const rotation *a, const rotation *b)
{
    return may_overlap(&a->out, &b->x) || may_overlap(&a->out, &b->out) ||
           may_overlap(&b->out, &a->x);
}

void
run_jobs(const nest_job *jobs, int n_job, npy_intp size)
{
    NPY_BEGIN_THREADS_DEF;
    NPY_BEGIN_THREADS_THRESHOLDED(size > MIN_SIZE_WITHOUT_GIL ? NPY_MAX_INTP : 0);
    nest_run(jobs, n_job);
    NPY_END_THREADS;
}

/* Tell torch which of its tensors will be written.  Returns 0, or -1 with an error. */
static int
mark_given(const rotation *r, int n, PyObject *const *out)
{
    PyObject *given[2] = {NULL, NULL};
    int n_given = 0;
    for (int i = 0; i < n; i++) {
        if (r[i].out.is_tensor && out[i] != Py_None) {
            given[n_given++] = out[i];
        }
    }
    if (n_given == 0) {
        return 0;
    }
    PyObject *tensors = PyTuple_Pack(n_given, given[0], given[1]);
    int status = tensors == NULL ? -1 : mark_changed(tensors);
    Py_XDECREF(tensors);
    return status;
}

/* Rotate n of (x, out), one or two: plan all, then run all.  Returns 1, or 0 to
 * decline with nothing written, or -1 with an error. */
static int
rotate_all(rotation *r, int n, PyObject *const *x, PyObject *const *out, const table *t,
           const rope_options *options)
{
    nest_job jobs[4];
    int n_job = 0;
    size_t n_byte = 0;
    npy_intp size = 0;
    for (int i = 0; i < n; i++) {
        int status = take_operand(x[i], out[i], t, options, &r[i]);
        if (status != 1) {
            return status;
        }
        if (!plan_rotation(&r[i], t, options) ||
            (i == 1 && disturb_each_other(&r[0], &r[1]))) {
            return 0;
        }
        size += size_of(&r[i].x);
        n_byte += (size_t)(size_of(&r[i].x) * item_size(r[i].x.type));
    }
    if (mark_given(r, n, out) < 0) {
        return -1;
    }
    for (int i = 0; i < n; i++) {
        size_t head_dim = r[i].task.within.head_dim;
        rope_task_choose_stores(&r[i].task, r[i].x.data == r[i].out.data, n_byte);
        for (int part = 0; part < r[i].n_nest; part++) {
            jobs[n_job++] = (nest_job){&r[i].loops[part], rope_task_strip,
                                       rope_task_finish, &r[i].task, head_dim};
        }
    }
    run_jobs(jobs, n_job, size);
    return 1;
}

/* A small whole number; false for anything else. */
static bool
take_int(PyObject *object, long least, long most, long *value)
{
    int overflow = 0;
    if (!PyLong_CheckExact(object)) {
        return false;
    }
    *value = PyLong_AsLongAndOverflow(object, &overflow);
    return overflow == 0 && *value >= least && *value <= most;
}

/* The first of two words, or the second, as 0 or 1. */
static bool
take_word(PyObject *object, const char *const words[2], int *choice)
{
    if (!PyUnicode_Check(object)) {
        return false;
    }
    *choice = PyUnicode_CompareWithASCIIString(object, words[0]) != 0;
    return *choice == 0 || PyUnicode_CompareWithASCIIString(object, words[1]) == 0;
}

static bool
take_options(PyObject *axis, PyObject *adjoint, PyObject *rounding, PyObject *start,
             rope_options *options)
{
    static const char *const roundings[] = {
        [ROUND_ONCE] = "once", [ROUND_EAGER] = "eager"};
    long axis_value, start_value;
    if (!take_int(axis, -NPY_MAXDIMS, NPY_MAXDIMS, &axis_value) ||
        !take_int(start, -LONG_MAX, LONG_MAX, &start_value) || !PyBool_Check(adjoint) ||
        !take_word(rounding, roundings, &options->rounding)) {
        return false;
    }
    options->axis = (int)axis_value;
    options->start = start_value;
    options->adjoint = adjoint == Py_True;
    return true;
}

static bool
take_layout(PyObject *layout, rope_options *options)
{
    static const char *const layouts[] = {
        [LAYOUT_HALF] = "half", [LAYOUT_INTERLEAVED] = "interleaved"};
    return take_word(layout, layouts, &options->layout);
}

/* Two results, of which each may be None. */
static bool
take_pair(PyObject *out, PyObject *pair[2])
{
    pair[0] = pair[1] = Py_None;
    if (out == Py_None) {
        return true;
    }
    if (!PyTuple_CheckExact(out) || PyTuple_GET_SIZE(out) != 2) {
        return false;
    }
    pair[0] = PyTuple_GET_ITEM(out, 0);
    pair[1] = PyTuple_GET_ITEM(out, 1);
    return true;
}

bool
has_arguments(const char *name, Py_ssize_t n_arg, Py_ssize_t expected)
{
    if (n_arg == expected) {
        return true;
    }
    PyErr_Format(PyExc_TypeError, "%s: arguments must number %zd; got %zd", name,
                 expected, n_arg);
    return false;
}

PyObject *
refuse(const char *name)
{
    return PyErr_Format(PyExc_TypeError,
                        "%s: arguments must be arrays that fit together; got others",
                        name);
}

/* The results of n rotations by one table, or NotImplemented, or NULL. */
static PyObject *
finish(int status, rotation *r, int n, table *t)
{
    PyObject *answer = NULL;
    if (status == 0) {
        answer = Py_NewRef(Py_NotImplemented);
    } else if (status == 1) {
        answer =
            n == 1 ? Py_NewRef(r[0].result) : PyTuple_Pack(2, r[0].result, r[1].result);
    }
    for (int i = 0; i < n; i++) {
        Py_XDECREF(r[i].result);
    }
    Py_XDECREF(t->positions);
    return answer;
}

/* rope(x, cos, sin, layout, axis, positions, adjoint, out, rounding, start) */
static PyObject *
rope(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("rope", n_arg, 10)) {
        return NULL;
    }
    table t = {.positions = NULL};
    rotation r;
    r.result = NULL;
    rope_options options = {.is_twin = false};
    int status = take_layout(args[3], &options) &&
                 take_options(args[4], args[6], args[8], args[9], &options);
    if (status == 1) {
        status = take_planar_table(args[1], args[2], args[5], &t);
    }
    if (status == 1) {
        status = rotate_all(&r, 1, &args[0], &args[7], &t, &options);
    }
    return finish(status, &r, 1, &t);
}

/* rope_qk(q, k, cos, sin, layout, axis, positions, adjoint, out, rounding, start) */
static PyObject *
rope_qk(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("rope_qk", n_arg, 11)) {
        return NULL;
    }
    table t = {.positions = NULL};
    rotation r[2];
    r[0].result = r[1].result = NULL;
    rope_options options = {.is_twin = false};
    PyObject *out[2];
    int status = take_layout(args[4], &options) && take_pair(args[8], out) &&
                 take_options(args[5], args[7], args[9], args[10], &options);
    if (status == 1) {
        status = take_planar_table(args[2], args[3], args[6], &t);
    }
    if (status == 1) {
        status = rotate_all(r, 2, &args[0], out, &t, &options);
    }
    return finish(status, r, 2, &t);
}

/* True if both halves of every row hold the same bits: transformers' tables have each
 * value twice. */
static bool
has_twin_halves(const view *v)
{
    npy_intp item = item_size(v->type), index[NPY_MAXDIMS] = {0};
    npy_intp n_byte = last_of(v, v->shape) / 2 * item;
    if (last_of(v, v->step) != item || last_of(v, v->shape) % 2 != 0) {
        return false;
    }
    const char *row = v->data;
    for (npy_intp left = size_of(v); left > 0; left -= 2 * n_byte / item) {
        if (memcmp(row, row + n_byte, (size_t)n_byte) != 0) {
            return false;
        }
        for (int i = v->n_axis - 2; i >= 0; i--) {
            row += v->step[i];
            if (++index[i] < v->shape[i]) {
                break;
            }
            row -= index[i] * v->step[i];
            index[i] = 0;
        }
    }
    return true;
}

/* halves_agree(cos, sin): whether the halves of both tables do, bit for bit. */
static PyObject *
halves_agree(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("halves_agree", n_arg, 2)) {
        return NULL;
    }
    table t = {.positions = NULL};
    if (take_planar_table(args[0], args[1], Py_None, &t) != 1) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    return PyBool_FromLong(has_twin_halves(&t.cos) && has_twin_halves(&t.sin));
}

/* rope_qk_twin(q, k, cos, sin, layout, axis, out): what transformers'
 * apply_rotary_pos_emb does, rounded as there, if its tables have twin halves. */
static PyObject *
rope_qk_twin(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("rope_qk_twin", n_arg, 7)) {
        return NULL;
    }
    table t = {.positions = NULL};
    rotation r[2];
    r[0].result = r[1].result = NULL;
    rope_options options = {.rounding = ROUND_EAGER, .is_twin = true};
    PyObject *out[2];
    long axis;
    int status = take_layout(args[4], &options) && take_pair(args[6], out) &&
                 take_int(args[5], -NPY_MAXDIMS, NPY_MAXDIMS, &axis);
    if (status == 1) {
        options.axis = (int)axis;
        status = take_planar_table(args[2], args[3], Py_None, &t);
    }
    if (status == 1) {
        t.n_pair /= 2;
        status = has_twin_halves(&t.cos) && has_twin_halves(&t.sin);
    }
    if (status == 1) {
        status = rotate_all(r, 2, &args[0], out, &t, &options);
    }
    return finish(status, r, 2, &t);
}

/* rope_complex(x, cis, axis, positions, adjoint, out, rounding, start) */
static PyObject *
rope_complex(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("rope_complex", n_arg, 8)) {
        return NULL;
    }
    table t = {.positions = NULL};
    rotation r;
    r.result = NULL;
    rope_options options = {.layout = LAYOUT_INTERLEAVED};
    int status = take_options(args[2], args[4], args[6], args[7], &options);
    if (status == 1) {
        status = take_complex_table(args[1], args[3], &t);
    }
    if (status == 1) {
        status = rotate_all(&r, 1, &args[0], &args[5], &t, &options);
    }
    return finish(status, &r, 1, &t);
}

/* True if result is writeable floats of shape (positions..., n_pair), clear of all
 * the other arrays. */
static bool
is_table_result(const view *result, const view *positions, const view *inv_freq)
{
    if ((result->type != REAL_F32 && result->type != REAL_F64) ||
        !result->is_writeable || result->n_axis != positions->n_axis + 1) {
        return false;
    }
    npy_intp item = item_size(result->type);
    return agree_in_shape(result, positions, positions->n_axis) &&
           last_of(result, result->shape) == inv_freq->shape[0] &&
           has_distinct_elements(result, item) && !may_overlap(result, positions) &&
           !may_overlap(result, inv_freq);
}

/* False if the tables lie in each other's memory, other than as the real and the
 * imaginary part of one complex table. */
static bool
are_apart(const view *cos, const view *sin)
{
    npy_intp item = item_size(cos->type);
    if (sin->data == cos->data + item && last_of(cos, cos->step) == 2 * item) {
        view both = *cos;
        view twin = *sin;
        twin.data = both.data;
        return are_identical(&both, &twin) && has_distinct_elements(&both, 2 * item);
    }
    return !may_overlap(cos, sin);
}

/* cos_sin(positions, inv_freq, factor, float32_angles, cos, sin): fill the tables;
 * positions and inv_freq are doubles. */
static PyObject *
cos_sin(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("cos_sin", n_arg, 6)) {
        return NULL;
    }
    double factor = PyFloat_AsDouble(args[2]);
    if (factor == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    view positions, inv_freq, cos, sin;
    if (!view_of(args[0], &positions) || !view_of(args[1], &inv_freq) ||
        !view_of(args[4], &cos) || !view_of(args[5], &sin) ||
        positions.type != REAL_F64 || inv_freq.type != REAL_F64 ||
        inv_freq.n_axis != 1 || cos.type != sin.type ||
        !is_table_result(&cos, &positions, &inv_freq) ||
        !is_table_result(&sin, &positions, &inv_freq) || !are_apart(&cos, &sin)) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    cos_sin_strip task = {
        .n_pair = (size_t)inv_freq.shape[0],
        .factor = factor,
        .float32_angles = args[3] == Py_True,
        .inv_freq_type = REAL_F64,
        .out_type = cos.type,
        .inv_freq_pair = inv_freq.step[0],
        .cos_pair = last_of(&cos, cos.step),
        .sin_pair = last_of(&sin, sin.step),
    };
    char *base[NEST_N_OPERAND] = {positions.data, inv_freq.data, cos.data, sin.data};
    nest loops;
    nest_begin(&loops, base);
    for (int i = 0; i < positions.n_axis; i++) {
        ptrdiff_t step[NEST_N_OPERAND] = {positions.step[i], 0, cos.step[i],
                                          sin.step[i]};
        nest_add_axis(&loops, (size_t)positions.shape[i], step);
    }
    nest_arrange(&loops, 0, NULL);
    nest_job job = {&loops, table_task_strip, NULL, &task, task.n_pair};
    run_jobs(&job, 1, size_of(&cos));
    Py_RETURN_NONE;
}

PyMethodDef array_methods[] = {
    {"rope_arrays", FASTCALL(rope),
     "(x, cos, sin, layout, axis, positions, adjoint, out, rounding, start)"},
    {"rope_qk_arrays", FASTCALL(rope_qk),
     "(q, k, cos, sin, layout, axis, positions, adjoint, out, rounding, start)"},
    {"rope_qk_twin", FASTCALL(rope_qk_twin), "(q, k, cos, sin, layout, axis, out)"},
    {"halves_agree", FASTCALL(halves_agree), "(cos, sin)"},
    {"rope_complex_arrays", FASTCALL(rope_complex),
     "(x, cis, axis, positions, adjoint, out, rounding, start)"},
    {"cos_sin_arrays", FASTCALL(cos_sin),
     "(positions, inv_freq, factor, float32_angles, cos, sin)"},
    {NULL, NULL, 0, NULL},
};
