"""The rotation of ``apply_rotary_pos_emb`` on torch tensors: fast, traced, in place.

Its tables hold every cosine twice, one half after the other; our kernels want a half.
Imports torch, so only functions of ``_hf_rotation`` import this.
"""

# SPDX-License-Identifier: BSD-3-Clause

import sys

import torch

from ._core import halves_agree, rope_qk_twin
from ._hf_tally import tally
from ._torch_ops import Rows, Turn, compute, fresh
from ._torch_ops import rotate as rotate_with_gradients
from ._torch_register import register, spare_gradients, transformed, undisturbed

HALVES = "the halves of cos or sin differ"
SERVED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_DENSE = torch.strided
_AXIS = {1: -2, 2: -3}


def rotate(q, k, cos, sin, unsqueeze_dim, layout, inplace=False):
    """Rotate plain tensors by the shortest way; None: another way must be found."""
    if not undisturbed() or not _PLAIN.issuperset((type(q), type(k))):
        return None
    if q.dim() != 4 or k.dim() != 4 or q.layout is not _DENSE or k.layout is not _DENSE:
        return None
    axis = _AXIS.get(unsqueeze_dim)
    if axis is None or not (order_fits(q) and order_fits(k)):
        return None
    out = (q, k) if inplace and is_alone(q) and is_alone(k) else None
    result = rope_qk_twin(q, k, cos, sin, layout, axis, out)
    return None if result is NotImplemented else result


def halves(cos, sin):
    """Return the first halves of the tables, or None if the second hold other bits.

    Asked in every call, though all layers share their tables: a write through ``.data``
    or a NumPy view leaves no trace.
    """
    cos, sin = cos.detach(), sin.detach()
    if halves_agree(cos, sin) is not True:
        return None
    n_pair = cos.shape[-1] // 2
    return cos[..., :n_pair], sin[..., :n_pair]


def rotate_differentiably(q, k, cos, sin, unsqueeze_dim, layout):
    """Rotate with gradients, which are those of eager; None: the halves differ."""
    first = halves(cos, sin)
    if first is None:
        return None
    turn = Turn(layout, _AXIS[unsqueeze_dim], rounding="eager")
    return rotate_with_gradients((q, k), *first, Rows(), turn)


def fits(q, k, cos, sin, unsqueeze_dim):
    """Tell whether types, shapes and memory orders are those that attention has."""
    dtype = q.dtype
    return (
        dtype in SERVED
        and k.dtype is dtype
        and cos.dtype is dtype
        and sin.dtype is dtype
        and q.layout is k.layout is cos.layout is sin.layout is torch.strided
        and shapes_fit(q.shape, k.shape, cos.shape, sin.shape, unsqueeze_dim)
        and order_fits(q)
        and order_fits(k)
    )


def shapes_fit(q, k, cos, sin, unsqueeze_dim):
    """Tell whether q and k are (B, H, S, D) or (B, S, H, D), and cos (B or 1, S, D)."""
    if not (len(q) == len(k) == 4 and len(cos) == 3 and cos == sin):
        return False
    if type(unsqueeze_dim) is not int or unsqueeze_dim not in _AXIS:
        return False
    seq = 3 - unsqueeze_dim
    batch, n_token, head_dim = q[0], q[seq], q[3]
    return (
        k[0] == batch
        and k[seq] == n_token
        and k[3] == head_dim
        and head_dim % 2 == 0
        and cos[0] in (1, batch)
        and cos[1] == n_token
        and cos[2] == head_dim
    )


def order_fits(x):
    """Tell whether channels are innermost and the batch is outermost in memory."""
    batch, heads, tokens, channels = x.stride()
    return channels == 1 and (x.shape[0] == 1 or (batch >= heads and batch >= tokens))


# --- in place ------------------------------------------------------------------------


def _holders(x):
    """Return how many tensors hold the memory of x, and how many names its base."""
    base = x._base
    n_tensor = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    return n_tensor, base is not None and sys.getrefcount(base)


def _count_alone():
    """Return `_holders` of tensors that nobody else holds, as this torch counts."""
    with torch.no_grad():
        own, view = torch.zeros(2, device="cpu"), torch.zeros(2, device="cpu")[:1]
    return {_holders(own), _holders(view)}


_ALONE = _count_alone()


def is_alone(x):
    """Tell whether no other tensor or array holds the memory of x, but its base."""
    return _holders(x) in _ALONE


# --- traced by torch.compile ---------------------------------------------------------


def can_join(q, k, cos, sin, unsqueeze_dim, layout):
    """Tell whether a traced call may become our operator."""
    return (
        layout == "half"
        and not (torch.compiler.is_exporting() or transformed())
        and type(q) is type(k) is type(cos) is type(sin) is torch.Tensor
        and q.device.type == k.device.type == cos.device.type == "cpu"
        and fits(q, k, cos, sin, unsqueeze_dim)
        and not (cos.requires_grad or sin.requires_grad)
    )


def join(q, k, cos, sin, unsqueeze_dim):
    """Rotate, layout 'half', by one operator in the graph that is being traced."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Joined.apply(q, k, cos, sin, unsqueeze_dim)
    return _JOIN(q, k, cos, sin, unsqueeze_dim, False)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, unsqueeze_dim):
        ctx.save_for_backward(cos, sin)
        ctx.unsqueeze_dim = unsqueeze_dim
        results = _JOIN(q, k, cos, sin, unsqueeze_dim, False)
        spare_gradients(ctx, results, ctx.needs_input_grad[:2])
        return results

    @staticmethod
    def backward(ctx, of_q, of_k):
        of_q, of_k = _JOIN(of_q, of_k, *ctx.saved_tensors, ctx.unsqueeze_dim, True)
        return of_q, of_k, None, None, None


def _joined(q, k, cos, sin, unsqueeze_dim, adjoint):
    """Rotate by the kernels, or as transformers does if the halves differ."""
    first = halves(cos, sin)
    if not adjoint:
        tally.add("rotation", HALVES if first is None else None)
    if first is not None:
        turn = Turn("half", _AXIS[unsqueeze_dim], 0, adjoint, "eager")
        return compute((q, k), *first, Rows(), turn)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    step = _step_back if adjoint else _step
    return tuple(fresh(x, cos, sin).copy_(step(x, cos, sin)) for x in (q, k))


def _step(x, cos, sin):
    """Rotate as transformers does."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _step_back(grad, cos, sin):
    """Return the gradient of `_step`."""
    a, b = (grad * sin).chunk(2, -1)
    return grad * cos + torch.cat((b, -a), -1)


_JOIN = register(
    "apply_rotary_pos_emb(Tensor q, Tensor k, Tensor cos, Tensor sin, "
    "int unsqueeze_dim, bool adjoint) -> (Tensor, Tensor)",
    _joined,
    lambda q, k, cos, sin, *_: (fresh(q, cos, sin), fresh(k, cos, sin)),
)
