"""Random calls through both doors: the results must agree bit for bit.

    python tests/fuzz_doors.py --calls 1000000 [--seed 0]

The fast door is `rope`, `rope_qk` or `rope_complex` on plain arrays; the other is the
raw gufunc, with the table placed along the axes by tests/reference.py.
"""

# SPDX-License-Identifier: BSD-3-Clause

import argparse
from dataclasses import dataclass, field

import numpy as np
import reference
from gufuncs import DTYPES, lay_out, sprinkle

import posenc
from posenc import ufunc
from posenc._rope_check import inverse_table

GUFUNC = {"half": ufunc.rope_half, "interleaved": ufunc.rope_interleaved}
DIRECTIONS = ({}, {}, {"adjoint": True}, {"inverse": True})
OUT = ("none", "none", "fresh", "x", "overlap")


@dataclass
class Call:
    """One call: its function, its operands and its keywords."""

    function: str
    operands: list  # x, or q and k
    cos: np.ndarray
    sin: np.ndarray
    layout: str
    axis: int
    positions: np.ndarray | None
    direction: dict
    out: list = field(default_factory=list)


def shuffled(array, choose, rng):
    """Copy an array into memory with its axes in random order."""
    order = rng.permutation(array.ndim)
    laid = lay_out(array.transpose(order), choose)
    return laid.transpose(np.argsort(order))


def table_rows(choose, rng, shape, axis):
    """Shape of a table's rows, for x of this shape, and shape of the positions."""
    axis %= len(shape)
    loops, n_position = shape[:-1], shape[axis]
    n_batch = choose([1, shape[0]])
    kinds = ["full"]
    if len(shape) > 2:
        kinds += ["rows", "gather"]
    if len(shape) > 3 and axis > 0:
        kinds += ["batch", "gather batch"]
    kind = choose(kinds)
    if kind == "full":
        return tuple(choose([n, n, 1]) for n in loops), None
    if kind == "rows":
        return (n_position,), None
    if kind == "batch":
        return (n_batch, n_position), None
    gathered = (n_position,) if kind == "gather" else (n_batch, n_position)
    return (choose([1, 2, 9]),), gathered


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


def random_call(choose, rng, layout=None, dtype=None):
    """A call with random shapes, memory, tables and keywords."""
    dtype = dtype or choose(DTYPES)
    function = choose(["rope", "rope", "rope_qk", "rope_complex"])
    if function == "rope_complex":
        layout = "interleaved"
    layout = layout or choose(["half", "interleaved"])
    n_pair = choose([0, 1, 2, 3, 4, 8, 9, 16, 33])
    head_dim = 2 * n_pair + choose([0, 0, 1, 3])
    loops = [choose([1, 2, 3, 5, 5, 0]) for _ in range(choose([0, 1, 2, 3, 3, 4]))]
    if loops and choose([False] * 50 + [True]):
        loops[choose(range(len(loops)))] = 400  # enough work for threads
    shape = (*loops, head_dim)
    axis = choose(range(-len(shape), -1)) if loops else -2
    rows, gathered = table_rows(choose, rng, shape, axis)
    cos, sin = (rng.standard_normal((*rows, n_pair)).astype(dtype) for _ in "cs")
    positions = None
    if gathered is not None:
        kind = choose(["i8", "i8", "i4", "u2"])
        positions = rng.integers(0, rows[0], gathered).astype(kind)
    n_operand = 2 if function == "rope_qk" else 1
    xs = [rng.standard_normal(shape).astype(dtype) for _ in range(n_operand)]
    if choose([False, False, False, True]):
        xs = [sprinkle(rng, x) for x in xs]
        cos = sprinkle(rng, cos)
    call = Call(function, [], cos, sin, layout, axis, positions, choose(DIRECTIONS))
    if choose([True, False]):
        xs = [shuffled(x, choose, rng) for x in xs]
        call.cos, call.sin = (lay_out(table, choose) for table in (cos, sin))
    kind = choose(OUT)
    for x in xs:
        x, out = place_out(choose, rng, x, kind)
        call.operands.append(x)
        call.out.append(out)
    return call


def by_gufunc(call):
    """The results by way of the raw gufuncs, from copies of the operands."""
    cos, sin = (np.array(t, t.dtype.newbyteorder("=")) for t in (call.cos, call.sin))
    if call.direction.get("adjoint"):
        sin = -sin
    if call.direction.get("inverse"):  # the doors differ after this, not in it
        cos, sin = inverse_table("fuzz", cos, sin, True, False)
    if call.positions is not None:
        cos, sin = cos[call.positions], sin[call.positions]
    results = []
    for x in call.operands:
        x = np.array(x, x.dtype.newbyteorder("="))
        tables = [reference.place_table(t, x.shape, call.axis) for t in (cos, sin)]
        results.append(GUFUNC[call.layout](x, *tables))
    return results


def by_fast_door(call):
    """The results by way of the public function."""
    options = {"axis": call.axis, "positions": call.positions, **call.direction}
    if call.function == "rope_complex":
        cis = np.empty(call.cos.shape, np.result_type(call.cos.dtype, np.complex64))
        cis.real, cis.imag = call.cos, call.sin
        return [posenc.rope_complex(*call.operands, cis, out=call.out[0], **options)]
    options["layout"] = call.layout
    if call.function == "rope":
        return [
            posenc.rope(*call.operands, call.cos, call.sin, out=call.out[0], **options)
        ]
    out = None if call.out[0] is None else tuple(call.out)
    return posenc.rope_qk(*call.operands, call.cos, call.sin, out=out, **options)


def check(call):
    """Assert that both doors give the same bits, and the right array back."""
    want = by_gufunc(call)
    before = [np.array(x) for x in call.operands]
    got = by_fast_door(call)
    for result, wanted in zip(got, want, strict=True):
        reference.same_bits(result, wanted)
    for x, then, out, result in zip(call.operands, before, call.out, got, strict=True):
        assert out is None or result is out
        if out is None or not np.may_share_memory(x, out):
            reference.same_bits(x, then)


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
