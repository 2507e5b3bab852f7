"""Slow, obvious references: each formula as the paper or the library prints it.

Nothing here imports posenc.
"""

# SPDX-License-Identifier: BSD-3-Clause

import math

import mpmath
import numpy as np
from mpmath import mp

# Bits kept beyond the exact product of two doubles (106 bits) and its exponent. A
# product that cancels against a multiple of pi/2 loses at most about 106 bits and
# a few more; what is left is still far more than any assertion needs.
GUARD_BITS = 320


# --- rotations -----------------------------------------------------------------------


def one_nan(array):
    """Give every NaN the same bits: positive, quiet, no payload."""
    return np.where(np.isnan(array), array.dtype.type(np.nan), array)


def is_16_bit(dtype):
    """Whether numbers of this dtype are computed in float32 and rounded."""
    return np.dtype(dtype).itemsize == 2


def turn(first, second, cos, sin, rounding):
    """Rotate pairs (first, second); every product and every sum is rounded by itself.

    16-bit numbers are computed in float32 and rounded to their type, either once
    ('once') or after each product and after the sum ('eager').
    """
    dtype, parts = first.dtype, [first, second, cos, sin]
    is_narrow = is_16_bit(dtype)
    if is_narrow:
        parts = [part.astype(np.float32) for part in parts]

    def product(left, right):
        result = left * right
        if is_narrow and rounding == "eager":
            result = result.astype(dtype).astype(np.float32)
        return result

    first, second, cos, sin = parts
    with np.errstate(all="ignore"):
        a = product(first, cos) - product(second, sin)
        b = product(second, cos) + product(first, sin)
        if is_narrow:
            a, b = a.astype(dtype), b.astype(dtype)
    return one_nan(a), one_nan(b)


def half(x, cos, sin, rounding="once"):
    """Rotate (x_i, x_{i+m})."""
    n_pair = cos.shape[-1]
    a, b = turn(x[..., :n_pair], x[..., n_pair : 2 * n_pair], cos, sin, rounding)
    return np.concatenate([a, b, rest(x, a)], axis=-1)


def interleaved(x, cos, sin, rounding="once"):
    """Rotate (x_{2i}, x_{2i+1})."""
    n_pair = cos.shape[-1]
    even, odd = x[..., 0 : 2 * n_pair : 2], x[..., 1 : 2 * n_pair : 2]
    a, b = turn(even, odd, cos, sin, rounding)
    pairs = np.stack([a, b], axis=-1).reshape((*a.shape[:-1], 2 * n_pair))
    return np.concatenate([pairs, rest(x, a)], axis=-1)


def rest(x, rotated):
    """The channels past the pairs, broadcast as those were."""
    n_rest = x.shape[-1] - 2 * rotated.shape[-1]
    tail = x[..., x.shape[-1] - n_rest :]
    return np.broadcast_to(tail, (*rotated.shape[:-1], n_rest))


def complex_product(x, cis, rounding="once"):
    """Multiply consecutive pairs, read as complex numbers, by a complex table."""
    return interleaved(x, cis.real, cis.imag, rounding)


ROTATE = {"half": half, "interleaved": interleaved}


def place_table(table, x_shape, axis):
    """Give a (T, M) or (B, T, M) table as many axes as x, by the rule of `rope`."""
    axis %= len(x_shape)
    if table.ndim == len(x_shape):
        return table
    shape = [1] * len(x_shape)
    shape[axis], shape[-1] = table.shape[-2:]
    if table.ndim == 3:
        shape[0] = table.shape[0]
    return table.reshape(shape)


def rotate(
    x,
    cos,
    sin,
    layout="half",
    axis=-2,
    positions=None,
    rotary_start=0,
    rounding="once",
):
    """What `rope` computes, from the rotations above and NumPy's broadcasting."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = (place_table(table, x.shape, axis) for table in (cos, sin))
    before, rotated = np.split(x, [rotary_start % max(x.shape[-1], 1)], axis=-1)
    turned = ROTATE[layout](rotated, cos, sin, rounding)
    return np.concatenate([before, turned], axis=-1)


def packed_positions(cu_seqlens, offset=0):
    """Row of each token of packed sequences, counted token by token."""
    n_sequence = len(cu_seqlens) - 1
    offsets = [offset] * n_sequence if np.ndim(offset) == 0 else offset
    return [
        offsets[i] + t
        for i in range(n_sequence)
        for t in range(cu_seqlens[i + 1] - cu_seqlens[i])
    ]


# --- angles --------------------------------------------------------------------------


def true_cos_sin(position, inv_freq, factor=1.0):
    """Cosine and sine of position * inv_freq, times factor, as mpmath numbers.

    The three doubles are taken as the binary numbers they are, the product is
    exact, and the precision grows with its exponent.
    """
    exponent = math.frexp(position)[1] + math.frexp(inv_freq)[1]
    with mp.workprec(max(exponent, 0) + 106 + GUARD_BITS):
        cos, sin = mp.cos_sin(mp.mpf(position) * mp.mpf(inv_freq))
        return mp.mpf(factor) * cos, mp.mpf(factor) * sin


def true_decay(distance, inv_freq):
    """Twice the sum of the cosines of distance * inv_freq (M,), as an mpmath number."""
    terms = [true_cos_sin(float(distance), float(f))[0] for f in inv_freq]
    with mp.workprec(106 + GUARD_BITS):
        return 2 * mp.fsum(terms)


def ulp_error(got, true, dtype):
    """Distance from `got` to the mpmath number `true`, in ulp of `true`."""
    kind = np.finfo(dtype)
    with mp.workprec(106 + GUARD_BITS):
        exponent = mp.frexp(true)[1] - 1 if true else kind.minexp
        ulp = mp.ldexp(1, max(exponent, int(kind.minexp)) - kind.nmant)
        return float(abs(mp.mpf(float(got)) - true) / ulp)


def worst_ulp(cos, sin, positions, inv_freq, factor=1.0):
    """Largest error of tables (*positions.shape, M) over all entries, by mpmath."""
    worst = 0.0
    for index in np.ndindex(cos.shape):
        true = true_cos_sin(
            float(positions[index[:-1]]), float(inv_freq[index[-1]]), factor
        )
        for table, value in zip((cos, sin), true, strict=True):
            worst = max(worst, ulp_error(table[index], value, table.dtype))
    return worst


def has_extended_precision():
    """Whether long double has the 64-bit significand that `extended_cos_sin` needs."""
    return np.finfo(np.longdouble).nmant >= 63


def _half_pi_parts():
    """Split pi/2 into three parts of 32 bits and a rest of 64: k times one is exact."""
    with mp.workprec(400):
        rest, parts = mp.pi / 2, []
        for bits in (31, 63, 95):
            part = mp.floor(mp.ldexp(rest, bits))
            parts.append(np.ldexp(np.longdouble(int(part)), -bits))
            rest -= mp.ldexp(part, -bits)
        high = int(mp.floor(mp.ldexp(rest, 158)))
        parts.append(np.ldexp(np.longdouble(np.uint64(high)), -158))
    return parts


def _two_sum(a, b):
    """Return the rounded sum of a and b, and what the rounding lost."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def extended_cos_sin(positions, inv_freq):
    """Cosine and sine for |position * inv_freq| < 2**31, vectorised, in long double.

    The product is exact (Dekker), k * pi/2 is taken off in parts whose products
    with k < 2**31 are exact, and the sums keep what they lose: the reduced angle is
    within 2**-120. Near a multiple of pi/2 the relative error is then 2**-120 over
    the angle, elsewhere that of the C library's cosl and sinl, 2**-63: below 2**-8
    ulp of a double, 2**-37 ulp of a float.
    """
    high = np.multiply(positions, inv_freq, dtype=np.longdouble)
    p_top = positions.astype(np.float32).astype(np.float64)
    f_top = inv_freq.astype(np.float32).astype(np.float64)
    p_low, f_low = positions - p_top, inv_freq - f_top
    long = np.longdouble
    low = p_top.astype(long) * f_top - high
    low = low + p_top.astype(long) * f_low
    low = low + p_low.astype(long) * f_top
    low = low + p_low.astype(long) * f_low
    one, two, three, four = _half_pi_parts()
    k = np.rint(high / (one + two))
    angle, lost = high - k * one, -k * four
    for part in (-k * two, low, -k * three):
        angle, error = _two_sum(angle, part)
        lost = lost + error
    angle = angle + lost
    cos, sin = np.cos(angle), np.sin(angle)
    quadrant = k.astype(np.int64) & 3
    swap = (quadrant & 1).astype(bool)
    true_cos = np.where(swap, sin, cos) * np.where((quadrant + 1) & 2, -1, 1)
    true_sin = np.where(swap, cos, sin) * np.where(quadrant & 2, -1, 1)
    return true_cos, true_sin


def extended_ulp(got, true):
    """Error of the array `got`, in ulp of the long double array `true`."""
    kind = np.finfo(got.dtype)
    exponent = np.maximum(np.frexp(true)[1] - 1, int(kind.minexp)) - kind.nmant
    return np.abs(got - true) / np.ldexp(np.longdouble(1), exponent)


# --- contextual positions ------------------------------------------------------------

# Each returns, in long double, the result and how large the terms are that make it.


def sigmoid(x):
    """1 / (1 + exp(-x)) in long double."""
    with np.errstate(all="ignore"):
        return 1 / (1 + np.exp(-np.asarray(x, np.longdouble)))


def cope_gates(logits, dtype=np.float64):
    """Golovneva et al., eq. 3."""
    gates = sigmoid(logits)
    return gates, gates


def sums_from_right(x):
    """x.flip(-1).cumsum(-1).flip(-1) of the paper's listing."""
    return np.flip(np.flip(np.asarray(x, np.longdouble), -1).cumsum(-1), -1)


def cope_positions(gates, n_position, dtype=np.float64):
    """Golovneva et al., eq. 4, and the listing's clamp."""
    with np.errstate(all="ignore"):
        sums = sums_from_right(gates.astype(dtype))
        if dtype == np.float64:  # a sum that leaves the doubles does not come back
            is_out = np.abs(sums) > np.finfo(dtype).max
            sums = np.where(is_out, np.sign(sums) * np.inf, sums)
        sizes = sums_from_right(np.abs(gates))
    positions = np.minimum(sums, np.asarray(n_position)[..., None] - 1)
    return positions, np.broadcast_to(sizes, positions.shape)


def cope_interpolate(z, positions, dtype=np.float64):
    """Golovneva et al., eq. 5, as in the listing; at whole positions z alone."""
    loops = np.broadcast_shapes(z.shape[:-1], positions.shape[:-1])
    z = np.broadcast_to(z, (*loops, z.shape[-1])).astype(np.longdouble)
    positions = np.broadcast_to(positions, (*loops, positions.shape[-1]))
    at = np.clip(positions, 0, z.shape[-1] - 1)
    is_nan = np.isnan(at)
    at = np.where(is_nan, 0, at)
    low, high = (np.take_along_axis(z, whole(at).astype(int), -1)
                 for whole in (np.floor, np.ceil))  # fmt: skip
    w = at - np.floor(at)
    with np.errstate(invalid="ignore"):
        between = np.where(w == 0, low, high * w + low * (1 - w))
    return np.where(is_nan, np.nan, between), np.maximum(np.abs(low), np.abs(high))


def cope_bias(logits, z, dtype=np.float64):
    """Gates of the type computed in, and the steps above; -inf hides a key.

    The size is what errors of the gates move z by: all of z for each gate.
    """
    gates = sigmoid(logits).astype(dtype)
    sums = sums_from_right(gates)
    bias, _ = cope_interpolate(z, np.asarray(sums), dtype)
    with np.errstate(invalid="ignore"):
        most = np.where(np.isfinite(z), np.abs(z), 0).max(-1, keepdims=True)
    size = np.broadcast_to(most * (1 + sums_from_right(gates > 0)), bias.shape)
    return np.where(np.broadcast_to(logits, bias.shape) == -np.inf, 0, bias), size


def cope_attention(q, k, v, embedding, dtype=np.float64):
    """Golovneva et al., eqs. 3 to 6, causal, scaled by 1 / sqrt(d), query by query.

    The size is that of the values, times the terms that move the weights.
    """
    q, k, v, embedding = (np.asarray(x, np.longdouble) for x in (q, k, v, embedding))
    n_query, n_key = q.shape[-2], k.shape[-2]
    loops = np.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v, embedding)))
    out = np.zeros((*loops, n_query, q.shape[-1]), np.longdouble)
    size = np.zeros_like(out)
    for i in range(max(n_query - n_key, 0), n_query):
        seen = i + n_key - n_query + 1
        query = q[..., i, None, :] / np.sqrt(np.longdouble(max(q.shape[-1], 1)))
        logits = (query * k[..., :seen, :]).sum(-1)
        z = (q[..., i, :, None] * embedding).sum(-2)
        bias, bias_size = cope_bias(logits, z, dtype)
        logits = logits + bias
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[..., i, :] = (weights[..., None] * v[..., :seen, :]).sum(-2)
        terms = np.abs(query * k[..., :seen, :]).sum(-1).max(-1) + bias_size.max(-1)
        size[..., i, :] = np.abs(v[..., :seen, :]).max(-2) * (1 + terms[..., None])
    return out, size


# --- added tables --------------------------------------------------------------------


def scale_and_add(x, scale, rows):
    """Return x * scale + rows, each rounded; 16 bits are rounded once, from float32."""
    kind = np.float64 if x.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        total = x.astype(kind) * kind(scale) + rows.astype(kind)
        return one_nan(total.astype(x.dtype))


def sinusoidal_row(cos, sin, dim, layout):
    """Put sines and cosines of n pairs at their channels; zeros follow."""
    n_pair = cos.shape[-1]
    row = np.zeros((*cos.shape[:-1], dim), cos.dtype)
    first, second = (cos, sin) if layout == "concat_flipped" else (sin, cos)
    if layout == "interleaved":
        row[..., 0 : 2 * n_pair : 2], row[..., 1 : 2 * n_pair : 2] = first, second
    else:
        row[..., :n_pair], row[..., n_pair : 2 * n_pair] = first, second
    return row


def true_sinusoidal(position, dim, theta=10000, layout="interleaved", shift=0, scale=1):
    """Return the row of one position, by the formula as it stands, in mpmath."""
    n_pair = dim // 2
    with mp.workprec(200):
        angles = [
            mp.mpf(position)
            * mp.mpf(scale)
            / mp.power(theta, mp.mpf(i) / (n_pair - mp.mpf(shift)))
            for i in range(n_pair)
        ]
        sin, cos = [mp.sin(angle) for angle in angles], [mp.cos(a) for a in angles]
    row = {
        "interleaved": [part for pair in zip(sin, cos, strict=True) for part in pair],
        "concat": sin + cos,
        "concat_flipped": cos + sin,
    }[layout]
    return row + [mp.mpf(0)] * (dim - 2 * n_pair)


# --- frequencies ---------------------------------------------------------------------


def true_inv_freq(dim, theta=10000.0, factor=1.0, alpha=1.0):
    """theta'**(-2i/dim) / factor with theta' = theta * alpha**(dim / (dim - 2))."""
    with mp.workprec(200):
        base = mp.mpf(theta)
        if alpha != 1.0:
            base *= mp.power(alpha, mp.mpf(dim) / (dim - 2))
        powers = [mp.power(base, -mp.mpf(i) / dim) for i in range(0, dim, 2)]
        return [power / mp.mpf(factor) for power in powers]


# --- numbers as text -----------------------------------------------------------------


def to_hex(value, bits=160):
    """Write an mpmath number as an exact hexadecimal float, rounded to `bits` bits."""
    with mp.workprec(bits):
        mantissa, exponent = mpmath.mpf(+value).man_exp
    return f"{'-' if value < 0 else ''}{abs(mantissa):#x}p{exponent:+d}"


def from_hex(text):
    """Read what `to_hex` wrote."""
    mantissa, exponent = text.split("p")
    with mp.workprec(GUARD_BITS):
        return mp.ldexp(int(mantissa, 16), int(exponent))


# --- bits ----------------------------------------------------------------------------


def bits(array):
    """The array's bytes, as unsigned integers of the element's (or half its) size."""
    array = np.ascontiguousarray(array)
    size = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    return array.astype(array.dtype.newbyteorder("="), copy=False).view(f"u{size}")


def same_bits(got, want):
    """Assert that two arrays agree in shape, type and every bit, -0.0 included."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(bits(got), bits(want))


# --- relative biases -----------------------------------------------------------------


def offsets(q_positions, k_positions):
    """Position of the key less that of the query, (T, S)."""
    return np.array([[k - q for k in k_positions] for q in q_positions], float)


def t5_bucket(offset, num_buckets, max_distance, bidirectional):
    """Raffel et al., 2020: one offset by the recipe of transformers, in float32."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket = num_buckets if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = -min(offset, 0)
    max_exact = num_buckets // 2
    if distance < max_exact:
        return bucket + distance
    single = np.float32
    log = single(math.log(single(distance) / single(max_exact)))
    share = log / single(math.log(max_distance / max_exact))
    large = max_exact + int(share * single(num_buckets - max_exact))
    return bucket + min(large, num_buckets - 1)


def alibi_slopes(n_head):
    """Press et al., 2022: the recursion of the authors' own code, for any number."""

    def of_power(n):
        start = 2.0 ** (-(2.0 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n_head).is_integer():
        return of_power(n_head)
    closest = 2 ** math.floor(math.log2(n_head))
    more = alibi_slopes(2 * closest)[0::2][: n_head - closest]
    return of_power(closest) + more


def alibi(slopes, q_positions, k_positions, symmetric=False):
    """Slope times offset, or minus slope times distance."""
    offset = offsets(q_positions, k_positions)
    if symmetric:
        offset = -np.abs(offset)
    return np.array([slope * offset for slope in np.asarray(slopes, float)])


def kerple(r1, r2, q_positions, k_positions, kernel):
    """Chi et al., 2022, section 4: -r1 log(1 + r2 |m - n|), or -r1 |m - n|^r2."""
    distance = np.abs(offsets(q_positions, k_positions))
    if kernel == "log":
        return np.array(
            [-a * np.log(1 + b * distance) for a, b in zip(r1, r2, strict=True)]
        )
    return np.array([-a * distance**b for a, b in zip(r1, r2, strict=True)])


def fire(mlp, q_positions, k_positions, c, threshold, eps):
    """Li et al., 2023: f(psi(i - j) / psi(max(i, L))), element by element."""

    def psi(x):
        return math.log(abs(c * x) + 1)

    def network(x):
        x = np.array([x])
        for i, (weight, shift) in enumerate(mlp):
            x = np.asarray(weight) @ (np.maximum(x, 0) if i else x) + np.asarray(shift)
        return x

    bias = [
        [network(psi(i - j) / (psi(max(i, threshold)) + eps)) for j in k_positions]
        for i in q_positions
    ]
    return np.moveaxis(np.array(bias), -1, 0)


def sandwich(n_head, dim, q_positions, k_positions, theta):
    """Chi et al., 2023: products of sinusoidal embeddings, compressed by 8 h / H."""

    def embedding(position):
        i = np.arange(dim // 2)
        angle = position / theta ** (2 * i / dim)
        return np.concatenate([np.sin(angle), np.cos(angle)])

    products = np.array(
        [[embedding(m) @ embedding(n) for n in k_positions] for m in q_positions]
    )
    return np.array([products / (8 * h / n_head) for h in range(1, n_head + 1)])
