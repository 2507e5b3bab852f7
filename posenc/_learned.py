"""Learned tables of positions: gathered and added to data, and made longer."""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np

from . import _core
from . import _tensors as tensors
from ._check import as_array, must, one_of, real_number, whole_number
from ._results import real_kind, table_result
from ._rope_rows import whole_numbers
from ._table_rows import (
    Sum,
    add_lazily,
    by_fast_door,
    counted,
    data_array,
    one_per_row,
    padding,
    refuse_both,
)

METHODS = ("hierarchical", "linear", "tile")

# Elements between rows of a table that are computed at once.
_BLOCK = 1 << 16


def add_learned(
    x,
    table,
    *,
    scale=1.0,
    positions=None,
    offset=None,
    cu_seqlens=None,
    padding_mask=None,
    out=None,
):
    """
    Scale data and add the rows of a learned table at their positions, in one pass.

    Parameters
    ----------
    x : array_like or torch.Tensor, shape (..., T, dim)
        Token embeddings, float16, bfloat16 (of ml_dtypes, in NumPy), float32 or
        float64, in any memory layout; integers count as float64. A tensor is a plain
        one on the CPU that needs no gradient.
    table : array_like or torch.Tensor, shape (P, dim)
        One row for each position, such as the weight of an ``nn.Embedding``.
    scale : float, default 1.0
        Multiplies x, such as ``dim ** 0.5``.
    positions : array_like of int, shape (T,), (B, T) or as x, optional
        Row of the table for each token, in [0, P). Shapes of more axes broadcast with
        x's but its last. Without it, tokens stand at 0, 1, 2, ...
    offset : int or array_like of int, shape (B,), optional
        Position of the first token, of all sequences or of each.
    cu_seqlens : array_like of int, shape (N + 1,), optional
        N sequences of different lengths lie packed along T, sequence i from
        ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``: each begins at position 0, or at
        `offset`, which may then have shape (N,).
    padding_mask : array_like of bool, shape (T,), (B, T) or as x, optional
        True where a token is padding: its result is zero, its position not looked at.
    out : ndarray or torch.Tensor, shape (..., T, dim), optional
        Where the result goes: of x's kind and of the result's dtype. It may be x
        itself; any other overlap is handled.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., T, dim)
        ``x * scale + table[positions]``, of x's kind and memory order; `out` if it was
        given. A 16-bit x keeps its dtype unless the table is float64, and is computed
        in float32 and rounded once; else the result has the common dtype.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient
        (`posenc.torch.add_learned` gives it) or is no plain CPU tensor.
    ValueError
        If shapes do not fit, a token has no row in the table or positions are given in
        two ways. Nothing has been written.

    See Also
    --------
    extend_table : Make the table longer.
    add_sinusoidal : The same without a table.

    Notes
    -----
    With `scale` 1 and a table of the dtype of `x` the bits are those of an
    ``nn.Embedding`` and a sum in PyTorch.

    References
    ----------
    .. [1] Gehring et al., "Convolutional Sequence to Sequence Learning", 2017, section
       3.1. https://arxiv.org/abs/1705.03122
    .. [2] Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for
       Language Understanding", 2018. https://arxiv.org/abs/1810.04805

    Examples
    --------
    >>> import numpy as np, posenc
    >>> table = np.arange(12.0).reshape(6, 2)
    >>> posenc.add_learned(np.zeros((2, 3, 2)), table, positions=[[0, 1, 2], [5, 5, 0]])
    array([[[ 0.,  1.],
            [ 2.,  3.],
            [ 4.,  5.]],
           [[10., 11.],
            [10., 11.],
            [ 0.,  1.]]])

    Two packed sequences, of 1 and 2 tokens:

    >>> posenc.add_learned(np.zeros((3, 2)), table, cu_seqlens=[0, 1, 3])
    array([[0., 1.],
           [0., 1.],
           [2., 3.]])
    """
    here = "add_learned"
    places = positions, offset, cu_seqlens, padding_mask
    answer = by_fast_door(_core.add_learned_arrays, x, (table,), scale, places, out)
    if answer is not NotImplemented:
        return answer
    scale = real_number(here, "scale", scale)
    array = data_array(here, x)
    lead, dim = array.shape[:-1], array.shape[-1]
    rows = np.asarray(as_array(here, "table", table))
    real_kind(here, "table", rows.dtype)
    if rows.ndim != 2 or rows.shape[1] != dim:
        rule = f"be of shape (P, {dim}) for x of shape {tuple(array.shape)}"
        raise ValueError(must(here, "table", rule, f"shape {rows.shape}"))
    refuse_both(here, positions, offset, cu_seqlens)
    mask = padding(here, padding_mask, lead)
    positions = _rows(here, lead, rows, positions, offset, cu_seqlens, mask)
    if not isinstance(array, np.ndarray):
        chosen = rows[positions]
        return add_lazily(
            here, array, rows.dtype, lambda t: (chosen.astype(t),), mask, scale, out
        )
    with np.errstate(all="ignore"):
        total = Sum(here, x, array, rows.dtype, out)
        kept, rows = rows, np.require(rows, total.table_dtype, "A")
        positions = np.require(positions, np.int64, "A")
        given = [kept, positions] if mask is None else [kept, positions, mask]
        door = _core.add_learned_arrays
        return total.add(door, (rows,), positions, mask, scale, given)


def extend_table(table, length, *, method="hierarchical", alpha=0.4, out=None):
    """
    Make a learned table longer than it was trained.

    Rows of positions that were never trained hold noise; these are computed from the
    trained ones, to go on training with, or to be used as they are.

    Parameters
    ----------
    table : array_like or torch.Tensor, shape (n, dim)
        The learned table, float16, bfloat16, float32 or float64.
    length : int
        Rows to arrive at, at least n; at most ``n ** 2`` for ``'hierarchical'``.
    method : {'hierarchical', 'linear', 'tile'}, default 'hierarchical'
        ``'hierarchical'`` gives each position two digits to base n and adds their rows,
        which keeps the first n rows and tells all others apart. ``'linear'`` stretches
        the table, first row to first row and last to last, so that all its positions
        are seen again, closer together. ``'tile'`` repeats the table.
    alpha : float, default 0.4
        Share of the leading digit for ``'hierarchical'``, in (0, 1) but not 0.5, which
        would give two positions one row wherever their digits change places. Other
        methods do not look at it.
    out : ndarray or torch.Tensor, shape (length, dim), optional
        Where the result goes: of the kind and dtype of the table.

    Returns
    -------
    ndarray or torch.Tensor, shape (length, dim)
        The longer table, of the kind and dtype of `table`, computed in float64 and
        rounded once; `out` if it was given.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind; if a tensor needs a gradient: pass its
        ``detach()``.
    ValueError
        If an argument is out of its range or unknown, or `out` does not fit.

    See Also
    --------
    add_learned : Use the table.

    Notes
    -----
    For the old rows e, ``'hierarchical'`` gives position ``i * n + j`` the row
    ``alpha * u[i] + (1 - alpha) * u[j]`` with ``u[i] = (e[i] - alpha * e[0]) /
    (1 - alpha)``, so that ``e[0]`` has a part in all new rows. Some models keep rows in
    front that are no positions, as RoBERTa's first two, or belong to a special token
    and are unlike the others, as BERT's first: extend ``table[2:]`` or ``table[1:]``
    and put them back.

    References
    ----------
    .. [1] Su, "Hierarchical decomposition of position encodings" (in Chinese), 2020.
       https://kexue.fm/archives/7947
    .. [2] Beltagy, Peters and Cohan, "Longformer: The Long-Document Transformer", 2020,
       section 5, which tiles. https://arxiv.org/abs/2004.05150

    Examples
    --------
    >>> import posenc
    >>> posenc.extend_table([[0.0], [1.0], [4.0]], 5, method="linear").ravel()
    array([0. , 0.5, 1. , 2.5, 4. ])
    >>> posenc.extend_table([[0.0], [1.0], [4.0]], 5).ravel().round(3)
    array([0.   , 1.   , 4.   , 0.667, 1.667])
    """
    here = "extend_table"
    one_of(here, "method", method, METHODS)
    old = np.asarray(as_array(here, "table", table))
    real_kind(here, "table", old.dtype)
    if old.ndim != 2 or not len(old):
        rule = "be of shape (n, dim) with n at least 1"
        raise ValueError(must(here, "table", rule, f"shape {old.shape}"))
    n = len(old)
    length = whole_number(here, "length", length, n)
    if method == "hierarchical":
        alpha = _check_digits(here, n, length, alpha)
    dtype = np.dtype(np.float64) if old.dtype.kind in "biu" else old.dtype
    dtype, tensor = dtype.newbyteorder("="), tensors.is_tensor(table)
    answer, result = table_result(
        here, "out", out, (length, old.shape[1]), dtype, tensor
    )
    with np.errstate(all="ignore"):
        _extend(old, length, method, alpha, result)
    tensors.mark_changed(out)
    return answer


def _rows(function, lead, table, positions, offset, cu_seqlens, mask):
    """Return the row of the table for each token; raise unless all are there."""
    if positions is None:
        given = counted(function, lead, offset, cu_seqlens)
    else:
        given = whole_numbers(function, "positions", positions)
    placed = one_per_row(function, "positions", given, lead)
    outside = (placed < 0) | (placed >= len(table))
    if not outside.any():
        return placed
    wrong = outside
    if mask is not None:  # of no matter where all tokens of a position are padding
        seen = np.broadcast_to(~mask, lead)
        shared = [i for i, size in enumerate(placed.shape) if size < lead[i]]
        wrong = outside & seen.any(axis=tuple(shared), keepdims=True)
    if wrong.any():
        index = np.unravel_index(int(np.argmax(wrong)), given.shape)
        index = tuple(map(int, index))
        number = given[index]
        if positions is not None:
            rule = f"lie in [0, {len(table)}), the rows of table"
            got = f"{number} at index {index}"
            raise ValueError(must(function, "positions", rule, got))
        name = "x" if offset is None else "offset"
        name = "cu_seqlens" if cu_seqlens is not None and offset is None else name
        rule = f"lead to positions in [0, {len(table)}), the rows of table"
        got = f"{number} for token {index[-1]}"
        got += f" of sequence {index[0]}" if len(index) > 1 else ""
        raise ValueError(must(function, name, rule, got))
    return np.where(outside, 0, placed)


def _check_digits(function, n, length, alpha):
    """Return alpha as a float; raise unless two digits to base n reach a length."""
    if length > n * n:
        rule = f"be at most {n * n}, the square of the table's rows, for 'hierarchical'"
        raise ValueError(must(function, "length", rule, length))
    rule = "be greater than 0, less than 1 and not 0.5"
    return real_number(
        function, "alpha", alpha, rule, lambda value: 0 < value < 1 and value != 0.5
    )


def _extend(old, length, method, alpha, result):
    """Write a longer table, maybe to the memory of the old one."""
    if method == "tile":
        result[...] = old[np.arange(length) % len(old)]
    elif method == "linear":
        _stretch(old.astype(np.float64), result)
    else:
        _combine_digits(old, alpha, result)


def _stretch(wide, result):
    """Write rows between those of a table, block by block: each from two of them."""
    n, length = len(wide), len(result)
    exact = np.arange(length) * ((n - 1) / max(length - 1, 1))
    low = np.minimum(exact.astype(np.intp), n - 1)
    high = np.minimum(low + 1, n - 1)
    weight = (exact - low)[:, None]
    n_row = max(_BLOCK // max(wide.shape[1], 1), 1)
    room = np.empty((2, min(n_row, length), wide.shape[1]))
    for start in range(0, length, n_row):
        block = slice(start, start + n_row)
        before, after = room[:, : len(low[block])]
        wide.take(low[block], axis=0, out=before, mode="clip")
        wide.take(high[block], axis=0, out=after, mode="clip")
        before *= 1 - weight[block]
        after *= weight[block]
        before += after
        result[block] = before
    is_old = exact == low
    result[is_old] = wide[low[is_old]]  # also beside an infinite one
    result[-1] = wide[-1]


def _combine_digits(old, alpha, result):
    """Write the old rows, then of each leading digit its row plus all the last ones."""
    leading, n = old.astype(np.float64), len(old)
    leading -= alpha * leading[:1]
    leading /= 1 - alpha
    last = (1 - alpha) * leading
    leading *= alpha
    result[:n] = old
    for start in range(n, len(result), n):
        rows = result[start : start + n]
        np.add(leading[start // n], last[: len(rows)], out=rows, casting="same_kind")
