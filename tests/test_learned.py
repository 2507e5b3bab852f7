"""Learned tables: PyTorch's embedding and sum bit for bit, and longer tables."""

# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16

import posenc

DTYPES = (np.float16, bfloat16, np.float32, np.float64)

# Products, sums and a division of float64, in whatever order.
FEW_ROUNDINGS = 8 * np.finfo(np.float64).eps

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- PyTorch -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_bits_are_those_of_an_embedding_and_a_sum(name, shape):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    dtype = getattr(torch, name)
    embed = torch.nn.Embedding(50, 129, dtype=dtype)
    x = torch.randn(3, 7, 129).to(dtype)
    positions = torch.randint(0, 50, shape)
    with torch.no_grad():
        want = x + embed(positions)
        got = posenc.add_learned(x, embed.weight, positions=positions)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_the_embeddings_of_bert():
    """Words and positions of transformers' own module, before its other parts."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, vocab_size=40, max_position_embeddings=16
    )
    from transformers.models.bert.modeling_bert import BertEmbeddings

    module = BertEmbeddings(config).eval()
    tokens = torch.randint(0, 40, (2, 16))
    with torch.no_grad():
        kinds = module.token_type_embeddings(torch.zeros_like(tokens))
        words = module.word_embeddings(tokens) + kinds
        mine = posenc.add_learned(words, module.position_embeddings.weight)
        assert torch.equal(module.LayerNorm(mine), module(tokens))


# --- values --------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("other", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("dim", [1, 3, 64, 130])
def test_a_sum_is_a_product_and_a_sum(dtype, other, dim):
    x, table = normal(3, 20, dim, dtype=dtype), normal(20, dim, dtype=other, seed=1)
    got = posenc.add_learned(x, table, scale=2.7)
    narrow = np.dtype(dtype).itemsize == 2
    if narrow and other is not np.float64:
        kind = np.dtype(dtype)
    else:
        kind = np.float64 if np.float64 in (dtype, other) else np.dtype(np.float32)
    want = reference.scale_and_add(x.astype(kind), 2.7, table)
    reference.same_bits(got, want)


@pytest.mark.parametrize(
    "shape", [(5,), (2, 5), (1, 5), (2, 1), (2, 1, 5), (2, 3, 5), (2, 3, 1), ()]
)
def test_positions_broadcast(shape):
    x, table = normal(2, 3, 5, 8), normal(11, 8, seed=1)
    positions = np.random.default_rng(1).integers(0, 11, shape)
    whole = positions[:, None] if len(shape) == 2 else positions
    whole = np.broadcast_to(whole, (2, 3, 5))
    for kind in (np.int64, np.int32, np.uint8):
        got = posenc.add_learned(x, table, positions=positions.astype(kind))
        reference.same_bits(got, x + table[whole])


@every_dtype
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), ()])
def test_padding_becomes_zero_and_its_positions_are_not_looked_at(dtype, shape):
    x, table = normal(2, 3, 5, 6, dtype=dtype), normal(9, 6, dtype=dtype, seed=1)
    mask = np.random.default_rng(3).random(shape) < 0.5
    positions = np.where(mask, -1, 3)
    want = posenc.add_learned(x, table, positions=3)
    whole = mask[:, None] if len(shape) == 2 else mask
    hidden = np.broadcast_to(whole, (2, 3, 5))
    want[hidden], x[hidden] = 0, np.resize([np.nan, np.inf, -np.inf], 6)
    got = posenc.add_learned(x, table, positions=positions, padding_mask=mask)
    reference.same_bits(got, want)


def test_packed_sequences_and_decode_steps():
    x, table = normal(3, 9, 6), normal(30, 6, seed=1)
    got = posenc.add_learned(x, table, cu_seqlens=[0, 4, 4, 9], offset=[1, 0, 2])
    numbers = reference.packed_positions([0, 4, 4, 9], [1, 0, 2])
    reference.same_bits(got, x + table[numbers])
    got = posenc.add_learned(x, table, offset=21)
    reference.same_bits(got, x + table[21:])
    got = posenc.add_learned(x, table, offset=[0, 5, 21])
    want = [x[i] + table[at : at + 9] for i, at in enumerate((0, 5, 21))]
    reference.same_bits(got, np.stack(want))


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({}, "512 for token 512"),
        ({"offset": 1}, "512 for token 511"),
        ({"offset": [0, 5]}, "512 for token 512"),
        ({"offset": -1}, "-1 for token 0"),
        ({"positions": np.arange(513)}, "512 at index (512,)"),
        ({"positions": np.arange(513) - 3}, "-3 at index (0,)"),
        ({"cu_seqlens": [0, 513]}, "512 for token 512"),
    ],
    ids=str,
)
def test_a_position_outside_the_table_is_named(options, got):
    x, table = np.zeros((2, 513, 4)), np.zeros((512, 4))
    with pytest.raises(ValueError, match=r"in \[0, 512\), the rows of table") as caught:
        posenc.add_learned(x, table, **options)
    assert got in str(caught.value)


# --- memory --------------------------------------------------------------------------


@every_dtype
@given(data=st.data())
def test_sums_in_any_memory(dtype, data):
    from gufuncs import lay_out

    def choose(options):
        return data.draw(st.sampled_from(options))

    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    dim = choose([0, 1, 2, 3, 8, 17, 40])
    x, table = normal(*shape, dim, dtype=dtype), normal(6, dim, dtype=dtype, seed=1)
    rng = np.random.default_rng(4)
    mask, positions = rng.random(shape) < 0.3, rng.integers(0, 6, shape)
    want = reference.scale_and_add(x, 0.5, table[positions])
    want[mask] = 0
    options = {"scale": 0.5, "positions": lay_out(positions, choose)}
    options |= {"padding_mask": lay_out(mask, choose)}
    given_, rows = lay_out(x, choose), lay_out(table, choose)
    before = given_.tobytes(), rows.tobytes()
    reference.same_bits(posenc.add_learned(given_, rows, **options), want)
    assert before == (given_.tobytes(), rows.tobytes())
    out = lay_out(np.full(x.shape, 7, x.dtype), choose)
    out.flags.writeable = True
    if out.dtype.isnative:
        assert posenc.add_learned(given_, rows, **options, out=out) is out
        reference.same_bits(np.ascontiguousarray(out), want)


@every_dtype
@pytest.mark.parametrize("start", range(3))
def test_large_results_are_the_same_wherever_they_lie(dtype, start):
    x, table = normal(4, 1900, 600, dtype=dtype), normal(1900, 600, dtype=dtype)
    want = reference.scale_and_add(x, 2.0, table)
    memory = np.zeros(x.size + 64, dtype)
    out = memory[start : start + x.size].reshape(x.shape)
    reference.same_bits(posenc.add_learned(x, table, scale=2.0, out=out), want)
    assert not memory[:start].any()
    assert not memory[start + x.size :].any()


def test_out_may_be_the_data_or_the_table():
    x, table = normal(30, 8), normal(30, 8, seed=1)
    want = x + table
    own = x.copy()
    assert posenc.add_learned(own, table, out=own) is own
    reference.same_bits(own, want)
    own = table.copy()
    posenc.add_learned(x, own, positions=np.arange(30)[::-1], out=own)
    reference.same_bits(own, x + table[::-1])
    numbers = np.arange(60)[::-1].reshape(30, 2) % 30
    memory = numbers.astype(np.int64)
    wide = posenc.add_learned(
        np.zeros((30, 2)),
        np.arange(60.0).reshape(30, 2),
        positions=memory[:, 0],
        out=memory.view(np.float64),
    )
    reference.same_bits(wide, np.arange(60.0).reshape(30, 2)[numbers[:, 0]])


def test_a_nan_is_the_one_nan():
    x = np.array([[0xFFC12345, 0x7F800000]], np.uint32).view(np.float32)
    got = posenc.add_learned(x, np.array([[1, -np.inf]], np.float32))
    assert (got.view(np.uint32) == 0x7FC00000).all()


@every_dtype
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 9])
def test_rows_by_turns_with_what_rounds_in_its_own_way(dtype, batch):
    # Subnormals, zeros, infinities and NaN, among numbers that are no trouble.
    rng = np.random.default_rng(7)
    tiny = 1e-7 if dtype == np.float16 else 1e-40
    x = rng.standard_normal((batch, 70, 67))
    x *= rng.choice([1.0, 0.0, tiny, np.inf], x.shape, p=[0.9, 0.04, 0.04, 0.02])
    x[:, 3, 5] = np.nan
    x = x.astype(dtype)
    table = (rng.standard_normal((70, 67)) * tiny).astype(dtype)
    table[40:, ::3] = rng.standard_normal((30, 23))
    mask = rng.random((batch, 70)) < 0.1
    got = posenc.add_learned(x, table, padding_mask=mask)
    want = reference.scale_and_add(x, 1, table)
    want[mask] = 0
    reference.same_bits(got, want)


def test_the_number_of_threads_changes_nothing():
    x, table = normal(2, 700, 300), normal(700, 300, seed=1)
    results = []
    try:
        for n_thread in (1, 2, 5):
            posenc.set_num_threads(n_thread)
            results.append(posenc.add_learned(x, table, scale=2.0))
    finally:
        posenc.set_num_threads(None)
    for result in results:
        reference.same_bits(result, results[0])


@pytest.mark.parametrize("scale", [1.0, 2.7])
@pytest.mark.parametrize(
    "dtype", [np.float16, bfloat16, np.float32, np.float64, np.int32, np.uint8]
)
@pytest.mark.parametrize(
    "other", [np.float16, bfloat16, np.float32, np.float64, np.int32]
)
def test_dask_arrays_stay_lazy(dtype, other, scale):
    da = pytest.importorskip("dask.array")
    x = (10 * normal(4, 30, 8)).astype(dtype)
    table = (10 * normal(30, 8, seed=1)).astype(other)
    lazy = da.from_array(x, chunks=(2, 7, 8))
    mask = np.random.default_rng(5).random((4, 30)) < 0.5
    got = posenc.add_learned(lazy, table, scale=scale, padding_mask=mask)
    assert isinstance(got, da.Array)
    want = posenc.add_learned(x, table, scale=scale, padding_mask=mask)
    assert got.dtype == want.dtype
    reference.same_bits(got.compute(), want)


# --- longer tables -------------------------------------------------------------------


def by_digits(table, length, alpha):
    """p[i n + j] = alpha u[i] + (1 - alpha) u[j], position by position."""
    n, rows = len(table), []
    u = [(row - alpha * table[0]) / (1 - alpha) for row in table]
    for position in range(length):
        i, j = divmod(position, n)
        rows.append(alpha * u[i] + (1 - alpha) * u[j])
    return np.array(rows)


@every_dtype
@pytest.mark.parametrize("alpha", [0.4, 0.1, 0.7])
def test_hierarchical_is_the_formula_and_keeps_the_first_rows(dtype, alpha):
    table = normal(7, 5, dtype=dtype)
    for length in (7, 8, 20, 49):
        got = posenc.extend_table(table, length, alpha=alpha)
        assert got.dtype == dtype
        reference.same_bits(got[:7], table)
        want = by_digits(table.astype(np.float64), length, alpha)
        if dtype == np.float64:
            size = np.abs(table).max() / (1 - alpha)  # of the rows u
            np.testing.assert_allclose(got, want, rtol=0, atol=FEW_ROUNDINGS * size)
        else:
            reference.same_bits(got, want.astype(dtype))


def test_hierarchical_reaches_the_square_and_no_further():
    table = normal(512, 4)
    assert posenc.extend_table(table, 512**2).shape == (512**2, 4)
    with pytest.raises(ValueError, match="be at most 262144"):
        posenc.extend_table(table, 512**2 + 1)
    rows = posenc.extend_table(table[:9], 81)
    assert len(np.unique(rows, axis=0)) == 81


def test_tile_copies_the_rows():
    table = normal(5, 3, dtype=bfloat16)
    got = posenc.extend_table(table, 13, method="tile")
    reference.same_bits(got, table[np.arange(13) % 5])


@pytest.mark.parametrize("length", [6, 7, 11, 12, 50])
def test_linear_is_the_interpolation_of_torch(length):
    torch = pytest.importorskip("torch")
    table = torch.from_numpy(normal(6, 4, dtype=np.float64))
    want = torch.nn.functional.interpolate(
        table.T[None], length, mode="linear", align_corners=True
    )[0].T
    got = posenc.extend_table(table, length, method="linear")
    assert isinstance(got, torch.Tensor)
    tolerance = FEW_ROUNDINGS * float(table.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    assert torch.equal(got[[0, -1]], table[[0, -1]])


@every_dtype
def test_linear_is_rounded_once(dtype):
    table = normal(6, 4, dtype=dtype)
    wide = posenc.extend_table(table.astype(np.float64), 23, method="linear")
    got = posenc.extend_table(table, 23, method="linear")
    reference.same_bits(got, wide.astype(dtype))


def test_linear_keeps_old_rows_whatever_lies_beside_them():
    table = np.array([[0.0], [np.inf], [1.0], [np.nan], [-0.0]])
    got = posenc.extend_table(table, 9, method="linear")
    reference.same_bits(got[::2], table)
    reference.same_bits(posenc.extend_table(table, 5, method="linear"), table)


def test_linear_of_several_blocks_is_that_of_each_row():
    """Rows of a wide table, and one channel of it, which fits in one block."""
    table = normal(40, 3000)
    got = posenc.extend_table(table, 111, method="linear")
    want = posenc.extend_table(table[:, 70:71], 111, method="linear")
    reference.same_bits(np.ascontiguousarray(got[:, 70:71]), want)
    place = np.arange(111) * (39 / 110)
    for channel in (0, 2999):
        want = np.interp(place, np.arange(40), table[:, channel].astype(np.float64))
        tolerance = np.spacing(np.abs(table).max())  # float32, and a few of float64
        np.testing.assert_allclose(got[:, channel], want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["linear", "tile"])
@pytest.mark.parametrize("alpha", [0.5, 1, None], ids=str)
def test_alpha_is_looked_at_by_hierarchical_only(method, alpha):
    table = normal(5, 3)
    want = posenc.extend_table(table, 12, method=method)
    got = posenc.extend_table(table, 12, method=method, alpha=alpha)
    reference.same_bits(got, want)
    with pytest.raises((TypeError, ValueError), match=r"^extend_table: alpha must be"):
        posenc.extend_table(table, 12, alpha=alpha)


def test_a_table_of_one_row():
    for method in ("linear", "tile"):
        got = posenc.extend_table([[3.0, 4.0]], 3, method=method)
        reference.same_bits(got, np.array([[3.0, 4.0]] * 3))
    assert posenc.extend_table([[3.0]], 1).tolist() == [[3.0]]


@pytest.mark.parametrize("method", ["hierarchical", "linear", "tile"])
def test_a_longer_table_goes_to_out(method):
    table = normal(5, 3)
    want = posenc.extend_table(table, 12, method=method)
    memory = np.zeros((12, 6), np.float32)
    out = memory[::-1, ::2]
    assert posenc.extend_table(table, 12, method=method, out=out) is out
    reference.same_bits(out, want)
    own = np.zeros((12, 3), np.float32)
    own[7:] = table
    posenc.extend_table(own[7:], 12, method=method, out=own)
    reference.same_bits(own, want)
