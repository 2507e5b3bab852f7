/* Door 2 for sinusoidal tables.
 *
 * The Python layer has checked shapes, types and overlap; what does not keep to it is
 * an error of ours, not of the user.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "door.h"

#include "tasks.h"

/* Positions of any shape, and a table with as many axes and that of the channels. */
static bool
fit_together(const view *positions, const view *inv_freq, const view *out)
{
    if (positions->type != REAL_F64 || inv_freq->type != REAL_F64 ||
        inv_freq->n_axis != 1 || (out->type != REAL_F32 && out->type != REAL_F64) ||
        out->n_axis != positions->n_axis + 1 || !out->is_writeable) {
        return false;
    }
    return agree_in_shape(out, positions, positions->n_axis) &&
           last_of(out, out->shape) >= 2 * inv_freq->shape[0];
}

static void
fill_table(const view *positions, const view *inv_freq, bool interleaved,
           bool cos_first, const view *out)
{
    const npy_intp channel = last_of(out, out->step), n_pair = inv_freq->shape[0];
    char *second = out->data + (interleaved ? channel : n_pair * channel);
    const ptrdiff_t pair = interleaved ? 2 * channel : channel;
    cos_sin_strip task = {
        .n_pair = (size_t)n_pair,
        .factor = 1.0,
        .inv_freq_type = REAL_F64,
        .out_type = out->type,
        .inv_freq_pair = inv_freq->step[0],
        .cos_pair = pair,
        .sin_pair = pair,
    };
    char *base[NEST_N_OPERAND] = {
        [TABLE_POSITION] = positions->data,
        [TABLE_INV_FREQ] = inv_freq->data,
        [TABLE_COS] = cos_first ? out->data : second,
        [TABLE_SIN] = cos_first ? second : out->data,
    };
    nest loops;
    nest_begin(&loops, base);
    for (int i = 0; i < positions->n_axis; i++) {
        ptrdiff_t step[NEST_N_OPERAND] = {
            [TABLE_POSITION] = positions->step[i],
            [TABLE_COS] = out->step[i],
            [TABLE_SIN] = out->step[i],
        };
        nest_add_axis(&loops, (size_t)positions->shape[i], step);
    }
    nest_arrange(&loops, 0, NULL);
    nest_job job = {&loops, table_task_strip, NULL, &task, task.n_pair};
    run_jobs(&job, 1, size_of(out));
}

/* sinusoidal(positions, inv_freq, interleaved, cos_first, out): fill all channels that
 * have a frequency; positions and inv_freq are doubles. */
static PyObject *
sinusoidal(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_arg)
{
    const char *name = "sinusoidal_arrays";
    if (!has_arguments(name, n_arg, 5)) {
        return NULL;
    }
    view positions, inv_freq, out;
    if (!view_of(args[0], &positions) || !view_of(args[1], &inv_freq) ||
        !view_of(args[4], &out) || !fit_together(&positions, &inv_freq, &out)) {
        return refuse(name);
    }
    if (size_of(&out) > 0) {
        fill_table(&positions, &inv_freq, args[2] == Py_True, args[3] == Py_True, &out);
    }
    Py_RETURN_NONE;
}

PyMethodDef sinusoidal_methods[] = {
    {"sinusoidal_arrays", FASTCALL(sinusoidal),
     "(positions, inv_freq, interleaved, cos_first, out)"},
    {NULL, NULL, 0, NULL},
};
