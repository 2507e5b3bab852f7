"""Sinusoidal tables: the formula, other people's recipes, and sums with data."""

# SPDX-License-Identifier: BSD-3-Clause

import json
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from mpmath import mp

import posenc
from posenc import _sinusoidal

GOLDEN = Path(__file__).resolve().parent / "golden"
LAYOUTS = ("interleaved", "concat", "concat_flipped")
DTYPES = (np.float16, bfloat16, np.float32, np.float64)
# The contract of the tables, in ulp, with frequencies taken as exact.
TABLE_ULP = {np.float32: 0.501, np.float64: 1.0}
# Half of the last of eight printed digits.
PRINTED = 5e-9
# Recipes in float64 round their angles a few times: so much for each radian.
RECIPE_ANGLE = 4 * np.finfo(np.float64).eps
# Against the formula with real frequencies: for positions below 512, one of 2**-53 off
# moves an angle by less than 2**-45, and no value there is below 2**-10 but 0.
FORMULA_ULP = 0.501
# Angles of float32 recipes are off by 2**-24 of themselves.
FLOAT32_ANGLE = 2.0**-23

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def table_for(x, positions=None, **options):
    """The table that is added to x, as float32 or float64."""
    kind = np.float64 if x.dtype == np.float64 else np.float32
    positions = range(x.shape[-2]) if positions is None else positions
    return posenc.sinusoidal(positions, x.shape[-1], dtype=kind, **options)


def sines_and_cosines(table, layout):
    """Take a table apart."""
    n_pair = table.shape[-1] // 2
    if layout == "interleaved":
        return table[..., 0 : 2 * n_pair : 2], table[..., 1 : 2 * n_pair : 2]
    halves = table[..., :n_pair], table[..., n_pair : 2 * n_pair]
    return halves if layout == "concat" else halves[::-1]


# --- the formula ---------------------------------------------------------------------


def test_the_worked_case():
    """Base 10000, six tokens, four channels."""
    got = posenc.sinusoidal(range(6), 4)
    for position in range(6):
        for value, true in zip(
            got[position], reference.true_sinusoidal(position, 4), strict=True
        ):
            assert reference.ulp_error(value, true, np.float32) <= FORMULA_ULP


def test_a_published_table():
    """Base 100, from a tutorial's output of NumPy: "A Gentle Introduction to Positional
    Encoding in Transformer Models", machinelearningmastery.com."""
    want = [
        [0.0, 1.0, 0.0, 1.0],
        [0.84147098, 0.54030231, 0.09983342, 0.99500417],
        [0.90929743, -0.41614684, 0.19866933, 0.98006658],
        [0.14112001, -0.9899925, 0.29552021, 0.95533649],
    ]
    got = posenc.sinusoidal(range(4), 4, theta=100, dtype=np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=PRINTED)


@every_layout
@pytest.mark.parametrize("shift", [0, 1, 0.5])
@pytest.mark.parametrize("dim", [1, 2, 5, 8, 64])
def test_the_formula_in_any_layout(layout, shift, dim):
    if dim // 2 == 1:
        shift = 0  # one frequency, 1
    for theta in (10000.0, 77.5):
        got = posenc.sinusoidal(
            [0, 1, 7, 500.25],
            dim,
            theta=theta,
            layout=layout,
            downscale_freq_shift=shift,
        )
        assert got.dtype == np.float32
        for row, position in zip(got, [0, 1, 7, 500.25], strict=True):
            true = reference.true_sinusoidal(position, dim, theta, layout, shift)
            for value, exact in zip(row, true, strict=True):
                error = reference.ulp_error(value, exact, np.float32)
                assert error <= FORMULA_ULP, (position, float(exact))


@every_layout
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [3, 12])
def test_any_position_in_the_sense_of_exact_tables(dtype, layout, dim):
    rng = np.random.default_rng(1)
    positions = rng.uniform(-1, 1, 40) * 2.0 ** rng.uniform(0, 31, 40)
    positions[::2] = np.rint(positions[::2])
    positions[:2] = -(2.0**31), 2.0**31
    for theta, shift in ((10000.0, 0.0), (10000.0, dim // 2 - 0.5), (77.5, 0.0)):
        options = {"theta": theta, "downscale_freq_shift": shift, "layout": layout}
        got = posenc.sinusoidal(positions, dim, dtype=dtype, **options)
        inv_freq = _sinusoidal._frequencies(dim // 2, theta, shift, 1.0)
        sin, cos = sines_and_cosines(got, layout)
        worst = reference.worst_ulp(cos, sin, positions, inv_freq)
        assert worst <= TABLE_ULP[dtype]
        assert (got[:, 2 * (dim // 2) :] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_hard_angles_too(dtype):
    """Next to multiples of pi/2, by mpmath: a sum with zero is the table."""
    for _, *numbers, cos, sin in json.loads((GOLDEN / "cos_sin.json").read_text()):
        position, inv_freq, factor = map(float.fromhex, numbers)
        if factor == 1:
            got = posenc.ufunc.add_sinusoidal_concat(
                np.zeros(2, dtype), position, np.array([inv_freq])
            )
            for value, text in zip(got, (sin, cos), strict=True):
                error = reference.ulp_error(value, reference.from_hex(text), dtype)
                assert error <= TABLE_ULP[dtype]


@pytest.mark.parametrize("shift", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("scale", [1.0, 1000.0, -0.7])
def test_frequencies_are_the_nearest_doubles(shift, scale):
    for n_pair in (1, 2, 7, 384):
        got = _sinusoidal._frequencies(n_pair, 10000.0, shift, scale)
        with mp.workprec(300):
            for i, value in enumerate(got):
                steps = mp.mpf(n_pair) - mp.mpf(shift) if n_pair > 1 else 1
                true = mp.mpf(scale) * mp.power(10000, -mp.mpf(i) / steps)
                assert reference.ulp_error(value, true, np.float64) <= 0.5


def test_nan_and_infinite_positions_stay_in_their_rows():
    got = posenc.sinusoidal([1.0, np.nan, np.inf, 2.0], 5)
    assert np.isnan(got[1:3, :4]).all()
    reference.same_bits(got[[0, 3]], posenc.sinusoidal([1.0, 2.0], 5))
    assert (got[:, 4] == 0).all()


# --- other people's recipes ----------------------------------------------------------


def test_the_usual_recipe_of_torch():
    """As "The Annotated Transformer" has it."""
    torch = pytest.importorskip("torch")
    n, dim = 512, 64
    want = torch.zeros(n, dim)
    position = torch.arange(0, n).unsqueeze(1)
    turn = torch.exp(torch.arange(0, dim, 2) * -(np.log(10000.0) / dim))
    want[:, 0::2] = torch.sin(position * turn)
    want[:, 1::2] = torch.cos(position * turn)
    got = posenc.sinusoidal(torch.arange(n), dim)
    assert isinstance(got, torch.Tensor)
    assert (got - want).abs().max() <= 2 * n * FLOAT32_ANGLE


def test_the_recipe_of_tensor2tensor():
    n, dim = 50, 32
    position = np.arange(n)[:, None]
    increment = np.log(10000.0) / (dim // 2 - 1)
    angles = position * np.exp(np.arange(dim // 2) * -increment)
    want = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    got = posenc.sinusoidal(
        range(n), dim, layout="concat", downscale_freq_shift=1, dtype=np.float64
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=50 * RECIPE_ANGLE)


def test_the_recipe_of_masked_autoencoders():
    """util/pos_embed.py of facebookresearch/mae, in its words: here w goes first."""

    def from_grid_1d(dim, pos):
        omega = np.arange(dim // 2, dtype=float)
        omega /= dim / 2.0
        omega = 1.0 / 10000**omega
        out = np.einsum("m,d->md", pos.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    n_row, n_column, dim = 3, 5, 16
    grid = np.meshgrid(np.arange(n_column, dtype=float), np.arange(n_row, dtype=float))
    want = np.concatenate([from_grid_1d(dim // 2, axis) for axis in grid], axis=1)
    got = posenc.sinusoidal_grid((n_row, n_column), dim, dtype=np.float64)
    assert got.shape == (n_row, n_column, dim)
    np.testing.assert_allclose(
        got.reshape(-1, dim), want, rtol=0, atol=5 * RECIPE_ANGLE
    )
    by_row = posenc.sinusoidal_grid(
        (n_row, n_column), dim, indexing="ij", dtype=np.float64
    )
    half = dim // 2
    reference.same_bits(by_row[..., :half], got[..., half:])
    reference.same_bits(by_row[..., half:], got[..., :half])


def test_the_grid_of_transformers():
    """Their float64 numbers: of ViT-MAE x first, of AIMv2, RT-DETR and others y."""
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    from transformers.models.vit_mae import modeling_vit_mae as theirs

    config = transformers.ViTMAEConfig(
        hidden_size=32, image_size=80, patch_size=16, decoder_hidden_size=16
    )
    module = theirs.ViTMAEEmbeddings(config)
    module.initialize_weights()
    of_class, want = module.position_embeddings.detach()[0].split([1, 25])
    assert not of_class.any()
    got = torch.from_numpy(posenc.sinusoidal_grid((5, 5), 32).reshape(25, 32))
    # Both are within about half an ulp of the true ones: an ulp.
    torch.testing.assert_close(got, want, rtol=2.0**-23, atol=0)
    want = theirs.build_2d_sinusoidal_position_embedding(
        3, 5, 32, temperature=500.0, dtype=torch.float64
    )
    got = posenc.sinusoidal_grid((3, 5), 32, theta=500.0, indexing="ij", dtype="f8")
    got = got.reshape(15, 32)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=5 * RECIPE_ANGLE)


@pytest.mark.parametrize("dim", [16, 17])
def test_the_table_of_m2m_100(dim):
    """The frequencies of tensor2tensor and fairseq; an odd channel is zero."""
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("transformers.models.m2m_100.modeling_m2m_100")
    of_theirs = models.M2M100SinusoidalPositionalEmbedding.get_embedding
    got = posenc.sinusoidal(
        torch.arange(60), dim, layout="concat", downscale_freq_shift=1
    )
    assert (got - of_theirs(60, dim)).abs().max() <= 2 * 60 * FLOAT32_ANGLE


def test_a_grid_of_three_axes_and_fractional_positions():
    axes = (2, [0.5, 1.5, 2.5], np.array([7.0]))
    got = posenc.sinusoidal_grid(axes, 12, indexing="ij", layout="interleaved")
    assert got.shape == (2, 3, 1, 12)
    for i, j in np.ndindex(2, 3):
        parts = [posenc.sinusoidal(at, 4) for at in (i, 0.5 + j, 7)]
        reference.same_bits(got[i, j, 0], np.concatenate(parts))


def diffusion_cases():
    return json.loads((GOLDEN / "timesteps.json").read_text())["cases"]


@pytest.mark.parametrize("case", diffusion_cases(), ids=lambda c: str(c["arguments"]))
def test_diffusion_time_steps_are_those_of_diffusers(case):
    """Its numbers, and within 1 ulp of the exact value where float32 angles are not."""
    given_, steps = case["arguments"], case["timesteps"]
    dim, shift = given_["embedding_dim"], given_["downscale_freq_shift"]
    scale, theta = given_["scale"], given_["max_period"]
    flip = given_["flip_sin_to_cos"]
    got = posenc.sinusoidal(
        steps,
        dim,
        layout="concat",
        flip_sin_to_cos=flip,
        downscale_freq_shift=shift,
        scale=scale,
        theta=theta,
    )
    want = np.array(case["embedding"], np.float32)
    reach = max(1, max(map(abs, steps)) * scale)
    assert np.abs(got - want).max() <= 4 * reach * FLOAT32_ANGLE
    layout = "concat_flipped" if flip else "concat"
    for row, step in zip(got, steps, strict=True):
        true = reference.true_sinusoidal(step, dim, theta, layout, shift, scale)
        for value, exact in zip(row, true, strict=True):
            if abs(exact) > 2.0**-12:  # the angle is off by 2**-53 of itself
                assert reference.ulp_error(value, exact, np.float32) <= 1


def test_flipping_is_exchanging():
    positions = [0, 3, 4.5]
    turned = posenc.sinusoidal(positions, 7, flip_sin_to_cos=True)
    plain = posenc.sinusoidal(positions, 7)
    reference.same_bits(turned[:, 0:6:2], plain[:, 1:6:2])
    reference.same_bits(turned[:, 1:6:2], plain[:, 0:6:2])
    reference.same_bits(
        posenc.sinusoidal(positions, 7, layout="concat", flip_sin_to_cos=True),
        posenc.sinusoidal(positions, 7, layout="concat_flipped"),
    )


# --- tables --------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("flip", [False, True])
def test_tables_in_pieces_agree(layout, flip):
    flip = flip and layout != "concat_flipped"
    options = {"layout": layout, "flip_sin_to_cos": flip}
    whole = posenc.sinusoidal(range(-300, 700), 70, **options)
    for start in (0, 1, 17, 300):
        positions = np.arange(-300, 700)[start : start + 170]
        piece = posenc.sinusoidal(positions, 70, **options)
        reference.same_bits(piece, whole[start : start + 170])
    one = posenc.sinusoidal(399, 70, **options)
    reference.same_bits(one, whole[699])


def test_positions_of_any_shape():
    got = posenc.sinusoidal(np.arange(24).reshape(2, 3, 4), 6)
    assert got.shape == (2, 3, 4, 6)
    reference.same_bits(got.reshape(24, 6), posenc.sinusoidal(range(24), 6))
    assert posenc.sinusoidal([], 6).shape == (0, 6)
    assert posenc.sinusoidal(np.zeros((2, 0)), 6).shape == (2, 0, 6)


@every_layout
@pytest.mark.parametrize("dim", [6, 7])
def test_a_table_goes_to_out_of_any_layout(layout, dim):
    want = posenc.sinusoidal(range(100), dim, layout=layout)
    memory = np.full((100, 3 * dim + 1), 9, np.float32)
    for out in (memory[:, 1 : 1 + 2 * dim : 2], memory[::-1, dim - 1 :: -1]):
        assert posenc.sinusoidal(range(100), dim, layout=layout, out=out) is out
        reference.same_bits(out, want)
    # The positions lie in the memory of the result.
    own = np.zeros((100, dim))
    own[:, 0] = range(100)
    posenc.sinusoidal(own[:, 0], dim, layout=layout, dtype=np.float64, out=own)
    wide = posenc.sinusoidal(range(100), dim, layout=layout, dtype=np.float64)
    reference.same_bits(own, wide)


# --- sums ----------------------------------------------------------------------------


@every_dtype
@every_layout
@pytest.mark.parametrize("dim", [1, 2, 5, 64, 130])
def test_a_sum_is_a_product_and_a_sum(dtype, layout, dim):
    x = normal(3, 70, dim, dtype=dtype)
    for scale in (1, 8.0, 0.1):
        got = posenc.add_sinusoidal(x, scale=scale, layout=layout)
        want = reference.scale_and_add(x, scale, table_for(x, layout=layout))
        reference.same_bits(got, want)


def test_integers_count_as_float64():
    x = np.arange(12).reshape(3, 4)
    got = posenc.add_sinusoidal(x, scale=2)
    want = posenc.add_sinusoidal(x.astype(np.float64), scale=2)
    reference.same_bits(got, want)


@pytest.mark.parametrize(
    "shape", [(5,), (2, 5), (1, 5), (2, 1), (2, 1, 5), (2, 3, 5), (2, 3, 1), ()]
)
def test_positions_broadcast(shape):
    x = normal(2, 3, 5, 8)
    positions = np.random.default_rng(1).uniform(-9, 900, shape)
    got = posenc.add_sinusoidal(x, positions=positions)
    whole = positions
    if len(shape) == 2:  # of each sequence, for all heads
        whole = positions[:, None]
    whole = np.broadcast_to(whole, (2, 3, 5))
    want = reference.scale_and_add(x, 1, posenc.sinusoidal(whole, 8))
    reference.same_bits(got, want)


def test_numbers_that_are_no_doubles_are_refused_by_every_way():
    x = np.zeros((1, 3, 4), np.float32)
    posenc.add_sinusoidal(x, offset=2**53 - 3)
    for positions in ([2**53 + 1, 0, 0], np.array([0, 0, -(2**53) - 1])):
        with pytest.raises(ValueError, match="magnitude at most"):
            posenc.add_sinusoidal(x, positions=positions)


@every_dtype
@pytest.mark.parametrize("layout", ["interleaved", "concat"])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((2, 3, 130, 6), (130,)),  # tokens, more than a tile holds
        ((2, 3, 130, 6), (2, 130)),
        ((2, 3, 130, 6), (2, 3, 130)),
        ((2, 9, 3, 5), (2, 1, 1)),  # as many rows that share a position as make groups
        ((9, 70, 7), (1, 70)),
        ((5, 3, 1027), (3,)),  # channels, more than are computed at once
    ],
)
def test_tiles_change_nothing(shape, rows, layout, dtype):
    x = normal(*shape, dtype=dtype)
    mask = np.random.default_rng(2).random(shape[:-1]) < 0.2
    positions = np.arange(np.prod(rows)).reshape(rows)
    given = {"scale": 1.5, "layout": layout}
    got = posenc.add_sinusoidal(x, positions=positions, padding_mask=mask, **given)
    spread = positions[:, None] if len(rows) == 2 and len(shape) == 4 else positions
    spread = np.broadcast_to(spread, shape[:-1])
    for at in np.ndindex(*shape[:-2]):
        for t in range(0, shape[-2], 29):
            row = at if not mask[at][t] else None
            want = np.zeros_like(x[at][t : t + 1])
            if row is not None:
                want = posenc.add_sinusoidal(
                    x[at][t : t + 1], positions=spread[at][t : t + 1], **given
                )
            reference.same_bits(got[at][t : t + 1], want)


@every_dtype
@every_layout
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 1, 5), (2, 3, 5), ()])
def test_padding_becomes_zero_whatever_stands_there(dtype, layout, shape):
    mask = np.random.default_rng(3).random(shape) < 0.5
    hidden = np.broadcast_to(mask[:, None] if len(shape) == 2 else mask, (2, 3, 5))
    positions = np.where(hidden, np.nan, np.arange(30).reshape(2, 3, 5))
    x = normal(2, 3, 5, 7, dtype=dtype)
    options = {"scale": 3.0, "positions": positions, "layout": layout}
    want = posenc.add_sinusoidal(x, **options)
    want[hidden] = 0
    x[hidden] = np.resize([np.nan, np.inf, -np.inf], 7)
    got = posenc.add_sinusoidal(x, **options, padding_mask=mask)
    reference.same_bits(got, want)
    assert posenc.add_sinusoidal(x, **options, padding_mask=mask, out=x) is x
    reference.same_bits(x, want)


def test_padding_on_the_left_as_the_notes_have_it():
    x = normal(2, 4, 6)
    mask = np.array([[True, True, False, False], [False] * 4])
    positions = (~mask).cumsum(-1) - 1
    got = posenc.add_sinusoidal(x, positions=positions, padding_mask=mask)
    reference.same_bits(got[0, 2:], posenc.add_sinusoidal(x[0, 2:]))
    reference.same_bits(got[1], posenc.add_sinusoidal(x[1]))


def test_packed_sequences_begin_anew():
    x = normal(9, 6)
    ends = [0, 4, 4, 9]
    got = posenc.add_sinusoidal(x, cu_seqlens=ends)
    reference.same_bits(got[:4], posenc.add_sinusoidal(x[:4]))
    reference.same_bits(got[4:], posenc.add_sinusoidal(x[4:]))
    numbers = reference.packed_positions(ends, [3, 0, 2])
    got = posenc.add_sinusoidal(x, cu_seqlens=ends, offset=[3, 0, 2])
    reference.same_bits(got, posenc.add_sinusoidal(x, positions=numbers))


def test_a_decode_step_continues():
    x = normal(3, 50, 16)
    whole = posenc.add_sinusoidal(x, scale=4.0)
    step = posenc.add_sinusoidal(x[:, 49:], scale=4.0, offset=49)
    reference.same_bits(step, whole[:, 49:])
    each = posenc.add_sinusoidal(x[:, :1], scale=4.0, offset=[3, 0, 7])
    for i, offset in enumerate((3, 0, 7)):
        row = posenc.add_sinusoidal(x[i, :1], scale=4.0, positions=[offset])
        reference.same_bits(each[i], row)


# --- memory --------------------------------------------------------------------------


@every_dtype
@given(data=st.data())
def test_sums_in_any_memory(dtype, data):
    from gufuncs import lay_out

    def choose(options):
        return data.draw(st.sampled_from(options))

    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    dim = choose([0, 1, 2, 3, 8, 17, 40])
    x = normal(*shape, dim, dtype=dtype)
    mask = np.random.default_rng(4).random(shape) < 0.3
    want = reference.scale_and_add(x, 0.5, table_for(x))
    want[mask] = 0
    given_ = lay_out(x, choose)
    before = given_.tobytes()
    kept = posenc.add_sinusoidal(given_, scale=0.5, padding_mask=lay_out(mask, choose))
    reference.same_bits(kept, want)
    assert before == given_.tobytes()
    out = lay_out(np.full(x.shape, 7, x.dtype), choose)
    out.flags.writeable = True
    if out.dtype.isnative:
        got = posenc.add_sinusoidal(given_, scale=0.5, padding_mask=mask, out=out)
        assert got is out
        reference.same_bits(np.ascontiguousarray(out), want)


@every_dtype
@pytest.mark.parametrize("start", range(3))
def test_large_results_are_the_same_wherever_they_lie(dtype, start):
    """Large ones are written past the caches, which asks for aligned memory."""
    x = normal(4, 1900, 600, dtype=dtype)
    want = reference.scale_and_add(x, 2.0, table_for(x))
    memory = np.zeros(x.size + 64, dtype)
    out = memory[start : start + x.size].reshape(x.shape)
    reference.same_bits(posenc.add_sinusoidal(x, scale=2.0, out=out), want)
    assert not memory[:start].any()
    assert not memory[start + x.size :].any()


def test_out_may_be_the_data_or_overlap_them():
    x = normal(30, 8)
    want = posenc.add_sinusoidal(x)
    own = x.copy()
    assert posenc.add_sinusoidal(own, out=own) is own
    reference.same_bits(own, want)
    for shift in (1, 8, 11):
        memory = np.zeros(x.size + shift, np.float32)
        source = memory[: x.size].reshape(x.shape)
        target = memory[shift:].reshape(x.shape)
        source[...] = x
        reference.same_bits(posenc.add_sinusoidal(source, out=target), want)
        target[...] = x
        reference.same_bits(posenc.add_sinusoidal(target, out=source), want)


def test_the_memory_order_of_the_data_is_kept():
    x = normal(4, 2, 5, 6).transpose(1, 2, 0, 3)
    got = posenc.add_sinusoidal(x)
    assert got.strides == x.strides


def test_subclasses_keep_their_type():
    class Marked(np.ndarray):
        pass

    x = normal(3, 4)
    got = posenc.add_sinusoidal(x.view(Marked))
    assert type(got) is Marked
    reference.same_bits(np.asarray(got), posenc.add_sinusoidal(x))


def test_both_doors_give_the_same_bits():
    x = normal(3, 90, 34)
    inv_freq = _sinusoidal._frequencies(17, 10000.0, 0.0, 1.0)
    for layout in LAYOUTS:
        raw = getattr(posenc.ufunc, f"add_sinusoidal_{layout}")
        want = posenc.add_sinusoidal(x, layout=layout)
        reference.same_bits(raw(x, np.arange(90), inv_freq), want)


def test_the_number_of_threads_changes_nothing():
    x = normal(2, 700, 300)
    results = []
    try:
        for n_thread in (1, 2, 5):
            posenc.set_num_threads(n_thread)
            results.append(posenc.add_sinusoidal(x, scale=2.0))
    finally:
        posenc.set_num_threads(None)
    for result in results[1:]:
        reference.same_bits(result, results[0])


def test_it_never_warns():
    x = np.array([[np.nan, np.inf], [3e38, -np.inf]], np.float32)
    with np.errstate(all="raise"):
        got = posenc.add_sinusoidal(x, scale=3e38, positions=[np.inf, 1e300])
    assert np.isnan(got[0, 0])


def test_tensors_come_back():
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 5, 8).bfloat16()
    got = posenc.add_sinusoidal(x, padding_mask=torch.tensor([False] * 4 + [True]))
    assert got.dtype == torch.bfloat16
    table = posenc.sinusoidal(torch.arange(5), 8)
    want = (x.float() + table).bfloat16()
    want[:, 4] = 0
    assert torch.equal(got, want)
    out = torch.empty_like(x)
    version = out._version
    assert posenc.add_sinusoidal(x, out=out) is out
    assert out._version > version


def test_positions_of_a_grid_may_lie_in_its_memory():
    table = np.arange(24.0).reshape(2, 3, 4)
    axes = table[:, 0, 0], table[1, :, 1]
    want = posenc.sinusoidal_grid(tuple(axis.copy() for axis in axes), 4, dtype="f8")
    posenc.sinusoidal_grid(axes, 4, dtype="f8", out=table)
    reference.same_bits(table, want)


@pytest.mark.parametrize("scale", [1.0, 2.7])
@pytest.mark.parametrize(
    "dtype", [np.float16, bfloat16, np.float32, np.float64, np.int32, np.uint8]
)
def test_dask_arrays_stay_lazy(dtype, scale):
    da = pytest.importorskip("dask.array")
    x = (10 * normal(4, 30, 8)).astype(dtype)
    lazy = da.from_array(x, chunks=(2, 7, 8))
    mask = np.random.default_rng(5).random((4, 30)) < 0.5
    got = posenc.add_sinusoidal(lazy, scale=scale, padding_mask=mask)
    assert isinstance(got, da.Array)
    want = posenc.add_sinusoidal(x, scale=scale, padding_mask=mask)
    assert got.dtype == want.dtype
    reference.same_bits(got.compute(), want)
