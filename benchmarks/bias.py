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

from .errors import ROUNDED_ONCE, allowed, bits_of, last_places
from .timing import Case, repeated
from .work import copies

N_HEAD, LENGTH, N_BUCKET, DIM, WIDTH = 12, 2048, 32, 128, 32
CHECKED_ROWS = 128  # from first to last, where only the formula is there to compare
EPS = torch.finfo(torch.float32).eps
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


def _tensor(array):
    """Return a parameter as a tensor; torch does not know NumPy's 16 bits."""
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _transformers(weight, n_query, n_key):
    """Return what computes T5's bias in transformers."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    attention = T5Attention(
        T5Config(num_heads=N_HEAD), has_relative_attention_bias=True, layer_idx=0
    )
    attention.requires_grad_(False)
    attention.to(weight.dtype).relative_attention_bias.weight.copy_(weight)
    past = n_key - n_query
    return lambda: attention.compute_bias(n_query, n_key, past_seen_tokens=past)


def _alibi(slopes, n_query, n_key):
    """Return the formula in torch."""

    def formula():
        k = torch.arange(n_key)
        offset = k - k[n_key - n_query :, None]
        return (slopes[:, None, None] * offset)[None]

    return formula


PEERS = {"t5_bias": ("transformers", _transformers), "alibi_bias": ("torch", _alibi)}


def _by_head(numbers):
    return numbers.astype(np.float64)[:, None, None]


def _kerple(q, k, r1, r2):
    """Return the paper's formula in float64, as do the next two."""
    return -_by_head(r1) * np.log(1 + _by_head(r2) * np.abs(q[:, None] - k))


def _fire(q, k, mlp, threshold, c=0.1, eps=1e-6):
    def psi(x):
        return np.log(np.abs(c * x) + 1)

    limit = psi(np.maximum(q[:, None], threshold)) + eps
    hidden = (psi(q[:, None] - k) / limit)[..., None]
    for layer, (weight, shift) in enumerate(mlp):
        hidden = np.maximum(hidden, 0) if layer else hidden
        hidden = hidden @ weight.T.astype(np.float64) + shift
    return np.moveaxis(hidden, -1, 0)


def _sandwich(q, k, n_head, dim, dtype):
    inv_freq = 10000.0 ** (-2 * np.arange(dim // 2) / dim)
    distances = np.arange(max(q.max(), k.max()) + 1)
    products = np.cos(np.multiply.outer(distances, inv_freq)).sum(-1)
    compression = 8 * np.arange(1, n_head + 1) / n_head
    return products[np.abs(q[:, None] - k)] / _by_head(compression)


FORMULAS = {"kerple_bias": _kerple, "fire_bias": _fire, "sandwich_bias": _sandwich}


def _checked(name, result, given, options, peers):
    """Return whose bits a bias has, or how far off the formula some rows are."""
    for peer, theirs in peers.items():
        bits_of(peer, result, as_numpy(theirs()[0]))
    if peers:
        return f"bits of {min(peers, key=len)}"
    n_query, n_key = result.shape[1:]
    rows = np.unique(np.linspace(0, n_query - 1, CHECKED_ROWS).astype(np.int64))
    q, k = rows + n_key - n_query, np.arange(n_key)
    true = FORMULAS[name](q, k, *given, **options)
    error = allowed(last_places(result[:, rows], true, EPS), ROUNDED_ONCE)
    return f"{error:.3f} ulp of the formula"


def bias(name, length=LENGTH, dtype=torch.float32, n_query=None, compiles=True):
    """Compute a bias, and add it to logits: all queries, or the last with a cache."""
    n_query = length if n_query is None else n_query
    given, options = _parameters(name, dtype)
    q, k = range(length - n_query, length), range(length)
    function = functools.partial(getattr(posenc, name), *given, q, k, **options)
    shape = N_HEAD, n_query, length
    out, logits, ready = (torch.zeros(shape, dtype=dtype) for _ in range(3))
    result, sums = as_numpy(out), as_numpy(logits)
    function(out=result), function(add_to=sums)
    bits_of("out given", sums, result)
    runs = {
        ("copy", ""): copies([logits], [out]),
        ZEROS: out.zero_,
        ONES: lambda: out.fill_(1),
        ("posenc", "out given"): lambda: function(out=result),
        **_numpy_runs(function, result),
        ("posenc", "fresh"): function,
        ("posenc", "added in place"): lambda: function(add_to=sums),
        ("torch, bias ready", "added in place"): lambda: logits.add_(ready),
    }
    peers = _peers(name, given[0], n_query, length, compiles)
    facts = {"error": _checked(name, result, given, options, peers)}
    runs |= {(peer, "fresh"): theirs for peer, theirs in peers.items()}
    if name == "t5_bias":
        runs |= _tensor_runs(_tensor(given[0]), q, k, result)
    runs = repeated(runs)
    kind = "" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    title = f"{name}, {N_HEAD} x {n_query} x {length}{kind}"
    return Case(title, "other", lambda n_thread: (runs, facts))


def _numpy_runs(function, result):
    """Return the runs in memory of NumPy, which lies otherwise in its cache lines."""
    own = np.empty(result.shape, result.dtype)
    zeros = torch.from_numpy(own.view(f"i{own.itemsize}"))
    function(out=own)
    bits_of("out given", own, result)
    return {
        ("zeros", "out given, NumPy's memory"): zeros.zero_,
        ("posenc", "out given, NumPy's memory"): lambda: function(out=own),
    }


def _peers(name, parameter, n_query, length, compiles):
    """Return what computes the same, eagerly and compiled, by name."""
    if name not in PEERS:
        return {}
    peer, make = PEERS[name]
    theirs = make(_tensor(parameter), n_query, length)
    if not compiles:
        return {peer: theirs}
    return {peer: theirs, f"{peer}, torch.compile": _compiled(theirs)}


def _tensor_runs(weight, q, k, result):
    """Return the runs that give T5's bias as a tensor."""
    fresh = functools.partial(posenc.t5_bias, weight, q, k)
    bits_of("out given", as_numpy(fresh()), result)
    runs = {("posenc", "tensor, fresh"): fresh}
    if len(q) == len(k) and weight.dtype is torch.float32:
        runs["posenc.torch", "forward + backward"] = _step(weight, len(k))
    return runs


def _compiled(function):
    torch.compiler.reset()  # or the compilations of other cases count as its own
    compiled = torch.compile(function, dynamic=False)
    compiled()
    return compiled


def _step(weight, length):
    """Return what computes a bias and the gradient of its weight."""
    weight = weight.clone().requires_grad_()
    grad = torch.ones(N_HEAD, length, length)

    def step():
        with torch.enable_grad():
            result = posenc.torch.t5_bias(weight, range(length), range(length))
            return torch.autograd.grad(result, weight, grad)

    positions = np.arange(length)
    used = posenc.t5_bucket(positions - positions[:, None])
    counts = np.bincount(used.ravel(), minlength=N_BUCKET)
    bits_of("counts of buckets", step()[0].T.numpy(), [counts] * N_HEAD)
    return step


def buckets(length=8 * LENGTH):
    """Find buckets, and as transformers does; and slopes."""
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(length) - length // 2
    array, out = offset.numpy(), np.empty(length, np.int64)
    theirs = functools.partial(T5Attention._relative_position_bucket, offset)
    error = bits_of("transformers", posenc.t5_bucket(array), theirs().numpy())
    runs = {
        ("posenc", "out given"): lambda: posenc.t5_bucket(array, out=out),
        ("transformers", "fresh"): theirs,
    }
    runs, facts = repeated(runs), {"error": error}
    return Case(f"t5_bucket, {length}", "other", lambda n_thread: (runs, facts))


def slopes():
    """Make slopes, and as transformers does for Bloom: the bias of a second key."""
    from transformers.models.bloom import modeling_bloom

    mask = torch.ones(1, 2, dtype=torch.int64)
    theirs = functools.partial(
        modeling_bloom.build_alibi_tensor, mask, N_HEAD, torch.float32
    )
    ours = functools.partial(posenc.alibi_slopes, N_HEAD, dtype=np.float32)
    true = 2.0 ** -np.array([*range(1, 9), 0.5, 1.5, 2.5, 3.5])  # those of 8, then 16
    results = ours(), theirs()[:, 0, 1].numpy()
    errors = [last_places(result, true, EPS) for result in results]
    allowed(errors[0], ROUNDED_ONCE)
    runs = {("posenc", "fresh"): ours, ("transformers", "fresh"): theirs}
    facts = {"error": "{:.2f} ulp (transformers {:.2f})".format(*errors)}
    return Case(
        f"alibi_slopes({N_HEAD})",
        "other",
        lambda n_thread: (repeated(runs), facts),
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
