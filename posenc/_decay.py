"""Decay over distance, periods and wavelengths: what frequencies do to a model."""

# SPDX-License-Identifier: BSD-3-Clause
import math

import numpy as np

from . import _core
from . import _tensors as tensors
from ._bias_spread import leading_axes, positions_of
from ._check import (
    must,
    positive_number,
    real_array,
    real_dtype,
    real_number,
    whole_number,
)
from ._results import table_result
from ._scaling import checked_frequencies
from ._sinusoidal import sinusoidal


def rope_decay(distance, inv_freq, *, dtype=np.float64, out=None):
    """
    Sum the cosines of all channel pairs: the logit that RoPE leaves at a distance.

    It is the product of a query of ones and a key of ones so many tokens apart: at most
    their number of channels; with distance it falls, though it oscillates.

    Parameters
    ----------
    distance : array_like or torch.Tensor, shape (...)
        Position of the query minus that of the key, in tokens: whole or fractional, of
        either sign.
    inv_freq : array_like or torch.Tensor, shape (M,)
        Radians per token of each pair, from `rope_inv_freq`.
    dtype : dtype, default float64
        Either float32 or float64, of NumPy or torch.
    out : ndarray or torch.Tensor, shape (...), optional
        Where the sums go, of that dtype and of the kind of the result.

    Returns
    -------
    ndarray or torch.Tensor, shape (...)
        ``2 * sum(cos(distance * inv_freq))``, at distance 0 the number of channels;
        `out` if it was given. A tensor if an argument is one.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, `inv_freq` has not one axis, or `out` does
        not fit.

    See Also
    --------
    rope_period : How far the decay can reach.
    sinusoidal_similarity : The same of sinusoidal tables.

    Notes
    -----
    The angles are exact, as in `rope_table`. A sum is within ``M * 2**-48`` of the true
    one for every finite distance, before it is rounded to float32 if that is asked for,
    and depends on its own distance only, not on the sign. An infinite or NaN number
    gives NaN.

    Whole distances near each other are fastest: they share cosines and sines.

    The paper groups the product of a query and a key by pairs (eq. 35) and bounds it by
    the partial sums of ``exp(1j * distance * inv_freq)`` (eq. 37); twice the real part
    of the last of these is what is summed here. An attention factor would multiply it
    by its square.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, section 3.4.3. https://arxiv.org/abs/2104.09864

    Examples
    --------
    >>> import posenc
    >>> inv_freq, _ = posenc.rope_inv_freq(128)
    >>> posenc.rope_decay([0, 1, 10, 100, 1000], inv_freq).round(2)
    array([128.  , 124.19,  85.64,  61.09,  20.36])

    A larger base decays more slowly:

    >>> inv_freq, _ = posenc.rope_inv_freq(128, theta=500000.0)
    >>> posenc.rope_decay([0, 1, 10, 100, 1000], inv_freq).round(2)
    array([128.  , 125.17,  97.82,  78.21,  63.01])
    """
    here = "rope_decay"
    dtype = real_dtype(here, dtype)
    tensor = tensors.are_tensors(distance, inv_freq)
    distance = real_array(here, "distance", distance)
    inv_freq = _one_axis(here, inv_freq)
    answer, result = table_result(here, "out", out, distance.shape, dtype, tensor)
    _core.rope_decay(distance, inv_freq, dtype=dtype, out=result)
    tensors.mark_changed(out)
    return answer


def sinusoidal_similarity(
    positions_a, positions_b, dim, *, theta=10000.0, dtype=np.float64, out=None
):
    """
    Multiply the sinusoidal rows of positions with those of others.

    Parameters
    ----------
    positions_a, positions_b : array_like or torch.Tensor, shape (..., A), (..., B)
        Positions in tokens, whole or fractional, of either sign. Leading axes are
        batches, which broadcast.
    dim : int
        Channels of a row. Of an odd number the last one is 0.
    theta : float, default 10000.0
        Base of the frequencies.
    dtype : dtype, default float64
        Either float32 or float64, of NumPy or torch.
    out : ndarray or torch.Tensor, shape (..., A, B), optional
        Where the products go, of that dtype and of the kind of the result.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., A, B)
        ``sinusoidal(positions_a, dim) @ sinusoidal(positions_b, dim).mT``, computed in
        float64, the same for any layout; `out` if it was given. A tensor if a position
        array is one.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of its range, positions have no axis
        or leading axes that do not broadcast, or `out` does not fit.

    See Also
    --------
    sinusoidal : The rows.
    rope_decay : The same of RoPE, twice as much for the same frequencies.

    Notes
    -----
    The product depends on the distance only: it is ``sum(cos((a - b) * f_i))`` with the
    frequencies ``f_i`` of `sinusoidal`, so at most ``dim // 2``, which rows have with
    themselves. It oscillates and decays as the distance grows.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
       https://arxiv.org/abs/1706.03762

    Examples
    --------
    >>> import posenc
    >>> posenc.sinusoidal_similarity([0, 5], [0, 1, 10, 100], 64).round(2)
    array([[32.  , 30.92, 21.05, 17.87],
           [23.5 , 23.93, 23.5 , 11.64]])
    """
    here = "sinusoidal_similarity"
    dim = whole_number(here, "dim", dim, 0)
    theta = positive_number(here, "theta", theta)
    dtype = real_dtype(here, dtype)
    tensor = tensors.are_tensors(positions_a, positions_b)
    a = positions_of(here, "positions_a", positions_a)
    b = positions_of(here, "positions_b", positions_b)
    lead = leading_axes(here, "positions_b", a.shape, b.shape)
    shape = (*lead, a.shape[-1], b.shape[-1])
    answer, result = table_result(here, "out", out, shape, dtype, tensor)
    rows = others = sinusoidal(a, dim, theta=theta, dtype=np.float64)
    if not np.array_equal(a, b):  # of equal ones a product takes half of the time
        others = sinusoidal(b, dim, theta=theta, dtype=np.float64)
    with np.errstate(all="ignore"):
        result[...] = rows @ others.mT
    tensors.mark_changed(out)
    return answer


def rope_period(dim, theta=10000.0, *, scaling=None, seq_len=None):
    """
    Return the longest period of RoPE: tokens until its slowest pair has turned once.

    Within about a quarter of it `rope_decay` decays, though it oscillates; past it even
    the slowest pair has come round, and distances begin to look like shorter ones.

    Parameters
    ----------
    dim : int
        Number of rotated channels, even.
    theta : float, default 10000.0
        Base of the geometric series. More than 1.
    scaling, seq_len : optional
        As in `rope_inv_freq`.

    Returns
    -------
    float
        In tokens: ``2 * pi * theta ** (1 - 2 / dim)`` without scaling. Infinite if a
        pair does not turn, as ``'proportional'`` has them.

    Raises
    ------
    TypeError, ValueError
        As `rope_inv_freq` does.

    See Also
    --------
    wavelengths : The periods of all pairs.

    Notes
    -----
    ``'linear'`` makes it ``factor`` times as long, and so do ``'yarn'``,
    ``'ntk_by_parts'`` and ``'llama3'`` where the slowest pair is one that they slow
    down fully; ``'ntk'`` makes it ``alpha`` times as long.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 15 and section 3.4.3. https://arxiv.org/abs/2104.09864
    .. [2] Peng et al., "YaRN: Efficient Context Window Extension of Large Language
       Models", 2023, eq. 13. https://arxiv.org/abs/2309.00071

    Examples
    --------
    >>> import posenc
    >>> [round(posenc.rope_period(dim)) for dim in (4, 128, 256, 4096)]
    [628, 54410, 58470, 62550]
    >>> round(posenc.rope_period(128, 500000.0))
    2559196
    >>> ntk = {"rope_type": "ntk", "alpha": 8}
    >>> round(posenc.rope_period(128, scaling=ntk) / posenc.rope_period(128), 6)
    8.0
    """
    here = "rope_period"
    inv_freq, _ = checked_frequencies(here, dim, theta, scaling, seq_len, np.float64)
    return float(_wavelengths(inv_freq).max())


def wavelengths(inv_freq):
    """
    Return the tokens that each channel pair takes for one turn.

    Parameters
    ----------
    inv_freq : array_like or torch.Tensor, shape (M,)
        Radians per token of each pair, from `rope_inv_freq`, which scales them.

    Returns
    -------
    ndarray or torch.Tensor, shape (M,)
        ``2 * pi / abs(inv_freq)`` in float64, infinite for a pair that does not turn. A
        tensor if `inv_freq` is one.

    Raises
    ------
    TypeError, ValueError
        If `inv_freq` is of the wrong kind or has not one axis.

    See Also
    --------
    complete_turns : How many of them are within a length.
    rope_period : The longest of them.

    References
    ----------
    .. [1] Peng et al., "YaRN: Efficient Context Window Extension of Large Language
       Models", 2023, eq. 13. https://arxiv.org/abs/2309.00071

    Examples
    --------
    >>> import posenc
    >>> inv_freq, _ = posenc.rope_inv_freq(8)
    >>> posenc.wavelengths(inv_freq).round(1)
    array([   6.3,   62.8,  628.3, 6283.2])

    Linear interpolation stretches all of them by its factor, NTK the slow ones most,
    YaRN only those that turn too seldom in the trained length:

    >>> for scaling in ({"rope_type": "linear", "factor": 4},
    ...                 {"rope_type": "ntk", "alpha": 4},
    ...                 {"rope_type": "yarn", "factor": 4,
    ...                  "original_max_position_embeddings": 4096}):
    ...     inv_freq, _ = posenc.rope_inv_freq(8, scaling=scaling)
    ...     print(posenc.wavelengths(inv_freq).round().astype(int))
    [   25   251  2513 25133]
    [    6   100  1583 25133]
    [    6    63  1005 25133]
    """
    here = "wavelengths"
    tensor = tensors.is_tensor(inv_freq)
    inv_freq = _one_axis(here, inv_freq)
    form = inv_freq.shape, np.dtype(np.float64), tensor
    answer, result = table_result(here, "out", None, *form)
    result[...] = _wavelengths(inv_freq)
    return answer


def complete_turns(inv_freq, length):
    """
    Count the channel pairs that complete a turn within a length.

    The others, while a model is trained at this length, meet only a part of the angles
    there are; further tokens bring new ones.

    Parameters
    ----------
    inv_freq : array_like or torch.Tensor, shape (M,)
        Radians per token of each pair, from `rope_inv_freq`, which scales them.
    length : float
        In tokens, such as the trained length of a model; not negative.

    Returns
    -------
    int
        How many `wavelengths` are at most `length`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, `inv_freq` has not one axis, or `length` is
        negative or not finite.

    See Also
    --------
    wavelengths : What is compared.

    References
    ----------
    .. [1] Peng et al., "YaRN: Efficient Context Window Extension of Large Language
       Models", 2023, section 3.2. https://arxiv.org/abs/2309.00071

    Examples
    --------
    Of the 64 pairs of Llama 2, trained with 4096 tokens, 46 turn at least once; after
    linear interpolation to 16384 tokens, no more than 46 do in all of these:

    >>> import posenc
    >>> inv_freq, _ = posenc.rope_inv_freq(128)
    >>> posenc.complete_turns(inv_freq, 4096)
    46
    >>> linear = {"rope_type": "linear", "factor": 4}
    >>> slower, _ = posenc.rope_inv_freq(128, scaling=linear)
    >>> [posenc.complete_turns(slower, length) for length in (4096, 16384)]
    [36, 46]
    """
    here = "complete_turns"
    inv_freq = _one_axis(here, inv_freq)
    rule = "be a finite number of at least 0"
    length = real_number(here, "length", length, rule, lambda value: value >= 0)
    return int(np.count_nonzero(_wavelengths(inv_freq) <= length))


def _one_axis(function, inv_freq):
    """Return frequencies in float64; raise unless they have one axis."""
    inv_freq = real_array(function, "inv_freq", inv_freq)
    if inv_freq.ndim != 1:
        got = f"shape {inv_freq.shape}"
        raise ValueError(must(function, "inv_freq", "have one axis", got))
    return inv_freq


def _wavelengths(inv_freq):
    """Return tokens per turn; infinity for pairs that do not turn."""
    with np.errstate(all="ignore"):
        return 2 * math.pi / np.abs(inv_freq)
