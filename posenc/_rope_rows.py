"""Which row of a table each token uses: positions, offsets, packed sequences."""

# SPDX-License-Identifier: BSD-3-Clause
from dataclasses import dataclass

import numpy as np

from ._check import as_array, must, whole_number


def sequence_axis(function, x_name, n_axis, axis):
    """Return the number of the sequence axis."""
    axis = whole_number(function, "axis", axis, min(-n_axis, -2))
    named = (*range(n_axis - 1), *range(-n_axis, -1)) if n_axis > 1 else (-2,)
    if axis not in named:
        rule = f"name an axis of {x_name} but its last"
        raise ValueError(must(function, "axis", rule, axis))
    return axis % n_axis


@dataclass(frozen=True)
class Rows:
    """Which row of the table each token uses, and how the user said so."""

    name: str
    forms: str
    shape: tuple  # as the user gave it
    numbers: np.ndarray


def choose_rows(call, x_name, x, table):
    """Return the table, cut if one stretch of it is used, and its rows or None."""
    given = [name for name in ("positions", "offset", "cu_seqlens")
             if getattr(call, name) is not None]  # fmt: skip
    if not given:
        return table, None
    name, first = next(iter(table.items()))
    if first.ndim != 2:
        rule = f"have shape (P, M) with {given[0]}"
        raise ValueError(must(call.function, name, rule, f"shape {first.shape}"))
    if given[0] == "positions":
        if len(given) > 1:
            rule = f"not be given together with {given[1]}"
            raise ValueError(must(call.function, "positions", rule, "both"))
        numbers = _row_numbers(call.function, name, first, call.positions)
        return table, Rows("positions", "(T,) or (B, T)", numbers.shape, numbers)
    axis = sequence_axis(call.function, x_name, x.ndim, call.axis)
    if x.ndim == 1:
        rule = f"have a sequence axis with {given[0]}"
        raise ValueError(must(call.function, x_name, rule, f"shape {x.shape}"))
    return _rows_in_order(call, x_name, x, axis, table)


def _rows_in_order(call, x_name, x, axis, table):
    """Return what `choose_rows` does where the tokens of a sequence are neighbours."""
    name, first = next(iter(table.items()))
    n_token, n_row = x.shape[axis], first.shape[0]
    limit = f"lead to rows in [0, {n_row}), those of {name}"
    if call.cu_seqlens is not None:
        ends, counts = sequences(call.function, x_name, n_token, call.cu_seqlens)
        offsets = sequence_offsets(call.function, call.offset, counts)
        blamed = "cu_seqlens" if call.offset is None else "offset"
        _check_reach(call.function, blamed, offsets, counts, n_row, limit)
        numbers = packed_rows(ends, counts, offsets)
        return table, Rows("cu_seqlens", "(N + 1,)", numbers.shape, numbers)
    offset = _offsets(call, x_name, x, axis)
    _check_reach(call.function, "offset", offset, n_token, n_row, limit)
    if not n_token:
        offset = np.zeros(offset.shape, np.int64)
    if offset.ndim == 0:
        start = int(offset)
        return {n: part[start : start + n_token] for n, part in table.items()}, None
    numbers = batch_rows(offset, n_token)
    return table, Rows("offset", "() or (B,)", offset.shape, numbers)


def rows_for(xs, axis, positions, offset, cu_seqlens):
    """Return the rows of all tokens as the fast door takes them, for one x or two.

    It takes an int, for that row and those after it, or the row of each token, and
    looks whether the table has them. It declines NotImplemented: then the general way
    says what is wrong.
    """
    if positions is not None:
        return NotImplemented
    if cu_seqlens is None and type(offset) is int:
        return offset
    try:
        return _rows_for([x.shape for x in xs], axis, offset, cu_seqlens)
    except (AttributeError, IndexError, TypeError, ValueError):
        return NotImplemented


def _rows_for(shapes, axis, offset, cu_seqlens):
    shape, n_token = shapes[0], shapes[0][axis]
    if any(other[axis] != n_token for other in shapes):
        return NotImplemented
    if cu_seqlens is not None:
        ends, counts = sequences("", "", n_token, cu_seqlens)
        return packed_rows(ends, counts, sequence_offsets("", offset, counts))
    offset = whole_numbers("", "", offset)
    if offset.ndim == 0:
        return int(offset)
    if offset.ndim > 1 or axis % len(shape) == 0:
        return NotImplemented
    return batch_rows(offset, n_token)


def whole_numbers(function, parameter, value):
    """Return an array of whole numbers."""
    array = as_array(function, parameter, value)
    if array.dtype.kind not in "iu":
        got = f"dtype {array.dtype}"
        raise TypeError(must(function, parameter, "be whole numbers", got))
    return np.asarray(array)


def _row_numbers(function, name, table, positions):
    """Return the row numbers that the user gave, all of them within the table."""
    positions = whole_numbers(function, "positions", positions)
    outside = (positions < 0) | (positions >= table.shape[0])
    if outside.any():
        index = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(outside)))
        rule = f"lie in [0, {table.shape[0]}), the rows of {name}"
        got = f"{np.atleast_1d(positions)[index]} at index {index}"
        raise ValueError(must(function, "positions", rule, got))
    return positions.astype(np.int64, copy=False)


def _offsets(call, x_name, x, axis):
    """Return the offset of all sequences, (), or of each, (B,)."""
    offset = whole_numbers(call.function, "offset", call.offset)
    per_sequence = offset.ndim == 1 and axis > 0 and offset.size in (1, x.shape[0])
    if offset.ndim and not per_sequence:
        rule = (
            f"be a whole number or of shape (B,), for {x_name} of shape {x.shape} "
            f"with T along axis {axis}"
        )
        got = f"shape {offset.shape}"
        raise ValueError(must(call.function, "offset", rule, got))
    return offset


def batch_rows(offset, n_token):
    """Return the row of each token of each sequence, (B, T)."""
    return offset.astype(np.int64)[:, None] + np.arange(n_token)


def sequences(function, x_name, n_token, cu_seqlens):
    """Return where packed sequences begin and end, and how many tokens each has."""
    ends, here = whole_numbers(function, "cu_seqlens", cu_seqlens), "cu_seqlens"
    if ends.ndim != 1 or ends.size == 0:
        rule, got = "be of shape (N + 1,)", f"shape {ends.shape}"
        raise ValueError(must(function, here, rule, got))
    if ends[0] != 0:
        raise ValueError(must(function, here, "begin with 0", ends[0]))
    if ends[-1] != n_token:
        rule = f"end with {n_token}, the number of tokens of {x_name}"
        raise ValueError(must(function, here, rule, ends[-1]))
    falls = np.flatnonzero(ends[1:] < ends[:-1])
    if falls.size:
        at = int(falls[0])
        got = f"{ends[at + 1]} after {ends[at]} at index ({at + 1},)"
        raise ValueError(must(function, here, "not fall", got))
    ends = ends.astype(np.int64)
    return ends, np.diff(ends)


def sequence_offsets(function, offset, counts):
    """Return the offset of each packed sequence."""
    if offset is None:
        return np.zeros(counts.shape, np.int64)
    offset = whole_numbers(function, "offset", offset)
    if offset.shape not in ((), counts.shape):
        rule = f"be a whole number or of shape {counts.shape}, one per sequence"
        raise ValueError(must(function, "offset", rule, f"shape {offset.shape}"))
    return np.broadcast_to(offset, counts.shape)


def packed_rows(ends, counts, offsets):
    """Return the row of each token of sequences packed one after another."""
    first = np.where(counts > 0, offsets, 0).astype(np.int64)
    return np.arange(ends[-1]) + np.repeat(first - ends[:-1], counts)


def _check_reach(function, parameter, offset, counts, n_row, limit):
    """Raise unless tokens offset .. offset + count of each sequence have rows."""
    outside = (counts > 0) & ((offset < 0) | (offset > n_row - counts))
    if not outside.any():
        return
    sequence = int(np.flatnonzero(outside)[0])
    first = int(np.ravel(offset)[sequence])
    token = max(n_row - first, 0) if first >= 0 else 0
    got = f"row {first + token} for token {token}"
    if offset.ndim:
        got += f" of sequence {sequence}"
    raise ValueError(must(function, parameter, limit, got))
