"""CoPE as operators of PyTorch, and as differentiable functions of them.

The operators are what `torch.compile` keeps in its graphs; they stand below autograd.
`attend` and `bias` pick among them, the plain functions, and autograd functions.
"""

# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import torch

from . import _core
from . import _tensors as tensors
from ._check import must
from ._cope import cope_bias as plain_cope_bias
from ._cope_attention import cope_attention as plain_cope_attention
from ._cope_attention import prepare, sizes_of, sum_to
from ._results import aligned, dtypes_of
from ._torch_check import common_dtype, result_dtype
from ._torch_register import (
    are_plain,
    bare,
    bares,
    distinct,
    is_dynamo_compiling,
    need_gradients,
    nothing,
    register,
    register_looped,
    transformed,
)

_OPERANDS = ("q", "k", "v", "position_embedding", "gate_key")


def _named(operands):
    """Return the operands of attention by name, without one that was not given."""
    pairs = zip(_OPERANDS, operands, strict=True)
    return {name: tensor for name, tensor in pairs if tensor is not None}


def _in_order_of(tensor, shape, dtype):
    """Return memory for a result, ordered as that of a tensor if shapes agree."""
    if tuple(tensor.shape) == tuple(shape):
        return torch.empty_like(tensor, dtype=dtype)
    return tensor.new_empty(shape, dtype=dtype)


def _gradient_tensors(gradients, operands):
    """Return arrays as tensors in the dtypes of the operands; nothing for None."""
    return tuple(
        operands[0].new_empty(0)
        if operand is None
        else torch.from_numpy(gradient).to(operand.dtype)
        for gradient, operand in zip(gradients, operands, strict=True)
    )


def _fresh_gradients(operands):
    return tuple(
        operands[0].new_empty(0) if t is None else t.new_empty(t.shape)
        for t in operands
    )


def _gradients(operator, function, given):
    """Compute gradients by an operator of compilers, or by an autograd function."""
    if is_dynamo_compiling():
        return operator(*given)
    if torch.is_grad_enabled():  # somebody may want a second derivative
        return function.apply(*given)
    return function.forward(*given)


def _only(gradients, needed):
    """Return the gradients that are needed, and None for each other."""
    pairs = zip(gradients, needed, strict=False)
    return [gradient if need else None for gradient, need in pairs]


# --- attention -----------------------------------------------------------------------


def _attention(q, k, v, embedding, gate_key, mask, *options):
    *operands, mask = bares((q, k, v, embedding, gate_key, mask))
    attention = prepare(_named(operands), mask, *options)
    out, array = attention.result(operands[0], None)
    statistics = tensors.empty(attention.sizes.rows(2), attention.real())
    attention.run(array, tensors.as_numpy(statistics))
    return out, statistics


def _fresh_attention(q, k, v, embedding, gate_key, mask, *_options):
    given = _named((q, k, v, embedding, gate_key))
    shapes = {name: tuple(t.shape) for name, t in given.items()}
    sizes = sizes_of(shapes, None if mask is None else tuple(mask.shape))
    out = _in_order_of(q, sizes.rows(sizes.dim), common_dtype(q, k, v))
    real = torch.promote_types(common_dtype(*given.values()), torch.float32)
    statistics = q.new_empty(sizes.rows(2), dtype=real)
    return out, statistics


def _attention_out(q, k, v, embedding, gate_key, mask, *rest):
    *options, out = rest
    *operands, mask = bares((q, k, v, embedding, gate_key, mask))
    _write_attention((*operands, mask), options, out)


def _write_attention(given, options, out):
    *operands, gate_key, mask = given
    scale, position_scale, causal = options
    plain_cope_attention(
        *operands,
        scale=scale,
        causal=causal,
        mask=mask,
        position_scale=position_scale,
        gate_key=gate_key,
        out=out,
    )


def _attention_backward(grad, out, statistics, *given):
    *operands, mask = bares(given[:6])
    attention = prepare(_named(operands), mask, *given[6:])
    results = (tensors.as_numpy(bare(t)) for t in (out, statistics, grad))
    gradients = attention.gradients(*results)
    return _gradient_tensors([gradients.get(name) for name in _OPERANDS], operands)


_GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor position_embedding, Tensor? gate_key, "
    "Tensor? mask, float? scale, float position_scale, bool causal"
)
_ATTENTION = register_looped(
    f"cope_attention({_GIVEN}) -> (Tensor, Tensor)", _attention, _fresh_attention
)
_ATTENTION_OUT = register(
    f"cope_attention_out({_GIVEN}, Tensor(a!) out) -> ()",
    _attention_out,
    nothing,
)
_ATTENTION_BACKWARD = register_looped(
    f"cope_attention_backward(Tensor grad, Tensor out, Tensor statistics, {_GIVEN}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    lambda grad, out, statistics, *given: _fresh_gradients(given[:5]),
)


def attend(given, options, out=None):
    """Attend, with gradients where they are asked for.

    `given` are q, k, v, the embedding, the gate key or None and the mask or None;
    `options` the scale or None, the scale of positions, and whether keys after the
    query are hidden.
    """
    if out is not None:
        if are_plain((*given, out)):
            _write_attention(given, options, out)
        else:
            _ATTENTION_OUT(*given, *options, out)
        return out
    if transformed() or need_gradients(given):
        return _Attention.apply(*distinct(given), *options)[0]
    if are_plain(given):
        *operands, mask = bares(given)
        attention = prepare(_named(operands), mask, *options)
        out, array = attention.result(operands[0], None)
        attention.run(array)
        return out
    return _ATTENTION(*given, *options)[0]


class _Attention(torch.autograd.Function):
    """Attention that keeps of each row two numbers, and computes the rest again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        work = _attention if are_plain(arguments[:6]) else _ATTENTION
        return work(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[6:]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output, *inputs[:6])

    @staticmethod
    def backward(ctx, grad, _of_statistics):
        given = grad, *ctx.saved_tensors, *ctx.options
        gradients = _gradients(_ATTENTION_BACKWARD, _AttentionGradient, given)
        return *_only(gradients, ctx.needs_input_grad), None, None, None, None


class _AttentionGradient(torch.autograd.Function):
    """The gradient of attention, which has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        work = _attention_backward if are_plain(arguments[:9]) else _ATTENTION_BACKWARD
        return work(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise _second_derivative("cope_attention")


def _second_derivative(function):
    got = "a second derivative"
    return NotImplementedError(must(function, "gradients", "be of first order", got))


# --- bias ----------------------------------------------------------------------------


def _bias(logits, z, mask, causal, out=None):
    logits, z, mask = bares((logits, z, mask))
    return plain_cope_bias(logits, z, causal=causal, mask=mask, out=out)


def _fresh_bias(logits, z, mask, _causal):
    rows = [t.shape[:-1] for t in (logits, z, mask) if t is not None]
    shape = (*torch.broadcast_shapes(*rows), logits.shape[-1])
    return _in_order_of(logits, shape, result_dtype(logits, z))


def _bias_out(logits, z, mask, causal, out):
    _bias(logits, z, mask, causal, out)


def _bias_backward(grad, logits, z, mask, causal):
    grad, *given = bares((grad, logits, z, mask))
    arrays = [None if t is None else tensors.as_numpy(t) for t in given]
    gradients = _bias_gradients(*arrays, bool(causal), tensors.as_numpy(grad))
    return _gradient_tensors(gradients, given[:2])


@np.errstate(all="ignore")
def _bias_gradients(logits, z, mask, causal, grad):
    """Return the gradients of logits and z in their shapes, of real type."""
    dtype, kind = dtypes_of(logits.dtype, z.dtype)
    shape, wide = grad.shape, (*grad.shape[:-1], z.shape[-1])
    given = (
        np.broadcast_to(aligned(logits, dtype), shape),
        np.broadcast_to(aligned(z, kind), wide),
        None if mask is None else np.broadcast_to(mask, shape),
    )
    real = np.float64 if dtype == np.float64 else np.float32
    dlogits, dz = np.empty(shape, real), np.empty(wide, real)
    grad = aligned(grad, dtype)
    _core.cope_bias_backward_arrays(*given, causal, grad, dlogits, dz)
    return tuple(
        sum_to(gradient, operand.shape).reshape(operand.shape)
        for gradient, operand in ((dlogits, logits), (dz, z))
    )


_LOGITS = "Tensor logits, Tensor z, Tensor? mask, bool causal"
_BIAS = register_looped(f"cope_bias({_LOGITS}) -> Tensor", _bias, _fresh_bias)
_BIAS_OUT = register(
    f"cope_bias_out({_LOGITS}, Tensor(a!) out) -> ()", _bias_out, nothing
)
_BIAS_BACKWARD = register_looped(
    f"cope_bias_backward(Tensor grad, {_LOGITS}) -> (Tensor, Tensor)",
    _bias_backward,
    lambda grad, logits, z, *_: _fresh_gradients((logits, z)),
)


def bias(given, causal, out=None):
    """Compute positional logits, with gradients where they are asked for.

    `given` are the logits, z and the mask or None.
    """
    if out is not None:
        if are_plain((*given, out)):
            _bias(*given, causal, out)
        else:
            _BIAS_OUT(*given, causal, out)
        return out
    if transformed() or need_gradients(given):
        return _Bias.apply(*distinct(given), causal)
    return (_bias if are_plain(given) else _BIAS)(*given, causal)


class _Bias(torch.autograd.Function):
    """The positional logits; their gates are computed again on the way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, z, mask, causal):
        work = _bias if are_plain((logits, z, mask)) else _BIAS
        return work(logits, z, mask, causal)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.causal = inputs[3]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx, grad):
        given = grad, *ctx.saved_tensors, ctx.causal
        gradients = _gradients(_BIAS_BACKWARD, _BiasGradient, given)
        return *_only(gradients, ctx.needs_input_grad), None, None


class _BiasGradient(torch.autograd.Function):
    """The gradient of the positional logits, which has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        work = _bias_backward if are_plain(arguments[:4]) else _BIAS_BACKWARD
        return work(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise _second_derivative("cope_bias")
