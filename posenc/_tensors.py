"""Torch CPU tensors seen as NumPy arrays. Finds torch, but never imports it."""

# SPDX-License-Identifier: BSD-3-Clause
import sys

import numpy as np
from ml_dtypes import bfloat16

# Bytes from which on NumPy asks for huge pages.
_MIN_HUGE_SIZE = 1 << 22


def _torch():
    """Return torch once somebody has imported it, else None."""
    module = sys.modules.get("torch")
    return module if hasattr(module, "Tensor") else None


def is_tensor(value):
    """Tell whether `value` is a torch tensor of any kind."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def are_tensors(*values):
    """Tell whether any of them is a torch tensor."""
    return any(map(is_tensor, values))


def obstacle(tensor):
    """Say what keeps NumPy from reading a tensor's memory, or None."""
    torch = _torch()
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if not tensor.is_cpu:
        return f"a tensor on {tensor.device}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return "a quantized tensor"
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_neg():
        return "a lazily negated tensor (of it: its resolve_neg())"
    if tensor.is_conj():
        return "a lazily conjugated tensor (of it: its resolve_conj())"
    if _has_tangent(tensor):
        return "a dual tensor of forward-mode derivatives"
    return None


def _has_tangent(tensor):
    forward_ad = _torch().autograd.forward_ad
    if getattr(forward_ad, "_current_level", -1) < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def needs_gradient(tensor):
    """Tell whether a derivative would be lost if NumPy read this tensor."""
    return tensor.requires_grad and _torch().is_grad_enabled()


def as_numpy(tensor):
    """Return an array in the memory of a tensor that has passed `obstacle`.

    Raises RuntimeError if it has no memory, TypeError if NumPy lacks its dtype.
    """
    torch = _torch()
    if tensor.numel() and not tensor.untyped_storage().data_ptr():
        raise RuntimeError("its storage is empty")  # NumPy would give it other memory
    if tensor.requires_grad:  # else as it is: transforms wrap what is detached in them
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


def empty_like(tensor, dtype):
    """Return a new tensor of a NumPy dtype, in the memory order of `tensor`."""
    torch = _torch()
    is_large = tensor.numel() * dtype.itemsize >= _MIN_HUGE_SIZE
    if is_large and tensor.is_contiguous():
        return empty(tensor.shape, dtype)
    return torch.empty_like(tensor, dtype=getattr(torch, dtype.name))


def empty(shape, dtype):
    """Return a new tensor of a NumPy dtype.

    It lies in memory of NumPy, which asks for huge pages: torch does not, and page by
    page fresh memory takes longer than what is written there.
    """
    return from_numpy(np.empty(shape, dtype))


def from_numpy(array):
    """Return a tensor in the memory of an array."""
    torch = _torch()
    if array.dtype == bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def mark_changed(*outs):
    """Tell torch that tensors among these are written behind its back.

    Its graph can then refuse to use what it had saved of them.
    """
    for out in filter(is_tensor, outs):
        _torch().autograd.graph.increment_version(out)


def take(tensor, index, axis):
    """Return the elements of any tensor at an array of indices along one axis."""
    return tensor.index_select(axis, from_numpy(index).to(tensor.device))


def numpy_dtype(dtype):
    """Return the name of a torch dtype, which NumPy reads; others as they are."""
    torch = _torch()
    if torch is not None and isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    return dtype
