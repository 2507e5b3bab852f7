"""Tables of axial RoPE, M-RoPE and xPos: formulas, scores, other people's programs."""

# SPDX-License-Identifier: BSD-3-Clause

import types
import warnings

import numpy as np
import pytest
import reference
from mpmath import mp

import posenc
from posenc import (
    rope,
    rope_inv_freq,
    rope_table,
    rope_table_axial,
    rope_table_sections,
    rope_table_xpos,
)

# The contract, in ulp and of the size of an entry.
XPOS_ULP, XPOS_FLOAT64 = 0.501, 1e-15
# Scores in float64 of some dozen products, of the size of the largest.
SCORE = 1e-12
# Cosine and sine of float32 angles: ours and torch's are within 1 ulp of the true ones.
COS_SIN_FLOAT32 = 2.0**-23


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def same(tables, others):
    return all(np.array_equal(a, b) for a, b in zip(tables, others, strict=True))


# --- grids ---------------------------------------------------------------------------


@pytest.mark.parametrize("indexing", ["ij", "xy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("angles", ["exact", "float32"])
def test_axial_is_a_table_for_each_axis(indexing, dtype, angles):
    shape, inv_freq = (3, range(5, 9), [0.5, -1.25]), np.array([1.0, 0.3, 0.01])
    options = {"attention_factor": 1.25, "angles": angles, "dtype": dtype}
    got = rope_table_axial(shape, inv_freq, indexing=indexing, **options)
    grid = np.stack(np.meshgrid(range(3), *shape[1:], indexing="ij"))
    order = grid if indexing == "ij" else grid[::-1]
    want = [np.concatenate(t, -1) for t in zip(
        *(rope_table(axis, inv_freq, **options) for axis in order), strict=True)
    ]  # fmt: skip
    assert got[0].shape == (3, 4, 2, 9)
    assert got[0].dtype == dtype
    assert same(got, want)


def test_axial_with_frequencies_for_each_axis():
    """Pixtral deals the frequencies of a head to rows and columns in turn."""
    inv_freq, _ = rope_inv_freq(16)
    got = rope_table_axial((3, 4), inv_freq.reshape(-1, 2).T)
    rows, columns = np.divmod(np.arange(12), 4)
    for table, of_rows, of_columns in zip(
        got, rope_table(rows, inv_freq), rope_table(columns, inv_freq), strict=True
    ):
        table = table.reshape(12, 8)
        assert np.array_equal(table[:, :4], of_rows[:, 0::2])
        assert np.array_equal(table[:, 4:], of_columns[:, 1::2])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_axial_scores_depend_on_the_distances(layout):
    inv_freq, _ = rope_inv_freq(8, theta=100.0)
    tables = rope_table_axial((7, 6), inv_freq, dtype=np.float64)
    q, k = (
        rope(np.broadcast_to(normal(16, seed=seed), (7, 6, 16)), *tables, layout=layout)
        for seed in (1, 2)
    )
    scores = np.einsum("ijd,kld->ijkl", q, k)
    moved = scores[1:, 2:, 1:, 2:]
    assert np.abs(moved - scores[:-1, :-2, :-1, :-2]).max() <= SCORE
    assert np.abs(scores[0, 1] - scores[1, 0]).max() > 1e-3  # rows are not columns


def test_axial_into_given_memory_and_from_it():
    out = np.empty((3, 2, 4)), np.empty((2, 4, 3)).transpose(2, 0, 1)
    got = rope_table_axial((3, 2), [1.0, 0.5], dtype="f8", out=out)
    assert got[0] is out[0]
    assert got[1] is out[1]
    assert same(out, rope_table_axial((3, 2), [1.0, 0.5], dtype="f8"))
    out[0][...] = 0.5  # both the positions and the result
    rope_table_axial((out[0][:, 0, 0], 2), [1.0, 0.5], dtype="f8", out=out)
    assert same(out, rope_table_axial(([0.5] * 3, 2), [1.0, 0.5], dtype="f8"))


def test_axial_with_nothing():
    assert rope_table_axial((0, 3), [1.0])[0].shape == (0, 3, 2)
    assert rope_table_axial((2, 3), [])[1].shape == (2, 3, 0)


def test_axial_as_qwen2_vl_rotates_patches():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs

    n_row, n_column, head_dim = 6, 10, 80
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 40, 2, dtype=torch.float) / 40)
    got = rope_table_axial((n_row, n_column), inv_freq, angles="float32")
    got = [table.reshape(-1, 40) for table in got]
    row, column = np.divmod(np.arange(n_row * n_column), n_column)
    angles = [torch.tensor(p)[:, None].float() * inv_freq for p in (row, column)]
    angle = torch.cat([*angles, *angles], -1)  # of rows, of columns, and once more
    for table, of_torch in zip(got, (angle.cos(), angle.sin()), strict=True):
        full = torch.cat([table, table], -1)
        assert (full - of_torch).abs().max() <= COS_SIN_FLOAT32
    q = torch.from_numpy(normal(60, 4, head_dim).astype(np.float32))
    full = [torch.cat([table, table], -1) for table in got]
    want, _ = theirs.apply_rotary_pos_emb_vision(q, q, *full)
    assert torch.equal(rope(q, *got, axis=0), want)


def test_axial_as_pixtral_rotates_patches():
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    from transformers.models.pixtral import modeling_pixtral as theirs

    config = transformers.PixtralVisionConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32
    )
    module = theirs.PixtralVisionRotaryEmbedding(config)
    n_row, n_column = 5, 7
    places = torch.cartesian_prod(torch.arange(n_row), torch.arange(n_column))
    q = torch.from_numpy(normal(1, 2, 35, 32).astype(np.float32))
    full = module(q, places)
    theta = config.rope_parameters["rope_theta"]
    inv_freq, _ = rope_inv_freq(32, theta=theta, dtype=np.float32)
    inv_freq = inv_freq.reshape(-1, 2).T
    got = rope_table_axial((n_row, n_column), inv_freq, angles="float32")
    got = [torch.from_numpy(table.reshape(35, 16)) for table in got]
    for table, true in zip(got, full, strict=True):
        error = (torch.cat([table, table], -1) - true).abs().max()
        # Their frequencies are torch's powers, up to an ulp from ours.
        assert error <= n_column * 2.0**-23 + COS_SIN_FLOAT32
    want, _ = theirs.apply_rotary_pos_emb(q, q, *full, unsqueeze_dim=0)
    assert torch.equal(rope(q, *(table[:, :16] for table in full)), want)


def test_axial_as_llama_4_rotates_patches():
    """x before y, counted from 1, consecutive channels."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.llama4 import modeling_llama4 as theirs

    config = types.SimpleNamespace(
        image_size=70,
        patch_size=14,
        hidden_size=64,
        num_attention_heads=2,
        rope_parameters={"rope_theta": 10000.0},
    )
    want = theirs.Llama4VisionRotaryEmbedding._compute_freqs_ci(config)[:-1, 0]
    inv_freq, _ = rope_inv_freq(16, dtype=np.float32)
    sides = (range(1, 6), range(1, 6))
    got = rope_table_axial(sides, inv_freq, indexing="xy", angles="float32")
    for table, true in zip(got, (want.real, want.imag), strict=True):
        table = torch.from_numpy(table.reshape(25, 16))
        # Their frequencies are torch's powers, up to an ulp from ours.
        assert (table - true).abs().max() <= 5 * 2.0**-23 + COS_SIN_FLOAT32


# --- sections ------------------------------------------------------------------------


def of_axis(positions, inv_freq, axes, **options):
    """Take pair i from the table of positions axes[i], the slow way."""
    tables = [rope_table(own, inv_freq, **options) for own in positions]
    pairs = enumerate(axes)
    cos, sin = zip(*((tables[a][0][..., i], tables[a][1][..., i]) for i, a in pairs),
                   strict=True)  # fmt: skip
    return np.stack(cos, -1), np.stack(sin, -1)


SECTIONS = [
    ([2, 3, 3], False, "00111222"),
    ([3, 3, 2], True, "01201201"),
    ([4, 2, 2], True, "01201200"),
    ([8, 0, 0], True, "00000000"),
    ([0, 8, 0], False, "11111111"),
    ([2, 1, 1, 2, 1, 1], False, "00120012"),
]


@pytest.mark.parametrize(("sections", "interleaved", "axes"), SECTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_which_axis_feeds_which_pair(sections, interleaved, axes, dtype):
    axes = [int(axis) for axis in axes]
    positions = np.random.default_rng(0).integers(-50, 50, (3, 2, 7))
    inv_freq, options = rope_inv_freq(16)[0], {"attention_factor": 1.5, "dtype": dtype}
    got = rope_table_sections(
        positions, inv_freq, sections, interleaved=interleaved, **options
    )
    assert got[0].dtype == dtype
    assert got[0].shape == (2, 7, 8)
    assert same(got, of_axis(positions, inv_freq, axes, **options))


@pytest.mark.parametrize("interleaved", [False, True])
def test_sections_of_other_numbers_of_axes(interleaved):
    positions, inv_freq = np.arange(8.0).reshape(4, 2), np.linspace(1, 0.1, 8)
    got = rope_table_sections(positions, inv_freq, [2] * 4, interleaved=interleaved)
    axes = [0, 1, 2, 3] * 2 if interleaved else [0, 0, 1, 1, 2, 2, 3, 3]
    assert same(got, of_axis(positions, inv_freq, axes))
    one = rope_table_sections(positions[:1], inv_freq, [8], interleaved=interleaved)
    assert same(one, rope_table(positions[0], inv_freq))


@pytest.mark.parametrize("interleaved", [False, True])
def test_text_is_rotated_as_ever(interleaved):
    inv_freq, _ = rope_inv_freq(128, theta=1e6)
    positions = np.broadcast_to(np.arange(9), (3, 9))
    got = rope_table_sections(
        positions, inv_freq, [24, 20, 20], interleaved=interleaved
    )
    assert same(got, rope_table(range(9), inv_freq))


@pytest.mark.parametrize("interleaved", [False, True])
def test_sections_scores_depend_on_the_distances(interleaved):
    inv_freq, _ = rope_inv_freq(16, theta=100.0)
    positions = np.random.default_rng(0).integers(0, 9, (3, 12))
    shift = np.array([[4], [7], [-3]])
    scores = []
    for moved in (positions, positions + shift):
        tables = rope_table_sections(
            moved, inv_freq, [3, 3, 2], interleaved=interleaved, dtype="f8"
        )
        q, k = (rope(normal(12, 16, seed=s), *tables) for s in (3, 4))
        scores.append(q @ k.T)
    assert np.abs(scores[0] - scores[1]).max() <= SCORE


@pytest.mark.parametrize("interleaved", [False, True])
def test_sections_into_given_memory_and_from_it(interleaved):
    options = {"interleaved": interleaved, "dtype": "f8"}
    positions, inv_freq = normal(3, 5), np.linspace(1, 0.1, 3)
    want = rope_table_sections(positions, inv_freq, [1, 1, 1], **options)
    memory = np.empty((5, 6))
    memory[:, :3] = positions.T
    out = memory[:, :3], memory[:, 3:]
    got = rope_table_sections(memory[:, :3].T, inv_freq, [1, 1, 1], out=out, **options)
    assert got[0] is out[0]
    assert same(out, want)


def test_sections_of_tensors():
    torch = pytest.importorskip("torch")
    positions = torch.arange(12).reshape(3, 4)
    got = rope_table_sections(positions, torch.ones(3), [1, 1, 1], dtype=torch.float64)
    assert all(table.dtype is torch.float64 for table in got)
    want = rope_table_sections(positions.numpy(), np.ones(3), [1, 1, 1], dtype="f8")
    assert same([table.numpy() for table in got], want)
    versions = [table._version for table in got]
    rope_table_sections(positions, [1.0] * 3, [1, 1, 1], dtype="f8", out=got)
    assert [table._version for table in got] > versions


def multimodal(family, section, head_dim=128):
    """Return the module of a family that makes its tables."""
    pytest.importorskip("transformers")
    if family == "qwen2_vl":
        from transformers.models.qwen2_vl import Qwen2VLTextConfig as Config
        from transformers.models.qwen2_vl.modeling_qwen2_vl import (
            Qwen2VLRotaryEmbedding as Rotary,
        )
    else:
        from transformers.models.qwen3_vl import Qwen3VLTextConfig as Config
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            Qwen3VLTextRotaryEmbedding as Rotary,
        )
    scaling = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    return Rotary(
        Config(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=head_dim,
            rope_parameters=scaling,
        )
    )


FAMILIES = [
    ("qwen2_vl", [16, 24, 24], 128),
    ("qwen2_vl", [5, 2, 1], 16),
    ("qwen3_vl", [24, 20, 20], 128),
    ("qwen3_vl", [11, 11, 10], 64),
    ("qwen3_vl", [6, 1, 1], 16),
]


@pytest.mark.parametrize(("family", "section", "head_dim"), FAMILIES)
def test_sections_as_transformers_has_them(family, section, head_dim):
    torch = pytest.importorskip("torch")
    module = multimodal(family, section, head_dim)
    positions = torch.from_numpy(np.random.default_rng(1).integers(0, 4096, (3, 2, 9)))
    interleaved = family == "qwen3_vl"
    options = {"interleaved": interleaved, "angles": "float32"}
    inv_freq = module.inv_freq.numpy()
    got = rope_table_sections(positions, inv_freq, section, **options)
    # Our numbers by their choice of axes: the same bits.
    tables = rope_table(positions, inv_freq, angles="float32")
    chosen = [module.recomposition_frequencies(table.clone()) for table in tables]
    for table, true in zip(got, chosen, strict=True):
        assert torch.equal(torch.cat([table, table], -1), true)
    # All of theirs: cosines and sines are torch's.
    q = torch.from_numpy(normal(2, 4, 9, head_dim).astype(np.float32))
    full = module(q, positions)
    for table, true in zip(got, full, strict=True):
        error = (torch.cat([table, table], -1) - true).abs().max()
        assert error <= COS_SIN_FLOAT32
    # And the rotation itself, by their table.
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

    want, _ = apply_rotary_pos_emb(q, q, *full)
    n_pair = head_dim // 2
    assert torch.equal(rope(q, *(table[..., :n_pair] for table in full)), want)
    assert (rope(q, *got) - want).abs().max() <= 16 * COS_SIN_FLOAT32


# --- xPos ----------------------------------------------------------------------------


def true_xpos(position, inv_freq, pair, n_pair, reference_, keys, base=512, gamma=0.4):
    """Sun et al., 2022, algorithm 1, with torchscale's base, by mpmath."""
    with mp.workprec(400):
        zeta = (mp.mpf(pair) / n_pair + mp.mpf(gamma)) / (1 + mp.mpf(gamma))
        power = (mp.mpf(position) - reference_) / base
        scale = zeta ** (-power if keys else power)
        angle = mp.mpf(position) * mp.mpf(inv_freq)
        return scale * mp.cos(angle), scale * mp.sin(angle)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("reference_", [0, 1024.5])
def test_xpos_by_mpmath(keys, reference_, measured):
    inv_freq, _ = rope_inv_freq(16)
    positions = [0, 1, 2, 511, 512.25, 4096, -3000, 30001]
    options = {"keys": keys, "reference": reference_}
    narrow = rope_table_xpos(positions, inv_freq, **options)
    wide = rope_table_xpos(positions, inv_freq, dtype=np.float64, **options)
    worst, worst_wide = 0.0, 0.0
    for t, position in enumerate(positions):
        most = XPOS_FLOAT64 * (1 + abs(position - reference_) / 512)
        for i, freq in enumerate(inv_freq):
            true = true_xpos(position, freq, i, 8, reference_, keys)
            for table, exact, value in zip(narrow, wide, true, strict=True):
                error = reference.ulp_error(table[t, i], value, np.float32)
                worst = max(worst, error)
                if value:
                    off = abs(mp.mpf(float(exact[t, i])) / value - 1)
                    worst_wide = max(worst_wide, float(off) / most)
                else:
                    assert exact[t, i] == 0
    measured(f"float32  {worst:.4f} ulp  xPos, keys {keys}, reference {reference_}")
    assert worst <= XPOS_ULP
    assert worst_wide <= 1


def torchscale_xpos(x, offset, downscale, scale_base=512):
    """Rotate (T, D) as torchscale publishes it, in float64, number by number.

    Positions count from 0, the powers of the scale from minus half the length on.
    """
    length, head_dim = x.shape
    first = -(length + offset) // 2
    result = np.empty_like(x)
    for t in range(length):
        position = offset + t
        for i in range(head_dim // 2):
            scale = (2 * i + 0.4 * head_dim) / (1.4 * head_dim)
            scale **= (first + position) / scale_base
            scale = 1 / scale if downscale else scale
            angle = position / 10000 ** (2 * i / head_dim)
            cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
            a, b = x[t, 2 * i : 2 * i + 2]
            result[t, 2 * i] = a * cos - b * sin
            result[t, 2 * i + 1] = b * cos + a * sin
    return result


@pytest.mark.parametrize(("length", "offset"), [(12, 0), (7, 4), (1, 300)])
def test_xpos_as_torchscale_has_it(length, offset):
    x, inv_freq = normal(length, 16), rope_inv_freq(16)[0]
    middle = (length + offset + 1) // 2
    positions = np.arange(offset, offset + length)
    for keys in (False, True):
        tables = rope_table_xpos(
            positions, inv_freq, keys=keys, reference=middle, dtype="f8"
        )
        got = rope(x, *tables, layout="interleaved")
        assert np.abs(got - torchscale_xpos(x, offset, keys)).max() <= SCORE


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_xpos_scores_depend_on_the_distance_and_not_on_the_reference(layout):
    inv_freq, _ = rope_inv_freq(16)
    scores = []
    for reference_ in (0, 5, -2000.5):
        q, k = (
            rope(
                np.broadcast_to(normal(16, seed=seed), (40, 16)),
                *rope_table_xpos(
                    range(40), inv_freq, keys=keys, reference=reference_, dtype="f8"
                ),
                layout=layout,
            )
            for seed, keys in ((1, False), (2, True))
        )
        scores.append(q @ k.T)
    assert np.abs(scores[0][1:, 1:] - scores[0][:-1, :-1]).max() <= SCORE
    assert max(np.abs(scores[0] - other).max() for other in scores[1:]) <= SCORE


def test_a_cached_key_of_xpos_stays_as_it_is():
    inv_freq, _ = rope_inv_freq(16)
    whole = rope_table_xpos(range(50), inv_freq, keys=True)
    for t in (0, 7, 49):
        step = rope_table_xpos([t], inv_freq, keys=True)
        assert same([table[0] for table in step], [table[t] for table in whole])


@pytest.mark.parametrize("first", [0, -150, 0.25])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_entry_of_xpos_depends_on_its_own_position_only(first, dtype):
    inv_freq, _ = rope_inv_freq(256)
    positions = first + np.arange(700.0)
    options = {"reference": 3.0, "dtype": dtype}
    whole = rope_table_xpos(positions, inv_freq, **options)
    shuffled = np.random.default_rng(4).permutation(700)
    uneven = rope_table_xpos(np.append(positions[shuffled], 0.125), inv_freq, **options)
    for table, other in zip(whole, uneven, strict=True):
        reference.same_bits(other[:-1], table[shuffled])
    for t in (0, 63, 64, 149, 150, 151, 699):
        alone = rope_table_xpos(positions[t], inv_freq, **options)
        for table, row in zip(whole, alone, strict=True):
            reference.same_bits(row, table[t])


def test_xpos_without_decay_is_rope():
    inv_freq, _ = rope_inv_freq(16)
    near = rope_table_xpos(3, inv_freq, reference=3, attention_factor=2, dtype="f8")
    assert same(near, rope_table(3, inv_freq, attention_factor=2, dtype="f8"))
    flat = rope_table_xpos(range(90), inv_freq, gamma=1e300, dtype="f8")
    assert same(flat, rope_table(range(90), inv_freq, dtype="f8"))


def test_xpos_up_to_the_ends_of_its_range():
    inv_freq = rope_inv_freq(16)[0]
    for keys in (False, True):
        tables = rope_table_xpos([35694, -35694], inv_freq, keys=keys)
        size = np.hypot(*(table.astype(np.float64) for table in tables))
        assert np.isfinite(size).all()
        assert size.min() > np.finfo(np.float32).tiny


def test_xpos_into_given_memory_and_from_it():
    inv_freq = np.array([1.0, 0.5, 0.1])
    memory = np.zeros((5, 6))
    memory[:, 0] = range(5)
    out = memory[:, :3], memory[:, 3:]
    got = rope_table_xpos(memory[:, 0], inv_freq, dtype="f8", out=out)
    assert got[1] is out[1]
    assert same(out, rope_table_xpos(range(5), inv_freq, dtype="f8"))
    assert rope_table_xpos([], inv_freq)[0].shape == (0, 3)
    assert rope_table_xpos([1, 2], [])[0].shape == (2, 0)


def test_xpos_of_tensors():
    torch = pytest.importorskip("torch")
    got = rope_table_xpos(torch.arange(4), torch.ones(3), keys=True)
    want = rope_table_xpos(range(4), np.ones(3), keys=True)
    assert same([table.numpy() for table in got], want)
    q = torch.ones(2, 4, 6, dtype=torch.bfloat16)
    assert rope(q, *got).dtype is torch.bfloat16


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd = [np.nan, np.inf, 1.0]
        rope_table_axial((odd, 2), [1e300, 1e-320, 1.0])
        rope_table_sections(odd, [1e300, 1e-320, 1.0], [1, 1, 1], interleaved=True)
        rope_table_xpos([35000, -35000], [1.0, np.inf], attention_factor=1e300)
        rope_table_xpos([35000, -35000], [1e300, 0.5], attention_factor=1e-300)
        rope_table_xpos(1.0, [1.0], gamma=5e-324, scale_base=1e300)


def test_inputs_are_left_alone():
    positions, inv_freq = np.arange(6.0).reshape(3, 2), np.array([1.0, 0.5, 0.1])
    rope_table_axial(tuple(positions), inv_freq)
    rope_table_sections(positions, inv_freq, [1, 1, 1])
    rope_table_xpos(positions, inv_freq)
    assert np.array_equal(positions, np.arange(6.0).reshape(3, 2))
    assert posenc.rope_table_xpos is rope_table_xpos
