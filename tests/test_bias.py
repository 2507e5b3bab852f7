"""Relative biases: against transformers, and against the formulas of the papers."""

# SPDX-License-Identifier: BSD-3-Clause

import inspect
import math
import pickle

import numpy as np
import pytest
import reference
from gufuncs import lay_out
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from ml_dtypes import bfloat16
from mpmath import mp

import posenc

FLOATS = (np.float32, np.float64, np.float16, bfloat16)
REACH = 4096  # offsets to compare

# KERPLE, in ulp of the true value: a product is rounded, then a logarithm or power that
# the C library has within an ulp, then another product.
KERPLE_ULP = 3
# FIRE adds up products of at most 12, eight to a sum; Sandwich takes cosines of angles
# up to 100, rounded: either leaves a few tens of the last bits of 1.
SUMS_TOLERANCE = 64 * np.finfo(np.float64).eps
# log(1 + x) as the paper has it loses up to five of the last bits for x from 0.1 on.
FORMULA_TOLERANCE = 8 * np.finfo(np.float64).eps
# The recipe of ALiBi's authors takes powers of a rounded number, up to the 64th.
RECIPE_TOLERANCE = 64 * np.finfo(np.float64).eps
# The slopes of Bloom are powers in float32 of a base that is rounded: seven at most.
BLOOM_TOLERANCE = 8 * np.finfo(np.float32).eps

MLP = [
    (np.linspace(-2, 3, 8)[:, None], np.linspace(1, -1, 8)),
    (np.linspace(-1, 1, 24).reshape(3, 8), np.array([0.5, 0.0, -0.5])),
]
# (queries, keys): alone, a few, with a cache, more queries than keys, beyond a vector.
SIZES = ((1, 1), (5, 5), (3, 40), (1, 67), (40, 3), (37, 70), (64, 1))


def call(family, q, k, dtype=np.float64, **options):
    """One of the biases for 3 heads; parameters are of a dtype."""
    slopes = np.array([0.5, 0.1, 2.0]).astype(dtype)
    if family == "t5":
        weight = np.random.default_rng(0).standard_normal((32, 3)).astype(dtype)
        return posenc.t5_bias(weight, q, k, **options)
    if family == "alibi":
        return posenc.alibi_bias(slopes, q, k, **options)
    if family == "symmetric":
        return posenc.alibi_bias(slopes, q, k, symmetric=True, **options)
    if family in ("log", "power"):
        r2 = np.array([1.0, 0.3, 1.7]).astype(dtype)
        return posenc.kerple_bias(slopes, r2, q, k, kernel=family, **options)
    if family == "fire":
        mlp = [tuple(part.astype(dtype) for part in pair) for pair in MLP]
        return posenc.fire_bias(mlp, q, k, threshold=20.0, **options)
    dtype = np.float32 if dtype == np.float32 else np.float64
    return posenc.sandwich_bias(3, 16, q, k, dtype=dtype, **options)


FAMILIES = ("t5", "alibi", "symmetric", "log", "power", "fire", "sandwich")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_type = pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: t.__name__)


def types_of(family):
    return (np.float32, np.float64) if family == "sandwich" else FLOATS


# --- T5 against transformers ---------------------------------------------------------


def t5_attention(is_decoder, dtype="float32", n_head=12, **sizes):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = pytest.importorskip("transformers").T5Config(
        num_heads=n_head,
        is_decoder=is_decoder,
        **{f"relative_attention_{name}": value for name, value in sizes.items()},
    )
    attention = models.T5Attention(
        config, has_relative_attention_bias=True, layer_idx=0
    )
    attention = attention.to(getattr(torch, dtype)).requires_grad_(False)
    attention.relative_attention_bias.weight.normal_()
    return attention


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets", [4, 5, 6, 7, 8, 31, 32, 33, 64, 128, 320])
@pytest.mark.parametrize("max_distance", [80, 100, 128, 256, 777, 1000, 4096, 100_000])
def test_buckets_are_those_of_transformers(bidirectional, num_buckets, max_distance):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("transformers.models.t5.modeling_t5")
    if max_distance <= num_buckets // 2:
        pytest.skip("there is no logarithm")
    relative = torch.arange(-REACH, REACH + 1)
    options = {
        "bidirectional": bidirectional,
        "num_buckets": num_buckets,
        "max_distance": max_distance,
    }
    want = models.T5Attention._relative_position_bucket(relative, **options)
    got = posenc.t5_bucket(relative, **options)
    assert torch.equal(got, want)
    reference.same_bits(posenc.t5_bucket(relative.numpy(), **options), want.numpy())


def test_buckets_of_the_ends_of_the_integers():
    ends = np.array([-(2**63), -(2**62), 2**63 - 1])
    assert posenc.t5_bucket(ends).tolist() == [15, 15, 31]
    assert posenc.t5_bucket(ends, bidirectional=False).tolist() == [31, 31, 0]
    assert posenc.t5_bucket(np.zeros((0, 3), np.int8)).shape == (0, 3)
    assert posenc.t5_bucket(-5) == 5


def test_buckets_of_unsigned_integers_past_the_signed():
    far = np.array([2**63 + 5, 2**64 - 1], np.uint64)
    assert posenc.t5_bucket(far).tolist() == [31, 31]


@pytest.mark.parametrize("exact", [2**40 + 1, 2**52 + 2**28])
def test_buckets_stay_in_their_range_where_the_logarithm_rounds_to_nothing(exact):
    options = {"num_buckets": 4 * exact, "max_distance": exact + 2}
    got = posenc.t5_bucket([-exact, -exact - 1, exact + 1], **options)
    assert ((exact <= got) & (got < 4 * exact)).all()


def test_buckets_go_where_they_are_asked_to():
    x = np.arange(-9, 9)
    want = posenc.t5_bucket(x)
    out = np.zeros(18, np.int64)
    assert posenc.t5_bucket(x, out=out) is out
    assert (out == want).all()
    assert posenc.t5_bucket(x, out=x) is x
    assert (x == want).all()


# --- the contract of the gufunc ------------------------------------------------------

NUMBERS = ((32, 128, True), (32, 128, False), (17, 60, True), (4, 5, False))


def bucket_operands(rng, loops):
    """Offsets of all sizes, and numbers of buckets from a few kinds."""
    shapes = loops if len(loops) > 1 else loops * 4
    offset = rng.integers(-300, 300, shapes[0])
    columns = np.array(NUMBERS)[rng.integers(0, len(NUMBERS), 4), :]
    kinds = [np.int64, np.int64, bool]
    numbers = [
        np.resize(columns[0, i], shape).astype(kind)
        for i, (shape, kind) in enumerate(zip(shapes[1:], kinds, strict=True))
    ]
    return [offset, *numbers]


def buckets_of(operands):
    """What the reference says, element by element."""
    operands = np.broadcast_arrays(*operands)
    flat = zip(*(op.reshape(-1).tolist() for op in operands), strict=True)
    found = [reference.t5_bucket(*numbers) for numbers in flat]
    return np.array(found, np.int64).reshape(operands[0].shape)


def test_gufunc_of_buckets_broadcasts_its_numbers():
    offset = np.arange(-300, 301)
    columns = [np.array(column)[:, None] for column in zip(*NUMBERS, strict=True)]
    got = posenc.ufunc.t5_bucket(offset, *columns)
    reference.same_bits(got, buckets_of([offset, *columns]))
    for bad in ((3, 128, True), (1, 128, False), (32, 8, True), (32, 16, False)):
        assert (posenc.ufunc.t5_bucket(offset, *bad) == -1).all()
    assert posenc.ufunc.t5_bucket([[1, 2]], 32, 128, True).shape == (1, 2)


@given(data=st.data())
def test_gufunc_of_buckets_in_any_memory(data):
    shapes = data.draw(
        mutually_broadcastable_shapes(num_shapes=4, max_dims=3, min_side=0, max_side=3)
    ).input_shapes
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    operands = bucket_operands(rng, shapes)
    want = buckets_of(operands)

    def choose(options):
        return data.draw(st.sampled_from(options))

    operands = [lay_out(op, choose) for op in operands]
    before = [op.tobytes() for op in operands]
    reference.same_bits(posenc.ufunc.t5_bucket(*operands), want)
    out = lay_out(np.zeros(want.shape, np.int64), choose)
    out.flags.writeable = True
    assert posenc.ufunc.t5_bucket(*operands, out=out) is out
    reference.same_bits(np.asarray(out).astype(np.int64), want)
    assert before == [op.tobytes() for op in operands]


@pytest.mark.parametrize("shift", [0, 1, 5, -1, -12])
def test_gufunc_of_buckets_may_write_over_its_input(shift):
    offset = np.random.default_rng(8).integers(-300, 300, 60)
    want = buckets_of([offset, 32, 128, True])
    memory = np.zeros(60 + abs(shift), np.int64)
    low, high = memory[:60], memory[abs(shift) :]
    source, target = (low, high) if shift > 0 else (high, low)
    source[...] = offset
    posenc.ufunc.t5_bucket(source, 32, 128, True, out=target)
    reference.same_bits(target, want)
    source = offset.copy()
    posenc.ufunc.t5_bucket(source, 32, 128, True, out=source[::-1])
    reference.same_bits(source[::-1], want)


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "?"])
def test_gufunc_of_buckets_takes_whole_numbers(kind):
    offset = np.arange(100).astype(kind)
    got = posenc.ufunc.t5_bucket(offset, np.int32(32), np.int16(128), True)
    reference.same_bits(got, buckets_of([offset.astype(int), 32, 128, True]))


@pytest.mark.parametrize("kind", ["u8", "f4", "f8", "F", "O", "m8[s]", "U4", "g"])
def test_gufunc_of_buckets_refuses_others(kind):
    with pytest.raises(TypeError, match="t5_bucket"):
        posenc.ufunc.t5_bucket(np.zeros(3, kind), 32, 128, True)


class Listens:
    """Takes part in NumPy's dispatch and remembers who called."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return ufunc, method


def test_gufunc_of_buckets_is_one():
    ufunc = posenc.ufunc.t5_bucket
    assert type(ufunc) is np.ufunc
    assert (ufunc.nin, ufunc.nout, ufunc.signature) == (4, 1, None)
    assert pickle.loads(pickle.dumps(ufunc)) is ufunc
    assert ufunc(Listens(), 32, 128, True) == (ufunc, "__call__")


def test_gufunc_of_buckets_with_any_number_of_threads():
    offset = np.random.default_rng(9).integers(-999, 999, (7, 70_001))
    columns = [np.resize(column, (7, 1)) for column in zip(*NUMBERS, strict=True)]
    results = []
    try:
        for n in (1, 2, 5):
            posenc.set_num_threads(n)
            results.append(posenc.ufunc.t5_bucket(offset, *columns))
            posenc.ufunc.t5_bucket(offset.T, *(c.T for c in columns))
    finally:
        posenc.set_num_threads(None)
    for result in results[1:]:
        reference.same_bits(result, results[0])


def test_dask_chunks_the_buckets():
    da = pytest.importorskip("dask.array")
    offset = np.random.default_rng(9).integers(-999, 999, (8, 50))
    chunked = da.from_array(offset, chunks=(4, 25))
    want = posenc.t5_bucket(offset)
    for result in (
        posenc.ufunc.t5_bucket(chunked, 32, 128, True),
        posenc.t5_bucket(chunked),
    ):
        assert isinstance(result, da.Array)
        assert result.numblocks == (2, 2)
        reference.same_bits(result.compute(), want)
    with pytest.raises(TypeError, match="out must be None for relative_position of"):
        posenc.t5_bucket(chunked, out=np.zeros((8, 50), np.int64))
    logits = da.zeros((3, 8, 50))
    with pytest.raises(TypeError, match="add_to must be a plain NumPy array; got Arr"):
        posenc.alibi_bias(np.ones(3), range(8), range(50), add_to=logits)


# --- T5 against transformers: the bias -----------------------------------------------


@pytest.mark.parametrize("is_decoder", [False, True])
def test_t5_bias_has_the_bits_of_transformers_at_all_offsets(is_decoder):
    torch = pytest.importorskip("torch")
    attention = t5_attention(is_decoder)
    weight = attention.relative_attention_bias.weight
    options = {"bidirectional": not is_decoder}
    for n_query, n_key in ((REACH + 1, 1), (1, REACH + 1)):
        want = attention.compute_bias(n_query, n_key)[0]
        got = posenc.t5_bias(weight, range(n_query), range(n_key), **options)
        assert torch.equal(got, want)
        array = posenc.t5_bias(weight.numpy(), range(n_query), range(n_key), **options)
        reference.same_bits(array, want.numpy())


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_t5_bias_with_a_cache_has_the_bits_of_transformers(is_decoder, dtype):
    torch = pytest.importorskip("torch")
    attention = t5_attention(is_decoder, dtype, 5, num_buckets=24, max_distance=50)
    weight = attention.relative_attention_bias.weight
    for n_query, n_key, past in ((7, 7, 0), (1, 90, 89), (5, 90, 85), (300, 700, 3)):
        want = attention.compute_bias(n_query, n_key, past_seen_tokens=past)[0]
        options = {"bidirectional": not is_decoder, "max_distance": 50}
        q, k = range(past, past + n_query), range(n_key)
        assert torch.equal(posenc.t5_bias(weight, q, k, **options), want)
        order = torch.randperm(n_key)
        got = posenc.t5_bias(weight, torch.tensor(q), order, **options)
        assert torch.equal(got, want[..., order])


def test_large_t5_bias_has_the_bits_of_transformers():
    """Past the caches, and rows that begin anywhere in a vector."""
    torch = pytest.importorskip("torch")
    attention = t5_attention(False, n_head=7)
    weight = attention.relative_attention_bias.weight
    want = attention.compute_bias(1001, 1003)[0]
    out = torch.full((7, 1001, 1003), 7.0)
    assert posenc.t5_bias(weight, range(1001), range(1003), out=out) is out
    assert torch.equal(out, want)
    assert torch.equal(posenc.t5_bias(weight, range(1001), range(1003)), want)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1101, 1104), (300001, 5)])
def test_large_biases_are_the_same_wherever_they_lie(dtype, shape):
    """Past the caches, short rows and long ones."""
    n_query, n_key = shape
    n_head = (24 << 20) // (n_query * n_key * np.dtype(dtype).itemsize) + 1
    weight = np.random.default_rng(2).standard_normal((32, n_head)).astype(dtype)
    by_offset = weight[posenc.t5_bucket(np.arange(1 - n_query, n_key))].T
    rows = np.lib.stride_tricks.sliding_window_view(by_offset, n_key, axis=-1)
    want = rows[:, ::-1]
    memory = np.zeros(want.size + 32, dtype)
    for n_byte in (0, 2, 16, 36):
        start = -(-n_byte // memory.itemsize)
        out = memory[start : start + want.size].reshape(want.shape)
        posenc.t5_bias(weight, range(n_query), range(n_key), out=out)
        reference.same_bits(out, want)
        assert not memory[start + want.size :].any()
        memory[...] = 0


# --- the others against their formulas -----------------------------------------------


def true_slopes(n_head):
    """The series for powers of two, and every other number of the next: doubles."""
    power = 2 ** int(math.log2(n_head))
    steps = [mp.mpf(-8 * (h + 1)) / power for h in range(power)]
    steps += [mp.mpf(-4 * (2 * h + 1)) / power for h in range(n_head - power)]
    with mp.workprec(200):
        return [float(mp.power(2, step)) for step in steps]


def test_slopes_are_those_of_the_formula_and_of_bloom():
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    torch = pytest.importorskip("torch")
    for n_head in range(1, 65):
        slopes = posenc.alibi_slopes(n_head)
        recipe = reference.alibi_slopes(n_head)
        np.testing.assert_allclose(slopes, recipe, rtol=RECIPE_TOLERANCE, atol=0)
        assert slopes.tolist() == true_slopes(n_head)
        mask = torch.ones(1, 5, dtype=torch.int64)
        theirs = bloom.build_alibi_tensor(mask, n_head, torch.float32)
        # Theirs are slope * key: ours of a query at 0.
        ours = posenc.alibi_bias(slopes, [0], range(5))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=BLOOM_TOLERANCE, atol=0)
    assert posenc.alibi_slopes(6, dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("start", [(0, 0), (30, 0), (-7, 11)], ids=str)
def test_values_are_those_of_the_formulas(size, start):
    q, k = (range(a, a + n) for a, n in zip(start, size, strict=True))
    slopes = [0.5, 0.1, 2.0]
    assert (call("alibi", q, k) == reference.alibi(slopes, q, k)).all()
    want = reference.alibi(slopes, q, k, symmetric=True)
    assert (call("symmetric", q, k) == want).all()
    for kernel in ("log", "power"):
        want = reference.kerple(slopes, [1.0, 0.3, 1.7], q, k, kernel)
        got = call(kernel, q, k)
        np.testing.assert_allclose(got, want, rtol=FORMULA_TOLERANCE, atol=0)
    pairs = {
        "fire": reference.fire(MLP, q, k, 0.1, 20.0, 1e-6),
        "sandwich": reference.sandwich(3, 16, q, k, 10000.0),
    }
    close = {"rtol": 0, "atol": SUMS_TOLERANCE}
    for family, want in pairs.items():
        np.testing.assert_allclose(call(family, q, k), want, err_msg=family, **close)


@pytest.mark.parametrize("kernel", ["log", "power"])
@pytest.mark.parametrize("r2", [1e-300, 1e-17, 1e-9, 0.3, 1.0, 1.7])
def test_kerple_is_nearly_the_true_number(kernel, r2):
    r1, distances = 0.7, [0, 1, 2, 3, 9, 100, 4097]
    got = posenc.kerple_bias([r1], [r2], [0], distances, kernel=kernel)
    a, b = mp.mpf(r1), mp.mpf(r2)
    for value, distance in zip(got[0, 0], distances, strict=True):
        with mp.workprec(200):
            true = mp.log1p(b * distance) if kernel == "log" else mp.power(distance, b)
            assert reference.ulp_error(value, -a * true, np.float64) <= KERPLE_ULP


def test_positions_need_not_be_whole():
    rng = np.random.default_rng(1)
    q, k = rng.uniform(-50, 50, 9), rng.uniform(-50, 50, 13)
    want = reference.alibi([0.5, 0.1, 2.0], q, k)
    reference.same_bits(call("alibi", q, k), want)
    want = reference.fire(MLP, q, k, 0.1, 20.0, 1e-6)
    close = {"rtol": 0, "atol": SUMS_TOLERANCE}
    np.testing.assert_allclose(call("fire", q, k), want, **close)
    want = reference.sandwich(3, 16, q, k, 10000.0)
    np.testing.assert_allclose(call("sandwich", q, k), want, **close)


@every_type
def test_products_of_alibi_are_rounded_once(dtype):
    slopes = np.array([0.3, 0.7]).astype(dtype)
    wide = reference.alibi(slopes, range(500), range(500))
    want = wide.astype(np.float32).astype(dtype) if dtype != np.float64 else wide
    got = posenc.alibi_bias(slopes, range(500), range(500))
    assert got.dtype == dtype
    reference.same_bits(got, want + dtype(0))


# --- what all keep -------------------------------------------------------------------


@every_family
def test_same_offset_same_bits_anywhere(family):
    if family == "fire":
        pytest.skip("its values depend on the query")
    here = call(family, range(5), range(40))
    for shift in (1, 1000, -3, 10**6):
        there = call(family, range(shift, shift + 5), range(shift, shift + 40))
        reference.same_bits(here, there)


@every_family
@every_type
def test_one_row_at_a_time_gives_the_same_bits(family, dtype):
    if dtype not in types_of(family):
        pytest.skip("results are float32 or float64")
    whole = call(family, range(60), range(60), dtype)
    assert whole.shape == (3, 60, 60)
    assert whole.dtype == dtype
    assert whole.flags.c_contiguous
    for query in (0, 1, 19, 20, 21, 40, 59):
        row = call(family, [query], range(60), dtype)
        reference.same_bits(row[:, 0], whole[:, query])


@every_family
@every_type
def test_any_order_of_positions_gives_the_same_bits(family, dtype):
    if dtype not in types_of(family):
        pytest.skip("results are float32 or float64")
    rng = np.random.default_rng(2)
    q, k = rng.permutation(33), rng.permutation(40)
    whole = call(family, range(33), range(40), dtype)
    for queries, keys in ((q, range(40)), (range(33), k), (q, k), (q[::-1], k[:7])):
        got = call(family, queries, keys, dtype)
        reference.same_bits(got, whole[:, list(queries)][..., list(keys)])


@every_family
def test_batches_of_positions(family):
    rng = np.random.default_rng(3)
    q = np.stack([np.arange(6), np.arange(10, 16), rng.permutation(6)])
    k = np.stack([np.arange(9), np.arange(4, 13), np.arange(9)])
    got = call(family, q, k)
    assert got.shape == (3, 3, 6, 9)
    for i in range(3):
        reference.same_bits(got[i], call(family, q[i], k[i]))
    reference.same_bits(call(family, q, k[0])[1], call(family, q[1], k[0]))


@every_family
def test_nothing_gives_nothing(family):
    assert call(family, [], range(5)).shape == (3, 0, 5)
    assert call(family, range(5), []).shape == (3, 5, 0)
    assert call(family, [], []).shape == (3, 0, 0)
    out = np.zeros((2, 0, 3, 5, 0))
    assert call(family, range(5), [], out=None, add_to=out) is out


@every_family
@every_type
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)], ids=str)
def test_out_is_overwritten_in_any_memory(family, dtype, order):
    if dtype not in types_of(family):
        pytest.skip("results are float32 or float64")
    q, k = range(-4, 30), range(50)
    want = call(family, q, k, dtype)
    memory = np.zeros(tuple(np.array((2, 3, 34, 50))[list(order)]), dtype)
    out = memory.transpose(np.argsort(order))[0]
    assert call(family, q, k, dtype, out=out) is out
    reference.same_bits(out, want)
    out = np.full((3, 34, 50), 7, dtype)[:, ::-1, ::-1]
    assert call(family, q, k, dtype, out=out) is out
    reference.same_bits(out, want)
    raw = np.zeros(want.nbytes + 1, np.uint8)[1:].view(dtype).reshape(want.shape)
    call(family, q, k, dtype, out=raw)
    reference.same_bits(raw, want)


@every_family
@every_type
@pytest.mark.parametrize("keys", ["consecutive", "shuffled"])
def test_logits_are_added_to_in_place(family, dtype, keys):
    """One sum, of float32 at least, rounded once; NaN is the one NaN."""
    rng = np.random.default_rng(4)
    wide = np.float64 if dtype == np.float64 else np.float32
    q, k = range(20), range(70)
    if keys == "shuffled":
        k = rng.permutation(70)
    bias = call(family, q, k, wide)
    if dtype == bfloat16 or dtype == np.float16:
        bias = call(family, q, k, np.float32)
    logits = rng.standard_normal((2, 3, 20, 70)).astype(dtype)
    logits[0, 1, 3, :9] = -np.inf
    logits[1, 2, 5, 6] = np.nan
    want = reference.one_nan(logits.astype(wide) + bias).astype(dtype)
    for memory in (logits, np.asfortranarray(logits), logits[:, :, ::-1][:, :, ::-1]):
        given = memory.copy(order="K")
        assert call(family, q, k, wide, add_to=given) is given
        reference.same_bits(given, want)
        out = np.zeros_like(logits)
        assert call(family, q, k, wide, add_to=memory, out=out) is out
        reference.same_bits(out, want)
        reference.same_bits(memory, logits)


def test_large_logits_are_streamed_to_the_same_bits():
    rng = np.random.default_rng(5)
    for dtype in FLOATS:
        wide = np.float64 if dtype == np.float64 else np.float32
        logits = rng.standard_normal((3, 1001, 1503)).astype(dtype)
        bias = call("alibi", range(1001), range(1503), wide)
        want = (logits.astype(wide) + bias).astype(dtype)
        out = np.zeros_like(logits)
        call("alibi", range(1001), range(1503), wide, add_to=logits, out=out)
        reference.same_bits(out, want)
        call("alibi", range(1001), range(1503), wide, add_to=logits)
        reference.same_bits(logits, want)


def test_memory_may_be_shared():
    slopes = np.array([0.5, 0.25, 1.0])
    want = posenc.alibi_bias(slopes, range(3), range(3))
    for name in ("slopes", "q", "k"):
        out = np.zeros((3, 3, 3))
        given = {"slopes": slopes, "q": np.arange(3.0), "k": np.arange(3.0)}
        out[0, 1] = given[name]
        given[name] = out[0, 1]
        posenc.alibi_bias(given["slopes"], given["q"], given["k"], out=out)
        reference.same_bits(out, want)
    memory = np.arange(40.0)
    logits, out = memory[:27].reshape(3, 3, 3), memory[13:].reshape(3, 3, 3)
    want = logits + want
    posenc.alibi_bias(slopes, range(3), range(3), add_to=logits, out=out)
    reference.same_bits(out, want)


@every_family
def test_any_number_of_threads_gives_the_same_bits(family):
    logits = np.random.default_rng(6).standard_normal((3, 300, 301)).astype("f")
    results = []
    try:
        for n in (1, 2, 3, 7):
            posenc.set_num_threads(n)
            sums = logits.copy()
            call(family, range(300), range(301), np.float32, add_to=sums)
            results.append((call(family, range(300), range(301), np.float32), sums))
    finally:
        posenc.set_num_threads(None)
    for bias, sums in results[1:]:
        reference.same_bits(bias, results[0][0])
        reference.same_bits(sums, results[0][1])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: t.__name__)
def test_diagonals_are_added_up_in_double(dtype):
    rng = np.random.default_rng(7)
    grad = rng.standard_normal((2, 3, 40, 70)).astype(dtype)
    want = np.zeros((2, 3, 109))
    for t in range(40):
        for s in range(70):
            want[..., s - t + 39] += grad[..., t, s].astype(float)
    for memory in (grad, np.asfortranarray(grad), grad[..., ::-1].copy()[..., ::-1]):
        sums = np.zeros((2, 3, 109))
        posenc._core.bias_collect_arrays(memory, sums)
        reference.same_bits(sums, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("n_bucket, max_distance", [(32, 128), (17, 60), (4, 10**9)])
def test_values_of_t5_are_the_numbers_of_the_buckets(dtype, n_bucket, max_distance):
    """Near and far, on both sides of the query; and mixed, in any order."""
    rng = np.random.default_rng(10)
    weight = rng.standard_normal((n_bucket, 3)).astype(dtype)
    ends = (-(2**63), 2**63 - 1, -max_distance, max_distance, 0)
    for offsets in (
        np.arange(-1000, 1000),
        np.arange(-700, -99),
        np.arange(1, 200),
        np.arange(128, 700),
        rng.integers(-300, 300, 400),
        np.repeat(ends, 128),
        np.array(ends * 30),
    ):
        for both in (True, False):
            bucket = posenc.ufunc.t5_bucket(offsets, n_bucket, max_distance, both)
            want = np.ascontiguousarray(weight[bucket].T)
            for own in (weight, np.asfortranarray(weight), weight[::-1].copy()[::-1]):
                values = np.zeros((3, len(offsets) + 1), dtype)[:, :-1]
                numbers = own, offsets, max_distance, both
                posenc._core.t5_values_arrays(*numbers, values)
                reference.same_bits(np.ascontiguousarray(values), want)


def test_values_of_t5_with_any_number_of_threads():
    offsets = np.random.default_rng(11).integers(-300, 300, 100_001)
    weight = np.arange(96.0).reshape(32, 3)
    want = np.ascontiguousarray(weight[posenc.t5_bucket(offsets)].T)
    try:
        for n in (1, 2, 5):
            posenc.set_num_threads(n)
            values = np.zeros_like(want)
            posenc._core.t5_values_arrays(weight, offsets, 128, True, values)
            reference.same_bits(values, want)
    finally:
        posenc.set_num_threads(None)


def test_consecutive_positions_are_known():
    far = 2**53
    for first, n in ((0, 1), (-3, 9), (far, 1), (far - 8, 9), (-far, 9)):
        want, array = range(first, first + n), first + np.arange(n)
        assert posenc._core.consecutive(array) == want
        assert posenc._core.consecutive(np.repeat(array, 2)[::2]) == want
        assert posenc._core.consecutive(array.astype(float)) == want
    raw = np.zeros(17, np.uint8)[1:].view(np.int64)
    for others in (
        np.arange(0),
        np.arange(5)[::-1],
        np.array([0, 1, 3]),
        np.array([0, 1, 1]),
        np.array([0, 1, 2**32 + 2]),
        np.array([far, far + 1]),
        np.array([-far - 1, -far]),
        np.array([2**63 - 1, -(2**63)]),
        np.array([0.5, 1.5]),
        np.array([0.0, 1.0, 2.5]),
        np.array([np.nan]),
        np.array([1e300]),
        np.array([far, far + 1.0]),
        np.array([np.inf, np.inf]),
        np.arange(5).astype("i4"),
        np.arange(5).astype(">i8"),
        np.arange(5)[None],
        np.array(5),
        raw,
        [0, 1, 2],
    ):
        assert posenc._core.consecutive(others) is None
    with pytest.raises(TypeError, match="must number 1; got 0"):
        posenc._core.consecutive()


def test_distances_that_leave_the_doubles_are_infinite():
    got = posenc.alibi_bias([1.0, 0.5], [1.7e308], [-1.7e308, 1.7e308])
    np.testing.assert_array_equal(got, [[[-np.inf, 0]], [[-np.inf, 0]]])
    got = posenc.alibi_bias([1.0], [1.7e308], [-1.7e308])
    np.testing.assert_array_equal(got, [[[-np.inf]]])


def test_private_door_refuses_what_does_not_fit():
    good = np.zeros((3, 9)), None, np.zeros((3, 5, 5))
    doors = posenc._core.bias_arrays, posenc._core.bias_collect_arrays
    for door in doors:
        with pytest.raises(TypeError, match="must number"):
            door(1)
    for values, logits, out in (
        (np.zeros((3, 8)), None, good[2]),
        (np.zeros((2, 9)), None, good[2]),
        (np.zeros((3, 9), "f"), None, good[2]),
        (good[0], np.zeros((3, 5, 4)), good[2]),
        (good[0], np.zeros((3, 5, 5), "f"), good[2]),
        (np.zeros((3, 18))[:, ::2], None, good[2]),
        (good[0], None, np.zeros((3, 5, 5), int)),
        (good[0], None, None),
    ):
        with pytest.raises(TypeError, match="must be arrays that fit together"):
            doors[0](values, logits, out)
    with pytest.raises(TypeError, match="must be arrays that fit together"):
        doors[1](good[2], np.zeros((3, 9), "f"))
    door = posenc._core.t5_values_arrays
    weight, offsets, values = np.zeros((32, 3)), np.arange(9), np.zeros((3, 9))
    door(weight, offsets, 128, True, values)
    readonly = values.copy()
    readonly.flags.writeable = False
    for bad in (
        (weight[0], offsets, 128, True, values),
        (weight.astype("f"), offsets, 128, True, values),
        (weight.astype(int), offsets, 128, True, values.astype(int)),
        (weight[:, :2], offsets, 128, True, values),
        (weight, offsets[:8], 128, True, values),
        (weight, offsets[:0], 128, True, values[:, :0]),
        (weight, offsets[None], 128, True, values),
        (weight, offsets.astype(float), 128, True, values),
        (weight, np.arange(18)[::2], 128, True, values),
        (weight, offsets, 8, True, values),
        (weight, offsets, 16, False, values),
        (weight[:3], offsets, 128, True, values),
        (weight[:1], offsets, 128, False, values),
        (weight, offsets, 128, True, np.zeros((3, 18))[:, ::2]),
        (weight, offsets, 128, True, readonly),
        (weight, offsets, 128, True, None),
    ):
        with pytest.raises(TypeError, match="must be arrays that fit together"):
            door(*bad)
    with pytest.raises(TypeError):
        door(weight, offsets, "128", True, values)
    with pytest.raises(TypeError, match="must number 5; got 1"):
        door(weight)


@every_family
def test_signature_is_that_of_the_others(family):
    names = {"symmetric": "alibi", "log": "kerple", "power": "kerple"}
    function = getattr(posenc, f"{names.get(family, family)}_bias")
    parameters = list(inspect.signature(function).parameters)
    assert parameters[-2:] == ["add_to", "out"]
    at = parameters.index("q_positions")
    assert parameters[at + 1] == "k_positions"


# --- tensors -------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_tensors_give_tensors_of_the_same_bits(family, dtype):
    torch = pytest.importorskip("torch")
    kind = bfloat16 if dtype == "bfloat16" else np.dtype(dtype).type
    wide = np.float64 if dtype == "float64" else np.float32
    want = call(family, range(9), range(12), wide)
    logits = torch.ones(2, 3, 9, 12, dtype=getattr(torch, dtype))
    version = logits._version
    result = call(family, range(9), range(12), wide, add_to=logits)
    assert result is logits
    assert logits._version > version
    got = posenc._tensors.as_numpy(logits)
    reference.same_bits(got, np.broadcast_to((want + wide(1)).astype(kind), got.shape))
    q = torch.arange(9)
    slopes = torch.tensor([0.5, 0.1, 2.0], dtype=getattr(torch, dtype))
    got = posenc.alibi_bias(slopes, q, range(12))
    assert got.dtype == slopes.dtype
    want = posenc.alibi_bias(posenc._tensors.as_numpy(slopes), range(9), range(12))
    reference.same_bits(posenc._tensors.as_numpy(got), want)


def test_gradients_are_pointed_to():
    torch = pytest.importorskip("torch")
    weight = torch.zeros(32, 3, requires_grad=True)
    with pytest.raises(TypeError, match=r"posenc\.torch\.t5_bias gives gradients"):
        posenc.t5_bias(weight, range(3), range(3))
    with torch.no_grad():
        assert posenc.t5_bias(weight, range(3), range(3)).shape == (3, 3, 3)
