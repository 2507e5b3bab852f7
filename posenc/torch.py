"""Positional encodings for PyTorch on the CPU, with gradients and compilers.

`posenc.rope` and its like take tensors too; the functions here, with the same
arguments, also give derivatives.

- rotations: `rope`, `rope_qk`; the module `RotaryEmbedding`
- contextual positions (CoPE): `cope_attention`, `cope_bias`; the modules `CoPE` and
  `CoPEAttention`, with `KVCache`
- added tables: `add_sinusoidal`, `add_learned`; the modules `SinusoidalEmbedding` and
  `LearnedEmbedding`
- relative biases: `t5_bias`, `alibi_bias`, `kerple_bias`, `fire_bias`; the modules
  `T5Bias` and `ALiBi`

All work under ``torch.compile(fullgraph=True)``; a call of any but the biases is one
operator of the graph.
"""

# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import torch

from . import _torch_ops
from ._check import must, one_of, true_or_false, whole_number
from ._core import rope_arrays, rope_qk_arrays
from ._results import pair
from ._rope import rope as plain_rope
from ._rope import rope_qk as plain_rope_qk
from ._rope import rope_table
from ._rope_check import ANGLES, LAYOUTS
from ._scaling import rope_inv_freq
from ._torch_bias import ALiBi, T5Bias, alibi_bias, fire_bias, kerple_bias, t5_bias
from ._torch_check import (
    as_tensor,
    check_tensor,
    check_together,
    is_whole,
    refuse_out,
    wrong_dtype,
)
from ._torch_cope import CoPE, CoPEAttention, KVCache, cope_attention, cope_bias
from ._torch_ops import Rows, Turn
from ._torch_register import undisturbed
from ._torch_tables import (
    LearnedEmbedding,
    SinusoidalEmbedding,
    add_learned,
    add_sinusoidal,
)

__all__ = [
    "ALiBi",
    "CoPE",
    "CoPEAttention",
    "KVCache",
    "LearnedEmbedding",
    "RotaryEmbedding",
    "SinusoidalEmbedding",
    "T5Bias",
    "add_learned",
    "add_sinusoidal",
    "alibi_bias",
    "cope_attention",
    "cope_bias",
    "fire_bias",
    "kerple_bias",
    "rope",
    "rope_qk",
    "t5_bias",
]


def rope(
    x,
    cos,
    sin,
    *,
    layout="half",
    axis=-2,
    positions=None,
    offset=None,
    cu_seqlens=None,
    rotary_start=0,
    inverse=False,
    adjoint=False,
    rounding="once",
    out=None,
):
    """
    Rotate the channel pairs of queries or keys, differentiably.

    The numbers are those of `posenc.rope`, bit for bit. Gradients of x come from the
    same kernels; those of cos and sin, for learned frequencies, are computed when asked
    for. Under `torch.compile` the call is one operator.

    Parameters
    ----------
    x : torch.Tensor, shape (..., head_dim)
        Queries or keys on the CPU: float64, float32, bfloat16 or float16, in any memory
        layout.
    cos, sin : torch.Tensor or ndarray
        The table, as in `posenc.rope`.
    layout, axis, positions, offset, cu_seqlens : optional
        As in `posenc.rope`; positions, offset and cu_seqlens may be tensors.
    rotary_start, inverse, adjoint, rounding : optional
        As in `posenc.rope`.
    out : torch.Tensor, optional
        Where the result goes; it may be x itself. Without gradients only.

    Returns
    -------
    torch.Tensor, shape (..., head_dim)
        The rotated x, in the memory order of x; `out` if it was given.

    Raises
    ------
    TypeError
        If x is no tensor or neither on the CPU nor on meta, or `out` is given where
        gradients are needed; and as `posenc.rope` does.
    ValueError
        As `posenc.rope` does.

    See Also
    --------
    posenc.rope : The full description.
    rope_qk : Queries and keys in one call.
    RotaryEmbedding : A module that makes the tables.

    Notes
    -----
    The rotation is linear in x, so its gradient is the rotation back, rounded as the
    rotation itself. The gradient of a table is a sum of products, taken in float32 for
    16-bit tables. Derivatives of any order, ``torch.func`` and forward mode work.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 34. https://arxiv.org/abs/2104.09864

    Examples
    --------
    >>> import posenc, posenc.torch, torch
    >>> cos, sin = posenc.rope_table(range(3), posenc.rope_inv_freq(4)[0])
    >>> q = torch.ones(3, 4, requires_grad=True)
    >>> rotated = posenc.torch.rope(q, cos, sin)
    >>> rotated.square().sum().backward()  # of the squared norm: rotation keeps it
    >>> torch.allclose(q.grad, 2 * q)
    True
    """
    if (
        cu_seqlens is None
        and inverse is False
        and (offset is None or (positions is None and type(offset) is int))
        and type(positions) is not int
        and isinstance(x, torch.Tensor)
        and undisturbed()
    ):
        rows = positions if offset is None else offset
        result = rope_arrays(
            x, cos, sin, layout, axis, rows, adjoint, out, rounding, rotary_start
        )
        if result is not NotImplemented:
            return result
    turn = Turn(layout, axis, rotary_start, adjoint, rounding)
    rows = Rows(positions, offset, cu_seqlens)
    out = None if out is None else {"out": out}
    return _rotate("rope", {"x": x}, cos, sin, rows, turn, inverse, out)[0]


def rope_qk(
    q,
    k,
    cos,
    sin,
    *,
    layout="half",
    axis=-2,
    positions=None,
    offset=None,
    cu_seqlens=None,
    rotary_start=0,
    inverse=False,
    adjoint=False,
    rounding="once",
    out=None,
):
    """
    Rotate queries and keys in one call, differentiably.

    Parameters
    ----------
    q, k : torch.Tensor, shape (..., head_dim)
        Queries and keys, as x of `rope`; their head counts may differ.
    cos, sin : torch.Tensor or ndarray
        The table for both.
    layout, axis, positions, offset, cu_seqlens : optional
        As in `posenc.rope`.
    rotary_start, inverse, adjoint, rounding : optional
        As in `posenc.rope`.
    out : pair of torch.Tensor, optional
        Where the results go; ``out=(q, k)`` rotates in place. Without gradients only.

    Returns
    -------
    q, k : torch.Tensor
        The rotated queries and keys; those of `out` if it was given.

    Raises
    ------
    TypeError, ValueError
        As `rope` does; also if `out` is not a pair.

    See Also
    --------
    rope : One tensor; the full description.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 34. https://arxiv.org/abs/2104.09864

    Examples
    --------
    >>> import posenc, posenc.torch, torch
    >>> cos, sin = posenc.rope_table(range(5), posenc.rope_inv_freq(8)[0])
    >>> q = torch.ones(2, 5, 4, 8).transpose(1, 2)  # batch, heads, tokens, channels
    >>> k = torch.ones(2, 5, 1, 8).transpose(1, 2)
    >>> q, k = posenc.torch.rope_qk(q, k, cos, sin)
    >>> q.shape, k.shape
    (torch.Size([2, 4, 5, 8]), torch.Size([2, 1, 5, 8]))
    """
    if (
        cu_seqlens is None
        and inverse is False
        and (offset is None or (positions is None and type(offset) is int))
        and type(positions) is not int
        and isinstance(q, torch.Tensor)
        and isinstance(k, torch.Tensor)
        and undisturbed()
    ):
        rows = positions if offset is None else offset
        result = rope_qk_arrays(
            q,
            k,
            cos,
            sin,
            layout,
            axis,
            rows,
            adjoint,
            out,
            rounding,
            rotary_start,
        )
        if result is not NotImplemented:
            return result
    turn = Turn(layout, axis, rotary_start, adjoint, rounding)
    rows = Rows(positions, offset, cu_seqlens)
    if out is not None:
        out = dict(zip(("out[0]", "out[1]"), pair("rope_qk", out), strict=True))
    return _rotate("rope_qk", {"q": q, "k": k}, cos, sin, rows, turn, inverse, out)


def _rotate(function, xs, cos, sin, rows, turn, inverse, out):
    """Rotate what the shortest way did not take; return a tuple."""
    true_or_false(function, "inverse", inverse)
    true_or_false(function, "adjoint", turn.adjoint)
    if inverse and turn.adjoint:
        rule = "not be set together with adjoint"
        raise ValueError(must(function, "inverse", rule, True))
    cos, sin = as_tensor(function, "cos", cos), as_tensor(function, "sin", sin)
    for name, x in {**xs, "cos": cos, "sin": sin, **(out or {})}.items():
        check_tensor(function, name, x)
    rows = _row_tensors(function, rows)
    others = {"cos": cos, "sin": sin, **rows._asdict()}
    check_together(function, {**xs, **(out or {})}, others)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        _check_rows(xs.values(), cos, rows, turn)
    if inverse:
        cos, sin = _inverted(cos, sin)
    xs = tuple(xs.values())
    if out is None:
        return _torch_ops.rotate(xs, cos, sin, rows, turn)
    out = tuple(out.values())
    refuse_out(function, out, (*xs, cos, sin))
    _torch_ops.write(xs, cos, sin, rows, turn, out)
    return out


def _row_tensors(function, rows):
    """Return what chooses the rows of a table as tensors."""
    tensors = []
    for name, value in rows._asdict().items():
        if value is not None:
            value = as_tensor(function, name, value)
            if not is_whole(value):
                raise wrong_dtype(function, name, "be whole numbers", value)
        tensors.append(value)
    return Rows(*tensors)


def _check_rows(xs, cos, rows, turn):
    """Raise unless each token has a row: indexing in torch would not say it so well."""
    if rows == Rows() or not undisturbed():
        return
    rotate = plain_rope if len(xs) == 1 else plain_rope_qk
    pairs = [x.detach()[..., :2] for x in xs]  # one pair will do
    cos = cos.detach()[..., :1]
    rotate(*pairs, cos, cos, axis=turn.axis, **rows._asdict())


def _inverted(cos, sin):
    """Return the table whose rotations undo those of (cos, sin), with derivatives."""
    dtype = torch.promote_types(cos.dtype, sin.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    cos, sin = cos.double(), sin.double()
    # A power of two, which costs no bit: squares would leave the range of float64.
    largest = torch.maximum(cos.abs(), sin.abs()).detach()
    scale = largest / (2 * torch.frexp(largest).mantissa)
    cos, sin = cos / scale, sin / scale
    square = cos * cos + sin * sin
    return (cos / square / scale).to(dtype), (-sin / square / scale).to(dtype)


class RotaryEmbedding(torch.nn.Module):
    """
    Rotary position embedding of queries and keys, with the tables it needs.

    Its frequencies are float64 and no buffer: ``model.bfloat16()`` costs them no bit,
    and a state dict does not hold them. Tables are made on demand, in float32 or, for
    float64 queries, in float64; they stay for positions 0, 1, 2, ... So one module
    should serve all layers. 16-bit queries and keys are rounded once.

    Parameters
    ----------
    dim : int
        Number of rotated channels, even: all of head_dim, or its rotary part.
    theta : float, default 10000.0
        Base of the frequencies, as in `posenc.rope_inv_freq`.
    scaling : dict, optional
        A ``rope_parameters`` or ``rope_scaling`` dict of transformers, as in
        `posenc.rope_inv_freq`.
    seq_len : int, optional
        The length that a dynamic type of scaling is to assume.
    layout : {'half', 'interleaved'}, default 'half'
        How channels are paired.
    axis : int, default -2
        The sequence axis of queries and keys: -2 for (B, H, T, head_dim), 1 for
        (B, T, H, head_dim).
    rotary_start : int, default 0
        First rotated channel; negative counts from the end.
    angles : {'exact', 'float32'}, default 'exact'
        How tables are computed, as in `posenc.rope_table`.
    learned : bool, default False
        Make the frequencies a parameter, `inv_freq` in float32, which no change of the
        module's dtype rounds further. Its gradient is that of the exact cosines and
        sines.
    max_seq_len : int, default 2048
        Rows of the table to begin with; it grows when a longer sequence comes, but not
        for positions far beyond it, whose rows are computed each time.

    Attributes
    ----------
    inv_freq : torch.Tensor, shape (dim // 2,)
        Radians per token of each pair.
    attention_factor : float
        What cosines and sines are multiplied by.

    Raises
    ------
    TypeError
        If a parameter is of the wrong kind.
    ValueError
        As `posenc.rope_inv_freq` does, or for an unknown `layout` or `angles`.

    See Also
    --------
    rope_qk : The rotation.
    posenc.rope_inv_freq : The frequencies.
    posenc.rope_table : The tables.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 15 and 34. https://arxiv.org/abs/2104.09864

    Examples
    --------
    >>> import posenc.torch, torch
    >>> rotary = posenc.torch.RotaryEmbedding(64, theta=500000.0)
    >>> q, k = torch.randn(2, 8, 10, 64), torch.randn(2, 2, 10, 64)
    >>> q_rotated, k_rotated = rotary(q, k)
    >>> q_last, k_last = rotary(q[:, :, 9:], k[:, :, 9:], offset=9)  # a decode step
    >>> torch.equal(q_last, q_rotated[:, :, 9:])
    True
    """

    def __init__(
        self,
        dim,
        *,
        theta=10000.0,
        scaling=None,
        seq_len=None,
        layout="half",
        axis=-2,
        rotary_start=0,
        angles="exact",
        learned=False,
        max_seq_len=2048,
    ):
        super().__init__()
        here = "RotaryEmbedding"
        one_of(here, "layout", layout, LAYOUTS)
        one_of(here, "angles", angles, ANGLES)
        true_or_false(here, "learned", learned)
        for name, value in (("axis", axis), ("rotary_start", rotary_start)):
            if type(value) is not int:
                raise TypeError(must(here, name, "be a whole number", repr(value)))
        self.max_seq_len = whole_number(here, "max_seq_len", max_seq_len, 1)
        self.layout, self.axis, self.rotary_start = layout, axis, rotary_start
        self.angles, self.learned = angles, learned
        inv_freq, self.attention_factor = rope_inv_freq(
            dim,
            theta=theta,
            scaling=scaling,
            seq_len=seq_len,
            dtype=np.float64 if angles == "exact" else np.float32,
        )
        inv_freq = torch.from_numpy(inv_freq)
        self.inv_freq = torch.nn.Parameter(inv_freq.float()) if learned else inv_freq
        self._tables = {}

    def forward(self, q, k, *, positions=None, offset=None, cu_seqlens=None):
        """
        Rotate queries and keys by their positions.

        Parameters
        ----------
        q, k : torch.Tensor, shape (..., head_dim)
            Queries and keys, with the same number of tokens along `axis`.
        positions : torch.Tensor, shape (T,) or (B, T), optional
            Position of each token, of any sign, also fractional. Without it, tokens
            stand at 0, 1, 2, ...
        offset : int or torch.Tensor of int, shape (B,), optional
            Position of the first token, of each sequence: the length of the cache.
        cu_seqlens : torch.Tensor of int, shape (N + 1,), optional
            Boundaries of packed sequences, from 0 to T; each begins at position 0, or
            at its `offset`.

        Returns
        -------
        q, k : torch.Tensor
            The rotated queries and keys.

        Raises
        ------
        TypeError
            If q or k is no tensor, or positions, offset or cu_seqlens is of the wrong
            kind.
        ValueError
            If shapes do not fit each other or `dim`.
        """
        cos, sin = self._table(q, positions, offset, cu_seqlens)
        return rope_qk(
            q,
            k,
            cos,
            sin,
            layout=self.layout,
            axis=self.axis,
            rotary_start=self.rotary_start,
        )

    def extra_repr(self):
        """Return what `repr` shows between the brackets."""
        return (
            f"{2 * len(self.inv_freq)}, layout={self.layout!r}, "
            f"angles={self.angles!r}, learned={self.learned}"
        )

    def __getstate__(self):
        """Return what copies and pickles hold: tables are made again."""
        return self.__dict__ | {"_tables": {}}

    def _apply(self, fn, recurse=True):
        """Move the parameters; learned frequencies get no narrower type."""

        def keep_bits(tensor):
            moved = fn(tensor)
            if moved.dtype.itemsize < tensor.dtype.itemsize:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_bits, recurse)

    def _table(self, q, positions, offset, cu_seqlens):
        """Return cosines and sines for the tokens of q."""
        n_token = self._n_token(q)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        if positions is None:
            first = 0 if offset is None else offset
            if cu_seqlens is None and type(first) is int:
                if self._keeps_tables(dtype, first, n_token):
                    return self._kept_table(first, first + n_token, dtype)
                positions = torch.arange(first, first + n_token, device=q.device)
            else:
                positions = _positions(q, self.axis, n_token, offset, cu_seqlens)
        elif offset is not None or cu_seqlens is not None:
            rule = "be None if offset or cu_seqlens is given"
            raise ValueError(must("RotaryEmbedding", "positions", rule, "both"))
        positions = as_tensor("RotaryEmbedding", "positions", positions)
        if positions.ndim not in (1, 2) or positions.shape[-1] != n_token:
            rule = f"be of shape (T,) or (B, T) for {n_token} tokens"
            got = f"shape {tuple(positions.shape)}"
            raise ValueError(must("RotaryEmbedding", "positions", rule, got))
        return _torch_ops.table(
            positions, self.inv_freq, self.attention_factor, self.angles, dtype
        )

    def _n_token(self, q):
        """Return how many tokens q has, which must be wide enough."""
        if not isinstance(q, torch.Tensor):
            check_tensor("RotaryEmbedding", "q", q)
        if not -q.ndim <= self.axis < q.ndim or self.axis in (-1, q.ndim - 1):
            rule = f"name an axis of q, of shape {tuple(q.shape)}, but its last"
            raise ValueError(must("RotaryEmbedding", "axis", rule, self.axis))
        if 2 * len(self.inv_freq) > q.shape[-1]:
            rule, dim = f"be at most head_dim = {q.shape[-1]}", 2 * len(self.inv_freq)
            raise ValueError(must("RotaryEmbedding", "dim", rule, dim))
        return q.shape[self.axis]

    def _keeps_tables(self, dtype, first, n_token):
        """Tell whether the table that stays is to hold these rows: not if far off."""
        if self.learned or first < 0 or torch.compiler.is_compiling():
            return False
        n_row = len(self._tables.get(dtype, ((), ()))[0])
        return first + n_token <= max(self.max_seq_len, 2 * n_row, 4 * n_token)

    def _kept_table(self, first, last, dtype):
        """Return rows of the table that stays, as arrays: a slice costs less there."""
        cos, sin = self._tables.get(dtype, ((), ()))
        if len(cos) < last:
            n_row = max(last, 2 * len(cos), self.max_seq_len)
            cos, sin = self._tables[dtype] = rope_table(
                np.arange(n_row),
                self.inv_freq.numpy(),
                attention_factor=self.attention_factor,
                angles=self.angles,
                dtype=dtype,
            )
        return cos[first:last], sin[first:last]


def _positions(q, axis, n_token, offset, cu_seqlens):
    """Return the position of each token, (T,) or (B, T)."""
    here = "RotaryEmbedding"
    rows = _row_tensors(here, Rows(offset=offset, cu_seqlens=cu_seqlens))
    if rows.cu_seqlens is not None:
        if rows.cu_seqlens.ndim != 1:
            got = f"shape {tuple(rows.cu_seqlens.shape)}"
            raise ValueError(must(here, "cu_seqlens", "be of shape (N + 1,)", got))
        if not torch.compiler.is_compiling():
            _check_ends(here, rows.cu_seqlens.tolist(), n_token)
    if rows.offset is not None and rows.offset.ndim:
        _check_offsets(here, rows, q, axis)
    return rows.numbers(n_token)


def _check_offsets(function, rows, q, axis):
    """Raise unless there is an offset for each sequence."""
    shape = tuple(rows.offset.shape)
    if rows.cu_seqlens is not None:
        fits = shape == (len(rows.cu_seqlens) - 1,)
        rule = f"be a whole number or of shape ({len(rows.cu_seqlens) - 1},)"
    else:
        fits = shape in ((1,), (q.shape[0],)) and axis not in (0, -q.ndim)
        rule = f"be a whole number or of shape (B,), for q of shape {tuple(q.shape)}"
    if not fits:
        raise ValueError(must(function, "offset", rule, f"shape {shape}"))


def _check_ends(function, ends, n_token):
    """Raise unless these are the boundaries of sequences that make up all tokens."""
    if [0, n_token] != [*ends[:1], *ends[-1:]] or ends != sorted(ends):
        rule = f"rise from 0 to {n_token}, the number of tokens"
        raise ValueError(must(function, "cu_seqlens", rule, ends))
