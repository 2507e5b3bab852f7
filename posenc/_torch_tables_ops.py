"""Tables of positions added to tensors, as operators of PyTorch and with gradients.

The operators are what `torch.compile` keeps in its graphs; they stand below autograd.
`add_sines` and `add_rows` pick among them, the plain functions, and autograd functions.
"""

# SPDX-License-Identifier: BSD-3-Clause

from typing import Any, NamedTuple

import torch

from . import _learned, _sinusoidal
from ._torch_check import check_together, common_dtype, result_dtype
from ._torch_ops import Rows
from ._torch_register import (
    are_plain,
    bares,
    distinct,
    need_gradients,
    nothing,
    register,
    register_looped,
    transformed,
)


class Places(NamedTuple):
    """Where the tokens stand, and which are padding: tensors, or None."""

    positions: Any = None
    offset: Any = None
    cu_seqlens: Any = None
    padding_mask: Any = None

    def numbers(self, x):
        """Return the position of each token, with as many axes as x but its last."""
        positions = Rows(*self[:3]).numbers(x.shape[-2])
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        return _one_per_row(positions, x)

    def hidden(self, x):
        """Return which rows of x are padding, with an axis for the channels."""
        return _one_per_row(self.padding_mask, x)[..., None]


def _one_per_row(tensor, x):
    n_axis = x.ndim - 1
    if tensor.ndim == 2 and n_axis > 2:
        shape = tensor.shape[0], *(1,) * (n_axis - 2), tensor.shape[1]
        return tensor.reshape(shape)
    return tensor.reshape((1,) * (n_axis - tensor.ndim) + tuple(tensor.shape))


class Sines(NamedTuple):
    """Which sinusoidal table is added, to data multiplied by what."""

    scale: float
    theta: float
    layout: str
    downscale_freq_shift: float


# --- operators -----------------------------------------------------------------------


def _sinusoidal_op(x, *rest, out=None):
    x, *places = bares((x, *rest[:4]))
    options = Places(*places)._asdict() | Sines(*rest[4:])._asdict()
    return _sinusoidal.add_sinusoidal(x, **options, out=out)


def _sinusoidal_out(*arguments):
    *arguments, out = arguments
    _sinusoidal_op(*arguments, out=out)


def _learned_op(x, table, *rest, out=None):
    x, table, *places = bares((x, table, *rest[:4]))
    options = Places(*places)._asdict()
    return _learned.add_learned(x, table, scale=rest[4], **options, out=out)


def _learned_out(*arguments):
    *arguments, out = arguments
    _learned_op(*arguments, out=out)


def _fresh_sum(x, *_):
    return torch.empty_like(x, dtype=common_dtype(x))


_PLACES = "Tensor? positions, Tensor? offset, Tensor? cu_seqlens, Tensor? padding_mask"
_SINES = f"Tensor x, {_PLACES}, float scale, float theta, str layout, float shift"
_LEARNED = f"Tensor x, Tensor table, {_PLACES}, float scale"
_ADD_SINUSOIDAL = register_looped(
    f"add_sinusoidal({_SINES}) -> Tensor", _sinusoidal_op, _fresh_sum
)
_ADD_SINUSOIDAL_OUT = register(
    f"add_sinusoidal_out({_SINES}, Tensor(a!) out) -> ()", _sinusoidal_out, nothing
)
_ADD_LEARNED = register_looped(
    f"add_learned({_LEARNED}) -> Tensor",
    _learned_op,
    lambda x, table, *_: torch.empty_like(x, dtype=result_dtype(x, table)),
)
_ADD_LEARNED_OUT = register(
    f"add_learned_out({_LEARNED}, Tensor(a!) out) -> ()", _learned_out, nothing
)


# --- derivatives ---------------------------------------------------------------------


def _scaled(grad, places, scale, dtype):
    """Return the gradient of the data."""
    grad = grad * scale if scale != 1 else grad
    if places.padding_mask is not None:
        grad = grad.masked_fill(places.hidden(grad), 0)
    return grad.to(dtype)


class _AddSinusoidal(torch.autograd.Function):
    """The sum is linear in the data."""

    @staticmethod
    def forward(x, *rest):
        work = _sinusoidal_op if are_plain((x, *rest[:4])) else _ADD_SINUSOIDAL
        return work(x, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *rest = inputs
        ctx.scale, ctx.dtype = rest[4], x.dtype
        ctx.save_for_backward(rest[3])

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        places = Places(padding_mask=mask)
        return _scaled(grad, places, ctx.scale, ctx.dtype), *(None,) * 8


class _AddLearned(torch.autograd.Function):
    """The sum is linear in the data and in the table, whose rows gather gradients."""

    @staticmethod
    def forward(x, table, *rest):
        work = _learned_op if are_plain((x, table, *rest[:4])) else _ADD_LEARNED
        return work(x, table, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, table, *rest = inputs
        ctx.scale, ctx.dtype = rest[4], x.dtype
        ctx.save_for_backward(*rest[:4])
        ctx.n_row, ctx.table_dtype = table.shape[0], table.dtype

    @staticmethod
    def backward(ctx, grad):
        places = Places(*ctx.saved_tensors)
        of_x = of_table = None
        if ctx.needs_input_grad[0]:
            of_x = _scaled(grad, places, ctx.scale, ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_table = _scatter(grad, places, ctx.n_row).to(ctx.table_dtype)
        return of_x, of_table, *(None,) * 5


def _scatter(grad, places, n_row):
    """Return the gradient of a table: of each row, the sum over its tokens."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    positions = places.numbers(grad).long()
    if places.padding_mask is not None:
        hidden = places.hidden(grad)
        grad = grad.masked_fill(hidden, 0)
        # Positions that all are padding may be no rows.
        positions = torch.where((positions >= 0) & (positions < n_row), positions, 0)
    grad = grad.sum_to_size((*positions.shape, grad.shape[-1]))
    return torch.ops.aten.embedding_dense_backward(grad, positions, n_row, -1, False)


# --- choices -------------------------------------------------------------------------


def add_sines(x, places, sines, out=None):
    """Add a sinusoidal table, with gradients where they are asked for."""
    given = x, *places
    is_plain = are_plain((*given, out))
    if not is_plain:
        check_together("add_sinusoidal", {"x": x, "out": out}, places._asdict())
    if out is not None:
        write = _sinusoidal_out if is_plain else _ADD_SINUSOIDAL_OUT
        write(*given, *sines, out)
        return out
    if transformed():
        return _composed_sines(x, places, sines)
    if need_gradients((x,)):
        return _AddSinusoidal.apply(*given, *sines)
    return (_sinusoidal_op if is_plain else _ADD_SINUSOIDAL)(*given, *sines)


def add_rows(x, table, places, scale, out=None):
    """Add rows of a learned table, with gradients where they are asked for."""
    given = x, table, *places
    is_plain = are_plain((*given, out))
    if not is_plain:
        others = {"table": table} | places._asdict()
        check_together("add_learned", {"x": x, "out": out}, others)
    if out is not None:
        write = _learned_out if is_plain else _ADD_LEARNED_OUT
        write(*given, scale, out)
        return out
    if transformed():
        rows = torch.nn.functional.embedding(places.numbers(x), table)
        return _composed(x, rows, places, scale, result_dtype(x, table))
    if need_gradients((x, table)):
        return _AddLearned.apply(*distinct(given), scale)
    return (_learned_op if is_plain else _ADD_LEARNED)(*given, scale)


def _composed_sines(x, places, sines):
    """Return the sum by torch's own functions, but for the table."""
    numbers, dtype = places.numbers(x), common_dtype(x)
    wide = torch.promote_types(dtype, torch.float32)
    zeros = torch.zeros(x.shape[-2:], dtype=wide)
    zeros = zeros.expand(*numbers.shape[:-1], *x.shape[-2:])
    alone = sines._replace(scale=1.0)
    rows = _ADD_SINUSOIDAL(zeros, *Places(numbers), *alone)
    return _composed(x, rows, places, sines.scale, dtype)


def _composed(x, rows, places, scale, dtype):
    """Return the sum by torch's own functions, for transforms of any kind."""
    wide = torch.promote_types(dtype, torch.float32)
    total = (x.to(wide) * scale + rows.to(wide)).to(dtype)
    if places.padding_mask is not None:
        total = total.masked_fill(places.hidden(x), 0)
    return total
