"""Sinusoidal tables: sines and cosines of positions, alone or added to data."""

# SPDX-License-Identifier: BSD-3-Clause
import decimal
import functools

import numpy as np

from . import _core
from . import _tensors as tensors
from ._check import (
    as_array,
    must,
    one_of,
    positive_number,
    real_array,
    real_dtype,
    real_number,
    true_or_false,
    whole_number,
)
from ._results import share_memory, table_result
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

# The raw gufuncs by layout.
LAYOUTS = {
    "interleaved": _core.add_sinusoidal_interleaved,
    "concat": _core.add_sinusoidal_concat,
    "concat_flipped": _core.add_sinusoidal_concat_flipped,
}
INDEXINGS = ("xy", "ij")

# Of dim, theta, layout and downscale_freq_shift, which can then be looked up.
_USUAL_TYPES = int, float, str, float

# Digits for frequencies: after all products still more than two doubles have.
_CONTEXT = decimal.Context(60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])


def sinusoidal(
    positions,
    dim,
    *,
    theta=10000.0,
    layout="interleaved",
    flip_sin_to_cos=False,
    downscale_freq_shift=0.0,
    scale=1.0,
    dtype=np.float32,
    out=None,
):
    """
    Tabulate sines and cosines of positions at geometrically falling frequencies.

    An entry depends on its own position and frequency only, so tables made in pieces
    agree bit for bit.

    Parameters
    ----------
    positions : array_like or torch.Tensor, shape (...)
        Token positions or time-steps: whole or fractional, of either sign.
    dim : int
        Channels. Of an odd number the last one is 0.
    theta : float, default 10000.0
        Base of the frequencies: ``max_period`` of diffusion models.
    layout : {'interleaved', 'concat', 'concat_flipped'}, default 'interleaved'
        Where sines and cosines go: sines at even and cosines at odd channels, as in the
        paper; all sines before all cosines, as in tensor2tensor, fairseq and MAE; or
        all cosines before all sines.
    flip_sin_to_cos : bool, default False
        Let sines and cosines change places. ``'concat'`` then is ``'concat_flipped'``,
        as diffusers has it.
    downscale_freq_shift : float, default 0.0
        Frequencies are ``theta ** (-i / (dim // 2 - downscale_freq_shift))``: 0 gives
        those of the paper, 1 those of tensor2tensor and fairseq, whose slowest is
        ``1 / theta``; it is the default of diffusers.
    scale : float, default 1.0
        Multiplies positions, as ``scale`` of diffusers does.
    dtype : dtype, default float32
        Either float32 or float64, of NumPy or torch.
    out : ndarray or torch.Tensor, shape (..., dim), optional
        Where the table goes, of that dtype and of the kind of `positions`.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., dim)
        The table; `out` if it was given. A tensor if `positions` is one.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, out of its range or unknown, or `out` does
        not fit.

    See Also
    --------
    add_sinusoidal : Add it to data without making it.
    sinusoidal_grid : Positions on a grid of several axes, such as patches of images.

    Notes
    -----
    ``PE[p, 2i] = sin(p * f_i)`` and ``PE[p, 2i + 1] = cos(p * f_i)``, where ``f_i`` is
    the double nearest to ``scale * theta ** (-i / (dim // 2 - downscale_freq_shift))``.
    For these doubles float32 entries are within 0.501 ulp and float64 ones within 1
    ulp, for every finite float64 position and also where the value is next to zero.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
       https://arxiv.org/abs/1706.03762
    .. [2] Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", 2020, whose
       time-steps are encoded so. https://arxiv.org/abs/2006.11239

    Examples
    --------
    Six tokens and four channels, with base 10000:

    >>> import posenc
    >>> posenc.sinusoidal(range(6), 4).round(4)
    array([[ 0.    ,  1.    ,  0.    ,  1.    ],
           [ 0.8415,  0.5403,  0.01  ,  1.    ],
           [ 0.9093, -0.4161,  0.02  ,  0.9998],
           [ 0.1411, -0.99  ,  0.03  ,  0.9996],
           [-0.7568, -0.6536,  0.04  ,  0.9992],
           [-0.9589,  0.2837,  0.05  ,  0.9988]], dtype=float32)

    Two time-steps of a diffusion model:

    >>> posenc.sinusoidal([0, 12.5], 4, layout="concat", flip_sin_to_cos=True).round(4)
    array([[ 1.    ,  1.    ,  0.    ,  0.    ],
           [ 0.9978,  0.9922, -0.0663,  0.1247]], dtype=float32)
    """
    here = "sinusoidal"
    dtype = real_dtype(here, dtype)
    tensor = tensors.is_tensor(positions)
    table = _Table.checked(
        here, dim, theta, layout, downscale_freq_shift, scale, flip_sin_to_cos
    )
    positions = real_array(here, "positions", positions)
    shape = (*positions.shape, table.dim)
    answer, result = table_result(here, "out", out, shape, dtype, tensor)
    table.fill(positions, result)
    tensors.mark_changed(out)
    return answer


def sinusoidal_grid(
    shape,
    dim,
    *,
    theta=10000.0,
    layout="concat",
    indexing="xy",
    dtype=np.float32,
    out=None,
):
    """
    Tabulate the positions of a grid: each axis has its share of the channels.

    With two axes this is the table of MAE and of vision transformers.

    Parameters
    ----------
    shape : sequence of int, array_like or torch.Tensor
        For each axis its size, or its positions, shape (n,), which may be fractional.
    dim : int
        Channels, a multiple of twice the number of axes.
    theta : float, default 10000.0
        Base of the frequencies.
    layout : {'concat', 'interleaved', 'concat_flipped'}, default 'concat'
        Where sines and cosines go within the share of an axis, as in `sinusoidal`.
    indexing : {'xy', 'ij'}, default 'xy'
        Whose channels come first: those of the last axis, x, as in MAE, or those of the
        first axis.
    dtype : dtype, default float32
        Either float32 or float64, of NumPy or torch.
    out : ndarray or torch.Tensor, shape (..., dim), optional
        Where the table goes, of that dtype and of the kind of the result.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., dim)
        The table, with an axis for each of the grid; `out` if it was given. A tensor if
        positions of an axis are one. Models that number patches row by row want it as
        ``table.reshape(-1, dim)``.

    Raises
    ------
    TypeError, ValueError
        As `sinusoidal` does; also if `shape` is empty or `dim` does not divide.

    See Also
    --------
    sinusoidal : One axis.

    References
    ----------
    .. [1] He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021.
       https://arxiv.org/abs/2111.06377

    Examples
    --------
    Two rows of three patches, and one of them: its x, then its y:

    >>> import posenc
    >>> table = posenc.sinusoidal_grid((2, 3), 4)
    >>> table.shape
    (2, 3, 4)
    >>> table[1, 2].round(2)
    array([ 0.91, -0.42,  0.84,  0.54], dtype=float32)
    """
    here = "sinusoidal_grid"
    dtype = real_dtype(here, dtype)
    one_of(here, "indexing", indexing, INDEXINGS)
    axes = grid_axes(here, shape)
    n_axis, tensor = len(axes), tensors.are_tensors(*shape)
    dim = whole_number(here, "dim", dim, 1)
    if dim % (2 * n_axis):
        rule = f"be a multiple of {2 * n_axis}, for {n_axis} axes"
        raise ValueError(must(here, "dim", rule, dim))
    share = dim // n_axis
    table = _Table.checked(here, share, theta, layout)
    sizes = tuple(axis.size for axis in axes)
    answer, result = table_result(here, "out", out, (*sizes, dim), dtype, tensor)
    for number, axis in enumerate(axes):
        rows = np.empty((axis.size, share), dtype)
        table.fill(axis, rows)
        place = n_axis - 1 - number if indexing == "xy" else number
        rows = rows.reshape((axis.size, *(1,) * (n_axis - 1 - number), share))
        result[..., place * share : (place + 1) * share] = rows
    tensors.mark_changed(out)
    return answer


def add_sinusoidal(
    x,
    *,
    scale=1.0,
    positions=None,
    offset=None,
    cu_seqlens=None,
    padding_mask=None,
    theta=10000.0,
    layout="interleaved",
    downscale_freq_shift=0.0,
    out=None,
):
    """
    Scale data and add the sinusoidal table of their positions, in one pass.

    The table is never in memory as a whole.

    Parameters
    ----------
    x : array_like or torch.Tensor, shape (..., T, dim)
        Token embeddings, float16, bfloat16 (of ml_dtypes, in NumPy), float32 or
        float64, in any memory layout; integers count as float64. A tensor is a plain
        one on the CPU that needs no gradient.
    scale : float, default 1.0
        Multiplies x, such as ``dim ** 0.5``, so that embeddings count for more.
    positions : array_like or torch.Tensor, shape (T,), (B, T) or as x, optional
        Position of each token: whole or fractional, of either sign. Shapes of more axes
        broadcast with x's but its last. Without it, tokens stand at 0, 1, 2, ...
    offset : int or array_like of int, shape (B,), optional
        Position of the first token, of all sequences or of each.
    cu_seqlens : array_like of int, shape (N + 1,), optional
        N sequences of different lengths lie packed along T, sequence i from
        ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``: each begins at position 0, or at
        `offset`, which may then have shape (N,).
    padding_mask : array_like of bool, shape (T,), (B, T) or as x, optional
        True where a token is padding: its result is zero.
    theta, layout, downscale_freq_shift : optional
        As in `sinusoidal`.
    out : ndarray or torch.Tensor, shape (..., T, dim), optional
        Where the result goes: of x's kind and of the result's dtype. It may be x
        itself; any other overlap is handled.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., T, dim)
        ``x * scale + table``, of x's kind, dtype and memory order; `out` if it was
        given. 16-bit data are computed in float32 and rounded once. Dask arrays go
        through the gufunc.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient
        (`posenc.torch.add_sinusoidal` gives it) or is no plain CPU tensor.
    ValueError
        If shapes do not fit, `layout` is unknown or positions are given in two ways.
        Nothing has been written.

    See Also
    --------
    sinusoidal : The table.
    add_learned : The same for a learned table.

    Notes
    -----
    Product and sum are each rounded to the type that is computed in; the table is that
    of `sinusoidal`. Positions of padding are not looked at. With padding on the left
    that is not to count, ``positions=(~padding_mask).cumsum(-1) - 1``.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
       https://arxiv.org/abs/1706.03762

    Examples
    --------
    >>> import numpy as np, posenc
    >>> x = np.full((2, 3, 4), 0.5, np.float32)
    >>> mask = [[False, False, False], [False, False, True]]
    >>> y = posenc.add_sinusoidal(x, scale=2.0, padding_mask=mask)
    >>> y[1].round(2)
    array([[1.  , 2.  , 1.  , 2.  ],
           [1.84, 1.54, 1.01, 2.  ],
           [0.  , 0.  , 0.  , 0.  ]], dtype=float32)

    The next token of each sequence, of which one had three before it and one two:

    >>> step = posenc.add_sinusoidal(x[:, :1], scale=2.0, offset=[2, 1])
    >>> bool((step[:, 0] == [y[0, 2], y[1, 1]]).all())
    True
    """
    here = "add_sinusoidal"
    places = positions, offset, cu_seqlens, padding_mask
    form = _known_form(getattr(x, "shape", ()), theta, layout, downscale_freq_shift)
    if form is not None:
        door = _core.add_sinusoidal_arrays
        answer = by_fast_door(door, x, form, scale, places, out)
        if answer is not NotImplemented:
            return answer
    scale = real_number(here, "scale", scale)
    array = data_array(here, x)
    lead = array.shape[:-1]
    table = _Table.checked(here, array.shape[-1], theta, layout, downscale_freq_shift)
    refuse_both(here, positions, offset, cu_seqlens)
    if positions is None:
        positions = counted(here, lead, offset, cu_seqlens)
        positions = real_array(here, "offset", positions)
    else:
        positions = real_array(here, "positions", positions)
    positions = one_per_row(here, "positions", positions, lead)
    mask = padding(here, padding_mask, lead)
    if not isinstance(array, np.ndarray):
        # In chunks as those of the data.
        positions = np.zeros_like(array[..., 0], dtype=np.float64) + positions
        return add_lazily(
            here,
            array,
            np.float32,
            lambda _: (positions, table.inv_freq),
            mask,
            scale,
            out,
            LAYOUTS[layout],
        )
    with np.errstate(all="ignore"):
        total = Sum(here, x, array, np.float32, out)
        positions = np.require(positions, np.float64, "A")
        given = [positions] if mask is None else [positions, mask]
        door = _core.add_sinusoidal_arrays
        return total.add(door, table.form, positions, mask, scale, given)


def grid_axes(function, shape):
    """Return the positions along each axis of a grid."""
    if not isinstance(shape, tuple | list) or not shape:
        rule = "be a tuple with the size or the positions of at least one axis"
        raise TypeError(must(function, "shape", rule, repr(shape)))
    axes = []
    for number, axis in enumerate(shape):
        name = f"shape[{number}]"
        if as_array(function, name, axis).ndim == 0:
            positions = np.arange(float(whole_number(function, name, axis, 0)))
        else:
            positions = np.array(real_array(function, name, axis))  # not in `out`
        if positions.ndim != 1:
            got = f"shape {positions.shape}"
            raise ValueError(must(function, name, "have one axis", got))
        axes.append(positions)
    return axes


class _Table:
    """A checked table, yet without positions."""

    def __init__(self, dim, inv_freq, layout, flip):
        self.dim, self.inv_freq = dim, inv_freq
        self.interleaved = layout == "interleaved"
        self.cos_first = flip != (layout == "concat_flipped")

    @classmethod
    def checked(cls, function, dim, theta, layout, shift=0.0, scale=1.0, flip=False):
        """Return the table of these arguments of a function."""
        dim = whole_number(function, "dim", dim, 0)
        one_of(function, "layout", layout, LAYOUTS)
        true_or_false(function, "flip_sin_to_cos", flip)
        if flip and layout == "concat_flipped":
            rule = "be False with layout 'concat_flipped'"
            raise ValueError(must(function, "flip_sin_to_cos", rule, True))
        theta = positive_number(function, "theta", theta)
        scale = real_number(function, "scale", scale)
        n_pair = dim // 2
        shift = real_number(function, "downscale_freq_shift", shift)
        if n_pair > 1 and shift >= n_pair:
            rule = f"be less than dim // 2 = {n_pair}"
            raise ValueError(must(function, "downscale_freq_shift", rule, shift))
        return cls(dim, _frequencies(n_pair, theta, shift, scale), layout, flip)

    def fill(self, positions, result):
        """Write the rows of positions, (...), to an array, (..., dim)."""
        target = result
        misfits = not result.flags.aligned or not result.dtype.isnative
        if misfits or share_memory(positions, result):
            target = np.empty(result.shape, result.dtype.newbyteorder("="))
        positions = np.require(positions, np.float64, "A")
        target[..., self.dim - self.dim % 2 :] = 0
        _core.sinusoidal_arrays(
            positions, self.inv_freq, self.interleaved, self.cos_first, target
        )
        if target is not result:
            result[...] = target

    @property
    def form(self):
        """What the fast functions take of it."""
        return self.inv_freq, self.interleaved, self.cos_first


def _known_form(shape, theta, layout, shift):
    """Return the form of a table whose arguments are of the usual types, or None."""
    dim = shape[-1] if len(shape) > 1 else None
    if (type(dim), type(theta), type(layout), type(shift)) != _USUAL_TYPES:
        return None
    return _form(dim, theta, layout, shift)


@functools.lru_cache(maxsize=64)
def _form(dim, theta, layout, shift):
    return _Table.checked("add_sinusoidal", dim, theta, layout, shift).form


@functools.lru_cache(maxsize=64)
def _frequencies(n_pair, theta, shift, scale):
    """Return scale * theta ** (-i / (n_pair - shift)), the doubles nearest to it."""
    with decimal.localcontext(_CONTEXT):
        power, ratio = decimal.Decimal(scale), decimal.Decimal(1)
        if n_pair > 1:
            steps = n_pair - decimal.Decimal(shift)
            ratio = (-decimal.Decimal(theta).ln() / steps).exp()
        inv_freq = np.empty(n_pair)
        for i in range(n_pair):
            inv_freq[i] = float(power)
            power *= ratio
    inv_freq.flags.writeable = False
    return inv_freq
