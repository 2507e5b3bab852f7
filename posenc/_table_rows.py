"""What adding a row for each position to data takes: positions, padding, memory."""

# SPDX-License-Identifier: BSD-3-Clause
import math

import numpy as np

from . import _tensors as tensors
from ._check import as_array, must
from ._results import aligned, are_one, dtypes_of, no_out, real_kind, result_like
from ._rope_rows import (
    batch_rows,
    packed_rows,
    sequence_offsets,
    sequences,
    whole_numbers,
)


def data_array(function, x):
    """Return the data as an array with axes for tokens and channels."""
    array = as_array(function, "x", x)
    real_kind(function, "x", array.dtype)
    if array.ndim < 2:
        rule = "have at least two axes, of tokens and of channels"
        raise ValueError(must(function, "x", rule, f"shape {array.shape}"))
    return array


def counted(function, lead, offset, cu_seqlens):
    """Return the position of each token that nobody has numbered, (T,) or (B, T)."""
    n_token = lead[-1]
    if cu_seqlens is not None:
        ends, counts = sequences(function, "x", n_token, cu_seqlens)
        offsets = sequence_offsets(function, offset, counts)
        return packed_rows(ends, counts, offsets)
    if offset is None:
        return np.arange(n_token)
    offset = whole_numbers(function, "offset", offset)
    if offset.ndim == 0:
        return int(offset) + np.arange(n_token)
    if offset.ndim != 1 or len(lead) < 2 or offset.size not in (1, lead[0]):
        rule = f"be a whole number or of shape (B,), for rows of shape {tuple(lead)}"
        raise ValueError(must(function, "offset", rule, f"shape {offset.shape}"))
    return batch_rows(offset, n_token)


def refuse_both(function, positions, offset, cu_seqlens):
    """Raise if positions are given in two ways."""
    for name, value in (("offset", offset), ("cu_seqlens", cu_seqlens)):
        if positions is not None and value is not None:
            rule = f"not be given together with {name}"
            raise ValueError(must(function, "positions", rule, "both"))


def one_per_row(function, name, array, lead):
    """Return an array with an axis for each of the rows' that broadcasts with them."""
    shape = array.shape
    if array.ndim == 2 and len(lead) > 2:
        shape = (shape[0], *(1,) * (len(lead) - 2), shape[1])
    shape = (1,) * (len(lead) - len(shape)) + shape
    if len(shape) != len(lead) or any(
        own not in (1, size) for own, size in zip(shape, lead, strict=True)
    ):
        rule = f"be of shape (T,) or (B, T), or broadcast to {tuple(lead)}"
        raise ValueError(must(function, name, rule, f"shape {array.shape}"))
    return array.reshape(shape)


def padding(function, mask, lead):
    """Return which rows are padding, or None."""
    if mask is None:
        return None
    array = np.asarray(as_array(function, "padding_mask", mask))
    if array.dtype != np.bool:
        rule = "be of dtype bool, True where a token is padding"
        raise TypeError(must(function, "padding_mask", rule, f"dtype {array.dtype}"))
    return one_per_row(function, "padding_mask", array, lead)


def by_fast_door(door, x, table, scale, places, out):
    """Return the sum if the arguments are such as need no more checks than the door's.

    Else NotImplemented. `places` are positions, offset, cu_seqlens and padding_mask.
    """
    positions, offset, cu_seqlens, mask = places
    start = 0 if offset is None else offset
    if tensors.is_tensor(start) and start.ndim == 0 and start.is_cpu:
        start = start.item()
    is_plain = cu_seqlens is None and type(scale) is float and math.isfinite(scale)
    if not is_plain or (positions is not None and offset is not None):
        return NotImplemented
    return door(x, *table, positions, start, mask, scale, out)


class Sum:
    """Where x * scale + rows of a table goes, and how it gets there.

    Made once everything else has been checked: it may make the result.
    """

    def __init__(self, function, given, x, table_dtype, out):
        dtype, self.table_dtype = dtypes_of(x.dtype, np.dtype(table_dtype))
        self.x = aligned(x, dtype)
        self.answer, self.result = result_like(
            function, given, self.x, x.shape, dtype, out
        )  # fmt: skip
        self.out = out

    def add(self, door, table, positions, mask, scale, others):
        """Add rows at positions, by the function that takes such tables.

        `others` are arrays that these are made from.
        """
        result = target = self.result
        x = np.asarray(self.x)
        parts = [*others, *([] if are_one(x, result) else [x])]
        if not result.flags.aligned or any(
            np.may_share_memory(part, result) for part in parts
        ):
            target = np.empty(result.shape, result.dtype)
        done = door(x, *table, positions, 0, mask, scale, target)
        if done is NotImplemented:
            raise AssertionError("a door declined operands that were checked")
        if target is not result:
            result[...] = target
        tensors.mark_changed(self.out)
        return self.answer


def add_lazily(function, x, table_dtype, rows, mask, scale, out, add=np.add):
    """Return the sum for arrays of another library, by its own functions.

    Numbers of 16 bits are added in float32 and rounded once, as the kernels do.
    """
    no_out(function, (x,), out)
    dtype, _ = dtypes_of(x.dtype, np.dtype(table_dtype))
    wide = np.dtype(np.float32) if dtype.itemsize == 2 else dtype
    x = x.astype(wide)
    if scale != 1:
        x = x * wide.type(scale)
    result = add(x, *rows(wide)).astype(dtype)
    if mask is not None:
        result = np.where(mask[..., None], result.dtype.type(0), result)
    return result
