"""Where results go, and in which type they are computed.

What the functions of all schemes share: dtypes, new memory or `out`, and overlaps.
"""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
from ml_dtypes import bfloat16

from . import _tensors as tensors
from ._check import must, out_array

REAL_RULE = "be float16, bfloat16, float32 or float64"

# --- types ---------------------------------------------------------------------------


def real_kind(function, parameter, dtype):
    """Raise unless numbers of this dtype can be computed with."""
    is_float = dtype.kind == "f" and dtype.itemsize in (2, 4, 8)
    if dtype.kind not in "biu" and not is_float and dtype != bfloat16:
        raise TypeError(must(function, parameter, REAL_RULE, f"dtype {dtype}"))


def float_of(dtype):
    """Return the type of numbers in this machine's bytes; whole ones are float64."""
    return np.dtype(np.float64) if dtype.kind in "biu" else dtype.newbyteorder("=")


def widest(*dtypes):
    """Return the widest; whole numbers count as float64, two of 16 bits as float32."""
    floats = set(map(float_of, dtypes))
    if len(floats) == 1:
        return floats.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in floats else np.float32)


def dtypes_of(x, *table):
    """Return the dtype of the result, and that of the table to compute it with."""
    kind = widest(*table)
    if x.itemsize == 2 and x.kind not in "biu" and kind != np.float64:
        x = x.newbyteorder("=")
        return x, kind if kind == x else np.dtype(np.float32)
    dtype = widest(x, kind, np.dtype(np.float32))
    return dtype, dtype


def aligned(array, dtype):
    """Return the array in a type and aligned, as it is if it can be."""
    if array.dtype is not dtype:
        array = array.astype(dtype, copy=False)
    if isinstance(array, np.ndarray) and not array.flags.aligned:
        return array.copy()
    return array


# --- memory --------------------------------------------------------------------------


def result_like(function, given, x, shape, dtype, out):
    """Return what the user gets, new or `out`, and the array of its memory.

    New memory is in the order of what was given, if it has the shape.
    """
    is_tensor = tensors.is_tensor(given)
    if out is not None:
        return out, out_array(function, out, shape, dtype, "out", is_tensor)
    if is_tensor:
        if shape == tuple(given.shape):
            answer = tensors.empty_like(given, dtype)
        else:
            answer = tensors.empty(shape, dtype)
        return answer, tensors.as_numpy(answer)
    answer = np.empty_like(x) if shape == x.shape else np.empty(shape, dtype)
    return answer, np.asarray(answer)


def table_result(function, parameter, out, shape, dtype, tensor):
    """Return what the user gets, new or `out`, and the array of its memory."""
    if out is not None:
        return out, out_array(function, out, shape, dtype, parameter, tensor)
    result = np.empty(shape, dtype)
    return tensors.from_numpy(result) if tensor else result, result


def table_pair(function, out, shape, dtype, tensor):
    """Return the two tables that the user gets, and the arrays of their memory."""
    outs = pair(function, out)
    (cos_answer, cos), (sin_answer, sin) = (
        table_result(function, f"out[{i}]", outs[i], shape, dtype, tensor)
        for i in (0, 1)
    )
    if share_memory(cos, sin):
        rule = "hold two arrays that do not overlap"
        raise ValueError(must(function, "out", rule, "overlapping arrays"))
    return (cos_answer, sin_answer), (cos, sin)


def pair(function, out):
    """Return the two arrays of an out argument, or two None."""
    if out is None:
        return None, None
    if not isinstance(out, tuple | list) or len(out) != 2:
        got = type(out).__name__
        got += f" of length {len(out)}" if isinstance(out, tuple | list) else ""
        raise TypeError(must(function, "out", "be a pair of arrays", got))
    return out


def no_out(function, operands, out):
    """Raise if the result of another library's arrays is to go to an array."""
    if out is not None:
        kinds = [type(op).__name__ for op in operands if not isinstance(op, np.ndarray)]
        rule = f"be None for operands of type {kinds[0]}"
        raise TypeError(must(function, "out", rule, type(out).__name__))


def share_memory(a, b):
    """Tell whether two arrays hold a byte in common; None shares nothing."""
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return False
    return np.shares_memory(a, b)


def are_one(a, b):
    """Tell whether elements of two arrays of one shape and type are the same memory."""
    return a is b or (a.ctypes.data == b.ctypes.data and a.strides == b.strides)
