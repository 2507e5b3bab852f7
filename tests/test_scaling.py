"""Frequencies of every rope type: against mpmath and against transformers."""

# SPDX-License-Identifier: BSD-3-Clause

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from posenc import rope_inv_freq
from posenc._scaling import ROPE_TYPES
from posenc._scaling_check import KEYS

GOLDEN = Path(__file__).resolve().parent / "golden" / "inv_freq.json"
CASES = json.loads(GOLDEN.read_text())

# theta ** (-2i/d): the exponent's rounding, at most 2**-54, times ln(theta) <= 15.3
# (1e6 under alpha 8), is 7.7 units of 2**-53; alpha's power (2 units and 2.1 of its
# exponent), the product with theta, the power and the division add 6.
DOUBLE_BOUND = 14 * 2.0**-53
# float32: the exponent is exact to 2**-25, times 13.9; the power and the division.
SINGLE_BOUND = 10 * 2.0**-24
# Pairs whose two speeds are mixed: the turns are as wrong as the frequency and five
# roundings, the share at most 4/3 of that (bands 1 to 4), less than two bounds; and an
# error of the share counts `factor` times against the slower speed.
MIXED = ("ntk_by_parts", "yarn", "llama3")
MIXED_BOUNDS = 2
# Attention factors: a logarithm, a product, a sum, a quotient or root.
FACTOR_BOUND = 4 * 2.0**-53
# The ten digits printed in the literature, half a unit of the last.
PRINTED_BOUND = 5.1e-10


def name_of(case):
    scaling = {k: v for k, v in case["scaling"].items() if not isinstance(v, list)}
    rope_type = scaling.pop("rope_type")
    numbers = [case["dim"], case["theta"], *scaling.values(), case["seq_len"] or 0]
    return "-".join([rope_type, *(f"{value:g}" for value in numbers)])


def numbers(hexadecimal):
    return np.array([float.fromhex(text) for text in hexadecimal])


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(np.float64, DOUBLE_BOUND), (np.float32, SINGLE_BOUND)],
    ids=["float64", "float32"],
)
def test_golden_values(case, dtype, bound):
    want, scaling = numbers(case["inv_freq"]), case["scaling"]
    got, attention_factor = rope_inv_freq(
        case["dim"],
        theta=case["theta"],
        scaling=scaling,
        seq_len=case["seq_len"],
        dtype=dtype,
    )
    assert got.shape == want.shape
    assert got.dtype == dtype
    if scaling["rope_type"] in MIXED:
        bound *= 1 + MIXED_BOUNDS * scaling["factor"]
    assert (np.abs(got - want) <= bound * want).all()
    assert isinstance(attention_factor, float)
    true_factor = float.fromhex(case["attention_factor"])
    assert abs(attention_factor - true_factor) <= FACTOR_BOUND * true_factor


def test_golden_values_know_every_type():
    assert {case["scaling"]["rope_type"] for case in CASES} == set(ROPE_TYPES)
    assert list(ROPE_TYPES) == list(KEYS)


def trained_on(length, rope_type, **scaling):
    return {
        "rope_type": rope_type,
        "original_max_position_embeddings": length,
        **scaling,
    }


# (dim, theta, scaling, seq_len), then pairs and what is printed for them, then the
# attention factor: from configurations of models and from the papers' programs.
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
PRINTED = {
    "llama 3.1": (
        (128, 5e5, trained_on(8192, "llama3", factor=8, **BANDS), None),
        {
            0: 1.000000000e00,
            1: 8.146172339e-01,
            28: 3.211445995e-03,
            29: 2.166570764e-03,
            30: 1.371893568e-03,
            34: 1.785078128e-04,
            35: 9.556212354e-05,
            36: 7.784655274e-05,
            63: 3.068925989e-07,
        },
        1.0,
    ),
    "deepseek v3": (
        (
            64,
            1e4,
            trained_on(4096, "yarn", factor=40, mscale=1, mscale_all_dim=1),
            None,
        ),
        {
            0: 1.000000000e00,
            9: 7.498942093e-02,
            10: 5.623413252e-02,
            11: 3.900692657e-02,
            15: 8.334508951e-03,
            22: 1.778279410e-04,
            23: 3.333803580e-05,
            24: 2.500000000e-05,
            31: 3.333803580e-06,
        },
        1.0,
    ),
    "gpt-oss": (
        (64, 150000.0, trained_on(4096, "yarn", factor=32, truncate=False), None),
        {
            0: 1.000000000e00,
            8: 5.081327482e-02,
            9: 3.170569618e-02,
            12: 6.794959490e-03,
            16: 4.564839192e-04,
            17: 1.293187012e-04,
            18: 3.830881237e-05,
            31: 3.023511428e-07,
        },
        1.3465735902799727,
    ),
    "qwen": (
        (128, 1e6, trained_on(32768, "yarn", factor=4), None),
        {
            0: 1.000000000e00,
            23: 6.978305849e-03,
            24: 5.375321491e-03,
            25: 4.131738023e-03,
            30: 1.064360981e-03,
            39: 6.490394321e-05,
            40: 4.445698525e-05,
            41: 3.582531426e-05,
            63: 3.102344402e-07,
        },
        1.138629436111989,
    ),
    "dynamic": (
        (
            128,
            1e4,
            {"rope_type": "dynamic", "factor": 2, "max_position_embeddings": 4096},
            8192,
        ),
        {
            0: 1.000000000e00,
            1: 8.509942913e-01,
            32: 5.723381508e-03,
            63: 3.849273282e-05,
        },
        1.0,
    ),
    "ntk": (
        (128, 1e4, {"rope_type": "ntk", "alpha": 8}, None),
        {
            0: 1.000000000e00,
            1: 8.378480019e-01,
            32: 3.477664048e-03,
            63: 1.443477481e-05,
        },
        1.0,
    ),
    "gemma 4": (
        (
            512,
            1e6,
            {"rope_type": "proportional", "partial_rotary_factor": 0.25},
            None,
        ),
        {0: 1.0, 1: 9.474635257e-01, 63: 3.337624694e-02, 64: 0.0, 255: 0.0},
        1.0,
    ),
}


@pytest.mark.parametrize(("call", "printed", "factor"), PRINTED.values(), ids=PRINTED)
def test_values_printed_elsewhere(call, printed, factor):
    dim, theta, scaling, seq_len = call
    got, attention_factor = rope_inv_freq(
        dim, theta=theta, scaling=scaling, seq_len=seq_len
    )
    want = list(printed.values())
    np.testing.assert_allclose(got[list(printed)], want, rtol=PRINTED_BOUND)
    assert attention_factor == pytest.approx(factor, rel=FACTOR_BOUND)


def test_ntk_is_a_larger_theta():
    got, _ = rope_inv_freq(128, scaling={"rope_type": "ntk", "alpha": 8})
    larger, _ = rope_inv_freq(128, theta=82684.62264056221)
    np.testing.assert_allclose(got, larger, rtol=DOUBLE_BOUND)


# --- transformers itself -------------------------------------------------------------

# PyTorch's vectorised float32 power may be an ulp off. That makes its reciprocal two
# ulp; a mixed pair has it in its share, too, `factor` times as heavy: with factor 40
# and few pairs in between, 5 were seen in 36000.
POWER_ULP = {"llama3": 8}
USUAL_POWER_ULP = 2


def stretches(n_pair):
    return {
        "short_factor": [1 + i / 64 for i in range(n_pair)],
        "long_factor": [1 + 1.3 * i for i in range(n_pair)],
    }


def settings_of(rope_type, n_pair):
    """Pairs (scaling, seq_len) as transformers takes them."""
    if rope_type == "default":
        return [({}, None)]
    if rope_type == "linear":
        return [({"factor": factor}, None) for factor in (1.0, 2.5, 4)]
    if rope_type == "dynamic":
        lengths = (None, 1, 2048, 2049, 8192)
        return [({"factor": f}, n) for f in (2.0, 3.3) for n in lengths]
    if rope_type == "yarn":
        return [
            (trained_on(trained, "yarn", factor=factor, **others), None)
            for trained in (16, 1024, 4096)
            for factor in (1.0, 4.0, 40)
            for others in (
                {},
                {"truncate": False},
                {"mscale": 1.0, "mscale_all_dim": 0.8},
                {"mscale": 1.0},
                {"mscale": 0.0, "mscale_all_dim": 0.8},
                {"attention_factor": 1.3, "mscale": 1.0, "mscale_all_dim": 0.8},
                {"beta_fast": 16, "beta_slow": 2.0},
            )
        ] + [(trained_on(1024, "yarn", factor=None), None)]
    if rope_type == "llama3":
        return [
            (
                trained_on(
                    n, "llama3", factor=f, low_freq_factor=a, high_freq_factor=b
                ),
                0,
            )
            for n in (16, 8192)
            for f in (2.7, 8.0, 32.0)
            for a, b in ((1.0, 4.0), (1, 32), (0.5, 3.3))
        ]
    if rope_type == "longrope":
        return [
            (trained_on(1024, "longrope", **stretches(n_pair), **others), length)
            for length in (None, 1024, 1025)
            for others in ({}, {"factor": 32.0}, {"factor": 1}, {"attention_factor": 2})
        ]
    parts = (None, 0.0, 0.25, 0.3, 1.0)
    return [
        ({"partial_rotary_factor": part, "factor": factor}, None)
        if part is not None
        else ({}, None)
        for part in parts
        for factor in (1.0, 8.0)
    ]


def of_transformers(dim, theta, scaling, seq_len, length=2048):
    """What transformers computes for a Llama: (inv_freq, attention factor, dict)."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if scaling["rope_type"] not in ("default", *ROPE_INIT_FUNCTIONS):
        pytest.skip(f"transformers has no {scaling['rope_type']} yet")
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=length,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    if scaling["rope_type"] == "default":
        default = llama.LlamaRotaryEmbedding.compute_default_rope_parameters
        inv_freq, factor = default(config)
    else:
        init = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        inv_freq, factor = init(config, seq_len=seq_len or None)
    parameters = {**config.rope_parameters, "max_position_embeddings": length}
    return inv_freq.numpy(), factor, parameters


def powers_of_torch(dim, theta):
    """Return 1 / theta ** (2i/d) from PyTorch's own power."""
    torch = pytest.importorskip("torch")
    exponent = torch.arange(0, dim, 2, dtype=torch.float) / dim
    return (1 / theta**exponent).numpy()


def grown_theta(dim, theta, scaling, seq_len, length=2048):
    """Return the base of a dynamic type, in transformers' order of operations."""
    if scaling["rope_type"] != "dynamic":
        return theta
    factor, seq_len = scaling["factor"], max(seq_len or length, length)
    alpha = factor * seq_len / length - (factor - 1)
    return theta * alpha ** (dim / (dim - 2))


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6], ids=lambda theta: f"{theta:g}")
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128])
@pytest.mark.parametrize(
    "rope_type", [name for name in ROPE_TYPES if "ntk" not in name]
)
def test_float32_has_the_bits_of_transformers(theta, dim, rope_type):
    """Bit for bit where PyTorch's power is the true one, within a few ulp elsewhere."""
    for setting, seq_len in settings_of(rope_type, dim // 2):
        scaling = {"rope_type": rope_type, **setting}
        want, factor, parameters = of_transformers(dim, theta, scaling, seq_len)
        got, attention_factor = rope_inv_freq(
            dim, scaling=parameters, seq_len=seq_len or None, dtype=np.float32
        )
        assert attention_factor == factor, scaling
        assert got.dtype == want.dtype
        base = grown_theta(dim, theta, scaling, seq_len)
        default, _ = rope_inv_freq(dim, theta=base, dtype=np.float32)
        same_power = powers_of_torch(dim, base) == default
        assert (got == want)[same_power].all(), scaling
        ulp = np.spacing(np.maximum(got, want))
        bound = POWER_ULP.get(rope_type, USUAL_POWER_ULP) * ulp
        assert (np.abs(got - want) <= bound).all(), scaling


def test_ntk_by_parts_is_llama3_with_other_bands():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 32.0}
    want, *_ = of_transformers(128, 1e4, trained_on(2048, "llama3", **llama3), None)
    scaling = trained_on(2048, "ntk_by_parts", factor=8.0)
    got, factor = rope_inv_freq(128, scaling=scaling, dtype=np.float32)
    # An ulp of the power, `factor` times against the slower speed.
    np.testing.assert_allclose(got, want, rtol=8 * 2.0**-23)
    assert factor == 1.0


def test_float32_is_the_static_ntk_of_hunyuan():
    hunyuan = pytest.importorskip(
        "transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense"
    )
    from transformers import HunYuanDenseV1Config

    own = {
        "rope_type": "dynamic",
        "alpha": 1000.0,
        "factor": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "rope_theta": 1e4,
    }
    config = HunYuanDenseV1Config(
        hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=own
    )
    want = hunyuan.HunYuanDenseV1RotaryEmbedding(config).inv_freq.numpy()
    got, factor = rope_inv_freq(128, scaling=own, dtype=np.float32)
    ulp = np.spacing(np.maximum(got, want))
    assert (np.abs(got - want) <= USUAL_POWER_ULP * ulp).all()
    assert factor == 1.0


def test_dynamic_while_a_model_runs():
    """There transformers computes the base in float32: five roundings, and the power
    of the base to a share of an exponent at most 1."""
    torch = pytest.importorskip("torch")
    scaling = {"rope_type": "dynamic", "factor": 3.3}
    want, *_, parameters = of_transformers(64, 1e4, scaling, torch.tensor(5000))
    got, _ = rope_inv_freq(64, scaling=parameters, seq_len=5000, dtype=np.float32)
    np.testing.assert_allclose(got, want, rtol=5 * 2.0**-23)


# --- dicts, old and new --------------------------------------------------------------

YARN = trained_on(4096, "yarn", factor=4.0)
LLAMA3 = trained_on(8192, "llama3", factor=8.0, **BANDS)
LONGROPE = trained_on(4096, "longrope", factor=4.0, **stretches(32))
EVERY_TYPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"rope_type": "ntk", "alpha": 8.0},
    "default": {"rope_type": "default"},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "ntk_by_parts": trained_on(4096, "ntk_by_parts", factor=4.0),
    "yarn": YARN,
    "longrope": LONGROPE,
    "llama3": LLAMA3,
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}


def same(scaling, other, dim=64, **options):
    """Whether two dicts give the same numbers."""
    got, want = (rope_inv_freq(dim, scaling=s, **options) for s in (scaling, other))
    return np.array_equal(got[0], want[0]) and got[1] == want[1]


@pytest.mark.parametrize("scaling", EVERY_TYPE.values(), ids=EVERY_TYPE)
def test_old_spelling_is_the_new_one(scaling):
    old = {"type": scaling["rope_type"]} | scaling
    del old["rope_type"]
    assert same(old, scaling)
    assert same({"type": scaling["rope_type"], **scaling}, scaling)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({**LONGROPE, "rope_type": "su"}, LONGROPE),
        ({**LONGROPE, "rope_type": "yarn"}, LONGROPE),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, {"rope_type": "default"}),
        ({"type": "dynamic", "alpha": 8.0, "factor": 1.0}, EVERY_TYPE["ntk"]),
        ({"type": "xdrope", "alpha": 8.0}, EVERY_TYPE["ntk"]),
        ({"rope_type": "ntk_alpha", "alpha": 8.0}, EVERY_TYPE["ntk"]),
        ({"rope_type": "dynamic", "factor": 4.0, "alpha": None}, EVERY_TYPE["dynamic"]),
        ({**EVERY_TYPE["ntk_by_parts"], "rope_type": "ntk-by-parts"},
         EVERY_TYPE["ntk_by_parts"]),
        ({**YARN, "mscale": None, "attention_factor": None, "beta_fast": None}, YARN),
        ({**YARN, "beta_fast": 32, "beta_slow": 1, "truncate": True}, YARN),
        ({**YARN, "partial_rotary_factor": 0.5, "anything": "else"}, YARN),
        ({"rope_theta": 1e4, "partial_rotary_factor": 1.0}, {}),
    ],
    ids=lambda scaling: scaling.get("rope_type", scaling.get("type")),
)  # fmt: skip
def test_other_spellings(old, new):
    for seq_len in (None, 3):
        lengths = {"max_position_embeddings": 4096}
        assert same({**lengths, **old}, {**lengths, **new}, seq_len=seq_len)


def test_missing_lengths_and_factors_follow_from_each_other():
    lengths = {"max_position_embeddings": 16384}
    for name in ("yarn", "ntk_by_parts", "longrope"):
        whole = EVERY_TYPE[name]
        ratio = {k: v for k, v in whole.items() if k != "factor"}
        assert same({**ratio, **lengths}, whole)
    trained = {k: v for k, v in YARN.items() if "original" not in k}
    assert same({**trained, "max_position_embeddings": 4096}, YARN)


def test_longrope_takes_the_long_factors_past_the_trained_length():
    lengths = [None, 1, 4096, 4097, 10**6]
    found = [rope_inv_freq(64, scaling=LONGROPE, seq_len=n) for n in lengths]
    stretch = [rope_inv_freq(64)[0] / inv_freq for inv_freq, _ in found]
    for got, key in zip(
        stretch, [*["short_factor"] * 3, *["long_factor"] * 2], strict=True
    ):
        np.testing.assert_allclose(got, LONGROPE[key], rtol=4 * 2.0**-53)
    assert len({factor for _, factor in found}) == 1


def test_longrope_factor_of_one_and_arrays_of_factors():
    assert rope_inv_freq(64, scaling={**LONGROPE, "factor": 1})[1] == 1.0
    below = {**LONGROPE, "factor": None, "max_position_embeddings": 2048}
    assert rope_inv_freq(64, scaling=below)[1] == 1.0
    arrays = {**LONGROPE, "short_factor": np.array(LONGROPE["short_factor"])}
    assert same({**arrays, "long_factor": tuple(LONGROPE["long_factor"])}, LONGROPE)


def test_longrope_of_phimoe_has_a_factor_per_length():
    own = {**LONGROPE, "short_mscale": 1.25, "long_mscale": 1.5}
    assert rope_inv_freq(64, scaling=own, seq_len=4096)[1] == 1.25
    assert rope_inv_freq(64, scaling=own, seq_len=4097)[1] == 1.5


def test_dynamic_within_its_length_is_default():
    scaling = {**EVERY_TYPE["dynamic"], "max_position_embeddings": 4096}
    for seq_len in (None, 1, 4096):
        assert same(scaling, None, seq_len=seq_len)
    assert not same(scaling, None, seq_len=4097)


def test_dynamic_is_ntk_whose_alpha_grows():
    scaling = {**EVERY_TYPE["dynamic"], "max_position_embeddings": 4096}
    assert same(scaling, {"rope_type": "ntk", "alpha": 5.0}, seq_len=8192)


@pytest.mark.parametrize("name", ["yarn", "llama3", "ntk_by_parts"])
def test_fast_pairs_keep_their_speed_and_slow_ones_have_the_factor(name):
    got, _ = rope_inv_freq(128, scaling=EVERY_TYPE[name])
    ratio = rope_inv_freq(128)[0] / got
    factor = EVERY_TYPE[name]["factor"]
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(factor, rel=2.0**-51)
    assert (np.diff(ratio) >= -(2.0**-50) * factor).all()
    assert ((ratio > 1.01) & (ratio < factor - 0.01)).any()


@pytest.mark.parametrize(
    ("weights", "factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"mscale": 0.5}, 0.1 * math.log(4) + 1),
        ({"mscale_all_dim": 0.5}, 0.1 * math.log(4) + 1),
        ({"mscale": 0.5, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
        ({"mscale": 1, "mscale_all_dim": 1}, 1.0),
        (
            {"mscale": 2, "mscale_all_dim": 1},
            (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
        ),
        ({"mscale": 2, "mscale_all_dim": 1, "attention_factor": 0.5}, 0.5),
    ],
)
def test_yarn_attention_factor(weights, factor):
    assert rope_inv_freq(64, scaling={**YARN, **weights})[1] == factor


def test_rope_theta_in_the_dict_wins():
    for scaling in EVERY_TYPE.values():
        inside = {**scaling, "rope_theta": 5e5}
        got = rope_inv_freq(64, theta=1e4, scaling=inside)[0]
        want = rope_inv_freq(64, theta=5e5, scaling=scaling)[0]
        assert np.array_equal(got, want)


@pytest.mark.parametrize("scaling", EVERY_TYPE.values(), ids=EVERY_TYPE)
def test_the_dict_is_left_alone(scaling):
    given = {"type": scaling["rope_type"], **scaling, "rope_theta": 5e5}
    before = json.dumps(given)
    rope_inv_freq(64, scaling=given)
    assert json.dumps(given) == before


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}])
def test_no_scaling_is_default(scaling):
    got, factor = rope_inv_freq(64, scaling=scaling)
    case = CASES[1]
    assert (case["dim"], case["theta"], len(case["scaling"])) == (64, 1e4, 1)
    assert (np.abs(got - numbers(case["inv_freq"])) <= DOUBLE_BOUND * got).all()
    assert factor == 1.0


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 1},
        {"rope_type": "ntk", "alpha": 1},
        trained_on(64, "yarn", factor=1),
        trained_on(64, "llama3", factor=1, **BANDS),
        trained_on(64, "ntk_by_parts", factor=1),
        {"rope_type": "proportional", "factor": 1},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_a_factor_of_one_changes_nothing(scaling):
    got, factor = rope_inv_freq(96, scaling=scaling)
    # What is mixed is the same twice, in shares that add up to one but for rounding.
    np.testing.assert_allclose(got, rope_inv_freq(96)[0], rtol=2 * 2.0**-53)
    assert factor == 1.0


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
def test_linear_is_division_of_positions(factor):
    """Powers of two: exact."""
    got, _ = rope_inv_freq(64, scaling={"rope_type": "linear", "factor": factor})
    assert np.array_equal(got * factor, rope_inv_freq(64)[0])


def test_proportional_keeps_the_pairs_of_the_whole_head():
    scaling = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    got, _ = rope_inv_freq(64, scaling=scaling)
    assert np.array_equal(got[:8], rope_inv_freq(64)[0][:8])
    assert not got[8:].any()
    none, _ = rope_inv_freq(64, scaling={**scaling, "partial_rotary_factor": 0})
    assert not none.any()


def test_frequencies_fall():
    got, _ = rope_inv_freq(128)
    assert got[0] == 1.0
    assert (np.diff(got) < 0).all()


def test_dim_two_has_one_pair():
    assert rope_inv_freq(2)[0].tolist() == [1.0]


# --- what is refused -----------------------------------------------------------------

ALL = ", ".join(map(repr, ROPE_TYPES))
BAND_NUMBERS = {"low_freq_factor": 4.0, "high_freq_factor": 4.0}
TRAINED = "scaling['original_max_position_embeddings']"
LENGTH = "scaling['max_position_embeddings']"


def without(key, scaling):
    return {k: v for k, v in scaling.items() if k != key}


REFUSED = [
    ({"rope_type": "nkt"}, f"scaling['rope_type'] must be one of {ALL}; got 'nkt'"),
    (
        {"truncate": False},
        "scaling must name its 'rope_type'; got {'truncate': False}",
    ),
    (
        {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}},
        "scaling must be one set of RoPE parameters, not one per layer type; got "
        "entries ['full_attention', 'sliding_attention']",
    ),
    *(
        (
            {**EVERY_TYPE[name], "factor": 0.5},
            "scaling['factor'] must be a number of at least 1; got 0.5",
        )
        for name in EVERY_TYPE
        if name not in ("default", "ntk")
    ),
    *(
        (
            without(key, EVERY_TYPE[name]),
            f"scaling[{key!r}] must be given for rope_type {name!r}; got "
            f"{without(key, EVERY_TYPE[name])}",
        )
        for name, key in (
            ("dynamic", "factor"),
            ("llama3", "factor"),
            ("llama3", "low_freq_factor"),
            ("llama3", "high_freq_factor"),
            ("llama3", "original_max_position_embeddings"),
            ("yarn", "original_max_position_embeddings"),
            ("ntk_by_parts", "original_max_position_embeddings"),
        )
    ),
    (
        without("long_factor", LONGROPE),
        "scaling['long_factor'] must be given for rope_type 'longrope'; got "
        "{'rope_type': 'longrope', 'original_max_position_embeddings': 4096, "
        "'factor': 4.0, 'short_factor': '32 numbers'}",
    ),
    (
        without("factor", YARN),
        "scaling['factor'] must be given, or follow from max_position_embeddings >= "
        "original_max_position_embeddings; got {'rope_type': 'yarn', "
        "'original_max_position_embeddings': 4096}",
    ),
    (
        {**without("factor", YARN), "max_position_embeddings": 2048},
        "scaling['factor'] must be given, or follow from max_position_embeddings >= "
        "original_max_position_embeddings; got {'rope_type': 'yarn', "
        "'original_max_position_embeddings': 4096, 'max_position_embeddings': 2048}",
    ),
    (
        without("factor", LONGROPE),
        f"{LENGTH} must be given for rope_type 'longrope' without a factor; got "
        "{'rope_type': 'longrope', 'short_factor': '32 numbers', 'long_factor': "
        "'32 numbers', 'original_max_position_embeddings': 4096}",
    ),
    (
        {**YARN, "original_max_position_embeddings": 1},
        f"{TRAINED} must be a whole number of at least 2; got 1",
    ),
    (
        {**YARN, "original_max_position_embeddings": 4096.0},
        f"{TRAINED} must be a whole number of at least 2; got 4096.0",
    ),
    (
        {**YARN, "max_position_embeddings": 2**53 + 1},
        f"{LENGTH} must be at most 2**53; got 9007199254740993",
    ),
    (
        {**YARN, "beta_fast": 0},
        "scaling['beta_fast'] must be a number from 1e-9 to 1e9; got 0.0",
    ),
    (
        {**YARN, "beta_slow": 32},
        "scaling['beta_fast'] must be more than scaling['beta_slow'], 32.0; got 32.0",
    ),
    (
        {**EVERY_TYPE["ntk_by_parts"], "beta_fast": 0.5},
        "scaling['beta_fast'] must be more than scaling['beta_slow'], 1.0; got 0.5",
    ),
    (
        {**LLAMA3, **BAND_NUMBERS},
        "scaling['high_freq_factor'] must be more than scaling['low_freq_factor'], "
        "4.0; got 4.0",
    ),
    (
        {**LLAMA3, "low_freq_factor": -1},
        "scaling['low_freq_factor'] must be a number from 1e-9 to 1e9; got -1.0",
    ),
    (
        {**YARN, "attention_factor": 0},
        "scaling['attention_factor'] must be a number of more than 0; got 0.0",
    ),
    (
        {**LONGROPE, "attention_factor": "1.19"},
        "scaling['attention_factor'] must be a number of more than 0; got '1.19'",
    ),
    (
        {**YARN, "mscale": -1},
        "scaling['mscale'] must be a number of at least 0; got -1.0",
    ),
    (
        {**YARN, "mscale_all_dim": math.inf},
        "scaling['mscale_all_dim'] must be a number of at least 0; got inf",
    ),
    ({**YARN, "truncate": 1}, "scaling['truncate'] must be True or False; got 1"),
    ({**YARN, "truncate": None}, "scaling['truncate'] must be True or False; got None"),
    (
        {**LONGROPE, "short_factor": 1.0},
        "scaling['short_factor'] must be a list of numbers of more than 0; got 1.0",
    ),
    (
        {**LONGROPE, "long_factor": [1.0] * 31 + [0]},
        "scaling['long_factor'] must be a list of numbers of more than 0; got 0.0",
    ),
    (
        {**LONGROPE, "long_factor": [None] * 32},
        "scaling['long_factor'] must be a list of numbers of more than 0; got None",
    ),
    (
        {**LONGROPE, "long_factor": [1.0] * 48},
        "scaling['long_factor'] must hold one number per pair, 32; got 48 numbers",
    ),
    (
        {**EVERY_TYPE["proportional"], "partial_rotary_factor": 1.5},
        "scaling['partial_rotary_factor'] must be a number from 0 to 1; got 1.5",
    ),
]


# Messages of REFUSED that tell of a wrong kind: TypeError.
KIND = re.compile(r"got (4096\.0|'1\.19'|None|1\.0)$|truncate.*got 1$")


@pytest.mark.parametrize(
    ("scaling", "message"), REFUSED, ids=[message for _, message in REFUSED]
)
def test_refused(scaling, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        rope_inv_freq(64, scaling=scaling)
    assert str(caught.value) == f"rope_inv_freq: {message}"
    assert caught.type is (TypeError if KIND.search(message) else ValueError)


@pytest.mark.parametrize(
    ("dim", "scaling", "seq_len", "message"),
    [
        (
            64,
            {"rope_type": "dynamic", "factor": 2.0},
            8192,
            f"{LENGTH} must be given for rope_type 'dynamic' with a seq_len; got "
            "{'rope_type': 'dynamic', 'factor': 2.0}",
        ),
        (
            2,
            {"rope_type": "dynamic", "factor": 2.0},
            None,
            "dim must be at least 4 for rope_type 'dynamic'; got 2",
        ),
        (
            4,
            {
                "rope_type": "dynamic",
                "factor": 1e200,
                "max_position_embeddings": 2,
            },
            4,
            "scaling['factor'] must leave theta * alpha ** (dim / (dim - 2)) finite "
            "for dim 4; got alpha 1e+200",
        ),
        (64, None, 2**53 + 1, "seq_len must be at most 2**53; got 9007199254740993"),
    ],
)
def test_refused_with_a_length(dim, scaling, seq_len, message):
    with pytest.raises(ValueError) as caught:
        rope_inv_freq(dim, scaling=scaling, seq_len=seq_len)
    assert str(caught.value) == f"rope_inv_freq: {message}"
