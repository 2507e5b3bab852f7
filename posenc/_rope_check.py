"""What the functions of RoPE check, and their way through the gufuncs."""

# SPDX-License-Identifier: BSD-3-Clause
from typing import NamedTuple

import numpy as np

from . import _core
from ._check import (
    as_array,
    must,
    one_of,
    out_array,
    real_number,
    true_or_false,
    whole_number,
)

ANGLES = ("exact", "float32")
COMPLEX = {np.dtype(np.float32): np.complex64, np.dtype(np.float64): np.complex128}


class Plan(NamedTuple):
    """A checked call of a gufunc, which is not to fail any more."""

    gufunc: np.ufunc
    x: np.ndarray
    table: list
    out: np.ndarray | None

    def run(self):
        """Return the rotated x."""
        if self.out is None:
            return self.gufunc(self.x, *self.table)
        return self.gufunc(self.x, *self.table, out=self.out)

    def with_result(self):
        """Return the plan with its result allocated, if that is ours to do."""
        if self.out is None and type(self.x) is np.ndarray:
            return self._replace(out=np.empty_like(self.x))
        return self

    def apart_from(self, written):
        """Return the plan with copies of what shares memory with `written`."""
        x = self.x.copy() if share_memory(self.x, written) else self.x
        table = [t.copy() if share_memory(t, written) else t for t in self.table]
        return self._replace(x=x, table=table)


def plan(function, x_name, x, gufunc, table, axis, positions, out_name, out):
    """Check one rotation and bring its operands to one dtype and rank."""
    x = as_array(function, x_name, x)
    _real_kind(function, x_name, x.dtype)
    if x.ndim == 0:
        raise ValueError(must(function, x_name, "have at least one axis", "shape ()"))
    name, first = next(iter(table.items()))
    if 2 * first.shape[-1] > x.shape[-1]:
        most = x.shape[-1] // 2
        rule = f"hold at most head_dim // 2 = {most} angles, each of them once"
        raise ValueError(must(function, name, rule, first.shape[-1]))
    dtype = _common(x.dtype, *(t.real.dtype for t in table.values()))
    if out is not None:
        for operand_name, operand in {x_name: x, **table}.items():
            if not isinstance(operand, np.ndarray):
                rule = f"be None for {operand_name} of type {type(operand).__name__}"
                raise TypeError(must(function, out_name, rule, type(out).__name__))
        out_array(function, out, x.shape, dtype, out_name)
    kinds = {"cis": COMPLEX[dtype]}
    operands = []
    for name, part in table.items():
        shape = _rows_like(function, name, part.shape, x_name, x.shape, axis, positions)
        part = part.astype(kinds.get(name, dtype), copy=False)
        operands.append(part.reshape(shape))
    return Plan(gufunc, x.astype(dtype, copy=False), operands, out)


def _rows_like(function, name, table, x_name, x, axis, positions):
    """Return the shape that gives a table as many axes as x, from both shapes."""
    n_axis = len(x)
    axis = whole_number(function, "axis", axis, min(-n_axis, -2))
    named = (*range(n_axis - 1), *range(-n_axis, -1)) if n_axis > 1 else (-2,)
    if axis not in named:
        rule = f"name an axis of {x_name} but its last"
        raise ValueError(must(function, "axis", rule, axis))
    axis %= n_axis
    shape = list(table)
    is_short = 1 < len(table) < 4 and len(table) != n_axis
    if n_axis > 1 and is_short and len(table) - 2 <= axis:
        shape = [1] * n_axis
        shape[0] = table[0] if len(table) == 3 else 1
        shape[-1] = table[-1]
        shape[axis] = table[-2] if table[-2] == x[axis] else None
    pairs = zip(shape[:-1], x[:-1], strict=False)
    if len(shape) != n_axis or any(rows not in (1, size) for rows, size in pairs):
        forms, shown = "(T, M) or (B, T, M)", table
        if positions is not None:
            name, forms, shown = "positions", "(T,) or (B, T)", table[:-1]
        rule = (
            f"be of shape {forms}, or broadcast, for {x_name} of shape {x} "
            f"with T along axis {axis}"
        )
        raise ValueError(must(function, name, rule, f"shape {shown}"))
    return shape


def planar_table(function, cos, sin, positions, adjoint):
    """Check cosines and sines; return them by name, gathered by positions."""
    true_or_false(function, "adjoint", adjoint)
    cos, sin, dtype = _cosines_sines(function, cos, sin)
    if adjoint:
        sin = -sin.astype(dtype, copy=False)
    return _gather(function, ("cos", "sin"), [cos, sin], positions)


def complex_table(function, cis, positions, adjoint):
    """Check a complex table; return it by name, gathered by positions."""
    true_or_false(function, "adjoint", adjoint)
    cis = _complexes(function, cis)
    return _gather(function, ("cis",), [np.conj(cis) if adjoint else cis], positions)


def _gather(function, names, parts, positions):
    """Return the parts of a table by name, with the rows that positions choose."""
    if parts[0].ndim == 0:
        raise ValueError(must(function, names[0], "have at least one axis", "shape ()"))
    if positions is not None:
        positions = _row_numbers(function, names[0], parts[0], positions)
        parts = [part[positions] for part in parts]
    return dict(zip(names, parts, strict=True))


def _row_numbers(function, name, table, positions):
    """Check the row numbers that are to be gathered from a table."""
    if table.ndim != 2:
        rule = "have shape (P, M) when positions are given"
        raise ValueError(must(function, name, rule, f"shape {table.shape}"))
    positions = as_array(function, "positions", positions)
    if positions.dtype.kind not in "iu":
        got = f"dtype {positions.dtype}"
        raise TypeError(must(function, "positions", "be whole numbers", got))
    positions = np.asarray(positions)
    outside = (positions < 0) | (positions >= table.shape[0])
    if outside.any():
        index = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(outside)))
        rule = f"lie in [0, {table.shape[0]}), the rows of {name}"
        got = f"{np.atleast_1d(positions)[index]} at index {index}"
        raise ValueError(must(function, "positions", rule, got))
    return positions


def _real_kind(function, parameter, dtype):
    """Raise unless numbers of this dtype can be rotated."""
    if dtype.kind in "biu" or (dtype.kind == "f" and dtype.itemsize in (4, 8)):
        return
    rule = "be float32 or float64"
    raise TypeError(must(function, parameter, rule, f"dtype {dtype}"))


def _common(*dtypes):
    """Return the dtype to compute in; whole numbers count as float64."""
    return np.result_type(*(d if d.kind == "f" else np.float64 for d in dtypes))


def inverse_table(function, cos, sin, inverse, adjoint):
    """Return the table whose rotations undo those of (cos, sin), if so asked."""
    true_or_false(function, "inverse", inverse)
    true_or_false(function, "adjoint", adjoint)
    if not inverse:
        return cos, sin
    if adjoint:
        rule = "not be set together with adjoint"
        raise ValueError(must(function, "inverse", rule, True))
    cos, sin, dtype = _cosines_sines(function, cos, sin)
    cos, sin = cos.astype(np.float64), sin.astype(np.float64)
    with np.errstate(all="ignore"):
        # By a power of two first, which costs no bit: squares of tables with a
        # large or small attention factor would leave the range of float64.
        _, exponent = np.frexp(np.maximum(np.abs(cos), np.abs(sin)))
        cos, sin = np.ldexp(cos, -exponent), np.ldexp(sin, -exponent)
        square = cos * cos + sin * sin
        parts = np.ldexp(cos / square, -exponent), np.ldexp(-sin / square, -exponent)
        return parts[0].astype(dtype), parts[1].astype(dtype)


def inverse_complex(function, cis, inverse, adjoint):
    """Return the complex table whose products undo those of cis, if so asked."""
    cis = _complexes(function, cis)
    inverted = np.empty_like(cis)
    parts = inverse_table(function, cis.real, cis.imag, inverse, adjoint)
    inverted.real, inverted.imag = parts
    return inverted


def _cosines_sines(function, cos, sin):
    """Check the two halves of a table; return them and their common dtype."""
    cos = as_array(function, "cos", cos)
    sin = as_array(function, "sin", sin)
    for name, part in (("cos", cos), ("sin", sin)):
        _real_kind(function, name, part.dtype)
    if cos.shape != sin.shape:
        rule = f"have the shape of cos, {cos.shape}"
        raise ValueError(must(function, "sin", rule, f"shape {sin.shape}"))
    return cos, sin, _common(cos.dtype, sin.dtype)


def _complexes(function, cis):
    """Check a complex table."""
    cis = as_array(function, "cis", cis)
    if cis.dtype not in (np.complex64, np.complex128):
        rule = "be complex64 or complex128"
        raise TypeError(must(function, "cis", rule, f"dtype {cis.dtype}"))
    return cis


def pair(function, out):
    """Return the two arrays of an out argument, or two None."""
    if out is None:
        return None, None
    if not isinstance(out, tuple | list) or len(out) != 2:
        got = type(out).__name__
        got += f" of length {len(out)}" if isinstance(out, tuple | list) else ""
        raise TypeError(must(function, "out", "be a pair of arrays", got))
    return out


def share_memory(a, b):
    """Tell whether two arrays hold a byte in common; None shares nothing."""
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return False
    return np.shares_memory(a, b)


def table_result(function, parameter, out, shape, dtype):
    """Return a new array for a table, or `out` after checking it."""
    if out is None:
        return np.empty(shape, dtype)
    out_array(function, out, shape, dtype, parameter)
    return out


def fill_table(function, positions, inv_freq, attention_factor, angles, cos, sin):
    """Write a table; its arrays have been checked."""
    one_of(function, "angles", angles, ANGLES)
    factor = real_number(function, "attention_factor", attention_factor)
    if inv_freq.ndim != 1:
        got = f"shape {inv_freq.shape}"
        raise ValueError(must(function, "inv_freq", "have one axis", got))
    recipe = angles == "float32"
    done = _core.cos_sin_arrays(positions, inv_freq, factor, recipe, cos, sin)
    if done is NotImplemented:  # the result lies in the memory of the inputs
        fresh = np.empty(cos.shape, cos.dtype), np.empty(cos.shape, cos.dtype)
        positions, inv_freq = positions.copy(), inv_freq.copy()
        _core.cos_sin_arrays(positions, inv_freq, factor, recipe, *fresh)
        cos[...], sin[...] = fresh
