"""What the functions of RoPE check, and their general way to a result.

The fast functions of `_core` take plain arrays and tensors of one type and decline
everything else. Here each call is checked and brought to that form; what they decline
even then (overlap, odd memory, subclasses, dask) goes through the gufuncs.
"""

# SPDX-License-Identifier: BSD-3-Clause
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from . import _core
from . import _tensors as tensors
from ._check import (
    as_array,
    must,
    one_of,
    out_array,
    real_number,
    true_or_false,
    whole_number,
)
from ._results import dtypes_of, real_kind, share_memory, widest
from ._rope_rows import choose_rows, sequence_axis

ANGLES = ("exact", "float32")
LAYOUTS = {"half": _core.rope_half, "interleaved": _core.rope_interleaved}
ROUNDINGS = ("once", "eager")
COMPLEX = {np.dtype(np.float32): np.complex64, np.dtype(np.float64): np.complex128}
_DOORS = {
    "rope": _core.rope_arrays,
    "rope_qk": _core.rope_qk_arrays,
    "rope_complex": _core.rope_complex_arrays,
}


@dataclass(frozen=True)
class Call:
    """A call of one of the rotations, with the options that all share."""

    function: str
    layout: str
    axis: int
    positions: object
    offset: object
    cu_seqlens: object
    rotary_start: int
    inverse: bool
    adjoint: bool
    rounding: str

    def rotate(self, operands, table, outs):
        """Return the results for operands and tables given by name."""
        with np.errstate(all="ignore"):
            return self._rotate(operands, table, outs)

    def _rotate(self, operands, table, outs):
        one_of(self.function, "layout", self.layout, LAYOUTS)
        one_of(self.function, "rounding", self.rounding, ROUNDINGS)
        true_or_false(self.function, "inverse", self.inverse)
        true_or_false(self.function, "adjoint", self.adjoint)
        if self.inverse and self.adjoint:
            rule = "not be set together with adjoint"
            raise ValueError(must(self.function, "inverse", rule, True))
        places = (("out", outs[0]),)
        if len(outs) == 2:
            places = ("out[0]", outs[0]), ("out[1]", outs[1])
        checked = [
            Operand(name, x, _real_array(self.function, name, x), *place)
            for (name, x), place in zip(operands.items(), places, strict=True)
        ]
        table = _checked_table(self.function, table, self.inverse)
        plans = [_plan(self, operand, table) for operand in checked]
        if len(plans) == 2 and share_memory(plans[0].out, plans[1].out):
            rule = "hold two arrays that do not overlap"
            raise ValueError(must(self.function, "out", rule, "overlapping arrays"))
        tensors.mark_changed(*outs)
        return _run(self, plans)


# --- the table -----------------------------------------------------------------------


def _checked_table(function, table, inverse):
    """Return the parts of a table as arrays, those of its inverse if so asked."""
    if "cis" in table:
        cis = as_array(function, "cis", table["cis"])
        if cis.dtype not in (np.complex64, np.complex128):
            rule = "be complex64 or complex128"
            raise TypeError(must(function, "cis", rule, f"dtype {cis.dtype}"))
        parts = {"cis": _inverse_complex(cis) if inverse else cis}
    else:
        parts = {name: as_array(function, name, part) for name, part in table.items()}
        for name, part in parts.items():
            real_kind(function, name, part.dtype)
        cos, sin = parts["cos"], parts["sin"]
        if cos.shape != sin.shape:
            rule = f"have the shape of cos, {cos.shape}"
            raise ValueError(must(function, "sin", rule, f"shape {sin.shape}"))
        if inverse:
            parts = dict(zip(parts, inverse_table(cos, sin), strict=True))
    name, first = next(iter(parts.items()))
    if first.ndim == 0:
        raise ValueError(must(function, name, "have at least one axis", "shape ()"))
    return parts


def inverse_table(cos, sin):
    """Return the table whose rotations undo those of (cos, sin).

    It is rounded to the dtype of the table, but to no less than float32.
    """
    dtype = widest(cos.dtype, sin.dtype, np.dtype(np.float32))
    with np.errstate(all="ignore"):
        cos, sin = cos.astype(np.float64), sin.astype(np.float64)
        # By a power of two first, which costs no bit: squares of tables with a
        # large or small attention factor would leave the range of float64.
        _, exponent = np.frexp(np.maximum(np.abs(cos), np.abs(sin)))
        cos, sin = np.ldexp(cos, -exponent), np.ldexp(sin, -exponent)
        square = cos * cos + sin * sin
        parts = np.ldexp(cos / square, -exponent), np.ldexp(-sin / square, -exponent)
        return parts[0].astype(dtype), parts[1].astype(dtype)


def _inverse_complex(cis):
    """Return the complex table whose products undo those of cis."""
    inverted = np.empty_like(cis)
    inverted.real, inverted.imag = inverse_table(cis.real, cis.imag)
    return inverted


# --- one operand ---------------------------------------------------------------------


class Operand(NamedTuple):
    """What is to be rotated, and where the result is to go."""

    name: str
    given: object  # by the user
    x: np.ndarray
    out_name: str
    out: object


def _real_array(function, name, x):
    """Return what is to be rotated as an array."""
    x = as_array(function, name, x)
    real_kind(function, name, x.dtype)
    if x.ndim == 0:
        raise ValueError(must(function, name, "have at least one axis", "shape ()"))
    return x


@dataclass(frozen=True)
class Plan:
    """A checked rotation, which is not to fail any more."""

    x: np.ndarray
    table: list  # in the dtype to compute with
    rows: np.ndarray | None  # what to gather from the table
    shape: tuple  # gives the gathered table as many axes as x
    start: int
    out: np.ndarray | None
    answer: object  # what the user gets; None: the array that was computed

    def table_key(self):
        """Return what two rotations must have in common to share a table."""
        rows = None if self.rows is None else self.rows.shape
        return self.start, rows, self.table[0].dtype, self.table[0].shape

    def apart_from(self, written):
        """Return the plan with copies of what shares memory with `written`."""
        x, rows, *table = (
            part.copy() if share_memory(part, written) else part
            for part in (self.x, self.rows, *self.table)
        )
        return replace(self, x=x, table=table, rows=rows)

    def with_result(self):
        """Return the plan with its result allocated, if that is ours to do."""
        if self.out is None and isinstance(self.x, np.ndarray):
            return replace(self, out=np.empty_like(self.x))
        return self

    def run(self, rotation, adjoint):
        """Return the rotated x by way of a function on whole arrays."""
        parts = [part if self.rows is None else part[self.rows] for part in self.table]
        if adjoint:
            parts[-1] = np.conj(parts[-1]) if len(parts) == 1 else -parts[-1]
        parts = [part.reshape(self.shape) for part in parts]
        x, start, out = self.x, self.start, self.out
        if out is None:  # no ndarray
            result = rotation(x[..., start:], *parts)
            return np.concatenate([x[..., :start], result], -1) if start else result
        if start and share_memory(x, out):
            x = x.copy()
        rotation(x[..., start:], *parts, out=out[..., start:])
        out[..., :start] = x[..., :start]
        return out


def _plan(call, operand, table):
    """Check one rotation and bring its operands to the dtype to compute in."""
    name, given, x, out_name, out = operand
    table, rows = choose_rows(call, name, x, table)
    table_name, first = next(iter(table.items()))  # the parts have one shape
    start = _first_channel(call, table_name, first.shape[-1], name, x.shape[-1])
    dtype, kind = dtypes_of(x.dtype, *(part.real.dtype for part in table.values()))
    answer, is_tensor = out, tensors.is_tensor(given)
    if out is not None:
        _only_arrays(call.function, out_name, out, {name: x, **table})
        out = out_array(call.function, out, x.shape, dtype, out_name, is_tensor)
    shape = _rows_like(call, table_name, first.shape, rows, name, x.shape)
    kinds = {"cis": COMPLEX.get(kind)}
    table = [part.astype(kinds.get(n, kind), copy=False) for n, part in table.items()]
    x = x.astype(dtype, copy=False)
    if out is None and is_tensor:
        answer = tensors.empty_like(given, dtype)
        out = tensors.as_numpy(answer)
    numbers = None if rows is None else rows.numbers
    return Plan(x, table, numbers, shape, start, out, answer)


def _only_arrays(function, out_name, out, operands):
    """Raise if the result of another library's arrays is to go to an array."""
    for name, operand in operands.items():
        if not isinstance(operand, np.ndarray):
            rule = f"be None for {name} of type {type(operand).__name__}"
            raise TypeError(must(function, out_name, rule, type(out).__name__))


def _first_channel(call, name, n_pair, x_name, head_dim):
    """Return the number of the first rotated channel."""
    if 2 * n_pair > head_dim:
        rule = f"hold at most head_dim // 2 = {head_dim // 2} angles, each of them once"
        raise ValueError(must(call.function, name, rule, n_pair))
    here = (call.function, "rotary_start")
    start = whole_number(*here, call.rotary_start, -head_dim)
    first = start + head_dim if start < 0 else start
    if first + 2 * n_pair > head_dim:
        rule = f"leave 2 * M = {2 * n_pair} of the {head_dim} channels of {x_name}"
        raise ValueError(must(*here, rule, start))
    return first


def _rows_like(call, name, table, rows, x_name, x):
    """Return the shape that gives a table, once gathered, as many axes as x."""
    n_axis, axis = len(x), sequence_axis(call.function, x_name, len(x), call.axis)
    if rows is not None:
        table = (*rows.numbers.shape, table[-1])
    shape = list(table)
    is_short = 1 < len(table) < 4 and len(table) != n_axis
    if n_axis > 1 and is_short and len(table) - 2 <= axis:
        shape = [1] * n_axis
        shape[0] = table[0] if len(table) == 3 else 1
        shape[-1] = table[-1]
        shape[axis] = table[-2] if table[-2] == x[axis] else None
    pairs = zip(shape[:-1], x[:-1], strict=False)
    if len(shape) != n_axis or any(size not in (1, n) for size, n in pairs):
        forms, shown = "(T, M) or (B, T, M)", table
        if rows is not None:
            name, forms, shown = rows.name, rows.forms, rows.shape
        rule = (
            f"be of shape {forms}, or broadcast, for {x_name} of shape {x} "
            f"with T along axis {axis}"
        )
        raise ValueError(must(call.function, name, rule, f"shape {shown}"))
    return tuple(shape)


# --- the ways to a result ------------------------------------------------------------


def _run(call, plans):
    """Return the results of one plan or two, by the fast door if it takes them now."""
    results = _by_fast_door(call, plans)
    if results is NotImplemented:
        results = _by_gufunc(call, plans)
    return [
        result if plan.answer is None else plan.answer
        for plan, result in zip(plans, results, strict=True)
    ]


def _by_fast_door(call, plans):
    """Ask the fast door once more, now that everything has its canonical form."""
    first = plans[0]
    if any(plan.table_key() != first.table_key() for plan in plans):
        return NotImplemented
    layout = () if call.function == "rope_complex" else (call.layout,)
    outs = tuple(plan.out for plan in plans)
    result = _DOORS[call.function](
        *(plan.x for plan in plans),
        *first.table,
        *layout,
        int(call.axis),
        first.rows,
        bool(call.adjoint),
        outs[0] if len(outs) == 1 else outs,
        call.rounding,
        first.start,
    )
    return (result,) if len(outs) == 1 and result is not NotImplemented else result


def _by_gufunc(call, plans):
    """Rotate by way of the gufuncs, which handle any memory and any kind of array."""
    if len(plans) == 2:  # the first result must not change what the second reads
        plans = [plans[0], plans[1].apart_from(plans[0].out)]
    # What may fail, for want of memory, comes before anything is written.
    plans = [plan.with_result() for plan in plans]
    rotations = [_rotation(call, plan.x.dtype) for plan in plans]
    return [
        plan.run(rotation, call.adjoint)
        for plan, rotation in zip(plans, rotations, strict=True)
    ]


def _rotation(call, dtype):
    """Return the function of whole arrays that a call asks for."""
    if call.rounding == "eager" and dtype.itemsize == 2:

        def rotation(x, *table, out=None):
            result = _rotate_as_eager(call.layout, x, *table)
            if out is None:
                return result
            out[...] = result
            return out

        return rotation
    if call.function == "rope_complex":
        return _core.rope_complex
    return LAYOUTS[call.layout]


def _rotate_as_eager(layout, x, cos, sin=None):
    """Rotate 16-bit data with a rounding after each product and after the sum."""
    if sin is None:
        cos, sin = cos.real, cos.imag
    n_pair, dtype, wide = cos.shape[-1], x.dtype, np.float32
    ends = slice(n_pair), slice(n_pair, 2 * n_pair)
    if layout == "interleaved":
        ends = slice(0, 2 * n_pair, 2), slice(1, 2 * n_pair, 2)
    a, b = (x[..., end].astype(wide) for end in ends)
    cos, sin = cos.astype(wide), sin.astype(wide)
    products = [
        (left * right).astype(dtype).astype(wide)
        for left, right in ((a, cos), (b, sin), (b, cos), (a, sin))
    ]
    turned = [
        (products[0] - products[1]).astype(dtype),
        (products[2] + products[3]).astype(dtype),
    ]
    for channels in turned:
        channels[np.isnan(channels)] = np.nan  # of all NaN the one
    if layout == "interleaved":
        turned = [np.stack(turned, axis=-1).reshape((*x.shape[:-1], 2 * n_pair))]
    return np.concatenate([*turned, x[..., 2 * n_pair :]], axis=-1)


# --- tables --------------------------------------------------------------------------


def check_one_axis(function, inv_freq):
    """Raise unless frequencies have one axis."""
    if inv_freq.ndim != 1:
        got = f"shape {inv_freq.shape}"
        raise ValueError(must(function, "inv_freq", "have one axis", got))


def fill_table(function, positions, inv_freq, attention_factor, angles, cos, sin):
    """Write a table; its arrays have been checked."""
    one_of(function, "angles", angles, ANGLES)
    factor = real_number(function, "attention_factor", attention_factor)
    check_one_axis(function, inv_freq)
    recipe = angles == "float32"
    done = _core.cos_sin_arrays(positions, inv_freq, factor, recipe, cos, sin)
    if done is NotImplemented:  # the result lies in the memory of the inputs
        fresh = np.empty(cos.shape, cos.dtype), np.empty(cos.shape, cos.dtype)
        # Arrays: a number, as indexing leaves it, would be declined again.
        positions, inv_freq = np.array(positions), np.array(inv_freq)
        _core.cos_sin_arrays(positions, inv_freq, factor, recipe, *fresh)
        cos[...], sin[...] = fresh
