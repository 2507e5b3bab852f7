"""Rotation: against torch and transformers, by algebra, and door against door."""

# SPDX-License-Identifier: BSD-3-Clause

import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path

import fuzz_doors
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import posenc
from posenc import rope, rope_cis, rope_complex, rope_matrix, rope_qk, rope_table

HERE = Path(__file__).resolve().parent
UNIT = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53}

# In units of rounding u times the length r of a pair, per channel. Rotation: two
# products and a sum round, each by at most u r (times the attention factor).
ROTATION_BOUND = 2.01
# Rotate and undo: the first rotation's errors as a vector, 2 sqrt(2) u r, the
# rounded inverse table, u r, and the second rotation, 2 u r. In float64 the inverse
# table is itself computed in float64: two roundings more in cos^2 + sin^2.
INVERSE_BOUND = {np.dtype(np.float32): 5.84, np.dtype(np.float64): 7.84}
# <Rx, y> = <x, R'y>: each side's products carry errors of at most 2 u r per channel,
# as a vector 2 sqrt(2) u |x|, so 4 sqrt(2) u |x| |y| for both.
ADJOINT_BOUND = 5.7
# Scores of rotated q and k: two tables within 1 ulp (2 u) each and two rotations,
# as vectors: 2 (2 sqrt(2) + 2 sqrt(2)) u |q| |k|; twice, for two pairs of positions.
RELATIVE_BOUND = 2 * 2 * 2 * 2.83
# torch may fuse a product into the sum: its result too is within the bound.
FUSED_BOUND = 2 * ROTATION_BOUND

both_layouts = pytest.mark.parametrize("layout", ["half", "interleaved"])
both_types = pytest.mark.parametrize(
    "dtype", [np.float32, np.float64], ids=["float32", "float64"]
)


class Marked(np.ndarray):
    """A subclass: it comes back, and goes through the gufuncs."""


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def table(n_position, n_pair, dtype=np.float32, factor=1.0, theta=1e4):
    inv_freq = theta ** (-np.arange(n_pair) / n_pair)
    return rope_table(
        np.arange(n_position), inv_freq, attention_factor=factor, dtype=dtype
    )


def pair_length(x, n_pair, layout):
    """Length of each rotated pair, at both of its channels."""
    rotated = x[..., : 2 * n_pair].astype(np.float64)
    if layout == "half":
        both = np.hypot(rotated[..., :n_pair], rotated[..., n_pair:])
        return np.concatenate([both, both], axis=-1)
    return np.repeat(np.hypot(rotated[..., ::2], rotated[..., 1::2]), 2, axis=-1)


# --- other people's programs ---------------------------------------------------------


@pytest.mark.parametrize("n_head", [(8, 8), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 64, 80, 128])
def test_half_is_llama_bit_for_bit(n_head, head_dim):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q = random((2, n_head[0], 7, head_dim))
    k = random((2, n_head[1], 7, head_dim), seed=1)
    cos, sin = table(7, head_dim // 2)
    full = [torch.from_numpy(np.concatenate([t, t], -1))[None] for t in (cos, sin)]
    want = llama.apply_rotary_pos_emb(torch.from_numpy(q), torch.from_numpy(k), *full)
    got = rope_qk(q, k, cos, sin)
    for left, right in zip(got, want, strict=True):
        assert np.array_equal(left, right.numpy())


def test_axis_is_llamas_unsqueeze_dim():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = random((2, 7, 4, 32)), random((2, 7, 1, 32), seed=1)
    cos, sin = (random((2, 7, 16), seed=s) for s in (2, 3))
    full = [torch.from_numpy(np.concatenate([t, t], -1)) for t in (cos, sin)]
    want = llama.apply_rotary_pos_emb(
        torch.from_numpy(q), torch.from_numpy(k), *full, unsqueeze_dim=2
    )
    for left, right in zip(rope_qk(q, k, cos, sin, axis=1), want, strict=True):
        assert np.array_equal(left, right.numpy())


@pytest.mark.parametrize("n_pair", [1, 8, 32])
def test_interleaved_is_gptj_bit_for_bit(n_pair):
    torch = pytest.importorskip("torch")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = random((2, 9, 4, 64))
    cos, sin = (random((2, 9, n_pair), seed=s) for s in (2, 3))
    rotated = gptj.apply_rotary_pos_emb(
        torch.from_numpy(x[..., : 2 * n_pair]),
        torch.from_numpy(sin),
        torch.from_numpy(cos),
    )
    want = np.concatenate([rotated.numpy(), x[..., 2 * n_pair :]], axis=-1)
    got = rope(x, cos, sin, layout="interleaved", axis=1)
    assert np.array_equal(got, want)


def test_interleaved_is_cohere_bit_for_bit():
    torch = pytest.importorskip("torch")
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    q, k = random((2, 4, 9, 64)), random((2, 2, 9, 64), seed=1)
    cos, sin = (random((2, 9, 32), seed=s) for s in (2, 3))
    full = [torch.from_numpy(np.repeat(t, 2, axis=-1)) for t in (cos, sin)]
    want = cohere.apply_rotary_pos_emb(torch.from_numpy(q), torch.from_numpy(k), *full)
    got = rope_qk(q, k, cos, sin, layout="interleaved")
    for left, right in zip(got, want, strict=True):
        assert np.array_equal(left, right.numpy())


@both_types
def test_complex_is_torchs_view_as_complex_recipe(dtype):
    torch = pytest.importorskip("torch")
    x = random((2, 9, 4, 64), dtype)
    inv_freq = 1e4 ** (-np.arange(32) / 32)
    kind = np.result_type(dtype, np.complex64)
    cis = rope_cis(np.arange(9), inv_freq, dtype=kind)
    pairs = torch.view_as_complex(torch.from_numpy(x).reshape(2, 9, 4, 32, 2))
    product = pairs * torch.from_numpy(cis)[:, None, :]
    want = torch.view_as_real(product).flatten(-2).numpy()
    got = rope_complex(x, cis, axis=1)
    bound = FUSED_BOUND * UNIT[x.dtype] * pair_length(x, 32, "interleaved")
    assert got.dtype == x.dtype
    assert (np.abs(got.astype(np.float64) - want) <= bound).all()


def test_angles_float32_follow_transformers_within_one_ulp(measured):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    count = different = 0
    for theta, head_dim in ((1e4, 128), (5e5, 64), (1e6, 128)):
        config = LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
        module = llama.LlamaRotaryEmbedding(config)
        positions = np.concatenate([np.arange(4096), [131071, 1048575, 2**24 + 1]])
        want = module(torch.zeros(1), torch.from_numpy(positions)[None])
        inv_freq = module.inv_freq.numpy()
        got = rope_table(positions, inv_freq, angles="float32")
        for ours, theirs in zip(got, want, strict=True):
            theirs = theirs[0, :, : head_dim // 2].numpy()
            assert ours.dtype == np.float32
            ulp = np.spacing(np.maximum(np.abs(ours), np.abs(theirs)))
            assert (np.abs(ours - theirs) <= ulp).all()
            count, different = count + ours.size, different + (ours != theirs).sum()
    measured(
        f"angles='float32': {different} of {count} entries differ from transformers' "
        f"by one ulp, none by more"
    )


@pytest.mark.parametrize(
    "factor", [1.3465735902799727, 0.5, 1.1902380714238083], ids=["yarn", "½", "long"]
)
def test_angles_float32_round_before_the_factor(factor):
    positions, inv_freq = np.arange(100), (1e4 ** (-np.arange(8) / 8)).astype("f4")
    angle = positions[:, None].astype(np.float32) * inv_freq
    cos, sin = reference.extended_cos_sin(angle.astype(float), np.ones(1))
    got = rope_table(positions, inv_freq, angles="float32", attention_factor=factor)
    for ours, true in zip(got, (cos, sin), strict=True):
        want = true.astype(np.float32) * np.float32(factor)
        ulp = np.spacing(np.maximum(np.abs(ours), np.abs(want)))
        assert (np.abs(ours - want) <= ulp).all()


# --- the definition ------------------------------------------------------------------


@both_layouts
@both_types
def test_rotation_is_the_definition_to_its_bound(layout, dtype):
    x = random((3, 50, 40), dtype)
    cos, sin = table(50, 16, dtype)
    got = rope(x, cos, sin, layout=layout)
    wide = [a.astype(np.longdouble) for a in (x, cos, sin)]
    want = reference.rotate(*wide, layout=layout)
    bound = ROTATION_BOUND * UNIT[x.dtype] * pair_length(x, 16, layout)
    assert (np.abs(got - want)[..., :32] <= bound).all()
    reference.same_bits(got[..., 32:], x[..., 32:])


@both_layouts
@both_types
@pytest.mark.parametrize("rotary", [0, 2, 34, 80, 96])
def test_channels_past_the_table_are_copied(layout, dtype, rotary):
    x = random((2, 3, 5, 96), dtype)
    x[0, 0, 0, -1] = np.nan
    cos, sin = (random((5, rotary // 2), dtype, s) for s in (1, 2))
    got = rope(x, cos, sin, layout=layout)
    reference.same_bits(got, reference.rotate(x, cos, sin, layout))


@both_layouts
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -2, -3, -4, -5])
def test_axis_is_where_the_sequence_lies(layout, axis):
    shape = [2, 3, 4, 5, 12]
    x = random(shape)
    n_position = shape[axis]
    cos, sin = (random((n_position, 6), seed=s) for s in (1, 2))
    got = rope(x, cos, sin, layout=layout, axis=axis)
    reference.same_bits(got, reference.rotate(x, cos, sin, layout, axis))
    moved = rope(np.moveaxis(x, axis, -2), cos, sin, layout=layout)
    reference.same_bits(got, np.moveaxis(moved, -2, axis))


@both_layouts
@pytest.mark.parametrize(
    "rows",
    [(7,), (2, 7), (1, 7), (2, 1, 7), (2, 5, 7), (1, 5, 1), (1, 1, 1), (2, 5, 1)],
    ids=str,
)
def test_table_of_every_rank(layout, rows):
    x = random((2, 5, 7, 12))
    cos, sin = (random((*rows, 5), seed=s) for s in (1, 2))
    got = rope(x, cos, sin, layout=layout)
    reference.same_bits(got, reference.rotate(x, cos, sin, layout))


def test_table_with_as_many_axes_as_x_is_broadcast_whatever_the_axis():
    x = random((6, 3, 12))
    cos, sin = (random((6, 1, 5), seed=s) for s in (1, 2))
    got = rope(x, cos, sin, axis=0)
    reference.same_bits(got, reference.half(x, cos, sin))


def test_one_row_and_one_table_row():
    x, cos, sin = random(12), random(6, seed=1), random(6, seed=2)
    want = reference.half(x, cos, sin)
    reference.same_bits(rope(x, cos, sin), want)
    reference.same_bits(rope(x.view(Marked), cos, sin).view(np.ndarray), want)


@both_layouts
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (3, 2, 0)], ids=str)
def test_nothing_to_rotate(layout, shape):
    x = np.zeros(shape, np.float32)
    cos, sin = (np.zeros((shape[-2], shape[-1] // 2), np.float32) for _ in "cs")
    assert rope(x, cos, sin, layout=layout).shape == shape
    assert rope(x, cos, sin, layout=layout, out=x) is x
    assert rope_complex(x, cos + 1j * sin, out=x) is x
    assert rope_qk(x, x.copy(), cos, sin, out=(x, x.copy()))[0] is x


def test_no_positions_no_table():
    out = tuple(np.zeros((0, 3), np.float32) for _ in "cs")
    assert rope_table([], [1.0, 2.0, 3.0], out=out)[0] is out[0]
    out = tuple(np.zeros((3, 0), np.float32) for _ in "cs")
    assert rope_table([1, 2, 3], [], out=out)[0] is out[0]
    assert rope_cis([], [1.0, 2.0]).shape == (0, 2)


@pytest.mark.parametrize("order", ["BHTD", "BTHD", "THBD", "DTHB"])
@both_layouts
def test_memory_order_changes_nothing_and_is_kept(order, layout):
    place = [order.index(name) for name in "BHTD"]
    sizes = {"B": 2, "H": 3, "T": 7, "D": 16}
    x = random([sizes[name] for name in order]).transpose(place)
    cos, sin = table(7, 8)
    got = rope(x, cos, sin, layout=layout)
    reference.same_bits(got, reference.rotate(x, cos, sin, layout))
    assert got.strides == x.strides


def test_quarter_turn():
    for layout, x in (("half", [1.0, 2, 0, 0]), ("interleaved", [1.0, 0, 2, 0])):
        got = rope(np.array([x]), np.zeros((1, 2)), np.ones((1, 2)), layout=layout)
        want = {"half": [0, 0, 1, 2], "interleaved": [0, 1, 0, 2]}[layout]
        assert got.tolist() == [want]


# --- positions -----------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("kind", ["i1", "i4", "i8", "u1", "u4", ">i8"])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (1, 7)], ids=str)
def test_positions_gather_rows(layout, kind, shape):
    x = random((2, 3, 7, 20))
    cos, sin = (random((11, 8), seed=s) for s in (1, 2))
    positions = np.random.default_rng(3).integers(0, 11, shape).astype(kind)
    got = rope(x, cos, sin, layout=layout, positions=positions)
    want = reference.rotate(x, cos, sin, layout, positions=positions)
    reference.same_bits(got, want)
    aside = rope(
        np.swapaxes(x, 1, 2), cos, sin, layout=layout, positions=positions, axis=1
    )
    reference.same_bits(np.swapaxes(aside, 1, 2), want)


@pytest.mark.parametrize("bad", [-1, 11, 2**40, -(2**62)])
@pytest.mark.parametrize("place", [0, 6])
def test_a_position_outside_the_table_is_named(bad, place):
    x = random((2, 7, 20))
    cos, sin = (random((11, 8), seed=s) for s in (1, 2))
    positions = np.arange(7)
    positions[place] = bad
    out = np.full_like(x, 5)
    with pytest.raises(ValueError, match=rf"^rope: positions must .*{bad}"):
        rope(x, cos, sin, positions=positions, out=out)
    assert (out == 5).all()


@both_layouts
def test_decode_rows_are_prefill_rows(layout):
    x = random((2, 4, 33, 64))
    cos, sin = table(33, 32)
    prefill = rope(x, cos, sin, layout=layout)
    for t in (0, 1, 31, 32):
        here = np.s_[:, :, t : t + 1]
        rows = rope_table([t], 1e4 ** (-np.arange(32) / 32))
        reference.same_bits(rope(x[here], *rows, layout=layout), prefill[here])
        by_position = rope(x[here], cos, sin, layout=layout, positions=[t])
        reference.same_bits(by_position, prefill[here])


# --- offset and cu_seqlens -----------------------------------------------------------


def same_as(x, tables, positions, **options):
    """Assert that these options mean these positions, in all three functions."""
    by_position = {
        k: v for k, v in options.items() if k not in ("offset", "cu_seqlens")
    }
    by_position["positions"] = positions
    k = x[..., ::-1].copy()
    for layout in ("half", "interleaved"):
        got = rope_qk(x, k, *tables, layout=layout, **options)
        for left, operand in zip(got, (x, k), strict=True):
            want = rope(operand, *tables, layout=layout, **by_position)
            reference.same_bits(left, want)
            reference.same_bits(rope(operand, *tables, layout=layout, **options), want)
    cis = (tables[0] + 1j * tables[1]).astype(np.complex64)
    want = rope(x, *tables, layout="interleaved", **by_position)
    reference.same_bits(rope_complex(x, cis, **options), want)


AS_INTEGERS = [int, np.int32, np.uint8, lambda n: np.array(n, ">i8")]


@pytest.mark.parametrize("kind", AS_INTEGERS)
@pytest.mark.parametrize("axis", [-2, 1])
@pytest.mark.parametrize("n_token", [1, 7])
def test_offset_is_the_number_of_tokens_before(kind, axis, n_token):
    x = random((2, 3, n_token, 20)).swapaxes(2, axis).copy()
    tables = [random((11, 8), seed=s) for s in (1, 2)]
    for offset in (0, 4, 11 - n_token):
        rows = np.arange(offset, offset + n_token)
        same_as(x, tables, rows, offset=kind(offset), axis=axis)
        want = reference.rotate(x, *tables, axis=axis, positions=rows)
        reference.same_bits(rope(x, *tables, offset=kind(offset), axis=axis), want)


@pytest.mark.parametrize("kind", ["i8", "i4", "u8", ">i2"])
@pytest.mark.parametrize("axis", [-2, 1])
def test_offset_of_each_sequence(kind, axis):
    x = random((2, 3, 4, 20)).swapaxes(2, axis).copy()
    tables = [random((11, 8), seed=s) for s in (1, 2)]
    for offset in ([0, 7], [5, 5], [6], [2, 0]):
        rows = np.array(offset)[:, None] + np.arange(4)
        same_as(x, tables, rows, offset=np.array(offset, kind), axis=axis)
        same_as(x, tables, rows, offset=offset, axis=axis)


def test_offset_without_heads():
    x, tables = random((2, 5, 20)), [random((11, 8), seed=s) for s in (1, 2)]
    same_as(x, tables, np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]), offset=[1, 6])
    same_as(x[0], tables, np.arange(3, 8), offset=3)


def test_offset_never_means_a_broadcast_row():
    """The last row of the table must not stand for all tokens."""
    x, tables = random((5, 20)), [random((9, 8), seed=s) for s in (1, 2)]
    with pytest.raises(ValueError, match="got row 9 for token 1"):
        rope(x, *tables, offset=8)
    with pytest.raises(ValueError, match="offset must be a whole number or"):
        rope(random((4, 4, 20)), *tables, offset=[0, 1, 2, 3], axis=0)


def test_queries_and_keys_of_different_length_begin_at_the_same_offset():
    q, k = random((2, 3, 1, 20)), random((2, 3, 4, 20), seed=5)
    tables = [random((11, 8), seed=s) for s in (1, 2)]
    for offset in (3, [3, 5], np.array([3, 5])):
        for pair in ((q, k), (q[:, 0], k[:, 0]), (k[:, 0], q[:, 0])):
            got = rope_qk(*pair, *tables, offset=offset)
            for left, x in zip(got, pair, strict=True):
                reference.same_bits(left, rope(x, *tables, offset=offset))
    with pytest.raises(ValueError, match="end with 4, the number of tokens of k"):
        rope_qk(q[0, 0], k[0, 0], *tables, cu_seqlens=[0, 1])


def test_decode_with_an_offset_is_prefill():
    x, tables = random((2, 4, 33, 64)), table(33, 32)
    prefill = rope(x, *tables)
    for t in (0, 1, 31, 32):
        here = np.s_[:, :, t : t + 1]
        reference.same_bits(rope(x[here], *tables, offset=t), prefill[here])
        reference.same_bits(rope(x[here], *tables, offset=[t, t]), prefill[here])
    same = rope(x[:, :, 5:], *tables, offset=5)
    reference.same_bits(same, prefill[:, :, 5:])


@pytest.mark.parametrize(
    "ends", [[0, 7], [0, 1, 7], [0, 0, 3, 3, 7, 7], list(range(8))], ids=str
)
@pytest.mark.parametrize("kind", ["i4", "i8", "u2"])
@pytest.mark.parametrize("offset", [None, 0, 2, "each"])
def test_packed_sequences_begin_anew(ends, kind, offset):
    tables = [random((11, 8), seed=s) for s in (1, 2)]
    options = {} if offset is None else {"offset": offset}
    if offset == "each":
        options["offset"] = [i % 4 for i in range(len(ends) - 1)]
    rows = reference.packed_positions(ends, options.get("offset", 0))
    for shape, axis in (((7, 3, 20), 0), ((1, 3, 7, 20), -2), ((1, 7, 3, 20), 1)):
        options |= {"cu_seqlens": np.array(ends, kind), "axis": axis}
        same_as(random(shape), tables, rows, **options)


def test_packed_is_each_sequence_alone():
    x, tables = random((50, 4, 32)), table(30, 16)
    ends = [0, 3, 3, 33, 50]
    packed = rope(x, *tables, axis=0, cu_seqlens=ends)
    for first, last in itertools.pairwise(ends):
        alone = rope(x[first:last], *(t[: last - first] for t in tables), axis=0)
        reference.same_bits(packed[first:last], alone)


def test_no_sequences_and_no_tokens():
    x, tables = np.zeros((0, 3, 20), np.float32), table(5, 8)
    for options in (
        {"cu_seqlens": np.array([0])},
        {"cu_seqlens": np.array([0, 0, 0])},
        {"cu_seqlens": np.array([0, 0]), "offset": 99},
        {"offset": 99},
        {"offset": -1},
    ):
        assert rope(x, *tables, axis=0, **options).shape == x.shape
    none = np.zeros((2, 3, 0, 20), np.float32)
    assert rope(none, *tables, offset=[2**40, -1]).shape == none.shape


@both_layouts
@pytest.mark.parametrize("options", [{"offset": 2}, {"cu_seqlens": [0, 1, 4]}], ids=str)
def test_rows_in_place_inverse_and_adjoint(layout, options):
    x, tables = random((4, 3, 20)), [random((9, 8), seed=s) for s in (1, 2)]
    rows = reference.packed_positions(options.get("cu_seqlens", [0, 4]),
                                      options.get("offset", 0))  # fmt: skip
    for direction in ({}, {"inverse": True}, {"adjoint": True}):
        same_as(x, tables, rows, axis=0, **options, **direction)
    own = x.copy()
    assert rope(own, *tables, layout=layout, axis=0, out=own, **options) is own
    reference.same_bits(own, rope(x, *tables, layout=layout, axis=0, positions=rows))


# --- a part of the channels ----------------------------------------------------------


@both_layouts
@both_types
@pytest.mark.parametrize("start", [0, 1, 4, 5, 12, -12, -16, -20, -24])
def test_rotary_start(layout, dtype, start):
    x = random((2, 3, 5, 24), dtype)
    cos, sin = (random((5, 6), dtype, s) for s in (1, 2))
    options = {"layout": layout, "rotary_start": start}
    want = reference.rotate(x, cos, sin, **options)
    reference.same_bits(rope(x, cos, sin, **options), want)
    first = start % 24
    reference.same_bits(want[..., :first], x[..., :first])
    reference.same_bits(want[..., first + 12 :], x[..., first + 12 :])
    for again in (x.copy(), x.copy().view(Marked), np.asfortranarray(x)):
        assert rope(again, cos, sin, out=again, **options) is again
        reference.same_bits(again, want)
    subclass = rope(x.view(Marked), cos, sin, **options)
    assert type(subclass) is Marked
    reference.same_bits(subclass, want)
    if layout == "interleaved":
        cis = cos + 1j * sin
        reference.same_bits(rope_complex(x, cis, rotary_start=start), want)


@both_layouts
@pytest.mark.parametrize("shift", [1, -1, 17, -16])
def test_rotary_start_where_out_overlaps_x(layout, shift):
    cos, sin = (random((5, 5), seed=s) for s in (1, 2))
    memory = random(240 + abs(shift))
    low, high = memory[:240], memory[abs(shift) :]
    source, target = (low, high) if shift > 0 else (high, low)
    x, out = source.reshape(3, 5, 16), target.reshape(3, 5, 16)
    want = reference.rotate(x.copy(), cos, sin, layout, rotary_start=3)
    assert rope(x, cos, sin, layout=layout, rotary_start=3, out=out) is out
    reference.same_bits(out, want)


def test_rotary_start_counts_from_the_end_of_each():
    q, k = random((2, 5, 24)), random((2, 5, 20), seed=1)
    cos, sin = (random((5, 6), seed=s) for s in (2, 3))
    got = rope_qk(q, k, cos, sin, rotary_start=-12)
    for left, x in zip(got, (q, k), strict=True):
        want = np.concatenate([x[..., :-12], rope(x[..., -12:], cos, sin)], axis=-1)
        reference.same_bits(left, want)


@both_layouts
def test_rotary_start_with_no_pairs_copies(layout):
    x, none = random((3, 5)), np.zeros((3, 0), np.float32)
    for start in (0, 3, 5, -1, -5):
        got = rope(x, none, none, layout=layout, rotary_start=start)
        reference.same_bits(got, x)


# --- out and in place ----------------------------------------------------------------


@both_layouts
@both_types
@pytest.mark.parametrize("rotary", [6, 64, 66])
def test_out_and_in_place(layout, dtype, rotary):
    x = random((2, 3, 5, 66), dtype)
    cos, sin = (random((5, rotary // 2), dtype, s) for s in (1, 2))
    want = reference.rotate(x, cos, sin, layout)
    out = np.full_like(x, 9)
    assert rope(x, cos, sin, layout=layout, out=out) is out
    reference.same_bits(out, want)
    strided = np.full((2, 3, 10, 132), 9, dtype)[..., ::2, ::-2]
    assert rope(x, cos, sin, layout=layout, out=strided) is strided
    reference.same_bits(strided, want)
    assert rope(x, cos, sin, layout=layout, out=x) is x
    reference.same_bits(x, want)


@both_layouts
@pytest.mark.parametrize("shift", [1, -1, 16, -16, 17, 80])
def test_out_that_overlaps_x(layout, shift):
    cos, sin = (random((5, 8), seed=s) for s in (1, 2))
    memory = random(240 + abs(shift))
    low, high = memory[:240], memory[abs(shift) :]
    source, target = (low, high) if shift > 0 else (high, low)
    x, out = source.reshape(3, 5, 16), target.reshape(3, 5, 16)
    want = reference.rotate(x.copy(), cos, sin, layout)
    assert rope(x, cos, sin, layout=layout, out=out) is out
    reference.same_bits(out, want)


@both_layouts
def test_out_that_holds_the_table(layout):
    x = random((4, 16))
    for index in (0, 1):
        tables = [random((4, 8), seed=s) for s in (1, 2)]
        want = reference.rotate(x, *tables, layout)
        out = np.zeros((4, 16), np.float32)
        out[:, :8] = tables[index]
        tables[index] = out[:, :8]
        rope(x, *tables, layout=layout, out=out)
        reference.same_bits(out, want)


@both_layouts
def test_out_that_is_the_mirror_of_x(layout):
    cos, sin = (random((5, 8), seed=s) for s in (1, 2))
    for mirror in (np.s_[::-1], np.s_[:, ::-1], np.s_[..., ::-1]):
        x = random((3, 5, 16))
        want = reference.rotate(x.copy(), cos, sin, layout)
        reference.same_bits(rope(x, cos, sin, layout=layout, out=x[mirror]), want)


def test_rope_qk_in_place_and_into_a_fused_buffer():
    cos, sin = (random((5, 8), seed=s) for s in (1, 2))
    fused = random((2, 5, 6, 16))
    q, k = fused[:, :, :4], fused[:, :, 4:5]
    want = [reference.rotate(a.copy(), cos, sin, axis=1) for a in (q, k)]
    values = fused[:, :, 5:].copy()
    got = rope_qk(q, k, cos, sin, axis=1, out=(q, k))
    assert got[0] is q
    assert got[1] is k
    for left, right in zip(got, want, strict=True):
        reference.same_bits(left, right)
    reference.same_bits(fused[:, :, 5:], values)


def test_rope_qk_is_rope_twice():
    q, k = random((2, 8, 7, 20)), random((2, 2, 7, 20), seed=1)
    cos, sin = (random((11, 8), seed=s) for s in (2, 3))
    positions = np.random.default_rng(4).integers(0, 11, (2, 7))
    for options in ({}, {"adjoint": True}, {"inverse": True}):
        for layout in ("half", "interleaved"):
            options = {**options, "layout": layout, "positions": positions}
            got = rope_qk(q, k, cos, sin, **options)
            for left, x in zip(got, (q, k), strict=True):
                reference.same_bits(left, rope(x, cos, sin, **options))


def test_rope_qk_results_in_each_others_place():
    """The result of q may be where k was, and the other way round."""
    cos, sin = (random((5, 8), seed=s) for s in (1, 2))
    q, k = random((3, 5, 16)), random((3, 5, 16), seed=3)
    want = [reference.rotate(a.copy(), cos, sin) for a in (q, k)]
    try:
        got = rope_qk(q, k, cos, sin, out=(k, q))
    except ValueError as error:
        assert str(error).startswith("rope_qk: out must")
        return
    for left, right in zip(got, want, strict=True):
        reference.same_bits(left, right)


# --- inverse and adjoint -------------------------------------------------------------


@both_layouts
@both_types
@pytest.mark.parametrize("factor", [1.0, 1.3465735902799727, 0.25, 100.0])
def test_inverse_restores_x(layout, dtype, factor):
    x = random((3, 500, 70), dtype)
    cos, sin = table(500, 32, dtype, factor)
    there = rope(x, cos, sin, layout=layout)
    back = rope(there, cos, sin, layout=layout, inverse=True)
    bound = INVERSE_BOUND[x.dtype] * UNIT[x.dtype] * pair_length(x, 32, layout)
    assert (np.abs(back - x)[..., :64].astype(float) <= bound).all()
    reference.same_bits(back[..., 64:], x[..., 64:])


@both_layouts
@both_types
def test_adjoint_is_the_transpose(layout, dtype):
    x, y = random((3, 50, 34), dtype), random((3, 50, 34), dtype, seed=1)
    cos, sin = table(50, 16, dtype, factor=1.5)
    forward = rope(x, cos, sin, layout=layout).astype(np.longdouble)
    backward = rope(y, cos, sin, layout=layout, adjoint=True).astype(np.longdouble)
    size = np.linalg.norm(x.astype(float)) * np.linalg.norm(y.astype(float))
    error = abs((forward * y).sum() - (x * backward).sum())
    assert error <= ADJOINT_BOUND * UNIT[x.dtype] * 1.5 * size


@both_layouts
@both_types
def test_adjoint_is_rotation_by_minus_sine(layout, dtype):
    x = random((3, 5, 14), dtype)
    cos, sin = (random((5, 6), dtype, s) for s in (1, 2))
    got = rope(x, cos, sin, layout=layout, adjoint=True)
    reference.same_bits(got, reference.rotate(x, cos, -sin, layout))


@both_layouts
@both_types
def test_inverse_divides_in_double(layout, dtype):
    x = random((3, 5, 14), dtype)
    cos, sin = (random((5, 6), dtype, s) for s in (1, 2))
    wide = cos.astype(np.float64), sin.astype(np.float64)
    square = wide[0] * wide[0] + wide[1] * wide[1]
    back = [(wide[0] / square).astype(dtype), (-wide[1] / square).astype(dtype)]
    got = rope(x, cos, sin, layout=layout, inverse=True)
    reference.same_bits(got, reference.rotate(x, *back, layout))


@both_types
def test_inverse_and_adjoint_of_the_complex_product(dtype):
    x = random((3, 50, 34), dtype)
    kind = np.result_type(dtype, np.complex64)
    cis = rope_cis(np.arange(50), 1e4 ** (-np.arange(16) / 16), dtype=kind,
                   attention_factor=1.25)  # fmt: skip
    back = rope_complex(rope_complex(x, cis), cis, inverse=True)
    bound = INVERSE_BOUND[x.dtype] * UNIT[x.dtype] * pair_length(x, 16, "interleaved")
    assert (np.abs(back - x)[..., :32].astype(float) <= bound).all()
    reference.same_bits(rope_complex(x, cis, adjoint=True), rope_complex(x, cis.conj()))


# --- algebra -------------------------------------------------------------------------


@both_layouts
@both_types
def test_length_of_each_pair_is_kept(layout, dtype):
    x = random((2, 300, 32), dtype)
    cos, sin = table(300, 16, dtype)
    before = pair_length(x, 16, layout)
    after = pair_length(rope(x, cos, sin, layout=layout), 16, layout)
    # The table's entries are off by 1 ulp at most, the rotation by ROTATION_BOUND u.
    bound = math.sqrt(2) * (ROTATION_BOUND + 2) * UNIT[x.dtype] * before
    assert (np.abs(after - before) <= bound).all()


@both_layouts
@pytest.mark.parametrize("distance", [0, 1, 100, 4095])
def test_scores_depend_on_the_distance_alone(layout, distance):
    q, k = random((1, 64), np.float64), random((1, 64), np.float64, seed=1)
    inv_freq = 1e4 ** (-np.arange(32) / 32)

    def score(position):
        tables = [rope_table([p], inv_freq, dtype=np.float64)
                  for p in (position, position + distance)]  # fmt: skip
        left, right = (
            rope(x, *both, layout=layout).astype(np.longdouble)
            for x, both in zip((q, k), tables, strict=True)
        )
        return (left * right).sum()

    at_zero = score(0)
    bound = RELATIVE_BOUND * 2.0**-53 * np.linalg.norm(q) * np.linalg.norm(k)
    for position in (1, 1000, 2**20 + 1, 2**31 - 5000, -(2**30)):
        assert abs(score(position) - at_zero) <= bound


@both_layouts
@both_types
def test_position_zero_is_the_identity(layout, dtype):
    x = random((3, 1, 20), dtype)
    assert np.array_equal(rope(x, *rope_table([0], np.ones(10), dtype=dtype)), x)


@both_types
@pytest.mark.parametrize("rotary", [12, 16, 20])
def test_layouts_agree_after_permutation(dtype, rotary):
    x = random((2, 3, 7, 20), dtype)
    cos, sin = (random((7, rotary // 2), dtype, s) for s in (1, 2))
    options = {"axis": -1, "rotary_dim": rotary}
    aside = posenc.permute_layout(x, 20, to="interleaved", **options)
    rotated = rope(aside, cos, sin, layout="interleaved")
    back = posenc.permute_layout(rotated, 20, to="half", **options)
    reference.same_bits(back, rope(x, cos, sin))


@both_types
def test_complex_product_is_interleaved(dtype):
    x = random((2, 3, 7, 20), dtype)
    cos, sin = (random((7, 8), dtype, s) for s in (1, 2))
    cis = cos + 1j * sin
    assert cis.dtype == np.result_type(dtype, np.complex64)
    want = rope(x, cos, sin, layout="interleaved")
    reference.same_bits(rope_complex(x, cis), want)
    positions = np.array([3, 3, 0, 6, 1, 2, 5])
    got = rope_complex(x, cis, positions=positions)
    want = rope(x, cos, sin, layout="interleaved", positions=positions)
    reference.same_bits(got, want)
    assert rope_complex(x, cis, out=x) is x


@both_types
def test_cis_is_the_table(dtype):
    positions, inv_freq = np.arange(40) * 1e5 - 0.25, 1e4 ** (-np.arange(9) / 9)
    for angles in ("exact", "float32"):
        cos, sin = rope_table(
            positions, inv_freq, attention_factor=1.5, angles=angles, dtype=dtype
        )
        cis = rope_cis(
            positions,
            inv_freq,
            attention_factor=1.5,
            angles=angles,
            dtype=np.result_type(dtype, np.complex64),
        )
        reference.same_bits(cis.real, cos)
        reference.same_bits(cis.imag, sin)


@both_layouts
def test_matrix_is_the_rotation(layout):
    inv_freq = 1e4 ** (-np.arange(6) / 6)
    positions = np.array([0.0, 1, 12.5, -7, 2.0**30])
    matrix = rope_matrix(positions, inv_freq, layout=layout)
    assert matrix.shape == (5, 12, 12)
    assert matrix.dtype == np.float64
    x = random((5, 12), np.float64)
    cos, sin = rope_table(positions, inv_freq, dtype=np.float64)
    want = rope(x, cos, sin, layout=layout)
    got = (matrix.astype(np.longdouble) @ x.astype(np.longdouble)[..., None])[..., 0]
    bound = ROTATION_BOUND * 2.0**-53 * pair_length(x, 6, layout)
    assert (np.abs(got - want) <= bound).all()


def test_matrix_as_the_paper_prints_it():
    """Su et al. 2021, eq. 15: blocks [[cos, -sin], [sin, cos]] of consecutive pairs."""
    matrix = rope_matrix(3, [1.0, 0.01], layout="interleaved")
    want = np.zeros((4, 4))
    for block, angle in enumerate((3.0, 0.03)):
        at = 2 * block
        cos, sin = math.cos(angle), math.sin(angle)
        want[at : at + 2, at : at + 2] = [[cos, -sin], [sin, cos]]
    np.testing.assert_allclose(matrix, want, rtol=0, atol=2.0**-52)
    # R_m' R_n = R_{n - m}
    product = rope_matrix(5, [1.0, 0.01]).T @ rope_matrix(12, [1.0, 0.01])
    np.testing.assert_allclose(
        product, rope_matrix(7, [1.0, 0.01]), rtol=0, atol=2.0**-50
    )


@pytest.mark.parametrize("rotary", [None, 8, 16])
def test_permute_there_and_back(rotary):
    w = random((48, 5))
    there = posenc.permute_layout(w, 16, to="interleaved", rotary_dim=rotary)
    back = posenc.permute_layout(there, 16, to="half", rotary_dim=rotary)
    reference.same_bits(back, w)
    assert not np.array_equal(there, w)


def test_permute_is_the_formula_of_transformers_conversion():
    """convert_llama_weights_to_hf: view(H, D/2, 2, in).transpose(1, 2)."""
    n_head, head_dim, width = 3, 16, 5
    w = random((n_head * head_dim, width))
    want = w.reshape(n_head, head_dim // 2, 2, width).swapaxes(1, 2)
    want = want.reshape(n_head * head_dim, width)
    reference.same_bits(posenc.permute_layout(w, head_dim, to="half"), want)


def test_permuted_weights_give_permuted_activations():
    w, hidden = random((48, 10), np.float64), random((7, 10), np.float64, 1)
    cos, sin = (random((7, 8), np.float64, s) for s in (1, 2))
    half = (hidden @ w.T).reshape(7, 3, 16)
    moved = posenc.permute_layout(w, 16, to="interleaved")
    aside = (hidden @ moved.T).reshape(7, 3, 16)
    scores = [
        np.einsum("thd,shd->ths", a, a)
        for a in (
            rope(half, cos, sin, axis=0),
            rope(aside, cos, sin, axis=0, layout="interleaved"),
        )
    ]
    # Only the order of the sums differs: 10 + 16 products of numbers of size 10.
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-11)


# --- types ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "tables", "result"),
    [
        ("f4", "f4", "f4"),
        ("f8", "f8", "f8"),
        ("f4", "f8", "f8"),
        ("f8", "f4", "f8"),
        ("i8", "f8", "f8"),
        ("i4", "f4", "f8"),
        ("i8", "f4", "f8"),
        (">f4", "<f4", "f4"),
    ],
)
def test_result_type(x, tables, result):
    values = (random((3, 5, 12)) * 10).astype(x)
    cos, sin = (random((5, 6), seed=s).astype(tables) for s in (1, 2))
    got = rope(values, cos, sin)
    assert got.dtype == np.dtype(result)
    wide = [a.astype(result) for a in (values, cos, sin)]
    reference.same_bits(got, reference.rotate(*wide))


def test_lists_are_taken():
    got = rope([[1.0, 0.0]], [[0.0]], [[1.0]])
    assert got.tolist() == [[0.0, 1.0]]
    assert got.dtype == np.float64


def test_subclass_comes_back_with_the_same_bits():
    x, cos, sin = random((2, 3, 5, 12)), random((5, 6)), random((5, 6), seed=2)
    got = rope(x.view(Marked), cos, sin)
    assert type(got) is Marked
    reference.same_bits(got.view(np.ndarray), rope(x, cos, sin))


@pytest.mark.parametrize("kind", ["?", "i1", "i4", "i8", "u8"])
@pytest.mark.parametrize("tables", ["f4", "f8"])
def test_integers_count_as_float64(kind, tables):
    x = np.arange(24).reshape(2, 12).astype(kind)
    cos, sin = (random((2, 6), seed=s).astype(tables) for s in (1, 2))
    want = reference.half(x.astype(float), cos.astype(float), sin.astype(float))
    reference.same_bits(rope(x, cos, sin), want)


def test_dask_arrays_stay_lazy():
    da = pytest.importorskip("dask.array")
    x, cos, sin = random((2, 3, 8, 12)), random((8, 6)), random((8, 6), seed=2)
    heads = da.from_array(x, chunks=(1, 1, -1, -1))
    tokens = da.from_array(x, chunks=(1, 1, 4, -1))
    tables = [da.from_array(t, chunks=(4, -1)) for t in (cos, sin)]
    for options in ({}, {"inverse": True}, {"adjoint": True}):
        want = rope(x, cos, sin, **options)
        for got in (rope(heads, cos, sin, **options), rope(tokens, *tables, **options)):
            assert isinstance(got, da.Array)
            reference.same_bits(got.compute(scheduler="threads"), want)
    for options in ({"rotary_start": -10}, {"cu_seqlens": [0, 3, 8]}, {"offset": 0}):
        cut = [t[:, :5] for t in (cos, sin)]
        got = rope(heads, *cut, **options)
        assert isinstance(got, da.Array)
        want = rope(x, *cut, **options)
        reference.same_bits(got.compute(scheduler="threads"), want)


def test_never_warns():
    x = random((3, 5, 12))
    x[0], x[1] = np.inf, np.finfo(np.float32).max
    cos, sin = (np.full((5, 6), v, np.float32) for v in (np.inf, 3e38))
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        rope(x, cos, sin)
        rope_qk(x, x, cos, sin)
        rope(x, cos, sin, inverse=True)
        rope(x, np.zeros_like(cos), np.zeros_like(sin), inverse=True)
        rope(x.astype(np.float64), cos, sin)
        rope_complex(x, (cos + 1j).astype(np.complex64))
        rope_table([np.nan, np.inf, 1.0], [1e300, 1e-320, 1.0])
        rope_table([1e30, 1.0], [1.0], angles="float32")
        rope_table([3.0], [1.0], attention_factor=1e300)
        rope_matrix(np.inf, [1.0])


def test_inputs_stay_as_they_are():
    x, cos, sin = random((2, 5, 12)), random((9, 6)), random((9, 6), seed=2)
    positions = np.array([3, 1, 8, 0, 2])
    arrays = (x, cos, sin, positions)
    before = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    rope(x, cos, sin, positions=positions)
    rope(x, cos, sin, positions=positions, inverse=True)
    rope_qk(x, x, cos, sin, positions=positions, adjoint=True)
    posenc.permute_layout(x, 12, to="half", axis=-1)
    for now, then in zip(arrays, before, strict=True):
        reference.same_bits(now, then)


# --- door against door ---------------------------------------------------------------


@both_layouts
@both_types
@settings(max_examples=150)
@given(data=st.data())
def test_doors_agree_bit_for_bit(layout, dtype, data):
    def choose(options):
        return data.draw(st.sampled_from(options))

    seed = data.draw(st.integers(0, 2**32 - 1))
    fuzz_doors.check(
        fuzz_doors.random_call(
            choose, np.random.default_rng(seed), layout=layout, dtype=dtype
        )
    )


def test_a_few_thousand_random_calls_through_both_doors():
    command = [sys.executable, str(HERE / "fuzz_doors.py"), "--calls", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3000 calls" in done.stdout


# Past this size results are written around the caches, by other instructions.
LARGE = 9 << 20


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("n_pair", [4, 8, 24, 40, 64, 160])
def test_large_results_have_the_bits_of_small_ones(layout, dtype, n_pair):
    heads, head_dim = 6, 2 * n_pair + 16 * (n_pair == 24)
    n_token = LARGE // (heads * head_dim * np.dtype(dtype).itemsize)
    cos, sin = (random((n_token, n_pair), seed=s).astype(dtype) for s in (1, 2))
    for shift in (0, 1, 4, 16):  # from an address that vectors like, and others
        size = heads * n_token * head_dim
        memory = np.empty(size + 32, dtype)
        skew = memory.ctypes.data % 64 // memory.itemsize
        start = (64 // memory.itemsize - skew) + shift
        room = memory[start : start + size] if start + size <= memory.size else None
        assert room is not None
        for axis, shape in ((1, (n_token, heads)), (2, (heads, n_token))):
            x = random((1, *shape, head_dim), seed=3).astype(dtype)
            out = room.reshape(x.shape)
            rope(x, cos, sin, layout=layout, axis=axis, out=out)
            for some in (slice(0, 40), slice(n_token - 40, n_token)):
                part = (slice(None),) * axis + (some,)
                want = rope(x[part], cos[some], sin[some], layout=layout, axis=axis)
                reference.same_bits(out[part], want)
            own = x.copy()
            reference.same_bits(
                rope(own, cos, sin, layout=layout, axis=axis, out=own), out
            )
