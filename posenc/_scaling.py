"""Frequencies of RoPE, and their scalings: one function per ``rope_type``."""

# SPDX-License-Identifier: BSD-3-Clause
from collections.abc import Mapping

import numpy as np

from ._check import must, real_dtype, real_number, whole_number

_HERE = "rope_inv_freq"


def _default(dim, theta, dtype):
    """Return theta ** (-2 i / dim) for each pair i, in the arithmetic of `dtype`."""
    exponent = np.arange(0, dim, 2, dtype=dtype) / dtype.type(dim)
    # The power is taken in float64 and rounded: the float32 nearest to it is what
    # a good float32 power gives, whatever library computes it.
    base = np.float64(dtype.type(theta))
    power = np.power(base, exponent.astype(np.float64)).astype(dtype)
    return dtype.type(1) / power


def _from_default(scaling, dim, theta, dtype):
    return _default(dim, theta, dtype), 1.0


def _from_linear(scaling, dim, theta, dtype):
    factor = _option(scaling, "factor")
    return _default(dim, theta, dtype) / dtype.type(factor), 1.0


def _from_ntk(scaling, dim, theta, dtype):
    return _default(dim, ntk_theta(dim, theta, _option(scaling, "alpha")), dtype), 1.0


def ntk_theta(dim, theta, alpha):
    """Return the base that stretches the slowest pair of `dim` by `alpha`."""
    if dim < 4:
        rule = "be at least 4 for rope_type 'ntk'"
        raise ValueError(must(_HERE, "dim", rule, dim))
    try:
        return theta * alpha ** (dim / (dim - 2))
    except OverflowError:
        rule = f"leave theta * alpha ** (dim / (dim - 2)) finite for dim {dim}"
        raise ValueError(must(_HERE, "scaling['alpha']", rule, alpha)) from None


# What this package can compute by itself, by the name transformers gives it; ntk
# and its alpha are ours.
ROPE_TYPES = {"default": _from_default, "linear": _from_linear, "ntk": _from_ntk}


def _option(scaling, key):
    """Return a required number >= 1 of a scaling dict."""
    name = f"scaling[{key!r}]"
    if scaling.get(key) is None:
        rule = f"be given for rope_type {rope_type_of(scaling)!r}"
        raise ValueError(must(_HERE, name, rule, repr(dict(scaling))))
    return real_number(
        _HERE, name, scaling[key], "be a number of at least 1", lambda value: value >= 1
    )


def rope_type_of(scaling):
    """Return the rope type of a scaling dict, in the old or the new spelling."""
    return scaling.get("rope_type", scaling.get("type", "default"))


def rope_inv_freq(dim, *, theta=10000.0, scaling=None, seq_len=None, dtype=np.float64):
    """
    Return the angular speed of each channel pair, after scaling.

    Pair ``i`` of `dim` channels turns by ``theta ** (-2 * i / dim)`` radians per
    token; a scaling slows pairs down so that a model can read further than it was
    trained to.

    Parameters
    ----------
    dim : int
        Number of rotated channels, even (all of head_dim, or its rotary part).
    theta : float, default 10000.0
        Base of the geometric series, ``rope_theta`` of a model's config. More
        than 1.
    scaling : dict, optional
        A ``rope_parameters`` or ``rope_scaling`` dict of transformers. Its
        ``'rope_type'`` (or ``'type'``, the old spelling) is one of

        - ``'default'``: no scaling;
        - ``'linear'``: position interpolation, every pair slowed down by
          ``'factor'`` >= 1;
        - ``'ntk'``: a larger base, ``theta * alpha ** (dim / (dim - 2))``, with
          ``'alpha'`` >= 1: the fastest pair keeps its speed, the slowest is slowed
          down by ``alpha``. Not known to transformers by this name.

        A ``'rope_theta'`` in it takes the place of `theta`; keys that the type does
        not use are ignored.
    seq_len : int, optional
        Length of the sequence, for types that depend on it. None of these does.
    dtype : dtype, default float64
        Either float64, or float32 for the recipe of transformers: exponents, powers and
        quotients each rounded to float32.

    Returns
    -------
    inv_freq : ndarray, shape (dim // 2,)
        Radians per token, in `dtype`.
    attention_factor : float
        What cosines and sines are to be multiplied by; 1.0 for these types.

    Raises
    ------
    TypeError
        If a parameter is of the wrong kind.
    ValueError
        If `dim` is odd or less than 2 (4 for ``'ntk'``), `theta` is not more than
        1, the type is unknown, or a number that it needs is missing or below 1.

    See Also
    --------
    rope_table : Cosines and sines from these frequencies.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 15. https://arxiv.org/abs/2104.09864
    .. [2] Chen et al., "Extending Context Window of Large Language Models via
       Positional Interpolation", 2023, eq. 4. https://arxiv.org/abs/2306.15595
    .. [3] Peng et al., "YaRN: Efficient Context Window Extension of Large Language
       Models", 2023, definition 1 ("NTK-aware" interpolation).
       https://arxiv.org/abs/2309.00071

    Examples
    --------
    >>> import posenc
    >>> inv_freq, attention_factor = posenc.rope_inv_freq(8)
    >>> inv_freq
    array([1.   , 0.1  , 0.01 , 0.001])
    >>> slower, _ = posenc.rope_inv_freq(8, scaling={"rope_type": "ntk", "alpha": 8})
    >>> (inv_freq / slower).round(3)
    array([1., 2., 4., 8.])
    """
    dim = whole_number(_HERE, "dim", dim, 2)
    if dim % 2:
        raise ValueError(must(_HERE, "dim", "be even", dim))
    if seq_len is not None:
        whole_number(_HERE, "seq_len", seq_len, 1)
    dtype = real_dtype(_HERE, dtype)
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, Mapping):
        raise TypeError(must(_HERE, "scaling", "be a dict", repr(scaling)))
    is_named = "rope_type" in scaling or "type" in scaling
    if not is_named and ("factor" in scaling or "alpha" in scaling):
        raise ValueError(must(_HERE, "scaling", "name its 'rope_type'", repr(scaling)))
    if scaling.get("rope_theta") is not None:
        theta, name = scaling["rope_theta"], "scaling['rope_theta']"
    else:
        name = "theta"
    rule = "be a number of more than 1"
    theta = real_number(_HERE, name, theta, rule, lambda value: value > 1)
    rope_type = rope_type_of(scaling)
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        rule = f"be one of {', '.join(map(repr, ROPE_TYPES))}"
        name = "scaling['rope_type']"
        raise ValueError(must(_HERE, name, rule, repr(rope_type)))
    with np.errstate(all="ignore"):  # what float32 cannot hold becomes inf or 0
        return ROPE_TYPES[rope_type](scaling, dim, theta, dtype)
