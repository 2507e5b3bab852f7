"""What every gufunc keeps, whatever its name: one suite over posenc.ufunc.__all__."""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import gufuncs
import ml_dtypes
import numpy as np
import pytest
import reference
from gufuncs import FLOAT32, SPECS, lay_out, sprinkle
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from ml_dtypes import bfloat16

import posenc

HERE = Path(__file__).resolve().parent
SIZES = {"n": 12, "m": 5}
INSTRUCTION_SETS = ("baseline", "v3", "v4", "v4_bf16")
LOOPS = [(spec, types) for spec in SPECS.values() for types in spec.types]

every_gufunc = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_loop = pytest.mark.parametrize(
    ("spec", "types"), LOOPS, ids=[f"{spec.name} {types}" for spec, types in LOOPS]
)


def plain(spec, loops=((3, 4),), sizes=SIZES, types=FLOAT32, seed=0):
    """Contiguous operands; one loop shape serves for all."""
    rng = np.random.default_rng(seed)
    loops = loops if len(loops) > 1 else loops * spec.ufunc.nin
    return spec.operands(rng, loops, sizes, types)


def needs_core_dimensions(spec):
    if spec.is_elementwise:
        pytest.skip("an elementwise function has no core")


def needs_a_place(spec, types):
    if not spec.has_place(types):
        pytest.skip("no operand has the shape and the type of the result")


def same_results(got, want):
    for left, right in zip(got, want, strict=True):
        reference.same_bits(left, right)


@st.composite
def calls(draw, spec, types):
    """Operands of any loop shapes and memory layouts, and their core sizes."""
    shapes = draw(
        mutually_broadcastable_shapes(
            signature=spec.one_output, max_dims=3, min_side=0, max_side=3
        )
    )
    loops = [
        shape[: len(shape) - len(core)]
        for shape, core in zip(shapes.input_shapes, spec.cores, strict=False)
    ]
    n_pair = draw(st.sampled_from([0, 1, 2, 3, 4, 7, 17]))
    sizes = {"m": n_pair, "n": 2 * n_pair + draw(st.integers(0, 3))}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    operands = spec.operands(rng, loops, sizes, types)
    if draw(st.booleans()):
        operands = [sprinkle(rng, op) for op in operands]
    if draw(st.booleans()):
        whole = np.broadcast_shapes(*loops)
        operands = [
            np.broadcast_to(op, whole + op.shape[op.ndim - len(core) :])
            for op, core in zip(operands, spec.cores, strict=False)
        ]
    else:
        operands = [
            lay_out(op, lambda options: draw(st.sampled_from(options)))
            for op in operands
        ]
    return operands, sizes


# --- the table of gufuncs ------------------------------------------------------------


def test_every_gufunc_has_a_row():
    assert {*SPECS, *gufuncs.WHOLE} == set(posenc.ufunc.__all__)


@every_gufunc
def test_gufunc_is_a_ufunc_without_frozen_or_missing_dimensions(spec):
    assert type(spec.ufunc) is np.ufunc
    assert spec.ufunc.__doc__
    assert not set("?0123456789") & set(spec.signature)
    inputs = {name for core in spec.cores[: spec.ufunc.nin] for name in core}
    outputs = {name for core in spec.cores[spec.ufunc.nin :] for name in core}
    assert outputs <= inputs


# --- values in any memory ------------------------------------------------------------


@every_loop
@given(data=st.data())
def test_values_in_any_shape_and_layout(spec, types, data):
    operands, _ = data.draw(calls(spec, types))
    before = [op.tobytes() for op in operands]
    results = spec.call(*operands)
    spec.check(results, operands)
    assert before == [op.tobytes() for op in operands]


@every_loop
@given(data=st.data())
def test_out_in_any_layout_holds_the_result(spec, types, data):
    operands, sizes = data.draw(calls(spec, types))
    want = spec.call(*operands)
    out = tuple(
        lay_out(array, lambda options: data.draw(st.sampled_from(options)))
        for array in spec.fresh(operands, sizes)
    )
    for array in out:
        array.flags.writeable = True
    got = spec.call(*operands, out=out if len(out) > 1 else out[0])
    for array, result, wanted in zip(out, got, want, strict=True):
        assert result is array
        reference.same_bits(np.asarray(result).astype(wanted.dtype), wanted)


@every_loop
def test_huge_steps_between_rows(spec, types):
    operands = plain(spec, types=types)
    apart = []
    for op in operands:
        memory = np.zeros((op.shape[0], 100_003, *op.shape[1:]), op.dtype)
        memory[:, 7] = op
        apart.append(memory[:, 7])
    same_results(spec.call(*apart), spec.call(*operands))


@every_gufunc
@pytest.mark.parametrize(
    "loops", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=lambda shape: str(shape)
)
def test_empty_loops_give_empty_results(spec, loops):
    operands = plain(spec, (loops,))
    for result, core in zip(
        spec.call(*operands), spec.cores[spec.ufunc.nin :], strict=True
    ):
        sizes = (gufuncs.size_of(name, SIZES) for name in core)
        assert result.shape == (*loops, *sizes)


@every_gufunc
@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_table_without_pairs_changes_nothing(spec, n):
    sizes = {"n": n, "m": 0}
    operands = plain(spec, sizes=sizes)
    spec.check(spec.call(*operands), operands)


@every_gufunc
def test_read_only_operands_are_read(spec):
    operands = plain(spec)
    want = spec.call(*operands)
    for op in operands:
        op.flags.writeable = False
    same_results(spec.call(*operands), want)


# --- the same memory for inputs and outputs ------------------------------------------


@every_loop
@pytest.mark.parametrize("n_pair", [1, 2, 3, 15, 16, 17, 64, 130])
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_out_may_be_the_input(spec, types, n_pair, which):
    needs_a_place(spec, types)
    operands = plain(spec, sizes={"n": 2 * n_pair, "m": n_pair}, types=types)
    want = spec.call(*operands)
    out = [None] * spec.ufunc.nout
    out[which] = operands[spec.in_place]
    got = spec.call(*operands, out=tuple(out))
    assert got[which] is operands[spec.in_place]
    same_results(got, want)


@every_gufunc
def test_out_may_be_any_operand_of_its_shape(spec):
    if {"n", "m"} <= {name for core in spec.cores for name in core}:
        pytest.skip("a table is narrower than the result")
    sizes = {"n": 70, "m": 70}  # past the blocks that a kernel keeps in registers
    for which in range(spec.ufunc.nin):
        operands = plain(spec, sizes=sizes)
        [want, *_] = spec.call(*operands)
        if operands[which].shape == want.shape and operands[which].dtype == want.dtype:
            out = (operands[which], *[None] * (spec.ufunc.nout - 1))
            [got, *_] = spec.call(*operands, out=out)
            reference.same_bits(got, want)


@every_loop
@pytest.mark.parametrize("shift", [1, 3, 12, 13, -1, -12])
def test_out_may_overlap_the_input(spec, types, shift):
    needs_a_place(spec, types)
    operands = plain(spec, ((6,),), types=types)
    want = spec.call(*operands)
    given_ = operands[spec.in_place]
    memory = np.zeros(given_.size + abs(shift), given_.dtype)
    low, high = memory[: given_.size], memory[abs(shift) :]
    source, target = (low, high) if shift > 0 else (high, low)
    operands[spec.in_place] = source.reshape(given_.shape)
    operands[spec.in_place][...] = given_
    out = [None] * spec.ufunc.nout
    out[0] = target.reshape(given_.shape)
    same_results(spec.call(*operands, out=tuple(out)), want)


@every_loop
def test_out_may_be_the_input_reversed(spec, types):
    needs_a_place(spec, types)
    operands = plain(spec, ((6,),), types=types)
    want = spec.call(*operands)
    mirrors = (np.s_[::-1], np.s_[:, ::-1])
    for mirror in mirrors[: operands[spec.in_place].ndim]:
        again = [op.copy() for op in operands]
        out = [None] * spec.ufunc.nout
        out[0] = again[spec.in_place][mirror]
        same_results(spec.call(*again, out=tuple(out)), want)


@every_loop
def test_out_may_hold_another_operand(spec, types):
    """The last operand's memory, and the first one's where it is a column of out."""
    if not spec.cores[-1]:
        pytest.skip("a result of one number has no columns")
    sizes = {"n": 160, "m": 80}
    for index in range(spec.ufunc.nin):
        operands = plain(spec, ((6,),), sizes, types)
        want = spec.call(*operands)
        out = list(spec.fresh(operands, sizes))
        width = operands[index].nbytes // 6 // out[0].itemsize
        if width > out[0].shape[-1]:
            continue
        column = out[0][:, :width].view(operands[index].dtype)
        column = column.reshape(operands[index].shape)
        assert np.shares_memory(column, out[0])
        column[...] = operands[index]
        operands[index] = column
        same_results(spec.call(*operands, out=tuple(out)), want)


# --- keywords of NumPy ---------------------------------------------------------------


@every_loop
def test_axes_say_where_the_core_is(spec, types):
    needs_core_dimensions(spec)
    operands = plain(spec, types=types)
    want = spec.call(*operands)
    axes = [tuple(range(len(core))) for core in spec.cores]
    last = [tuple(range(-len(core), 0)) for core in spec.cores]
    moved = map(np.moveaxis, operands, last, axes)
    got = spec.call(*moved, axes=axes)
    results = slice(spec.ufunc.nin, None)
    same_results(map(np.moveaxis, got, axes[results], last[results]), want)


@every_loop
def test_dtype_asks_for_a_wider_computation(spec, types):
    operands = plain(spec, types=types)
    wide = [op.astype(np.result_type(op.dtype, np.float64)) for op in operands]
    got = spec.call(*operands, dtype=np.float64)
    same_results(got, spec.call(*wide))


@every_gufunc
def test_unsafe_out_is_refused(spec):
    operands = plain(spec)
    out = tuple(np.zeros(a.shape, np.int32) for a in spec.fresh(operands, SIZES))
    with pytest.raises(TypeError, match="same_kind"):
        spec.call(*operands, out=out)
    assert not any(array.any() for array in out)


@every_gufunc
def test_reduce_and_where_do_not_exist(spec):
    needs_core_dimensions(spec)
    operands = plain(spec)
    with pytest.raises(RuntimeError, match="signature"):
        spec.ufunc.reduce(operands[0])
    with pytest.raises(TypeError, match="where"):
        spec.call(*operands, where=True)


def test_cos_sin_narrow_results_of_wide_frequencies():
    """dtype= and out= narrow the table, never the angle."""
    rng = np.random.default_rng(5)
    positions = rng.uniform(2.0**30, 2.0**31, 40)
    inv_freq = 1e4 ** (-np.arange(8) / 8)
    out = tuple(np.zeros((40, 8), np.float32) for _ in range(2))
    asked = posenc.ufunc.cos_sin(positions, inv_freq, dtype=np.float32)
    given_ = posenc.ufunc.cos_sin(positions, inv_freq, out=out)
    for tables in (asked, given_):
        assert tables[0].dtype == np.float32
        gufuncs.within_table_ulp(tables, [positions, inv_freq])


# --- types ---------------------------------------------------------------------------


def result_type(spec, given):
    """The loop of exactly these types, or the first that they can safely be cast to.

    Loops of bfloat16 come first, but only where there is some; of cos_sin, any type
    of position will do.
    """
    loops = {types: [op.dtype for op in plain(spec, types=types)]
             for types in spec.types}  # fmt: skip
    own = [types for types in loops if bfloat16 in types]
    others = [types for types in loops if bfloat16 not in types]
    exact = [types for types in loops if loops[types] == given]
    for types in exact + (own if bfloat16 in given else []) + others:
        if all(map(np.can_cast, given, loops[types])):
            return types.data
    return None


REAL = ("?", "i1", "u1", "i2", "u2", "i4", "i8", "u8", "f2", bfloat16, "f4", "f8")
OTHER = ("F", "D", "g", "O", "M8[s]", "m8[s]", "S4", "U4")


@every_gufunc
@pytest.mark.parametrize("first", REAL, ids=str)
@pytest.mark.parametrize("rest", ["i1", "i8", "f2", bfloat16, "f4", "f8"], ids=str)
def test_result_type_is_that_of_the_first_loop_that_is_safe(spec, first, rest):
    operands = plain(spec)
    kinds = (first, *[rest] * 3)
    ops = [np.ones(op.shape, kind) for op, kind in zip(operands, kinds, strict=False)]
    for result in spec.call(*ops):
        assert result.dtype == result_type(spec, [op.dtype for op in ops])


@pytest.mark.parametrize("name", ["rope_half", "rope_interleaved", "rope_complex"])
@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_16_bit_data_decide_the_result_with_float32_tables(name, dtype):
    x, *table = plain(SPECS[name])
    assert SPECS[name].ufunc(x.astype(dtype), *table).dtype == dtype
    wide = [part.astype(np.result_type(part.dtype, np.float64)) for part in table]
    assert SPECS[name].ufunc(x.astype(dtype), *wide).dtype == np.float64


@every_gufunc
@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_other_types_are_refused(spec, kind, place):
    operands = plain(spec)
    takes_complex = spec.name == "rope_complex" and place == -1
    if takes_complex and kind in "FD":
        pytest.skip("a complex table is what rope_complex takes")
    operands[place] = np.zeros(operands[place].shape, kind)
    with pytest.raises(TypeError, match=spec.name):
        spec.call(*operands)


@every_gufunc
def test_lists_are_float64(spec):
    operands = plain(spec)
    for result in spec.call(*(op.tolist() for op in operands)):
        assert result.dtype == np.float64


FIRST_CALL = """
from posenc import ufunc
import numpy as np
from ml_dtypes import bfloat16

x = np.ones((2, 4), bfloat16)
for kind in {kinds}:
    table = np.ones((2, 2), kind)
    for name in ("rope_half", "rope_interleaved"):
        print(getattr(ufunc, name)(x, table, table).dtype)
print(ufunc.rope_complex(x, np.ones((2, 2), np.complex64)).dtype)
"""


@pytest.mark.parametrize("kinds", ["(bfloat16, 'f4')", "('f4', 'f2', bfloat16)"])
def test_the_very_first_call_may_be_one_of_bfloat16(kinds):
    """NumPy remembers which loop it found for types: all are there from the start."""
    lines = run([sys.executable, "-c", FIRST_CALL.replace("{kinds}", kinds)]).split()
    assert len(lines) >= 5
    assert set(lines) == {"bfloat16"}


def test_a_refused_call_leaves_bfloat16s_loops_to_be_found():
    code = """
import numpy as np
from ml_dtypes import bfloat16
from posenc import ufunc

x, table = np.ones((2, 4), bfloat16), np.ones((2, 2), "F")
for _ in range(2):
    try:
        ufunc.rope_half(x, table, table)
    except TypeError:
        print(ufunc.rope_half(x, table.real, table.real).dtype)
"""
    assert run([sys.executable, "-c", code]).split() == ["bfloat16", "bfloat16"]


# --- objects -------------------------------------------------------------------------


class Marked(np.ndarray):
    """A subclass, to see it come back."""


@every_gufunc
def test_subclass_comes_back(spec):
    operands = plain(spec)
    want = spec.call(*operands)
    got = spec.call(*(op.view(Marked) for op in operands))
    for result, wanted in zip(got, want, strict=True):
        assert type(result) is Marked
        reference.same_bits(result.view(np.ndarray), wanted)


class Listens:
    """Takes part in NumPy's dispatch and remembers who called."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return ufunc, method


@every_gufunc
def test_other_array_types_are_asked_first(spec):
    operands = plain(spec)
    operands[-1] = Listens()
    assert spec.ufunc(*operands) == (spec.ufunc, "__call__")


@every_gufunc
def test_pickle_and_copy_give_the_same_object(spec):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        text = pickle.dumps(spec.ufunc, protocol)
        assert pickle.loads(text) is spec.ufunc
    assert copy.deepcopy(spec.ufunc) is spec.ufunc


@every_gufunc
def test_cloudpickle_gives_the_same_object(spec):
    cloudpickle = pytest.importorskip("cloudpickle")
    assert pickle.loads(cloudpickle.dumps(spec.ufunc)) is spec.ufunc


@every_gufunc
def test_pickle_is_read_by_a_process_that_has_not_imported_posenc(spec):
    text = pickle.dumps(spec.ufunc)
    code = f"import pickle; print(pickle.loads({text!r}).__name__)"
    assert run([sys.executable, "-c", code]).strip() == spec.name


# --- numbers that are none -----------------------------------------------------------


@every_loop
@pytest.mark.parametrize("n_row", [3, 20_000], ids=["serial", "parallel"])
def test_never_warns(spec, types, n_row):
    rng = np.random.default_rng(1)
    operands = [sprinkle(rng, op) for op in plain(spec, ((n_row,),), types=types)]
    limits = [ml_dtypes.finfo(op.dtype) for op in operands]
    large, tiny, least = (
        [
            np.full_like(op, getattr(limit, which))
            for op, limit in zip(operands, limits, strict=True)
        ]
        for which in ("max", "tiny", "smallest_subnormal")
    )
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for ops in (operands, large, tiny, least):
            spec.call(*ops)


@every_loop
def test_nan_and_infinity_stay_in_their_row(spec, types):
    rows = 5
    for number in (np.nan, np.inf, -np.inf):
        for index in range(spec.ufunc.nin):
            operands = plain(spec, ((rows,),), types=types)
            want = spec.call(*operands)
            operands[index] = operands[index].copy()
            operands[index][2] = number
            got = spec.call(*operands)
            others = [0, 1, 3, 4]
            same_results([a[others] for a in got], [a[others] for a in want])


# --- sizes that do not fit -----------------------------------------------------------

ROTATIONS = ("rope_half", "rope_interleaved", "rope_complex")


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_a_table_too_wide_is_refused(name, n):
    spec = SPECS[name]
    operands = plain(spec, sizes={"n": n, "m": n // 2 + 1 + (n == 1)})
    out = spec.fresh(operands, {"n": n})[0]
    before = out.tobytes()
    table = "cis" if name == "rope_complex" else "cos"
    with pytest.raises(ValueError) as caught:
        spec.call(*operands, out=out)
    assert str(caught.value) == (
        f"{name}: {table} must hold at most head_dim // 2 = {n // 2} angles; "
        f"got {operands[1].shape[-1]}"
    )
    assert out.tobytes() == before


@every_gufunc
def test_core_sizes_of_one_name_must_agree(spec):
    needs_core_dimensions(spec)
    operands = plain(spec)
    names = [core[0] if core else None for core in spec.cores]
    named = [i for i in range(spec.ufunc.nin) if names[i]]
    shared = [i for i in named if names.count(names[i]) > 1]
    if not shared:
        pytest.skip("no two operands have a size in common")
    last = max(shared)
    operands[last] = operands[last][..., :-1]
    out = spec.fresh(plain(spec), SIZES)
    with pytest.raises(ValueError, match="mismatch in its core dimension"):
        spec.call(*operands, out=out)


@every_gufunc
def test_loops_that_do_not_broadcast_are_refused(spec):
    if spec.ufunc.nin == 1:
        pytest.skip("one operand needs no other")
    loops = [(3,)] + [(4,)] * (spec.ufunc.nin - 1)
    operands = plain(spec, loops)
    with pytest.raises(ValueError, match="could not be broadcast"):
        spec.call(*operands)


@every_loop
def test_all_sizes_one_is_answered(spec, types):
    """dask asks like this for the type of the result."""
    sizes = {"n": 1, "m": 1}
    operands = plain(spec, ((1, 1),), sizes, types)
    for result in spec.call(*operands):
        assert result.shape == (1, 1, *(1 for _ in spec.cores[-1]))
        assert result.dtype == types.data


@every_loop
def test_all_sizes_one_writes_its_one_element(spec, types):
    operands = plain(spec, ((1,),), {"n": 1, "m": 1}, types)
    memory = np.full(5, 7, types.data)
    out = [None] * spec.ufunc.nout
    out[0] = memory[2:3].reshape(1, *(1 for _ in spec.cores[-1]))
    spec.call(*operands, out=tuple(out))
    others = memory[[0, 1, 3, 4]]
    assert others.tolist() == [7, 7, 7, 7]
    if spec.name in ROTATIONS:
        assert memory[2] == operands[0].item()


# --- threads and instruction sets ----------------------------------------------------


@every_loop
def test_any_number_of_threads_gives_the_same_bits(spec, types):
    rng = np.random.default_rng(2)
    operands = plain(spec, ((2, 7919),), {"n": 23, "m": 11}, types)
    operands = [sprinkle(rng, op) for op in operands]
    try:
        posenc.set_num_threads(1)
        want = spec.call(*operands)
        for n in (2, 3, 4, 7):
            posenc.set_num_threads(n)
            same_results(spec.call(*operands), want)
    finally:
        posenc.set_num_threads(None)


def run(command, **environment):
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_instruction_sets_give_the_same_bits(measured):
    script = [sys.executable, str(HERE / "workload.py")]
    best = json.loads(run(script, POSENC_SIMD=""))
    n_present = INSTRUCTION_SETS.index(best["simd"]) + 1
    present, absent = INSTRUCTION_SETS[:n_present], INSTRUCTION_SETS[n_present:]
    assert len(best) > 300
    for name in present[:-1]:
        digests = json.loads(run(script, POSENC_SIMD=name))
        different = [key for key in best if digests[key] != best[key]]
        assert different == ["simd"]
        assert digests["simd"] == name
    lacking = f"; this processor lacks {', '.join(absent)}" if absent else ""
    measured(f"instruction sets compared, bit for bit: {', '.join(present)}{lacking}")


# --- dask ----------------------------------------------------------------------------


@every_loop
def test_dask_chunks_the_loops(spec, types):
    da = pytest.importorskip("dask.array")
    operands = plain(spec, ((4, 6),), types=types)
    want = spec.call(*operands)
    chunked = [
        da.from_array(op, chunks=(2, 3) + (-1,) * len(core))
        for op, core in zip(operands, spec.cores, strict=False)
    ]
    for result, wanted in zip(spec.call(*chunked), want, strict=True):
        assert isinstance(result, da.Array)
        assert result.numblocks[:2] == (2, 2)
        assert result.dtype == wanted.dtype
        reference.same_bits(result.compute(scheduler="threads"), wanted)


def test_dask_tables_in_one_chunk_after_unify_chunks():
    da = pytest.importorskip("dask.array")
    spec = SPECS["rope_half"]
    x, cos, sin = plain(spec, ((3, 8), (8,), (8,)))
    chunked = da.from_array(x, chunks=(1, 3, -1))
    _, (rows, cosines, sines) = da.core.unify_chunks(
        chunked, "btn", da.from_array(cos), "tm", da.from_array(sin), "tm"
    )
    result = spec.ufunc(rows, cosines, sines)
    assert result.numblocks == (3, 3, 1)
    reference.same_bits(result.compute(), spec.ufunc(x, cos, sin))


def test_dask_distributed_local_cluster():
    distributed = pytest.importorskip("distributed")
    da = pytest.importorskip("dask.array")
    spec = SPECS["rope_interleaved"]
    x, cos, sin = plain(spec, ((4, 8),))
    chunks = (2, 4, -1)
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            dashboard_address=None,
            memory_limit=0,
        ) as cluster,
        distributed.Client(cluster),
    ):
        chunked = [da.from_array(op, chunks=chunks) for op in (x, cos, sin)]
        got = spec.ufunc(*chunked).compute(timeout=120)
    reference.same_bits(got, spec.ufunc(x, cos, sin))
