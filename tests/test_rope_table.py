"""Tables of cosines and sines: how far from the truth, at any position.

The worst errors are printed at the end of the run, under "measured".
"""

# SPDX-License-Identifier: BSD-3-Clause

import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
import reference
from gufuncs import TABLE_ULP, lay_out
from hypothesis import given
from hypothesis import strategies as st

import posenc
from posenc import rope_cis, rope_table
from posenc._rope_check import fill_table

GOLDEN = Path(__file__).resolve().parent / "golden" / "cos_sin.json"
ROWS = json.loads(GOLDEN.read_text())
GROUPS = list(dict.fromkeys(row[0] for row in ROWS))
THETAS = (1e4, 5e5, 1e6)
LIMIT = 2.0**31
SMALL = 4e-6  # below it, two-level double products lose their last bits

both_types = pytest.mark.parametrize(
    "dtype", [np.float32, np.float64], ids=["float32", "float64"]
)
need_extended = pytest.mark.skipif(
    not reference.has_extended_precision(),
    reason="long double has no 64-bit significand here; the mpmath tests remain",
)


def inv_freq_of(theta, n_pair=64):
    return theta ** (-np.arange(n_pair) / n_pair)


def random_positions(rng, n):
    """Whole ones, fractional ones, of every size, up to both ends."""
    whole = rng.integers(-(2**31) + 1, 2**31, n // 2).astype(float)
    real = rng.uniform(-LIMIT, LIMIT, n // 4)
    small = rng.uniform(-1, 1, n - n // 2 - n // 4) * 2.0 ** rng.uniform(
        -20, 31, n - n // 2 - n // 4
    )
    ends = [LIMIT - 1, 1 - LIMIT, np.nextafter(LIMIT, 0), -np.nextafter(LIMIT, 0), 0]
    return np.concatenate([whole, real, small, ends])


# --- golden values -------------------------------------------------------------------


@both_types
@pytest.mark.parametrize("group", GROUPS)
def test_golden_values(group, dtype, measured):
    worst = 0.0
    for name, position, inv_freq, factor, *true in ROWS:
        if name != group:
            continue
        given_ = [float.fromhex(text) for text in (position, inv_freq, factor)]
        tables = rope_table(
            given_[:1], given_[1:2], attention_factor=given_[2], dtype=dtype
        )
        for got, text in zip(tables, true, strict=True):
            error = reference.ulp_error(got[0, 0], reference.from_hex(text), dtype)
            assert error <= TABLE_ULP[np.dtype(dtype)], given_
            worst = max(worst, error)
    measured(f"{np.dtype(dtype)!s:8} {worst:.4f} ulp  golden: {group}")


# --- random positions ----------------------------------------------------------------


@both_types
@pytest.mark.parametrize("theta", THETAS, ids=lambda theta: f"{theta:g}")
def test_random_positions_by_mpmath(theta, dtype, measured):
    rng = np.random.default_rng(int(theta))
    positions, inv_freq = random_positions(rng, 400), inv_freq_of(theta)[::4]
    factor = 1.3465735902799727 if theta == 5e5 else 1.0
    tables = rope_table(positions, inv_freq, attention_factor=factor, dtype=dtype)
    worst = reference.worst_ulp(*tables, positions, inv_freq, factor)
    measured(
        f"{np.dtype(dtype)!s:8} {worst:.4f} ulp  {tables[0].size * 2} entries by "
        f"mpmath, theta {theta:g}, factor {factor:.4g}, |position| < 2^31"
    )
    assert worst <= TABLE_ULP[np.dtype(dtype)]


@need_extended
@both_types
@pytest.mark.parametrize("theta", THETAS, ids=lambda theta: f"{theta:g}")
def test_random_positions_in_extended_precision(theta, dtype, measured):
    rng = np.random.default_rng(int(theta) + 1)
    positions, inv_freq = random_positions(rng, 12_000), inv_freq_of(theta)
    tables = rope_table(positions, inv_freq, dtype=dtype)
    worst = extended_worst(tables, positions, inv_freq)
    measured(
        f"{np.dtype(dtype)!s:8} {worst:.4f} ulp  {tables[0].size * 2} entries by "
        f"long double, theta {theta:g}, |position| < 2^31"
    )
    assert worst <= TABLE_ULP[np.dtype(dtype)]


def extended_worst(tables, positions, inv_freq):
    """Largest error of both tables, in ulp, judged in long double."""
    true = reference.extended_cos_sin(
        *np.broadcast_arrays(positions[:, None], inv_freq)
    )
    return max(
        float(reference.extended_ulp(got, want).max())
        for got, want in zip(tables, true, strict=True)
    )


@need_extended
def test_extended_reference_agrees_with_mpmath():
    """The vectorised judge is itself judged."""
    rng = np.random.default_rng(4)
    positions = np.concatenate(
        [random_positions(rng, 200), [355, 103993, 245850922, 411557987]]
    )
    inv_freq = np.array([1.0, 0.3, 1e-3, 1.2e-6])
    found = reference.extended_cos_sin(
        *np.broadcast_arrays(positions[:, None], inv_freq)
    )
    for index in np.ndindex(found[0].shape):
        true = reference.true_cos_sin(positions[index[0]], inv_freq[index[1]])
        for got, value in zip(found, true, strict=True):
            high = float(got[index])
            with reference.mp.workprec(200):
                exact = reference.mp.mpf(high) + float(got[index] - high)
                assert abs(exact - value) <= abs(value) * 2.0**-62


# --- a whole table of a model --------------------------------------------------------


@need_extended
def test_every_entry_of_a_long_table(measured):
    """All 131072 x 64 entries of both tables, at theta 5e5."""
    inv_freq = inv_freq_of(5e5)
    worst = 0.0
    for first in range(0, 131072, 8192):
        positions = np.arange(first, first + 8192, dtype=float)
        tables = rope_table(positions, inv_freq)
        worst = max(worst, extended_worst(tables, positions, inv_freq))
    measured(f"float32  {worst:.4f} ulp  all entries of 131072 x 64, theta 5e5")
    assert worst <= TABLE_ULP[np.dtype(np.float32)]


@both_types
@pytest.mark.parametrize("theta", THETAS, ids=lambda theta: f"{theta:g}")
def test_entries_of_a_long_table_next_to_zero(theta, dtype, measured):
    """Where |value| < 4e-6 by a double product, which is off by at most 2^-36 here."""
    positions, inv_freq = np.arange(131072.0), inv_freq_of(theta)
    tables = rope_table(positions, inv_freq, dtype=dtype)
    rough = np.multiply.outer(positions, inv_freq)
    count, worst = 0, 0.0
    for which, function in enumerate((np.cos, np.sin)):
        for row, pair in np.argwhere(np.abs(function(rough)) < SMALL + 2.0**-36):
            true = reference.true_cos_sin(positions[row], inv_freq[pair])[which]
            got = tables[which][row, pair]
            worst = max(worst, reference.ulp_error(got, true, dtype))
            count += 1
    measured(
        f"{np.dtype(dtype)!s:8} {worst:.4f} ulp  {count} entries below 4e-6 of "
        f"131072 x 64, theta {theta:g}"
    )
    assert count > 64
    assert worst <= TABLE_ULP[np.dtype(dtype)]


@both_types
def test_entries_far_out_next_to_zero(dtype, measured):
    """Products near 2^30 that lie 2^-12 to 2^-40 beside a multiple of pi/2.

    There the fast path loses the value's last bits and hands over to the slow one.
    """
    rng = np.random.default_rng(30)
    worst = 0.0
    with mpmath.workprec(200):
        for _ in range(3000):
            quarter = int(rng.integers(2**29, 2**30))
            beside = mpmath.ldexp(1 + rng.random(), -int(rng.integers(12, 41)))
            position = float(rng.uniform(2**10, 2**20))
            inv_freq = float((quarter * mpmath.pi / 2 + beside) / position)
            tables = rope_table([position], [inv_freq], dtype=dtype)
            which = 1 - quarter % 2  # the sine vanishes at even quarters
            true = reference.true_cos_sin(position, inv_freq)[which]
            error = reference.ulp_error(tables[which][0, 0], true, dtype)
            worst = max(worst, error)
    measured(f"{np.dtype(dtype)!s:8} {worst:.4f} ulp  3000 entries far out, near zero")
    assert worst <= TABLE_ULP[np.dtype(dtype)]


# --- a single entry is the double one rounded ----------------------------------------


def assert_double_rounded(positions, inv_freq, factor=1.0):
    """Compare with the double tables, which have one way only: however it lies."""
    options = {"attention_factor": factor}
    wide = rope_table(positions, inv_freq, dtype=np.float64, **options)
    with np.errstate(over="ignore", under="ignore"):
        want = [table.astype(np.float32) for table in wide]
    cis = rope_cis(positions, inv_freq, **options)
    apart = np.zeros((3, *want[0].shape, 2), np.float32)[::2, ..., 0]
    rope_table(positions, inv_freq, out=tuple(apart), **options)
    planar = rope_table(positions, inv_freq, **options)
    for tables in (planar, (cis.real, cis.imag), apart):
        for got, wanted in zip(tables, want, strict=True):
            reference.same_bits(got, wanted)


@pytest.mark.parametrize("theta", THETAS, ids=lambda theta: f"{theta:g}")
def test_every_single_entry_is_the_double_one_rounded(theta):
    positions, inv_freq = np.arange(131072.0), inv_freq_of(theta)
    wide = rope_table(positions, inv_freq, dtype=np.float64)
    for got, wanted in zip(rope_table(positions, inv_freq), wide, strict=True):
        reference.same_bits(got, wanted.astype(np.float32))


def whole_and_other_positions():
    """Rows by 16 and 256 that share bits, wherever they start, and what parts them."""
    rng = np.random.default_rng(16)
    rows = np.arange(700.0)
    broken = rows.copy()
    broken[rng.random(700) < 0.2] += 0.5
    broken[rng.random(700) < 0.05] = -0.0
    broken[rng.random(700) < 0.05] = np.nan
    broken[rng.random(700) < 0.05] = np.inf
    return {
        "from zero": rows,
        "too few": rows[:63],
        "across zero": rows - 350,
        "down": rows[::-1],
        "every third": 3 * rows,
        "each twice": rows // 2,
        "all zero": 0 * rows,
        "in any order": rng.permutation(rows),
        "not whole": rows + 0.25,
        "broken": broken,
        "random": rng.integers(-(2**31) + 1, 2**31, 700).astype(float),
        "up to 2^31": LIMIT - 700 + rows,
        "from -2^31": rows - LIMIT,
        "across 2^50": 2.0**50 - 350 + rows,
        "across 2^53": 2.0**53 - 350 + rows,
    }


@pytest.mark.parametrize("kind", whole_and_other_positions())
def test_rows_in_any_order(kind):
    positions = whole_and_other_positions()[kind]
    for n_pair in (1, 7, 64, 90):
        for theta, factor in ((1e4, 1.0), (1e6, 1.3465735902799727), (10, -0.7)):
            assert_double_rounded(positions, inv_freq_of(theta, n_pair), factor)


@pytest.mark.parametrize(
    "factor",
    [0.0, 5e-324, 2.0**-149, 2.0**-130, 1e-20, 1 + 2.0**-24, 3e38, 1e300],
)
def test_any_factor(factor):
    """Subnormal and huge results; 1 + 2^-24 puts cosines of small angles on a tie."""
    for theta in (5e5, 1e10):
        assert_double_rounded(np.arange(-200.0, 300), inv_freq_of(theta), factor)


def test_any_frequency():
    """Frequencies that products cannot take, and 0: rotary channels that stand."""
    positions = np.arange(-200.0, 300)
    assert_double_rounded(positions, np.zeros(64))
    for odd in (0.0, -0.0, -0.5, np.nan, np.inf, 5e-324, 1e-200, 1e-31, 1e31, 1e308):
        inv_freq = inv_freq_of(1e4)
        inv_freq[40] = odd
        assert_double_rounded(positions, inv_freq)
        assert_double_rounded(positions, inv_freq, -2.5)


# --- an entry depends on its own position and frequency ------------------------------


@both_types
@pytest.mark.parametrize("angles", ["exact", "float32"])
def test_one_row_is_its_row_in_any_range(dtype, angles):
    inv_freq = inv_freq_of(1e4, 70)
    options = {"angles": angles, "dtype": dtype, "attention_factor": 1.1902380714238083}
    for first, step in ((0, 1), (1, 1), (777, 1), (-40, 1), (2**31 - 300, 1), (0.5, 3)):
        positions = first + step * np.arange(257)
        whole = rope_table(positions, inv_freq, **options)
        for row in (0, 1, 63, 64, 65, 128, 256):
            alone = rope_table([positions[row]], inv_freq, **options)
            part = rope_table(positions[row:], inv_freq, **options)
            for one, rest, every in zip(alone, part, whole, strict=True):
                reference.same_bits(one[0], every[row])
                reference.same_bits(rest[0], every[row])


@both_types
@given(data=st.data())
def test_shape_and_memory_do_not_matter(dtype, data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
    n_pair = data.draw(st.sampled_from([0, 1, 2, 5, 63, 64, 65, 130]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    positions, inv_freq = rng.uniform(-LIMIT, LIMIT, shape), inv_freq_of(1e4, n_pair)
    factor = data.draw(st.sampled_from([1.0, 1.5]))
    options = {"dtype": dtype, "attention_factor": factor}
    tables = rope_table(positions, inv_freq, **options)
    for found in tables:
        assert found.shape == (*shape, n_pair)
        assert found.dtype == dtype
    moved = [
        lay_out(array, lambda choices: data.draw(st.sampled_from(choices)))
        for array in (positions, inv_freq)
    ]
    for found, again in zip(tables, rope_table(*moved, **options), strict=True):
        reference.same_bits(again, found)
    shuffled = rope_table(positions.T, inv_freq[::-1], **options)
    back = (*range(len(shape) - 1, -1, -1), len(shape))
    for moved, found in zip(shuffled, tables, strict=True):
        reference.same_bits(moved.transpose(back)[..., ::-1], found)
    if factor == 1.0:
        asked = posenc.ufunc.cos_sin(positions, inv_freq, dtype=dtype)
        for raw, found in zip(asked, tables, strict=True):
            reference.same_bits(raw, found)


@pytest.mark.parametrize("kind", ["i1", "i8", "u4", "f4", "f8", ">f8", list])
def test_positions_of_any_real_type(kind):
    values = [0, 1, 5, 100]
    positions = values if kind is list else np.array(values, kind)
    want = rope_table(np.array(values, float), [1.0, 0.25])
    for got, wanted in zip(rope_table(positions, [1.0, 0.25]), want, strict=True):
        reference.same_bits(got, wanted)


def test_float32_frequencies_are_taken_as_they_are():
    inv_freq = inv_freq_of(1e4).astype(np.float32)
    positions = np.array([1.0, 2**20 + 1, LIMIT - 1])
    tables = rope_table(positions, inv_freq)
    worst = reference.worst_ulp(*tables, positions, inv_freq)
    assert worst <= TABLE_ULP[np.dtype(np.float32)]


def test_tables_are_single_unless_asked():
    assert [t.dtype for t in rope_table([1], [1.0])] == [np.float32] * 2
    assert rope_cis([1], [1.0]).dtype == np.complex64


@both_types
def test_out_is_filled_and_returned(dtype):
    positions, inv_freq = np.arange(50.0).reshape(5, 10), inv_freq_of(1e4, 9)
    want = rope_table(positions, inv_freq, dtype=dtype, attention_factor=1.5)
    plain = tuple(np.zeros((5, 10, 9), dtype) for _ in "cs")
    strided = tuple(np.zeros((10, 10, 27), dtype)[::-2, :, ::3] for _ in "cs")
    both = np.zeros((5, 10, 9, 2), dtype)
    beside = np.zeros((5, 10, 18), dtype)
    parts = [(both[..., 0], both[..., 1]), (beside[..., :9], beside[..., 9:])]
    for out in (plain, strided, *parts):
        options = {"attention_factor": 1.5, "out": out, "dtype": dtype}
        got = rope_table(positions, inv_freq, **options)
        for result, given_, wanted in zip(got, out, want, strict=True):
            assert result is given_
            reference.same_bits(result, wanted)


def test_private_door_declines_tables_in_one_place():
    positions, inv_freq = np.arange(5.0), inv_freq_of(1e4, 3)
    memory = np.full((6, 6), 7.0)
    for first, second in (
        (memory[:5, :3], memory[:5, :3]),
        (memory[:5, :3], memory[1:, :3]),
        (memory[:5, ::2], memory[:5, :3]),
        (memory[:5, :3], positions[:, None] + inv_freq * 0 == 0),
    ):
        answer = posenc._core.cos_sin_arrays(
            positions, inv_freq, 1.0, False, first, second
        )
        assert answer is NotImplemented
        assert (memory == 7).all()


@both_types
def test_out_may_hold_the_positions_or_the_frequencies(dtype):
    inv_freq = inv_freq_of(1e4, 80).astype(np.float64)
    want = rope_table(np.arange(7.0), inv_freq, dtype=np.float64)
    out = tuple(np.zeros((7, 80)) for _ in "cs")
    out[0][:, 0] = np.arange(7.0)
    got = rope_table(out[0][:, 0], inv_freq, dtype=np.float64, out=out)
    for result, wanted in zip(got, want, strict=True):
        reference.same_bits(result, wanted)
    out = tuple(np.zeros((7, 80)) for _ in "cs")
    out[1][3] = inv_freq
    got = rope_table(np.arange(7.0), out[1][3], dtype=np.float64, out=out)
    for result, wanted in zip(got, want, strict=True):
        reference.same_bits(result, wanted)


@both_types
def test_an_angle_that_is_no_number_gives_the_one_nan(dtype):
    cos, sin = rope_table([np.nan, np.inf, -np.inf, 1.0], [1.0, np.nan], dtype=dtype)
    nan = np.array(np.nan, dtype)
    for found in (cos, sin):
        for index in ((0, 0), (0, 1), (1, 0), (2, 0), (3, 1)):
            reference.same_bits(found[index], nan)
        assert np.isfinite(found[3, 0])


@both_types
def test_symmetry(dtype):
    positions, inv_freq = (
        random_positions(np.random.default_rng(8), 500),
        inv_freq_of(1e4, 8),
    )
    cos, sin = rope_table(positions, inv_freq, dtype=dtype)
    minus_cos, minus_sin = rope_table(-positions, inv_freq, dtype=dtype)
    assert np.array_equal(minus_cos, cos)
    assert np.array_equal(minus_sin, -sin)


def test_fill_table_takes_a_number_for_an_array_without_axes():
    inv_freq = np.array([1.0, 0.1])
    want = rope_table(3, inv_freq)
    got = tuple(np.full(2, np.nan, np.float32) for _ in want)
    fill_table("rope_table", np.array([1.0, 3.0])[1], inv_freq, 1.0, "exact", *got)
    for ours, theirs in zip(got, want, strict=True):
        reference.same_bits(ours, theirs)
