"""The words of errors, and the checks that several functions share."""

# SPDX-License-Identifier: BSD-3-Clause
import contextlib
import math
import numbers

import numpy as np

from . import _tensors as tensors

# Where the derivatives are that the functions here do not give.
_GRADIENTS = {
    "rope": " (posenc.torch.rope gives gradients)",
    "rope_qk": " (posenc.torch.rope_qk gives gradients)",
    "rope_complex": " (posenc.torch.rope gives gradients)",
    "add_sinusoidal": " (posenc.torch.add_sinusoidal gives gradients)",
    "add_learned": " (posenc.torch.add_learned gives gradients)",
    "cope_bias": " (posenc.torch.cope_bias gives gradients)",
    "cope_attention": " (posenc.torch.cope_attention gives gradients)",
    "t5_bias": " (posenc.torch.t5_bias gives gradients)",
    "kerple_bias": " (posenc.torch.kerple_bias gives gradients)",
    "fire_bias": " (posenc.torch.fire_bias gives gradients)",
}

REAL_NUMBERS = "hold real numbers that float64 can hold"


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
    # A comparison, which compilers of torch also take of numbers that vary.
    is_finite = -math.inf < value < math.inf
    if not is_finite or (holds is not None and not holds(value)):
        raise ValueError(must(function, parameter, rule, repr(value)))
    return value


def positive_number(function, parameter, value):
    """Return `value` as a float; raise unless it is finite and above 0."""
    return real_number(
        function, parameter, value, "be a positive number", lambda number: number > 0
    )


def real_dtype(function, dtype):
    """Return `dtype`, of NumPy or torch, as NumPy's float32 or float64."""
    rule = "be float32 or float64"
    try:
        dtype = np.dtype(tensors.numpy_dtype(dtype))
    except TypeError:
        raise TypeError(must(function, "dtype", rule, repr(dtype))) from None
    if dtype not in (np.float32, np.float64):
        raise TypeError(must(function, "dtype", rule, dtype))
    return dtype


def as_array(function, parameter, value):
    """Return an array, or whatever else NumPy's functions dispatch on.

    The array of a tensor lies in the tensor's memory.
    """
    kind = type(value)
    if kind is np.ndarray:
        return value
    if tensors.is_tensor(value):
        return _tensor_memory(function, parameter, value)
    if isinstance(value, np.ma.MaskedArray):
        rule = "be a plain NumPy array, a CPU tensor or a list"
        raise TypeError(must(function, parameter, rule, kind.__name__))
    if value is None:
        raise TypeError(must(function, parameter, "be an array", value))
    if hasattr(value, "__array_ufunc__") and hasattr(value, "ndim"):
        return value
    if kind is range:
        with contextlib.suppress(OverflowError):  # as asarray, a hundred times as fast
            return np.arange(value.start, value.stop, value.step)
    try:
        return np.asarray(value)
    except ValueError:
        rule = "be one array of numbers"
        raise ValueError(must(function, parameter, rule, kind.__name__)) from None


def _tensor_memory(function, parameter, tensor):
    """Return the array in a tensor's memory; raise if that is not all there is."""
    rule = "be a plain CPU tensor"
    got = tensors.obstacle(tensor)
    if got is not None:
        raise TypeError(must(function, parameter, rule, got))
    if tensors.needs_gradient(tensor):
        rule = "need no gradient" + _GRADIENTS.get(function, "")
        got = "a tensor with requires_grad=True"
        raise TypeError(must(function, parameter, rule, got))
    try:
        return tensors.as_numpy(tensor)
    except RuntimeError:
        got = "a tensor without memory of its own"
        raise TypeError(must(function, parameter, rule, got)) from None
    except TypeError:
        rule = "have a dtype that NumPy knows"
        raise TypeError(must(function, parameter, rule, tensor.dtype)) from None


def real_array(function, parameter, value, dtype=np.float64):
    """Return `value` as an array of a type; raise unless it holds real numbers."""
    array = np.asarray(as_array(function, parameter, value))
    kind = array.dtype.kind
    if (kind not in "iuf" or array.itemsize > 8) and array.dtype.name != "bfloat16":
        got = f"dtype {array.dtype}"
        raise TypeError(must(function, parameter, REAL_NUMBERS, got))
    if kind in "iu" and array.itemsize == 8 and array.size:
        extreme = max(int(array.max()), -int(array.min()))
        if extreme > 2**53:
            rule = "hold whole numbers of magnitude at most 2**53"
            raise ValueError(must(function, parameter, rule, extreme))
    return array.astype(dtype, copy=False)


def true_or_false(function, parameter, value):
    """Raise unless `value` is a bool."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(must(function, parameter, "be True or False", repr(value)))


def out_array(function, out, shape, dtype, parameter="out", tensor=False):
    """Return a plain array in the memory of `out`; raise unless a result can go there.

    `out` may be of a subclass, such as `numpy.memmap`, or a tensor.
    """
    kind = type(out).__name__
    if tensor:
        if not tensors.is_tensor(out):
            raise TypeError(must(function, parameter, "be a torch.Tensor", kind))
        out = as_array(function, parameter, out)
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        rule = "be a plain NumPy array"
        raise TypeError(must(function, parameter, rule, kind))
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
    return np.asarray(out)


def _may_hold_an_element_twice(array):
    """Tell whether two indices may lead to the same memory."""
    if array.flags.forc:  # as those without elements are
        return False
    covered = array.itemsize
    axes = zip(array.strides, array.shape, strict=True)
    for stride, size in sorted((abs(stride), size) for stride, size in axes):
        if size > 1:
            if stride < covered:
                return True
            covered += (size - 1) * stride
    return False
