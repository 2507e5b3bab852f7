/* Door 2: functions on whole arrays, which see the full broadcast nest.
 *
 * They take what is common and answer NotImplemented to everything else: other
 * kinds of arrays, mixed types, odd alignment, overlap, wrong shapes.  The Python
 * layer then words the error or goes through the gufuncs, so no rule is written
 * here that is not checked there too, and nothing is written before all holds.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "numpy_api.h"

#include <stdbool.h>
#include <string.h>

#include "dispatch.h"
#include "tasks.h"

/* Elements above which another Python thread may run meanwhile. */
#define MIN_SIZE_WITHOUT_GIL 4096

/* The sequence axis unless said otherwise; a lone row has none to name. */
#define DEFAULT_AXIS (-2)

/* An array as the doors see it: where the elements are, not who owns them. */
typedef struct {
    char *data;
    int n_axis;
    const npy_intp *shape, *step; /* bytes */
    int type;                     /* NPY_FLOAT, ... */
    bool is_writeable;
} view;

/* Describe an aligned ndarray in native byte order.  Other kinds of arrays that
 * lie in this process's memory (torch CPU tensors) would be described here too. */
static bool
view_of(PyObject *object, view *seen)
{
    if (!PyArray_CheckExact(object)) {
        return false;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_ISALIGNED(array) || !PyArray_ISNOTSWAPPED(array)) {
        return false;
    }
    *seen = (view){
        .data = PyArray_BYTES(array),
        .n_axis = PyArray_NDIM(array),
        .shape = PyArray_DIMS(array),
        .step = PyArray_STRIDES(array),
        .type = PyArray_TYPE(array),
        .is_writeable = PyArray_ISWRITEABLE(array),
    };
    return true;
}

static npy_intp
last_of(const view *v, const npy_intp *per_axis)
{
    return per_axis[v->n_axis - 1];
}

static npy_intp
size_of(const view *v)
{
    return PyArray_MultiplyList(v->shape, v->n_axis);
}

/* True if the first n axes of both have the same sizes; there may be none. */
static bool
agree_in_shape(const view *a, const view *b, int n)
{
    return PyArray_CompareLists(a->shape, b->shape, n);
}

static bool
have_same_shape(const view *a, const view *b)
{
    return a->n_axis == b->n_axis && agree_in_shape(a, b, a->n_axis);
}

/* The bytes from the first to past the last that a view touches. */
static void
extent_of(const view *v, npy_intp item_size, char **begin, char **end)
{
    *begin = v->data;
    *end = v->data + item_size;
    for (int i = 0; i < v->n_axis; i++) {
        npy_intp span = (v->shape[i] - 1) * v->step[i];
        *(span < 0 ? begin : end) += span;
    }
}

/* False only if no byte is in both; an empty view overlaps nothing. */
static bool
may_overlap(const view *a, npy_intp a_item, const view *b, npy_intp b_item)
{
    if (size_of(a) == 0 || size_of(b) == 0) {
        return false;
    }
    char *a_begin, *a_end, *b_begin, *b_end;
    extent_of(a, a_item, &a_begin, &a_end);
    extent_of(b, b_item, &b_begin, &b_end);
    return a_begin < b_end && b_begin < a_end;
}

/* The same elements at the same places; the shapes are known to be equal. */
static bool
are_identical(const view *a, const view *b)
{
    if (a->data != b->data) {
        return false;
    }
    for (int i = 0; i < a->n_axis; i++) {
        if (a->shape[i] > 1 && a->step[i] != b->step[i]) {
            return false;
        }
    }
    return true;
}

/* The axis with the least step of those longer than 1 and not yet done, or -1. */
static int
least_axis(const view *v, unsigned long long done, size_t *step)
{
    int least = -1;
    for (int i = 0; i < v->n_axis; i++) {
        if (v->shape[i] > 1 && !(done >> i & 1)) {
            size_t size = v->step[i] < 0 ? 0 - (size_t)v->step[i] : (size_t)v->step[i];
            if (least < 0 || size < *step) {
                least = i;
                *step = size;
            }
        }
    }
    return least;
}

/* False if two indices may lead to one element: each step must reach past all
 * that the smaller steps cover. */
static bool
has_distinct_elements(const view *v, npy_intp item_size)
{
    size_t covered = (size_t)item_size, step = 0;
    unsigned long long done = 0;
    if (size_of(v) == 0) {
        return true;
    }
    for (int i; (i = least_axis(v, done, &step)) >= 0; done |= 1ull << i) {
        if (step < covered) {
            return false;
        }
        covered += (size_t)(v->shape[i] - 1) * step;
    }
    return true;
}

/* The table of a rotation: planar or complex, gathered by positions or not. */
typedef struct {
    view cos, sin;
    npy_intp cos_pair, sin_pair; /* bytes from angle to angle                  */
    npy_intp n_pair;
    PyArrayObject *positions; /* owned int64 copy, C order, or NULL         */
    view rows;                /* the axes of its rows: of cos, or positions */
} table;

/* Copy the positions, so that what was checked is what is used.  Returns 1, or 0
 * to decline, or -1 with an error. */
static int
take_positions(PyObject *object, table *t)
{
    if (t->cos.n_axis != 2 || !PyArray_CheckExact(object)) {
        return 0;
    }
    int type = PyArray_TYPE((PyArrayObject *)object);
    if (!PyTypeNum_ISSIGNED(type)) {
        return 0;
    }
    t->positions = (PyArrayObject *)PyArray_FROMANY(
        object, NPY_INT64, 0, 0, NPY_ARRAY_CARRAY | NPY_ARRAY_ENSURECOPY);
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

/* Take the table of cosines and sines; returns as take_positions does. */
static int
take_planar_table(PyObject *cos, PyObject *sin, PyObject *positions, table *t)
{
    if (!view_of(cos, &t->cos) || !view_of(sin, &t->sin) || t->cos.n_axis == 0 ||
        t->cos.type != t->sin.type || !have_same_shape(&t->cos, &t->sin)) {
        return 0;
    }
    t->n_pair = last_of(&t->cos, t->cos.shape);
    t->cos_pair = last_of(&t->cos, t->cos.step);
    t->sin_pair = last_of(&t->sin, t->sin.step);
    t->rows = t->cos;
    t->rows.n_axis--;
    return positions == Py_None ? 1 : take_positions(positions, t);
}

/* Take a complex table as its real and imaginary parts. */
static int
take_complex_table(PyObject *cis, PyObject *positions, table *t)
{
    if (!view_of(cis, &t->cos) || t->cos.n_axis == 0 ||
        (t->cos.type != NPY_CFLOAT && t->cos.type != NPY_CDOUBLE)) {
        return 0;
    }
    bool is_single = t->cos.type == NPY_CFLOAT;
    t->cos.type = is_single ? NPY_FLOAT : NPY_DOUBLE;
    t->sin = t->cos;
    t->sin.data += is_single ? sizeof(float) : sizeof(double);
    t->n_pair = last_of(&t->cos, t->cos.shape);
    t->cos_pair = t->sin_pair = last_of(&t->cos, t->cos.step);
    t->rows = t->cos;
    t->rows.n_axis--;
    return positions == Py_None ? 1 : take_positions(positions, t);
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

/* One rotation: its operands, and the result it will give. */
typedef struct {
    view x, out;
    PyObject *result; /* owned */
    rope_task task;
    nest loops[2]; /* the second: what the tiles of the first leave */
    int n_nest;
} rotation;

/* Describe the rotation of x into out. */
static bool
plan_rotation(rotation *r, const table *t, int layout, int axis, bool adjoint)
{
    const view *x = &r->x, *out = &r->out, *rows = &t->rows;
    int row_axis[NPY_MAXDIMS];
    if (!match_axes(x, rows, axis, row_axis)) {
        return false;
    }
    npy_intp head_dim = last_of(x, x->shape);
    r->task = (rope_task){
        .kernel = kernels->rope[layout][x->type == NPY_FLOAT ? REAL_F32 : REAL_F64],
        .within =
            {
                .head_dim = (size_t)head_dim,
                .n_pair = (size_t)t->n_pair,
                .adjoint = adjoint,
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
    char *base[NEST_N_OPERAND] = {x->data, rows->data, t->sin.data, out->data};
    nest_begin(&r->loops[0], base);
    for (int i = 0; i < x->n_axis - 1; i++) {
        ptrdiff_t step[NEST_N_OPERAND] = {x->step[i], 0, 0, out->step[i]};
        if (row_axis[i] >= 0 && rows->shape[row_axis[i]] > 1) {
            step[ROPE_COS] = rows->step[row_axis[i]];
            step[ROPE_SIN] = t->positions == NULL ? t->sin.step[row_axis[i]] : 0;
        }
        nest_add_axis(&r->loops[0], (size_t)x->shape[i], step);
    }
    r->n_nest = nest_arrange(&r->loops[0], ROPE_HELD, &r->loops[1]);
    return true;
}

/* Take x and where its rotation goes: `out`, or a new array in x's memory order.
 * Returns as take_positions does. */
static int
take_operand(PyObject *x, PyObject *out, const table *t, rotation *r)
{
    if (!view_of(x, &r->x) || r->x.n_axis == 0 || r->x.type != t->cos.type ||
        (r->x.type != NPY_FLOAT && r->x.type != NPY_DOUBLE) ||
        2 * t->n_pair > last_of(&r->x, r->x.shape)) {
        return 0;
    }
    if (out == Py_None) {
        r->result = PyArray_NewLikeArray((PyArrayObject *)x, NPY_KEEPORDER, NULL, 0);
        if (r->result == NULL) {
            return -1;
        }
        return view_of(r->result, &r->out);
    }
    npy_intp item = r->x.type == NPY_FLOAT ? sizeof(float) : sizeof(double);
    if (!view_of(out, &r->out) || r->out.type != r->x.type || !r->out.is_writeable ||
        !have_same_shape(&r->x, &r->out) || !has_distinct_elements(&r->out, item) ||
        may_overlap(&r->out, item, &t->cos, item) ||
        may_overlap(&r->out, item, &t->sin, item) ||
        (!are_identical(&r->x, &r->out) && may_overlap(&r->out, item, &r->x, item))) {
        return 0;
    }
    r->result = Py_NewRef(out);
    return 1;
}

/* True if the result of one rotation touches an array of the other. */
static bool
disturb_each_other(const rotation *a, const rotation *b)
{
    npy_intp item = a->x.type == NPY_FLOAT ? sizeof(float) : sizeof(double);
    return may_overlap(&a->out, item, &b->x, item) ||
           may_overlap(&a->out, item, &b->out, item) ||
           may_overlap(&b->out, item, &a->x, item);
}

static void
run_jobs(const nest_job *jobs, int n_job, npy_intp size)
{
    NPY_BEGIN_THREADS_DEF;
    NPY_BEGIN_THREADS_THRESHOLDED(size > MIN_SIZE_WITHOUT_GIL ? NPY_MAX_INTP : 0);
    nest_run(jobs, n_job);
    NPY_END_THREADS;
}

/* Rotate n of (x, out), one or two: plan all, then run all.  Returns 1, or 0 to
 * decline with nothing written, or -1 with an error. */
static int
rotate_all(rotation *r, int n, PyObject *const *x, PyObject *const *out, const table *t,
           int layout, int axis, bool adjoint)
{
    nest_job jobs[4];
    int n_job = 0;
    npy_intp size = 0;
    for (int i = 0; i < n; i++) {
        int status = take_operand(x[i], out[i], t, &r[i]);
        if (status != 1) {
            return status;
        }
        if (!plan_rotation(&r[i], t, layout, axis, adjoint) ||
            (i == 1 && disturb_each_other(&r[0], &r[1]))) {
            return 0;
        }
        size += size_of(&r[i].x);
    }
    for (int i = 0; i < n; i++) {
        size_t head_dim = r[i].task.within.head_dim;
        size_t real = r[i].x.type == NPY_FLOAT ? sizeof(float) : sizeof(double);
        rope_task_choose_stores(&r[i].task, r[i].x.data == r[i].out.data,
                                (size_t)size * real);
        for (int part = 0; part < r[i].n_nest; part++) {
            jobs[n_job++] = (nest_job){&r[i].loops[part], rope_task_strip,
                                       rope_task_finish, &r[i].task, head_dim};
        }
    }
    run_jobs(jobs, n_job, size);
    return 1;
}

/* The options that all rotations share. */
typedef struct {
    int layout, axis;
    bool adjoint;
} rope_options;

static bool
take_options(PyObject *axis, PyObject *adjoint, rope_options *options)
{
    int overflow = 0;
    if (!PyLong_CheckExact(axis) || !PyBool_Check(adjoint)) {
        return false;
    }
    long value = PyLong_AsLongAndOverflow(axis, &overflow);
    if (overflow != 0 || value < -NPY_MAXDIMS || value > NPY_MAXDIMS) {
        return false;
    }
    options->axis = (int)value;
    options->adjoint = adjoint == Py_True;
    return true;
}

static bool
take_layout(PyObject *layout, rope_options *options)
{
    if (!PyUnicode_Check(layout)) {
        return false;
    }
    if (PyUnicode_CompareWithASCIIString(layout, "half") == 0) {
        options->layout = LAYOUT_HALF;
        return true;
    }
    options->layout = LAYOUT_INTERLEAVED;
    return PyUnicode_CompareWithASCIIString(layout, "interleaved") == 0;
}

static bool
has_arguments(const char *name, Py_ssize_t n_arg, Py_ssize_t expected)
{
    if (n_arg == expected) {
        return true;
    }
    PyErr_Format(PyExc_TypeError, "%s: arguments must number %zd; got %zd", name,
                 expected, n_arg);
    return false;
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

/* rope(x, cos, sin, layout, axis, positions, adjoint, out) */
static PyObject *
rope(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("rope", n_arg, 8)) {
        return NULL;
    }
    table t = {.positions = NULL};
    rotation r;
    r.result = NULL;
    rope_options options;
    int status =
        take_layout(args[3], &options) && take_options(args[4], args[6], &options);
    if (status == 1) {
        status = take_planar_table(args[1], args[2], args[5], &t);
    }
    if (status == 1) {
        status = rotate_all(&r, 1, &args[0], &args[7], &t, options.layout, options.axis,
                            options.adjoint);
    }
    return finish(status, &r, 1, &t);
}

/* rope_qk(q, k, cos, sin, layout, axis, positions, adjoint, q_out, k_out) */
static PyObject *
rope_qk(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("rope_qk", n_arg, 10)) {
        return NULL;
    }
    table t = {.positions = NULL};
    rotation r[2];
    r[0].result = r[1].result = NULL;
    rope_options options;
    int status =
        take_layout(args[4], &options) && take_options(args[5], args[7], &options);
    if (status == 1) {
        status = take_planar_table(args[2], args[3], args[6], &t);
    }
    if (status == 1) {
        status = rotate_all(r, 2, &args[0], &args[8], &t, options.layout, options.axis,
                            options.adjoint);
    }
    return finish(status, r, 2, &t);
}

/* rope_complex(x, cis, axis, positions, adjoint, out) */
static PyObject *
rope_complex(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    if (!has_arguments("rope_complex", n_arg, 6)) {
        return NULL;
    }
    table t = {.positions = NULL};
    rotation r;
    r.result = NULL;
    rope_options options = {.layout = LAYOUT_INTERLEAVED};
    int status = take_options(args[2], args[4], &options);
    if (status == 1) {
        status = take_complex_table(args[1], args[3], &t);
    }
    if (status == 1) {
        status = rotate_all(&r, 1, &args[0], &args[5], &t, options.layout, options.axis,
                            options.adjoint);
    }
    return finish(status, &r, 1, &t);
}

/* True if result is writeable floats of shape (positions..., n_pair), clear of all
 * the other arrays. */
static bool
is_table_result(const view *result, const view *positions, const view *inv_freq)
{
    if ((result->type != NPY_FLOAT && result->type != NPY_DOUBLE) ||
        !result->is_writeable || result->n_axis != positions->n_axis + 1) {
        return false;
    }
    npy_intp item = result->type == NPY_FLOAT ? sizeof(float) : sizeof(double);
    return agree_in_shape(result, positions, positions->n_axis) &&
           last_of(result, result->shape) == inv_freq->shape[0] &&
           has_distinct_elements(result, item) &&
           !may_overlap(result, item, positions, sizeof(double)) &&
           !may_overlap(result, item, inv_freq, sizeof(double));
}

/* False if the tables lie in each other's memory, other than as the real and the
 * imaginary part of one complex table. */
static bool
are_apart(const view *cos, const view *sin)
{
    npy_intp item = cos->type == NPY_FLOAT ? sizeof(float) : sizeof(double);
    if (sin->data == cos->data + item && last_of(cos, cos->step) == 2 * item) {
        view both = *cos;
        view twin = *sin;
        twin.data = both.data;
        return are_identical(&both, &twin) && has_distinct_elements(&both, 2 * item);
    }
    return !may_overlap(cos, item, sin, item);
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
        positions.type != NPY_DOUBLE || inv_freq.type != NPY_DOUBLE ||
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
        .out_type = cos.type == NPY_FLOAT ? REAL_F32 : REAL_F64,
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

#define FASTCALL(function) (PyCFunction)(void (*)(void)) function, METH_FASTCALL, NULL

PyMethodDef array_methods[] = {
    {"rope_arrays", FASTCALL(rope)},
    {"rope_qk_arrays", FASTCALL(rope_qk)},
    {"rope_complex_arrays", FASTCALL(rope_complex)},
    {"cos_sin_arrays", FASTCALL(cos_sin)},
    {NULL, NULL, 0, NULL},
};
