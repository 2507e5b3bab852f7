"""Attention with contextual positions (CoPE), in memory that grows with the length.

The doors of `_core` take operands of one type and one form: heads grouped by the keys
that they share, batch axes merged. Here they are checked and seen in that form.
"""

# SPDX-License-Identifier: BSD-3-Clause
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from . import _core
from . import _tensors as tensors
from ._check import as_array, must, out_array, real_number, true_or_false
from ._cope import as_mask
from ._results import aligned, real_kind, widest


def cope_attention(
    q,
    k,
    v,
    position_embedding,
    *,
    scale=None,
    causal=True,
    mask=None,
    position_scale=1.0,
    gate_key=None,
    out=None,
):
    """
    Attend with contextual positions: every query counts the keys that matter to it.

    A gate tells of each key whether the query counts it; the position of a key is the
    sum of the gates from there to the last key that may be seen, and the embedding of
    that position is added to the logit. All in one pass, without an array of shape
    (T, S). This is CoPE of Golovneva et al. [1]_, neither "clipped RoPE" nor a complex
    positional encoding.

    Parameters
    ----------
    q : array_like or torch.Tensor, shape (..., H, T, D)
        Queries of H heads, float16, bfloat16 (of ml_dtypes, in NumPy), float32 or
        float64, in any memory layout; integers count as float64. A tensor is a plain
        one on the CPU that needs no gradient.
    k, v : array_like or torch.Tensor, shape (..., G, S, D)
        Keys and values of G heads, where G divides H: query head h attends to head
        ``h // (H // G)``. Without a head axis, as (T, D) and (S, D), there is one head.
        Batch axes are broadcast.
    position_embedding : array_like or torch.Tensor, shape (D, P) or (H, D, P)
        Embeddings of the positions 0 to P - 1, shared by the heads, also as (1, D, P),
        or one for each. Positions from P - 1 on are P - 1.
    scale : float, optional
        What the products of queries with keys are multiplied by, in logits and in
        gates; default ``D ** -0.5``.
    causal : bool, default True
        Query i sees the keys up to ``i + S - T``: the last query sees all, as with a
        cache of keys. With False the count still runs from the last key leftwards.
    mask : array_like of bool, broadcast to (..., H, T, S), optional
        True where a key may be seen, as in PyTorch; what may not be seen is not counted
        either. Padding of keys is of shape (B, 1, 1, S).
    position_scale : float, default 1.0
        What the products of queries with position embeddings are multiplied by.
    gate_key : array_like or torch.Tensor, shape (..., G, S, D), optional
        Keys that only the gates use; default k.
    out : ndarray or torch.Tensor, shape (..., H, T, D), optional
        Where the result goes: of the kind of q and of the result's dtype. It may
        overlap an operand.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., H, T, D)
        The attended values, of the kind of q and, where shapes agree, in its memory
        order, in the common dtype of q, k and v; `out` if it was given. A wider
        embedding or gate key only makes the computation wider. Queries that see no key
        get zeros.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient
        (`posenc.torch.cope_attention` gives it) or is no plain CPU tensor.
    ValueError
        If shapes do not fit or a scale is not finite. Nothing has been written.

    See Also
    --------
    cope_bias : The positional logits alone.
    posenc.torch.cope_attention : The same with gradients.
    posenc.ufunc.cope_attention : The plain case as a gufunc, for dask arrays too.

    Notes
    -----
    For query i and the visible keys j, with ``z = position_scale * q_i @ e``::

        logit_j = scale * q_i . k_j
        gate_j  = sigmoid(scale * q_i . gate_key_j)
        p_j     = min(sum of gate_t for t >= j, P - 1)
        a_j     = logit_j + (1 - w) * z[floor(p_j)] + w * z[floor(p_j) + 1]
        out_i   = sum of softmax(a)_j * v_j

    where w is the fractional part of p_j. The defaults are the paper's listing and
    ``--cope-nodiv`` of its code; that code's own default divides both terms, which is
    ``position_scale=D ** -0.5``. Its ``--cope-sep-key`` is `gate_key` from a projection
    of its own, its ``--cope-val-gates`` is ``gate_key=v``.

    16-bit data are computed in float32 and rounded once. The same call gives the same
    bits for any number of threads. NaN or infinity in a query stays in its row; in a
    key or value, in the rows that see that key. PyTorch counts the keys that a causal
    query sees from the other end if T and S differ.

    References
    ----------
    .. [1] Golovneva et al., "Contextual Position Encoding: Learning to Count What's
       Important", 2024, eq. 3 to 6. https://arxiv.org/abs/2405.18719

    Examples
    --------
    >>> import numpy as np, posenc
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 10, 64), np.float32)  # batch, heads, tokens, D
    >>> k, v = rng.standard_normal((2, 2, 2, 10, 64), np.float32)  # heads in two groups
    >>> embedding = 0.1 * rng.standard_normal((64, 6), np.float32)
    >>> out = posenc.cope_attention(q, k, v, embedding)
    >>> out.shape
    (2, 8, 10, 64)

    The last token again, as in decoding, from the same keys and values:

    >>> last = posenc.cope_attention(q[:, :, 9:], k, v, embedding)
    >>> np.allclose(last, out[:, :, 9:], atol=1e-6)
    True

    Four keys that all count one half, and a query that looks for position 1: it finds
    the last key but one.

    >>> values, embedding = [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 0, 0], [0, 20, 0]]
    >>> posenc.cope_attention([[0, 1]], np.zeros((4, 2)), values, embedding).round(3)
    array([[4., 5.]])
    """
    operands = {"q": q, "k": k, "v": v, "position_embedding": position_embedding}
    if gate_key is not None:
        operands["gate_key"] = gate_key
    attention = prepare(operands, mask, scale, position_scale, causal)
    answer, result = attention.result(q, out)
    tensors.mark_changed(out)
    attention.run(result)
    return answer


# --- shapes --------------------------------------------------------------------------


class Sizes(NamedTuple):
    """The shapes of a call: batch axes, and the sizes after them."""

    batch: tuple
    n_head: int
    n_group: int
    n_query: int
    n_key: int
    dim: int
    n_position: int
    has_heads: bool

    def merged(self):
        """Return how many elements the batch has."""
        return math.prod(self.batch)

    def groups(self):
        """Return how many heads of keys there are, and how many queries share each."""
        return self.n_group, self.n_head // self.n_group if self.n_group else 1

    def rows(self, *last):
        """Return the shape of what there is for each query."""
        heads = (self.n_head,) if self.has_heads else ()
        return (*self.batch, *heads, self.n_query, *last)


def sizes_of(shapes, mask=None, function="cope_attention"):
    """Return the sizes of a call, given the shapes of its operands; check them."""
    q, k, embedding = shapes["q"], shapes["k"], shapes["position_embedding"]
    for name, shape in shapes.items():
        if len(shape) < 2:
            rule = "have at least two axes"
            raise ValueError(must(function, name, rule, f"shape {tuple(shape)}"))
    if q[-1] == 0:
        rule = "have at least one channel"
        raise ValueError(must(function, "q", rule, f"shape {tuple(q)}"))
    n_head, n_group = (_n_head(shape) for shape in (q, k))
    _check_keys(function, shapes, n_head)
    forms = (q[-1],), (1, q[-1]), (n_head, q[-1])
    if embedding[-1] == 0 or tuple(embedding[:-1]) not in forms:
        rule = f"be of shape (D, P) or (H, D, P) for H = {n_head}, D = {q[-1]}, P > 0"
        got = f"shape {tuple(embedding)}"
        raise ValueError(must(function, "position_embedding", rule, got))
    sizes = Sizes(
        _batch(function, shapes),
        n_head,
        n_group,
        q[-2],
        k[-2],
        q[-1],
        embedding[-1],
        any(len(shapes[name]) > 2 for name in _WITH_TOKENS if name in shapes),
    )
    if mask is not None:
        _check_mask(function, mask, sizes.rows(sizes.n_key))
    return sizes


# Dtypes that have a kernel; others are read as one of these.
_FLOATS = tuple(map(np.dtype, (np.float32, np.float64, np.float16, bfloat16)))
_WITH_TOKENS = ("q", "k", "v", "gate_key")


def _n_head(shape):
    return shape[-3] if len(shape) > 2 else 1


def _check_keys(function, shapes, n_head):
    """Raise unless keys fit the queries, and values and gate keys the keys."""
    q, k = shapes["q"], shapes["k"]
    if k[-1] != q[-1]:
        rule = f"have the head_dim of q, {q[-1]}"
        raise ValueError(must(function, "k", rule, f"shape {tuple(k)}"))
    n_group = _n_head(k)
    if n_head % n_group if n_group else n_head:
        rule = f"have a number of heads that divides that of q, {n_head}"
        raise ValueError(must(function, "k", rule, n_group))
    form = (n_group, *k[-2:])
    for name in ("v", "gate_key"):
        if name in shapes:
            shape = shapes[name]
            if (_n_head(shape), *shape[-2:]) != form:
                rule = f"have heads, keys and channels as k, {form}"
                raise ValueError(must(function, name, rule, f"shape {tuple(shape)}"))


def _batch(function, shapes):
    """Return the batch axes that all operands with tokens are broadcast to."""
    batch = tuple(shapes["q"][:-3])
    for name in _WITH_TOKENS[1:]:
        own = tuple(shapes[name][:-3]) if name in shapes else batch
        if own != batch:
            n_axis = max(len(own), len(batch))
            a, b = ((1,) * (n_axis - len(axes)) + axes for axes in (own, batch))
            pairs = list(zip(a, b, strict=True))
            if any(m != n and m != 1 and n != 1 for m, n in pairs):
                rule = f"have batch axes that broadcast with {batch}"
                got = f"shape {tuple(shapes[name])}"
                raise ValueError(must(function, name, rule, got))
            batch = tuple(n if m == 1 else m for m, n in pairs)
    return batch


def _check_mask(function, mask, full):
    """Raise unless a mask of this shape is broadcast to the full one."""
    pairs = zip(reversed(mask), reversed(full), strict=False)
    if len(mask) > len(full) or any(a not in (1, b) for a, b in pairs):
        rule = f"broadcast to {tuple(full)}"
        raise ValueError(must(function, "mask", rule, f"shape {tuple(mask)}"))


# --- operands ------------------------------------------------------------------------


@np.errstate(all="ignore")
def prepare(operands, mask, scale, position_scale, causal, function="cope_attention"):
    """Check a call, given its operands by name; return what is to be done."""
    given = {name: _real(function, name, x) for name, x in operands.items()}
    if mask is not None:
        mask = _plain(function, "mask", as_mask(function, mask))
    shapes = {name: x.shape for name, x in given.items()}
    sizes = sizes_of(shapes, None if mask is None else mask.shape, function)
    if scale is None:
        scale = sizes.dim**-0.5
    scale = real_number(function, "scale", scale)
    position_scale = real_number(function, "position_scale", position_scale)
    true_or_false(function, "causal", causal)
    dtype, kind = _dtypes(given)
    arrays = {name: _form(name, aligned(x, kind), sizes) for name, x in given.items()}
    if mask is not None:
        mask = _mask_form(mask, sizes)
    return Attention(
        arrays, mask, scale, position_scale, bool(causal), sizes, shapes, dtype, kind
    )


def _real(function, name, value):
    """Return an operand as a plain array of numbers that have a kernel."""
    array = _plain(function, name, as_array(function, name, value))
    if array.dtype not in _FLOATS:
        real_kind(function, name, array.dtype)
    return array


def _plain(function, name, array):
    """Return an array of NumPy's own type; raise if it is another library's."""
    if not isinstance(array, np.ndarray):
        rule = "be a NumPy array, a CPU tensor or a list"
        raise TypeError(must(function, name, rule, type(array).__name__))
    return array if type(array) is np.ndarray else np.asarray(array)


def _dtypes(given):
    """Return the dtype of the result, and that to compute it with."""
    q, *others = (x.dtype for x in given.values())
    if q in _FLOATS and all(dtype is q for dtype in others):
        return q, q
    dtype = widest(*(given[name].dtype for name in ("q", "k", "v")))
    return dtype, widest(dtype, q, *others)


def _form(name, array, sizes):
    """Return an operand in the form of the doors, a view where strides allow."""
    if name == "position_embedding":
        shape = sizes.n_head, sizes.dim, sizes.n_position
        return _broadcast(array, shape).reshape(sizes.groups() + shape[1:])
    n_head = sizes.n_head if name == "q" else sizes.n_group
    array = _broadcast(array, (*sizes.batch, n_head, *array.shape[-2:]))
    heads = sizes.groups() if name == "q" else (n_head,)
    return array.reshape(sizes.merged(), *heads, *array.shape[-2:])


def _broadcast(array, shape):
    return array if array.shape == shape else np.broadcast_to(array, shape)


def _mask_form(mask, sizes):
    """Return a mask in the form of the doors; only batch axes may cost a copy."""
    full = sizes.rows(sizes.n_key)
    mask = mask.reshape((1,) * (len(full) - mask.ndim) + mask.shape)
    if not sizes.has_heads:
        mask = mask[..., None, :, :]
    tail = sizes.n_head, sizes.n_query, sizes.n_key
    mask = np.broadcast_to(mask, (*sizes.batch, *mask.shape[-3:]))
    mask = np.broadcast_to(
        mask.reshape(sizes.merged(), *mask.shape[-3:]), (sizes.merged(), *tail)
    )
    return mask.reshape(sizes.merged(), *sizes.groups(), *tail[1:])


def sum_to(array, shape):
    """Return an array summed over the axes along which an operand was broadcast."""
    shape = (1,) * (array.ndim - len(shape)) + tuple(shape)
    pairs = zip(array.shape, shape, strict=True)
    axes = tuple(axis for axis, (n, own) in enumerate(pairs) if n != own)
    if not axes:
        return array
    return array.sum(axes, np.float64, keepdims=True).astype(array.dtype)


@dataclass(frozen=True)
class Attention:
    """A checked call, which is not to fail any more."""

    arrays: dict  # operands in the form of the doors
    mask: np.ndarray | None
    scale: float
    position_scale: float
    causal: bool
    sizes: Sizes
    shapes: dict  # of the operands as they were given
    dtype: np.dtype  # of the result
    kind: np.dtype  # to compute with

    def real(self):
        """Return the type of sums, statistics and gradients."""
        return np.dtype(np.float64 if self.kind == np.float64 else np.float32)

    def result(self, q, out):
        """Return what the user gets, new or `out`, and the array of its memory."""
        shape, is_tensor = self.sizes.rows(self.sizes.dim), tensors.is_tensor(q)
        if out is not None:
            here = "cope_attention"
            return out, out_array(here, out, shape, self.dtype, "out", is_tensor)
        if is_tensor:
            if shape == tuple(q.shape):
                out = tensors.empty_like(q, self.dtype)
            else:
                out = tensors.empty(shape, self.dtype)
            return out, tensors.as_numpy(out)
        if isinstance(q, np.ndarray) and q.shape == shape:
            out = np.empty_like(q, dtype=self.dtype, subok=False)
        else:
            out = np.empty(shape, self.dtype)
        return out, out

    @np.errstate(all="ignore")
    def run(self, out, statistics=None):
        """Attend, into an array of the result's type, overlapping or not."""
        form = self._rows_form()
        target = self._writable_form(out, form)
        result = np.empty(form, self.kind) if target is None else target
        if statistics is not None:
            statistics = statistics.reshape(*form[:-1], 2, copy=False)
        _core.cope_attention_arrays(*self._given(), result, statistics)
        if target is None:
            out[...] = result.reshape(out.shape)

    @np.errstate(all="ignore")
    def gradients(self, out, statistics, grad):
        """Return the gradients of the operands by name, of real type.

        What was broadcast, and the parts of the doors, is summed in a fixed order.
        """
        sizes, real, form = self.sizes, self.real(), self._rows_form()
        out, grad = (aligned(x, self.kind).reshape(form) for x in (out, grad))
        statistics = statistics.reshape(*form[:-1], 2)
        n, g, r, t, d = form
        n_chunk = _core.cope_attention_chunks(n * g, r * t)
        has_gate = "gate_key" in self.arrays
        keys = (n_chunk, n, g, sizes.n_key, d)
        dq = np.zeros(form, real)
        dk, dv = np.zeros(keys, real), np.zeros(keys, real)
        dgate = np.zeros(keys, real) if has_gate else None
        de = np.zeros((n_chunk, n, g, r, d, sizes.n_position), real)
        _core.cope_attention_backward_arrays(
            *self._given(), out, statistics, grad, dq, dk, dv, dgate, de
        )
        whole = {"q": dq, "k": _over_chunks(dk), "v": _over_chunks(dv)}
        if has_gate:
            whole["gate_key"] = _over_chunks(dgate)
        whole["position_embedding"] = de.reshape(n_chunk * n, *de.shape[2:])
        return {name: self._of_operand(name, whole[name]) for name in self.arrays}

    def _of_operand(self, name, gradient):
        """Return a gradient in the shape of the operand as it was given."""
        sizes, shape = self.sizes, self.shapes[name]
        if name == "position_embedding":
            heads = sizes.n_head, sizes.dim, sizes.n_position
            n_part = gradient.shape[0]
            return sum_to(gradient.reshape(n_part, *heads), shape).reshape(shape)
        n_head = sizes.n_head if name == "q" else sizes.n_group
        full = (*sizes.batch, n_head, *gradient.shape[-2:])
        return sum_to(gradient.reshape(full), shape).reshape(shape)

    def _given(self):
        """Return what both doors take first."""
        a = self.arrays
        return (
            a["q"],
            a["k"],
            a["v"],
            a.get("gate_key"),
            a["position_embedding"],
            self.mask,
            self.scale,
            self.position_scale,
            self.causal,
        )

    def _rows_form(self):
        """Return the shape of queries and results in the form of the doors."""
        sizes = self.sizes
        return (sizes.merged(), *sizes.groups(), sizes.n_query, sizes.dim)

    def _writable_form(self, out, form):
        """Return `out` in the form of the doors if they may write there, else None."""
        if out.dtype != self.kind or not out.flags.aligned:
            return None
        read = [x for x in (*self.arrays.values(), self.mask) if x is not None]
        if any(np.may_share_memory(out, x) for x in read):
            return None
        try:
            return out.reshape(form, copy=False)
        except ValueError:
            return None


def _over_chunks(parts):
    """Return the sum over the first axis, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total
