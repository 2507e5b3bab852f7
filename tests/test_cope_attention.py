"""posenc.cope_attention: the paper's listing, in any memory, for any mask.

The oracle is the listing in float64 (cope_listing.py).
"""

# SPDX-License-Identifier: BSD-3-Clause

import itertools

import numpy as np
import pytest
from ml_dtypes import bfloat16

import posenc
from posenc import cope_attention

torch = pytest.importorskip("torch")

from cope_listing import attention as by_listing  # noqa: E402
from cope_listing import visible  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_one_thread")

# Sums of at most 128 products and 300 gates, in other order than torch's.
FLOAT64_TOLERANCE = 1e-12
# The same in float32, where positions up to 64 meet slopes of 40; the listing's own
# error, which is the measure, is another test's.
FLOAT32_TOLERANCE = 2e-4
# Half a unit in the last place of 16-bit results, and the error of float32.
HALF_ULP = {np.dtype(np.float16): 2.0**-11, np.dtype(bfloat16): 2.0**-8}
N_THREAD = (1, 2, 3, 4)

# B, H, G, T, S, D, P
SIZES = {
    "square": (2, 3, 3, 33, 33, 16, 8),
    "small": (1, 1, 1, 3, 3, 4, 4),
    "cache": (2, 2, 2, 5, 70, 16, 12),
    "more queries than keys": (1, 2, 2, 70, 33, 16, 8),
    "one query": (2, 4, 2, 1, 133, 64, 16),
    "one key": (2, 2, 1, 7, 1, 16, 4),
    "grouped": (2, 6, 2, 40, 40, 16, 8),
    "one head of keys": (2, 4, 1, 40, 40, 16, 8),
    "one channel": (1, 2, 2, 40, 40, 1, 8),
    "3 channels": (1, 2, 2, 40, 40, 3, 8),
    "20 channels": (1, 2, 1, 40, 40, 20, 8),
    "64 channels": (1, 2, 1, 65, 97, 64, 64),
    "80 channels": (1, 2, 2, 40, 50, 80, 8),
    "128 channels": (1, 2, 2, 40, 50, 128, 8),
    "one position": (1, 2, 2, 40, 40, 16, 1),
    "two positions": (1, 2, 2, 40, 40, 16, 2),
    "more positions than keys": (1, 2, 2, 40, 40, 16, 100),
    "17 positions": (1, 1, 1, 100, 100, 16, 17),
    "far": (1, 1, 1, 300, 300, 20, 64),
}
VARIANTS = {
    "listing": {},
    "divided": {"position_scale": 0.25},
    "unscaled": {"scale": 1.0},
    "gate key": {"gate_key": True},
    "per head": {"per_head": True},
    "all": {"position_scale": -0.5, "gate_key": True, "per_head": True, "scale": 0.3},
}


def random(*shape, seed=0, dtype=np.float64):
    generator = np.random.default_rng([seed, *shape])
    return generator.standard_normal(shape).astype(dtype)


def operands(size, seed=0, dtype=np.float64, per_head=False, gate_key=False):
    """q, k, v, embedding and gate key or None, after projections: heads are strided."""
    n_batch, n_head, n_group, n_query, n_key, dim, n_position = size
    q = random(n_batch, n_query, n_head, dim, seed=seed, dtype=dtype).swapaxes(1, 2)
    shape = n_batch, n_key, n_group, dim
    k, v, gate = (
        random(*shape, seed=seed + i, dtype=dtype).swapaxes(1, 2) for i in (1, 2, 3)
    )
    heads = (n_head,) if per_head else ()
    embedding = random(*heads, dim, n_position, seed=seed + 4, dtype=dtype)
    return q, k, v, embedding, gate if gate_key else None


def masks(size, seed=0):
    """Ways to hide keys: options by name."""
    n_batch, n_head, _, n_query, n_key, _, _ = size
    generator = np.random.default_rng(seed)
    length = generator.integers(1, n_key + 1, n_batch)
    padding = np.arange(n_key) < length[:, None, None, None]
    some = generator.random((n_batch, n_head, n_query, n_key)) < 0.6
    few = generator.random((n_query, n_key)) < 0.05
    return {
        "causal": {},
        "all": {"causal": False},
        "padding": {"mask": padding},
        "padding on the left, all": {"mask": padding[..., ::-1], "causal": False},
        "some": {"mask": some, "causal": False},
        "few, causal": {"mask": few},
        "a head each": {"mask": some[:1, :, :1, :]},
    }


MASKS = tuple(masks(SIZES["small"]))


def wide(x):
    """The float64 tensor of an array."""
    return torch.from_numpy(np.array(x, dtype=np.float64))


def expected(q, k, v, embedding, gate_key=None, mask=None, **options):
    """What the listing gives for arrays, in float64."""
    if gate_key is not None:
        options["gate_key"] = wide(gate_key)
    if mask is not None:
        options["mask"] = torch.from_numpy(mask.copy())
    given = map(wide, (q, k, v, embedding))
    return by_listing(*given, **options).numpy()


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours.astype(np.float64) - theirs).max(initial=0)


def call(given, **options):
    *tensors, gate_key = given
    return cope_attention(*tensors, gate_key=gate_key, **options)


# --- values --------------------------------------------------------------------------


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_values_are_those_of_the_listing(size, masked):
    options = masks(size)[masked]
    given = operands(size)
    theirs = expected(*given, **options)
    assert error(call(given, **options), theirs) < FLOAT64_TOLERANCE
    given = operands(size, dtype=np.float32)
    theirs = expected(*given, **options)
    ours = call(given, **options)
    assert ours.dtype == np.float32
    assert error(ours, theirs) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", ["square", "cache", "20 channels", "far"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(variant, size, dtype):
    options = dict(variant)
    forms = {name: options.pop(name, False) for name in ("per_head", "gate_key")}
    given = operands(SIZES[size], dtype=dtype, **forms)
    tolerance = {8: FLOAT64_TOLERANCE, 4: FLOAT32_TOLERANCE}[np.dtype(dtype).itemsize]
    for causal in (True, False):
        theirs = expected(*given, causal=causal, **options)
        assert error(call(given, causal=causal, **options), theirs) < tolerance


def test_gates_of_values_and_positions_divided_as_the_papers_code_does():
    """Facebook's projects/cope: --cope-val-gates, and both terms over sqrt(d)."""
    q, k, v, embedding, _ = operands(SIZES["square"])
    ours = cope_attention(q, k, v, embedding, gate_key=v, position_scale=16**-0.5)
    q, k, v, embedding = map(wide, (q, k, v, embedding))
    gates = torch.sigmoid(q @ v.mT / 16**0.5) * torch.ones(33, 33).tril()
    pos = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=7)
    low, high, z = pos.floor().long(), pos.ceil().long(), q @ embedding
    bias = z.gather(-1, high) * (pos - low) + z.gather(-1, low) * (1 - pos + low)
    logits = (q @ k.mT + bias) / 16**0.5 + torch.ones(33, 33).tril().log()
    theirs = torch.softmax(logits, -1) @ v
    assert error(ours, theirs.numpy()) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@pytest.mark.parametrize("size", ["square", "cache", "20 channels", "64 channels"])
def test_16_bit_data_are_rounded_once(size, dtype):
    given = operands(SIZES[size], dtype=dtype, gate_key=True)
    ours = call(given)
    theirs = expected(*given)
    assert ours.dtype == dtype
    bound = HALF_ULP[np.dtype(dtype)] * np.abs(theirs) + FLOAT32_TOLERANCE
    assert (np.abs(ours.astype(np.float64) - theirs) <= bound).all()


def test_16_bit_data_have_the_bits_of_float32_rounded():
    given = operands(SIZES["64 channels"], dtype=bfloat16)
    by_float32 = call([x if x is None else x.astype(np.float32) for x in given])
    assert (call(given) == by_float32.astype(bfloat16)).all()


DTYPES = {
    "a wider embedding": ("eeedE", np.float16),
    "integers": ("iiiff", np.float64),
    "mixed": ("fdfff", np.float64),
    "half and bfloat16": ("eEeee", np.float32),
    "swapped bytes": ("sssss", np.float32),
}


@pytest.mark.parametrize(("kinds", "result"), DTYPES.values(), ids=DTYPES)
def test_dtypes(kinds, result):
    names = {"e": np.float16, "E": bfloat16, "s": ">f4"}
    given = [
        (3 * x).astype(names.get(kind, kind))
        for x, kind in zip(operands(SIZES["small"], gate_key=True), kinds, strict=True)
    ]
    ours = call(given)
    assert ours.dtype == result
    theirs = expected(*given)
    bound = HALF_ULP.get(np.dtype(result), 0) * np.abs(theirs) + FLOAT32_TOLERANCE
    assert (np.abs(ours - theirs) <= bound).all()


@pytest.mark.parametrize("n_position", [2, 8, 64, 500])
def test_float32_is_no_worse_than_the_listing_in_float32(n_position, measured):
    ours, theirs = [], []
    for seed in range(6):
        given = operands((1, 2, 2, 400, 400, 64, n_position), 10 * seed, np.float32)
        exact = expected(*given)
        listed = by_listing(*map(torch.from_numpy, given[:4])).numpy()
        ours.append(error(call(given), exact))
        theirs.append(error(listed, exact))
    measured(
        f"cope_attention float32, P = {n_position}: "
        f"error {max(ours):.1e}, listing {max(theirs):.1e}"
    )
    assert max(ours) <= max(theirs)


def test_one_position_is_plain_attention():
    """All keys get the same bonus, so there is none."""
    q, k, v, embedding, _ = operands(SIZES["one position"])
    plain = torch.nn.functional.scaled_dot_product_attention
    theirs = plain(*map(wide, (q, k, v)), is_causal=True).numpy()
    assert error(cope_attention(q, k, v, embedding), theirs) < FLOAT64_TOLERANCE


def test_gates_of_one_count_tokens():
    """Keys of one huge product with all queries: positions are distances plus 1."""
    q, k, v, _, _ = operands((1, 1, 1, 20, 20, 4, 1), dtype=np.float32)
    q[..., 0], k[..., 0] = 100, 1
    embedding = random(4, 21, dtype=np.float32)
    token = torch.arange(20)
    distance = (token[:, None] - token + 1).clamp(min=0)
    bias = (wide(q) @ wide(embedding)).gather(-1, distance[None, None])
    logits = wide(q) @ wide(k).mT / 2 + bias
    logits = logits.masked_fill(~visible(20, 20, True), -torch.inf)
    theirs = (torch.softmax(logits, -1) @ wide(v)).numpy()
    ours = cope_attention(q, k, v, embedding)
    # Logits of up to 400, whose last place is 2**-15.
    assert error(ours, theirs) < 2.0**-12


# --- shapes --------------------------------------------------------------------------


def test_without_a_head_axis():
    q, k, v, embedding, gate = operands(SIZES["20 channels"], gate_key=True)
    mask = np.random.default_rng(0).random((40, 40)) < 0.7
    theirs = cope_attention(
        q[:, :1], k, v, embedding, gate_key=gate, mask=mask, causal=False
    )
    ours = cope_attention(
        q[0, 0],
        k[0, 0],
        v[0, 0],
        embedding[None],
        gate_key=gate[0, 0],
        mask=mask,
        causal=False,
    )
    assert ours.shape == (40, 20)
    assert (ours == theirs[0, 0]).all()
    several = cope_attention(q[0], k[0, 0], v[0, 0], embedding)
    assert (several == cope_attention(q[0], k[0], v[0], embedding)).all()


def test_batch_axes_are_broadcast():
    q, k, v = random(3, 1, 4, 5, 8), random(2, 2, 6, 8), random(3, 1, 2, 6, 8, seed=1)
    embedding = random(4, 8, 3)
    mask = np.random.default_rng(0).random((3, 1, 1, 5, 6)) < 0.7
    ours = cope_attention(q, k, v, embedding, mask=mask)
    assert ours.shape == (3, 2, 4, 5, 8)
    for i, j in itertools.product(range(3), range(2)):
        one = cope_attention(q[i, 0], k[j], v[i, 0], embedding, mask=mask[i, 0])
        assert (ours[i, j] == one).all()
    assert cope_attention(q[0, 0], k, v, embedding).shape == (3, 2, 4, 5, 8)


EMPTY = {
    "batch": (0, 6, 2, 40, 40, 16, 8),
    "heads": (2, 0, 0, 40, 40, 16, 8),
    "queries": (2, 6, 2, 0, 40, 16, 8),
    "keys": (2, 6, 2, 40, 0, 16, 8),
    "queries and keys": (2, 6, 2, 0, 0, 16, 8),
}


@pytest.mark.parametrize("size", EMPTY.values(), ids=EMPTY)
def test_empty(size):
    given = operands(size, gate_key=True)
    for options in ({}, {"causal": False, "mask": np.ones((size[3], 1), bool)}):
        ours = call(given, **options)
        assert ours.shape == given[0].shape
        assert not ours.any()


def test_queries_that_see_nothing_get_zeros():
    given = operands(SIZES["more queries than keys"])
    ours = call(given)
    assert not ours[:, :, :37].any()
    assert ours[:, :, 37:].all()
    mask = np.ones((70, 33), bool)
    mask[50] = False
    out = np.full_like(ours, np.nan)
    assert not call(given, mask=mask, causal=False, out=out)[:, :, 50].any()
    assert not call(given, mask=np.zeros((1, 1), bool)).any()


# --- memory --------------------------------------------------------------------------


def test_results_lie_in_memory_as_the_queries():
    given = operands(SIZES["square"], dtype=np.float32)
    ours = call(given)
    assert ours.swapaxes(1, 2).flags.c_contiguous
    packed = [x if x is None else np.ascontiguousarray(x) for x in given]
    assert call(packed).flags.c_contiguous
    assert (call(packed) == ours).all()


def in_memory(x, form):
    """The same numbers in other memory."""
    if form == "negative":
        return x[..., ::-1].copy()[..., ::-1]
    if form == "every other":
        space = np.zeros((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), x.dtype)
        space[..., ::2, ::3] = x
        return space[..., ::2, ::3]
    if form == "transposed":
        return x.swapaxes(-1, -2).copy().swapaxes(-1, -2)
    space = np.zeros(x.nbytes + 1, np.uint8)  # misaligned
    moved = np.frombuffer(space.data, x.dtype, x.size, 1).reshape(x.shape)
    moved[...] = x
    return moved


@pytest.mark.parametrize("dtype", [np.float64, np.float32, bfloat16])
@pytest.mark.parametrize("form", ["negative", "every other", "transposed", "odd"])
def test_any_memory(form, dtype):
    given = operands(SIZES["64 channels"], dtype=dtype, gate_key=True)
    mask = masks(SIZES["64 channels"])["some"]["mask"]
    theirs = call(given, mask=mask)
    mask = in_memory(mask, form) if form != "odd" else mask
    moved = [in_memory(x, form) for x in given]
    before = [x.tobytes() for x in moved]
    assert (call(moved, mask=mask) == theirs).all()
    out = in_memory(np.full_like(theirs, np.nan), form)
    assert call(moved, mask=mask, out=out) is out
    assert (out == theirs).all()
    assert before == [x.tobytes() for x in moved]


def test_expanded_operands():
    q, k, v, embedding, _ = operands(SIZES["square"])
    one = [np.broadcast_to(x[:1, :1], x.shape) for x in (q, k, v)]
    packed = [x.copy() for x in one]
    ours = cope_attention(*one, embedding)
    assert (ours == cope_attention(*packed, embedding)).all()


def test_lists_and_subclasses():
    class Mine(np.ndarray):
        pass

    q, k, v, embedding, _ = operands(SIZES["small"])
    theirs = cope_attention(q, k, v, embedding)
    assert (cope_attention(*(x.tolist() for x in (q, k, v, embedding))) == theirs).all()
    ours = cope_attention(q.view(Mine), k, v.view(Mine), embedding)
    assert type(ours) is np.ndarray
    assert (ours == theirs).all()


def test_out_may_overlap_what_is_read():
    q, k, v, embedding, _ = operands(SIZES["square"])
    theirs = cope_attention(q, k, v, embedding)
    for i in range(3):
        given = [x.copy() for x in (q, k, v)]
        assert cope_attention(*given, embedding, out=given[i]) is given[i]
        assert (given[i] == theirs).all()
    space = np.zeros((2, 3, 34, 16))
    space[:, :, 1:] = q
    cope_attention(space[:, :, 1:], k, v, embedding, out=space[:, :, :-1])
    assert (space[:, :, :-1] == theirs).all()


def test_out_of_merged_batch_axes():
    q = random(2, 3, 4, 5, 8)
    k, v, embedding = random(4, 6, 8), random(4, 6, 8, seed=1), random(8, 3)
    theirs = cope_attention(q, k, v, embedding)
    out = np.empty((3, 2, 4, 5, 8)).swapaxes(0, 1)
    assert cope_attention(q, k, v, embedding, out=out) is out
    assert (out == theirs).all()


def test_tensors_in_tensors_out():
    given = operands(SIZES["64 channels"], dtype=np.float32, gate_key=True)
    q, k, v, embedding, gate = map(torch.from_numpy, given)
    mask = torch.rand(65, 97) < 0.7
    theirs = call(given, mask=mask.numpy())
    ours = cope_attention(q, k, v, embedding, gate_key=gate, mask=mask)
    assert type(ours) is torch.Tensor
    assert ours.stride() == q.stride()
    assert (ours.numpy() == theirs).all()
    out = torch.empty(1, 2, 65, 64)
    ours = cope_attention(q, k, v, embedding, gate_key=gate, mask=mask, out=out)
    assert ours is out
    assert (out.numpy() == theirs).all()
    ours = cope_attention(*(t.bfloat16() for t in (q, k, v)), embedding)
    assert ours.dtype == torch.bfloat16


# --- numbers out of the ordinary -----------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, bfloat16])
def test_bad_queries_stay_in_their_row(bad, dtype):
    q, k, v, embedding, _ = operands(SIZES["grouped"], dtype=dtype)
    theirs = cope_attention(q, k, v, embedding)
    q = q.copy()
    q[1, 3, 17, 5] = bad
    ours = cope_attention(q, k, v, embedding)
    others = np.ones((2, 6, 40), bool)
    others[1, 3, 17] = False
    assert (ours[others] == theirs[others]).all()
    assert np.isnan(ours[1, 3, 17].astype(np.float32)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v", "gate_key"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, bfloat16])
def test_bad_keys_and_values_reach_only_who_sees_them(where, bad, dtype):
    size = SIZES["grouped"]
    names = "q", "k", "v", "position_embedding", "gate_key"
    given = dict(zip(names, operands(size, dtype=dtype, gate_key=True), strict=True))
    mask = masks(size)["some"]["mask"]
    for options in ({}, {"mask": mask}, {"mask": mask, "causal": False}):
        theirs = cope_attention(**given, **options)
        changed = given[where].copy()
        changed[1, 1, 23, 3] = bad
        ours = cope_attention(**(given | {where: changed}), **options)
        seen = visible(40, 40, options.get("causal", True)).numpy()
        seen = np.broadcast_to(seen, mask.shape) & options.get("mask", True)
        sees = np.zeros((2, 6, 40), bool)
        sees[1, 3:] = seen[1, 3:, :, 23]
        assert (ours[~sees] == theirs[~sees]).all()
        is_bad = np.isnan(ours[sees].astype(np.float32)).any(-1)
        if np.isnan(bad) and where == "gate_key":  # not read past the last position
            assert is_bad.any()
            assert (ours[sees][~is_bad] == theirs[sees][~is_bad]).all()
        elif np.isnan(bad):
            assert is_bad.all()


@pytest.mark.parametrize("where", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, bfloat16])
def test_bad_padding_reaches_nobody(where, dtype):
    """Padding of whole tiles, which no query of a block sees."""
    given = list(operands((2, 4, 2, 70, 200, 16, 8), dtype=dtype, gate_key=True))
    for n_query in (70, 1):
        given[0] = given[0][:, :, :n_query]
        for hidden in (slice(100, 200), slice(100)):
            mask = np.ones((2, 1, 1, 200), bool)
            mask[1, ..., hidden] = False
            theirs = call(given, mask=mask)
            changed = list(given)
            changed[where] = given[where].copy()
            changed[where][1, :, hidden] = np.nan
            assert (call(changed, mask=mask) == theirs).all()


def test_large_logits_do_not_overflow():
    q, k, v, embedding, _ = operands(SIZES["64 channels"], dtype=np.float32)
    for factor in (1e2, 1e4, 1e15):
        ours = cope_attention(q * np.float32(factor), k, v, embedding)
        assert np.isfinite(ours).all()
        assert (np.abs(ours) <= np.abs(v).max() * (1 + 2.0**-20)).all()


def test_nothing_warns():
    q, k, v, embedding, _ = operands(SIZES["small"], dtype=np.float32)
    with np.errstate(all="raise"):
        cope_attention(q * np.float32(1e30), k, v * np.nan, embedding)
        cope_attention(q.astype(np.float16), k.astype(np.float64) * 1e300, v, embedding)


# --- threads and bits ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_same_bits_for_any_number_of_threads(dtype, causal):
    given = operands((1, 3, 1, 300, 350, 64, 16), dtype=dtype)
    results = []
    try:
        for n_thread in N_THREAD:
            posenc.set_num_threads(n_thread)
            results.append(call(given, causal=causal).tobytes())
    finally:
        posenc.set_num_threads(None)
    assert len(set(results)) == 1


def test_rows_depend_on_nothing_but_what_they_see():
    """Heads and batch elements are independent; so are queries, but for blocking."""
    q, k, v, embedding, _ = operands(SIZES["grouped"], dtype=np.float32)
    ours = cope_attention(q, k, v, embedding)
    one = cope_attention(q[1:, 3:4], k[1:, 1:], v[1:, 1:], embedding)
    assert (ours[1, 3] == one[0, 0]).all()
    last = cope_attention(q[:, :, 30:], k, v, embedding)
    assert error(last, ours[:, :, 30:].astype(np.float64)) < FLOAT32_TOLERANCE
    first = cope_attention(q[:, :, :30], k[:, :, :30], v[:, :, :30], embedding)
    assert error(first, ours[:, :, :30].astype(np.float64)) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("n_query", [1, 40], ids=["one", "a block"])
def test_bad_queries_that_see_nothing_give_zeros(n_query):
    q, k, v, embedding, _ = operands(SIZES["grouped"], dtype=np.float32)
    q = q[..., :n_query, :].copy()
    q[..., 0, :] = np.nan
    mask = np.ones((n_query, k.shape[-2]), bool)
    mask[0] = False
    out = cope_attention(q, k, v, embedding, causal=False, mask=mask)
    assert (out[..., 0, :] == 0).all()
    assert np.isfinite(out).all()


def test_tiny_logits_are_not_nothing():
    k = np.linspace(0.5, 1.0, 9, dtype=np.float32)[:, None] * 1e16
    q = np.full((9, 1), -1e16, np.float32)
    out = cope_attention(q, k, k, np.zeros((1, 2), np.float32), scale=1.0)
    assert (out == k[0]).all()


@pytest.mark.parametrize("name", ["k", "position_embedding"])
def test_sizes_beyond_memory_are_refused(name):
    long = np.broadcast_to(np.float32(0.1), (2**59, 1))
    k = long if name == "k" else np.ones((3, 1), np.float32)
    embedding = long.T if name != "k" else np.ones((1, 3), np.float32)
    if name != "k":
        k = long  # positions past the number of keys are not computed
    with pytest.raises(MemoryError):
        cope_attention(np.ones((1, 1), np.float32), k, k, embedding)
