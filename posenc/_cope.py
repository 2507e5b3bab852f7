"""Contextual position encoding (CoPE): its three steps, and the bias they make."""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np

from . import _core
from . import _tensors as tensors
from ._check import as_array, must, true_or_false, whole_number
from ._results import (
    REAL_RULE,
    aligned,
    are_one,
    dtypes_of,
    no_out,
    real_kind,
    result_like,
    widest,
)


def cope_gates(logits, *, out=None):
    """
    Compute the gates of contextual positions, ``1 / (1 + exp(-logits))``.

    Parameters
    ----------
    logits : array_like or torch.Tensor, shape (...)
        Products of queries and keys, float16, bfloat16 (of ml_dtypes, in NumPy),
        float32 or float64; integers count as float64. A tensor is a plain one on the
        CPU that needs no gradient.
    out : ndarray or torch.Tensor, shape (...), optional
        Where the result goes: of the kind and dtype of the logits. It may overlap them.

    Returns
    -------
    ndarray or torch.Tensor, shape (...)
        How much each key counts, in [0, 1]: within 2 ulp in float32 and float64,
        computed in float32 and rounded once for 16 bits; `out` if it was given.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient or
        is no plain CPU tensor.
    ValueError
        If `out` does not fit.

    See Also
    --------
    cope_positions : The next step.
    cope_bias : All steps in one.

    References
    ----------
    .. [1] Golovneva et al., "Contextual Position Encoding: Learning to Count What's
       Important", 2024, eq. 3. https://arxiv.org/abs/2405.18719

    Examples
    --------
    >>> import numpy as np, posenc
    >>> posenc.cope_gates([0.0, 20.0, -np.inf])
    array([0.5, 1. , 0. ])
    """
    here = "cope_gates"
    x = _real(here, "logits", logits)
    dtype = widest(x.dtype)
    return _by_ufunc(_core.cope_gates, logits, (x.astype(dtype, copy=False),), x.shape,
                     dtype, here, out)  # fmt: skip


def cope_positions(gates, n_position, *, out=None):
    """
    Add gates up to contextual positions, from the last key leftwards.

    Parameters
    ----------
    gates : array_like or torch.Tensor, shape (..., S)
        How much each key counts, 0 where it may not be seen; types as in `cope_gates`.
    n_position : int
        The number of positions that have an embedding: results are at most
        ``n_position - 1``.
    out : ndarray or torch.Tensor, shape (..., S), optional
        Where the result goes: of the kind and dtype of the gates. It may overlap them.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., S)
        ``min(gates[..., j:].sum(), n_position - 1)`` for key j, summed in float64 and
        rounded once; `out` if it was given.

    Raises
    ------
    TypeError, ValueError
        As `cope_gates` does; also if there is no axis or `n_position` is no whole
        number of at least 1.

    See Also
    --------
    cope_gates : The step before.
    cope_interpolate : The next step.

    References
    ----------
    .. [1] Golovneva et al., "Contextual Position Encoding: Learning to Count What's
       Important", 2024, eq. 4. https://arxiv.org/abs/2405.18719

    Examples
    --------
    >>> import posenc
    >>> posenc.cope_positions([1.0, 1.0, 0.5, 0.25], 3)
    array([2.  , 1.75, 0.75, 0.25])
    """
    here = "cope_positions"
    x = _real(here, "gates", gates, 1)
    n_position = whole_number(here, "n_position", n_position, 1)
    dtype = widest(x.dtype)
    operands = x.astype(dtype, copy=False), float(n_position)
    return _by_ufunc(_core.cope_positions, gates, operands, x.shape, dtype, here, out)


def cope_interpolate(z, positions, *, out=None):
    """
    Interpolate between the entries of z at contextual positions.

    Parameters
    ----------
    z : array_like or torch.Tensor, shape (..., P)
        Products of queries and position embeddings; types as in `cope_gates`.
    positions : array_like or torch.Tensor, shape (..., S)
        From `cope_positions`; they count as at least 0 and at most ``P - 1``. Leading
        axes are broadcast.
    out : ndarray or torch.Tensor, shape (..., S), optional
        Where the result goes: of the kind of z and of the result's dtype. It may
        overlap an operand.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., S)
        ``(1 - w) * z[floor(p)] + w * z[ceil(p)]`` with ``w = p - floor(p)``. A 16-bit z
        keeps its dtype with positions of its own type or float32; else the result has
        the common dtype; `out` if it was given.

    Raises
    ------
    TypeError, ValueError
        As `cope_gates` does; also if the shapes do not fit or z is empty.

    See Also
    --------
    cope_positions : The step before.
    cope_bias : All steps in one.

    References
    ----------
    .. [1] Golovneva et al., "Contextual Position Encoding: Learning to Count What's
       Important", 2024, eq. 5. https://arxiv.org/abs/2405.18719

    Examples
    --------
    >>> import posenc
    >>> posenc.cope_interpolate([0.0, 10.0, 40.0], [2.0, 1.75, 0.75, 0.25])
    array([40. , 32.5,  7.5,  2.5])
    """
    here = "cope_interpolate"
    x, at = _real(here, "z", z, 1), _real(here, "positions", positions, 1)
    if at.dtype == np.bool:
        raise TypeError(must(here, "positions", REAL_RULE, "dtype bool"))
    _check_positions(here, x)
    dtype, kind = dtypes_of(x.dtype, at.dtype)
    shape = _broadcast(here, "positions", at, x.shape[:-1]) + at.shape[-1:]
    operands = x.astype(dtype, copy=False), at.astype(kind, copy=False)
    return _by_ufunc(_core.cope_interpolate, z, operands, shape, dtype, here, out)


def cope_bias(logits, z, *, causal=True, mask=None, out=None):
    """
    Compute what contextual positions add to the logits of attention.

    The three steps in one pass over each row, from the last key leftwards, that ends
    early where all further keys are at the last position: gates are the sigmoids of
    the logits, positions the sums of the gates, the bias is z at the positions. This is
    CoPE of Golovneva et al. [1]_, neither "clipped RoPE" nor a complex positional
    encoding.

    Parameters
    ----------
    logits : array_like or torch.Tensor, shape (..., T, S)
        Products of queries and keys, float16, bfloat16 (of ml_dtypes, in NumPy),
        float32 or float64, in any memory layout; integers count as float64. -inf where
        a key may not be seen. A tensor is a plain one on the CPU that needs no
        gradient.
    z : array_like or torch.Tensor, shape (..., T, P)
        Products of queries and the embeddings of P positions. Leading axes and T are
        broadcast.
    causal : bool, default True
        Query i sees the keys up to ``i + S - T``: the last query sees all, as with a
        cache of keys. With False the count still runs from the last key leftwards.
    mask : array_like of bool, broadcast to (..., T, S), optional
        True where a key may be seen. What may not be seen is not counted either.
        Padding of keys is of shape (B, 1, 1, S).
    out : ndarray or torch.Tensor, shape (..., T, S), optional
        Where the result goes: of the kind of the logits and of the result's dtype. It
        may be the logits; any other overlap is handled.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., T, S)
        What is to be added to the logits, 0 where a key may not be seen; of the kind
        of the logits and, where shapes agree, in their memory order. 16-bit logits keep
        their dtype unless z is float64; else the result has the common dtype. `out` if
        it was given. Dask arrays go through the gufunc.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient
        (`posenc.torch.cope_bias` gives it) or is no plain CPU tensor.
    ValueError
        If shapes do not fit or z holds no position. Nothing has been written.

    See Also
    --------
    cope_attention : Whole attention, without an array of shape (T, S).
    cope_gates, cope_positions, cope_interpolate : The steps.

    Notes
    -----
    For a row of logits and the keys j that its query may see::

        gate_j = sigmoid(logit_j)
        p_j    = min(sum of gate_t for t >= j, P - 1)
        bias_j = (1 - w) * z[floor(p_j)] + w * z[ceil(p_j)],  w = p_j - floor(p_j)

    The gates of float32 and 16-bit logits are summed exactly, with more bits than
    float32 has, so the result is the same bits on every processor and for any number of
    threads. NaN in a logit makes its key and all to the left of it NaN, in its own row.

    References
    ----------
    .. [1] Golovneva et al., "Contextual Position Encoding: Learning to Count What's
       Important", 2024, eqs. 3-5. https://arxiv.org/abs/2405.18719

    Examples
    --------
    Three keys that count one half each, seen by three queries in turn, and positions 0,
    1 and 2 that are worth 0, 10 and 40:

    >>> import numpy as np, posenc
    >>> posenc.cope_bias(np.zeros((3, 3)), np.tile([0.0, 10.0, 40.0], (3, 1)))
    array([[ 5.,  0.,  0.],
           [10.,  5.,  0.],
           [25., 10.,  5.]])

    The last query alone, as with a cache, and the second key padding:

    >>> mask = [True, False, True]
    >>> posenc.cope_bias(np.zeros((1, 3)), [[0.0, 10.0, 40.0]], mask=mask)
    array([[10.,  0.,  5.]])
    """
    here = "cope_bias"
    true_or_false(here, "causal", causal)
    x, table = _real(here, "logits", logits, 2), _real(here, "z", z, 1)
    _check_positions(here, table)
    seen = None if mask is None else as_mask(here, mask)
    rows = _broadcast(here, "z", table, x.shape[:-1])
    if seen is not None:
        rows = _mask_rows(here, seen, rows, x.shape[-1])
    dtype, kind = dtypes_of(x.dtype, table.dtype)
    x, table = aligned(x, dtype), aligned(table, kind)
    shape = (*rows, x.shape[-1])
    operands = (x, table) if seen is None else (x, table, seen)
    if not all(isinstance(part, np.ndarray) for part in operands):
        return _lazy_bias(x, table, seen, shape, causal, out)
    with np.errstate(all="ignore"):
        answer, result = result_like(here, logits, x, shape, dtype, out)
        table = np.broadcast_to(table, (*rows, table.shape[-1]))
        _run(x, table, seen, causal, result)
        tensors.mark_changed(out)
    return answer


# --- what is given -------------------------------------------------------------------


def _real(function, name, value, n_axis=0):
    """Return real numbers as an array of at least some axes."""
    array = as_array(function, name, value)
    real_kind(function, name, array.dtype)
    if array.ndim < n_axis:
        rule = "have at least " + ("one axis" if n_axis == 1 else "two axes")
        raise ValueError(must(function, name, rule, f"shape {array.shape}"))
    return array


def as_mask(function, mask):
    """Return a mask as an array of truth values."""
    array = as_array(function, "mask", mask)
    if array.dtype != np.bool:
        rule = "be of dtype bool, True where a key may be seen"
        raise TypeError(must(function, "mask", rule, f"dtype {array.dtype}"))
    return array


def _check_positions(function, z):
    if z.shape[-1] == 0:
        rule = "hold at least one position"
        raise ValueError(must(function, "z", rule, f"shape {z.shape}"))


def _broadcast(function, name, array, rows):
    """Return what the leading axes of an array and `rows` are broadcast to."""
    try:
        return np.broadcast_shapes(array.shape[:-1], rows)
    except ValueError:
        rule = f"have leading axes that broadcast with {rows}"
        raise ValueError(must(function, name, rule, f"shape {array.shape}")) from None


def _mask_rows(function, mask, rows, n_key):
    """Return the rows that a mask is broadcast with; raise if it does not fit."""
    if mask.ndim and mask.shape[-1] not in (1, n_key):
        rule = f"broadcast to {(*rows, n_key)}"
        raise ValueError(must(function, "mask", rule, f"shape {mask.shape}"))
    return _broadcast(function, "mask", mask, rows)


# --- results -------------------------------------------------------------------------


def _by_ufunc(ufunc, given, operands, shape, dtype, function, out):
    """Call a ufunc, which handles any memory, and give back the kind of `given`."""
    with np.errstate(all="ignore"):
        if not all(isinstance(op, np.ndarray | float) for op in operands):
            no_out(function, operands, out)
            return ufunc(*operands)
        if out is None and not tensors.is_tensor(given):
            return ufunc(*operands)
        answer, result = result_like(function, given, operands[0], shape, dtype, out)
        ufunc(*operands, out=result)
        tensors.mark_changed(out)
        return answer


def _run(x, table, seen, causal, result):
    """Compute the bias of broadcast operands into an array, overlapping or not."""
    shape, target = result.shape, result
    in_place = x.shape == shape and are_one(x, result)
    parts = [table, *([] if seen is None else [seen]), *([] if in_place else [x])]
    if not result.flags.aligned or any(np.may_share_memory(p, result) for p in parts):
        target = np.empty(shape, x.dtype)
    seen = None if seen is None else np.broadcast_to(np.asarray(seen), shape)
    x, table = np.broadcast_to(x, shape), np.asarray(table)
    _core.cope_bias_arrays(x, table, seen, bool(causal), target)
    if target is not result:
        result[...] = target


def _lazy_bias(x, table, seen, shape, causal, out):
    """Compute the bias of another library's arrays: hidden logits become -inf."""
    no_out("cope_bias", (x, table, x if seen is None else seen), out)
    if causal:
        lower = np.tri(*shape[-2:], shape[-1] - shape[-2], dtype=np.bool)
        seen = lower if seen is None else seen & lower
    if seen is not None:
        x = np.where(seen, x, x.dtype.type(-np.inf))
    return _core.cope_bias(x, table)
