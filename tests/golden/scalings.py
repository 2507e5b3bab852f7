"""Every rope type by its definition, in mpmath: true frequencies, attention factors.

The formulas are those of the papers; of transformers where its program is the
definition (yarn's borders, llama3, proportional). posenc is not imported.
"""

# SPDX-License-Identifier: BSD-3-Clause

import math

from mpmath import mp, mpf

DIGITS = 50


def default(dim, theta):
    return [mp.power(theta, -mpf(i) / dim) for i in range(0, dim, 2)]


def ntk(dim, theta, alpha):
    return default(dim, mpf(theta) * mp.power(alpha, mpf(dim) / (dim - 2)))


def dynamic(dim, theta, factor, trained, seq_len):
    length = max(trained, seq_len or 0)
    alpha = mpf(factor) * length / trained - (mpf(factor) - 1)
    return ntk(dim, theta, alpha)


def mix(inv_freq, factor, share):
    """share * f + (1 - share) * f / factor, the share of every pair within [0, 1]."""
    pairs = zip(inv_freq, share, strict=True)
    return [f * (w + (1 - w) / factor) for f, w in ((f, clamp(w)) for f, w in pairs)]


def clamp(value):
    return min(max(value, mpf(0)), mpf(1))


def ntk_by_parts(dim, theta, factor, trained, slow, fast):
    """YaRN, definition 2: the share grows with the turns in the trained length."""
    inv_freq = default(dim, theta)
    turns = [trained * f / (2 * mp.pi) for f in inv_freq]
    return mix(inv_freq, mpf(factor), [(r - slow) / (mpf(fast) - slow) for r in turns])


def yarn(dim, theta, factor, trained, slow, fast, truncate):
    """The program's YaRN: the share falls with the number of the pair."""

    def pair_of(turns):
        return dim * mp.log(trained / (2 * mp.pi * turns)) / (2 * mp.log(theta))

    low, high = pair_of(mpf(fast)), pair_of(mpf(slow))
    if truncate:
        low, high = mpf(math.floor(low)), mpf(math.ceil(high))
    low, high = max(low, mpf(0)), min(high, mpf(dim - 1))
    high += (low == high) * mpf("0.001")
    share = [1 - (i - low) / (high - low) for i in range(dim // 2)]
    return mix(default(dim, theta), mpf(factor), share)


def longrope(dim, theta, stretch):
    return [f / mpf(s) for f, s in zip(default(dim, theta), stretch, strict=True)]


def proportional(dim, theta, factor, part):
    n_turning = int(part * dim // 2)
    inv_freq = [f / mpf(factor) for f in default(dim, theta)[:n_turning]]
    return inv_freq + [mpf(0)] * (dim // 2 - n_turning)


def true_inv_freq(dim, theta, scaling, seq_len=None):
    """Frequencies of a golden case, as mpmath numbers."""
    get, trained = scaling.get, scaling.get("original_max_position_embeddings")
    factor = get("factor", 1.0)
    betas = get("beta_slow", 1.0), get("beta_fast", 32.0)
    bands = get("low_freq_factor"), get("high_freq_factor")
    with mp.workdps(DIGITS):
        match scaling["rope_type"]:
            case "default":
                return default(dim, theta)
            case "linear":
                return [f / mpf(factor) for f in default(dim, theta)]
            case "ntk":
                return ntk(dim, theta, scaling["alpha"])
            case "dynamic":
                length = scaling["max_position_embeddings"]
                return dynamic(dim, theta, factor, length, seq_len)
            case "ntk_by_parts":
                return ntk_by_parts(dim, theta, factor, trained, *betas)
            case "llama3":
                return ntk_by_parts(dim, theta, factor, trained, *bands)
            case "yarn":
                truncate = get("truncate", True)
                return yarn(dim, theta, factor, trained, *betas, truncate)
            case "longrope":
                is_long = seq_len is not None and seq_len > trained
                key = "long_factor" if is_long else "short_factor"
                return longrope(dim, theta, scaling[key])
            case "proportional":
                return proportional(dim, theta, factor, get("partial_rotary_factor", 1))


def true_attention_factor(scaling):
    """Attention factor of a golden case, as an mpmath number."""
    get, rope_type = scaling.get, scaling["rope_type"]
    if rope_type not in ("yarn", "longrope"):
        return mpf(1)
    if get("attention_factor"):
        return mpf(get("attention_factor"))
    with mp.workdps(DIGITS):
        log = mp.log(scaling["factor"])
        if rope_type == "longrope":
            trained = scaling["original_max_position_embeddings"]
            return mp.sqrt(1 + log / mp.log(trained))
        if get("mscale") and get("mscale_all_dim"):
            weights = get("mscale"), get("mscale_all_dim")
            over, under = (1 + mpf(weight) * log / 10 for weight in weights)
            return over / under
        return 1 + log / 10
