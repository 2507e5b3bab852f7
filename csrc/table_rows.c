/* Tiles of rows and the rows that share their positions: the entries of a tile are
 * made or looked up once, and stay near while all who share them pass.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include "table_rows.h"

#include <string.h>

#include "attention.h"
#include "dispatch.h"
#include "parallel.h"
#include "tasks.h"

enum {
    TILE = 64,        /* rows whose entries are made at once                       */
    GROUP = 4,        /* rows with the same entries that go side by side           */
    CHUNK_PAIRS = 512 /* frequencies at once: with what is kept of them 0.5 MB      */
};

typedef struct {
    row_sum *sum;
    size_t n_chunk, n_tile, n_group;
    size_t tile_rows, group_row; /* at most: rows of a tile, groups of an axis    */
    size_t table_size;           /* of a part's scratch; the rest is for cos_sin */
    scratch_space scratch;
} sum_job;

/* The rows of a tile. */
typedef struct {
    size_t n_row, chunk;
    char *at[TILE][NEST_N_OPERAND];
    double position[TILE];
    const char *table[TILE];
    char *memory; /* of a sinusoidal table, and then cos_sin's */
    void *kept;
} row_tile;

void
row_sum_begin(row_sum *sum, char *const base[NEST_N_OPERAND])
{
    nest_begin(&sum->moved, base);
    nest_begin(&sum->shared, base);
}

void
row_sum_add_axis(row_sum *sum, size_t size, const ptrdiff_t step[NEST_N_OPERAND])
{
    nest_add_axis(step[ADD_POSITION] == 0 ? &sum->shared : &sum->moved, size, step);
}

void
row_sum_choose_stores(row_sum *sum, bool in_place, size_t n_byte)
{
    sum->stream = stores_pass_caches(in_place, n_byte);
}

/* Go `row` rows of a nest from where `at` is. */
static void
go_to_row(const nest *loops, size_t row, char *at[NEST_N_OPERAND])
{
    for (int axis = loops->n_axis - 1; axis >= 0; axis--) {
        const ptrdiff_t index = (ptrdiff_t)(row % loops->size[axis]);
        row /= loops->size[axis];
        for (int i = 0; i < NEST_N_OPERAND; i++) {
            at[i] += index * loops->step[axis][i];
        }
    }
}

/* The steps of a nest's innermost axis; none if there is no axis. */
static const ptrdiff_t *
inner_step(const nest *loops)
{
    static const ptrdiff_t no_step[NEST_N_OPERAND];
    return loops->n_axis > 0 ? loops->step[loops->n_axis - 1] : no_step;
}

static size_t
inner_size(const nest *loops)
{
    return loops->n_axis > 0 ? loops->size[loops->n_axis - 1] : 1;
}

static size_t
chunk_pairs(const row_sum *sum, size_t chunk)
{
    const size_t left = sum->n_pair - chunk * CHUNK_PAIRS;
    return left < CHUNK_PAIRS ? left : CHUNK_PAIRS;
}

/* Bytes of an entry of a sinusoidal table. */
static ptrdiff_t
entry_size(const row_sum *sum)
{
    return sum->table_type == REAL_F64 ? 8 : 4;
}

/* Tabulate the sines and cosines of a tile. */
static void
make_table(const row_sum *sum, row_tile *tile)
{
    const size_t n_pair = chunk_pairs(sum, tile->chunk);
    const ptrdiff_t real = entry_size(sum), row = (ptrdiff_t)(2 * n_pair) * real;
    const ptrdiff_t first = (ptrdiff_t)(tile->chunk * CHUNK_PAIRS);
    char *second = tile->memory + (sum->interleaved ? real : row / 2);
    const cos_sin_strip strip = {
        .n_row = tile->n_row,
        .n_pair = n_pair,
        .factor = 1.0,
        .inv_freq_type = REAL_F64,
        .out_type = sum->table_type == REAL_F64 ? REAL_F64 : REAL_F32,
        .position_row = sizeof(double),
        .cos_row = row,
        .sin_row = row,
        .inv_freq_pair = sum->inv_freq_pair,
        .cos_pair = sum->interleaved ? 2 * real : real,
        .sin_pair = sum->interleaved ? 2 * real : real,
        .kept = tile->kept,
    };
    kernels->cos_sin(&strip, (const char *)tile->position,
                     sum->inv_freq + first * sum->inv_freq_pair,
                     sum->cos_first ? tile->memory : second,
                     sum->cos_first ? second : tile->memory);
    for (size_t i = 0; i < tile->n_row; i++) {
        tile->table[i] = tile->memory + (ptrdiff_t)i * row;
    }
}

static void
begin_chunk(const sum_job *job, row_tile *tile, size_t chunk)
{
    tile->chunk = chunk;
    tile->kept = NULL;
    if (job->sum->table == NULL && job->tile_rows == TILE) {
        tile->kept = tile->memory + job->table_size;
        for (size_t i = 0; i < CHUNK_PAIRS / KEPT_PAIRS; i++) {
            memset((char *)tile->kept + i * kernels->kept_size, 0, 2);
        }
    }
}

static void
begin_tile(const sum_job *job, row_tile *tile, size_t number)
{
    const row_sum *sum = job->sum;
    const size_t begin = number * job->tile_rows,
                 left = nest_n_row(&sum->moved) - begin;
    tile->n_row = left < job->tile_rows ? left : job->tile_rows;
    for (size_t i = 0; i < tile->n_row; i++) {
        char **at = tile->at[i];
        memcpy(at, sum->moved.base, sizeof(tile->at[i]));
        go_to_row(&sum->moved, begin + i, at);
        if (sum->table != NULL) {
            const int64_t position = *(const int64_t *)at[ADD_POSITION];
            tile->table[i] = sum->table + position * sum->table_row;
        } else {
            tile->position[i] = *(const double *)at[ADD_POSITION];
        }
    }
    if (sum->table == NULL) {
        make_table(sum, tile);
    }
}

/* Channels of a row that take entries side by side; all 0 if the tile's row has none.
 */
typedef struct {
    size_t n_channel;
    ptrdiff_t first, table_start;
    bool has_entries;
} segment;

/* Find the segments of a tile's rows; returns how many. */
static int
find_segments(const sum_job *job, const row_tile *tile, segment found[3])
{
    const row_sum *sum = job->sum;
    if (sum->table != NULL) {
        found[0] = (segment){sum->n_channel, 0, 0, true};
        return 1;
    }
    const size_t n_pair = chunk_pairs(sum, tile->chunk), done = 2 * sum->n_pair;
    const ptrdiff_t first = (ptrdiff_t)(tile->chunk * CHUNK_PAIRS);
    int n = 0;
    if (n_pair > 0 && sum->interleaved) {
        found[n++] = (segment){2 * n_pair, 2 * first, 0, true};
    } else if (n_pair > 0) {
        found[n++] = (segment){n_pair, first, 0, true};
        found[n++] = (segment){n_pair, first + (ptrdiff_t)sum->n_pair,
                               (ptrdiff_t)n_pair * entry_size(sum), true};
    }
    if (tile->chunk == job->n_chunk - 1 && sum->n_channel > done) {
        found[n++] = (segment){sum->n_channel - done, (ptrdiff_t)done, 0, false};
    }
    return n;
}

/* Add to segments of row i of a tile, and of the rows of a strip from there on. */
static void
add_segments(const row_sum *sum, const row_tile *tile, const segment *segments,
             int n_segment, add_strip strip, size_t i,
             const ptrdiff_t away[NEST_N_OPERAND])
{
    static const double zero;
    char *const *at = tile->at[i];
    const char *mask = sum->has_mask ? at[ADD_MASK] + away[ADD_MASK] : NULL;
    const add_strip whole = strip;
    for (int k = 0; k < n_segment; k++) {
        const segment *s = &segments[k];
        strip.n_channel = s->n_channel;
        strip.table_row = s->has_entries ? whole.table_row : 0;
        strip.table_channel = s->has_entries ? whole.table_channel : 0;
        kernels->add_rows[sum->type](
            &strip, at[ADD_X] + away[ADD_X] + s->first * sum->x_channel,
            s->has_entries ? tile->table[i] + s->table_start : (const char *)&zero,
            mask, at[ADD_OUT] + away[ADD_OUT] + s->first * sum->out_channel);
    }
}

/* Add a tile to a group of the rows that share its positions. */
static void
add_group(const sum_job *job, const row_tile *tile, size_t number)
{
    const row_sum *sum = job->sum;
    const nest *shared = &sum->shared, *moved = &sum->moved;
    const size_t size = inner_size(shared);
    const size_t begin = number % job->group_row * GROUP, left = size - begin;
    char *at[NEST_N_OPERAND];
    memcpy(at, shared->base, sizeof(at));
    go_to_row(shared, number / job->group_row * size + begin, at);
    ptrdiff_t away[NEST_N_OPERAND];
    for (int i = 0; i < NEST_N_OPERAND; i++) {
        away[i] = at[i] - shared->base[i];
    }
    /* Rows that share with nobody go together, if their entries do. */
    const bool at_once = size == 1 && moved->n_axis <= 1 && sum->table == NULL;
    const ptrdiff_t *step = inner_step(at_once ? moved : shared);
    const add_strip strip = {
        .n_row = at_once        ? tile->n_row
                 : left < GROUP ? left
                                : GROUP,
        .scale = sum->scale,
        .table_type = sum->table_type,
        .stream = sum->stream,
        .x_row = step[ADD_X],
        .table_row = at_once && tile->n_row > 1 ? tile->table[1] - tile->table[0] : 0,
        .mask_row = step[ADD_MASK],
        .out_row = step[ADD_OUT],
        .x_channel = sum->x_channel,
        .table_channel = sum->table == NULL ? entry_size(sum) : sum->table_channel,
        .out_channel = sum->out_channel,
    };
    segment segments[3];
    const int n_segment = find_segments(job, tile, segments);
    for (size_t i = 0; i < (at_once ? 1 : tile->n_row); i++) {
        add_segments(sum, tile, segments, n_segment, strip, i, away);
    }
}

static void
run_part(void *task, int part, int n_part)
{
    const sum_job *job = task;
    const size_t per_chunk = job->n_tile * job->n_group, n = per_chunk * job->n_chunk;
    const size_t begin = nest_cut(n, (size_t)part, (size_t)n_part);
    const size_t end = nest_cut(n, (size_t)part + 1, (size_t)n_part);
    row_tile tile;
    tile.memory = job->table_size > 0 ? scratch_of(&job->scratch, part) : NULL;
    for (size_t unit = begin; unit < end; unit++) {
        if (unit == begin || unit % per_chunk == 0) {
            begin_chunk(job, &tile, unit / per_chunk);
        }
        if (unit == begin || unit % job->n_group == 0) {
            begin_tile(job, &tile, unit % per_chunk / job->n_group);
        }
        add_group(job, &tile, unit % job->n_group);
    }
    if (job->sum->stream && begin < end) {
        kernels->finish_stores();
    }
}

/* Bytes of a tile's sinusoidal table, and of what cos_sin keeps if there are tiles. */
static void
measure_scratch(sum_job *job, size_t *kept)
{
    const row_sum *sum = job->sum;
    const size_t n_pair = chunk_pairs(sum, 0), real = (size_t)entry_size(sum);
    job->table_size = (job->tile_rows * 2 * n_pair * real / 64 + 1) * 64;
    *kept = job->tile_rows < TILE ? 0 : CHUNK_PAIRS / KEPT_PAIRS * kernels->kept_size;
}

bool
row_sum_run(row_sum *sum)
{
    nest_arrange(&sum->moved, 0, NULL);
    nest_arrange(&sum->shared, 0, NULL);
    const size_t n_moved = nest_n_row(&sum->moved), n_shared = nest_n_row(&sum->shared);
    const size_t inner = inner_size(&sum->shared),
                 group_row = (inner + GROUP - 1) / GROUP;
    sum_job job = {
        .sum = sum,
        .n_tile = (n_moved + TILE - 1) / TILE,
        .tile_rows = n_moved < TILE ? n_moved : TILE,
        .n_group = n_shared / inner * group_row,
        .group_row = group_row,
        .n_chunk = sum->n_pair > 0 ? (sum->n_pair + CHUNK_PAIRS - 1) / CHUNK_PAIRS : 1,
    };
    const int n_part = nest_n_part(n_moved * n_shared * sum->n_channel);
    if (sum->table != NULL) {
        parallel_run(run_part, &job, n_part);
        return true;
    }
    size_t kept;
    measure_scratch(&job, &kept);
    if (!scratch_begin(&job.scratch, job.table_size + kept, n_part)) {
        return false;
    }
    parallel_run(run_part, &job, n_part);
    scratch_end(&job.scratch);
    return true;
}
