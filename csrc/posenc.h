/* The contract of every kernel.  Pure C: no Python, no NumPy, no threads.
 *
 * Kernels work on strips: runs of rows with one step per operand.  They do not
 * allocate, keep no state and cannot fail; sizes and overlap are the caller's
 * to check.  All steps are in bytes and may be zero or negative.  Each result
 * is the same bit for bit on every instruction set: products, sums and fused
 * multiply-adds stand where they are written and nowhere else.  Float tables alone may
 * be computed in several ways, each proven to round to the same float.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_H
#define POSENC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Types of elements; the last two have 16 bits, IEEE half and bfloat16. */
enum { REAL_F32, REAL_F64, REAL_F16, REAL_BF16, N_REAL };

/* How the channels of a row are paired: (i, i + n_pair), as GPT-NeoX and Llama
 * do, or (2i, 2i + 1), as GPT-J does. */
enum { LAYOUT_HALF, LAYOUT_INTERLEAVED, N_LAYOUT };

/* Where results of 16 bits are rounded: at the end only, or also each product, as
 * PyTorch's eager mode does. */
enum { ROUND_ONCE, ROUND_EAGER, N_ROUNDING };

typedef struct {
    size_t n_row;    /* rows in the strip                                     */
    size_t head_dim; /* channels per row                                      */
    size_t first;    /* the first rotated channel                             */
    size_t n_pair;   /* rotated pairs; first + 2 * n_pair <= head_dim         */
    int table_type;  /* of cos and sin: the type of x, or REAL_F32            */
    bool adjoint;    /* rotate by the negative angles                         */
    bool stream;     /* write past the caches where that can be: a hint; the
                        caller ends with finish_stores                        */
    ptrdiff_t x_row, cos_row, sin_row, out_row;           /* row to row      */
    ptrdiff_t x_channel, cos_pair, sin_pair, out_channel; /* within a row    */
    ptrdiff_t x_ahead, out_ahead; /* to the rows of the next strip, or 0: a hint */
} rope_strip;

/* Rotate the channel pairs of each row by the angles of its table row.
 *
 *   x     (n_row, head_dim)  queries or keys
 *   cos   (n_row, n_pair)    cosines of the angles; cos_row 0 shares one row
 *   sin   (n_row, n_pair)    sines of the angles; sin_row likewise
 *   out   (n_row, head_dim)  may be x itself with x's own steps; else disjoint
 *
 * For a pair (a, b):  out_a = a cos - b sin,  out_b = b cos + a sin, two
 * products and one sum, each rounded once.  Channels past 2 * n_pair are copied.
 * A NaN in the rotated channels becomes the quiet NaN 0x7fc00000 (0x7ff8 << 48).
 *
 * A complex table is one whose cos_pair and sin_pair are two reals and whose
 * sin starts one real after cos; with the interleaved layout this is the
 * complex product.
 *
 * Su et al., "RoFormer", 2021, eq. 34.
 */
typedef void rope_kernel(const rope_strip *strip, const char *x, const char *cos,
                         const char *sin, char *out);

typedef struct {
    size_t n_row;        /* positions in the strip                           */
    size_t n_pair;       /* frequencies per position                         */
    double factor;       /* multiplies cosine and sine before the rounding   */
    bool float32_angles; /* the recipe of transformers, see below            */
    int inv_freq_type;   /* REAL_F32 or REAL_F64                             */
    int out_type;        /* REAL_F32 or REAL_F64                             */
    ptrdiff_t position_row, inv_freq_row, cos_row, sin_row;
    ptrdiff_t inv_freq_pair, cos_pair, sin_pair;
    void *kept; /* NULL, or memory that strips of the same frequencies, factor and types
                   hand on, and so take less time: kept_size bytes for every KEPT_PAIRS
                   pairs, the first two bytes of each 0 at first; aligned to 64       */
} cos_sin_strip;

enum { KEPT_PAIRS = 64 };

/* Tabulate factor * cos and factor * sin of position * inv_freq.
 *
 *   position  (n_row,)         double, tokens; whole or not, of either sign
 *   inv_freq  (n_row, n_pair)  radians per token, taken as exact
 *   cos, sin  (n_row, n_pair)  disjoint from the inputs and each other
 *
 * Exact angles: the product is kept exact.  A double entry is within 1 ulp of
 * the true value, a float entry is that double rounded once more: within
 * 0.500001 ulp.  This holds for every finite double position and inv_freq, also
 * where the value is next to zero.  An entry depends on its own position,
 * inv_freq and factor only.  An infinite or NaN input gives a quiet NaN.
 *
 * float32_angles: the product is rounded to float, then its cosine and sine to
 * float, then their products with (float)factor: what transformers computes.
 */
typedef void cos_sin_kernel(const cos_sin_strip *strip, const char *position,
                            const char *inv_freq, char *cos, char *sin);

typedef struct {
    size_t n_row;      /* distances in the strip   */
    size_t n_pair;     /* frequencies per distance */
    int inv_freq_type; /* REAL_F32 or REAL_F64     */
    int out_type;      /* REAL_F32 or REAL_F64     */
    ptrdiff_t distance_row, inv_freq_row, out_row, inv_freq_pair;
} decay_strip;

/* Sum the cosines of distance * inv_freq, twice: the product of a query of ones and a
 * key of ones, as rotations leave it.
 *
 *   distance  (n_row,)         double, tokens; whole or not, of either sign
 *   inv_freq  (n_row, n_pair)  radians per token, taken as exact
 *   out       (n_row,)         logits; may be distance itself with its own steps; else
 *                              disjoint
 *
 * The product is kept exact.  A double result is within n_pair * 2^-48 of the true
 * value for every finite distance, a float result is that double rounded once more:
 * where cosines cancel, the bound is absolute.  It depends on its own distance, up to
 * its sign, and inv_freq only; 0 without pairs.  An infinite or NaN input gives a quiet
 * NaN.
 *
 * Su et al., "RoFormer", 2021, section 3.4.3.
 */
typedef void rope_decay_kernel(const decay_strip *strip, const char *distance,
                               const char *inv_freq, char *out);

typedef struct {
    size_t n_row;      /* rows in the strip: queries                             */
    size_t n_key;      /* keys per row                                           */
    size_t n_position; /* entries of a row of z, at least 1                      */
    int z_type;        /* of z: the type of the data, or REAL_F32                */
    int key_type;      /* of positions: likewise                                 */
    bool stream;       /* as for rotations                                       */
    ptrdiff_t n_visible, visible_row; /* keys that the first row sees, and more
                                         from row to row; kept within 0, n_key  */
    ptrdiff_t key_row, z_row, mask_row, out_row;  /* row to row                 */
    ptrdiff_t key, z_position, mask_key, out_key; /* within a row               */
    ptrdiff_t dlogit_row, dz_row;                 /* backward: row to row       */
} cope_strip;

/* The contextual bias of each key: gates, positions and interpolation in one pass.
 *
 *   logits  (n_row, n_key)       query by key; -inf hides a key
 *   z       (n_row, n_position)  query by position embedding
 *   mask    (n_row, n_key)       bytes, 0 hides a key; may be NULL
 *   out     (n_row, n_key)       may be logits itself with its own steps; else
 *                                disjoint
 *
 * Gates are sigmoid(logit), 0 for hidden keys; the position p of a key is the sum of
 * the gates from the last key down to it, at most n_position - 1; the bias is
 * (1 - w) z[floor p] + w z[ceil p] with w = p - floor p, and 0 for hidden keys.  What
 * lies at or left of a NaN gate is NaN but for hidden keys, as the quiet NaN.
 *
 * Gates of float and 16-bit logits enter the sum with more bits than a float has, as
 * multiples of 2^-45 (if n_position <= 96; of twice that for each doubling), in double:
 * their sums are exact, so that their order does not matter.  Gates of double are
 * summed from the right.
 *
 * Golovneva et al., "Contextual Position Encoding", 2024, eqs. 3-5 and appendix B.
 */
typedef void cope_bias_kernel(const cope_strip *strip, const char *logits,
                              const char *z, const char *mask, char *out);

/* Its gradient: dlogits (n_row, n_key) and dz (n_row, n_position), floats (doubles for
 * doubles) side by side in each row, disjoint from all the rest; grad like out above.
 * At whole and at saturated positions nothing flows into the position, as in the
 * listing, where the floor and the ceiling are one.
 */
typedef void cope_bias_backward_kernel(const cope_strip *strip, const char *logits,
                                       const char *z, const char *mask,
                                       const char *grad, char *dlogits, char *dz);

/* sigmoid(x) of n numbers, within 2 ulp (16 bits: rounded once); x may be out. */
typedef void cope_gates_kernel(size_t n, const char *x, ptrdiff_t x_step, char *out,
                               ptrdiff_t out_step);

/* Positions (n_row, n_key) from any gates: their sums from the right, in double, at
 * most n_position - 1, which are doubles (n_row,) that z_row steps.
 */
typedef void cope_positions_kernel(const cope_strip *strip, const char *gates,
                                   const char *n_position, char *out);

/* z (n_row, n_position) between its entries at positions (n_row, n_key), which count as
 * at least 0 and at most n_position - 1.
 */
typedef void cope_interpolate_kernel(const cope_strip *strip, const char *z,
                                     const char *positions, char *out);
/* One attention with contextual positions: what it reads and where that is.  Steps are
 * in bytes; those of an operand that is shared may be zero. */
typedef struct {
    size_t n_query, n_key, n_channel, n_position; /* n_position at least 1 */
    int type;     /* of q, k, v, gate_key, embedding and out */
    bool causal;  /* query i sees the keys j <= i + n_key - n_query */
    double scale; /* of logits and gates */
    double position_scale;
    ptrdiff_t q_row, q_channel, k_row, k_channel, v_row, v_channel;
    ptrdiff_t gate_row, gate_channel, embedding_channel, embedding_position;
    ptrdiff_t mask_row, mask_key, out_row, out_channel;
} cope_attention_shape;

typedef struct {
    const char *q, *k, *v;
    const char *gate_key; /* NULL: k */
    const char *embedding;
    const char *mask; /* bytes, 0 hides; NULL: nothing hidden */
    char *out;
    char *statistics; /* NULL, or two reals per query: a whole number m and the sum over
                         its keys of 2^(logit / log(2) - m); the sum is 0 if it sees
                         none */
} cope_attention_operands;

/* Attend with contextual positions: the queries `first` and on, as many as a block has.
 *
 *   q, k, v     (n_query or n_key, n_channel)
 *   gate_key    (n_key, n_channel)
 *   embedding   (n_channel, n_position)
 *   mask        (n_query, n_key)
 *   out         (n_query, n_channel)  disjoint from all others
 *   scratch     scratch_size bytes, aligned to 64
 *
 * With g_ij = sigmoid(scale q_i . gate_key_j), 0 where j is hidden from i, and
 * p_ij the lesser of n_position - 1 and the sum of g_it over t >= j:
 *   logit_ij = scale q_i . k_j + z_i[p_ij],  z_i[n] = position_scale q_i .
 * embedding[n], linear between whole n; out_i is the sum of softmax(logit_i)_j v_j over
 * what i sees, 0 if that is nothing.  16 bits are computed in float and rounded once.
 *
 * A row's result is a function of its own query and the keys it sees, but for the last
 * bits, which the queries of its block have a say in; products may be fused, so that
 * instruction sets differ there too.  The running sum is kept as a
 * whole number and a fraction: its error does not grow with it.
 *
 * Golovneva et al., "Contextual Position Encoding", 2024, eq. 3 to 6.
 */
typedef void cope_attention_kernel(const cope_attention_shape *shape,
                                   const cope_attention_operands *operands,
                                   size_t first, void *scratch);

/* Where the derivatives go, and where the heads that share keys start.  Those of
 * queries and embedding are per head, all of them contiguous and of reals. */
typedef struct {
    size_t n_head;         /* query heads on the same keys                           */
    size_t share, n_share; /* of all blocks of queries of these heads every n_share-th,
                              from number `share` on                                 */
    ptrdiff_t q_head, embedding_head, mask_head, out_head;
    ptrdiff_t grad_head, grad_row, grad_channel;
    const char *grad_out;
    void *dq, *dk, *dv, *dgate, *dembedding;
} cope_attention_gradients;

/* The derivatives of a sum of products with grad_out, for a share of the queries.
 *
 *   operands     as attended, of the first head; out and statistics are results
 *   grad_out     (n_head, n_query, n_channel)     of the type of out
 *
 *   dq           (n_head, n_query, n_channel)     written where the share's rows see
 *
 *   dk, dv       (n_key, n_channel)               added to
 *
 *   dgate        (n_key, n_channel)               added to; NULL if gate_key is
 *
 *   dembedding   (n_head, n_channel, n_position)  added to
 *
 *   scratch      backward_scratch_size bytes, aligned to 64: linear in the sizes
 *
 * The derivative of a logit in its position is z[n + 1] - z[n] between whole n, and 0
 * at whole positions and at the last.  Sums go by blocks in the order of rows, so that
 * the result is a function of operands and share alone.
 */
typedef void cope_attention_backward_kernel(const cope_attention_shape *shape,
                                            const cope_attention_operands *operands,
                                            const cope_attention_gradients *gradients,
                                            void *scratch);

/* Where the sines and cosines of a row go: by turns, sine first; or all of one and then
 * all of the other. */
enum {
    SINUSOIDAL_INTERLEAVED,
    SINUSOIDAL_CONCAT,
    SINUSOIDAL_CONCAT_FLIPPED,
    N_SINUSOIDAL
};

typedef struct {
    size_t n_row, n_channel;
    double scale;   /* rounded to what is computed in: float for 16 bits          */
    int table_type; /* of table: the type of x; for 16 bits also REAL_F32         */
    bool stream;    /* as for rotations                                           */
    ptrdiff_t x_row, table_row, mask_row, out_row;   /* row to row                */
    ptrdiff_t x_channel, table_channel, out_channel; /* within a row              */
} add_strip;

/* Scale rows and add those of a table of positions.
 *
 *   x      (n_row, n_channel)  data
 *   table  (n_row, n_channel)  what is added
 *   mask   (n_row,)            bytes; rows of others than 0 become zeros; or NULL
 *   out    (n_row, n_channel)  may be x itself with x's own steps; else disjoint
 *
 * out = x scale + table, a product and a sum, each rounded; 16 bits are computed in
 * float and rounded once.  A NaN becomes the quiet NaN.
 *
 * Gehring et al., "Convolutional Sequence to Sequence Learning", 2017, section 3.1.
 */
typedef void add_rows_kernel(const add_strip *strip, const char *x, const char *table,
                             const char *mask, char *out);

typedef struct {
    size_t n_row, n_channel;
    size_t n_pair;     /* 2 * n_pair <= n_channel             */
    int layout;        /* SINUSOIDAL_INTERLEAVED, ...         */
    int inv_freq_type; /* REAL_F32 or REAL_F64                */
    int table_type;    /* REAL_F64 for doubles, else REAL_F32 */
    ptrdiff_t x_row, position_row, inv_freq_row, out_row;
    ptrdiff_t x_channel, inv_freq_pair, out_channel;
} sinusoidal_strip;

/* Add sines and cosines of position * inv_freq to rows of data.
 *
 *   x         (n_row, n_channel)  data
 *   position  (n_row,)            double, as for cos_sin
 *   inv_freq  (n_row, n_pair)     likewise
 *   out       (n_row, n_channel)  as of add_rows
 *
 * The entries are those of cos_sin and are added as rows of a table are; channels past
 * 2 * n_pair get 0.
 *
 * Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
 */
typedef void add_sinusoidal_kernel(const sinusoidal_strip *strip, const char *x,
                                   const char *position, const char *inv_freq,
                                   char *out);

/* What makes a bucket of an offset: all buckets, of both directions if bidirectional.
 */
typedef struct {
    int64_t n_bucket, max_distance;
    bool bidirectional;
} t5_buckets;

/* The bucket of each of n offsets key - query, int64_t as the buckets are.
 *
 * Offsets to keys after the query have half of the buckets for themselves, or count as
 * 0 if not bidirectional.  Of the n_bucket for a direction the first half is one for
 * each distance, the rest goes by the logarithm up to max_distance, in float as
 * transformers computes it.  -1 everywhere unless n_bucket >= 2 for a direction and
 * max_distance > n_bucket / 2.
 *
 * Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
 * Transformer", 2020, section 2.1.
 */
typedef void t5_bucket_kernel(const t5_buckets *buckets, size_t n,
                              const char *relative_position, ptrdiff_t position_step,
                              char *out, ptrdiff_t out_step);

typedef struct {
    t5_buckets buckets;                   /* such as t5_bucket knows           */
    size_t n_head;                        /* numbers for each bucket           */
    size_t element_size;                  /* bytes: 2, 4 or 8                  */
    ptrdiff_t weight_bucket, weight_head; /* within the weight                */
    ptrdiff_t value_head;                 /* row to row of the values          */
} t5_table;

/* The number that each head has for each of n offsets: from weight (n_bucket, n_head)
 * of any type of element_size to values (n_head, n), disjoint.  Offsets are int64_t,
 * side by side as the values of a head are. */
typedef void t5_values_kernel(const t5_table *table, size_t n, const char *offsets,
                              const char *weight, char *values);

typedef struct {
    size_t n_row;        /* rows in the strip: queries                        */
    size_t n_key;        /* keys per row                                      */
    size_t element_size; /* bytes                                             */
    bool stream;         /* as for rotations                                  */
    ptrdiff_t value_row, logit_row, out_row; /* row to row                    */
    ptrdiff_t logit_key, out_key;            /* within a row; values are side
                                                by side                       */
} bias_strip;

/* Write to each row its n_key values: out (n_row, n_key) of any type of element_size.
 * For consecutive positions value_row is minus one value, so that each row is the one
 * before it, moved on by a key. */
typedef void bias_spread_kernel(const bias_strip *strip, const char *values, char *out);

/* Add to logits (n_row, n_key) of a type the values, which are floats (doubles for
 * doubles): one sum, rounded once.  out may be logits itself with its own steps; else
 * disjoint.  A NaN is the quiet NaN. */
typedef void bias_add_kernel(const bias_strip *strip, const char *values,
                             const char *logits, char *out);

/* The gradient of values: add grad (n_row, n_key), which has the steps of logits, to
 * sums, doubles that have those of values; row by row. */
typedef void bias_collect_kernel(const bias_strip *strip, const char *grad, char *sums);

/* The kernels of one instruction set. */
typedef struct {
    const char *simd;
    rope_kernel *rope[N_LAYOUT][N_ROUNDING][N_REAL];
    cos_sin_kernel *cos_sin;
    size_t kept_size; /* of cos_sin */
    rope_decay_kernel *rope_decay;
    add_rows_kernel *add_rows[N_REAL];
    add_sinusoidal_kernel *add_sinusoidal[N_REAL];
    cope_gates_kernel *cope_gates[N_REAL];
    cope_positions_kernel *cope_positions[N_REAL];
    cope_interpolate_kernel *cope_interpolate[N_REAL];
    cope_bias_kernel *cope_bias[N_REAL];
    cope_bias_backward_kernel *cope_bias_backward[N_REAL];
    struct {
        size_t block; /* queries */
        size_t (*scratch_size)(const cope_attention_shape *shape);
        cope_attention_kernel *run;
        size_t (*backward_scratch_size)(const cope_attention_shape *shape);
        cope_attention_backward_kernel *backward;
    } cope_attention[2]; /* for type float and those of 16 bits, and for double */
    t5_bucket_kernel *t5_bucket;
    t5_values_kernel *t5_values;
    bias_spread_kernel *bias_spread;
    bias_add_kernel *bias_add[N_REAL];
    bias_collect_kernel *bias_collect[N_REAL];
    void (*finish_stores)(void); /* make streamed results visible to other threads */
} kernel_table;

#endif
