"""What the functions for torch check of their tensors, and the types of results."""

# SPDX-License-Identifier: BSD-3-Clause

import functools

import numpy as np
import torch

from ._check import must
from ._results import REAL_RULE

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def as_tensor(function, name, value):
    """Return numbers as a tensor; arrays keep their memory."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        rule = "be a torch.Tensor or an array that torch can read"
        raise TypeError(must(function, name, rule, type(value).__name__)) from None


def check_tensor(function, name, tensor):
    """Refuse what no operator of ours could take; traced tensors may pass."""
    if not isinstance(tensor, torch.Tensor):
        rule, got = "be a torch.Tensor", type(tensor).__name__
        raise TypeError(must(function, name, rule, got))
    if not (tensor.is_cpu or tensor.is_meta):
        rule, got = "be on the CPU", f"a tensor on {tensor.device}"
        raise TypeError(must(function, name, rule, got))
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
        rule, got = "be a dense tensor", f"one {kind}"
        raise TypeError(must(function, name, rule, got))


def check_together(function, data, others):
    """Raise unless data and results are all on the CPU or all on meta.

    Other tensors may be on the CPU where the data are on meta, but not the other way
    round: there would be nothing to compute with. None stands for one not given.
    """
    first, x = next(iter(data.items()))
    for name, tensor in (data | others).items():
        if tensor is None or tensor.is_meta == x.is_meta:
            continue
        if tensor.is_meta or name in data:
            rule = f"be on {'meta' if x.is_meta else 'the CPU'}, as {first} is"
            got = f"a tensor on {tensor.device}"
            raise TypeError(must(function, name, rule, got))


def refuse_out(function, out, inputs):
    """Raise if a result that somebody differentiates is to go to a given tensor."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *out)):
        rule, got = "be None where gradients are needed", "a tensor"
        raise TypeError(must(function, "out", rule, got))


def check_out(function, out, inputs):
    """Refuse a tensor for the result that no operator takes, or that gradients want."""
    check_tensor(function, "out", out)
    refuse_out(function, (out,), inputs)


def check_call(function, given, out):
    """Refuse tensors, by their names, that no operator takes; data come first."""
    for name, tensor in given.items():
        check_tensor(function, name, tensor)
    if out is not None:
        check_out(function, out, given.values())
    first = next(iter(given))
    check_together(function, {first: given[first], "out": out}, given)


def float_dtype(function, dtype):
    """Return a dtype of NumPy or torch as torch's; raise unless it is one of ours."""
    if isinstance(dtype, torch.dtype):
        if dtype in FLOATS:
            return dtype
        got = str(dtype).removeprefix("torch.")
        raise TypeError(must(function, "dtype", REAL_RULE, got))
    try:
        got = repr(dtype) if dtype is None else np.dtype(dtype).name
    except TypeError:
        got = repr(dtype)
    for own in FLOATS:
        if str(own) == f"torch.{got}":
            return own
    raise TypeError(must(function, "dtype", REAL_RULE, got))


def wrong_dtype(function, name, rule, tensor):
    """Return the error that says of a tensor what its dtype must be."""
    got = str(tensor.dtype).removeprefix("torch.")
    return TypeError(must(function, name, rule, f"dtype {got}"))


# --- types ---------------------------------------------------------------------------


def is_whole(tensor):
    """Tell whether a tensor holds whole numbers, and not truth values."""
    return not (
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    )


def common_dtype(*given):
    """Return the common dtype of tensors; whole numbers count as float64."""
    dtypes = [t.dtype if t.is_floating_point() else torch.float64 for t in given]
    return functools.reduce(torch.promote_types, dtypes)


def result_dtype(x, *table):
    """Return the dtype of data after a table: 16 bits stay, but with one of float64."""
    if x.dtype in FLOATS[:2] and common_dtype(*table) != torch.float64:
        return x.dtype
    return common_dtype(x, *table)
