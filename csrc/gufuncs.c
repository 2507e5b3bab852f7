/* Door 1: the gufuncs, their loops and the one table that registers them.
 *
 * A loop describes its rows as a nest of one axis and hands it to the driver.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "numpy_api.h"

#include <fenv.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "dispatch.h"
#include "tasks.h"
#include "view.h"

/* What a loop is told by its registration: the kernel's place in the table, and the
 * type of cosines and sines. */
typedef struct {
    int layout, type, table_type;
} rope_variant;

/* By type and table: the loops of a layout, bfloat16's last. */
enum { F32, F64, F16_F32, F16, BF16_F32, BF16, N_VARIANT };
#define ROPE_VARIANTS(layout)                                                       \
    {                                                                               \
        [F32] = {layout, REAL_F32, REAL_F32}, [F64] = {layout, REAL_F64, REAL_F64}, \
        [F16_F32] = {layout, REAL_F16, REAL_F32},                                   \
        [F16] = {layout, REAL_F16, REAL_F16},                                       \
        [BF16_F32] = {layout, REAL_BF16, REAL_F32},                                 \
        [BF16] = {layout, REAL_BF16, REAL_BF16},                                    \
    }

static rope_variant half[N_VARIANT] = ROPE_VARIANTS(LAYOUT_HALF);
static rope_variant interleaved[N_VARIANT] = ROPE_VARIANTS(LAYOUT_INTERLEAVED);

typedef struct {
    int inv_freq_type, out_type;
} table_variant;

static int attention_types[N_REAL] = {REAL_F32, REAL_F64, REAL_F16, REAL_BF16};

static table_variant table_f32 = {REAL_F32, REAL_F32};
static table_variant table_f64 = {REAL_F64, REAL_F64};
static table_variant table_f64_f32 = {REAL_F64, REAL_F32};

/* posenc never warns: NumPy would report the flags of this thread alone, so the
 * outcome would depend on which thread ran which row. */
static void
clear_floating_point_flags(void)
{
#ifdef __SSE__
    _mm_setcsr(_mm_getcsr() & ~(unsigned)_MM_EXCEPT_MASK);
#else
    feclearexcept(FE_ALL_EXCEPT);
#endif
}

enum { MAX_LOOP = 4, MAX_BFLOAT16 = 2, MAX_ARGUMENT = 5 };

static void
tell_no_memory(void)
{
    NPY_ALLOW_C_API_DEF;
    NPY_ALLOW_C_API;
    PyErr_NoMemory();
    NPY_DISABLE_C_API;
}

/* One axis of n rows whose operands have the given steps, run as a nest. */
static void
run_rows(nest_strip *strip, nest_finish *finish, void *task, size_t row_size,
         npy_intp n, char *const base[NEST_N_OPERAND],
         const ptrdiff_t step[NEST_N_OPERAND])
{
    nest loops;
    nest_begin(&loops, base);
    nest_add_axis(&loops, (size_t)n, step);
    nest_job job = {&loops, strip, finish, task, row_size};
    nest_run(&job, 1);
    clear_floating_point_flags();
}

static rope_task
rope_task_of(const rope_variant *variant, npy_intp head_dim, npy_intp n_pair)
{
    /* dask asks for the result's type with every core size 1: copy that one. */
    npy_intp most = head_dim / 2;
    return (rope_task){
        .kernel = kernels->rope[variant->layout][ROUND_ONCE][variant->type],
        .within = {.head_dim = (size_t)head_dim,
                   .n_pair = (size_t)(n_pair < most ? n_pair : most),
                   .table_type = variant->table_type},
    };
}

static void
choose_stores(rope_task *task, const rope_variant *variant, npy_intp n_row,
              bool in_place)
{
    size_t n_byte = (size_t)n_row * task->within.head_dim;
    rope_task_choose_stores(task, in_place, n_byte * (size_t)item_size(variant->type));
}

/* (n),(m),(m)->(n): x, cos, sin -> out */
static void
rope_loop(char **args, const npy_intp *dimensions, const npy_intp *steps, void *data)
{
    npy_intp n_row = dimensions[0], n = dimensions[1], m = dimensions[2];
    const rope_variant *variant = data;
    rope_task task = rope_task_of(variant, n, m);
    task.within.x_channel = steps[4];
    task.within.cos_pair = steps[5];
    task.within.sin_pair = steps[6];
    task.within.out_channel = steps[7];
    choose_stores(&task, variant, n_row, args[0] == args[3]);
    char *base[NEST_N_OPERAND] = {args[0], args[1], args[2], args[3]};
    ptrdiff_t step[NEST_N_OPERAND] = {steps[0], steps[1], steps[2], steps[3]};
    run_rows(rope_task_strip, rope_task_finish, &task, (size_t)n, n_row, base, step);
}

/* (n),(m)->(n): x, cis -> out; the table is complex */
static void
rope_complex_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
                  void *data)
{
    const rope_variant *variant = data;
    npy_intp n_row = dimensions[0], n = dimensions[1], m = dimensions[2];
    ptrdiff_t real = item_size(variant->table_type);
    rope_task task = rope_task_of(variant, n, m);
    task.within.x_channel = steps[3];
    task.within.cos_pair = task.within.sin_pair = steps[4];
    task.within.out_channel = steps[5];
    choose_stores(&task, variant, n_row, args[0] == args[2]);
    char *base[NEST_N_OPERAND] = {args[0], args[1], args[1] + real, args[2]};
    ptrdiff_t step[NEST_N_OPERAND] = {steps[0], steps[1], steps[1], steps[2]};
    run_rows(rope_task_strip, rope_task_finish, &task, (size_t)n, n_row, base, step);
}

/* (),(m)->(m),(m): position, inv_freq -> cos, sin */
static void
cos_sin_loop(char **args, const npy_intp *dimensions, const npy_intp *steps, void *data)
{
    const table_variant *variant = data;
    npy_intp n_row = dimensions[0], m = dimensions[1];
    cos_sin_strip task = {
        .n_pair = (size_t)m,
        .factor = 1.0,
        .inv_freq_type = variant->inv_freq_type,
        .out_type = variant->out_type,
        .inv_freq_pair = steps[4],
        .cos_pair = steps[5],
        .sin_pair = steps[6],
    };
    char *base[NEST_N_OPERAND] = {args[0], args[1], args[2], args[3]};
    ptrdiff_t step[NEST_N_OPERAND] = {steps[0], steps[1], steps[2], steps[3]};
    run_rows(table_task_strip, NULL, &task, (size_t)m, n_row, base, step);
}

/* (),(m)->(): distance, inv_freq -> twice the sum of cosines */
static void
rope_decay_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
                void *data)
{
    const table_variant *variant = data;
    npy_intp n_row = dimensions[0], m = dimensions[1];
    decay_strip task = {
        .n_pair = (size_t)m,
        .inv_freq_type = variant->inv_freq_type,
        .out_type = variant->out_type,
        .inv_freq_pair = steps[3],
    };
    char *base[NEST_N_OPERAND] = {args[0], args[1], args[2]};
    ptrdiff_t step[NEST_N_OPERAND] = {steps[0], steps[1], steps[2]};
    run_rows(decay_task_strip, NULL, &task, (size_t)m, n_row, base, step);
}

/* What the loops of sinusoidal tables are told. */
typedef struct {
    int layout, type;
} sinusoidal_variant;

#define SINUSOIDAL_VARIANTS(layout)                                 \
    {                                                               \
        {layout, REAL_F32}, {layout, REAL_F64}, {layout, REAL_F16}, \
        {                                                           \
            layout, REAL_BF16                                       \
        }                                                           \
    }
static sinusoidal_variant sinusoidals[N_SINUSOIDAL][N_REAL] = {
    SINUSOIDAL_VARIANTS(SINUSOIDAL_INTERLEAVED),
    SINUSOIDAL_VARIANTS(SINUSOIDAL_CONCAT),
    SINUSOIDAL_VARIANTS(SINUSOIDAL_CONCAT_FLIPPED),
};

/* (n),(),(m)->(n): x, position, inv_freq -> out */
static void
add_sinusoidal_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
                    void *data)
{
    const sinusoidal_variant *variant = data;
    npy_intp n_row = dimensions[0], n = dimensions[1], m = dimensions[2];
    sinusoidal_task task = {
        .within = {.n_channel = (size_t)n,
                   .n_pair = (size_t)(m < n / 2 ? m : n / 2), /* dask's 1 and 1 */
                   .layout = variant->layout,
                   .inv_freq_type = REAL_F64,
                   .table_type = variant->type == REAL_F64 ? REAL_F64 : REAL_F32,
                   .x_channel = steps[4],
                   .inv_freq_pair = steps[5],
                   .out_channel = steps[6]},
        .type = variant->type,
    };
    char *base[NEST_N_OPERAND] = {args[0], args[1], args[2], args[3]};
    ptrdiff_t step[NEST_N_OPERAND] = {steps[0], steps[1], steps[2], steps[3]};
    run_rows(sinusoidal_task_strip, NULL, &task, (size_t)n, n_row, base, step);
}

/* (t,d),(s,d),(s,d),(d,p)->(t,d): q, k, v, position_embedding -> out */
static void
cope_attention_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
                    void *data)
{
    npy_intp n_head = dimensions[0], d = dimensions[2];
    attention_job job = {
        .shape =
            {
                .n_query = (size_t)dimensions[1],
                .n_key = (size_t)dimensions[3],
                .n_channel = (size_t)d,
                .n_position = (size_t)dimensions[4],
                .type = *(const int *)data,
                .causal = true,
                .scale = d > 0 ? 1 / sqrt((double)d) : 1,
                .position_scale = 1,
                .q_row = steps[5],
                .q_channel = steps[6],
                .k_row = steps[7],
                .k_channel = steps[8],
                .v_row = steps[9],
                .v_channel = steps[10],
                .embedding_channel = steps[11],
                .embedding_position = steps[12],
                .out_row = steps[13],
                .out_channel = steps[14],
            },
        .n_head = {(size_t)n_head, 1, 1},
        .q = {args[0], {steps[0]}},
        .k = {args[1], {steps[1]}},
        .v = {args[2], {steps[2]}},
        .embedding = {args[3], {steps[3]}},
        .out = {args[4], {steps[4]}},
    };
    if (!attention_run(&job)) {
        tell_no_memory();
    }
    clear_floating_point_flags();
}

/* What the loops of CoPE are told: the type of the data, and that of the operand beside
 * them, which is own or float. */
typedef struct {
    int type, other_type;
} cope_variant;

static cope_variant cope_variants[N_VARIANT] = {
    [F32] = {REAL_F32, REAL_F32},       [F64] = {REAL_F64, REAL_F64},
    [F16_F32] = {REAL_F16, REAL_F32},   [F16] = {REAL_F16, REAL_F16},
    [BF16_F32] = {REAL_BF16, REAL_F32}, [BF16] = {REAL_BF16, REAL_BF16},
};

/* ()->(): logits -> gates, by runs of RUN */
static void
cope_gates_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
                void *data)
{
    enum { RUN = 4096 };
    const cope_variant *variant = data;
    size_t n = (size_t)dimensions[0];
    gates_task runs = {RUN, steps[0], steps[1], variant->type}, rest = runs;
    rest.n = n % RUN;
    nest loops[2];
    char *base[NEST_N_OPERAND] = {[COPE_LOGITS] = args[0], [COPE_OUT] = args[1]};
    ptrdiff_t step[NEST_N_OPERAND] = {
        [COPE_LOGITS] = RUN * steps[0], [COPE_OUT] = RUN * steps[1]};
    nest_begin(&loops[0], base);
    nest_add_axis(&loops[0], n / RUN, step);
    base[COPE_LOGITS] += (ptrdiff_t)(n - rest.n) * steps[0];
    base[COPE_OUT] += (ptrdiff_t)(n - rest.n) * steps[1];
    nest_begin(&loops[1], base);
    nest_job jobs[] = {{&loops[0], gates_task_strip, NULL, &runs, RUN},
                       {&loops[1], gates_task_strip, NULL, &rest, rest.n}};
    nest_run(jobs, 2);
    clear_floating_point_flags();
}

/* Rows of a loop of CoPE, whose operands are named by their place; the last is out. */
static void
run_cope(nest_strip *strip, nest_finish *finish, cope_task *task, npy_intp n_row,
         int logits, int z, char **args, const npy_intp *steps)
{
    char *base[NEST_N_OPERAND] = {
        [COPE_LOGITS] = args[logits], [COPE_Z] = args[z], [COPE_OUT] = args[2]};
    ptrdiff_t step[NEST_N_OPERAND] = {
        [COPE_LOGITS] = steps[logits], [COPE_Z] = steps[z], [COPE_OUT] = steps[2]};
    run_rows(strip, finish, task, task->within.n_key, n_row, base, step);
}

/* NumPy takes loops for elementwise and hands over a z that is the result as well; but
 * z is read all over.  Then make the result, of n items a row, elsewhere first. */
static void
run_apart(PyUFuncGenericFunction loop, char **args, const npy_intp *dimensions,
          const npy_intp *steps, void *data, int z, npy_intp n)
{
    if (args[z] != args[2]) {
        loop(args, dimensions, steps, data);
        return;
    }
    const npy_intp n_row = dimensions[0];
    const npy_intp item = item_size(((const cope_variant *)data)->type);
    char *memory = malloc((size_t)(n_row * n * item) + 1);
    if (memory == NULL) {
        tell_no_memory();
        return;
    }
    char *own_args[] = {args[0], args[1], memory};
    npy_intp own_steps[] = {steps[0], steps[1], n * item, steps[3], steps[4], item};
    loop(own_args, dimensions, own_steps, data);
    for (npy_intp row = 0; row < n_row; row++) {
        for (npy_intp i = 0; i < n; i++) {
            memcpy(args[2] + row * steps[2] + i * steps[5],
                   memory + (row * n + i) * item, (size_t)item);
        }
    }
    free(memory);
}

/* (s),()->(s): gates, n_position -> positions */
static void
cope_positions_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
                    void *data)
{
    const cope_variant *variant = data;
    npy_intp n_row = dimensions[0], s = dimensions[1];
    cope_task task = {
        .within = {.n_key = (size_t)s, .key = steps[3], .out_key = steps[4]},
        .type = variant->type,
    };
    run_cope(cope_positions_task_strip, NULL, &task, n_row, 0, 1, args, steps);
}

/* (p),(s)->(s): z, positions -> bias */
static void
interpolate_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
                 void *data)
{
    const cope_variant *variant = data;
    npy_intp n_row = dimensions[0], p = dimensions[1], s = dimensions[2];
    cope_task task = {
        .within = {.n_key = (size_t)s,
                   .n_position = (size_t)p,
                   .z_type = variant->type,
                   .key_type = variant->other_type,
                   .z_position = steps[3],
                   .key = steps[4],
                   .out_key = steps[5]},
        .type = variant->type,
    };
    run_cope(cope_interpolate_task_strip, NULL, &task, n_row, 1, 0, args, steps);
}

static void
cope_interpolate_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
                      void *data)
{
    run_apart(interpolate_loop, args, dimensions, steps, data, 0, dimensions[2]);
}

/* (s),(p)->(s): logits, z -> bias */
static void
bias_loop(char **args, const npy_intp *dimensions, const npy_intp *steps, void *data)
{
    const cope_variant *variant = data;
    npy_intp n_row = dimensions[0], s = dimensions[1], p = dimensions[2];
    cope_task task = {
        .within = {.n_key = (size_t)s,
                   .n_position = (size_t)p,
                   .z_type = variant->other_type,
                   .n_visible = s,
                   .key = steps[3],
                   .z_position = steps[4],
                   .out_key = steps[5]},
        .type = variant->type,
    };
    size_t n_byte = (size_t)n_row * (size_t)s * (size_t)item_size(variant->type);
    cope_task_choose_stores(&task, args[0] == args[2], n_byte);
    run_cope(cope_bias_task_strip, cope_task_finish, &task, n_row, 0, 1, args, steps);
}

static void
cope_bias_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
               void *data)
{
    run_apart(bias_loop, args, dimensions, steps, data, 1, dimensions[1]);
}

/* (),(),(),()->(): relative_position, num_buckets, max_distance, bidirectional */
static void
t5_bucket_loop(char **args, const npy_intp *dimensions, const npy_intp *steps,
               void *Py_UNUSED(data))
{
    bucket_task task;
    for (int i = 0; i < N_BUCKET_OPERAND; i++) {
        task.base[i] = args[i];
        task.step[i] = steps[i];
    }
    char *base[NEST_N_OPERAND] = {(char *)&task};
    ptrdiff_t step[NEST_N_OPERAND] = {1};
    run_rows(bucket_task_strip, NULL, &task, 1, dimensions[0], base, step);
}

/* There must be a position to be at. */
static int
check_positions(PyUFuncObject *ufunc, npy_intp n_position)
{
    if (n_position > 0) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: z must hold at least one position; got 0",
                 ufunc->name);
    return -1;
}

static int
check_interpolate(PyUFuncObject *ufunc, npy_intp *core)
{
    return check_positions(ufunc, core[0]);
}

static int
check_bias(PyUFuncObject *ufunc, npy_intp *core)
{
    return check_positions(ufunc, core[1]);
}

/* The rows must be wide enough for the table; 1 and 1 is dask's question. */
static int
check_width(const char *name, const char *table, const npy_intp *core)
{
    npy_intp n = core[0], m = core[1];
    if (m <= n / 2 || (n == 1 && m == 1)) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError,
                 "%s: %s must hold at most head_dim // 2 = %zd angles; got %zd", name,
                 table, (Py_ssize_t)(n / 2), (Py_ssize_t)m);
    return -1;
}

static int
check_planar(PyUFuncObject *ufunc, npy_intp *core)
{
    return check_width(ufunc->name, "cos", core);
}

static int
check_complex(PyUFuncObject *ufunc, npy_intp *core)
{
    return check_width(ufunc->name, "cis", core);
}

static int
check_sinusoidal(PyUFuncObject *ufunc, npy_intp *core)
{
    return check_width(ufunc->name, "inv_freq", core);
}

static int
check_attention(PyUFuncObject *ufunc, npy_intp *core)
{
    if (core[3] > 0) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError,
                 "%s: position_embedding must hold at least 1 position; got 0",
                 ufunc->name);
    return -1;
}

typedef struct {
    const char *name, *signature, *doc;
    int nin, nout, n_loop;
    bool apart; /* the result is made apart from the operands */
    PyUFunc_ProcessCoreDimsFunc *check;
    PyUFuncGenericFunction loop[MAX_LOOP];
    void *data[MAX_LOOP];
    char types[MAX_LOOP * MAX_ARGUMENT];
    /* The loops of bfloat16, which NumPy learns at run time: it stands as 0 here. */
    int n_bfloat16;
    void *bfloat16_data[MAX_BFLOAT16];
    char bfloat16_types[MAX_BFLOAT16][MAX_ARGUMENT];
} gufunc_entry;

/* Not NumPy's bool, which has the number 0 but no loop here. */
#define NPY_BFLOAT16 0

#define ROPE_DOC(pairs, example)                                                     \
    "Rotate the channel pairs " pairs " of x by the angles of cos and sin.\n\n"      \
    "x (n), cos (m), sin (m) -> (n), with 2 * m <= n; channels past 2 * m are "      \
    "copied.\n"                                                                      \
    "float32 or float64; or float16 or bfloat16 x with a table of its type or of\n"  \
    "float32: computed in float32, rounded once. NaN results are one quiet NaN.\n\n" \
    "See posenc.rope. Su et al., 2021, eq. 34, https://arxiv.org/abs/2104.09864\n\n" \
    "Examples\n--------\n" example

#define ROPE_LOOPS(variants)                                                        \
    .nin = 3, .nout = 1, .n_loop = 4, .check = check_planar,                        \
    .loop = {rope_loop, rope_loop, rope_loop, rope_loop},                           \
    .data = {&variants[F32], &variants[F64], &variants[F16_F32], &variants[F16]},   \
    .types = {NPY_FLOAT,  NPY_FLOAT,  NPY_FLOAT, NPY_FLOAT, NPY_DOUBLE, NPY_DOUBLE, \
              NPY_DOUBLE, NPY_DOUBLE, NPY_HALF,  NPY_FLOAT, NPY_FLOAT,  NPY_HALF,   \
              NPY_HALF,   NPY_HALF,   NPY_HALF,  NPY_HALF},                         \
    .n_bfloat16 = 2, .bfloat16_data = {&variants[BF16_F32], &variants[BF16]},       \
    .bfloat16_types = {{NPY_BFLOAT16, NPY_FLOAT, NPY_FLOAT, NPY_BFLOAT16},          \
                       {NPY_BFLOAT16, NPY_BFLOAT16, NPY_BFLOAT16, NPY_BFLOAT16}}

#define COPE_LOOPS(the_loop)                                                       \
    .nin = 2, .nout = 1, .n_loop = 4,                                              \
    .loop = {the_loop, the_loop, the_loop, the_loop},                              \
    .data = {&cope_variants[F32], &cope_variants[F64], &cope_variants[F16_F32],    \
             &cope_variants[F16]},                                                 \
    .types = {NPY_FLOAT, NPY_FLOAT, NPY_FLOAT, NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE, \
              NPY_HALF,  NPY_FLOAT, NPY_HALF,  NPY_HALF,   NPY_HALF,   NPY_HALF},  \
    .n_bfloat16 = 2,                                                               \
    .bfloat16_data = {&cope_variants[BF16_F32], &cope_variants[BF16]},             \
    .bfloat16_types = {{NPY_BFLOAT16, NPY_FLOAT, NPY_BFLOAT16},                    \
                       {NPY_BFLOAT16, NPY_BFLOAT16, NPY_BFLOAT16}}

#define SINUSOIDAL_DOC(order, example)                                            \
    "Add the sines and cosines of position * inv_freq to x, " order ".\n\n"       \
    "x (n), position (), inv_freq (m) -> (n), with 2 * m <= n; channels past\n"   \
    "2 * m have zero added. float16, bfloat16, float32 or float64 x; positions\n" \
    "and frequencies count as float64 and as exact.\n\n"                          \
    "See posenc.add_sinusoidal. Vaswani et al., 2017, section 3.5,\n"             \
    "https://arxiv.org/abs/1706.03762\n\n"                                        \
    "Examples\n--------\n"                                                        \
    ">>> import numpy as np\n"                                                    \
    ">>> from posenc import ufunc\n" example

/* Half first: positions are often integers, and then the first loop wins that all
 * operands can safely be cast to. */
#define SINUSOIDAL_TYPES                                                               \
    {                                                                                  \
        NPY_HALF, NPY_DOUBLE, NPY_DOUBLE, NPY_HALF, NPY_FLOAT, NPY_DOUBLE, NPY_DOUBLE, \
            NPY_FLOAT, NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE,                 \
    }
#define SINUSOIDAL_ENTRY(the_name, layout, order, example)                        \
    {                                                                             \
        .name = the_name, .signature = "(n),(),(m)->(n)",                         \
        .doc = SINUSOIDAL_DOC(order, example), .nin = 3, .nout = 1, .n_loop = 3,  \
        .check = check_sinusoidal,                                                \
        .loop = {add_sinusoidal_loop, add_sinusoidal_loop, add_sinusoidal_loop},  \
        .data = {&sinusoidals[layout][REAL_F16], &sinusoidals[layout][REAL_F32],  \
                 &sinusoidals[layout][REAL_F64]},                                 \
        .types = SINUSOIDAL_TYPES, .n_bfloat16 = 1,                               \
        .bfloat16_data = {&sinusoidals[layout][REAL_BF16]},                       \
        .bfloat16_types = {{NPY_BFLOAT16, NPY_DOUBLE, NPY_DOUBLE, NPY_BFLOAT16}}, \
    }

/* NumPy keeps pointers into this table: it must live as long as the process.
 * Exact types win whatever the order; for the others the first loop that they
 * can safely be cast to does. */
static gufunc_entry gufuncs[] = {
    {
        .name = "rope_half",
        .signature = "(n),(m),(m)->(n)",
        .doc = ROPE_DOC("(i, i + m)", ">>> from posenc import ufunc\n"
                                      ">>> ufunc.rope_half([1.0, 2.0], [0.0], [1.0])\n"
                                      "array([-2.,  1.])\n"),
        ROPE_LOOPS(half),
    },
    {
        .name = "rope_interleaved",
        .signature = "(n),(m),(m)->(n)",
        .doc = ROPE_DOC("(2i, 2i + 1)",
                        ">>> from posenc import ufunc\n"
                        ">>> ufunc.rope_interleaved([1.0, 2.0], [0.0], [1.0])\n"
                        "array([-2.,  1.])\n"),
        ROPE_LOOPS(interleaved),
    },
    {
        .name = "rope_complex",
        .signature = "(n),(m)->(n)",
        .doc =
            "Multiply the channel pairs (2i, 2i + 1) of x by a complex table.\n\n"
            "x (n), cis (m) -> (n), with 2 * m <= n; channels past 2 * m are copied.\n"
            "float32, float16 or bfloat16 x with complex64, float64 with "
            "complex128.\n\n"
            "See posenc.rope_complex. Su et al., 2021, eq. 12,\n"
            "https://arxiv.org/abs/2104.09864\n\n"
            "Examples\n--------\n"
            ">>> from posenc import ufunc\n"
            ">>> ufunc.rope_complex([1.0, 2.0], [1j])\n"
            "array([-2.,  1.])\n",
        .nin = 2,
        .nout = 1,
        .n_loop = 3,
        .check = check_complex,
        .loop = {rope_complex_loop, rope_complex_loop, rope_complex_loop},
        .data = {&interleaved[F32], &interleaved[F64], &interleaved[F16_F32]},
        .types = {NPY_FLOAT, NPY_CFLOAT, NPY_FLOAT,    //
                  NPY_DOUBLE, NPY_CDOUBLE, NPY_DOUBLE, //
                  NPY_HALF, NPY_CFLOAT, NPY_HALF},
        .n_bfloat16 = 1,
        .bfloat16_data = {&interleaved[BF16_F32]},
        .bfloat16_types = {{NPY_BFLOAT16, NPY_CFLOAT, NPY_BFLOAT16}},
    },
    {
        .name = "cos_sin",
        .signature = "(),(m)->(m),(m)",
        .doc =
            "Cosine and sine of position * inv_freq, the product taken as exact.\n\n"
            "position (), inv_freq (m) -> cos (m), sin (m); tokens and radians per\n"
            "token. The tables have the type of inv_freq, float32 or float64, unless\n"
            "dtype= or out= says other; float32 within 0.501 ulp, float64 within 1.\n\n"
            "See posenc.rope_table. Su et al., 2021, eq. 15,\n"
            "https://arxiv.org/abs/2104.09864\n\n"
            "Examples\n--------\n"
            ">>> from posenc import ufunc\n"
            ">>> ufunc.cos_sin(0.0, [1.0, 0.1])\n"
            "(array([1., 1.]), array([0., 0.]))\n",
        .nin = 2,
        .nout = 2,
        .n_loop = 3,
        .loop = {cos_sin_loop, cos_sin_loop, cos_sin_loop},
        .data = {&table_f32, &table_f64, &table_f64_f32},
        .types = {NPY_DOUBLE, NPY_FLOAT, NPY_FLOAT, NPY_FLOAT,    //
                  NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE, //
                  NPY_DOUBLE, NPY_DOUBLE, NPY_FLOAT, NPY_FLOAT},
    },
    {
        .name = "rope_decay",
        .signature = "(),(m)->()",
        .doc =
            "Twice the sum of the cosines of distance * inv_freq, taken as exact.\n\n"
            "distance (), inv_freq (m) -> logit (); tokens and radians per token. The\n"
            "result has the type of inv_freq, float32 or float64, unless dtype= says\n"
            "other. It is within m * 2**-48 of the true value, then rounded.\n\n"
            "See posenc.rope_decay. Su et al., 2021, section 3.4.3,\n"
            "https://arxiv.org/abs/2104.09864\n\n"
            "Examples\n--------\n"
            ">>> from posenc import ufunc\n"
            ">>> ufunc.rope_decay([0.0, 1.0], [1.0, 0.1]).round(3)\n"
            "array([4.   , 3.071])\n",
        .nin = 2,
        .nout = 1,
        .n_loop = 3,
        .apart = true,
        .loop = {rope_decay_loop, rope_decay_loop, rope_decay_loop},
        .data = {&table_f32, &table_f64, &table_f64_f32},
        .types = {NPY_DOUBLE, NPY_FLOAT, NPY_FLOAT,   //
                  NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE, //
                  NPY_DOUBLE, NPY_DOUBLE, NPY_FLOAT},
    },
    SINUSOIDAL_ENTRY("add_sinusoidal_interleaved", SINUSOIDAL_INTERLEAVED, "by turns",
                     ">>> ufunc.add_sinusoidal_interleaved(np.zeros(5), "
                     "0, [1.0, 0.1])\n"
                     "array([0., 1., 0., 1., 0.])\n"),
    SINUSOIDAL_ENTRY("add_sinusoidal_concat", SINUSOIDAL_CONCAT, "one after the other",
                     ">>> ufunc.add_sinusoidal_concat("
                     "np.zeros(5), 0, [1.0, 0.1])\n"
                     "array([0., 0., 1., 1., 0.])\n"),
    SINUSOIDAL_ENTRY("add_sinusoidal_concat_flipped", SINUSOIDAL_CONCAT_FLIPPED,
                     "cosines first",
                     ">>> ufunc.add_sinusoidal_concat_flipped("
                     "np.zeros(5), 0, [1.0, 0.1])\n"
                     "array([1., 1., 0., 0., 0.])\n"),
    {
        .name = "cope_gates",
        .doc = "Gates of contextual positions: 1 / (1 + exp(-logits)).\n\n"
               "logits () -> gates (); float32 and float64 within 2 ulp, and float16\n"
               "and bfloat16, computed in float32 and rounded once.\n\n"
               "See posenc.cope_gates. Golovneva et al., 2024, eq. 3,\n"
               "https://arxiv.org/abs/2405.18719\n\n"
               "Examples\n--------\n"
               ">>> from posenc import ufunc\n"
               ">>> ufunc.cope_gates([0.0, float('-inf')])\n"
               "array([0.5, 0. ])\n",
        .nin = 1,
        .nout = 1,
        .n_loop = 3,
        .loop = {cope_gates_loop, cope_gates_loop, cope_gates_loop},
        .data = {&cope_variants[F32], &cope_variants[F64], &cope_variants[F16]},
        .types = {NPY_FLOAT, NPY_FLOAT, NPY_DOUBLE, NPY_DOUBLE, NPY_HALF, NPY_HALF},
        .n_bfloat16 = 1,
        .bfloat16_data = {&cope_variants[BF16]},
        .bfloat16_types = {{NPY_BFLOAT16, NPY_BFLOAT16}},
    },
    {
        .name = "cope_positions",
        .signature = "(s),()->(s)",
        .doc = "Contextual positions: sums of gates from the last key leftwards.\n\n"
               "gates (s), n_position () -> positions (s), at most n_position - 1;\n"
               "of the type of gates, summed in float64 and rounded once.\n\n"
               "See posenc.cope_positions. Golovneva et al., 2024, eq. 4,\n"
               "https://arxiv.org/abs/2405.18719\n\n"
               "Examples\n--------\n"
               ">>> from posenc import ufunc\n"
               ">>> ufunc.cope_positions([0.5, 0.5, 1.0], 2)\n"
               "array([1., 1., 1.])\n",
        .nin = 2,
        .nout = 1,
        .n_loop = 3,
        .loop = {cope_positions_loop, cope_positions_loop, cope_positions_loop},
        .data = {&cope_variants[F32], &cope_variants[F64], &cope_variants[F16]},
        .types = {NPY_FLOAT, NPY_DOUBLE, NPY_FLOAT,   //
                  NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE, //
                  NPY_HALF, NPY_DOUBLE, NPY_HALF},
        .n_bfloat16 = 1,
        .bfloat16_data = {&cope_variants[BF16]},
        .bfloat16_types = {{NPY_BFLOAT16, NPY_DOUBLE, NPY_BFLOAT16}},
    },
    {
        .name = "cope_interpolate",
        .signature = "(p),(s)->(s)",
        .doc = "The rows of z between their entries, at positions.\n\n"
               "z (p), positions (s) -> bias (s), (1 - w) z[floor] + w z[ceil];\n"
               "positions count as at least 0 and at most p - 1. float32 or float64;\n"
               "or float16 or bfloat16 z with positions of its type or of float32.\n\n"
               "See posenc.cope_interpolate. Golovneva et al., 2024, eq. 5,\n"
               "https://arxiv.org/abs/2405.18719\n\n"
               "Examples\n--------\n"
               ">>> from posenc import ufunc\n"
               ">>> ufunc.cope_interpolate([0.0, 8.0], [0.25, 1.0, 7.0])\n"
               "array([2., 8., 8.])\n",
        .check = check_interpolate,
        COPE_LOOPS(cope_interpolate_loop),
    },
    {
        .name = "cope_bias",
        .signature = "(s),(p)->(s)",
        .doc =
            "Contextual position bias of each key: the three steps in one pass.\n\n"
            "logits (s), z (p) -> bias (s): gates are sigmoid(logits), positions\n"
            "their sums from the last key leftwards, at most p - 1, and the bias is\n"
            "z there. Logits of -inf hide a key: its gate and its bias are 0.\n"
            "float32 or float64; or float16 or bfloat16 logits with z of their type\n"
            "or of float32: computed in float32, rounded once.\n\n"
            "See posenc.cope_bias. Golovneva et al., 2024, eqs. 3-5,\n"
            "https://arxiv.org/abs/2405.18719\n\n"
            "Examples\n--------\n"
            ">>> from posenc import ufunc\n"
            ">>> ufunc.cope_bias([0.0, 0.0, float('-inf')], [0.0, 10.0])\n"
            "array([10.,  5.,  0.])\n",
        .check = check_bias,
        COPE_LOOPS(cope_bias_loop),
    },
    {
        .name = "t5_bucket",
        .doc =
            "The bucket of each offset key - query, for T5's relative bias.\n\n"
            "relative_position (), num_buckets (), max_distance (), bidirectional ()\n"
            "-> bucket (), int64: as transformers computes it in float32. -1 unless\n"
            "there are 2 buckets for a direction and max_distance exceeds half of\n"
            "them.\n\n"
            "See posenc.t5_bucket. Raffel et al., 2020, section 2.1,\n"
            "https://arxiv.org/abs/1910.10683\n\n"
            "Examples\n--------\n"
            ">>> from posenc import ufunc\n"
            ">>> ufunc.t5_bucket([-20, -1, 0, 1, 20], 32, 128, True)\n"
            "array([10,  1,  0, 17, 26])\n",
        .nin = 4,
        .nout = 1,
        .n_loop = 1,
        .loop = {t5_bucket_loop},
        .data = {NULL},
        .types = {NPY_INT64, NPY_INT64, NPY_INT64, NPY_BOOL, NPY_INT64},
    },
    {
        .name = "cope_attention",
        .signature = "(t,d),(s,d),(s,d),(d,p)->(t,d)",
        .doc =
            "Causal attention with contextual positions, scaled by 1 / sqrt(d).\n\n"
            "q (t, d), k (s, d), v (s, d), position_embedding (d, p) -> (t, d); the\n"
            "last query sees the last key. All of one type, float32, float64, float16\n"
            "or bfloat16; those of 16 bits are computed in float32, rounded once.\n\n"
            "See posenc.cope_attention. Golovneva et al., 2024, eq. 3 to 6,\n"
            "https://arxiv.org/abs/2405.18719\n\n"
            "Examples\n--------\n"
            ">>> import numpy as np\n"
            ">>> from posenc import ufunc\n"
            ">>> q, k, v = np.ones((3, 2, 4)), np.ones((3, 2, 4)), np.ones((3, 2, 4))\n"
            ">>> ufunc.cope_attention(q, k, v, np.zeros((4, 8))).shape\n"
            "(3, 2, 4)\n",
        .nin = 4,
        .nout = 1,
        .n_loop = 3,
        .apart = true,
        .check = check_attention,
        .loop = {cope_attention_loop, cope_attention_loop, cope_attention_loop},
        .data = {&attention_types[REAL_F32], &attention_types[REAL_F64],
                 &attention_types[REAL_F16]},
        .types = {NPY_FLOAT, NPY_FLOAT, NPY_FLOAT, NPY_FLOAT, NPY_FLOAT,      //
                  NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE, NPY_DOUBLE, //
                  NPY_HALF, NPY_HALF, NPY_HALF, NPY_HALF, NPY_HALF},
        .n_bfloat16 = 1,
        .bfloat16_data = {&attention_types[REAL_BF16]},
        .bfloat16_types = {{NPY_BFLOAT16, NPY_BFLOAT16, NPY_BFLOAT16, NPY_BFLOAT16,
                            NPY_BFLOAT16}},
    },
};

/* NumPy's flags of results, but for the one that says that loops are elementwise: if
 * the result is an operand as well, NumPy has it made elsewhere first. */
#define RESULT_APART                                                 \
    (NPY_ITER_WRITEONLY | NPY_ITER_UPDATEIFCOPY | NPY_ITER_ALIGNED | \
     NPY_ITER_ALLOCATE | NPY_ITER_NO_BROADCAST | NPY_ITER_NO_SUBTYPE)

static int
add_bfloat16_loops(PyUFuncObject *ufunc, const gufunc_entry *entry)
{
    int number = find_bfloat16();
    for (int i = 0; number >= 0 && i < entry->n_bfloat16; i++) {
        int types[MAX_ARGUMENT];
        for (int j = 0; j < entry->nin + entry->nout; j++) {
            int type = entry->bfloat16_types[i][j];
            types[j] = type == NPY_BFLOAT16 ? number : type;
        }
        if (PyUFunc_RegisterLoopForType(ufunc, number, entry->loop[0], types,
                                        entry->bfloat16_data[i]) < 0) {
            return -1;
        }
    }
    return number < 0 ? -1 : 0;
}

/* All loops are there before anybody can call it: NumPy remembers what a call found. */
static int
add_gufunc(PyObject *module, gufunc_entry *entry)
{
    /* Without a signature it is an ordinary ufunc. */
    PyObject *ufunc = PyUFunc_FromFuncAndDataAndSignature(
        entry->loop, entry->data, entry->types, entry->n_loop, entry->nin, entry->nout,
        PyUFunc_None, entry->name, entry->doc, 0, entry->signature);
    if (ufunc == NULL) {
        return -1;
    }
    ((PyUFuncObject *)ufunc)->process_core_dims_func = entry->check;
    if (entry->apart) {
        ((PyUFuncObject *)ufunc)->op_flags[entry->nin] = RESULT_APART;
    }
    int status = add_bfloat16_loops((PyUFuncObject *)ufunc, entry);
    if (status == 0) {
        status = PyModule_AddObjectRef(module, entry->name, ufunc);
    }
    Py_DECREF(ufunc);
    return status;
}

int
add_gufuncs(PyObject *module)
{
    for (size_t i = 0; i < sizeof(gufuncs) / sizeof(gufuncs[0]); i++) {
        if (add_gufunc(module, &gufuncs[i]) < 0) {
            return -1;
        }
    }
    return 0;
}
