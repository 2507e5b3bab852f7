"""Write the golden values: cos_sin.json and inv_freq.json, with mpmath alone.

    python tests/golden/make.py            # a few seconds

The numbers come from mpmath; posenc is not imported. See README.md beside this file.
"""

# SPDX-License-Identifier: BSD-3-Clause

import json
import math
import random
import sys
from pathlib import Path

from mpmath import mp

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from reference import to_hex, true_cos_sin  # noqa: E402
from scalings import true_attention_factor, true_inv_freq  # noqa: E402

SEED = 20240607
LIMIT = 2.0**31
MANTISSA = 1 << 53


def convergents(value, largest):
    """Fractions n/k of the continued fraction of `value`, with n <= largest."""
    before, now = (0, 1), (1, 0)
    while True:
        whole = int(mp.floor(value))
        before, now = now, (whole * now[0] + before[0], whole * now[1] + before[1])
        if now[0] > largest:
            return
        yield now
        value = 1 / (value - whole)


def split(number):
    """Write `number` as a product of two integers below 2**53; None if not found."""
    rest, factor, primes = number, 2, []
    while factor < 40000 and factor * factor <= rest:
        while rest % factor == 0:
            primes.append(factor)
            rest //= factor
        factor += 1 + (factor > 2)
    if rest >= MANTISSA:
        return None
    left, right = rest, 1
    for prime in sorted(primes, reverse=True):
        if right * prime < MANTISSA:
            right *= prime
        else:
            left *= prime
    return (left, right) if left < MANTISSA else None


def distance(position, inv_freq):
    """How far position * inv_freq is from the nearest multiple of pi/2."""
    cos, sin = true_cos_sin(position, inv_freq)
    return min(abs(cos), abs(sin))


def whole_number_cases():
    """Whole positions at inv_freq 1 and -1 that lie next to a multiple of pi/2."""
    with mp.workprec(2000):
        found = [n for n, _ in convergents(mp.pi / 2, LIMIT - 1)]
    return [
        (float(a * n), float(b)) for n in found[2:] for a in (1, -1) for b in (1, -1)
    ]


def product_cases(count):
    """Products of two 53-bit numbers next to a multiple of pi/2, |position| < 2**31.

    Convergents n/k of pi / 2**(e+1) make n * 2**e nearly k * pi/2; those whose n is
    a product of two 53-bit integers give a position and a frequency.
    """
    found = []
    for e in range(-110, 0):
        with mp.workprec(2000):
            numerators = [n for n, _ in convergents(mp.ldexp(mp.pi, -e - 1), 1 << 106)]
        for n in numerators:
            factors = split(n) if n > 1 << 56 else None
            if factors is None:
                continue
            position = math.ldexp(factors[0], 30 - factors[0].bit_length())
            inv_freq = math.ldexp(factors[1], e - 30 + factors[0].bit_length())
            found.append((position, inv_freq))
    return sorted(set(found), key=lambda pair: distance(*pair))[:count]


def huge_frequency_cases():
    """Doubles of any size next to a multiple of pi/2, at positions 0.5, 1, 1024."""
    found = []
    for e in range(971):
        with mp.workprec(2400):
            numerators = [n for n, _ in convergents(mp.ldexp(mp.pi, -e - 1), MANTISSA)]
        found += [(1.0, math.ldexp(n, e)) for n in numerators[-2:] if n > 1]
    best = sorted(set(found), key=lambda pair: distance(*pair))[:8]
    return best + [(scale * p, f / scale) for p, f in best[:4] for scale in (0.5, 1024)]


def ordinary_cases(rng):
    """Whole and fractional positions of every size, at frequencies of real models."""
    pairs = []
    for theta in (1e4, 5e5, 1e6):
        for i in (0, 1, 7, 31, 32, 63):
            inv_freq = theta ** (-i / 64)
            size = 2.0 ** rng.uniform(0, 31)
            pairs.append((float(rng.randrange(2**31)), inv_freq))
            pairs.append((float(-rng.randrange(int(size) + 1)), inv_freq))
            pairs.append((rng.uniform(-size, size), inv_freq))
            pairs.append((rng.uniform(-LIMIT, LIMIT), inv_freq))
    return pairs


def extreme_cases():
    """Frequencies from the least subnormal to 1e300, positions to both ends."""
    frequencies = (1e300, 1.7e308, 1e100, 1e22, 1e-40, 1e-300, 2.5e-310, 5e-324)
    positions = (1.0, -0.1, 2147483647.0, -2147483647.9999998, 1e-300)
    return [(p, f) for f in frequencies for p in positions] + [
        (0.0, 1.0),
        (3.0, 0.0),
        (12345.678, -0.3),
    ]


def far_cases():
    """Positions past 2**31, up to the ends of the doubles."""
    return [
        (2.0**31, 1.0),
        (-(2.0**33) - 0.5, 1e4 ** (-1 / 64)),
        (2.0**53 - 1, 0.7),
        (-1e15, 1e-4),
        (1e22, 1.0),
        (1e300, 1e-300),
        (-1e300, 0.3),
        (1.7e308, 1.7e308),
        (5e-324, 5e-324),
    ]


def large_angle_cases(rng, each):
    """Angles from 2**30 to 2**46 that are 2**-16 to 2**-13 from a multiple of pi/2.

    There a reduction that carries too few bits of pi is off by many ulp, while the
    result is not yet small enough to be recognised as a hard case.
    """
    found = []
    for exponent in range(30, 47, 2):
        here = []
        while len(here) < each:
            position = rng.uniform(-LIMIT, LIMIT)
            inv_freq = 2.0 ** rng.uniform(exponent, exponent + 1) / abs(position)
            if 2.0**-16 < distance(position, inv_freq) < 2.0**-13:
                here.append((position, inv_freq))
        found += here
    return found


def factor_cases(rng):
    """Attention factors of YaRN and LongRoPE, and a few that no model has."""
    factors = (
        1.3465735902799727,
        1.138629436111989,
        1.1902380714238083,
        0.7,
        3e7,
        1e-9,
    )
    return [
        (rng.uniform(-LIMIT, LIMIT), 1e4 ** (-rng.randrange(64) / 64), factor)
        for factor in factors
        for _ in range(4)
    ] + [
        *((411557987.0, 1.0, factor) for factor in factors),
        *((0.1, f, factor) for f in (2.5e-310, 1e-312, 5e-324) for factor in factors),
    ]


def cos_sin_cases():
    """All groups, each as triples (position, inv_freq, attention_factor)."""
    rng = random.Random(SEED)
    groups = {
        "ordinary": ordinary_cases(rng),
        "whole positions next to a multiple of pi/2": whole_number_cases(),
        "products next to a multiple of pi/2": product_cases(40),
        "huge frequencies next to a multiple of pi/2": huge_frequency_cases(),
        "extreme frequencies": extreme_cases(),
        "positions past 2^31": far_cases(),
        "large angles": large_angle_cases(random.Random(SEED + 1), 2),
    }
    cases = {
        name: [(*pair, 1.0) for pair in dict.fromkeys(pairs)]
        for name, pairs in groups.items()
    }
    cases["attention factors"] = factor_cases(rng)
    return cases


def cos_sin_row(position, inv_freq, factor):
    """One line of cos_sin.json: the three doubles, then the two true values."""
    cos, sin = true_cos_sin(position, inv_freq, factor)
    return [position.hex(), inv_freq.hex(), factor.hex(), to_hex(cos), to_hex(sin)]


def plain_cases():
    """Models without a scaling, and with the ones that have a single number."""
    for theta in (1e4, 5e5, 1e6):
        for dim in (2, 64, 80, 128):
            yield dim, theta, {"rope_type": "default"}
        yield 128, theta, {"rope_type": "linear", "factor": 4.0}
        yield 96, theta, {"rope_type": "linear", "factor": 2.5}
        yield 128, theta, {"rope_type": "ntk", "alpha": 8.0}
        yield 64, theta, {"rope_type": "ntk", "alpha": 1.7}


def trained_on(length, rope_type, factor=None, **others):
    """A scaling dict with the length that the model was trained on."""
    scaling = {"rope_type": rope_type, "factor": factor, **others}
    scaling["original_max_position_embeddings"] = length
    return {key: value for key, value in scaling.items() if value is not None}


def model_cases():
    """Scalings of models that people use, and of transformers' own tests."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yield 128, 5e5, trained_on(8192, "llama3", 8.0, **bands)  # Llama 3.1
    yield 64, 5e5, trained_on(8192, "llama3", 32.0, **bands)  # Llama 3.2 1B
    yield 128, 1e4, trained_on(2048, "llama3", 10.0, **bands)
    deepseek = {"mscale": 1.0, "mscale_all_dim": 1.0}
    yield 64, 1e4, trained_on(4096, "yarn", 40.0, **deepseek)  # DeepSeek V3
    deepseek = {"mscale": 0.707, "mscale_all_dim": 0.8}
    yield 64, 1e4, trained_on(4096, "yarn", 40.0, **deepseek)
    yield 64, 150000.0, trained_on(4096, "yarn", 32.0, truncate=False)  # GPT-OSS
    yield 128, 1e6, trained_on(32768, "yarn", 4.0)  # Qwen 2.5 and 3
    yield 128, 1e4, trained_on(2048, "yarn", 10.0, beta_fast=32.0, beta_slow=1.0)
    yield 96, 1e4, trained_on(4096, "yarn", 2.5, beta_fast=20.0, beta_slow=1.5)
    yield 256, 1e4, trained_on(131072, "yarn", 10.0)  # one border past the last pair
    yield 64, 1e4, trained_on(4096, "yarn", 8.0, attention_factor=0.7)
    yield 128, 1e4, trained_on(4096, "ntk_by_parts", 8.0)
    yield 80, 5e5, trained_on(8192, "ntk_by_parts", 2.5, beta_fast=20.0, beta_slow=2.0)
    yield 512, 1e6, {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    part = {"partial_rotary_factor": 0.3, "factor": 8.0}
    yield 80, 1e4, {"rope_type": "proportional", **part}
    yield 64, 1e4, {"rope_type": "proportional"}


def length_cases():
    """Scalings that depend on the length, with one."""
    for factor, trained, length in (
        (2.0, 4096, 8192),
        (10.0, 2048, 16384),
        (3.3, 4096, 4097),
        (2.0, 4096, 100),
    ):
        lengths = {"max_position_embeddings": trained}
        yield 128, 1e4, {"rope_type": "dynamic", "factor": factor, **lengths}, length
    stretch = {
        "short_factor": [1 + i / 64 for i in range(48)],
        "long_factor": [1 + 1.3 * i for i in range(48)],
    }
    for length in (4096, 4097):
        yield 96, 1e4, trained_on(4096, "longrope", 32.0, **stretch), length
    stretch["attention_factor"] = 1.25
    yield 96, 1e4, trained_on(4096, "longrope", None, **stretch), 131072


def inv_freq_row(dim, theta, scaling, seq_len=None):
    """One entry of inv_freq.json: the case, then the nearest double of each value."""
    inv_freq = true_inv_freq(dim, theta, scaling, seq_len)
    return {
        "dim": dim,
        "theta": theta,
        "scaling": scaling,
        "seq_len": seq_len,
        "attention_factor": float(true_attention_factor(scaling)).hex(),
        "inv_freq": [float(value).hex() for value in inv_freq],
    }


def write(name, rows):
    """Write rows of JSON, one per line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / name).write_text(f"[\n{lines}\n]\n")


def main():
    """Write both files."""
    rows = []
    for name, cases in cos_sin_cases().items():
        rows += [[name, *cos_sin_row(*case)] for case in cases]
        nearest = min(distance(*case[:2]) for case in cases)
        print(f"{len(cases):4d} {name}; nearest to zero {mp.nstr(nearest, 3)}")
    write("cos_sin.json", rows)
    cases = (*plain_cases(), *model_cases(), *length_cases())
    write("inv_freq.json", [inv_freq_row(*case) for case in cases])


if __name__ == "__main__":
    main()
