"""Whole models: what the rotation is worth in a Llama, end to end.

The two sizes are those of llama2.c, with random weights.
"""

# SPDX-License-Identifier: BSD-3-Clause
import contextlib

import torch

import posenc.hf

from .peers import name_of
from .timing import Case, Run

PROMPT = 512
VOCABULARY = 32000
PATIENCE = 6  # differences of a few per cent want more calls
SIZES = {  # width, layers, heads, width of the feed-forward part
    "15M": (288, 6, 6, 768),
    "110M": (768, 12, 12, 2048),
}


def _llama(size, dtype):
    """Return a Llama of a size of llama2.c."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, n_layer, n_head, hidden = SIZES[size]
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        num_key_value_heads=n_head,
        intermediate_size=hidden,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * PROMPT,
        dtype=dtype,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


@contextlib.contextmanager
def _no_rotation(model):
    """Leave q and k as they are: what no rotation can be faster than."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = lambda q, k, *tables, **options: (q, k)
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = original


def _prefill(model):
    """Return a function that reads a prompt."""
    tokens = torch.arange(PROMPT)[None] * 7919 % VOCABULARY
    return lambda: model(tokens, use_cache=True, logits_to_keep=1)


def _decode(model):
    """Return a function that adds one token to a cache that holds the prompt."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(torch.arange(PROMPT)[None], past_key_values=cache)
    token = torch.tensor([[1]])

    def step():
        result = model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return result

    return step


WORK = {f"prefill {PROMPT}": _prefill, f"decode after {PROMPT}": _decode}


def _runs(model, call):
    """Return the runs: as transformers has it, patched, and without any rotation."""
    stack = contextlib.ExitStack()

    def inside(context):
        return Run(
            call, before=lambda: stack.enter_context(context(model)), after=stack.close
        )

    return {
        ("transformers", ""): Run(call),
        ("posenc.hf.patch", ""): inside(posenc.hf.patch),
        ("no rotation", ""): inside(_no_rotation),
    }


def _case(size, dtype, work):
    with torch.no_grad():
        model = _llama(size, dtype)
        call = WORK[work](model)
        theirs = call().logits
        with posenc.hf.patch(model):
            same = torch.equal(call().logits, theirs)
    runs = _runs(model, call)
    return Case(
        f"Llama {size}, {name_of(dtype)}, {work}",
        "model",
        lambda n_thread: (runs, {"same bits": same}),
        patience=PATIENCE,
        facts={"model": size, "dtype": name_of(dtype), "work": work},
    )


def model_cases():
    """Return pairs of a name and a function that makes the case."""
    return [
        (
            f"Llama {size}, {name_of(dtype)}, {work}",
            lambda arguments=(size, dtype, work): _case(*arguments),
        )
        for size in SIZES
        for dtype in (torch.float32, torch.bfloat16)
        for work in WORK
    ]
