"""Frequencies of every rope type: against mpmath and against transformers."""

# SPDX-License-Identifier: BSD-3-Clause

import json
from pathlib import Path

import numpy as np
import pytest

from posenc import rope_inv_freq

GOLDEN = Path(__file__).resolve().parent / "golden" / "inv_freq.json"
CASES = json.loads(GOLDEN.read_text())

# theta ** (-2i/d): the exponent's rounding, at most 2**-54, times ln(theta) <= 15.3
# (1e6 under alpha 8), is 7.7 units of 2**-53; alpha's power (2 units and 2.1 of its
# exponent), the product with theta, the power and the division add 6.
DOUBLE_BOUND = 14 * 2.0**-53
# float32: the exponent is exact to 2**-25, times 13.9; the power and the division.
SINGLE_BOUND = 10 * 2.0**-24
# The ten digits printed in the literature, half a unit of the last.
PRINTED_BOUND = 5.1e-10


def scaling_of(case):
    """A golden case as a Hugging Face dict."""
    if "factor" in case:
        return {"rope_type": "linear", "factor": case["factor"]}
    if "alpha" in case:
        return {"rope_type": "ntk", "alpha": case["alpha"]}
    return {"rope_type": "default"}


def name_of(case):
    return "-".join(f"{v:g}" for v in case.values() if not isinstance(v, list)) + (
        "-" + scaling_of(case)["rope_type"]
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(np.float64, DOUBLE_BOUND), (np.float32, SINGLE_BOUND)],
    ids=["float64", "float32"],
)
def test_golden_values(case, dtype, bound):
    want = np.array([float.fromhex(text) for text in case["inv_freq"]])
    got, attention_factor = rope_inv_freq(
        case["dim"], theta=case["theta"], scaling=scaling_of(case), dtype=dtype
    )
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert (np.abs(got - want) <= bound * want).all()
    assert isinstance(attention_factor, float)
    assert attention_factor == 1.0


def test_ntk_as_printed_in_the_literature():
    """alpha 8, d 128: theta' = 82684.62264056221, pairs 0, 1, 32 and 63."""
    got, _ = rope_inv_freq(128, scaling={"rope_type": "ntk", "alpha": 8})
    printed = [1.0, 8.378480019e-01, 3.477664048e-03, 1.443477481e-05]
    np.testing.assert_allclose(got[[0, 1, 32, 63]], printed, rtol=PRINTED_BOUND)
    larger, _ = rope_inv_freq(128, theta=82684.62264056221)
    np.testing.assert_allclose(got, larger, rtol=DOUBLE_BOUND)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6], ids=lambda theta: f"{theta:g}")
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize(
    "scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}]
)
def test_transformers(theta, dim, scaling):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    module = llama.LlamaRotaryEmbedding(config)
    want = module.inv_freq.numpy()
    single, factor = rope_inv_freq(dim, theta=theta, scaling=scaling, dtype=np.float32)
    assert factor == module.attention_scaling
    assert single.dtype == np.float32
    # Two libraries' float32 powers, each within an ulp, then a division each.
    ulp = np.spacing(np.maximum(single, want))
    assert (np.abs(single - want) <= 2 * ulp).all()
    double, _ = rope_inv_freq(dim, theta=theta, scaling=scaling)
    assert (np.abs(double - want) <= SINGLE_BOUND * double).all()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "ntk", "alpha": 8.0},
        {"rope_type": "default"},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_old_spelling_is_the_new_one(scaling):
    new, _ = rope_inv_freq(64, scaling=scaling)
    old = {"type": scaling["rope_type"]} | scaling
    del old["rope_type"]
    assert np.array_equal(rope_inv_freq(64, scaling=old)[0], new)
    both = {"type": scaling["rope_type"], **scaling}
    assert np.array_equal(rope_inv_freq(64, scaling=both)[0], new)


def test_rope_theta_in_the_dict_wins():
    scaling = {"rope_type": "default", "rope_theta": 5e5}
    got, _ = rope_inv_freq(64, theta=1e4, scaling=scaling)
    assert np.array_equal(got, rope_inv_freq(64, theta=5e5)[0])


def test_the_dict_is_left_alone():
    scaling = {"type": "linear", "factor": 4.0, "rope_theta": 5e5}
    before = dict(scaling)
    rope_inv_freq(64, scaling=scaling)
    assert scaling == before


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}])
def test_no_scaling_is_default(scaling):
    got, factor = rope_inv_freq(64, scaling=scaling)
    want = [float.fromhex(t) for t in CASES[1]["inv_freq"]]
    assert (CASES[1]["dim"], CASES[1]["theta"]) == (64, 1e4)
    assert (np.abs(got - want) <= DOUBLE_BOUND * got).all()
    assert factor == 1.0


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "linear", "factor": 1}, {"rope_type": "ntk", "alpha": 1}]
)
def test_a_factor_of_one_changes_nothing(scaling):
    got, _ = rope_inv_freq(96, scaling=scaling)
    assert np.array_equal(got, rope_inv_freq(96)[0])


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
def test_linear_is_division_of_positions(factor):
    """Powers of two: exact."""
    got, _ = rope_inv_freq(64, scaling={"rope_type": "linear", "factor": factor})
    assert np.array_equal(got * factor, rope_inv_freq(64)[0])


def test_frequencies_fall():
    got, _ = rope_inv_freq(128)
    assert got[0] == 1.0
    assert (np.diff(got) < 0).all()


def test_dim_two_has_one_pair():
    assert rope_inv_freq(2)[0].tolist() == [1.0]
