"""
The cases of relative biases: those of 12 heads, 2048 queries and keys, and buckets.

The bytes of a bias are written and not read, so beside `copy` there are two roofs: they
are filled with zeros, and with ones, which some processors write at half the speed.
"""

# SPDX-License-Identifier: BSD-3-Clause
import functools

import numpy as np
import torch

import posenc
import posenc.torch

from .timing import Case, Run
from .work import copies

N_HEAD, LENGTH, N_BUCKET, DIM, WIDTH = 12, 2048, 32, 128, 32
ZEROS, ONES = ("zeros", "out given"), ("ones", "out given")


def _parameters(name):
    """Return what comes before the positions, and options."""
    random = np.random.default_rng(0)

    def numbers(*shape):
        return random.uniform(0.1, 1, shape).astype("f")

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


def _transformers(weight, length):
    """Return what computes T5's bias in transformers."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    attention = T5Attention(
        T5Config(num_heads=N_HEAD), has_relative_attention_bias=True, layer_idx=0
    )
    attention.requires_grad_(False)
    attention.relative_attention_bias.weight.copy_(torch.from_numpy(weight))
    return lambda: attention.compute_bias(length, length)


def bias(name, length=LENGTH):
    """Compute a bias, and add it to logits."""
    given, options = _parameters(name)
    function = functools.partial(
        getattr(posenc, name), *given, range(length), range(length), **options
    )
    out = torch.zeros(N_HEAD, length, length)
    logits = torch.zeros(N_HEAD, length, length)
    result, sums = out.numpy(), logits.numpy()
    slow = np.arange(length, dtype=np.int64)[::-1]  # in no order that is looked for
    function(out=result)
    turned = getattr(posenc, name)(*given, slow[:4], range(length), **options)
    error = "same bits"
    if not np.array_equal(turned, result[:, slow[:4]]):
        error = f"{np.abs(turned - result[:, slow[:4]]).max():.1e}"
    runs = {
        ("copy", ""): copies([logits], [out]),
        ZEROS: out.zero_,
        ONES: lambda: out.fill_(1),
        ("posenc", "out given"): lambda: function(out=result),
        ("posenc", "fresh"): function,
        ("posenc", "added in place"): lambda: function(add_to=sums),
    }
    if name == "t5_bias":
        theirs = _transformers(given[0], length)
        if not np.array_equal(theirs()[0].numpy(), result):
            error = "other than transformers"
        runs["transformers", "fresh"] = theirs
        runs["posenc.torch", "forward + backward"] = _step(given[0], length)
    runs = {key: Run(call) for key, call in runs.items()}
    facts = {"error": error}
    title = f"{name}, {N_HEAD} x {length} x {length}"
    return Case(title, "other", lambda n_thread: (runs, facts))


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
    return [
        *((name, functools.partial(bias, name)) for name in BIASES),
        ("t5_bucket", buckets),
        ("alibi_slopes", slopes),
    ]
