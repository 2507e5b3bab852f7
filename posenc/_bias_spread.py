"""What the relative biases share: positions, memory, and the two ways to a matrix.

Between consecutive positions a bias is one row of values per head, one value for each
offset, that the kernel spreads; between others each element is evaluated on its own.
"""

# SPDX-License-Identifier: BSD-3-Clause
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import _core
from . import _tensors as tensors
from ._check import as_array, must, out_array, real_array
from ._results import REAL_RULE, are_one, float_of, real_kind

# Elements that are evaluated at once where positions are not consecutive.
_BLOCK = 1 << 18

# Beyond it float64 skips whole numbers.
_MOST_WHOLE = 2**53


class Bias(NamedTuple):
    """A relative bias: what a call of one of the functions asks for."""

    function: str
    n_head: int
    dtype: np.dtype  # without logits to add to
    is_tensor: bool
    # Offsets (n,) to values (H, n); numbers per offset, to size the blocks.
    evaluate: Callable
    weight: int = 1
    # Values depend on queries beyond it, which are then a second argument; or None.
    threshold: float | None = None
    position_type: type = np.float64  # and of offsets


# --- what is given -------------------------------------------------------------------


def parameters(function, name, value, shape):
    """Return numbers of one type and a shape; axes of any size stand by their name."""
    array = np.asarray(as_array(function, name, value))
    real_kind(function, name, array.dtype)
    check_shape(function, name, array.shape, shape)
    return array.astype(float_of(array.dtype))  # a copy: `out` may lie in its memory


def check_shape(function, name, shape, wanted):
    """Raise unless numbers have a shape, in which a string stands for any size."""
    fits = len(shape) == len(wanted)
    for size, want in zip(shape, wanted, strict=False):
        fits &= size == want or (size > 0 and type(want) is str)
    if not fits:
        axes = ", ".join(map(str, wanted)) + ("," if len(wanted) == 1 else "")
        rule = f"be of shape ({axes})" + (" and not empty" if wanted else "")
        raise ValueError(must(function, name, rule, f"shape {shape}"))


def positions_of(function, name, value, whole=False):
    """Return positions (..., n) as int64 if they are to be whole, else as float64."""
    array = np.asarray(as_array(function, name, value))
    if whole and array.dtype.kind not in "iu" and array.size:
        rule = "be whole numbers"
        raise TypeError(must(function, name, rule, f"dtype {array.dtype}"))
    if array.ndim == 0:
        raise ValueError(must(function, name, "have at least one axis", "shape ()"))
    own = real_array(function, name, array, np.int64 if whole else np.float64)
    return own.copy() if own is array else own  # a copy, as above


def places_of(function, q_positions, k_positions, whole=False):
    """Return positions: as ranges if they are consecutive, else as `positions_of`."""
    q = _places(function, "q_positions", q_positions, whole)
    return q, _places(function, "k_positions", k_positions, whole)


def _places(function, name, value, whole):
    """Return them for queries or keys; those of consecutive ones are quick to check."""
    if _is_range_of_steps(value):
        return value
    array = np.asarray(as_array(function, name, value))
    if not whole or array.dtype.kind == "i":
        steps = _core.consecutive(array)
        if steps is not None:
            return steps
    return _range_or_array(positions_of(function, name, array, whole))


def _is_range_of_steps(value):
    """Tell whether positions are a range of neighbours that float64 can hold."""
    if type(value) is not range or value.step != 1 or not value:
        return False
    return value[0] >= -_MOST_WHOLE and value[-1] <= _MOST_WHOLE


def _range_or_array(positions):
    """Return positions (n,) as a range if each is one more than that before it."""
    steps = _core.consecutive(positions)
    return positions if steps is None else steps


def leading_axes(function, name, first, second):
    """Return what all axes but the last of two shapes are broadcast to."""
    first, second = first[:-1], second[:-1]
    if first == second:
        return first
    try:
        return np.broadcast_shapes(first, second)
    except ValueError:
        rule = f"have leading axes that broadcast with {first}"
        raise ValueError(must(function, name, rule, second)) from None


# --- the call ------------------------------------------------------------------------


@np.errstate(all="ignore")
def spread(bias, q, k, add_to, out):
    """Return the bias, written or added where it was asked for."""
    if add_to is None and out is None and _n_near(bias, q, k) == 1 == len(q):
        return _only_row(bias, q, k)
    logits = None if add_to is None else as_array(bias.function, "add_to", add_to)
    places = _shape(q), _shape(k)
    shape = _result_shape(bias, *places, logits)
    logits, answer, result = _memory(bias, shape, add_to, logits, out)
    tensors.mark_changed(add_to if out is None else out)
    target = _apart(result, logits)
    if len(places[0]) == len(places[1]) == 1:
        _fill(bias, q, k, logits, target)
    else:
        lead = shape[:-3]
        q, k = (_broadcast(_array(bias, positions), lead) for positions in (q, k))
        for at in np.ndindex(lead):
            own = None if logits is None else logits[at]
            row = _range_or_array(q[at]), _range_or_array(k[at])
            _fill(bias, *row, own, target[at])
    if target is not result:
        result[...] = target
    return answer


def _only_row(bias, q, k):
    """Return the bias of one query: its values are all there is."""
    row = in_type(_values(bias, q, k), bias.dtype)[:, None]
    return tensors.from_numpy(row) if bias.is_tensor else row


def _shape(positions):
    """Return the shape of positions, a range or an array."""
    return (len(positions),) if type(positions) is range else positions.shape


def _array(bias, positions):
    """Return positions as an array."""
    if type(positions) is range:
        return np.arange(positions.start, positions.stop, dtype=bias.position_type)
    return positions


def _broadcast(positions, lead):
    return np.broadcast_to(positions, (*lead, positions.shape[-1]))


def _result_shape(bias, q, k, logits):
    """Return (..., H, T, S); raise if shapes of positions and logits do not fit."""
    lead = leading_axes(bias.function, "k_positions", q, k)
    own = (bias.n_head, q[-1], k[-1])
    if logits is None:
        return (*lead, *own)
    check_logits(bias.function, tuple(logits.shape), lead, own)
    return tuple(logits.shape)


def check_logits(function, shape, lead, own):
    """Raise unless a bias (*lead, *own), own being (H, T, S), goes to a shape."""
    if shape[-3:] != own or not _broadcasts_to(lead, shape[:-3]):
        axes = ", ".join(map(str, ("...", *lead, *own)))
        rule = f"be of shape (..., H, T, S) = ({axes})"
        raise ValueError(must(function, "add_to", rule, f"shape {shape}"))


def _broadcasts_to(shape, whole):
    try:
        return shape in ((), whole) or np.broadcast_shapes(shape, whole) == whole
    except ValueError:
        return False


def _memory(bias, shape, add_to, logits, out):
    """Return the logits or None, what the user gets, and the array of its memory."""
    here, is_tensor, dtype = bias.function, bias.is_tensor, bias.dtype
    if add_to is not None:
        is_tensor, dtype = tensors.is_tensor(add_to), logits.dtype
        if not isinstance(logits, np.ndarray):
            got = type(add_to).__name__
            raise TypeError(must(here, "add_to", "be a plain NumPy array", got))
        if dtype.kind in "biu":
            raise TypeError(must(here, "add_to", REAL_RULE, f"dtype {dtype}"))
        real_kind(here, "add_to", dtype)
        if out is None:
            return (
                logits,
                add_to,
                out_array(
                    here, add_to, shape, dtype.newbyteorder("="), "add_to", is_tensor
                ),
            )
        logits = logits.astype(dtype.newbyteorder("="), copy=False)
        dtype = logits.dtype
    if out is not None:
        return logits, out, out_array(here, out, shape, dtype, "out", is_tensor)
    result = np.empty(shape, dtype)
    return logits, tensors.from_numpy(result) if is_tensor else result, result


def _apart(result, logits):
    """Return the result's memory, or other if the kernel could not write there."""
    is_apart = logits is None or not np.may_share_memory(result, logits)
    if result.flags.aligned and (is_apart or are_one(result, logits)):
        return np.asarray(result)
    return np.empty(result.shape, result.dtype)


# --- the two ways --------------------------------------------------------------------


def _fill(bias, q, k, logits, result):
    """Write the bias between positions (T,) and (S,), added to logits if given."""
    if result.size == 0:
        return
    n_near = _n_near(bias, q, k)
    if n_near > 0:
        near = slice(0, n_near)
        values = _values(bias, q[near], k)
        _spread_values(values, _rows(logits, near), _rows(result, near))
    if n_near < len(q):
        far = slice(n_near, len(q))
        q, k = _array(bias, q[far]), _array(bias, k)
        _fill_blocks(bias, q, k, _rows(logits, far), _rows(result, far))


def _n_near(bias, q, k):
    """Return of how many queries the values are one row, if moved on key by key."""
    if type(q) is not range or type(k) is not range:
        return 0
    if bias.threshold is None:
        return len(q)
    return int(np.count_nonzero(_array(bias, q) <= bias.threshold))


def _values(bias, q, k):
    """Return the values (H, T + S - 1) between consecutive positions."""
    offsets = np.arange(len(q) + len(k) - 1, dtype=bias.position_type)
    offsets += bias.position_type(k[0] - q[-1])
    return _evaluate(bias, offsets, bias.position_type(q[0]))


def _fill_blocks(bias, q, k, logits, result):
    """Evaluate each element on its own, some queries at once."""
    n_row = max(1, _BLOCK // (len(k) * bias.n_head * bias.weight))
    for start in range(0, len(q), n_row):
        rows = slice(start, start + n_row)
        query = np.broadcast_to(q[rows, None], (len(q[rows]), len(k)))
        values = _evaluate(bias, (k - query).reshape(-1), query.reshape(-1))
        values = values.reshape((bias.n_head, *query.shape))
        part = _rows(result, rows)
        part[...] = _sum(values, _rows(logits, rows), part)


def _evaluate(bias, offsets, query):
    """Return the values (H, n) of offsets (n,)."""
    if bias.threshold is None:
        return bias.evaluate(offsets)
    return bias.evaluate(offsets, query)


def _rows(matrix, rows):
    """Return some of the queries of logits, if there are any."""
    return None if matrix is None else matrix[..., rows, :]


def _spread_values(values, logits, result):
    """Spread values (H, T + S - 1) over (..., H, T, S)."""
    dtype = result.dtype if logits is None else _wide(result.dtype)
    values = np.ascontiguousarray(in_type(values, dtype))
    if result.ndim > 3:
        values = np.broadcast_to(values, (*result.shape[:-2], values.shape[-1]))
    if logits is not None and not logits.flags.aligned:
        logits = logits.copy()
    _core.bias_arrays(values, None if logits is None else np.asarray(logits), result)


def _sum(values, logits, result):
    """Return values in the type of a result, added to logits if given."""
    if logits is None:
        return in_type(values, result.dtype)
    wide = _wide(result.dtype)
    total = logits.astype(wide) + in_type(values, wide)
    total[np.isnan(total)] = np.nan  # of all NaN the one
    return total.astype(result.dtype)


def _wide(dtype):
    """Return the type in which values are added to logits of a type."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def in_type(values, dtype):
    """Return values in a type; those of 16 bits are float32 before."""
    if dtype.itemsize == 2 and values.dtype == np.float64:
        values = values.astype(np.float32)
    return values.astype(dtype, copy=False)
