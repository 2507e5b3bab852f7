"""Rotary position embedding: tables of angles, and the rotation by them."""

# SPDX-License-Identifier: BSD-3-Clause
import contextlib

import numpy as np

from . import _tensors as tensors
from ._check import as_array, must, one_of, real_array, real_dtype, whole_number
from ._core import rope_arrays, rope_complex_arrays, rope_qk_arrays
from ._results import pair, table_pair, table_result
from ._rope_check import COMPLEX, LAYOUTS, Call, fill_table
from ._rope_rows import rows_for


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
    Rotate the channel pairs of queries or keys by the angles of a table.

    The ``2 * M`` channels from `rotary_start` on are rotated, M being the width of the
    table; the others are copied (partial rotary). Float32 and float64 results are two
    products and one sum, each rounded, as PyTorch computes them; 16-bit data are
    computed in float32.

    Parameters
    ----------
    x : array_like or torch.Tensor, shape (..., head_dim)
        Queries or keys, float16, bfloat16 (of ml_dtypes, in NumPy), float32 or
        float64, in any memory layout; integers count as float64. A tensor is a
        plain one on the CPU that needs no gradient.
    cos, sin : array_like or torch.Tensor, shape (T, M), (B, T, M) or axes as x
        Cosines and sines of the angles, ``2 * M <= head_dim``, from `rope_table`.
        T is the size of x along `axis`, B that of its first axis or 1. A table
        with as many axes as x is broadcast against it.
    layout : {'half', 'interleaved'}, default 'half'
        How channels are paired. ``'half'`` pairs ``(i, i + M)``, as GPT-NeoX and
        the Llama of transformers do; ``'interleaved'`` pairs ``(2*i, 2*i + 1)``, as
        GPT-J, Cohere and Meta's own Llama do.
    axis : int, default -2
        The sequence axis of x: -2 for (B, H, T, head_dim), 1 for
        (B, T, H, head_dim).
    positions : array_like of int, shape (T,) or (B, T), optional
        Row of the table to use for each token; the table is then (P, M), and each
        position lies in [0, P).
    offset : int or array_like of int, shape (B,), optional
        Token t uses row ``offset + t`` of a (P, M) table: the number of tokens that
        came before, as in a cache of keys, for all sequences or for each.
    cu_seqlens : array_like of int, shape (N + 1,), optional
        N sequences of different lengths lie packed along `axis`, sequence i from
        ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``, as flash-attention has it: each
        begins with row 0 of a (P, M) table, or with row `offset`, which may then
        have shape (N,).
    rotary_start : int, default 0
        The first rotated channel; negative numbers count from the end, so that
        ``-2 * M`` rotates the last ones.
    inverse : bool, default False
        Undo the rotation: multiply by the inverse of the table's matrices, so
        that an attention factor is divided out again.
    adjoint : bool, default False
        Apply the transpose, which is the gradient: rotate backwards, an attention
        factor stays in.
    rounding : {'once', 'eager'}, default 'once'
        How 16-bit results are rounded. ``'once'`` rounds the float32 result;
        ``'eager'`` rounds each product and then the sum, as PyTorch and so
        transformers do, given tables of x's type.
    out : ndarray or torch.Tensor, shape (..., head_dim), optional
        Where the result goes: of x's kind and of the result's dtype. It may be x
        itself; any other overlap is handled.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., head_dim)
        The rotated x, of x's kind and in x's memory order; `out` if it was given.
        A 16-bit x keeps its dtype unless the table is float64; else the result has
        the common dtype of x, cos and sin. Array subclasses (but masked arrays) and
        dask arrays go through the gufuncs and keep their type.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient
        (`posenc.torch.rope` gives it) or is no plain CPU tensor.
    ValueError
        If shapes do not fit, a token would use a row outside the table, `layout` or
        `rounding` is unknown, `positions` is given together with `offset` or
        `cu_seqlens`, or both `inverse` and `adjoint` are set. Nothing has been
        written.

    See Also
    --------
    rope_qk : Queries and keys in one call.
    rope_table : Make the table.
    rope_complex : The same with a complex table.

    Notes
    -----
    For a pair (a, b) and its angle: ``a' = a cos - b sin``, ``b' = b cos + a sin``.
    NaN results are one quiet NaN. The inverse is computed as a rotation by
    (cos, -sin) / (cos**2 + sin**2), rounded to the table's dtype, at least float32.
    Torch does not see what is done to its tensors here, so a traced graph holds the
    result as a constant, where that of ``posenc.torch.rope`` holds an operator; and
    ``resize_`` cannot make a new result larger.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 34. https://arxiv.org/abs/2104.09864

    Examples
    --------
    A quarter turn sends (1, 0) to (0, 1):

    >>> import posenc
    >>> posenc.rope([[1.0, 0.0]], cos=[[0.0]], sin=[[1.0]])
    array([[0., 1.]])

    16-bit data keep their type; the table may stay in float32:

    >>> import ml_dtypes, numpy as np
    >>> cos, sin = posenc.rope_table(range(8), posenc.rope_inv_freq(4)[0])
    >>> x = np.ones((3, 4), ml_dtypes.bfloat16)
    >>> posenc.rope(x, cos[:3], sin[:3])[1]
    array([-0.300781, 0.988281, 1.38281, 1.00781], dtype=bfloat16)

    The next token of a sequence whose first two are in the cache:

    >>> bool((posenc.rope(x[2:], cos, sin, offset=2) == posenc.rope(x, cos[:3],
    ...       sin[:3])[2:]).all())
    True

    Two packed sequences, of 1 and 2 tokens:

    >>> packed = posenc.rope(x, cos, sin, cu_seqlens=[0, 1, 3])
    >>> bool((packed == posenc.rope(x, cos, sin, positions=[0, 0, 1])).all())
    True
    """
    if inverse is False and (positions is None or type(positions) is not int):
        rows = positions
        if offset is not None or cu_seqlens is not None:
            rows = rows_for((x,), axis, positions, offset, cu_seqlens)
        result = rope_arrays(
            x, cos, sin, layout, axis, rows, adjoint, out, rounding, rotary_start
        )
        if result is not NotImplemented:
            return result
    call = Call("rope", layout, axis, positions, offset, cu_seqlens, rotary_start,
                inverse, adjoint, rounding)  # fmt: skip
    return call.rotate({"x": x}, {"cos": cos, "sin": sin}, [out])[0]


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
    Rotate queries and keys in one call; their head counts may differ.

    Parameters
    ----------
    q, k : array_like or torch.Tensor, shape (..., head_dim)
        Queries and keys, as x of `rope`; grouped-query attention has fewer keys.
    cos, sin : array_like or torch.Tensor
        The table for both, as in `rope`.
    layout, axis, positions, offset, cu_seqlens, rotary_start : optional
        As in `rope`.
    inverse, adjoint, rounding : optional
        As in `rope`.
    out : pair of ndarray or torch.Tensor, optional
        Where the two results go; ``out=(q, k)`` rotates in place.

    Returns
    -------
    q, k : ndarray or torch.Tensor
        The rotated queries and keys; those of `out` if it was given.

    Raises
    ------
    TypeError, ValueError
        As `rope` does; also if `out` is not a pair, or its arrays overlap each
        other. Nothing has been written.

    See Also
    --------
    rope : One array; the full description.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 34. https://arxiv.org/abs/2104.09864

    Examples
    --------
    >>> import numpy as np, posenc
    >>> cos, sin = posenc.rope_table(range(5), posenc.rope_inv_freq(8)[0])
    >>> q = np.ones((2, 4, 5, 8), np.float32)  # batch, heads, tokens, channels
    >>> k = np.ones((2, 1, 5, 8), np.float32)
    >>> q, k = posenc.rope_qk(q, k, cos, sin, out=(q, k))
    >>> k.shape
    (2, 1, 5, 8)
    """
    if inverse is False and (positions is None or type(positions) is not int):
        rows = positions
        if offset is not None or cu_seqlens is not None:
            rows = rows_for((q, k), axis, positions, offset, cu_seqlens)
        result = rope_qk_arrays(
            q, k, cos, sin, layout, axis, rows, adjoint, out, rounding, rotary_start
        )
        if result is not NotImplemented:
            return result
    call = Call("rope_qk", layout, axis, positions, offset, cu_seqlens, rotary_start,
                inverse, adjoint, rounding)  # fmt: skip
    outs = pair("rope_qk", out)
    return tuple(call.rotate({"q": q, "k": k}, {"cos": cos, "sin": sin}, outs))


def rope_complex(
    x,
    cis,
    *,
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
    Rotate consecutive channel pairs by complex multiplication.

    The channels (2i, 2i + 1) of x are read as one complex number and multiplied by
    the table; the result equals that of `rope` with ``layout='interleaved'``.

    Parameters
    ----------
    x : array_like or torch.Tensor, shape (..., head_dim)
        Queries or keys, real, as x of `rope`.
    cis : array_like or torch.Tensor, shape (T, M), (B, T, M) or axes as x
        ``cos + 1j * sin`` of the angles, complex, ``2 * M <= head_dim``, from
        `rope_cis`.
    axis, positions, offset, cu_seqlens, rotary_start : optional
        As in `rope`.
    inverse, adjoint, rounding, out : optional
        As in `rope`.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., head_dim)
        The rotated x, real; kind, dtype and memory order as in `rope`.

    Raises
    ------
    TypeError, ValueError
        As `rope` does.

    See Also
    --------
    rope_cis : Make the table.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 12. https://arxiv.org/abs/2104.09864

    Examples
    --------
    >>> import posenc
    >>> posenc.rope_complex([[1.0, 0.0]], [[1j]])
    array([[0., 1.]])
    """
    if inverse is False and (positions is None or type(positions) is not int):
        rows = positions
        if offset is not None or cu_seqlens is not None:
            rows = rows_for((x,), axis, positions, offset, cu_seqlens)
        result = rope_complex_arrays(
            x, cis, axis, rows, adjoint, out, rounding, rotary_start
        )
        if result is not NotImplemented:
            return result
    call = Call("rope_complex", "interleaved", axis, positions, offset, cu_seqlens,
                rotary_start, inverse, adjoint, rounding)  # fmt: skip
    return call.rotate({"x": x}, {"cis": cis}, [out])[0]


def rope_table(
    positions,
    inv_freq,
    *,
    attention_factor=1.0,
    angles="exact",
    dtype=np.float32,
    out=None,
):
    """
    Tabulate the cosines and sines of position times frequency.

    An entry depends on its own position, frequency and factor only, so tables made
    in pieces, or for one decoded token, agree bit for bit.

    Parameters
    ----------
    positions : array_like or torch.Tensor, shape (...)
        Token positions: whole or fractional, of either sign.
    inv_freq : array_like or torch.Tensor, shape (M,)
        Radians per token of each pair, from `rope_inv_freq`.
    attention_factor : float, default 1.0
        Multiplies cosines and sines.
    angles : {'exact', 'float32'}, default 'exact'
        ``'exact'`` takes positions and frequencies as exact numbers. ``'float32'``
        rounds the frequency, the product, cosine and sine, and their product with
        the factor to float32, as transformers does: what a checkpoint was trained
        with, wrong by several 1e-3 near position 131072.
    dtype : dtype, default float32
        Either float32 or float64, of NumPy or torch.
    out : pair of ndarray or torch.Tensor, shape (..., M), optional
        Where cosines and sines go, of that dtype and of the kind of the result.

    Returns
    -------
    cos, sin : ndarray or torch.Tensor, shape (..., M)
        The table; `out` if it was given. Tensors if an argument is one.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, `inv_freq` has not one axis, or `out`
        does not fit.

    See Also
    --------
    rope_inv_freq : The frequencies.
    rope : Use the table.
    rope_cis : The same as one complex table.
    rope_table_axial, rope_table_sections, rope_table_xpos : Other rotations.

    Notes
    -----
    Exact float32 entries are within 0.501 ulp of
    ``attention_factor * cos(position * inv_freq)``, float64 entries within 1 ulp,
    for every finite float64 input and also where the value is next to zero.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 15. https://arxiv.org/abs/2104.09864
    .. [2] Payne and Hanek, "Radian Reduction for Trigonometric Functions", 1983.
       https://doi.org/10.1145/1057600.1057602

    Examples
    --------
    >>> import posenc
    >>> cos, sin = posenc.rope_table([0, 1, 1000000], [1.0])
    >>> cos.ravel()
    array([1.        , 0.5403023 , 0.93675214], dtype=float32)
    """
    dtype = real_dtype("rope_table", dtype)
    tensor = tensors.are_tensors(positions, inv_freq)
    positions = real_array("rope_table", "positions", positions)
    inv_freq = real_array("rope_table", "inv_freq", inv_freq)
    shape, form = positions.shape + inv_freq.shape, (dtype, tensor)
    answers, (cos, sin) = table_pair("rope_table", out, shape, *form)
    fill_table("rope_table", positions, inv_freq, attention_factor, angles, cos, sin)
    tensors.mark_changed(*(out or ()))
    return answers


def rope_cis(
    positions,
    inv_freq,
    *,
    attention_factor=1.0,
    angles="exact",
    dtype=np.complex64,
    out=None,
):
    """
    Tabulate exp(1j * position * frequency), the complex form of `rope_table`.

    Parameters
    ----------
    positions : array_like or torch.Tensor, shape (...)
        Token positions: whole or fractional, of either sign.
    inv_freq : array_like or torch.Tensor, shape (M,)
        Radians per token of each pair, from `rope_inv_freq`.
    attention_factor, angles : optional
        As in `rope_table`.
    dtype : dtype, default complex64
        Either complex64 or complex128, of NumPy or torch.
    out : ndarray or torch.Tensor, shape (..., M), optional
        Where the table goes, of that dtype and of the kind of the result.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., M)
        ``cos + 1j * sin``, both as exact as in `rope_table`; `out` if given. A
        tensor if an argument is one.

    Raises
    ------
    TypeError, ValueError
        As `rope_table` does.

    See Also
    --------
    rope_complex : Use the table.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 12. https://arxiv.org/abs/2104.09864

    Examples
    --------
    >>> import posenc
    >>> posenc.rope_cis([0, 1], [1.0]).shape
    (2, 1)
    """
    with contextlib.suppress(TypeError):
        dtype = np.dtype(tensors.numpy_dtype(dtype))
    if dtype not in COMPLEX.values():
        rule = "be complex64 or complex128"
        raise TypeError(must("rope_cis", "dtype", rule, repr(dtype)))
    tensor = tensors.are_tensors(positions, inv_freq)
    positions = real_array("rope_cis", "positions", positions)
    inv_freq = real_array("rope_cis", "inv_freq", inv_freq)
    shape = positions.shape + inv_freq.shape
    answer, cis = table_result("rope_cis", "out", out, shape, dtype, tensor)
    cos, sin = cis.view(np.ndarray).real, cis.view(np.ndarray).imag
    fill_table("rope_cis", positions, inv_freq, attention_factor, angles, cos, sin)
    tensors.mark_changed(out)
    return answer


def rope_matrix(position, inv_freq, *, layout="half"):
    """
    Return the rotation of one head as a dense matrix, to read and to check against.

    Parameters
    ----------
    position : array_like or torch.Tensor, shape (...)
        Token positions.
    inv_freq : array_like or torch.Tensor, shape (M,)
        Radians per token of each pair.
    layout : {'half', 'interleaved'}, default 'half'
        How channels are paired, as in `rope`.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., 2 * M, 2 * M)
        R in float64, with ``R @ x == rope(x, cos, sin)`` for a column x; a tensor
        if an argument is one.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or `layout` is unknown.

    See Also
    --------
    rope : The same in O(M).

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 15. https://arxiv.org/abs/2104.09864

    Examples
    --------
    >>> import posenc
    >>> posenc.rope_matrix(1, [1.0]).round(3)
    array([[ 0.54 , -0.841],
           [ 0.841,  0.54 ]])
    """
    one_of("rope_matrix", "layout", layout, LAYOUTS)
    tensor = tensors.are_tensors(position, inv_freq)
    position = real_array("rope_matrix", "position", position)
    inv_freq = real_array("rope_matrix", "inv_freq", inv_freq)
    cos = np.empty(position.shape + inv_freq.shape)
    sin = np.empty_like(cos)
    fill_table("rope_matrix", position, inv_freq, 1.0, "exact", cos, sin)
    n_pair = inv_freq.size
    pair = np.arange(n_pair)
    first, second = (
        (pair, pair + n_pair) if layout == "half" else (2 * pair, 2 * pair + 1)
    )
    matrix = np.zeros((*position.shape, 2 * n_pair, 2 * n_pair))
    matrix[..., first, first] = matrix[..., second, second] = cos
    matrix[..., first, second], matrix[..., second, first] = -sin, sin
    return tensors.from_numpy(matrix) if tensor else matrix


def permute_layout(w, head_dim, *, to, axis=0, rotary_dim=None):
    """
    Reorder the channels of each head from one pair layout to the other.

    Scores q @ k do not change when both are permuted, so projection weights trained
    for one layout serve the other after this.

    Parameters
    ----------
    w : array_like or torch.Tensor
        Rows of a projection weight, (n_head * head_dim, hidden), or its bias, or
        activations with ``axis=-1``. Any dtype; a tensor also on any device.
    head_dim : int
        Channels per head; divides the size along `axis`.
    to : {'half', 'interleaved'}
        The layout to arrive at; w is in the other.
    axis : int, default 0
        The axis that holds the channels of all heads.
    rotary_dim : int, optional
        Rotated channels at the start of each head, even, if fewer than head_dim;
        the others stay where they are.

    Returns
    -------
    ndarray or torch.Tensor
        A permuted copy of w.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, a size does not divide, or `to` is
        unknown.

    See Also
    --------
    rope : What the layouts mean.

    References
    ----------
    .. [1] Touvron et al., "LLaMA: Open and Efficient Foundation Language Models",
       2023, whose weights are interleaved; transformers stores them as halves.
       https://arxiv.org/abs/2302.13971

    Examples
    --------
    >>> import posenc
    >>> posenc.permute_layout([0, 1, 2, 3, 4, 5], 6, to="half")
    array([0, 2, 4, 1, 3, 5])
    """
    here = "permute_layout"
    one_of(here, "to", to, LAYOUTS)
    w = w if tensors.is_tensor(w) else as_array(here, "w", w)
    head_dim = whole_number(here, "head_dim", head_dim, 2)
    if w.ndim == 0:
        raise ValueError(must(here, "w", "have at least one axis", "shape ()"))
    if rotary_dim is None and head_dim % 2:
        rule = "be even when rotary_dim is not given"
        raise ValueError(must(here, "head_dim", rule, head_dim))
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    rotary_dim = whole_number(here, "rotary_dim", rotary_dim, 2)
    if rotary_dim % 2 or rotary_dim > head_dim:
        rule = f"be even and at most head_dim = {head_dim}"
        raise ValueError(must(here, "rotary_dim", rule, rotary_dim))
    axis = whole_number(here, "axis", axis, -w.ndim)
    if axis >= w.ndim:
        raise ValueError(must(here, "axis", f"be less than {w.ndim}", axis))
    if w.shape[axis] % head_dim:
        rule = f"have a multiple of head_dim = {head_dim} channels along axis {axis}"
        raise ValueError(must(here, "w", rule, f"shape {tuple(w.shape)}"))
    pairs = np.arange(rotary_dim).reshape(-1, 2).T  # half reads these channels
    order = pairs.ravel() if to == "half" else np.argsort(pairs.ravel())
    head = np.concatenate([order, np.arange(rotary_dim, head_dim)])
    starts = np.arange(0, w.shape[axis], head_dim)
    index = (starts[:, None] + head).ravel()
    if tensors.is_tensor(w):
        return tensors.take(w, index, axis)
    return np.take(w, index, axis=axis)
