"""The patch for Hugging Face models: the same bits, other frequencies, and undo.

The oracle is transformers itself: an unpatched model, or one that it built from the
equal config.  No tolerance stands between them but where a constant below says so.
"""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import functools
import gc
import itertools
import pickle
import subprocess
import sys
import threading
import types
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torch_tools import Graphs, one_thread, tiny, tiny_config  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import posenc  # noqa: E402
import posenc.hf  # noqa: E402
from posenc import _hf_scaling  # noqa: E402

ORIGINAL = modeling_llama.apply_rotary_pos_emb
Rotary = modeling_llama.LlamaRotaryEmbedding
ORIGINAL_INIT = Rotary.__init__

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What the project promises for ntk against a larger rope_theta.
NTK_TOLERANCE = 2e-4
# Half a unit in the last place of float32 below 1, and the promise for tables.
EXACT_TABLE_ERROR = 0.501 * 2.0**-24

NTK = {"rope_type": "ntk", "alpha": 8}
NTK_THETA = 10000 * 8 ** (16 / 14)  # head_dim 16
LINEAR = {"rope_type": "linear", "factor": 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 16,
}
OWN_TYPES = {
    "default": {"rope_type": "default"},
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "yarn": YARN,
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}
CONFIGS = {
    **{name: {"rope_parameters": own} for name, own in OWN_TYPES.items()},
    "mha": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "tied, bias": {"tie_word_embeddings": True, "attention_bias": True},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 6},
    "eager": {"attn_implementation": "eager"},
}


@pytest.fixture
def model():
    return tiny()


@pytest.fixture(autouse=True)
def nothing_stays():
    """Every test must leave transformers as it was."""
    with one_thread():
        yield
    assert modeling_llama.apply_rotary_pos_emb is ORIGINAL
    assert Rotary.__init__ is ORIGINAL_INIT
    assert not _hf_scaling.subjects
    assert not _hf_scaling.standing


def batch(n_token=24, n_pad=7):
    """Return inputs of two sequences, the first of which is padded on the left."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (2, n_token), generator=random)
    mask = torch.ones_like(ids)
    mask[0, :n_pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, n_token=24):
    positions = batch(n_token)["attention_mask"].cumsum(-1).clamp(min=1) - 1
    return model(**batch(n_token), position_ids=positions).logits


@torch.no_grad()
def generated(model):
    out = model.generate(
        **batch(12, 5),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def rotary(model):
    return model.get_submodule("model.rotary_emb")


def settings(model):
    """Return all that a config says but what `save_pretrained` notes in it."""
    noted = ("architectures", "dtype")
    return {k: v for k, v in model.config.to_dict().items() if k not in noted}


def state(model):
    """Return everything about a model's RoPE that a patch may touch."""
    module = rotary(model)
    return SimpleNamespace(
        module=id(module),
        buffers=[id(module.inv_freq), id(module.original_inv_freq)],
        values=[module.inv_freq.tolist(), module.original_inv_freq.tolist()],
        attributes={
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_")
        },
        parameters=(
            id(model.config.rope_parameters),
            dict(model.config.rope_parameters),
        ),
        config=settings(model),
    )


def case(dtype=torch.float32, n_token=5, table_batch=1, unsqueeze_dim=1, heads=(4, 2)):
    """Return q, k, cos, sin as attention passes them, random everywhere."""
    random = torch.Generator().manual_seed(2)
    q, k = (
        torch.randn(2, n_token, n_head, 16, generator=random, dtype=dtype)
        for n_head in heads
    )
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = (
        torch.randn(table_batch, n_token, 8, generator=random, dtype=dtype)
        for _ in range(2)
    )
    return q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def call(*args, **kwargs):
    """Call the function that attention calls now."""
    return modeling_llama.apply_rotary_pos_emb(*args, **kwargs)


def steps(x):
    """Return the strides that lead anywhere: nothing reads those of one element."""
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert steps(a) == steps(b)
        assert torch.equal(a, b)


# The patch that changes no bit


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_greedy_tokens_keep_their_bits(changes):
    model = tiny(**changes)
    plain = copy.deepcopy(model)  # dynamic types keep a state: each runs its own course
    with posenc.hf.patch(model) as patched:
        ours = [logits(model), *generated(model), logits(model, 48)]
        report = patched.report()
    theirs = [logits(plain), *generated(plain), logits(plain, 48)]
    assert all(map(torch.equal, ours, theirs))
    assert report.rotations == {"posenc": 2 * (1 + 24 + 1)}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_of_any_type_keeps_its_bits(dtype, inplace):
    model = tiny().to(dtype)
    before = [logits(model), *generated(model)]
    with posenc.hf.patch(model, inplace=inplace) as patched:
        assert all(map(torch.equal, [logits(model), *generated(model)], before))
    assert patched.report().rotations == {"posenc": 2 * (1 + 24)}


def test_bare_model_and_inference_mode_keep_their_bits():
    model = LlamaModel(tiny_config()).eval()
    with torch.inference_mode():
        before = model(**batch()).last_hidden_state
        with posenc.hf.patch(model) as patched:
            assert torch.equal(model(**batch()).last_hidden_state, before)
    assert patched.report().rotations == {"posenc": 2}


@pytest.mark.parametrize("n_thread", [1, 2])
def test_logits_keep_their_bits_with_threads(model, n_thread):
    before, results = logits(model), [None] * 4

    def work(i):
        results[i] = logits(model)

    torch.set_num_threads(n_thread)
    with posenc.hf.patch(model) as patched:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(result, before) for result in results)
    assert patched.report().rotations == {"posenc": 8}


def test_patch_touches_no_module_and_no_config(model):
    before = state(model)
    with posenc.hf.patch(model):
        assert modeling_llama.apply_rotary_pos_emb is not ORIGINAL
        assert state(model) == before
    assert state(model) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_batch", [1, 2])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("n_token", [1, 2, 5])
def test_rotation_has_bits_and_strides_of_the_original(
    model, dtype, table_batch, unsqueeze_dim, heads, n_token
):
    args = case(dtype, n_token, table_batch, unsqueeze_dim, heads)
    before = [each.clone() for each in args]
    with posenc.hf.patch(model) as patched:
        assert_same(
            call(*args, unsqueeze_dim=unsqueeze_dim),
            ORIGINAL(*args, unsqueeze_dim=unsqueeze_dim),
        )
        assert_same(call(*args, unsqueeze_dim), ORIGINAL(*args, unsqueeze_dim))
    assert patched.report().rotations == {"posenc": 2}
    assert all(map(torch.equal, args, before))


def test_rotation_of_no_token_and_of_slices(model):
    fused = torch.randn(2, 5, 8, 48).transpose(1, 2)
    slices = fused[:, :4, :, :16], fused[:, 4:6, :, 16:32], *case()[2:]
    with posenc.hf.patch(model) as patched:
        assert_same(call(*slices), ORIGINAL(*slices))
        empty = [x.shape for x in call(*case(n_token=0))]
    assert empty == [(2, 4, 0, 16), (2, 2, 0, 16)]
    assert patched.report().rotations == {"posenc": 2}


def test_rotation_of_parameters_without_gradients(model):
    q, *rest = case()
    args = torch.nn.Parameter(q), *rest
    with torch.no_grad(), posenc.hf.patch(model) as patched:
        ours = call(*args)
        assert_same(ours, ORIGINAL(*args))
    assert not ours[0].requires_grad
    assert patched.report().rotations == {"posenc": 1}


def test_special_values_keep_their_bits(model):
    q, k, cos, sin = case()
    q[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, -0.0, 1e-45])
    cos[0, 0, ::8] = -0.0
    with posenc.hf.patch(model):
        ours, theirs = call(q, k, cos, sin), ORIGINAL(q, k, cos, sin)
    for a, b in zip(ours, theirs, strict=True):
        number = ~b.isnan()
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a[number].view(torch.int32), b[number].view(torch.int32))


@pytest.mark.parametrize("bits", [0x7FC01234, 0x7FA00001, -0x00400000])
def test_nan_is_always_the_same_one(model, bits):
    q, k, *tables = case()
    q.view(torch.int32)[...] = bits
    with posenc.hf.patch(model):
        ours = call(q, k, *tables)[0]
    assert (ours.view(torch.int32) == 0x7FC00000).all()
    assert ORIGINAL(q, k, *tables)[0].isnan().all()


# Where the original runs


def unequal_halves():
    q, k, cos, sin = case()
    sin[0, 0, 0] += 1
    return q, k, cos, sin


def negative_zero_half():
    q, k, cos, sin = case()
    cos[0, 0, 0], cos[0, 0, 8] = 0.0, -0.0
    return q, k, cos, sin


def with_grad():
    q, k, cos, sin = case()
    return q, k, cos.requires_grad_(), sin


def mixed():
    q, k, *tables = case()
    return q.bfloat16(), k.bfloat16(), *tables


def meta():
    return tuple(each.to("meta") for each in case())


def negated():
    q, *rest = case()
    return torch.complex(q, q).conj().imag, *rest


class Subclass(torch.Tensor):
    pass


def subclass():
    q, *rest = case()
    return q.as_subclass(Subclass), *rest


def wide_table():
    q, k, cos, sin = case()
    return q[:1], k[:1], cos.repeat(2, 1, 1), sin.repeat(2, 1, 1)


def one_row_for_all():
    q, k, cos, sin = case()
    return q, k, cos[:, :1], sin[:, :1]


def tokens_outermost():
    q, k, *tables = case()
    order = (2, 0, 1, 3)
    back = (1, 2, 0, 3)
    q, k = (x.permute(order).contiguous().permute(back) for x in (q, k))
    return q, k, *tables


SHAPES = "shapes or unsqueeze_dim that posenc does not know"
HALVES = "the halves of cos or sin differ"
TYPES_DIFFER = "q, k, cos and sin are of different types (autocast)"
TRACED = "traced by torch.compile or torch.export (counted once per trace)"
FALLBACKS = {
    "complex": (
        functools.partial(case, torch.complex64),
        "torch.complex64 is not served",
    ),
    "mixed": (mixed, TYPES_DIFFER),
    "gradients": (with_grad, "gradients of cos or sin are asked for"),
    "halves": (unequal_halves, HALVES),
    "minus zero": (negative_zero_half, HALVES),
    "meta": (meta, "device meta"),
    "negated": (negated, "a sparse or lazily negated tensor"),
    "subclass": (subclass, "a Subclass instead of a plain tensor"),
    "memory order": (tokens_outermost, "a memory order other than that of attention"),
    "wide table": (wide_table, SHAPES),
    "one row": (one_row_for_all, SHAPES),
    "unsqueeze_dim": (functools.partial(case, unsqueeze_dim=2, n_token=4), SHAPES),
}


@pytest.mark.parametrize(("make", "reason"), FALLBACKS.values(), ids=FALLBACKS)
def test_original_runs_and_is_counted(model, make, reason):
    args = make()
    last = (-2,) if make is FALLBACKS["unsqueeze_dim"][0] else ()
    with posenc.hf.patch(model) as patched:
        ours = call(*args, *last)
    theirs = ORIGINAL(*args, *last)
    assert patched.report().rotations == {reason: 1}
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
        assert type(a) is type(b)
        assert a.is_meta or torch.equal(a, b)


def test_original_raises_what_it_always_raised(model):
    q, k, *_ = case()
    with posenc.hf.patch(model) as patched, pytest.raises(AttributeError):
        call(q, k, None, None)
    assert patched.report().rotations == {"a NoneType instead of a plain tensor": 1}


def test_halves_are_looked_at_again_after_a_write(model):
    q, k, cos, sin = case()
    with posenc.hf.patch(model) as patched:
        call(q, k, cos, sin)
        call(q, k, cos, sin)
        cos[0, 0, 0] += 1
        assert_same(call(q, k, cos, sin), ORIGINAL(q, k, cos, sin))
    assert patched.report().rotations == {"posenc": 2, HALVES: 1}


@pytest.mark.parametrize("view", [lambda x: x.data, lambda x: x.numpy()])
@pytest.mark.parametrize("table", [2, 3])
def test_halves_are_looked_at_again_after_a_write_without_a_trace(model, view, table):
    args = case()
    with posenc.hf.patch(model) as patched:
        call(*args)
        view(args[table])[0, 0, 0] += 1
        assert_same(call(*args), ORIGINAL(*args))
    assert patched.report().rotations == {"posenc": 1, HALVES: 1}


def test_tables_serve_inference_and_then_training(model):
    q, *rest = case()
    with posenc.hf.patch(model):
        with torch.inference_mode():
            call(q, *rest)
        call(q.requires_grad_(), *rest)[0].sum().backward()
        ours, q.grad = q.grad, None
    ORIGINAL(q, *rest)[0].sum().backward()
    assert torch.equal(ours, q.grad)


def test_tables_that_change_before_the_way_back_are_an_error(model):
    q, k, cos, sin = case()
    with posenc.hf.patch(model):
        out = call(q.requires_grad_(), k, cos, sin)[0]
    cos.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_tables_are_not_kept_alive(model):
    q, k, cos, sin = case()
    seen = weakref.ref(cos)
    with posenc.hf.patch(model):
        call(q, k, cos, sin)
        del cos
        gc.collect()
        assert seen() is None


def test_transforms_modes_and_forward_derivatives_run_the_original(model):
    q, k, cos, sin = case()
    many = torch.stack((q, 2 * q))
    with posenc.hf.patch(model) as patched:
        ours = torch.func.vmap(lambda x: call(x, k, cos, sin)[0])(many)
        with torch.device("cpu"):
            call(q, k, cos, sin)
        with FlopCounterMode(display=False):
            call(q, k, cos, sin)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            out = call(dual, k, cos, sin)[0]
            tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    assert torch.equal(
        ours, torch.func.vmap(lambda x: ORIGINAL(x, k, cos, sin)[0])(many)
    )
    assert torch.equal(tangent, ORIGINAL(torch.ones_like(q), k, cos, sin)[0])
    assert patched.report().rotations == {
        "posenc": 1,
        "a torch mode or function transform is active": 2,
        "forward-mode derivatives are on": 1,
    }


def test_autocast_keeps_its_bits(model):
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
        with posenc.hf.patch(model) as patched:
            assert torch.equal(logits(model), before)
    assert patched.report().rotations == {TYPES_DIFFER: 2}
    loud = f"  WARNING: NOTHING WAS FASTER in 2 calls: {TYPES_DIFFER}"
    assert str(patched.report()).splitlines()[-1] == loud


# Gradients


def gradients(model, run=None):
    """Return what a training step gives, run by the model or by what it became."""
    model.zero_grad()
    tokens = batch()["input_ids"]
    (model if run is None else run)(tokens, labels=tokens).loss.backward()
    return [each.grad.clone() for each in model.parameters()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step_keeps_the_bits_of_its_gradients(dtype, attention):
    model = tiny(attn_implementation=attention).to(dtype).train()
    before = gradients(model)
    with posenc.hf.patch(model, inplace=True) as patched:
        assert all(map(torch.equal, gradients(model), before))
    assert patched.report().rotations == {"posenc": 2}


def test_checkpointed_training_step_keeps_its_bits(model):
    model.train()
    before = gradients(model)
    for layer in model.model.layers:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False
        )
    assert all(map(torch.equal, gradients(model), before))
    with posenc.hf.patch(model):
        assert all(map(torch.equal, gradients(model), before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_batch", [1, 2])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradients_of_the_rotation_keep_their_bits(
    model, dtype, table_batch, unsqueeze_dim, needed
):
    q, k, *tables = case(dtype, 5, table_batch, unsqueeze_dim)
    q.requires_grad_(needed[0])
    k.requires_grad_(needed[1])
    inputs = [x for x in (q, k) if x.requires_grad]

    def back(rotate):
        out = rotate(q, k, *tables, unsqueeze_dim=unsqueeze_dim)
        assert [x.requires_grad for x in out] == list(needed)
        out = [x for x in out if x.requires_grad]
        random = torch.Generator().manual_seed(3)
        grads = [torch.randn(x.shape, generator=random).to(x) for x in out]
        return *out, *torch.autograd.grad(out, inputs, grads)

    with posenc.hf.patch(model) as patched:
        ours = back(call)
    assert all(map(torch.equal, ours, back(ORIGINAL)))
    assert patched.report().rotations == {"posenc": 1}


def test_gradients_of_gradients_are_those_of_the_original(model):
    q, k, *tables = case(torch.float64)
    q.requires_grad_()

    def twice(rotate):
        loss = sum(x.pow(3).sum() for x in rotate(q, k, *tables))
        (once,) = torch.autograd.grad(loss, q, create_graph=True)
        return torch.autograd.grad(once.pow(2).sum(), q)[0]

    with posenc.hf.patch(model):
        ours = twice(call)
    torch.testing.assert_close(ours, twice(ORIGINAL))


# In place


def test_in_place_writes_where_q_and_k_lie(model):
    with torch.no_grad(), posenc.hf.patch(model, inplace=True) as patched:
        q, k, *tables = case()
        expected = ORIGINAL(q, k, *tables)
        q, k = (x.transpose(1, 2).clone().transpose(1, 2) for x in (q, k))
        ours = call(q, k, *tables)
        assert ours[0] is q
        assert ours[1] is k
        assert_same(ours, expected)
        with torch.inference_mode():
            q, k, *tables = case()
            assert call(q, k, *tables)[0] is q
    assert patched.report().rotations == {"posenc": 2}


HOLDERS = {
    "base": lambda x: x.transpose(1, 2),
    "view": lambda x: x[:, :, :1],
    "detached": lambda x: x.detach(),
    "array": lambda x: x.numpy(),
    "storage": lambda x: torch.empty(0).set_(x.untyped_storage()),
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_place_spares_memory_that_others_hold(model, holder, which, mode):
    with mode(), posenc.hf.patch(model, inplace=True) as patched:
        args = case()
        held = holder(args[which])
        before = [x.clone() for x in args]
        ours = call(*args)
    assert held is not None
    assert all(map(torch.equal, args, before))
    assert_same(ours, ORIGINAL(*before))
    assert patched.report().rotations == {"posenc": 1}


def test_in_place_spares_what_hooks_hold(model):
    kept = {}

    def keep(name):
        return lambda module, args, output: kept.__setitem__(name, output)

    def run():
        kept.clear()
        found = logits(model)
        return found, *kept.values()

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(keep(name))
    before = run()
    with posenc.hf.patch(model, inplace=True):
        assert all(map(torch.equal, run(), before))


def test_in_place_spares_the_input_of_a_projection_that_does_nothing():
    class Same(torch.nn.Module):
        def forward(self, x):
            return x

    model = tiny(num_key_value_heads=4)
    for layer in model.model.layers:
        layer.self_attn.q_proj = layer.self_attn.k_proj = Same()
    before = logits(model)
    with posenc.hf.patch(model, inplace=True) as patched:
        assert torch.equal(logits(model), before)
    assert patched.report().rotations == {"posenc": 2}


def test_in_place_ends_with_the_patch_that_asked_for_it(model):
    with torch.no_grad(), posenc.hf.patch(model):
        with posenc.hf.patch(model, inplace=True):
            q, *rest = case()
            assert call(q, *rest)[0] is q
        assert call(q, *rest)[0] is not q


# Compilers


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, True),
        (torch.float64, False),
    ],
    ids=str,
)
def test_compiled_model_has_one_operator_for_each_layer(compiled, dtype, exact):
    model, graphs = tiny().to(dtype), Graphs()
    before = logits(model)
    fast = compiled(model, backend=graphs)
    with posenc.hf.patch(model, exact=exact, inplace=True) as patched:
        assert torch.equal(logits(fast), before)
        logits(fast)
    assert len(graphs) == 1
    assert graphs.operators() == 2
    assert patched.report().rotations == {"posenc": 4}
    assert patched.report().tables == ({TRACED: 1} if exact else {})
    assert torch.equal(logits(fast), before)  # after the undo: the original, compiled
    assert len(graphs) == 2
    assert graphs.operators() == 2


def test_inductor_leaves_the_rotation_its_bits(compiled):
    args, other = case(torch.bfloat16), case(torch.bfloat16, n_token=7)
    fast = compiled(lambda *args: call(*args), backend="inductor", dynamic=True)
    with posenc.hf.patch() as patched:
        assert_same(fast(*args), ORIGINAL(*args))
        assert_same(fast(*other), ORIGINAL(*other))
    assert patched.report().rotations == {"posenc": 2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_training_step_keeps_the_bits_of_its_gradients(compiled, dtype):
    model = tiny(num_hidden_layers=1).to(dtype).train()
    fast = compiled(model)
    before = gradients(model, fast)
    with posenc.hf.patch(model) as patched:
        assert all(map(torch.equal, gradients(model, fast), before))
    assert patched.report().rotations == {"posenc": 1}


def test_compiled_rotation_looks_at_the_halves_when_it_runs(model, compiled):
    q, k, cos, sin = case()
    q.requires_grad_()
    fast = compiled(lambda *args: call(*args))

    def both(rotate):
        out = rotate(q, k, cos, sin)
        return *out, *torch.autograd.grad(out[0].square().sum(), q)

    with posenc.hf.patch(model) as patched:
        both(fast)
        sin[0, 0, 0] += 1
        assert all(map(torch.equal, both(fast), both(ORIGINAL)))
    assert patched.report().rotations == {"posenc": 1, HALVES: 1}


@pytest.mark.parametrize("make", [mixed, with_grad, one_row_for_all])
def test_compiled_call_that_cannot_join_runs_the_original(model, compiled, make):
    fast = compiled(lambda *args: call(*args))
    with posenc.hf.patch(model) as patched:
        assert_same(fast(*make()), ORIGINAL(*make()))
        fast(*make())
    assert patched.report().rotations == {TRACED: 1}


def test_operator_passes_opcheck():
    for make, unsqueeze_dim in ((case, 1), (unequal_halves, 1), (one_token, 2)):
        for adjoint in (False, True):
            arguments = (*make(), unsqueeze_dim, adjoint)
            operator = torch.ops.posenc.apply_rotary_pos_emb.default
            results = torch.library.opcheck(operator, arguments)
            assert set(results.values()) == {"SUCCESS"}


def one_token():
    return case(torch.float16, n_token=1, unsqueeze_dim=2)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_graph_holds_the_original_operations(model, strict):
    class Rotate(torch.nn.Module):
        def forward(self, *args):
            return call(*args)

    def operations():
        program = torch.export.export(Rotate(), case(), strict=strict)
        return [str(node.target) for node in program.graph.nodes]

    before = operations()
    with posenc.hf.patch(model):
        assert operations() == before


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_trace_holds_the_original_operations(model):
    with posenc.hf.patch(model) as patched:
        traced = torch.jit.trace(lambda *args: call(*args), case(), check_trace=False)
        other = tuple(2 * each for each in case())
        assert_same(traced(*other), ORIGINAL(*other))
    assert patched.report().rotations == {"traced by torch.jit": 1}


# Undo


def test_undo_in_any_order(model):
    other = tiny()
    for order in itertools.permutations(range(4)):
        handles = [
            posenc.hf.patch(model),
            posenc.hf.patch(model),
            posenc.hf.patch(),
            posenc.hf.patch(other),
        ]
        installed = modeling_llama.apply_rotary_pos_emb
        for i in order[:-1]:
            handles[i].undo()
            handles[i].undo()
            assert modeling_llama.apply_rotary_pos_emb is installed
        handles[order[-1]].undo()
        assert modeling_llama.apply_rotary_pos_emb is ORIGINAL


def test_undo_after_an_error_inside_with(model):
    before = state(model)
    with pytest.raises(KeyError), posenc.hf.patch(model, scaling=NTK, exact=True):
        raise KeyError
    assert state(model) == before


def test_two_patches_rotate_once(model):
    with posenc.hf.patch(model) as outer, posenc.hf.patch(model) as inner:
        logits(model)
    assert outer.report().rotations == inner.report().rotations == {"posenc": 2}


def test_dispatcher_looks_like_the_original(model):
    with posenc.hf.patch(model):
        function = modeling_llama.apply_rotary_pos_emb
        assert function.__name__ == ORIGINAL.__name__
        assert function.__doc__ == ORIGINAL.__doc__
        assert function.__wrapped__ is ORIGINAL


def test_somebody_elses_wrapper_stays(model, monkeypatch):
    handle = posenc.hf.patch(model)
    inner = modeling_llama.apply_rotary_pos_emb

    @functools.wraps(inner)
    def theirs(*args, **kwargs):
        return inner(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", theirs)
    handle.undo()
    assert modeling_llama.apply_rotary_pos_emb is theirs
    stays = "somebody else replaced it after the patch, theirs stays"
    assert handle.report().left_alone[-1].endswith(stays)
    assert_same(call(*case()), ORIGINAL(*case()))  # through our idle dispatcher
    with posenc.hf.patch(model) as patched:
        assert_same(call(*case()), ORIGINAL(*case()))
    assert patched.report().rotations == {"posenc": 1}
    assert modeling_llama.apply_rotary_pos_emb is theirs
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", inner)
    with posenc.hf.patch(model):  # our own idle dispatcher wakes up
        assert modeling_llama.apply_rotary_pos_emb is inner
    monkeypatch.undo()
    modeling_llama.apply_rotary_pos_emb = ORIGINAL


def test_kernels_module_instead_of_a_function(model, monkeypatch):
    """The `kernels` package turns the function into a module that calls it."""

    class Func(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return ORIGINAL(*args, **kwargs)

    func, before = Func(), logits(model)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", func)
    with posenc.hf.patch(model) as patched:
        assert torch.equal(logits(model), before)
    assert patched.report().rotations == {"posenc": 2}
    assert modeling_llama.apply_rotary_pos_emb is func


def flipped(q, k, cos, sin, unsqueeze_dim=1):
    return ORIGINAL(q, k, cos, -sin, unsqueeze_dim=unsqueeze_dim)


def old_signature(q, k, cos, sin, position_ids):
    return q, k


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    order = torch.arange(q.shape[-1]).view(-1, 2).T.reshape(-1)
    back = order.argsort()
    q, k = ORIGINAL(q[..., order], k[..., order], cos, sin, unsqueeze_dim)
    return q[..., back], k[..., back]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (flipped, "which gives other numbers"),
        (interleaved, "which gives other numbers"),
        (old_signature, "which raises TypeError: .* unexpected keyword .*"),
    ],
)
@pytest.mark.parametrize("with_model", [True, False])
def test_unknown_rotation_is_refused(model, monkeypatch, function, why, with_model):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)
    before = state(model)
    message = (
        r"^patch: transformers.models.llama.modeling_llama.apply_rotary_pos_emb must "
        rf"rotate like posenc's layout 'half'; got <function {function.__name__} at "
        rf"0x[0-9a-f]+>, {why}$"
    )
    with pytest.raises(RuntimeError, match=message):
        posenc.hf.patch(model if with_model else None, scaling=NTK)
    assert modeling_llama.apply_rotary_pos_emb is function
    assert Rotary.__init__ is ORIGINAL_INIT
    assert state(model) == before


def test_patch_leaves_the_random_state_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with posenc.hf.patch(model):
        assert torch.equal(torch.rand(4), expected)


# Scaling


@pytest.mark.parametrize(
    ("scaling", "equal"),
    [
        (NTK, {"rope_type": "default", "rope_theta": NTK_THETA}),
        ({"type": "ntk", "alpha": 8.0}, {"rope_theta": NTK_THETA}),
        (
            {**NTK, "rope_theta": 5e5},
            {"rope_theta": 5e5 * 8 ** (16 / 14)},
        ),
        (LINEAR, LINEAR),
        ({"type": "linear", "factor": 4}, LINEAR),
        ({"rope_type": "default"}, {}),
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_type": "default", "original_max_position_embeddings": 32}, {}),
    ],
    ids=str,
)
def test_scaling_equals_the_config_of_transformers(model, scaling, equal, tmp_path):
    expected = logits(tiny(rope_parameters=equal))
    with posenc.hf.patch(model, scaling=scaling) as patched:
        assert torch.equal(logits(model), expected)
        assert rotary(model).rope_type == equal.get("rope_type", "default")
        model.save_pretrained(tmp_path)
    assert patched.report().rotations == {"posenc": 2}
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert type(loaded.config.rope_parameters) is dict


@pytest.mark.parametrize("before_build", [False, True])
def test_ntk_equals_a_larger_rope_theta(before_build):
    expected = logits(tiny(rope_parameters={"rope_theta": NTK_THETA}))
    if before_build:
        with posenc.hf.patch(scaling=NTK):
            found = logits(tiny())
    else:
        model = tiny()
        with posenc.hf.patch(model, scaling=NTK):
            found = logits(model)
    assert (found - expected).abs().max() <= NTK_TOLERANCE


@pytest.mark.parametrize("own", OWN_TYPES.values(), ids=OWN_TYPES)
@pytest.mark.parametrize("scaling", [NTK, LINEAR, {"rope_type": "default"}], ids=str)
def test_scaling_of_any_type_and_undo(own, scaling, tmp_path):
    model = tiny(rope_parameters=own, max_position_embeddings=64)
    plain = copy.deepcopy(model)
    for length in (None, 16, 128):
        before = state(model)
        with posenc.hf.patch(model, scaling=scaling, max_position_embeddings=length):
            assert model.config.max_position_embeddings == (length or 64)
            now = state(model)
            assert (now.module, now.buffers) == (before.module, before.buffers)
            scaled = logits(model, 80)
            model.save_pretrained(tmp_path)
        assert state(model) == before
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, 80), scaled)
    assert torch.equal(logits(model, 80), logits(plain, 80))


def test_grown_dynamic_state_comes_back():
    model = tiny(rope_parameters=DYNAMIC)
    logits(model, 64)
    plain, before = copy.deepcopy(model), state(model)
    with posenc.hf.patch(model, scaling=LINEAR):
        logits(model, 64)
    assert state(model) == before
    assert all(
        torch.equal(logits(model, n_token), logits(plain, n_token))
        for n_token in (64, 40, 24, 80)
    )


def test_latest_of_nested_scalings_decides_in_any_order(model):
    settings = [
        {"scaling": NTK, "max_position_embeddings": 256},
        {"scaling": LINEAR},
        {"scaling": {"rope_type": "default", "rope_theta": 5e5}, "exact": True},
        {"max_position_embeddings": 128},
    ]

    def shows(active):
        parameters, length = {"rope_type": "default", "rope_theta": 1e4}, 32
        for setting in active:
            if setting.get("scaling") == NTK:
                parameters = {"rope_type": "default", "rope_theta": NTK_THETA}
            elif setting.get("scaling") == LINEAR:
                parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
            elif "scaling" in setting:
                parameters = setting["scaling"]
            length = setting.get("max_position_embeddings", length)
        return parameters, length, any("exact" in setting for setting in active)

    before = state(model)
    for order in itertools.permutations(range(4)):
        handles = [posenc.hf.patch(model, **setting) for setting in settings]
        for n_undone in range(4):
            active = [settings[i] for i in sorted(order[n_undone:])]
            parameters, length, exact = shows(active)
            module = rotary(model)
            assert model.config.rope_parameters == parameters
            assert model.config.max_position_embeddings == length
            expected = Rotary(tiny_config(rope_parameters=parameters)).inv_freq
            assert torch.equal(module.inv_freq, expected)
            assert module.rope_type == parameters["rope_type"]
            assert module.max_seq_len_cached == module.original_max_seq_len == length
            assert ("forward" in vars(module)) == exact
            handles[order[n_undone]].undo()
        assert state(model) == before


def test_partial_factor_stays_in_the_config():
    model = tiny(rope_parameters={"partial_rotary_factor": 1.0})
    for scaling in (NTK, LINEAR, {"rope_type": "default"}):
        with posenc.hf.patch(model, scaling=scaling):
            assert model.config.rope_parameters["partial_rotary_factor"] == 1.0


def test_length_alone_fills_in_the_trained_length():
    own = {key: YARN[key] for key in ("rope_type", "factor")}
    model = tiny(rope_parameters=own)
    del model.config.rope_parameters["original_max_position_embeddings"]
    with posenc.hf.patch(model, max_position_embeddings=128):
        parameters = model.config.rope_parameters
        assert parameters["original_max_position_embeddings"] == 32
        assert model.config.max_position_embeddings == 128
    assert "original_max_position_embeddings" not in model.config.rope_parameters


def test_length_may_sink_but_not_rise_under_dynamic():
    model = tiny(rope_parameters=DYNAMIC)
    before = state(model)
    message = (
        "patch: max_position_embeddings must be at most 32 under 'dynamic', which more "
        "would turn off; got 64"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        posenc.hf.patch(model, max_position_embeddings=64)
    assert state(model) == before
    with posenc.hf.patch(model, max_position_embeddings=16):
        expected = tiny(rope_parameters=DYNAMIC, max_position_embeddings=16)
        assert torch.equal(logits(model), logits(expected))
    outer = posenc.hf.patch(model, scaling=NTK)
    inner = posenc.hf.patch(model, max_position_embeddings=64)
    outer.undo()  # what is left of `inner` may not switch the model's own type off
    assert model.config.max_position_embeddings == 32
    inner.undo()
    assert model.config.rope_parameters["rope_type"] == "dynamic"


def test_scaling_in_bfloat16_buffers():
    model = tiny().bfloat16()
    before = state(model)
    with posenc.hf.patch(model, scaling=NTK):
        expected = tiny(rope_parameters={"rope_theta": NTK_THETA}).bfloat16()
        assert torch.equal(logits(model), logits(expected))
    assert state(model) == before


def test_config_that_stands_beside_the_modules_is_rewritten_too(model, tmp_path):
    model.config = copy.deepcopy(model.config)
    before = settings(model)
    with posenc.hf.patch(model, scaling=NTK, max_position_embeddings=64):
        expected = logits(model)
        model.save_pretrained(tmp_path)
    assert settings(model) == before
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == 64
    assert torch.equal(logits(loaded), expected)


def test_copies_of_a_patched_model_are_not_scaled_twice(model):
    expected = logits(tiny(rope_parameters={"rope_theta": NTK_THETA}))
    plain = logits(model)
    with posenc.hf.patch(model, scaling=NTK, max_position_embeddings=64):
        twin = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(loaded), expected)
    assert type(loaded.config.rope_parameters) is dict
    assert torch.equal(logits(model), plain)
    with posenc.hf.patch(twin, scaling=NTK):
        assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(twin), expected)


@pytest.mark.parametrize("own", [{}, YARN, DYNAMIC], ids=str)
@pytest.mark.parametrize(
    "setting",
    [
        {"max_position_embeddings": 128},
        {"exact": True},
        {"max_position_embeddings": 16, "exact": True},
        {"scaling": LINEAR},
        {"scaling": {"rope_type": "default"}, "max_position_embeddings": 16},
    ],
    ids=str,
)
def test_patch_of_a_copy_of_a_scaled_model_comes_back(own, setting):
    model = tiny(rope_parameters=own)
    with posenc.hf.patch(model, scaling=NTK, max_position_embeddings=64):
        twin = copy.deepcopy(model)
    before, scaled = state(twin), logits(twin)
    length = setting.get("max_position_embeddings", 64)
    parameters = {**before.parameters[1], **setting.get("scaling", {})}
    if "scaling" in setting:  # from the model's own theta, never scaled twice
        parameters["rope_theta"] = 10000.0
    expected = tiny(rope_parameters=parameters, max_position_embeddings=length)
    with posenc.hf.patch(twin, **setting):
        assert twin.config.rope_parameters == expected.config.rope_parameters
        assert twin.config.max_position_embeddings == length
        assert torch.equal(rotary(twin).inv_freq, rotary(expected).inv_freq)
        if "exact" not in setting:
            assert torch.equal(logits(twin), logits(expected))
    assert state(twin) == before
    assert torch.equal(logits(twin), scaled)


def test_model_from_the_config_of_a_scaled_model_comes_back(model):
    with posenc.hf.patch(model, scaling=NTK):
        configs = copy.deepcopy(model.config), LlamaConfig(**model.config.to_dict())
    for config in configs:
        built = LlamaForCausalLM(config)
        before = state(built)
        with posenc.hf.patch(built, scaling=LINEAR):
            assert built.config.rope_parameters["rope_theta"] == 10000
        assert state(built) == before
        assert before.parameters[1]["rope_theta"] == NTK_THETA


def test_length_of_a_copy_may_not_rise_under_dynamic():
    model = tiny(rope_parameters=DYNAMIC)
    with posenc.hf.patch(model, max_position_embeddings=16):
        twin = copy.deepcopy(model)
    before = state(twin)
    with pytest.raises(ValueError, match="must be at most 32 under 'dynamic'"):
        posenc.hf.patch(twin, max_position_embeddings=64)
    with posenc.hf.patch(twin, max_position_embeddings=24):
        assert twin.config.max_position_embeddings == 24
    assert state(twin) == before


def test_copies_under_a_class_patch_go_their_own_way():
    with posenc.hf.patch(scaling=NTK):
        model = tiny()
        twin = copy.deepcopy(model)
        before = state(twin)
        with posenc.hf.patch(twin, scaling=LINEAR):
            assert rotary(twin).rope_type == "linear"
        assert state(twin) == before
    assert model.config.rope_parameters["rope_theta"] == 10000
    assert state(twin) == before


def test_model_that_is_gone_is_no_trouble():
    model = tiny()
    seen = weakref.ref(rotary(model))
    handle = posenc.hf.patch(model, scaling=NTK, exact=True)
    del model
    gc.collect()
    assert seen() is None
    handle.undo()


# Models built under a patch


def test_models_built_while_active_have_it_and_earlier_ones_do_not(model):
    expected = logits(tiny(rope_parameters=LINEAR, max_position_embeddings=128))
    before, untouched = state(model), logits(model)
    with posenc.hf.patch(scaling=LINEAR, max_position_embeddings=128) as patched:
        first, second = tiny(), tiny()
        assert torch.equal(logits(first), expected)
        assert torch.equal(logits(second), expected)
        assert torch.equal(logits(model), untouched)
        assert state(model) == before
    for built in (first, second):  # they go on, as if there had been no patch
        assert settings(built) == settings(model)
        assert state(built).values == before.values
        assert torch.equal(logits(built), untouched)
    assert patched.report().rotations == {"posenc": 6}


def test_loaded_models_have_it_and_save_it(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    expected = logits(tiny(rope_parameters={"rope_theta": NTK_THETA}))
    with posenc.hf.patch(scaling=NTK, max_position_embeddings=64):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
        assert torch.equal(logits(loaded), expected)
        loaded.save_pretrained(tmp_path / "scaled")
    assert torch.equal(logits(loaded), logits(model))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "scaled")
    assert torch.equal(logits(again), expected)
    assert again.config.max_position_embeddings == 64


def test_one_config_for_many_models_is_scaled_once(model):
    config = tiny_config()
    with posenc.hf.patch(scaling=NTK):
        LlamaForCausalLM(config)
        models = [
            LlamaForCausalLM(config),
            LlamaForCausalLM(copy.deepcopy(config)),
            LlamaForCausalLM(LlamaConfig(**config.to_dict())),
        ]
        thetas = [built.config.rope_parameters["rope_theta"] for built in models]
    assert thetas == [NTK_THETA] * 3
    for built in models:
        assert built.config.rope_parameters["rope_theta"] == 10000
        assert torch.equal(rotary(built).inv_freq, rotary(model).inv_freq)


def test_patches_of_classes_and_models_undo_in_any_order():
    for order in itertools.permutations(range(3)):
        handles = [posenc.hf.patch(scaling=NTK), posenc.hf.patch(exact=True)]
        model = tiny()
        handles.append(posenc.hf.patch(model, scaling=LINEAR))
        kinds = ["default", "linear"]
        for n_undone in range(3):
            left = order[n_undone:]
            assert model.config.rope_parameters["rope_type"] == kinds[2 in left]
            theta = NTK_THETA if 0 in left and 2 not in left else 10000
            assert model.config.rope_parameters["rope_theta"] == theta
            assert ("forward" in vars(rotary(model))) == (1 in left)
            handles[order[n_undone]].undo()
        assert state(model).values == state(tiny()).values
        assert Rotary.__init__ is ORIGINAL_INIT


def test_build_that_cannot_be_done_raises_and_leaves_the_config():
    config = tiny_config(rope_parameters=DYNAMIC)
    before = config.to_json_string()
    with posenc.hf.patch(exact=True):
        message = "^patch: exact must be False unless .*; got True with 'dynamic'$"
        with pytest.raises(ValueError, match=message):
            LlamaForCausalLM(config)
        assert config.to_json_string() == before
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        LlamaForCausalLM(config)
        with posenc.hf.patch(scaling=NTK):  # together they can be met
            tiny(rope_parameters=DYNAMIC)


# Exact tables


@pytest.mark.parametrize("scaling", [None, NTK, LINEAR], ids=str)
def test_exact_tables_are_those_of_mpmath(model, scaling):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.prec = 120
    positions = torch.tensor([[0, 1, 999_983], [31, 2**31 - 1, 4097]])
    theta, factor = mpmath.mpf(10000), 1
    if scaling is NTK:
        theta *= mpmath.mpf(8) ** (mpmath.mpf(16) / 14)
    if scaling is LINEAR:
        factor = 4
    with posenc.hf.patch(model, scaling=scaling, exact=True) as patched:
        cos, sin = rotary(model)(torch.zeros(1), positions)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (2, 3, 16)
    assert patched.report().tables == {"posenc": 1}
    for i, j, pair in itertools.product(range(2), range(3), range(8)):
        # The double nearest to the frequency is what "exact" means by frequency.
        inv_freq = mpmath.mpf(float(theta ** (mpmath.mpf(-pair) / 8) / factor))
        angle = int(positions[i, j]) * inv_freq
        drift = int(positions[i, j]) * float(inv_freq) * 2.0**-50
        for table, true in ((cos, mpmath.cos(angle)), (sin, mpmath.sin(angle))):
            assert table[i, j, pair] == table[i, j, pair + 8]
            error = abs(mpmath.mpf(float(table[i, j, pair])) - true)
            assert error <= EXACT_TABLE_ERROR + drift


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str
)
def test_exact_tables_have_the_type_of_the_model(dtype):
    model = tiny().to(dtype)
    positions = torch.arange(5)[None] + 100_000
    inv_freq, _ = posenc.rope_inv_freq(16)
    table = np.float64 if dtype == torch.float64 else np.float32
    cos, sin = posenc.rope_table(positions.numpy(), inv_freq, dtype=table)
    with posenc.hf.patch(model, exact=True) as patched:
        ours = rotary(model)(torch.zeros(1, dtype=dtype), positions)
        logits(model)
    for a, b in zip(ours, (cos, sin), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, torch.from_numpy(np.tile(b, 2)).to(dtype))
    assert patched.report().tables == {"posenc": 2}


def test_exact_model_generates_and_comes_back(model):
    before, tokens = logits(model), generated(model)[0]
    with posenc.hf.patch(model, exact=True) as patched:
        found = logits(model)
        # A cache that was filled token by token holds what one pass would write.
        assert torch.equal(generated(model)[0], tokens)
    assert (found - before).abs().max() <= NTK_TOLERANCE
    assert patched.report().tables == {"posenc": 25}
    assert patched.report().rotations == {"posenc": 50}
    assert torch.equal(logits(model), before)


def test_exact_stands_aside_and_counts(model):
    x, positions = torch.zeros(1), torch.arange(4)[None]
    with posenc.hf.patch(model, exact=True) as patched:
        meta = rotary(model)(x.to("meta"), positions.to("meta"))
    assert meta[0].is_meta
    assert patched.report().tables == {"device meta": 1}


def test_exact_over_and_under_somebody_elses_forward(model):
    module, calls = rotary(model), []

    def theirs(x, position_ids):
        calls.append("theirs")
        return Rotary.forward(module, x, position_ids)

    module.forward = theirs
    with posenc.hf.patch(model, exact=True):
        logits(model)
        assert not calls
    assert module.forward is theirs
    del module.forward
    before = logits(model)
    handle = posenc.hf.patch(model, exact=True)
    ours = module.forward
    module.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    wrapper = module.forward
    handle.undo()
    assert module.forward is wrapper
    assert torch.equal(logits(model), before)
    del module.forward


def test_copy_of_an_exact_model_does_what_its_class_does(model):
    plain = logits(model)
    handle = posenc.hf.patch(model, exact=True)
    exact, twin = logits(model), copy.deepcopy(model)
    assert not torch.equal(exact, plain)
    before = handle.report().tables
    assert rotary(twin).forward.__self__ is rotary(twin)
    assert torch.equal(logits(twin), plain)
    with posenc.hf.patch(model, scaling=NTK):
        assert torch.equal(logits(twin), plain)
    assert handle.report().tables == before
    with posenc.hf.patch(twin, scaling=LINEAR):
        assert torch.equal(logits(twin), logits(tiny(rope_parameters=LINEAR)))
        assert torch.equal(logits(model), exact)
    assert torch.equal(logits(twin), plain)
    handle.undo()
    assert torch.equal(logits(twin), plain)


@pytest.mark.parametrize("undo_first", [False, True])
def test_copy_of_an_exact_model_can_be_exact_too(model, undo_first):
    with posenc.hf.patch(model, scaling=LINEAR, exact=True):
        scaled = logits(model)
    handle = posenc.hf.patch(model, exact=True)
    exact, twin = logits(model), copy.deepcopy(model)
    if undo_first:
        handle.undo()
    outer = posenc.hf.patch(twin, exact=True)
    inner = posenc.hf.patch(twin, scaling=LINEAR)
    assert torch.equal(logits(twin), scaled)
    third = copy.deepcopy(twin)
    handle.undo()
    outer.undo()
    assert torch.equal(logits(twin), logits(tiny(rope_parameters=LINEAR)))
    inner.undo()
    assert "forward" not in vars(rotary(twin))
    assert torch.equal(logits(third), logits(tiny(rope_parameters=LINEAR)))
    with posenc.hf.patch(third, scaling={"rope_type": "default"}, exact=True):
        assert torch.equal(logits(third), exact)


def test_copy_of_an_exact_model_leaves_somebody_elses_forward_alone(model):
    module, calls = rotary(model), []

    def theirs(self, x, position_ids):
        calls.append(self)
        return Rotary.forward(self, x, position_ids)

    plain = logits(model)
    module.forward = types.MethodType(theirs, module)
    with posenc.hf.patch(model, exact=True):
        twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), plain)
    with posenc.hf.patch(twin, exact=True) as patched:
        logits(twin)
    assert patched.report().tables == {"posenc": 1}
    assert not calls
    assert torch.equal(logits(model), plain)
    assert calls == [module]


def test_copy_of_an_exact_model_compiles(model):
    before = logits(model)
    with posenc.hf.patch(model, exact=True):
        twin = copy.deepcopy(model)
        compiled = torch.compile(twin, backend="eager", fullgraph=True)
        assert torch.equal(logits(compiled), before)


def test_copy_of_an_exact_model_keeps_nothing_of_it_alive():
    model = tiny()
    seen = weakref.ref(rotary(model))
    with posenc.hf.patch(model, exact=True):
        twin = copy.deepcopy(model)
    del model
    gc.collect()
    assert seen() is None
    assert "forward" in vars(rotary(twin))


def test_exact_comes_again_while_a_copy_holds_the_old_forward(model):
    with posenc.hf.patch(model, max_position_embeddings=64):
        with posenc.hf.patch(model, exact=True):
            twin = copy.deepcopy(model)
        with posenc.hf.patch(model, exact=True) as patched:
            logits(model)
    assert patched.report().tables == {"posenc": 1}
    assert "forward" in vars(rotary(twin))


def test_exact_needs_frequencies_that_follow_from_the_config(model):
    with torch.no_grad():
        rotary(model).inv_freq[3] *= 1.001
    before = state(model)
    message = (
        "^patch: exact must be False: model.rotary_emb.inv_freq is not what the "
        "model's config says; got True$"
    )
    with pytest.raises(ValueError, match=message):
        posenc.hf.patch(model, exact=True)
    assert state(model) == before
    with posenc.hf.patch(model, scaling=NTK, exact=True):
        pass
    assert state(model) == before


def test_exact_is_refused_for_dynamic():
    model = tiny(rope_parameters=DYNAMIC, max_position_embeddings=64)
    message = (
        "^patch: exact must be False unless the rope_type is one of 'default', "
        "'linear', 'ntk', 'ntk_by_parts', 'yarn', 'longrope', 'llama3', "
        "'proportional'; got True with 'dynamic'$"
    )
    with pytest.raises(ValueError, match=message):
        posenc.hf.patch(model, exact=True)
    with posenc.hf.patch(model, scaling=NTK, exact=True):
        assert "forward" in vars(rotary(model))


# Report


def test_report_of_a_plain_patch(model):
    with posenc.hf.patch(model) as patched:
        logits(model)
        call(*mixed())
        text = str(patched.report())
    name = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
    assert text.splitlines() == [
        "posenc.hf.patch: active",
        f"  replaced: {name}, for all models in this process: same bits",
        "  left alone: model.rotary_emb: its tables keep their bits",
        "  rotations of q and k: 2 by posenc, 1 by the original",
        f"    1 x {TYPES_DIFFER}",
    ]
    call(*case())
    assert repr(patched.report()) == text.replace("active", "undone")
    assert repr(patched) == "<posenc.hf.patch: undone>"


def test_report_of_a_scaling(model):
    setting = {"scaling": LINEAR, "max_position_embeddings": 128, "exact": True}
    with posenc.hf.patch(model, **setting) as patched:
        report = patched.report()
    assert report.active
    assert report.replaced[1:] == (
        "values in model.rotary_emb.inv_freq and original_inv_freq",
        "config.rope_parameters: "
        "{'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 4.0}",
        "config.max_position_embeddings: 128",
        "model.rotary_emb.forward: exact tables",
    )
    assert report.left_alone == ()
    assert not patched.report().active


def test_report_of_a_class_patch():
    with posenc.hf.patch(scaling=NTK) as patched:
        report = patched.report()
    assert report.replaced[1:] == (
        "LlamaRotaryEmbedding.__init__, for models built from now on",
    )
    assert report.left_alone == ("frequencies of the models that exist already",)


def test_report_names_what_is_not_known(model):
    class OtherRotaryEmbedding(torch.nn.Module):
        pass

    model.other = OtherRotaryEmbedding()
    with posenc.hf.patch(model) as patched:
        assert "other: OtherRotaryEmbedding is not known" in patched.report().left_alone


# Bad input

TYPES = (
    "'default', 'linear', 'ntk', 'dynamic', 'ntk_by_parts', 'yarn', 'longrope', "
    "'llama3', 'proportional'"
)
NUMBER = "must be a number of at least 1"
COMMON = "rope_type, rope_theta, original_max_position_embeddings"
ERRORS = [
    ({"scaling": "ntk"}, TypeError, "scaling must be a dict or None; got 'ntk'"),
    (
        {"scaling": {"alpha": 8}},
        ValueError,
        f"scaling['rope_type'] must be one of {TYPES}; got None",
    ),
    (
        {"scaling": {"rope_type": ["ntk"]}},
        ValueError,
        f"scaling['rope_type'] must be one of {TYPES}; got ['ntk']",
    ),
    (
        {"scaling": {"rope_type": "linear", "type": "ntk", "factor": 2}},
        ValueError,
        "scaling['type'] must be the same as its 'rope_type' 'linear'; got 'ntk'",
    ),
    (
        {"scaling": {"rope_type": "ntk"}},
        ValueError,
        "scaling['alpha'] must be given for rope_type 'ntk'; got {'rope_type': 'ntk'}",
    ),
    (
        {"scaling": {"rope_type": "linear", "factor": 0.5}},
        ValueError,
        f"scaling['factor'] {NUMBER}; got 0.5",
    ),
    (
        {"scaling": {"rope_type": "linear", "factor": "4"}},
        TypeError,
        f"scaling['factor'] {NUMBER}; got '4'",
    ),
    (
        {"scaling": {"rope_type": "linear", "factor": True}},
        TypeError,
        f"scaling['factor'] {NUMBER}; got True",
    ),
    (
        {"scaling": {"rope_type": "ntk", "alpha": float("nan")}},
        ValueError,
        f"scaling['alpha'] {NUMBER}; got nan",
    ),
    (
        {"scaling": {**NTK, "rope_theta": 1}},
        ValueError,
        "scaling['rope_theta'] must be a number of more than 1; got 1.0",
    ),
    (
        {"scaling": {**NTK, "factor": 2}},
        ValueError,
        f"scaling must have only the keys {COMMON}, alpha for 'ntk'; got ['factor']",
    ),
    (
        {"scaling": {"rope_type": "default", "factor": 2}},
        ValueError,
        f"scaling must have only the keys {COMMON} for 'default'; got ['factor']",
    ),
    (
        {"max_position_embeddings": 0},
        ValueError,
        "max_position_embeddings must be a whole number of at least 1; got 0",
    ),
    (
        {"max_position_embeddings": 64.0},
        TypeError,
        "max_position_embeddings must be a whole number of at least 1; got 64.0",
    ),
    ({"exact": 1}, TypeError, "exact must be True or False; got 1"),
    ({"inplace": None}, TypeError, "inplace must be True or False; got None"),
    (
        {"model": "meta-llama/Llama-3.2-1B"},
        TypeError,
        "model must be a torch.nn.Module or None; got str",
    ),
    (
        {"model": torch.nn.Linear(2, 2)},
        ValueError,
        "model must contain a LlamaRotaryEmbedding; "
        "got Linear with no rotary embedding",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS]
)
def test_bad_input(model, arguments, error, message):
    before = state(model)
    with pytest.raises(error) as caught:
        posenc.hf.patch(**({"model": model} | arguments))
    assert str(caught.value) == f"patch: {message}"
    assert state(model) == before


def test_model_of_another_family_is_named():
    config = transformers.MistralConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(ValueError) as caught:
        posenc.hf.patch(transformers.MistralForCausalLM(config))
    assert str(caught.value) == (
        "patch: model must contain a LlamaRotaryEmbedding; got MistralForCausalLM with "
        "MistralRotaryEmbedding"
    )


def test_model_that_is_not_loaded():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    posenc.hf.patch(model).undo()
    message = (
        "^patch: model must be loaded before its frequencies can change; got "
        "model.rotary_emb on device 'meta'$"
    )
    with pytest.raises(ValueError, match=message):
        posenc.hf.patch(model, scaling=NTK)


def test_config_shared_by_two_patched_models():
    config = tiny_config()
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    with posenc.hf.patch(first, scaling=NTK), posenc.hf.patch(first.model, exact=True):
        posenc.hf.patch(second).undo()
        message = (
            "^patch: model must have a config of its own; got one that another patched "
            "model uses$"
        )
        with pytest.raises(ValueError, match=message):
            posenc.hf.patch(second, scaling=LINEAR)
        assert config.rope_parameters["rope_theta"] == NTK_THETA
        assert list(_hf_scaling.subjects[id(config)].modules) == [rotary(first)]
    assert state(first).values == state(second).values


def test_ntk_needs_two_pairs():
    model = tiny(head_dim=2)
    message = (
        "^patch: scaling\\['rope_type'\\] must not be 'ntk' for a model that rotates "
        "one pair; got 'ntk'$"
    )
    with pytest.raises(ValueError, match=message):
        posenc.hf.patch(model, scaling=NTK)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_missing_packages_are_named(model, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    message = (
        "^patch: torch and transformers must be installed: pip install "
        f"'posenc\\[hf\\]'; got import of {missing} halted; None in sys.modules$"
    )
    with pytest.raises(ImportError, match=message):
        posenc.hf.patch(model)


def test_import_needs_neither_torch_nor_transformers():
    code = (
        "import sys, posenc.hf; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
