"""The rotation as operators of PyTorch, and as a differentiable function of them.

The operators are what `torch.compile` keeps in its graphs; they stand below autograd.
`rotate` picks among them, the plain functions, and autograd functions over both.
"""

# SPDX-License-Identifier: BSD-3-Clause

from typing import Any, NamedTuple

import torch

from ._rope import rope, rope_qk, rope_table
from ._torch_check import result_dtype
from ._torch_register import (
    are_plain,
    bare,
    distinct,
    nothing,
    register,
    spare_gradients,
    transformed,
)


class Turn(NamedTuple):
    """How to rotate: what is neither data nor table."""

    layout: str = "half"
    axis: int = -2
    rotary_start: int = 0
    adjoint: bool = False
    rounding: str = "once"

    def back(self):
        """Return the turn by which gradients go back."""
        return self._replace(adjoint=not self.adjoint)


class Rows(NamedTuple):
    """Which rows of the table the tokens use: tensors, or None."""

    positions: Any = None
    offset: Any = None
    cu_seqlens: Any = None

    def numbers(self, n_token):
        """Return the row of each token, (T,) or (B, T); None: one after the other."""
        if self.offset is None and self.cu_seqlens is None:
            return self.positions
        given = self.offset if self.cu_seqlens is None else self.cu_seqlens
        token = torch.arange(n_token, device=given.device)
        if self.cu_seqlens is None:
            return token + self.offset[..., None]
        sequence = torch.searchsorted(self.cu_seqlens, token, right=True) - 1
        token = token - self.cu_seqlens[sequence]
        if self.offset is None:
            return token
        return token + (self.offset[sequence] if self.offset.ndim else self.offset)


_OPTIONS = Turn._fields + Rows._fields


# --- operators -----------------------------------------------------------------------


def compute(xs, cos, sin, rows, turn, out=None):
    """Rotate CPU tensors; return a tuple."""
    *xs, cos, sin = map(bare, (*xs, cos, sin))
    options = dict(zip(_OPTIONS, (*turn, *rows), strict=True))
    if len(xs) == 2:
        return rope_qk(*xs, cos, sin, out=out, **options)
    return (rope(*xs, cos, sin, out=None if out is None else out[0], **options),)


def fresh(x, cos, sin):
    """Return memory as that of the rotated x."""
    return torch.empty_like(x, dtype=result_dtype(x, cos, sin))


def _rope(x, cos, sin, *rest):
    return compute((x,), cos, sin, Rows(*rest[:3]), Turn(*rest[3:]))[0]


def _rope_qk(q, k, cos, sin, *rest):
    return compute((q, k), cos, sin, Rows(*rest[:3]), Turn(*rest[3:]))


def _rope_out(x, cos, sin, *rest):
    *rest, out = rest
    compute((x,), cos, sin, Rows(*rest[:3]), Turn(*rest[3:]), (out,))


def _rope_qk_out(q, k, cos, sin, *rest):
    *rest, q_out, k_out = rest
    compute((q, k), cos, sin, Rows(*rest[:3]), Turn(*rest[3:]), (q_out, k_out))


_REST = (
    "Tensor cos, Tensor sin, Tensor? positions, Tensor? offset, Tensor? cu_seqlens, "
    "str layout, int axis, SymInt rotary_start, bool adjoint, str rounding"
)
_MAKERS = {
    1: register(
        f"rope(Tensor x, {_REST}) -> Tensor",
        _rope,
        lambda x, cos, sin, *_: fresh(x, cos, sin),
    ),
    2: register(
        f"rope_qk(Tensor q, Tensor k, {_REST}) -> (Tensor, Tensor)",
        _rope_qk,
        lambda q, k, cos, sin, *_: (fresh(q, cos, sin), fresh(k, cos, sin)),
    ),
}
_WRITERS = {
    1: register(
        f"rope_out(Tensor x, {_REST}, Tensor(a!) out) -> ()",
        _rope_out,
        nothing,
    ),
    2: register(
        f"rope_qk_out(Tensor q, Tensor k, {_REST}, "
        "Tensor(a!) q_out, Tensor(b!) k_out) -> ()",
        _rope_qk_out,
        nothing,
    ),
}


def _apply(xs, cos, sin, rows, turn):
    """Rotate below autograd, through an operator where somebody looks on."""
    if are_plain((*xs, cos, sin)):
        return compute(xs, cos, sin, rows, turn)
    result = _MAKERS[len(xs)](*xs, cos, sin, *rows, *turn)
    return result if len(xs) == 2 else (result,)


def write(xs, cos, sin, rows, turn, out):
    """Rotate into `out`, without gradients."""
    if are_plain((*xs, cos, sin, *out)):
        compute(xs, cos, sin, rows, turn, out)
    else:
        _WRITERS[len(xs)](*xs, cos, sin, *rows, *turn, *out)


def _rope_table(positions, inv_freq, attention_factor, angles, dtype):
    return rope_table(
        bare(positions),
        bare(inv_freq),
        attention_factor=attention_factor,
        angles=angles,
        dtype=dtype,
    )


def _fresh_table(positions, inv_freq, _factor, _angles, dtype):
    shape = (*positions.shape, *inv_freq.shape)
    return tuple(inv_freq.new_empty(shape, dtype=dtype) for _ in range(2))


_TABLE = register(
    "rope_table(Tensor positions, Tensor inv_freq, float attention_factor, str angles, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    _rope_table,
    _fresh_table,
)


# --- derivatives ---------------------------------------------------------------------


def rotate(xs, cos, sin, rows, turn):
    """Rotate one or two tensors, with every derivative that is asked for."""
    is_transformed = transformed()
    needed = [t.requires_grad for t in (cos, sin, *xs)]
    if not is_transformed and not (torch.is_grad_enabled() and any(needed)):
        return _apply(xs, cos, sin, rows, turn)
    if is_transformed or any(needed[:2]):
        cos, sin = (_full_rank(t, xs[0], rows, turn.axis) for t in (cos, sin))
        rows = Rows()
    apply = _apply_transformed if is_transformed else _Rotation.apply
    return apply(turn, cos, sin, *rows, *distinct(xs))


def _full_rank(table, x, rows, axis):
    """Return the rows that the tokens use, with as many axes as x, as views."""
    axis %= max(x.ndim, 2)
    positions = rows.numbers(x.shape[axis])
    if positions is not None:
        table = torch.nn.functional.embedding(positions, table)
    if table.ndim in (1, x.ndim):
        return table
    shape = [1] * x.ndim
    shape[0] = table.shape[0] if table.ndim == 3 else 1
    shape[axis], shape[-1] = table.shape[-2:]
    return table.reshape(shape)


class _Rotation(torch.autograd.Function):
    """The rotation is linear in x and in the table: both gradients are rotations."""

    @staticmethod
    def forward(ctx, turn, cos, sin, positions, offset, cu_seqlens, *xs):
        ctx.turn = turn
        of_table = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        kept = xs if of_table else ()
        ctx.save_for_backward(cos, sin, positions, offset, cu_seqlens, *kept)
        results = _apply(xs, cos, sin, Rows(positions, offset, cu_seqlens), turn)
        if not of_table:
            spare_gradients(ctx, results, ctx.needs_input_grad[6:])
        return results

    @staticmethod
    def backward(ctx, *grads):
        cos, sin, positions, offset, cu_seqlens, *xs = ctx.saved_tensors
        rows, turn = Rows(positions, offset, cu_seqlens), ctx.turn
        needs_cos, needs_sin, _, _, _, *needs_x = ctx.needs_input_grad[1:]
        of_xs = iter(())
        if any(needs_x):
            wanted = [g for g, need in zip(grads, needs_x, strict=True) if need]
            of_xs = iter(rotate(wanted, cos, sin, rows, turn.back()))
        of_cos = of_sin = None
        if needs_cos or needs_sin:
            of_cos, of_sin = _table_gradients(xs, grads, cos, sin, turn)
        of_xs = [next(of_xs) if need else None for need in needs_x]
        return None, of_cos, of_sin, None, None, None, *of_xs


class _Transformed(_Rotation):
    """The same for ``torch.func`` and forward-mode; its tables have the rank of x."""

    @staticmethod
    def forward(turn, cos, sin, positions, offset, cu_seqlens, *xs):
        return _apply(xs, cos, sin, Rows(), turn)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.turn, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx, _turn, of_cos, of_sin, _positions, _offset, _cu_seqlens, *of_xs):
        cos, sin, _, _, _, *xs = ctx.saved_tensors
        turn = ctx.turn
        of_cos = torch.zeros_like(cos) if of_cos is None else of_cos
        of_sin = torch.zeros_like(sin) if of_sin is None else of_sin
        tangents = []
        for x, of_x in zip(xs, of_xs, strict=True):
            (tangent,) = rotate(
                [_rotated_part(x, cos, turn)], of_cos, of_sin, Rows(), turn
            )
            if of_x is not None:
                tangent = tangent + rotate([of_x], cos, sin, Rows(), turn)[0]
            tangents.append(tangent)
        return tuple(tangents)

    @staticmethod
    def vmap(info, in_dims, turn, cos, sin, _positions, _offset, _cu_seqlens, *xs):
        _, of_cos, of_sin, _, _, _, *of_xs = in_dims
        n_axis = xs[0].ndim - (of_xs[0] is not None)
        turn = turn._replace(axis=turn.axis % max(n_axis, 2) + 1)
        xs = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(xs, of_xs, strict=True)
        ]
        cos, sin = (
            table[None] if dim is None else table.movedim(dim, 0)
            for table, dim in ((cos, of_cos), (sin, of_sin))
        )
        cos, sin = torch.broadcast_tensors(cos, sin)
        return rotate(xs, cos, sin, Rows(), turn), (0,) * len(xs)


def table(positions, inv_freq, attention_factor, angles, dtype):
    """Return cosines and sines, with the gradient of the frequencies."""
    arguments = positions, inv_freq, attention_factor, angles, dtype
    if torch.is_grad_enabled() and inv_freq.requires_grad:
        return _Table.apply(*arguments)
    return _rope_table(*arguments) if are_plain(arguments[:2]) else _TABLE(*arguments)


class _Table(torch.autograd.Function):
    """Gradients of an exact table, from the table itself."""

    @staticmethod
    def forward(positions, inv_freq, *rest):
        arguments = positions, inv_freq, *rest
        if are_plain((positions, inv_freq)):
            return _rope_table(*arguments)
        return _TABLE(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx, of_cos, of_sin):
        positions, cos, sin = ctx.saved_tensors
        turned = (of_sin * cos - of_cos * sin) * positions[..., None]
        return None, turned.flatten(0, -2).sum(0), None, None, None


@torch.compiler.disable(reason="compilers know nothing of forward mode")
def _apply_transformed(*arguments):
    return _Transformed.apply(*arguments)


def _pairs(x, table, turn):
    """Return views of the first and of the second channel of each pair."""
    n_pair, first = table.shape[-1], turn.rotary_start
    first += x.shape[-1] if first < 0 else 0
    last = first + 2 * n_pair
    if turn.layout == "interleaved":
        return x[..., first:last:2], x[..., first + 1 : last : 2]
    return x[..., first : first + n_pair], x[..., first + n_pair : last]


def _rotated_part(x, table, turn):
    """Return x with zeros in the channels that a rotation would copy."""
    n_channel, first = 2 * table.shape[-1], turn.rotary_start
    first += x.shape[-1] if first < 0 else 0
    part = x[..., first : first + n_channel]
    around = first, x.shape[-1] - first - n_channel
    return torch.nn.functional.pad(part, around)


def _table_gradients(xs, grads, cos, sin, turn):
    """Return the gradients of cos and sin: products, summed where they broadcast."""
    wide = torch.promote_types(cos.dtype, torch.float32)
    of_cos, of_sin = [], []
    for x, grad in zip(xs, grads, strict=True):
        (a, b), (of_a, of_b) = (_pairs(t.to(wide), cos, turn) for t in (x, grad))
        of_cos.append((of_a * a + of_b * b).sum_to_size(cos.shape))
        of_sin.append((of_b * a - of_a * b).sum_to_size(sin.shape))
    of_cos, of_sin = sum(of_cos), sum(of_sin)
    return of_cos.to(cos.dtype), (-of_sin if turn.adjoint else of_sin).to(sin.dtype)
