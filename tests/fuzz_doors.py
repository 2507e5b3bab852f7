"""Random calls through both doors: the results must agree bit for bit.

    python tests/fuzz_doors.py --calls 1000000 [--seed 0]

The fast door is `rope`, `rope_qk` or `rope_complex` on plain arrays or torch tensors;
the other is the raw gufunc on copies, with the table placed along the axes by
tests/reference.py, or the reference itself where products are rounded.
"""

# SPDX-License-Identifier: BSD-3-Clause

import argparse
from dataclasses import dataclass, field

import numpy as np
import reference
from gufuncs import PLAIN, PLANAR, SHORT_BY_OWN, lay_out, sprinkle
from ml_dtypes import bfloat16

import posenc
from posenc import _core, ufunc
from posenc._rope_check import inverse_table

try:
    import torch
except ImportError:
    torch = None

GUFUNC = {"half": ufunc.rope_half, "interleaved": ufunc.rope_interleaved}
DIRECTIONS = ({}, {}, {"adjoint": True}, {"inverse": True})
OUT = ("none", "none", "fresh", "x", "overlap")


@dataclass
class Call:
    """One call: its function, its operands and its keywords."""

    function: str
    operands: list  # x, or q and k
    cos: object
    sin: object
    layout: str
    axis: int
    positions: object
    offset: object
    start: int
    rounding: str
    direction: dict
    out: list = field(default_factory=list)
    is_common: bool = False  # the fast door itself must take it


# --- arrays and tensors --------------------------------------------------------------


def is_tensor(thing):
    return torch is not None and isinstance(thing, torch.Tensor)


def array_of(thing):
    """A copy as an array in this machine's byte order."""
    if not is_tensor(thing):
        return np.array(thing, thing.dtype.newbyteorder("="))
    thing = thing.detach().clone()
    if thing.dtype is torch.bfloat16:
        return thing.view(torch.int16).numpy().view(bfloat16)
    return thing.numpy()


def tensor_of(array):
    """A tensor with the elements of an array."""
    if array.dtype == bfloat16:
        words = torch.from_numpy(np.array(array).view(np.int16))
        return words.view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def tensor_view(choose, rng, array, can_repeat):
    """A tensor of the array's shape as attention makes them; maybe of other values.

    Its axes lie in any order, with gaps; it may repeat what one index holds; axes of
    size 1 have any stride.
    """
    tensor = tensor_of(array)
    if choose([True, False, False]):
        return tensor
    if array.ndim and can_repeat and choose([True, False, False]):
        axis = choose(range(array.ndim))
        if array.shape[axis]:
            tensor = tensor.narrow(axis, 0, 1)
    order = [int(i) for i in rng.permutation(array.ndim)]
    steps = [choose([1, 1, 1, 2]) for _ in order]
    starts = [choose([0, 0, 1]) for _ in order]
    sizes = [tensor.shape[i] for i in order]
    around = [
        start + n * step for start, n, step in zip(starts, sizes, steps, strict=True)
    ]
    memory = torch.full(around, 77).to(tensor.dtype)
    cuts = [slice(start, None, step) for start, step in zip(starts, steps, strict=True)]
    view = memory[tuple(cuts)] if cuts else memory
    view = view.permute([order.index(i) for i in range(array.ndim)])
    view.copy_(tensor)
    strides = [
        choose([stride, stride, 1, 3]) if n == 1 else stride
        for n, stride in zip(view.shape, view.stride(), strict=True)
    ]
    view = view.as_strided(view.shape, strides).expand(array.shape)
    return torch.nn.Parameter(view, False) if choose([False] * 9 + [True]) else view


def shuffled(array, choose, rng):
    """Copy an array into memory with its axes in random order."""
    order = rng.permutation(array.ndim)
    laid = lay_out(array.transpose(order), choose)
    return laid.transpose(np.argsort(order))


def place_out(choose, rng, x, kind):
    """Where the result goes: nowhere, elsewhere, into x, or across x."""
    if kind == "none":
        return x, None
    if kind == "fresh":
        out = shuffled(np.zeros_like(x), choose, rng)
        out.flags.writeable = True
        return x, out if out.dtype.isnative else out.astype(x.dtype)
    if kind == "x":
        x = x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
        x.flags.writeable = True
        return x, x
    shift = choose([1, 2, x.shape[-1], -1, -3])
    memory = np.zeros(x.size + abs(shift), x.dtype.newbyteorder("="))
    low, high = memory[: x.size].reshape(x.shape), memory[abs(shift) :].reshape(x.shape)
    source, target = (low, high) if shift > 0 else (high, low)
    source[...] = x
    return source, target


def place_tensors(choose, rng, x, kind):
    """The same with tensors."""
    if kind == "none":
        return tensor_view(choose, rng, x, True), None
    if kind == "fresh":
        out = tensor_view(choose, rng, np.zeros_like(x), False)
        return tensor_view(choose, rng, x, True), out
    if kind == "x":
        x = tensor_view(choose, rng, x, False)
        return x, x
    source, target = place_out(choose, rng, x, kind)
    shift = (target.ctypes.data - source.ctypes.data) // x.itemsize
    memory = tensor_of(np.zeros(x.size + abs(shift), x.dtype))
    low, high = memory[: x.size].view(x.shape), memory[abs(shift) :].view(x.shape)
    source, target = (low, high) if shift > 0 else (high, low)
    source.copy_(tensor_of(x))
    return source, target


# --- a call --------------------------------------------------------------------------


def table_rows(choose, rng, shape, axis):
    """Shape of a table's rows for x of this shape, and the positions and the offset."""
    axis %= len(shape)
    loops, n_position = shape[:-1], shape[axis]
    n_batch = choose([1, shape[0]])
    kinds = ["full"]
    if len(shape) > 1:
        kinds += ["offset"]
    if len(shape) > 2:
        kinds += ["rows", "gather"]
    if len(shape) > 2 and axis > 0:
        kinds += ["offsets"]
    if len(shape) > 3 and axis > 0:
        kinds += ["batch", "gather batch"]
    kind = choose(kinds)
    if kind == "full":
        return tuple(choose([n, n, 1]) for n in loops), None, None
    if kind == "rows":
        return (n_position,), None, None
    if kind == "batch":
        return (n_batch, n_position), None, None
    if kind.startswith("offset"):
        room = choose([0, 1, 7])
        offset = rng.integers(
            0, room, n_batch if kind == "offsets" else (), endpoint=True
        )
        return (n_position + room,), None, offset if offset.ndim else int(offset)
    n_row = choose([1, 2, 9])
    gathered = (n_position,) if kind == "gather" else (n_batch, n_position)
    return (n_row,), rng.integers(0, n_row, gathered), None


def random_start(choose, head_dim, n_pair):
    """The first rotated channel, counted from either end."""
    room = head_dim - 2 * n_pair
    start = choose([0, 0, 0, choose(range(room + 1))])
    return start - head_dim if start and choose([True, False]) else start


def random_call(choose, rng, layout=None, dtype=None):
    """A call with random shapes, memory, tables and keywords."""
    types = choose([t for t in PLANAR if dtype in (None, t.data)])
    function = choose(["rope", "rope", "rope_qk", "rope_complex"])
    if function == "rope_complex":
        layout = "interleaved"
        types = choose(
            [t for t in PLANAR if t.data == types.data and t not in SHORT_BY_OWN]
        )
    layout = layout or choose(["half", "interleaved"])
    n_pair = choose([0, 1, 2, 3, 4, 8, 9, 16, 33])
    head_dim = 2 * n_pair + choose([0, 0, 1, 3, 16])
    loops = [choose([1, 2, 3, 5, 5, 0]) for _ in range(choose([0, 1, 2, 3, 3, 4]))]
    if loops and choose([False] * 50 + [True]):
        loops[choose(range(len(loops)))] = 400  # enough work for threads
    shape = (*loops, head_dim)
    axis = choose(range(-len(shape), -1)) if loops else -2
    rows, positions, offset = table_rows(choose, rng, shape, axis)
    cos, sin = (rng.standard_normal((*rows, n_pair)).astype(types.table) for _ in "cs")
    if positions is not None:
        positions = positions.astype(choose(["i8", "i8", "i4", "u2"]))
    n_operand = 2 if function == "rope_qk" else 1
    xs = [rng.standard_normal(shape).astype(types.data) for _ in range(n_operand)]
    if choose([False, False, False, True]):
        xs = [sprinkle(rng, x) for x in xs]
        cos = sprinkle(rng, cos)
    rounding = "once" if types in PLAIN else choose(["once", "once", "eager"])
    start = random_start(choose, head_dim, n_pair)
    direction = choose(DIRECTIONS)
    call = Call(function, [], cos, sin, layout, axis, positions, offset, start,
                rounding, direction)  # fmt: skip
    kind = choose(OUT)
    if torch is not None and choose([True, False]):
        fill_with_tensors(call, choose, rng, xs, kind)
    else:
        fill_with_arrays(call, choose, rng, xs, kind)
    return call


def fill_with_arrays(call, choose, rng, xs, kind):
    """Lay out the operands of a call in memory."""
    is_plain = choose([True, False])
    if not is_plain:
        xs = [shuffled(x, choose, rng) for x in xs]
        call.cos, call.sin = (lay_out(table, choose) for table in (call.cos, call.sin))
    for x in xs:
        x, out = place_out(choose, rng, x, kind)
        call.operands.append(x)
        call.out.append(out)
    call.is_common = is_plain and kind == "none" and has_common_rows(call)


def fill_with_tensors(call, choose, rng, xs, kind):
    """The same with tensors; the table and the positions may be arrays."""
    if choose([True, True, False]):
        call.cos, call.sin = (
            tensor_view(choose, rng, table, True) for table in (call.cos, call.sin)
        )
    if call.positions is not None and choose([True, False]):
        positions = call.positions.astype(choose(["i8", "i4"]))
        call.positions = tensor_view(choose, rng, positions, True)
    for x in xs:
        x, out = place_tensors(choose, rng, x, kind)
        call.operands.append(x)
        call.out.append(out)
    call.is_common = kind == "none" and has_common_rows(call)


def has_common_rows(call):
    """Whether the fast door itself gathers by these positions, if any."""
    signed = call.positions is None or str(call.positions.dtype)[-5:] != "int16"
    return signed and type(call.offset) in (int, type(None))


# --- both doors ----------------------------------------------------------------------


def by_gufunc(call):
    """The results by way of the raw gufuncs, from copies of the operands."""
    cos, sin = array_of(call.cos), array_of(call.sin)
    if call.direction.get("adjoint"):
        sin = -sin
    if call.direction.get("inverse"):  # the doors differ after this, not in it
        cos, sin = inverse_table(cos, sin)
    rotate = GUFUNC[call.layout]
    results = []
    for x in map(array_of, call.operands):
        rows = np.s_[:] if call.positions is None else array_of(call.positions)
        if call.offset is not None:
            rows = np.add.outer(call.offset, np.arange(x.shape[call.axis]))
        tables = [
            reference.place_table(t[rows], x.shape, call.axis) for t in (cos, sin)
        ]
        before, rotated = np.split(x, [call.start % max(x.shape[-1], 1)], axis=-1)
        if call.rounding == "eager":
            turned = reference.ROTATE[call.layout](rotated, *tables, "eager")
        else:
            turned = rotate(rotated, *tables)
        results.append(np.concatenate([before, turned], axis=-1))
    return results


def complex_table(call):
    """The table of a call as one of complex numbers."""
    cos, sin = array_of(call.cos), array_of(call.sin)
    cis = np.empty(cos.shape, np.result_type(cos.dtype, np.complex64))
    cis.real, cis.imag = cos, sin
    return tensor_of(cis) if is_tensor(call.cos) else cis


def by_fast_door(call):
    """The results by way of the public function."""
    options = {
        "axis": call.axis,
        "positions": call.positions,
        "offset": call.offset,
        "rotary_start": call.start,
        "rounding": call.rounding,
        **call.direction,
    }
    if call.function == "rope_complex":
        cis = complex_table(call)
        return [posenc.rope_complex(*call.operands, cis, out=call.out[0], **options)]
    options["layout"] = call.layout
    if call.function == "rope":
        return [
            posenc.rope(*call.operands, call.cos, call.sin, out=call.out[0], **options)
        ]
    out = None if call.out[0] is None else tuple(call.out)
    return posenc.rope_qk(*call.operands, call.cos, call.sin, out=out, **options)


def assert_is_taken(call):
    """Assert that the fast door does not leave this to the slow one."""
    function = getattr(_core, f"{call.function}_arrays")
    table, layout = (call.cos, call.sin), (call.layout,)
    if call.function == "rope_complex":
        table, layout = (complex_table(call),), ()
    rows = call.positions if call.offset is None else call.offset
    result = function(*call.operands, *table, *layout, call.axis, rows, False, None,
                      call.rounding, call.start)  # fmt: skip
    assert result is not NotImplemented


def assert_is_like(result, x):
    """Assert that a fresh result is of x's kind; a tensor, in x's memory order."""
    assert is_tensor(result) == is_tensor(x)
    if is_tensor(x):
        assert type(result) is torch.Tensor
        assert result.stride() == torch.empty_like(x).stride()


def check(call):
    """Assert that both doors give the same bits, and the right array back."""
    want = by_gufunc(call)
    before = [array_of(x) for x in call.operands]
    got = by_fast_door(call)
    for result, wanted in zip(got, want, strict=True):
        reference.same_bits(array_of(result), wanted)
    for x, then, out, result in zip(call.operands, before, call.out, got, strict=True):
        if out is None:
            assert_is_like(result, x)
        assert out is None or result is out
        if out is None or not share_memory(x, out):
            reference.same_bits(array_of(x), then)
    if call.is_common:
        assert_is_taken(call)


def share_memory(x, out):
    if is_tensor(x):
        return x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    return np.may_share_memory(x, out)


def main():
    """Run the calls asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    numbers = range(arguments.calls)
    try:
        from tqdm import tqdm

        numbers = tqdm(numbers, mininterval=1.0, unit="call")
    except ImportError:
        print("no tqdm: no progress shown")
    for number in numbers:
        state = rng.bit_generator.state
        call = random_call(lambda options: options[rng.integers(len(options))], rng)
        try:
            check(call)
        except Exception:
            print(f"call {number} of seed {arguments.seed}; state {state}\n{call}")
            raise
    print(f"{arguments.calls} calls through both doors: no bit differs")


if __name__ == "__main__":
    main()
