"""The words of errors, and the checks that several functions share."""

# SPDX-License-Identifier: BSD-3-Clause
import math
import numbers

import numpy as np


def must(function, parameter, rule, got):
    """Return the one sentence that every error says: ``got`` is shown as it is."""
    return f"{function}: {parameter} must {rule}; got {got}"


def one_of(function, parameter, value, choices):
    """Raise unless `value` is one of a few strings."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(must(function, parameter, f"be one of {listed}", repr(value)))


def whole_number(function, parameter, value, least):
    """Return `value` as an int; raise unless it is a whole number >= `least`."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool):
        if value >= least:
            return int(value)
        error = ValueError
    else:
        error = TypeError
    rule = f"be a whole number of at least {least}"
    raise error(must(function, parameter, rule, repr(value)))


def real_number(function, parameter, value, rule="be a finite number", holds=None):
    """Return `value` as a float; raise unless it is finite and `holds`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool | np.bool):
        raise TypeError(must(function, parameter, rule, repr(value)))
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(must(function, parameter, rule, "a larger number")) from None
    if not math.isfinite(value) or (holds is not None and not holds(value)):
        raise ValueError(must(function, parameter, rule, repr(value)))
    return value


def real_dtype(function, dtype):
    """Return `dtype` as float32 or float64."""
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise TypeError(
            must(function, "dtype", "be float32 or float64", repr(dtype))
        ) from None
    if dtype not in (np.float32, np.float64):
        raise TypeError(must(function, "dtype", "be float32 or float64", dtype))
    return dtype


def as_array(function, parameter, value):
    """Return an array, or whatever else NumPy's functions dispatch on."""
    kind = type(value)
    is_tensor = kind.__module__.partition(".")[0] == "torch"
    if is_tensor or isinstance(value, np.ma.MaskedArray):
        rule = "be a plain NumPy array or a list (of a tensor: its .numpy())"
        raise TypeError(must(function, parameter, rule, kind.__name__))
    if value is None:
        raise TypeError(must(function, parameter, "be an array", value))
    if hasattr(value, "__array_ufunc__") and hasattr(value, "ndim"):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        rule = "be one array of numbers"
        raise ValueError(must(function, parameter, rule, kind.__name__)) from None


def real_array(function, parameter, value):
    """Return `value` as a float64 array; raise unless it holds real numbers."""
    array = np.asarray(as_array(function, parameter, value))
    kind, name = array.dtype.kind, array.dtype.name
    if (kind not in "biuf" or array.itemsize > 8) and name != "bfloat16":
        rule = "hold real numbers that float64 can hold"
        raise TypeError(must(function, parameter, rule, f"dtype {array.dtype}"))
    if kind in "iu" and array.itemsize == 8 and array.size:
        extreme = max(int(array.max()), -int(array.min()))
        if extreme > 2**53:
            rule = "hold whole numbers of magnitude at most 2**53"
            raise ValueError(must(function, parameter, rule, extreme))
    return array.astype(np.float64, copy=False)


def true_or_false(function, parameter, value):
    """Raise unless `value` is a bool."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(must(function, parameter, "be True or False", repr(value)))


def out_array(function, out, shape, dtype, parameter="out"):
    """Raise unless `out` is an array that a result can be written to."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        rule, got = "be a plain NumPy array", type(out).__name__
        raise TypeError(must(function, parameter, rule, got))
    if tuple(out.shape) != tuple(shape):
        rule = f"have shape {tuple(shape)}"
        raise ValueError(must(function, parameter, rule, f"shape {tuple(out.shape)}"))
    if out.dtype != dtype:
        rule = f"have dtype {np.dtype(dtype)}"
        raise TypeError(must(function, parameter, rule, f"dtype {out.dtype}"))
    if not out.flags.writeable:
        raise ValueError(must(function, parameter, "be writeable", "a read-only array"))
    if _may_hold_an_element_twice(out):
        rule, got = "not overlap itself", f"strides {out.strides}"
        raise ValueError(must(function, parameter, rule, got))


def _may_hold_an_element_twice(array):
    """Tell whether two indices may lead to the same memory."""
    if array.size == 0:
        return False
    covered = array.itemsize
    axes = zip(array.strides, array.shape, strict=True)
    for stride, size in sorted((abs(stride), size) for stride, size in axes):
        if size > 1:
            if stride < covered:
                return True
            covered += (size - 1) * stride
    return False
