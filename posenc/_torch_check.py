"""What the functions for torch check of their tensors."""

# SPDX-License-Identifier: BSD-3-Clause

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


def refuse_out(function, out, inputs):
    """Raise if a result that somebody differentiates is to go to a given tensor."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *out)):
        rule, got = "be None where gradients are needed", "a tensor"
        raise TypeError(must(function, "out", rule, got))


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
