"""Rotation of float16 and bfloat16: against torch, the reference, and bit patterns."""

# SPDX-License-Identifier: BSD-3-Clause

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import reference
from ml_dtypes import bfloat16

import posenc
from posenc import rope, rope_complex, rope_qk

TYPES = [np.float16, bfloat16]
TABLES = ["own", "float32"]
QUIET_NAN = {np.dtype(np.float16): 0x7E00, np.dtype(bfloat16): 0x7FC0}
INSTRUCTION_SETS = ("baseline", "v3", "v4", "v4_bf16")

both_types = pytest.mark.parametrize("dtype", TYPES, ids=["float16", "bfloat16"])
both_layouts = pytest.mark.parametrize("layout", ["half", "interleaved"])
both_tables = pytest.mark.parametrize("tables", TABLES)
both_roundings = pytest.mark.parametrize("rounding", ["once", "eager"])


@pytest.fixture(autouse=True)
def quiet():
    """References and casts in tests meet NaN of all kinds and overflow."""
    with np.errstate(all="ignore"):
        yield


class Marked(np.ndarray):
    """A subclass: it comes back, and goes through the gufuncs."""


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def patterns(shape, dtype, seed=0):
    """Any bits at all: NaN of all kinds, infinities, subnormals, both zeros."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << 16, shape).astype(np.uint16).view(dtype)


def table_of(shape, dtype, tables, seed=1, wild=False):
    """Random cos and sin in the type of x or in float32."""
    pair = []
    for part in (seed, seed + 1):
        if tables == "own":
            made = (patterns if wild else random)(shape, dtype, part)
        elif wild:
            bits = np.random.default_rng(part).integers(0, 1 << 32, shape)
            made = bits.astype(np.uint32).view(np.float32)
        else:
            made = random(shape, np.float32, part)
        pair.append(made)
    return pair


# --- other people's programs ---------------------------------------------------------


def as_tensor(torch, array):
    tensor = torch.from_numpy(np.ascontiguousarray(array).view(np.int16))
    return tensor.view(getattr(torch, array.dtype.name))


def as_array(tensor, dtype):
    """The array of a 16-bit tensor, every NaN the canonical one."""
    import torch

    return reference.one_nan(tensor.view(torch.int16).numpy().view(dtype))


@both_types
@pytest.mark.parametrize("n_head", [(8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 64, 80, 128])
@pytest.mark.parametrize("values", [random, patterns])
def test_eager_half_is_llama_bit_for_bit(dtype, n_head, head_dim, values):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q = values((2, n_head[0], 17, head_dim), dtype)
    k = values((2, n_head[1], 17, head_dim), dtype, seed=1)
    cos, sin = (values((17, head_dim // 2), dtype, seed=s) for s in (2, 3))
    full = [as_tensor(torch, np.concatenate([t, t], -1))[None] for t in (cos, sin)]
    want = llama.apply_rotary_pos_emb(as_tensor(torch, q), as_tensor(torch, k), *full)
    got = rope_qk(q, k, cos, sin, rounding="eager")
    for left, right in zip(got, want, strict=True):
        reference.same_bits(left, as_array(right, dtype))


@both_types
@pytest.mark.parametrize("n_pair", [1, 8, 32])
@pytest.mark.parametrize("values", [random, patterns])
def test_eager_interleaved_is_gptj_bit_for_bit(dtype, n_pair, values):
    torch = pytest.importorskip("torch")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = values((2, 9, 4, 64), dtype)
    cos, sin = (values((2, 9, n_pair), dtype, seed=s) for s in (2, 3))
    rotated = gptj.apply_rotary_pos_emb(
        as_tensor(torch, x[..., : 2 * n_pair]),
        as_tensor(torch, sin),
        as_tensor(torch, cos),
    )
    want = np.concatenate([as_array(rotated, dtype), x[..., 2 * n_pair :]], axis=-1)
    got = rope(x, cos, sin, layout="interleaved", axis=1, rounding="eager")
    reference.same_bits(got, want)


@both_types
@both_tables
@pytest.mark.parametrize("values", [random, patterns])
def test_once_interleaved_is_cohere_bit_for_bit(dtype, tables, values):
    """Cohere rotates in float32 and rounds the result."""
    torch = pytest.importorskip("torch")
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    q, k = values((2, 4, 9, 64), dtype), values((2, 2, 9, 64), dtype, seed=1)
    cos, sin = table_of((2, 9, 32), dtype, tables)
    full = [
        as_tensor(torch, t) if tables == "own" else torch.from_numpy(t)
        for t in (np.repeat(t, 2, axis=-1) for t in (cos, sin))
    ]
    want = cohere.apply_rotary_pos_emb(as_tensor(torch, q), as_tensor(torch, k), *full)
    got = rope_qk(q, k, cos, sin, layout="interleaved")
    for left, right in zip(got, want, strict=True):
        reference.same_bits(left, as_array(right, dtype))


# --- the definition ------------------------------------------------------------------


@both_types
@both_tables
@both_layouts
@both_roundings
@pytest.mark.parametrize("wild", [False, True], ids=["ordinary", "any bits"])
@pytest.mark.parametrize("n_pair", [1, 3, 8, 16, 24, 33, 64, 128])
def test_rotation_is_the_reference(dtype, tables, layout, rounding, wild, n_pair):
    values = patterns if wild else random
    x = values((3, 7, 2 * n_pair + n_pair % 3), dtype)
    cos, sin = table_of((7, n_pair), dtype, tables, wild=wild)
    options = {"layout": layout, "rounding": rounding}
    want = reference.rotate(x, cos, sin, **options)
    reference.same_bits(rope(x, cos, sin, **options), want)
    reference.same_bits(rope(x, cos, sin, adjoint=True, **options),
                        reference.rotate(x, cos, -sin, **options))  # fmt: skip
    own = x.copy()
    assert rope(own, cos, sin, out=own, **options) is own
    reference.same_bits(own, want)


def every_pattern(dtype):
    return np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(-1, 128)


@both_types
@both_tables
@both_layouts
@both_roundings
def test_every_bit_pattern_is_converted_right(dtype, tables, layout, rounding):
    x = every_pattern(dtype)
    kind = dtype if tables == "own" else np.float32
    one, zero = np.ones((1, 64), kind), np.zeros((1, 64), kind)
    options = {"layout": layout, "rounding": rounding}
    for cos, sin in ((one, zero), (zero, one), (-one, zero), (zero, -one), (one, one)):
        got = rope(x, cos, sin, **options)
        reference.same_bits(got, reference.rotate(x, cos, sin, **options))
    finite = x[np.isfinite(x).all(axis=-1)]
    same = rope(finite, one, zero, **options)
    assert np.array_equal(same, finite)  # -0.0 may have become 0.0


@both_types
@both_layouts
@both_roundings
def test_every_bit_pattern_in_the_table_is_converted_right(dtype, layout, rounding):
    table = every_pattern(dtype)[:, :64], every_pattern(dtype)[:, 64:]
    options = {"layout": layout, "rounding": rounding}
    for value in (1.0, 0.0, -3.0):
        x = np.full((512, 128), value, dtype)
        got = rope(x, *table, **options)
        reference.same_bits(got, reference.rotate(x, *table, **options))


@both_types
@both_layouts
def test_every_rounding_boundary_is_decided_right(dtype, layout):
    """Float32 sums just above, on and just below the middle of two 16-bit numbers."""
    low = every_pattern(dtype).reshape(-1)
    low = low[np.isfinite(low)].astype(np.float32)
    largest = np.finfo(np.float32).max
    for share in (0.5, 0.5 - 2.0**-7, 0.5 + 2.0**-7, 1.0):
        step = np.spacing(low.astype(dtype)).astype(np.float32) * np.float32(share)
        cos = np.clip(low + np.where(np.isfinite(step), step, 0), -largest, largest)
        cos = np.resize(cos, (-(-cos.size // 64), 64)).astype(np.float32)
        x = np.ones((len(cos), 128), dtype)
        for moved in (cos, np.nextafter(cos, np.float32(0)), cos * 1.5):
            moved = moved.astype(np.float32)
            got = rope(x, moved, np.zeros_like(moved), layout=layout)
            want = reference.rotate(x, moved, np.zeros_like(moved), layout)
            reference.same_bits(got, want)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_bit_patterns_on_every_instruction_set(name):
    best = posenc.build_info()["simd"]
    if INSTRUCTION_SETS.index(name) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this processor has {best} only")
    words = "every_bit_pattern or every_rounding or is_the_reference"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               str(Path(__file__).resolve()), "-k", words]  # fmt: skip
    environment = {**os.environ, "POSENC_SIMD": name}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]


# --- what is special about 16 bits ---------------------------------------------------


@both_types
@both_tables
@both_roundings
def test_nan_is_the_one_quiet_nan(dtype, tables, rounding):
    nans = patterns(1 << 12, dtype)
    nans = np.resize(nans[np.isnan(nans)], (4, 128))
    kind = dtype if tables == "own" else np.float32
    cos, sin = np.ones((4, 64), kind), np.ones((4, 64), kind)
    for options in ({"layout": "half"}, {"layout": "interleaved"}):
        got = rope(nans, cos, sin, rounding=rounding, **options)
        assert (got.view(np.uint16) == QUIET_NAN[np.dtype(dtype)]).all()
    infinite = np.full((4, 128), np.inf, dtype)
    got = rope(infinite, cos, sin, rounding=rounding)[..., :64]
    assert (got.view(np.uint16) == QUIET_NAN[np.dtype(dtype)]).all()


@both_types
def test_channels_that_are_copied_keep_the_bits_of_their_nan(dtype):
    x = patterns((5, 100), dtype)
    cos, sin = table_of((5, 20), dtype, "own")
    for start in (0, 7, 60):
        got = rope(x, cos, sin, rotary_start=start)
        copied = np.r_[0:start, start + 40 : 100]
        reference.same_bits(got[:, copied], x[:, copied])


@both_roundings
def test_float16_overflows_to_infinity(rounding):
    x = np.full((1, 8), 60000, np.float16)
    one = np.ones((1, 4), np.float16)
    got = rope(x, one, one, rounding=rounding)
    assert got.tolist() == [[0.0] * 4 + [np.inf] * 4]
    assert rope(x, one, -one, rounding=rounding).tolist() == [[np.inf] * 4 + [0.0] * 4]


@both_roundings
def test_once_does_not_overflow_between(rounding):
    """60000 * 2 - 60000 * 1.5: the products are beyond float16, the result is not."""
    x = np.full((1, 2), 60000, np.float16)
    cos, sin = np.full((1, 1), 2, np.float16), np.full((1, 1), 1.5, np.float16)
    got = float(rope(x, cos, sin, rounding=rounding)[0, 0])
    if rounding == "once":
        assert got == 30000.0
    else:
        assert np.isnan(got)  # inf - inf, as PyTorch has it


@both_types
@both_roundings
def test_subnormals_are_kept(dtype, rounding):
    tiny = np.arange(1, 129, dtype=np.uint16).view(dtype).reshape(1, 128)
    one, zero = np.ones((1, 64), dtype), np.zeros((1, 64), dtype)
    reference.same_bits(rope(tiny, one, zero, rounding=rounding), tiny)
    half = np.full((1, 64), 0.5, dtype)
    got = rope(tiny, half, zero, rounding=rounding)
    reference.same_bits(got, reference.rotate(tiny, half, zero, rounding=rounding))
    assert got.view(np.uint16).any()


@both_types
def test_eager_and_once_differ_and_agree_in_float32(dtype):
    x = random((64, 128), dtype)
    cos, sin = table_of((64, 64), dtype, "own")
    assert (rope(x, cos, sin) != rope(x, cos, sin, rounding="eager")).any()
    wide = [a.astype(np.float32) for a in (x, cos, sin)]
    reference.same_bits(rope(*wide), rope(*wide, rounding="eager"))


@both_types
@both_roundings
def test_never_warns(dtype, rounding):
    x = patterns((3, 5, 40), dtype)
    cos, sin = patterns((5, 16), dtype, 1), patterns((5, 16), dtype, 2)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for layout in ("half", "interleaved"):
            rope(x, cos, sin, layout=layout, rounding=rounding)
            rope(x.view(Marked), cos, sin, layout=layout, rounding=rounding)
            rope(x, cos, sin, layout=layout, rounding=rounding, inverse=True)
        rope_qk(x, x, cos, sin, rounding=rounding)


# --- types ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "cos", "sin", "result"),
    [
        (np.float16, np.float16, np.float16, np.float16),
        (np.float16, np.float32, np.float32, np.float16),
        (np.float16, bfloat16, bfloat16, np.float16),
        (np.float16, np.float64, np.float64, np.float64),
        (np.float16, np.int64, np.int64, np.float64),
        (np.float16, np.float16, np.float32, np.float16),
        (">f2", "<f2", ">f2", np.float16),
        (bfloat16, bfloat16, bfloat16, bfloat16),
        (bfloat16, np.float32, np.float32, bfloat16),
        (bfloat16, np.float16, np.float16, bfloat16),
        (bfloat16, bfloat16, np.float16, bfloat16),
        (bfloat16, np.float32, np.float64, np.float64),
        (np.float32, np.float16, np.float16, np.float32),
        (np.float32, bfloat16, bfloat16, np.float32),
        (np.float32, bfloat16, np.float16, np.float32),
        (np.float64, bfloat16, bfloat16, np.float64),
        (np.int8, np.float16, np.float16, np.float64),
    ],
    ids=str,
)
@both_layouts
@both_roundings
def test_result_type(x, cos, sin, result, layout, rounding):
    x = (random((3, 5, 14)) * 4).astype(x)
    cos, sin = (
        (random((5, 6), seed=s) * 4).astype(kind) for s, kind in ((1, cos), (2, sin))
    )
    options = {"layout": layout, "rounding": rounding}
    got = rope(x, cos, sin, **options)
    assert got.dtype == np.dtype(result)
    kind = result if cos.dtype == sin.dtype == x.dtype else np.float32
    if np.dtype(result) == np.float64:
        kind = np.float64
    parts = x.astype(result), cos.astype(kind), sin.astype(kind)
    reference.same_bits(got, reference.rotate(*parts, **options))


@both_types
@both_roundings
@both_layouts
def test_mixed_tables_are_read_as_float32(dtype, rounding, layout):
    other = np.float16 if dtype is bfloat16 else bfloat16
    x = random((3, 5, 14), dtype)
    cos, sin = random((5, 6), other, 1), random((5, 6), np.float32, 2)
    options = {"layout": layout, "rounding": rounding}
    for tables in ((cos, sin), (cos, cos), (cos, sin.astype(dtype))):
        wide = [t.astype(np.float32) for t in tables]
        got = rope(x, *tables, **options)
        reference.same_bits(got, reference.rotate(x, *wide, **options))


@both_types
def test_float64_tables_give_float64(dtype):
    x = random((3, 5, 14), dtype)
    cos, sin = random((5, 6), np.float64, 1), random((5, 6), np.float64, 2)
    got = rope(x, cos, sin)
    reference.same_bits(got, rope(x.astype(np.float64), cos, sin))


@both_types
@both_layouts
def test_inverse_table_is_kept_in_float32(dtype, layout):
    x = random((3, 5, 14), dtype)
    cos, sin = (random((5, 6), dtype, s) for s in (1, 2))
    wide = [t.astype(np.float64) for t in (cos, sin)]
    square = wide[0] * wide[0] + wide[1] * wide[1]
    back = [(t / square).astype(np.float32) for t in (wide[0], -wide[1])]
    got = rope(x, cos, sin, layout=layout, inverse=True)
    reference.same_bits(got, reference.rotate(x, *back, layout))


@both_types
@both_roundings
def test_complex_product_is_interleaved(dtype, rounding):
    x = patterns((2, 3, 7, 40), dtype)
    cos, sin = table_of((7, 16), dtype, "float32")
    cis = cos + 1j * sin
    assert cis.dtype == np.complex64
    want = rope(x, cos, sin, layout="interleaved", rounding=rounding)
    reference.same_bits(rope_complex(x, cis, rounding=rounding), want)
    for start in (0, 5):
        options = {"rounding": rounding, "rotary_start": start}
        got = rope_complex(x.view(Marked), cis, **options)
        assert type(got) is Marked
        reference.same_bits(got, rope(x, cos, sin, layout="interleaved", **options))
    wide = rope_complex(x, cis.astype(np.complex128))
    assert wide.dtype == np.float64


@both_types
@both_tables
@both_layouts
@both_roundings
def test_rows_that_are_chosen(dtype, tables, layout, rounding):
    x = patterns((2, 7, 3, 40), dtype)
    cos, sin = table_of((11, 16), dtype, tables)
    options = {"layout": layout, "axis": 1, "rounding": rounding}
    numbers = np.random.default_rng(3).integers(0, 11, (2, 7))
    for chosen, positions in (
        ({"positions": numbers}, numbers),
        ({"offset": 4}, np.arange(4, 11)),
        ({"offset": [1, 3]}, np.array([[1], [3]]) + np.arange(7)),
        ({"cu_seqlens": [0, 3, 7]}, np.array([0, 1, 2, 0, 1, 2, 3])),
    ):
        want = reference.rotate(x, cos, sin, positions=positions, **options)
        reference.same_bits(rope(x, cos, sin, **chosen, **options), want)
        for got in rope_qk(x, x.copy(), cos, sin, **chosen, **options):
            reference.same_bits(got, want)


# --- any memory ----------------------------------------------------------------------


def misaligned(array):
    """The same values one byte off."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    off = memory[1:].view(array.dtype).reshape(array.shape)
    off[...] = array
    assert not off.flags.aligned
    return off


def memories(x):
    """The same values in memory that the fast door may or may not take."""
    yield "reversed", np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    yield "every second", np.repeat(x, 2, axis=-1)[..., ::2]
    yield "BTHD", np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    yield "Fortran", np.asfortranarray(x)
    yield "one row", np.broadcast_to(x[:1], x.shape)
    yield "misaligned", misaligned(x)
    if x.dtype == np.float16:
        yield "swapped", x.astype(">f2")
    yield "subclass", x.view(Marked)


@both_types
@both_tables
@both_layouts
@both_roundings
@pytest.mark.parametrize("start", [0, 3, -16])
def test_any_memory_and_either_door(dtype, tables, layout, rounding, start):
    x = patterns((2, 3, 5, 20), dtype)
    cos, sin = table_of((5, 8), dtype, tables)
    options = {"layout": layout, "rounding": rounding, "rotary_start": start}
    for name, view in memories(x):
        want = reference.rotate(np.asarray(view).astype(dtype), cos, sin, **options)
        got = rope(view, cos, sin, **options)
        assert isinstance(got, Marked) == (name == "subclass")
        reference.same_bits(got, want)
        out = np.zeros_like(x)
        assert rope(view, cos, sin, out=out, **options) is out
        reference.same_bits(out, want)


@both_types
@both_layouts
@both_roundings
@pytest.mark.parametrize("shift", [1, -1, 16, -17, 80])
def test_out_that_overlaps_x(dtype, layout, rounding, shift):
    for start in (0, 2):
        cos, sin = (random((5, 7), dtype, seed=s) for s in (1, 2))
        memory = random(240 + abs(shift), dtype)
        low, high = memory[:240], memory[abs(shift) :]
        source, target = (low, high) if shift > 0 else (high, low)
        x, out = source.reshape(3, 5, 16), target.reshape(3, 5, 16)
        options = {"layout": layout, "rounding": rounding, "rotary_start": start}
        want = reference.rotate(x.copy(), cos, sin, **options)
        assert rope(x, cos, sin, out=out, **options) is out
        reference.same_bits(out, want)


@both_types
@both_tables
@both_roundings
def test_fused_buffer_in_place(dtype, tables, rounding):
    """q, k and v lie side by side, as one projection leaves them."""
    cos, sin = table_of((9, 32), dtype, tables)
    fused = random((2, 9, 12, 64), dtype)
    q, k = fused[:, :, :8].swapaxes(1, 2), fused[:, :, 8:10].swapaxes(1, 2)
    values = fused[:, :, 10:].copy()
    want = [reference.rotate(a.copy(), cos, sin, rounding=rounding) for a in (q, k)]
    got = rope_qk(q, k, cos, sin, rounding=rounding, out=(q, k))
    assert got[0] is q
    assert got[1] is k
    for left, right in zip(got, want, strict=True):
        reference.same_bits(left, right)
    reference.same_bits(fused[:, :, 10:], values)


@both_types
@both_roundings
def test_dask_arrays_stay_lazy(dtype, rounding):
    da = pytest.importorskip("dask.array")
    x = random((2, 3, 8, 14), dtype)
    cos, sin = random((8, 6), dtype), random((8, 6), dtype, seed=2)
    lazy = da.from_array(x, chunks=(1, 1, -1, -1))
    for layout in ("half", "interleaved"):
        for start in (0, 2):
            options = {"layout": layout, "rounding": rounding, "rotary_start": start}
            got = rope(lazy, cos, sin, **options)
            assert isinstance(got, da.Array)
            want = reference.rotate(x, cos, sin, **options)
            reference.same_bits(got.compute(scheduler="threads"), want)


# Past this size results are written around the caches, by other instructions.
LARGE = 9 << 20


@both_types
@both_tables
@both_layouts
@both_roundings
@pytest.mark.parametrize(("n_pair", "n_rest"), [(24, 16), (64, 16), (64, 0)])
def test_large_results_have_the_bits_of_small_ones(
    dtype, tables, layout, rounding, n_pair, n_rest
):
    head_dim, heads = 2 * n_pair + n_rest, 4
    n_token = LARGE // (heads * head_dim * 2)
    cos, sin = table_of((n_token, n_pair), dtype, tables)
    options = {"layout": layout, "rounding": rounding}
    x = random((1, heads, n_token, head_dim), dtype)
    for source in (x, np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)):
        posenc.set_num_threads(2)
        try:
            fresh = rope(source, cos, sin, **options)
        finally:
            posenc.set_num_threads(None)
        for some in (slice(0, 40), slice(n_token - 40, n_token)):
            want = reference.rotate(source[:, :, some], cos[some], sin[some], **options)
            reference.same_bits(fresh[:, :, some], want)
        own = source.copy(order="K")
        rope(own, cos, sin, out=own, **options)
        reference.same_bits(own, fresh)
        memory = np.empty(x.size + 64, x.dtype)
        first = -memory.ctypes.data % 64 // 2 + 8  # 16 bytes from a cache line's start
        out = np.lib.stride_tricks.as_strided(
            memory[first:], source.shape, source.strides
        )
        rope(source, cos, sin, out=out, **options)
        reference.same_bits(out, fresh)
