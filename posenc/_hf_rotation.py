"""Stand in for transformers' ``apply_rotary_pos_emb``, bit for bit.

Knows torch tensors and when they may be read as arrays; knows neither models nor
configs.  torch is imported inside functions only.
"""

# SPDX-License-Identifier: BSD-3-Clause

import functools
import threading
from collections import Counter

from ._check import must

GRADIENTS = "gradients are on: call the model under torch.no_grad()"
TRACING = "traced by torch.compile or torch.export (counted once per trace)"


class Tally:
    """Who did the work and why: (work, None) is posenc, (work, reason) is not."""

    def __init__(self):
        self._counts = Counter()
        self._lock = threading.Lock()

    def add(self, work, reason=None):
        with self._lock:
            self._counts[work, reason] += 1

    def copy(self):
        with self._lock:
            return self._counts.copy()


tally = Tally()


class Replacement:
    """An attribute of a module or class that is ours while anybody wants it.

    Not save-and-restore: the first to come installs, the last to leave restores, so
    patches may be undone in any order.
    """

    def __init__(self, owner, name, make):
        self.owner, self.name, self.n_user = owner, name, 0
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

    def acquire(self):
        if self.n_user == 0:
            setattr(self.owner, self.name, self.function)
        self.n_user += 1

    def release(self):
        """Give up one use; return why the original could not come back, or None."""
        self.n_user -= 1
        if self.n_user:
            return None
        if getattr(self.owner, self.name) is not self.function:
            return f"{self}: somebody else replaced it after the patch, theirs stays"
        setattr(self.owner, self.name, self.original)
        return None


def make_dispatcher(replacement, layout):
    """Make the function that stands in for ``replacement.original``.

    Without users it only passes calls on: somebody may still hold it.
    """
    import torch

    original = replacement.original
    rotate, obstacle = make_rotation(layout), _make_obstacle()
    traced = make_trace_mark("rotation")

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if torch.compiler.is_compiling():
            traced()
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        if not replacement.n_user:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        reason = obstacle(q, k, cos, sin, unsqueeze_dim)
        if reason is None:
            result = rotate(q, k, cos, sin, unsqueeze_dim)
            if result is not None:
                tally.add("rotation")
                return result
            reason = "the halves of cos or sin differ"
        tally.add("rotation", reason)
        return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return apply_rotary_pos_emb


def make_trace_mark(work):
    """Make a function that counts a trace and leaves nothing in the traced graph."""
    import torch

    @torch.compiler.assume_constant_result
    def traced():
        tally.add(work, TRACING)
        return True

    return traced


def make_rotation(layout):
    """Make ``rotate(q, k, cos, sin, unsqueeze_dim)``; None from it: tables unfit."""
    import torch

    from . import rope_qk

    def empty(x):
        # Downstream must see the strides of eager's result: the order of x's axes, but
        # C order where that is as good, as with one head or one token.
        if x.shape[1] == 1 or x.shape[2] == 1 or x.is_contiguous():
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        return torch.empty_like(x)

    def rotate(q, k, cos, sin, unsqueeze_dim):
        cos_array, sin_array = cos.numpy(), sin.numpy()
        if not (_halves_agree(cos_array) and _halves_agree(sin_array)):
            return None
        n_pair = cos_array.shape[-1] // 2
        out = empty(q), empty(k)
        rope_qk(
            q.numpy(),
            k.numpy(),
            cos_array[..., :n_pair],
            sin_array[..., :n_pair],
            layout=layout,
            axis=-2 if unsqueeze_dim == 1 else -3,
            out=(out[0].numpy(), out[1].numpy()),
        )
        return out

    return rotate


def _halves_agree(table):
    """Say whether both halves hold the same bits.

    Asked in every call, though all layers share one table: a write through ``.data`` or
    a NumPy view leaves no trace, and looking costs a microsecond for one token.
    """
    n_pair = table.shape[-1] // 2
    return table[..., :n_pair].tobytes() == table[..., n_pair:].tobytes()


def _make_obstacle():
    """Make the function that says why the original must run, or None."""
    import torch

    tensor_obstacle = make_tensor_obstacle()
    fast_dtypes = torch.float32, torch.float64

    def obstacle(q, k, cos, sin, unsqueeze_dim):
        reason = tensor_obstacle((q, k, cos, sin))
        if reason is not None:
            return reason
        dtype = q.dtype
        if k.dtype != dtype or cos.dtype != dtype or sin.dtype != dtype:
            return "q, k, cos and sin are of different types (autocast)"
        if dtype not in fast_dtypes:
            return f"{dtype}: only float32 and float64 are served"
        if torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or cos.requires_grad or sin.requires_grad
        ):
            return GRADIENTS
        if not _shapes_fit(q.shape, k.shape, cos.shape, sin.shape, unsqueeze_dim):
            return "shapes or unsqueeze_dim that posenc does not know"
        if not (_order_fits(q) and _order_fits(k)):
            return "a memory order other than that of attention"
        return None

    return obstacle


def _shapes_fit(q, k, cos, sin, unsqueeze_dim):
    """Say whether q and k are (B, H, S, D) or (B, S, H, D), and cos (B or 1, S, D)."""
    if not (len(q) == len(k) == 4 and len(cos) == 3 and cos == sin):
        return False
    if type(unsqueeze_dim) is not int or unsqueeze_dim not in (1, 2):
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


def _order_fits(x):
    """Say whether channels are innermost and the batch is outermost in memory."""
    batch, heads, tokens, channels = x.stride()
    return channels == 1 and (x.shape[0] == 1 or (batch >= heads and batch >= tokens))


def make_tensor_obstacle():
    """Make the function that says why NumPy may not read these tensors, or None."""
    import torch
    from torch.autograd import forward_ad

    plain = torch.Tensor, torch.nn.Parameter
    dispatch_modes = torch._C._len_torch_dispatch_stack
    function_modes = torch._C._len_torch_function_stack
    transform = torch._C._functorch.peek_interpreter_stack

    def obstacle(tensors):
        for tensor in tensors:
            if type(tensor) not in plain:
                return f"a {type(tensor).__name__} instead of a plain tensor"
        if torch.jit.is_tracing():
            return "traced by torch.jit"
        if dispatch_modes() or function_modes() or transform() is not None:
            return "a torch mode or function transform is active"
        if forward_ad._current_level >= 0:
            return "forward-mode derivatives are on"
        for tensor in tensors:
            if not tensor.is_cpu:
                return f"device {tensor.device.type}"
            if tensor.layout is not torch.strided or tensor.is_neg():
                return "a sparse or lazily negated tensor"
        return None

    return obstacle


def probe(replacement, layout):
    """Accept the original only if our kernel gives its bits on small random cases."""
    import torch

    rotate, original = make_rotation(layout), replacement.original
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
        ours = rotate(*case, unsqueeze_dim) * (len(theirs) // 2)
        return all(map(torch.equal, theirs, ours))

    rule = f"rotate like posenc's layout {layout!r}"
    try:
        with torch.no_grad():
            accepted = all(
                agree(dtype, batch, unsqueeze_dim)
                for dtype in (torch.float32, torch.float64)
                for batch in (1, 2)
                for unsqueeze_dim in (1, 2)
            )
    except Exception as error:
        got = f"{original!r}, which raises {type(error).__name__}: {error}"
        raise RuntimeError(must("patch", str(replacement), rule, got)) from error
    if not accepted:
        got = f"{original!r}, which gives other numbers"
        raise RuntimeError(must("patch", str(replacement), rule, got))
