"""Stand in for transformers' ``apply_rotary_pos_emb``, bit for bit.

Knows when posenc may take the place of the original; knows neither models nor configs.
torch is imported inside functions only.
"""

# SPDX-License-Identifier: BSD-3-Clause

import functools

from ._check import must
from ._hf_tally import make_tensor_obstacle, make_trace_mark, tally

TABLE_GRADIENTS = "gradients of cos or sin are asked for"


class Replacement:
    """An attribute of a module or class that is ours while anybody wants it.

    Not save-and-restore: the first to come installs, the last to leave restores, so
    patches may be undone in any order.
    """

    def __init__(self, owner, name, make):
        self.owner, self.name, self.n_user = owner, name, 0
        self.n_writer = 0  # users who allow work in place
        self.wanted = self.inplace = False  # what functions read, traced ones too
        self.original = getattr(owner, name)
        self.function = make(self)
        functools.update_wrapper(self.function, self.original, updated=())
        self.function._posenc = self

    @classmethod
    def at(cls, owner, name, make):
        """Return the one that is installed, or a new one around what is there."""
        current = getattr(owner, name)
        ours = getattr(current, "_posenc", None)
        # Somebody's wrapper may have copied our attributes along with our name.
        installed = ours is not None and ours.function is current
        return ours if installed else cls(owner, name, make)

    def __str__(self):
        return f"{getattr(self.owner, '__qualname__', self.owner.__name__)}.{self.name}"

    def acquire(self, inplace=False):
        if self.n_user == 0:
            setattr(self.owner, self.name, self.function)
        self._count(1, inplace)

    def release(self, inplace=False):
        """Give up one use; return why the original could not come back, or None."""
        self._count(-1, inplace)
        if self.n_user:
            return None
        if getattr(self.owner, self.name) is not self.function:
            return f"{self}: somebody else replaced it after the patch, theirs stays"
        setattr(self.owner, self.name, self.original)
        return None

    def _count(self, change, inplace):
        self.n_user += change
        self.n_writer += change * inplace
        self.wanted, self.inplace = self.n_user > 0, self.n_writer > 0


def make_dispatcher(replacement, layout):
    """Make the function that stands in for ``replacement.original``.

    Without users it only passes calls on: somebody may still hold it.
    """
    import torch

    from . import _hf_torch

    original, traced = replacement.original, make_trace_mark("rotation")
    obstacle, rotate = _make_obstacle(), _hf_torch.rotate
    rotate_differentiably = _hf_torch.rotate_differentiably
    can_join, join = _hf_torch.can_join, _hf_torch.join

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if torch.compiler.is_compiling():
            if replacement.wanted and can_join(q, k, cos, sin, unsqueeze_dim, layout):
                return join(q, k, cos, sin, unsqueeze_dim)
            traced()
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        if not replacement.wanted:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        result = rotate(q, k, cos, sin, unsqueeze_dim, layout, replacement.inplace)
        if result is not None:
            tally.add("rotation")
            return result
        reason = obstacle(q, k, cos, sin, unsqueeze_dim)
        if reason is None:
            result = rotate_differentiably(q, k, cos, sin, unsqueeze_dim, layout)
            reason = _hf_torch.HALVES if result is None else None
        tally.add("rotation", reason)
        if reason is None:
            return result
        return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return apply_rotary_pos_emb


def _make_obstacle():
    """Make the function that says why the original must run, or None."""
    import torch

    from ._hf_torch import SERVED, order_fits, shapes_fit

    tensor_obstacle = make_tensor_obstacle()

    def obstacle(q, k, cos, sin, unsqueeze_dim):
        reason = tensor_obstacle((q, k, cos, sin))
        if reason is not None:
            return reason
        dtype = q.dtype
        if k.dtype != dtype or cos.dtype != dtype or sin.dtype != dtype:
            return "q, k, cos and sin are of different types (autocast)"
        if dtype not in SERVED:
            return f"{dtype} is not served"
        if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
            return TABLE_GRADIENTS
        if not shapes_fit(q.shape, k.shape, cos.shape, sin.shape, unsqueeze_dim):
            return "shapes or unsqueeze_dim that posenc does not know"
        if not (order_fits(q) and order_fits(k)):
            return "a memory order other than that of attention"
        return None

    return obstacle


def probe(replacement, layout):
    """Accept the original only if our kernel gives its bits on small random cases."""
    import torch

    from ._hf_torch import SERVED, rotate

    original = replacement.original
    random = torch.Generator(device="cpu").manual_seed(0)

    def agree(dtype, batch, unsqueeze_dim):
        shapes = (2, 3, 4, 8), (2, 3, 2, 8), (batch, 3, 4), (batch, 3, 4)
        q, k, cos, sin = (
            torch.randn(shape, generator=random, dtype=dtype, device="cpu")
            for shape in shapes
        )
        if unsqueeze_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        case = q, k, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)
        theirs = original(*case, unsqueeze_dim=unsqueeze_dim)
        theirs += original(*case) if unsqueeze_dim == 1 else ()
        ours = rotate(*case, unsqueeze_dim, layout) * (len(theirs) // 2)
        return all(map(torch.equal, theirs, ours))

    rule = f"rotate like posenc's layout {layout!r}"
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            accepted = all(
                agree(dtype, batch, unsqueeze_dim)
                for dtype in SERVED
                for batch in (1, 2)
                for unsqueeze_dim in (1, 2)
            )
    except Exception as error:
        got = f"{original!r}, which raises {type(error).__name__}: {error}"
        raise RuntimeError(must("patch", str(replacement), rule, got)) from error
    if not accepted:
        got = f"{original!r}, which gives other numbers"
        raise RuntimeError(must("patch", str(replacement), rule, got))
