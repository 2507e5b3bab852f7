"""Frequencies of RoPE, and their scalings: one function per ``rope_type``."""

# SPDX-License-Identifier: BSD-3-Clause
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ._check import must, real_dtype, real_number, whole_number
from ._scaling_check import (
    LENGTH,
    MAX_LENGTH,
    TELLING,
    betas,
    extension_factor,
    number_of,
    read_scaling,
    trained_length,
)


class Rotation(NamedTuple):
    """What a scaling scales, and the name of the function that words its errors."""

    function: str
    dim: int
    theta: float
    seq_len: int | None
    dtype: np.dtype

    def number(self, value):
        """Return a number in the arithmetic of the frequencies."""
        return self.dtype.type(value)

    def powers(self, n_pair):
        """Return theta ** (2 i / dim) for the first pairs i."""
        index = np.arange(0, 2 * n_pair, 2, dtype=self.dtype)
        exponent = index / self.number(self.dim)
        # The power is taken in float64 and rounded: the float32 nearest to it is what
        # a good float32 power gives, whatever library computes it.
        base = np.float64(self.number(self.theta))
        return np.power(base, exponent.astype(np.float64)).astype(self.dtype)

    def default(self):
        """Return the frequencies without any scaling."""
        return self.number(1) / self.powers(self.dim // 2)


# --- one function per type: (its numbers, the rotation) -> (inv_freq, factor) --------
# float32 goes through the operations of transformers, in their order.


def _from_default(numbers, rotation):
    return rotation.default(), 1.0


def _from_linear(numbers, rotation):
    return rotation.default() / rotation.number(numbers["factor"]), 1.0


def _from_ntk(numbers, rotation):
    return _with_alpha(rotation, "ntk", "alpha", numbers["alpha"]).default(), 1.0


def _from_dynamic(numbers, rotation):
    factor, seq_len, alpha = numbers["factor"], rotation.seq_len, 1.0
    if seq_len is not None:
        trained = number_of(rotation.function, numbers, LENGTH, " with a seq_len")
        alpha += factor * max(seq_len - trained, 0) / trained
    return _with_alpha(rotation, "dynamic", "factor", alpha).default(), 1.0


def _with_alpha(rotation, rope_type, key, alpha):
    function, dim, theta, *_ = rotation
    larger = ntk_theta(function, dim, theta, alpha, rope_type, key)
    return rotation._replace(theta=larger)


def ntk_theta(function, dim, theta, alpha, rope_type="ntk", key="alpha"):
    """Return the base that stretches the slowest pair of `dim` by `alpha`."""
    if dim < 4:
        rule = f"be at least 4 for rope_type {rope_type!r}"
        raise ValueError(must(function, "dim", rule, dim))
    try:
        larger = theta * alpha ** (dim / (dim - 2))
    except OverflowError:
        larger = math.inf
    if larger == math.inf:
        rule = f"leave theta * alpha ** (dim / (dim - 2)) finite for dim {dim}"
        got = alpha if key == "alpha" else f"alpha {alpha}"
        raise ValueError(must(function, f"scaling[{key!r}]", rule, got))
    return larger


def _from_ntk_by_parts(numbers, rotation):
    trained = trained_length(rotation.function, numbers)
    factor = extension_factor(rotation.function, numbers)
    return _by_turns(rotation, factor, trained, *betas(numbers)), 1.0


def _from_llama3(numbers, rotation):
    trained = trained_length(rotation.function, numbers)
    turns = numbers["low_freq_factor"], numbers["high_freq_factor"]
    return _by_turns(rotation, numbers["factor"], trained, *turns), 1.0


def _by_turns(rotation, factor, trained, few, many):
    """Slow down pairs by `factor` that turn less than `few` times in a trained length.

    Those that turn more than `many` times keep their speed, in between the two are
    mixed. A number over an array is the array's reciprocal times it, as in PyTorch.
    """
    one, number, inv_freq = rotation.number(1), rotation.number, rotation.default()
    wavelength = one / inv_freq * number(2 * math.pi)
    share = (one / wavelength * number(trained) - number(few)) / number(many - few)
    slow = inv_freq / number(factor)
    mixed = (one - share) * inv_freq / number(factor) + share * inv_freq
    mixed = np.where(wavelength > number(trained / few), slow, mixed)
    return np.where(wavelength < number(trained / many), inv_freq, mixed)


def _from_yarn(numbers, rotation):
    factor = extension_factor(rotation.function, numbers)
    low, high = _correction_range(numbers, rotation)
    one, number, n_pair = rotation.number(1), rotation.number, rotation.dim // 2
    index, powers = np.arange(n_pair, dtype=rotation.dtype), rotation.powers(n_pair)
    ramp = ((index - number(low)) / number(high - low)).clip(0, 1)
    kept = one - ramp
    inv_freq = one / (number(factor) * powers) * (one - kept) + one / powers * kept
    return inv_freq, _yarn_attention_factor(numbers, factor)


def _correction_range(numbers, rotation):
    """Return the pairs between which YaRN passes from keeping to slowing down."""
    trained = trained_length(rotation.function, numbers)
    dim, theta = rotation.dim, rotation.theta
    high, low = (
        dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in betas(numbers)
    )
    if numbers.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_attention_factor(numbers, factor):
    if "attention_factor" in numbers:
        return numbers["attention_factor"]

    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1.0

    weights = numbers.get("mscale"), numbers.get("mscale_all_dim")
    return mscale(weights[0]) / mscale(weights[1]) if all(weights) else mscale(1)


def _from_longrope(numbers, rotation):
    trained = trained_length(rotation.function, numbers)
    is_long = rotation.seq_len is not None and rotation.seq_len > trained
    n_pair = rotation.dim // 2
    for key in ("short_factor", "long_factor"):
        if (n_given := len(numbers[key])) != n_pair:
            name, rule = f"scaling[{key!r}]", f"hold one number per pair, {n_pair}"
            got = f"{n_given} numbers"
            raise ValueError(must(rotation.function, name, rule, got))
    stretch = numbers["long_factor" if is_long else "short_factor"]
    stretch = np.array(stretch).astype(rotation.dtype)
    inv_freq = rotation.number(1) / (stretch * rotation.powers(n_pair))
    return inv_freq, _longrope_attention_factor(rotation, numbers, trained, is_long)


def _longrope_attention_factor(rotation, numbers, trained, is_long):
    for key in ("long_mscale" if is_long else "short_mscale", "attention_factor"):
        if key in numbers:
            return numbers[key]
    factor = numbers.get("factor")
    if factor is None:
        when = " without a factor"
        factor = number_of(rotation.function, numbers, LENGTH, when) / trained
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(trained))


def _from_proportional(numbers, rotation):
    n_turning = int(numbers.get("partial_rotary_factor", 1.0) * rotation.dim // 2)
    inv_freq = np.zeros(rotation.dim // 2, rotation.dtype)
    inv_freq[:n_turning] = rotation.number(1) / rotation.powers(n_turning)
    return inv_freq / rotation.number(numbers.get("factor", 1.0)), 1.0


# By the names of transformers; ntk and ntk_by_parts are ours.
ROPE_TYPES = {
    "default": _from_default,
    "linear": _from_linear,
    "ntk": _from_ntk,
    "dynamic": _from_dynamic,
    "ntk_by_parts": _from_ntk_by_parts,
    "yarn": _from_yarn,
    "longrope": _from_longrope,
    "llama3": _from_llama3,
    "proportional": _from_proportional,
}


def frequencies(function, dim, theta, scaling, seq_len, dtype):
    """Do the work of `rope_inv_freq` for `function`, after what both have checked."""
    name = "theta"
    if scaling.get("rope_theta") is not None:
        theta, name = scaling["rope_theta"], "scaling['rope_theta']"
    rule = "be a number of more than 1"
    theta = real_number(function, name, theta, rule, lambda value: value > 1)
    numbers = read_scaling(function, scaling)
    rotation = Rotation(function, dim, theta, seq_len, np.dtype(dtype))
    with np.errstate(all="ignore"):  # what float32 cannot hold becomes inf or 0
        return ROPE_TYPES[numbers["rope_type"]](numbers, rotation)


def rope_inv_freq(dim, *, theta=10000.0, scaling=None, seq_len=None, dtype=np.float64):
    """
    Return the angular speed of each channel pair, after scaling.

    Pair ``i`` of `dim` channels turns by ``f_i = theta ** (-2 * i / dim)`` radians per
    token; a scaling slows pairs down so that a model can read further than it was
    trained to.

    Parameters
    ----------
    dim : int
        Number of rotated channels, even (all of head_dim, or its rotary part; for
        ``'proportional'`` always all of head_dim).
    theta : float, default 10000.0
        Base of the geometric series, ``rope_theta`` of a model's config. More
        than 1.
    scaling : dict, optional
        A ``rope_parameters`` or ``rope_scaling`` dict of transformers, of any version.
        Its ``'rope_type'`` (or ``'type'``, the old spelling) is one of those in Notes.
        A ``'rope_theta'`` in it takes the place of `theta`; keys that the type does
        not use are ignored, and those that are None count as not given. What
        transformers reads beside the dict, ``'max_position_embeddings'``, may
        stand in it too.
    seq_len : int, optional
        Number of tokens, the highest position plus one, for ``'dynamic'`` and
        ``'longrope'``. By default a length within the trained one.
    dtype : dtype, default float64
        Either float64, or float32 for the recipe of transformers: exponents, powers and
        all that follows rounded to float32 one by one.

    Returns
    -------
    inv_freq : ndarray, shape (dim // 2,)
        Radians per token, in `dtype`.
    attention_factor : float
        What cosines and sines are to be multiplied by; 1.0 but for ``'yarn'`` and
        ``'longrope'``.

    Raises
    ------
    TypeError
        If a parameter is of the wrong kind.
    ValueError
        If `dim` is odd or less than 2 (4 for ``'ntk'`` and ``'dynamic'``), `theta` is
        not more than 1, the type is unknown, a number that it needs is missing or out
        of its range, or the dict has an entry per layer type.

    See Also
    --------
    rope_table : Cosines and sines from these frequencies.

    Notes
    -----
    With O for ``'original_max_position_embeddings'``, the trained length (if missing,
    ``'max_position_embeddings'``), s for ``'factor'`` >= 1, and ``r_i`` for
    ``O * f_i / (2 * pi)``, how often pair ``i`` turns in the trained length:

    ``'default'``
        No scaling.
    ``'linear'``
        Position interpolation, ``f_i / s`` [2]_.
    ``'ntk'``
        A larger base, ``theta * alpha ** (dim / (dim - 2))``, with ``'alpha'`` >= 1:
        the fastest pair keeps its speed, the slowest is slowed down by ``alpha``
        ([3]_, definition 1). A ``'dynamic'`` with an ``'alpha'``, as configs of HunYuan
        have it, is read as this.
    ``'dynamic'``
        The same with ``alpha = s * seq_len / M - (s - 1)`` beyond M tokens,
        ``'max_position_embeddings'`` ([3]_, section 3.3, "Dynamic NTK"; by the Reddit
        users bloc97 and emozilla).
    ``'ntk_by_parts'``
        ``g_i * f_i + (1 - g_i) * f_i / s``, where ``g_i`` grows from 0 to 1 as ``r_i``
        grows from ``'beta_slow'`` (1) to ``'beta_fast'`` (32) ([3]_, definition 2).
        Not known to transformers by this name. The program that came before the paper
        also mixed NTK in; that is not done here.
    ``'yarn'``
        The same two speeds, mixed linearly in ``i`` between the pairs that turn
        ``'beta_fast'`` and ``'beta_slow'`` times, as all programs do it; these pairs
        are rounded outwards unless ``'truncate'`` is False. The attention factor is
        ``'attention_factor'`` if given, else ``m(mscale) / m(mscale_all_dim)`` if both
        are given and not 0, else ``m(1)``, with ``m(w) = 0.1 * w * log(s) + 1`` ([3]_,
        definition 3). A missing s is ``'max_position_embeddings'`` over O. The
        ``'attn_factor'`` of the first program, which multiplies, is not read.
    ``'longrope'``
        ``f_i`` over an element of ``'short_factor'``, or of ``'long_factor'`` if
        seq_len is more than O. The attention factor is ``'attention_factor'`` if given,
        else ``sqrt(1 + log(s) / log(O))``, with s as for ``'yarn'`` [4]_; where
        ``'short_mscale'`` and ``'long_mscale'`` are given, as for PhiMoE, it is these.
        ``'su'`` is an old name.
    ``'llama3'``
        NTK-by-parts with ``'low_freq_factor'`` and ``'high_freq_factor'`` in place of
        the betas [5]_.
    ``'proportional'``
        Of the ``dim // 2`` pairs the first ``int(partial_rotary_factor * dim // 2)``
        turn by ``f_i / s``, the others not at all [6]_.

    ``'mrope'`` is read as default: sections of positions are no matter of frequencies.

    In float32 the results have the bits of transformers wherever PyTorch's power of
    theta is the true one, rounded; its vectorised power is one unit of the last place
    off for about one pair in a hundred. A base that grows, ``'dynamic'``, is computed
    in float64, as transformers' function does for a whole number; while it runs a
    model, it does so in float32.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 15. https://arxiv.org/abs/2104.09864
    .. [2] Chen et al., "Extending Context Window of Large Language Models via
       Positional Interpolation", 2023, eq. 4. https://arxiv.org/abs/2306.15595
    .. [3] Peng et al., "YaRN: Efficient Context Window Extension of Large Language
       Models", 2023. https://arxiv.org/abs/2309.00071
    .. [4] Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million
       Tokens", 2024. https://arxiv.org/abs/2402.13753
    .. [5] Llama Team, "The Llama 3 Herd of Models", 2024; its formula is in
       ``transformers.modeling_rope_utils``. https://arxiv.org/abs/2407.21783
    .. [6] Gemma 4, in ``transformers.modeling_rope_utils``.

    Examples
    --------
    >>> import posenc
    >>> inv_freq, attention_factor = posenc.rope_inv_freq(8)
    >>> inv_freq
    array([1.   , 0.1  , 0.01 , 0.001])
    >>> slower, _ = posenc.rope_inv_freq(8, scaling={"rope_type": "ntk", "alpha": 8})
    >>> (inv_freq / slower).round(3)
    array([1., 2., 4., 8.])
    >>> yarn = {"rope_type": "yarn", "factor": 4,
    ...         "original_max_position_embeddings": 4096}
    >>> slower, attention_factor = posenc.rope_inv_freq(8, scaling=yarn)
    >>> (inv_freq / slower).round(3)
    array([1. , 1. , 1.6, 4. ])
    >>> round(attention_factor, 3)
    1.139
    """
    return checked_frequencies("rope_inv_freq", dim, theta, scaling, seq_len, dtype)


def checked_frequencies(function, dim, theta, scaling, seq_len, dtype):
    """Do all of `rope_inv_freq`, its checks too, for `function`."""
    dim = whole_number(function, "dim", dim, 2)
    if dim % 2:
        raise ValueError(must(function, "dim", "be even", dim))
    if seq_len is not None:
        seq_len = whole_number(function, "seq_len", seq_len, 1)
        if seq_len > MAX_LENGTH:
            raise ValueError(must(function, "seq_len", "be at most 2**53", seq_len))
    dtype = real_dtype(function, dtype)
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, Mapping):
        raise TypeError(must(function, "scaling", "be a dict", repr(scaling)))
    nested = [key for key, value in scaling.items() if isinstance(value, Mapping)]
    if nested:
        rule = "be one set of RoPE parameters, not one per layer type"
        raise ValueError(must(function, "scaling", rule, f"entries {nested}"))
    is_named = "rope_type" in scaling or "type" in scaling
    if not is_named and not TELLING.isdisjoint(scaling):
        raise ValueError(
            must(function, "scaling", "name its 'rope_type'", repr(scaling))
        )
    return frequencies(function, dim, theta, scaling, seq_len, dtype)
