"""Every scaling of transformers in `posenc.hf.patch`: equal models, and the way back.

The oracle is a model that transformers built with the same ``rope_parameters``: the
same bits, while patched, built under a patch, saved and loaded.
"""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import itertools
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_tools import one_thread, tiny  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

import posenc  # noqa: E402
import posenc.hf  # noqa: E402
from posenc import _hf_scaling  # noqa: E402
from posenc._scaling_check import KEYS  # noqa: E402

TRAINED = 32
N_PAIR = 8
# Tables at the positions of these tests: float32 angles and cosines.
TABLE_ROUNDING = 1e-5
# Half a unit in the last place of float32 below 2 (the factors), and the promise.
EXACT_TABLE_ERROR = 0.501 * 2.0**-23

SHORT = [1 + i / 64 for i in range(N_PAIR)]
LONG = [1 + 1.5 * i for i in range(N_PAIR)]
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
O16 = {"original_max_position_embeddings": 16}
O32 = {"original_max_position_embeddings": TRAINED}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, **BANDS}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": SHORT,
    "long_factor": LONG,
}
PARTS = {"rope_type": "ntk_by_parts", "factor": 4.0}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
NTK = {"rope_type": "ntk", "alpha": 8.0}
NTK_THETA = 10000 * 8 ** (16 / 14)

# What is asked of the patch, and what transformers calls it.
SCALINGS = {
    "dynamic": (DYNAMIC, DYNAMIC),
    "yarn": (YARN, {**YARN, **O32}),
    "yarn, trained on 16": ({**YARN, **O16}, {**YARN, **O16}),
    "yarn, all keys": (
        {**YARN, "beta_fast": 8, "beta_slow": 0.5, "mscale": 1, "mscale_all_dim": 0.7},
        {
            **YARN,
            **O32,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    ),
    "yarn, as it is": (
        {**YARN, "truncate": False, "attention_factor": 1.5, "mscale": None},
        {**YARN, **O32, "truncate": False, "attention_factor": 1.5},
    ),
    "llama3": (LLAMA3, {**LLAMA3, **O32}),
    "longrope": (LONGROPE, {**LONGROPE, **O32}),
    "longrope, its factor": (
        {**LONGROPE, "attention_factor": 1.25, **O16},
        {**LONGROPE, "attention_factor": 1.25, **O16},
    ),
    "su": ({**LONGROPE, "type": "su", "rope_type": "su"}, {**LONGROPE, **O32}),
    "ntk_by_parts": (
        PARTS,
        {**LLAMA3, "factor": 4.0, "high_freq_factor": 32.0, **O32},
    ),
    "proportional": (PROPORTIONAL, PROPORTIONAL),
    "proportional, slower": (
        {**PROPORTIONAL, "factor": 8},
        {**PROPORTIONAL, "factor": 8.0},
    ),
    "hunyuan": (
        {"type": "dynamic", "alpha": 8, "factor": 1.0, "beta_fast": 32},
        {"rope_type": "default", "rope_theta": NTK_THETA},
    ),
    "mrope": (
        {"rope_type": "default", "type": "mrope", "mrope_section": [4, 2, 2]},
        {"rope_type": "default"},
    ),
}
if "proportional" not in ROPE_INIT_FUNCTIONS:  # before transformers 5.5
    SCALINGS = {name: pair for name, pair in SCALINGS.items() if name[:4] != "prop"}
OWN = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": DYNAMIC,
    "yarn": {**YARN, **O16},
    "llama3": {**LLAMA3, **O16},
    "longrope": {**LONGROPE, **O16},
    "proportional": {**PROPORTIONAL, "partial_rotary_factor": 1.0},
}
OWN = {k: v for k, v in OWN.items() if k in ("default", *ROPE_INIT_FUNCTIONS)}


@pytest.fixture
def model():
    return tiny()


@pytest.fixture(autouse=True)
def nothing_stays():
    """Every test must leave no patch behind."""
    with one_thread():
        yield
    assert not _hf_scaling.subjects
    assert not _hf_scaling.standing


@torch.no_grad()
def logits(model, n_token=24):
    random = torch.Generator().manual_seed(1)
    return model(torch.randint(1, 61, (2, n_token), generator=random)).logits


def course(model):
    """Logits as the text grows past the trained length, shrinks, and grows again."""
    return [logits(model, n_token) for n_token in (24, 48, 40, 20, 80, 32, 33)]


@torch.no_grad()
def generated(model):
    out = model.generate(
        torch.arange(1, 29)[None],
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits)


def all_equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def rotary(model):
    return model.get_submodule("model.rotary_emb")


def state(model):
    """Return all of a model's RoPE that a patch may touch."""
    module = rotary(model)
    own = {k: v for k, v in vars(module).items() if k[0] != "_"}
    lasting = {k: v.tolist() for k, v in own.items() if k.endswith("long_inv_freq")}
    own = {k: v for k, v in own.items() if k not in lasting}
    buffers = [module.inv_freq, module.original_inv_freq]
    config = model.config
    return (
        [id(each) for each in buffers],
        [each.tolist() for each in buffers],
        lasting,
        own,
        (id(config.rope_parameters), dict(config.rope_parameters)),
        config.max_position_embeddings,
    )


# --- the same bits as transformers' own ----------------------------------------------


@pytest.mark.parametrize(("scaling", "equal"), SCALINGS.values(), ids=SCALINGS)
def test_patched_saved_and_loaded(model, scaling, equal, tmp_path):
    plain, before, given = course(model), state(model), copy.deepcopy(scaling)
    expected = course(tiny(equal))
    with posenc.hf.patch(model, scaling=scaling) as patched:
        assert model.config.rope_parameters == {"rope_theta": 10000.0, **equal}
        assert all_equal(course(model), expected)
        model.save_pretrained(tmp_path)
    assert scaling == given
    assert state(model) == before
    assert all_equal(course(model), plain)
    assert patched.report().rotations == {"posenc": 2 * 7}
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all_equal(course(loaded), expected)
    assert type(loaded.config.rope_parameters) is dict


@pytest.mark.parametrize(("scaling", "equal"), SCALINGS.values(), ids=SCALINGS)
def test_built_and_loaded_under_a_patch(model, scaling, equal, tmp_path):
    plain, expected = course(model), course(tiny(equal))
    model.save_pretrained(tmp_path / "plain")
    with posenc.hf.patch(scaling=scaling):
        built = tiny()
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
        for each in (built, loaded):
            assert all_equal(course(each), expected)
        loaded.save_pretrained(tmp_path / "scaled")
    for each in (built, loaded):
        assert all_equal(course(each), plain)
        assert state(each)[4][1] == state(model)[4][1]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "scaled")
    assert all_equal(course(again), expected)


@pytest.mark.parametrize("name", ["dynamic", "longrope", "yarn", "llama3"])
def test_generation_across_the_trained_length(model, name):
    scaling, equal = SCALINGS[name]
    expected = generated(tiny(equal))
    with posenc.hf.patch(model, scaling=scaling):
        assert torch.equal(generated(model), expected)


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
@pytest.mark.parametrize("name", ["dynamic", "yarn", "longrope", "ntk_by_parts"])
def test_in_place_of_an_own_scaling(own, name):
    """Whatever lengths a model has read before, and reads under the patch."""
    scaling, equal = SCALINGS[name]
    model = tiny(own)
    for lengths in ((), (48,), (48, 20), (80, 40)):
        for n_token in lengths:
            logits(model, n_token)
        twin, before = copy.deepcopy(model), state(model)
        kept = {k: v for k, v in own.items() if k == "partial_rotary_factor"}
        with posenc.hf.patch(model, scaling=scaling):
            assert all_equal(course(model), course(tiny({**kept, **equal})))
        assert state(model) == before
        assert all_equal(course(model), course(twin))


@pytest.mark.parametrize(
    "names", [*itertools.permutations(["dynamic", "longrope", "yarn"])], ids="-".join
)
def test_nested_in_any_order(model, names):
    """Of what one scaling keeps for itself nothing reaches the next."""
    before = state(model)
    for order in itertools.permutations(range(3)):
        handles = []
        for name in names:
            handles.append(posenc.hf.patch(model, scaling=SCALINGS[name][0]))
            logits(model, 48)
        for n_undone in range(3):
            name = names[max(order[n_undone:])]
            expected = tiny(SCALINGS[name][1])
            for n_token in (48, 80):
                assert torch.equal(logits(model, n_token), logits(expected, n_token))
            handles[order[n_undone]].undo()
        assert state(model) == before


def test_other_long_factors_take_the_place_of_the_first(model):
    other = {**LONGROPE, "long_factor": [2.0 * f for f in LONG]}
    with posenc.hf.patch(model, scaling=LONGROPE):
        logits(model, 48)
        with posenc.hf.patch(model, scaling=other):
            assert all_equal(course(model), course(tiny({**other, **O32})))
        assert all_equal(course(model), course(tiny({**LONGROPE, **O32})))


def test_copies_keep_the_scaling(model):
    for name in ("dynamic", "longrope", "yarn"):
        with posenc.hf.patch(model, scaling=SCALINGS[name][0]):
            logits(model, 48)
            twin = copy.deepcopy(model)
            loaded = pickle.loads(pickle.dumps(model))
            expected = course(model)
        assert all_equal(course(twin), expected)
        assert all_equal(course(loaded), expected)
        with posenc.hf.patch(twin, scaling=PARTS):  # from the model's own settings
            assert all_equal(course(twin), course(tiny(SCALINGS["ntk_by_parts"][1])))


def test_model_that_moved_stays_where_it_is(model):
    handle = posenc.hf.patch(model, scaling=DYNAMIC)
    logits(model, 48)
    model.bfloat16()
    logits(model, 80)
    handle.undo()
    expected = tiny().bfloat16()
    assert torch.equal(rotary(model).inv_freq.bfloat16(), rotary(expected).inv_freq)
    assert rotary(model).original_inv_freq.dtype == torch.bfloat16


# --- lengths -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling", [YARN, PARTS, LONGROPE], ids=lambda s: s["rope_type"]
)
def test_missing_factor_is_the_ratio_of_the_lengths(model, scaling):
    ratio = {k: v for k, v in scaling.items() if k != "factor"}
    with posenc.hf.patch(model, scaling=scaling, max_position_embeddings=128):
        expected = course(model)
    with posenc.hf.patch(model, scaling=ratio, max_position_embeddings=128):
        assert model.config.rope_parameters["factor"] == 4.0
        assert all_equal(course(model), expected)
        with posenc.hf.patch(model, max_position_embeddings=16):
            assert model.config.rope_parameters["factor"] == 4.0
    with posenc.hf.patch(model, scaling={**ratio, **O16}):
        assert model.config.rope_parameters["factor"] == 2.0


def test_undo_that_leaves_a_missing_factor_alone(model):
    before, ratio = state(model), {"rope_type": "yarn"}
    handles = [
        posenc.hf.patch(model, max_position_embeddings=64),
        posenc.hf.patch(model, scaling=ratio, max_position_embeddings=128),
        posenc.hf.patch(model, scaling=NTK),
        posenc.hf.patch(model, max_position_embeddings=16),
    ]
    handles[2].undo()
    assert model.config.rope_parameters["factor"] == 4.0
    assert model.config.max_position_embeddings == 16
    for handle in handles:
        handle.undo()
    assert state(model) == before


def test_longrope_within_the_trained_length_needs_no_factor(model):
    scaling = {k: v for k, v in LONGROPE.items() if k != "factor"}
    with posenc.hf.patch(model, scaling=scaling):
        assert rotary(model).attention_scaling == 1.0
        assert torch.equal(logits(model, 48), logits(tiny({**scaling, **O32}), 48))


def test_dynamic_counts_from_the_length_of_the_config(model):
    with pytest.raises(ValueError, match="must be at most 32 under 'dynamic'"):
        posenc.hf.patch(model, scaling=DYNAMIC, max_position_embeddings=64)
    message = (
        r"^patch: scaling\['original_max_position_embeddings'\] must be "
        "max_position_embeddings, 32, under 'dynamic'; got 16$"
    )
    with pytest.raises(ValueError, match=message):
        posenc.hf.patch(model, scaling={**DYNAMIC, **O16})
    expected = course(tiny(DYNAMIC, max_position_embeddings=16))
    for scaling in (DYNAMIC, {**DYNAMIC, **O16}):
        with posenc.hf.patch(model, scaling=scaling, max_position_embeddings=16):
            assert all_equal(course(model), expected)
    with posenc.hf.patch(model, scaling={**DYNAMIC, **O32}):
        assert model.config.rope_parameters == {**DYNAMIC, "rope_theta": 10000.0}


# --- exact tables --------------------------------------------------------------------

EXACT = {name: pair for name, pair in SCALINGS.items() if name != "dynamic"}


@pytest.mark.parametrize("n_token", [32, 33])
@pytest.mark.parametrize(("scaling", "equal"), EXACT.values(), ids=EXACT)
def test_exact_tables(model, scaling, equal, n_token):
    """As of mpmath, and close to transformers' own where those are good."""
    mpmath = pytest.importorskip("mpmath")
    from golden.scalings import true_attention_factor, true_inv_freq

    positions = torch.arange(n_token)[None]
    trained = rotary(tiny(equal))(torch.zeros(1), positions)
    equal = {"rope_type": "default", "rope_theta": 10000.0, **equal}
    inv_freq = true_inv_freq(16, equal["rope_theta"], equal, n_token)
    factor = true_attention_factor(equal)
    with posenc.hf.patch(model, scaling=scaling, exact=True) as patched:
        tables = rotary(model)(torch.zeros(1), positions)
        logits(model, 48)
    assert patched.report().tables == {"posenc": 2}
    functions = (mpmath.cos, mpmath.sin)
    for ours, theirs, function in zip(tables, trained, functions, strict=True):
        assert (ours - theirs).abs().max() <= TABLE_ROUNDING
        assert torch.equal(ours[..., :N_PAIR], ours[..., N_PAIR:])
        for pair, position in itertools.product(range(N_PAIR), (1, n_token - 1)):
            true = factor * function(position * inv_freq[pair])
            drift = position * inv_freq[pair] * 2.0**-48
            error = abs(mpmath.mpf(float(ours[0, position, pair])) - true)
            assert error <= EXACT_TABLE_ERROR + drift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in OWN if name != "dynamic"])
def test_exact_for_an_own_scaling(name, dtype):
    model = tiny(OWN[name]).to(dtype)
    logits(model, 48)
    before = state(model)
    with posenc.hf.patch(model, exact=True) as patched:
        found = rotary(model)(torch.zeros(1), torch.arange(48)[None])
    expected = rotary(tiny(OWN[name]))(torch.zeros(1), torch.arange(48)[None])
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= TABLE_ROUNDING
    assert patched.report().tables == {"posenc": 1}
    assert state(model) == before


def test_exact_for_an_own_scaling_that_mixes_far_speeds():
    """Where a pair's speed is nearly the slow one, float32 is 24 ulp off."""
    own = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 64.0,
        "original_max_position_embeddings": 8192,
        "truncate": False,
    }
    model = tiny(own, head_dim=128, max_position_embeddings=8192)
    with posenc.hf.patch(model, exact=True) as patched:
        logits(model)
    assert patched.report().tables == {"posenc": 1}


@pytest.mark.parametrize("name", [name for name in OWN if name != "dynamic"])
def test_exact_is_refused_where_the_frequencies_are_others(name):
    model = tiny(OWN[name])
    with torch.no_grad():
        rotary(model).inv_freq[3] *= 1.001
    with pytest.raises(ValueError, match="is not what the model's config says"):
        posenc.hf.patch(model, exact=True)


def test_exact_stands_aside_where_it_does_not_know_the_numbers():
    model = tiny({**YARN, "factor": 0.5})
    before, own = state(model), course(model)
    message = r"^patch: scaling\['factor'\] must be a number of at least 1; got 0.5$"
    with pytest.raises(ValueError, match=message):
        posenc.hf.patch(model, exact=True)
    assert state(model) == before
    outer = posenc.hf.patch(model, scaling=NTK)
    inner = posenc.hf.patch(model, exact=True)
    outer.undo()
    assert all_equal(course(model), own)
    inner.undo()
    assert state(model) == before


def test_exact_is_taken_off_while_dynamic_is_on(model):
    with posenc.hf.patch(model, exact=True):
        with posenc.hf.patch(model, scaling=DYNAMIC):
            assert all_equal(course(model), course(tiny(DYNAMIC)))
        assert "forward" in vars(rotary(model))


def test_exact_of_no_token(model):
    with posenc.hf.patch(model, scaling=LONGROPE, exact=True):
        cos, _ = rotary(model)(torch.zeros(1), torch.zeros(1, 0, dtype=torch.int64))
    assert cos.shape == (1, 0, 2 * N_PAIR)


# --- what is refused -----------------------------------------------------------------

COMMON = "rope_type, rope_theta, original_max_position_embeddings"
REFUSED = [
    (
        {"rope_type": "magic"},
        f"scaling['rope_type'] must be one of {', '.join(map(repr, KEYS))}; "
        "got 'magic'",
    ),
    (
        {**YARN, "type": "linear"},
        "scaling['type'] must be the same as its 'rope_type' 'yarn'; got 'linear'",
    ),
    (
        {**DYNAMIC, "attention_factor": 1.0},
        f"scaling must have only the keys {COMMON}, factor for 'dynamic'; got "
        "['attention_factor']",
    ),
    (
        {**LLAMA3, "mscale": 1.0, "max_position_embeddings": 64},
        f"scaling must have only the keys {COMMON}, factor, low_freq_factor, "
        "high_freq_factor for 'llama3'; got ['mscale', 'max_position_embeddings']",
    ),
    (
        {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.1},
        f"scaling must have only the keys {COMMON}, short_factor, long_factor, "
        "factor, attention_factor for 'longrope'; got ['short_mscale', 'long_mscale']",
    ),
    (
        {"rope_type": "mrope", "mrope_section": [4, 2, 2], "factor": 2.0},
        f"scaling must have only the keys {COMMON} for 'default'; got ['factor']",
    ),
    (
        {"rope_type": "yarn"},
        "scaling['factor'] must be given, or max_position_embeddings be more than 32; "
        "got 32",
    ),
    (
        {**YARN, "factor": 0.5},
        "scaling['factor'] must be a number of at least 1; got 0.5",
    ),
    (
        {**YARN, "original_max_position_embeddings": 1},
        "scaling['original_max_position_embeddings'] must be a whole number of at "
        "least 2; got 1",
    ),
    (
        {**LONGROPE, "long_factor": LONG[1:]},
        "scaling['long_factor'] must hold one number per pair, 8; got 7 numbers",
    ),
    (
        {**NTK, "alpha": 1e300},
        "scaling['alpha'] must leave theta * alpha ** (dim / (dim - 2)) finite for "
        "dim 16; got 1e+300",
    ),
]


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize(
    ("scaling", "message"), REFUSED, ids=[message for _, message in REFUSED]
)
def test_refused(model, scaling, message, with_model):
    before = state(model)
    with pytest.raises(ValueError) as caught:
        if with_model:
            posenc.hf.patch(model, scaling=scaling)
        else:
            with posenc.hf.patch(scaling=scaling):
                tiny()
    assert str(caught.value) == f"patch: {message}"
    assert state(model) == before


def test_refused_where_transformers_does_not_know_it(model, monkeypatch):
    monkeypatch.delitem(ROPE_INIT_FUNCTIONS, "proportional", raising=False)
    before, known = state(model), ", ".join(map(repr, ROPE_INIT_FUNCTIONS))
    with pytest.raises(ValueError) as caught:
        posenc.hf.patch(model, scaling=PROPORTIONAL)
    assert str(caught.value) == (
        "patch: scaling['rope_type'] must be known to the transformers installed here: "
        f"{known}; got 'proportional'"
    )
    assert state(model) == before


@pytest.mark.skipif("proportional" not in OWN, reason="since transformers 5.5")
@pytest.mark.parametrize("n_pair", [2, 4])
def test_refused_where_the_number_of_pairs_would_change(n_pair):
    model = tiny({**PROPORTIONAL, "partial_rotary_factor": n_pair / N_PAIR})
    before = state(model)
    with pytest.raises(ValueError) as caught:
        posenc.hf.patch(model, scaling={"rope_type": "linear", "factor": 2.0})
    assert str(caught.value) == (
        f"patch: scaling must leave the model its 8 pairs per head; got {n_pair} pairs"
    )
    assert state(model) == before


def test_dynamic_needs_two_pairs():
    model = tiny(head_dim=2)
    message = (
        r"^patch: scaling\['rope_type'\] must not be 'dynamic' for a model that "
        "rotates one pair; got 'dynamic'$"
    )
    with pytest.raises(ValueError, match=message):
        posenc.hf.patch(model, scaling=DYNAMIC)


def test_report_shows_what_transformers_reads(model):
    with posenc.hf.patch(model, scaling=PARTS) as patched:
        shown = patched.report().replaced[2]
    expected = {**SCALINGS["ntk_by_parts"][1], "rope_theta": 10000.0}
    assert eval(shown.removeprefix("config.rope_parameters: ")) == expected


def test_arrays_of_factors_are_saved_as_lists(model, tmp_path):
    arrays = {**LONGROPE, "long_factor": np.array(LONG), "short_factor": tuple(SHORT)}
    with posenc.hf.patch(model, scaling=arrays):
        model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters["long_factor"] == LONG
