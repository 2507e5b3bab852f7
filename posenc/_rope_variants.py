"""Tables for other rotations: axes of a grid, sections of M-RoPE, decay of xPos."""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np

from . import _tensors as tensors
from ._check import (
    must,
    one_of,
    positive_number,
    real_array,
    real_dtype,
    real_number,
    true_or_false,
    whole_number,
)
from ._results import table_pair
from ._rope_check import check_one_axis, fill_table
from ._sinusoidal import INDEXINGS, grid_axes

# Elements of a table of xPos that are computed at once.
_BLOCK = 1 << 14

# Tokens of which scales of xPos are multiples, times one for the rest.
_STEP = 64


def rope_table_axial(
    shape,
    inv_freq,
    *,
    indexing="ij",
    attention_factor=1.0,
    angles="exact",
    dtype=np.float32,
    out=None,
):
    """
    Tabulate the rotations of a grid: each axis has its share of the pairs.

    With two axes this is the rotation of vision transformers; the table is one for
    `rope`.

    Parameters
    ----------
    shape : sequence of int, array_like or torch.Tensor
        For each axis its size, or its positions, shape (n,), which may be fractional.
    inv_freq : array_like or torch.Tensor, shape (M,) or (n_axis, M)
        Radians per step of the pairs of every axis, or of each: of
        ``rope_inv_freq(head_dim // n_axis)``, to rotate all channels.
    indexing : {'ij', 'xy'}, default 'ij'
        Whose pairs come first: those of the first axis, as in Qwen2-VL and Pixtral, or
        those of the last axis, x, as in Llama 4.
    attention_factor, angles : optional
        As in `rope_table`.
    dtype : dtype, default float32
        Either float32 or float64, of NumPy or torch.
    out : pair of ndarray or torch.Tensor, shape (..., n_axis * M), optional
        Where cosines and sines go, of that dtype and of the kind of the result.

    Returns
    -------
    cos, sin : ndarray or torch.Tensor, shape (..., n_axis * M)
        The table, with an axis for each of the grid; `out` if it was given. Tensors if
        `inv_freq` or positions of an axis are one. For patches numbered row by row,
        `rope` wants it as ``cos.reshape(-1, n_axis * M)``.

    Raises
    ------
    TypeError, ValueError
        As `rope_table` does; also if `shape` is empty or `inv_freq` has not a row for
        each axis.

    See Also
    --------
    rope_table_sections : Positions given for every token, as of images of any sizes.
    sinusoidal_grid : The table that is added.

    Notes
    -----
    Entries are those of `rope_table`. Scores depend on the distances along the axes,
    not on where two patches lie. Tokens that are no patches, such as a first one for
    the class, are left out: ``rope(x[..., 1:, :], cos, sin, out=x[..., 1:, :])``.
    Pixtral deals the frequencies of a whole head to the axes in turn:
    ``inv_freq = rope_inv_freq(head_dim)[0].reshape(-1, 2).T``.

    References
    ----------
    .. [1] Heo et al., "Rotary Position Embedding for Vision Transformer", 2024, axial
       frequencies. https://arxiv.org/abs/2403.13298

    Examples
    --------
    Two rows of three patches, eight channels; patch (1, 2) turns by 1 and by 2:

    >>> import numpy as np, posenc
    >>> inv_freq, _ = posenc.rope_inv_freq(4)
    >>> cos, sin = posenc.rope_table_axial((2, 3), inv_freq)
    >>> cos.shape
    (2, 3, 4)
    >>> np.arctan2(sin, cos)[1, 2].round(4)
    array([1.  , 0.01, 2.  , 0.02], dtype=float32)
    >>> x = np.ones((5, 6, 8), np.float32)  # heads, patches, channels
    >>> posenc.rope(x, cos.reshape(6, 4), sin.reshape(6, 4)).shape
    (5, 6, 8)
    """
    here = "rope_table_axial"
    dtype = real_dtype(here, dtype)
    one_of(here, "indexing", indexing, INDEXINGS)
    axes = grid_axes(here, shape)
    n_axis, tensor = len(axes), tensors.are_tensors(*shape, inv_freq)
    inv_freq = real_array(here, "inv_freq", inv_freq)
    if inv_freq.ndim not in (1, 2) or inv_freq.shape[:-1] not in ((), (n_axis,)):
        rule = f"be of shape (M,) or ({n_axis}, M), for {n_axis} axes"
        raise ValueError(must(here, "inv_freq", rule, f"shape {inv_freq.shape}"))
    n_pair = inv_freq.shape[-1]
    inv_freq = np.broadcast_to(inv_freq, (n_axis, n_pair))
    sizes = tuple(axis.size for axis in axes)
    form = (*sizes, n_axis * n_pair), dtype, tensor
    answers, tables = table_pair(here, out, *form)
    rows = [_rows(here, axis, freq, attention_factor, angles, dtype)
            for axis, freq in zip(axes, inv_freq, strict=True)]  # fmt: skip
    for number, of_axis in enumerate(rows):
        place = n_axis - 1 - number if indexing == "xy" else number
        lead = (sizes[number], *(1,) * (n_axis - 1 - number), n_pair)
        for table, part in zip(tables, of_axis, strict=True):
            table[..., place * n_pair : (place + 1) * n_pair] = part.reshape(lead)
    tensors.mark_changed(*(out or ()))
    return answers


def rope_table_sections(
    positions,
    inv_freq,
    sections,
    *,
    interleaved=False,
    attention_factor=1.0,
    angles="exact",
    dtype=np.float32,
    out=None,
):
    """
    Tabulate rotations by several positions per token, each for a section of the pairs.

    This is M-RoPE, for tokens with a time, a row and a column; the table is one for
    `rope`.

    Parameters
    ----------
    positions : array_like or torch.Tensor, shape (n_axis, ...)
        The positions of each token, one kind after the other, such as (3, T) or
        (3, B, T): whole or fractional, of either sign.
    inv_freq : array_like or torch.Tensor, shape (M,)
        Radians per step of each pair, from `rope_inv_freq`.
    sections : sequence of int
        Pairs of each section, M in all: ``mrope_section`` of transformers. Section j
        takes positions ``j % n_axis``.
    interleaved : bool, default False
        False for sections one after the other, as in Qwen2-VL and Qwen2.5-VL. True for
        pairs dealt out in turn, as in Qwen3-VL, with one section for each axis: pair i
        takes positions ``i % n_axis``; once an axis has the pairs of its section, its
        turns go to axis 0.
    attention_factor, angles : optional
        As in `rope_table`; with ``angles='float32'`` as transformers rounds them.
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
        As `rope_table` does; also if `sections` does not fit.

    See Also
    --------
    rope_table_axial : All positions of a grid.

    Notes
    -----
    Entries are those of `rope_table` for their own kind of position. A token whose
    positions are all equal, as that of a text, is rotated as by RoPE.

    References
    ----------
    .. [1] Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of the
       World at Any Resolution", 2024, section 2.1. https://arxiv.org/abs/2409.12191
    .. [2] Bai et al., "Qwen3-VL Technical Report", 2025, section 2.1.
       https://arxiv.org/abs/2511.21631

    Examples
    --------
    Four pairs of one frequency and a token at time 1, row 2, column 3:

    >>> import numpy as np, posenc
    >>> cos, sin = posenc.rope_table_sections([1, 2, 3], np.ones(4), [2, 1, 1])
    >>> np.arctan2(sin, cos).round(4)
    array([1., 1., 2., 3.], dtype=float32)
    >>> cos, sin = posenc.rope_table_sections([1, 2, 3], np.ones(4), [2, 1, 1],
    ...                                       interleaved=True)
    >>> np.arctan2(sin, cos).round(4)
    array([1., 2., 3., 1.], dtype=float32)
    """
    here = "rope_table_sections"
    dtype = real_dtype(here, dtype)
    true_or_false(here, "interleaved", interleaved)
    tensor = tensors.are_tensors(positions, inv_freq)
    positions = real_array(here, "positions", positions)
    if positions.ndim == 0 or len(positions) == 0:
        rule, got = "be of shape (n_axis, ...)", f"shape {positions.shape}"
        raise ValueError(must(here, "positions", rule, got))
    inv_freq = real_array(here, "inv_freq", inv_freq)
    check_one_axis(here, inv_freq)
    form = (*positions.shape[1:], inv_freq.size), dtype, tensor
    parts = _sections(here, sections, inv_freq.size, len(positions), interleaved)
    answers, tables = table_pair(here, out, *form)
    if any(np.may_share_memory(positions, table) for table in tables):
        positions = positions.copy()
    if any(np.may_share_memory(inv_freq, table) for table in tables):
        inv_freq = inv_freq.copy()
    for axis, pairs in parts:
        cos, sin = (table[..., pairs] for table in tables)
        fill_table(
            here,
            positions[axis, ...],
            inv_freq[pairs],
            attention_factor,
            angles,
            cos,
            sin,
        )
    tensors.mark_changed(*(out or ()))
    return answers


def rope_table_xpos(
    positions,
    inv_freq,
    *,
    keys=False,
    scale_base=512.0,
    reference=0.0,
    gamma=0.4,
    attention_factor=1.0,
    dtype=np.float32,
    out=None,
):
    """
    Tabulate the rotations of xPos, which also scale queries up and keys down.

    Scores then fall with the distance, fast pairs first. There is a table for queries
    and one for keys, each for `rope`.

    Parameters
    ----------
    positions : array_like or torch.Tensor, shape (...)
        Token positions: whole or fractional, of either sign.
    inv_freq : array_like or torch.Tensor, shape (M,)
        Radians per token of each pair, from `rope_inv_freq`.
    keys : bool, default False
        True for the table of the keys, whose scales are one over those of the queries.
    scale_base : float, default 512.0
        Tokens over which pair i shrinks to its ``zeta_i``: 1 in the paper's algorithm,
        512 in torchscale.
    reference : float, default 0.0
        Position of scale 1, the same for all calls whose keys and queries meet.
    gamma : float, default 0.4
        More makes the fast pairs shrink less: ``zeta_0 = gamma / (1 + gamma)``.
    attention_factor : float, default 1.0
        Multiplies cosines and sines.
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
        As `rope_table` does; also if a number is not positive where it must be, or a
        position so far from `reference` that its scale leaves the range of `dtype`.

    See Also
    --------
    rope_table : Without scales.

    Notes
    -----
    ``cos = zeta_i ** e * cos(position * inv_freq[i])``, and so the sine, with
    ``zeta_i = (i / M + gamma) / (1 + gamma)`` and
    ``e = (position - reference) / scale_base``, for keys -e. Float32 entries are within
    0.501 ulp of it, float64 entries within 1e-15 (1 + abs(e)) of their size.
    This is for causal attention: a key that comes after the query would grow.
    torchscale and others set the reference to the middle of each sequence, so that a
    cached key has another scale at the next step; scores are the same for any one
    reference. In float32 and with the other defaults a position may be 35694 from it.

    References
    ----------
    .. [1] Sun et al., "A Length-Extrapolatable Transformer", 2022, algorithm 1.
       https://arxiv.org/abs/2212.10554

    Examples
    --------
    The score of two tokens depends on their distance, and less on a longer one:

    >>> import numpy as np, posenc
    >>> inv_freq, _ = posenc.rope_inv_freq(64)
    >>> x = np.ones((2000, 64), np.float32)
    >>> q = posenc.rope(x, *posenc.rope_table_xpos(range(2000), inv_freq))
    >>> k = posenc.rope(x, *posenc.rope_table_xpos(range(2000), inv_freq, keys=True))
    >>> [round(float(q[m] @ k[n]), 3) for m, n in ((5, 5), (105, 5), (1905, 1805))]
    [64.0, 33.217, 33.217]
    """
    here = "rope_table_xpos"
    dtype = real_dtype(here, dtype)
    true_or_false(here, "keys", keys)
    scale_base = positive_number(here, "scale_base", scale_base)
    gamma = positive_number(here, "gamma", gamma)
    reference = real_number(here, "reference", reference)
    tensor = tensors.are_tensors(positions, inv_freq)
    positions = real_array(here, "positions", positions)
    inv_freq = real_array(here, "inv_freq", inv_freq)
    check_one_axis(here, inv_freq)
    zeta = (np.arange(inv_freq.size) / max(inv_freq.size, 1) + gamma) / (1 + gamma)
    with np.errstate(over="ignore"):
        power = positions - reference
    _stay_in_range(here, positions, power, reference, scale_base, zeta, dtype)
    shape = positions.shape + inv_freq.shape
    answers, tables = table_pair(here, out, shape, dtype, tensor)
    scales = _Scales(zeta, (-power if keys else power).reshape(-1), scale_base)
    # From here on `out` is written, which may lie in the memory of what was given.
    place, inv_freq = positions.flatten(), inv_freq.copy()
    options = inv_freq, attention_factor, "exact"
    with np.errstate(all="ignore"):
        made = [table if table.flags.c_contiguous else np.empty(shape, dtype)
                for table in tables]  # fmt: skip
        flat = [table.reshape(place.size, inv_freq.size) for table in made]
        n_row = max(_BLOCK // max(inv_freq.size, 1), 1)
        exact = np.empty((3, min(n_row, place.size), inv_freq.size))
        for start in range(0, place.size, n_row):
            block = slice(start, start + n_row)
            cos, sin, scale = exact[:, : place[block].size]
            fill_table(here, place[block], *options, cos, sin)
            scales.fill(block, scale)
            for table, part in zip(flat, (cos, sin), strict=True):
                part *= scale
                table[block] = part
        for table, own in zip(tables, made, strict=True):
            if own is not table:
                table[...] = own
    tensors.mark_changed(*(out or ()))
    return answers


class _Scales:
    """The scales of xPos, ``zeta ** (distance / scale_base)``.

    A distance is a multiple of 64 and a rest, and its scale the product of theirs: of
    many whole distances near each other only a few powers are computed.
    """

    def __init__(self, zeta, distances, scale_base):
        self.zeta, self.scale_base = zeta, scale_base
        self.low = np.fmod(distances, _STEP)
        self.high = distances - self.low
        self.powers = None
        if distances.size <= _STEP:
            return
        high, low = _Steps(self.high, _STEP), _Steps(self.low, 1)
        if high.are_all and low.are_all and high.n + low.n < distances.size:
            self.high, self.low = high.index, low.index
            self.powers = self._powers(high.values()), self._powers(low.values())

    def fill(self, rows, scale):
        """Write the scales of some of the distances."""
        if self.powers is None:
            np.multiply(
                self._powers(self.high[rows]), self._powers(self.low[rows]), out=scale
            )
            return
        high, low = self.powers
        np.take(high, self.high[rows], axis=0, out=scale, mode="clip")
        scale *= low[self.low[rows]]

    def _powers(self, distances):
        return self.zeta ** (distances / self.scale_base)[:, None]


class _Steps:
    """Numbers as steps from the least of them."""

    def __init__(self, numbers, step):
        self.least, self.step = numbers.min(initial=np.inf), step
        self.n = (numbers.max(initial=-np.inf) - self.least) / step + 1
        self.are_all = 0 < self.n < 2 * numbers.size + 2
        if self.are_all:
            self.index = ((numbers - self.least) / step).astype(np.intp)
            self.n = int(self.n)
            self.are_all = bool((self.values()[self.index] == numbers).all())

    def values(self):
        """Return all that there may be, in order."""
        return self.least + self.step * np.arange(self.n)


def _rows(function, positions, inv_freq, attention_factor, angles, dtype):
    """Return a new table."""
    shape = positions.shape + inv_freq.shape
    rows = np.empty(shape, dtype), np.empty(shape, dtype)
    fill_table(function, positions, inv_freq, attention_factor, angles, *rows)
    return rows


def _sections(function, sections, n_pair, n_axis, interleaved):
    """Return pairs of an axis and the slice that it fills, later ones on top."""
    if not isinstance(sections, tuple | list):
        rule = "be a list with the number of pairs of each section"
        raise TypeError(must(function, "sections", rule, repr(sections)))
    sizes = [
        whole_number(function, f"sections[{number}]", size, 0)
        for number, size in enumerate(sections)
    ]
    if sum(sizes) != n_pair:
        rule = f"add up to the {n_pair} pairs of inv_freq"
        raise ValueError(must(function, "sections", rule, f"{sizes}"))
    if not interleaved:
        ends = np.cumsum([0, *sizes]).tolist()
        return [
            (number % n_axis, slice(ends[number], ends[number + 1]))
            for number in range(len(sizes))
        ]
    if len(sizes) != n_axis:
        rule = f"have one number for each of {n_axis} axes when interleaved"
        raise ValueError(must(function, "sections", rule, f"{sizes}"))
    parts = [(0, slice(0, n_pair))]
    for axis, size in enumerate(sizes[1:], 1):
        if size and axis + (size - 1) * n_axis >= n_pair:
            rule = f"hold at most {len(range(axis, n_pair, n_axis))} when interleaved"
            raise ValueError(must(function, f"sections[{axis}]", rule, size))
        parts.append((axis, slice(axis, size * n_axis, n_axis)))
    return parts


def _stay_in_range(function, positions, distances, reference, scale_base, zeta, dtype):
    """Raise if the scale of a position is too large or too small for a dtype."""
    if not zeta.size or not distances.size:
        return
    most = np.finfo(dtype).maxexp - 2.0
    steepest = -float(np.log2(zeta[0]))
    far = np.argmax(np.abs(distances))  # a NaN, if there is one
    if not abs(float(distances.flat[far])) * steepest <= most * scale_base:
        limit = f"{most * scale_base / steepest:.0f}" if steepest else "a finite number"
        rule = f"lie within {limit} of the reference {reference:g} in {dtype}"
        raise ValueError(must(function, "positions", rule, positions.flat[far]))
