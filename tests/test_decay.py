"""Decay, periods, wavelengths: against mpmath and the numbers of the literature."""

# SPDX-License-Identifier: BSD-3-Clause

import math

import numpy as np
import pytest
import reference
from gufuncs import DECAY_BOUND, within_decay_bound
from mpmath import mp

import posenc
from posenc import (
    complete_turns,
    rope_decay,
    rope_inv_freq,
    rope_matrix,
    rope_period,
    sinusoidal,
    sinusoidal_similarity,
    wavelengths,
)

# A product of rows: a sine or cosine is off by 2**-53 at most, and a term passes fewer
# than 30 additions, each off by 2**-53 of at most the number of pairs.
SIMILARITY_BOUND = 2.0**-47
# Decay with real frequencies, which are off by 14 * 2**-53 of themselves, for distances
# below 1000.
FORMULA_BOUND = 2.0**-38
# A frequency (tests/test_scaling.py), the division and the rounding of 2 * pi.
PERIOD_BOUND = 18 * 2.0**-53

LINEAR = {"rope_type": "linear", "factor": 4.0}
NTK = {"rope_type": "ntk", "alpha": 8.0}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
}


# --- decay ---------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 64, 128, 1024])
@pytest.mark.parametrize(
    "distance", [0.0, 1.0, -3.0, 0.5, 131072.0, 2.0**31 - 1, -(2.0**53), 1e300]
)
def test_decay_is_exact_at_any_distance(dim, distance):
    inv_freq, _ = rope_inv_freq(dim)
    got = rope_decay(distance, inv_freq)
    error = abs(mp.mpf(float(got)) - reference.true_decay(distance, inv_freq))
    assert error <= dim // 2 * DECAY_BOUND


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_pair", [1, 7, 8, 63, 64, 65, 128, 1000])
def test_decay_keeps_its_bound(n_pair, dtype):
    """Whole and other distances by turns, near each other and not; blocks and rests."""
    rng = np.random.default_rng(n_pair)
    inv_freq = 10.0 ** rng.uniform(-6, 0.5, n_pair)
    whole = rng.integers(-(2**40), 2**40, 3)[:, None] + np.arange(3)
    distance = np.concatenate([whole.ravel(), rng.uniform(-1e6, 1e6, 5)])
    rng.shuffle(distance)
    got = rope_decay(distance, inv_freq, dtype=dtype)
    assert got.dtype == dtype
    within_decay_bound([got], [distance, inv_freq])


@pytest.mark.parametrize("n_pair", [1, 5, 64, 100])
def test_distance_0_and_pairs_that_stand_still_are_exact(n_pair):
    assert rope_decay(0, np.full(n_pair, 1e300)) == 2 * n_pair
    assert rope_decay(-0.0, np.full(n_pair, 5e-324)) == 2 * n_pair
    assert rope_decay(2**53, np.full(n_pair, 5e-324)) == 2 * n_pair


@pytest.mark.parametrize("dim", [4, 128])
def test_decay_is_the_formula(dim):
    distances = [0, 1, 7, 100, 999]
    inv_freq, _ = rope_inv_freq(dim)
    got = rope_decay(distances, inv_freq)
    for value, distance in zip(got, distances, strict=True):
        with mp.workprec(200):
            angles = [distance * f for f in reference.true_inv_freq(dim)]
            true = 2 * mp.fsum(mp.cos(angle) for angle in angles)
            assert abs(mp.mpf(float(value)) - true) <= dim * FORMULA_BOUND


@pytest.mark.parametrize("dim", [2, 64, 256])
def test_frequencies_of_zero_do_not_decay_and_those_of_one_give_a_cosine(dim):
    x = np.linspace(-50, 5000, 997)
    assert (rope_decay(x, np.zeros(dim // 2)) == dim).all()
    got = rope_decay(x, np.ones(dim // 2))
    np.testing.assert_allclose(got, dim * np.cos(x), rtol=0, atol=dim * DECAY_BOUND)


def test_it_is_the_product_of_ones_rotated():
    """What the paper's section 3.4.3 is about: a logit, by the dense rotation."""
    inv_freq, _ = rope_inv_freq(16)
    for query, key in ((3, 0), (0, 7), (1000, 12)):
        rows = [rope_matrix(x, inv_freq).sum(-1) for x in (query, key)]
        got = rope_decay(query - key, inv_freq)
        # The matrices hold float64 cosines and sines; 16 products of at most 2.
        np.testing.assert_allclose(got, rows[0] @ rows[1], rtol=0, atol=2.0**-44)


def test_it_decays_within_a_quarter_of_the_period_and_comes_back_with_few_pairs():
    """Means over windows, which average the oscillation, fall."""
    inv_freq, _ = rope_inv_freq(256)
    x = np.arange(1, rope_period(256) / 4)
    means = [part.mean() for part in np.split(rope_decay(x, inv_freq), [16, 256, 4096])]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.2 * 256
    # Two pairs: after a whole period, which is 100 turns of the fast pair, all
    # is as at the start.
    few, _ = rope_inv_freq(4)
    assert rope_decay(2 * math.pi * 100, few) > 3.999999
    assert rope_decay(math.pi * 100, few) < 1e-6


def test_a_larger_base_decays_more_slowly():
    bases = 1e2, 1e4, 1e6
    x = np.arange(500, 1500)
    means = [rope_decay(x, rope_inv_freq(128, theta=b)[0]).mean() for b in bases]
    assert means == sorted(means)


def test_scaling_stretches_decay():
    inv_freq, _ = rope_inv_freq(64)
    slower, _ = rope_inv_freq(64, scaling=LINEAR)
    x = np.arange(0, 4000, 4)
    got, want = rope_decay(x, slower), rope_decay(x / 4, inv_freq)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * 32 * DECAY_BOUND)


def test_a_sum_depends_on_its_own_distance_only():
    inv_freq, _ = rope_inv_freq(2050)
    x = np.concatenate([np.arange(-3, 1030), np.arange(200) * 37.5])  # past 1024 rows
    got = rope_decay(x, inv_freq)
    np.testing.assert_array_equal(got, [rope_decay(v, inv_freq) for v in x])
    np.testing.assert_array_equal(got, rope_decay(-x, inv_freq))
    np.testing.assert_array_equal(got[::-2], rope_decay(x[::-2], inv_freq))
    np.testing.assert_array_equal(got, rope_decay(x[None, :, None], inv_freq)[0, :, 0])


def test_decay_of_strange_numbers_and_of_nothing():
    got = rope_decay([np.nan, np.inf, 0, -np.inf], [1.0, 2.0])
    assert np.isnan(got[[0, 1, 3]]).all() and got[2] == 4
    for strange in (np.nan, np.inf, -np.inf):
        reference.same_bits(rope_decay([0, 5], [1, strange]), np.full(2, np.nan))
    reference.same_bits(rope_decay([np.nan, np.inf], []), np.zeros(2))
    assert rope_decay([], [1.0]).shape == (0,)
    assert rope_decay(np.ones((2, 0)), [1.0]).shape == (2, 0)
    assert (rope_decay([1, 2], []) == 0).all()
    assert rope_decay(3, [1.0]).shape == ()


def test_decay_dtype_and_out():
    inv_freq, _ = rope_inv_freq(64)
    x = np.arange(6.0).reshape(2, 3)
    want = rope_decay(x, inv_freq)
    single = rope_decay(x, inv_freq, dtype=np.float32)
    np.testing.assert_array_equal(single, want.astype(np.float32))
    out = np.full((3, 2), 7.0).T
    assert rope_decay(x, inv_freq, out=out) is out
    np.testing.assert_array_equal(out, want)
    assert rope_decay(x, inv_freq, out=x) is x  # its own distances
    np.testing.assert_array_equal(x, want)


@pytest.mark.parametrize("shape", [(8,), (70,), (5, 5), (4, 4, 4), (140, 140)])
def test_out_may_be_the_frequencies(shape):
    """NumPy finds two arrays of one shape; but every sum needs a whole row of one."""
    rng = np.random.default_rng(0)
    inv_freq, distance = rng.random(shape), rng.integers(0, 99, shape).astype(float)
    for given in (distance, inv_freq.copy()):
        frequencies = inv_freq.copy()
        want = posenc.ufunc.rope_decay(given, inv_freq)
        got = posenc.ufunc.rope_decay(given, frequencies, out=frequencies)
        assert got is frequencies
        reference.same_bits(got, want)
    want = posenc.ufunc.rope_decay(inv_freq, inv_freq)
    reference.same_bits(posenc.ufunc.rope_decay(*[inv_freq] * 2, out=inv_freq), want)


def test_frequencies_of_each_row_and_of_all_give_the_same_bits():
    inv_freq, _ = rope_inv_freq(256)
    x = np.arange(-40.0, 60.0) * 1.5
    got = posenc.ufunc.rope_decay(x, np.tile(inv_freq, (x.size, 1)))
    reference.same_bits(got, rope_decay(x, inv_freq))
    single = inv_freq.astype(np.float32)
    got = posenc.ufunc.rope_decay(x, single)
    assert got.dtype == np.float32
    reference.same_bits(got, rope_decay(x, single, dtype=np.float32))
    wide = posenc.ufunc.rope_decay(x, single, dtype=np.float64)
    reference.same_bits(wide, rope_decay(x, single))


# --- similarity ----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, 7, 128])
@pytest.mark.parametrize("layout", ["interleaved", "concat_flipped"])
def test_similarity_is_the_product_of_rows(dim, layout):
    a, b = [0, 3, 1.5, -8], [0.0, 1e6, 12.0]
    rows = [sinusoidal(x, dim, layout=layout, dtype=np.float64) for x in (a, b)]
    got = sinusoidal_similarity(a, b, dim)
    want = [[math.fsum(p * q) for q in rows[1]] for p in rows[0]]
    np.testing.assert_allclose(got, want, rtol=0, atol=(dim + 1) * SIMILARITY_BOUND)


@pytest.mark.parametrize("theta", [10000.0, 50.0])
def test_similarity_is_half_the_decay_of_the_same_frequencies(theta):
    a, b = np.array([0, 70, 2**30]), np.arange(0, 500, 7)
    inv_freq, _ = rope_inv_freq(64, theta=theta)
    got = sinusoidal_similarity(a, b, 64, theta=theta)
    # A frequency may be off by 14 * 2**-53 of itself, times the distance.
    want = rope_decay(a[:, None] - b, inv_freq) / 2
    np.testing.assert_allclose(got[:2], want[:2], rtol=0, atol=64 * FORMULA_BOUND)
    assert np.abs(got).max() <= 32 * (1 + SIMILARITY_BOUND)
    assert got[0, 0] == pytest.approx(32, abs=32 * SIMILARITY_BOUND)


@pytest.mark.parametrize("shape", [(150,), (2, 3, 25)])
def test_similarity_of_positions_with_themselves(shape):
    x = np.random.default_rng(0).uniform(-1e5, 1e5, shape)
    got = sinusoidal_similarity(x, x.copy(), 48)
    np.testing.assert_array_equal(got, got.mT)
    others = np.concatenate([x, x[..., :1]], -1)
    want = sinusoidal_similarity(x, others, 48)[..., :-1]
    np.testing.assert_allclose(got, want, rtol=0, atol=49 * SIMILARITY_BOUND)


def test_the_query_at_position_0_oscillates_and_decays():
    curve = sinusoidal_similarity([0], range(2000), 128)[0]
    assert (np.diff(curve) > 0).any()
    envelope = [part.max() for part in np.split(curve, [10, 100, 1000])]
    assert envelope == sorted(envelope, reverse=True)


def test_similarity_of_batches_in_float32_and_into_out():
    a, b = np.arange(6.0).reshape(2, 1, 3), np.arange(8.0).reshape(2, 4)
    want = sinusoidal_similarity(a, b, 16)
    assert want.shape == (2, 2, 3, 4)
    one = sinusoidal_similarity(a[1, 0], b[0], 16)
    np.testing.assert_allclose(want[1, 0], one, rtol=0, atol=16 * SIMILARITY_BOUND)
    out = np.empty(want.shape, np.float32)
    got = sinusoidal_similarity(a, b, 16, dtype=np.float32, out=out)
    assert got is out
    np.testing.assert_array_equal(out, want.astype(np.float32))
    assert np.isnan(sinusoidal_similarity([0, np.inf], [1], 4)).tolist() == [
        [False],
        [True],
    ]


# --- periods -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "quarter"), [(4, 628 / 4), (256, 14617), (4096, 15637)]
)
def test_published_periods(dim, quarter):
    """Printed as whole numbers: 628 for 4 channels; quarters for 256 and 4096."""
    assert rope_period(dim) / 4 == pytest.approx(quarter, abs=0.5)


@pytest.mark.parametrize("theta", [1.5, 10000.0, 500000.0])
@pytest.mark.parametrize("dim", [2, 4, 128, 4096])
def test_period_is_the_formula(dim, theta):
    with mp.workprec(200):
        true = 2 * mp.pi * mp.power(theta, 1 - mp.mpf(2) / dim)
        error = abs(mp.mpf(rope_period(dim, theta)) / true - 1)
    assert error <= PERIOD_BOUND
    assert (
        rope_period(dim, theta=theta)
        == wavelengths(rope_inv_freq(dim, theta=theta)[0]).max()
    )


def test_a_larger_base_lengthens_the_period():
    periods = [rope_period(64, theta) for theta in (1e2, 1e4, 5e5, 1e6)]
    assert periods == sorted(periods)


def test_period_of_scaled_frequencies():
    plain = rope_period(128)
    for scaling, longer in ((LINEAR, 4), (NTK, 8), (YARN, 4)):
        got = rope_period(128, scaling=scaling)
        assert got / plain == pytest.approx(longer, rel=2 * PERIOD_BOUND)
    dynamic = {"rope_type": "dynamic", "factor": 2, "max_position_embeddings": 100}
    assert rope_period(128, scaling=dynamic) == plain
    got = rope_period(128, scaling=dynamic, seq_len=300)  # alpha 2 * 3 - 1
    assert got / plain == pytest.approx(5, rel=2 * PERIOD_BOUND)
    some = {"rope_type": "proportional", "partial_rotary_factor": 0.5}
    assert rope_period(128, scaling=some) == math.inf
    assert rope_period(128, scaling={"rope_theta": 5e5}) == rope_period(128, 5e5)


# --- wavelengths and turns -----------------------------------------------------------


def test_wavelengths_are_the_formula():
    got = wavelengths(rope_inv_freq(64, theta=5e5)[0])
    for value, true in zip(got, reference.true_inv_freq(64, 5e5), strict=True):
        with mp.workprec(200):
            assert abs(mp.mpf(float(value)) * true / (2 * mp.pi) - 1) <= PERIOD_BOUND


def test_wavelengths_of_strange_frequencies():
    got = wavelengths([0.0, -0.0, -2.0, np.inf, np.nan])
    np.testing.assert_array_equal(got, [np.inf, np.inf, np.pi, 0, np.nan])
    assert wavelengths(np.ones(3, np.float32)).dtype == np.float64
    assert wavelengths([]).shape == (0,)


def test_scalings_stretch_wavelengths():
    plain = wavelengths(rope_inv_freq(128)[0])
    stretch = {
        name: wavelengths(rope_inv_freq(128, scaling=scaling)[0]) / plain
        for name, scaling in (("linear", LINEAR), ("ntk", NTK), ("yarn", YARN))
    }
    np.testing.assert_allclose(stretch["linear"], 4, rtol=PERIOD_BOUND)
    # A base alpha ** (128 / 126) as large: pair i by alpha ** (i / 63).
    want = 8.0 ** (np.arange(64) / 63)
    np.testing.assert_allclose(stretch["ntk"], want, rtol=2 * PERIOD_BOUND)
    turns = 4096 / plain
    np.testing.assert_allclose(stretch["yarn"][turns > 40], 1, rtol=PERIOD_BOUND)
    np.testing.assert_allclose(stretch["yarn"][turns < 0.8], 4, rtol=PERIOD_BOUND)
    between = stretch["yarn"][(turns > 2) & (turns < 20)]
    assert ((between > 1) & (between < 4)).all()


@pytest.mark.parametrize("length", [0, 6, 6.3, 1000, 4096, 54409, 54411])
def test_turns_are_counted(length):
    want = sum(length * f >= 2 * mp.pi for f in reference.true_inv_freq(128))
    got = complete_turns(rope_inv_freq(128)[0], length)
    assert type(got) is int
    assert got == want


def test_turns_of_scaled_frequencies():
    """Linear scaling gives the turns of a length to one `factor` times as long."""
    plain, _ = rope_inv_freq(128)
    for length in (100, 4096, 20000):
        linear = complete_turns(rope_inv_freq(128, scaling=LINEAR)[0], 4 * length)
        assert linear == complete_turns(plain, length)
    trained = complete_turns(plain, 4096)
    for scaling in (LINEAR, NTK, YARN):
        slower, _ = rope_inv_freq(128, scaling=scaling)
        assert complete_turns(slower, 4096) < trained
    assert complete_turns([0.0, 1.0, -1.0, np.nan], 1e300) == 2


# --- tensors -------------------------------------------------------------------------


def test_tensors_give_tensors():
    torch = pytest.importorskip("torch")
    inv_freq = torch.tensor([1.0, 0.1])
    x = torch.arange(4)
    calls = [
        (rope_decay(x, inv_freq), rope_decay(x.numpy(), inv_freq.numpy())),
        (wavelengths(inv_freq), wavelengths(inv_freq.numpy())),
        (
            sinusoidal_similarity(x, [0, 1], 4),
            sinusoidal_similarity(range(4), [0, 1], 4),
        ),
    ]
    for got, want in calls:
        assert got.dtype == torch.float64
        np.testing.assert_array_equal(got.numpy(), want)
    out = torch.empty(4, dtype=torch.float32)
    version = out._version
    assert rope_decay(x, inv_freq, dtype=torch.float32, out=out) is out
    assert out._version > version
    assert complete_turns(inv_freq, 7) == 1
