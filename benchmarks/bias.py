"""
The cases of relative biases: those of 12 heads, 2048 queries and keys, and buckets.

The bytes of a bias are written and not read, so beside `copy` there are two roofs: they
are filled with zeros, and with ones, which some processors write at half the speed.
What users have instead is transformers' function, or the formula in torch, also under
torch.compile; or a bias that lies ready, which torch adds.
"""

# SPDX-License-Identifier: BSD-3-Clause
import functools

import numpy as np
import torch

import posenc
import posenc.torch
from posenc._tensors import as_numpy

from .timing import Case, Run
from .work import copies

N_HEAD, LENGTH, N_BUCKET, DIM, WIDTH = 12, 2048, 32, 128, 32
ZEROS, ONES = ("zeros", "out given"), ("ones", "out given")


def _parameters(name, dtype):
    """Return what comes before the positions, and options."""
    random = np.random.default_rng(0)

    def numbers(*shape):
        made = torch.from_numpy(random.uniform(0.1, 1, shape))
        return as_numpy(made.to(dtype))

    return {
        "t5_bias": ((numbers(N_BUCKET, N_HEAD),), {}),
        "alibi_bias": ((posenc.alibi_slopes(N_HEAD, dtype=np.float32),), {}),
        "kerple_bias": ((numbers(N_HEAD), numbers(N_HEAD)), {}),
        "fire_bias": (
            (
                [
                    (numbers(WIDTH, 1), numbers(WIDTH)),
                    (numbers(N_HEAD, WIDTH), numbers(N_HEAD)),
                ],
            ),
            {"threshold": float(LENGTH)},
        ),
        "sandwich_bias": ((N_HEAD, DIM), {"dtype": np.float32}),
    }[name]


def _transformers(weight, n_query, n_key):
    """Return what computes T5's bias in transformers."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    attention = T5Attention(
        T5Config(num_heads=N_HEAD), has_relative_attention_bias=True, layer_idx=0
    )
    attention.requires_grad_(False)
    attention.relative_attention_bias.weight.copy_(torch.from_numpy(weight))
    past = n_key - n_query
    return lambda: attention.compute_bias(n_query, n_key, past_seen_tokens=past)


def _alibi(slopes, n_query, n_key):
    """Return the formula in torch."""
    slopes = torch.from_numpy(slopes)

    def formula():
        k = torch.arange(n_key)
        offset = k - k[n_key - n_query :, None]
        return (slopes[:, None, None] * offset)[None]

    return formula


PEERS = {"t5_bias": ("transformers", _transformers), "alibi_bias": ("torch", _alibi)}


def bias(name, length=LENGTH, dtype=torch.float32, n_query=None, compiles=True):
    """Compute a bias, and add it to logits: all queries, or the last with a cache."""
    n_query = length if n_query is None else n_query
    given, options = _parameters(name, dtype)
    q, k = range(length - n_query, length), range(length)
    function = functools.partial(getattr(posenc, name), *given, q, k, **options)
    shape = N_HEAD, n_query, length
    out, logits, ready = (torch.zeros(shape, dtype=dtype) for _ in range(3))
    result, sums = as_numpy(out), as_numpy(logits)
    function(out=result)
    order = np.arange(length, dtype=np.int64)[::-1]  # in none that is looked for
    slow = order[:4] if n_query == length else order[:1]
    turned = getattr(posenc, name)(*given, slow, k, **options)
    rows = result[:, slow - length + n_query].astype(np.float64)
    error = float(np.abs(turned.astype(np.float64) - rows).max())
    error = f"{error:.1e}" if error else "same bits"
    runs = {
        ("copy", ""): copies([logits], [out]),
        ZEROS: out.zero_,
        ONES: lambda: out.fill_(1),
        ("posenc", "out given"): lambda: function(out=result),
        ("posenc", "fresh"): function,
        ("posenc", "added in place"): lambda: function(add_to=sums),
        ("torch, bias ready", "added in place"): lambda: logits.add_(ready),
    }
    if name in PEERS and dtype is torch.float32:
        peer, make = PEERS[name]
        theirs = make(given[0], n_query, length)
        if not np.array_equal(theirs()[0].numpy(), result):
            error = f"other than {peer}"
        runs[peer, "fresh"] = theirs
        if compiles:
            runs[f"{peer}, torch.compile", "fresh"] = _compiled(theirs)
    if name == "t5_bias" and n_query == length and dtype is torch.float32:
        runs["posenc.torch", "forward + backward"] = _step(given[0], length)
    runs = {key: Run(call) for key, call in runs.items()}
    facts = {"error": error}
    kind = "" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    title = f"{name}, {N_HEAD} x {n_query} x {length}{kind}"
    return Case(title, "other", lambda n_thread: (runs, facts))


def _compiled(function):
    torch.compiler.reset()  # or the compilations of other cases count as its own
    compiled = torch.compile(function, dynamic=False)
    compiled()
    return compiled


def _step(weight, length):
    """Return what computes a bias and the gradient of its weight."""
    weight = torch.from_numpy(weight).requires_grad_()
    grad = torch.ones(N_HEAD, length, length)

    def step():
        with torch.enable_grad():
            result = posenc.torch.t5_bias(weight, range(length), range(length))
            return torch.autograd.grad(result, weight, grad)

    return step


def buckets(length=8 * LENGTH):
    """Find buckets, and as transformers does; and slopes."""
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(length) - length // 2
    array, out = offset.numpy(), np.empty(length, np.int64)
    theirs = functools.partial(T5Attention._relative_position_bucket, offset)
    same = np.array_equal(posenc.t5_bucket(array), theirs().numpy())
    runs = {
        ("posenc", "out given"): lambda: posenc.t5_bucket(array, out=out),
        ("transformers", "fresh"): theirs,
    }
    runs = {key: Run(call) for key, call in runs.items()}
    facts = {"error": "same bits" if same else "other buckets"}
    return Case(f"t5_bucket, {length}", "other", lambda n_thread: (runs, facts))


def slopes():
    """Make slopes, and as transformers does for Bloom."""
    from transformers.models.bloom import modeling_bloom

    mask = torch.ones(1, 1, dtype=torch.int64)
    theirs = functools.partial(
        modeling_bloom.build_alibi_tensor, mask, N_HEAD, torch.float32
    )
    runs = {
        ("posenc", "fresh"): lambda: posenc.alibi_slopes(N_HEAD),
        ("transformers", "fresh"): theirs,
    }
    runs = {key: Run(call) for key, call in runs.items()}
    return Case(
        f"alibi_slopes({N_HEAD})",
        "other",
        lambda n_thread: (runs, {"error": "-"}),
        one_thread=True,
    )


BIASES = ("t5_bias", "alibi_bias", "kerple_bias", "fire_bias", "sandwich_bias")


def bias_cases():
    """Return pairs of a name and a function that makes the case."""
    bfloat16 = {"dtype": torch.bfloat16}
    return [
        *((name, functools.partial(bias, name)) for name in BIASES),
        ("t5_bias bfloat16", functools.partial(bias, "t5_bias", **bfloat16)),
        ("t5_bias 512", functools.partial(bias, "t5_bias", 512)),
        ("t5_bias decode", functools.partial(bias, "t5_bias", n_query=1)),
        ("t5_bucket", buckets),
        ("alibi_slopes", slopes),
    ]
