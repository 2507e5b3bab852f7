"""Relative biases as operators of PyTorch, and as a differentiable function of them.

The operators are what `torch.compile` keeps in its graphs; they stand below autograd.
One spreads a row of values per head over a matrix, one adds up along the diagonals;
each is the gradient of the other.
"""

# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import torch

from . import _core
from . import _tensors as tensors
from ._bias import t5_bucket
from ._bias_spread import in_type
from ._torch_register import bare, register, register_looped, transformed


def _spread(values, n_query, dtype):
    values = tensors.as_numpy(bare(values).contiguous())
    n_key = values.shape[-1] - n_query + 1
    shape = (*values.shape[:-1], n_query, n_key)
    out = tensors.empty(shape, np.dtype(tensors.numpy_dtype(dtype)))
    result = tensors.as_numpy(out)
    if out.numel():
        _core.bias_arrays(in_type(values, result.dtype), None, result)
    return out


def _fresh_spread(values, n_query, dtype):
    shape = (*values.shape[:-1], n_query, values.shape[-1] - n_query + 1)
    return values.new_empty(shape, dtype=dtype)


def _collect(grad):
    grad = bare(grad)
    n_query, n_key = grad.shape[-2:]
    sums = grad.new_zeros((*grad.shape[:-2], n_query + n_key - 1), dtype=torch.float64)
    if grad.numel():
        _core.bias_collect_arrays(tensors.as_numpy(grad), tensors.as_numpy(sums))
    return sums


def _fresh_collect(grad):
    n_query, n_key = grad.shape[-2:]
    shape = (*grad.shape[:-2], n_query + n_key - 1)
    return grad.new_empty(shape, dtype=torch.float64)


def _bucket(offsets, num_buckets, max_distance, bidirectional):
    return t5_bucket(
        bare(offsets).contiguous(),
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )


_SPREAD = register_looped(
    "bias_spread(Tensor values, SymInt n_query, ScalarType dtype) -> Tensor",
    _spread,
    _fresh_spread,
)
_COLLECT = register_looped(
    "bias_collect(Tensor grad) -> Tensor", _collect, _fresh_collect
)
bucket = register(
    "t5_bucket(Tensor offsets, int num_buckets, int max_distance, "
    "bool bidirectional) -> Tensor",
    _bucket,
    lambda offsets, *_: torch.empty_like(
        offsets, memory_format=torch.contiguous_format, dtype=torch.int64
    ),
)


def spread(values, n_query, dtype):
    """Spread values (..., n) in float64 over (..., T, S), with every derivative."""
    work = _ForwardSpread if transformed() else _Spread
    return work.apply(values, n_query, dtype)


class _Spread(torch.autograd.Function):
    """Values (..., n) in float64, spread over (..., T, S) of another type."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values, n_query, dtype):
        return _SPREAD(values, n_query, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.n_query, ctx.dtype = inputs[1:]

    @staticmethod
    def backward(ctx, grad):
        return _Collect.apply(grad), None, None


class _Collect(torch.autograd.Function):
    """Sums along the diagonals of (..., T, S), in float64."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad):
        return _COLLECT(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.n_query, ctx.dtype = inputs[0].shape[-2], inputs[0].dtype

    @staticmethod
    def backward(ctx, grad):
        return _Spread.apply(grad, ctx.n_query, ctx.dtype)


class _ForwardSpread(_Spread):
    """With forward mode, which Dynamo does not follow."""

    @staticmethod
    def backward(ctx, grad):
        return _ForwardCollect.apply(grad), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _ForwardSpread.apply(tangent, ctx.n_query, ctx.dtype)


class _ForwardCollect(_Collect):
    """The same of the sums."""

    @staticmethod
    def backward(ctx, grad):
        return _ForwardSpread.apply(grad, ctx.n_query, ctx.dtype)

    @staticmethod
    def jvp(ctx, tangent):
        return _ForwardCollect.apply(tangent)
