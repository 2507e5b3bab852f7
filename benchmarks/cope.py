"""
The cases of CoPE: its bias, whole attention with it, and the memory that this takes.

Data are random: keys count one half in the mean, so that a row's positions come to
their limit of 64 after 130 keys. In one case the limit is so far that none does.
"""

# SPDX-License-Identifier: BSD-3-Clause
import functools

import torch

from . import memory
from .cope_peers import (
    BIAS_PEERS,
    COPE_PEERS,
    HEADS,
    N_POSITION,
    Attention,
    Bias,
    plain,
)
from .peers import is_ours, name_of, prepare
from .timing import Case, Run, nested
from .work import copies

PLAIN = ("plain attention", "fresh")
LENGTHS = (1024, 4096)
CACHED = 2048  # keys that a new token sees
BIAS_LENGTH = 1024
MEMORY_LENGTHS = (4096, 16384)
PASSES = {False: "forward", True: "forward + backward"}
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def _sizes():
    """Return the arguments of each `Attention` that is timed."""
    far = {"n_position": LENGTHS[0]}
    return [
        *((n, n, FLOAT32, {}) for n in LENGTHS),
        *((n, n, FLOAT32, {"backward": True}) for n in LENGTHS),
        *((n, n, BFLOAT16, {}) for n in LENGTHS),
        (LENGTHS[0], LENGTHS[0], FLOAT32, far),
        (LENGTHS[0], LENGTHS[0], FLOAT32, {**far, "backward": True}),
        (1, CACHED, FLOAT32, {}),
        (1, CACHED, BFLOAT16, {}),
    ]


def attention(n_query, n_key, dtype, peers, n_position=N_POSITION, backward=False):
    """Attend by posenc and by the listing, and by torch without positions."""
    work = Attention(n_query, n_key, dtype, n_position, backward)

    def prepared(n_thread):
        runs, errors, gaps = prepare(work, n_thread, peers, COPE_PEERS)
        return {PLAIN: plain(work), **runs}, {"errors": nested(errors), "gaps": gaps}

    return Case(
        _name(n_query, n_key, dtype, n_position, backward),
        "attention",
        prepared,
        one_thread=n_query == 1,
        facts={
            "pass": PASSES[backward],
            "queries": n_query,
            "keys": n_key,
            "positions": n_position,
            "dtype": name_of(dtype),
        },
    )


def _name(n_query, n_key, dtype, n_position=N_POSITION, backward=False):
    sizes = f"{n_query} x {n_key}, P={n_position}"
    return f"cope_attention {PASSES[backward]}, {name_of(dtype)}, {sizes}"


def bias(length, peers, backward=False):
    """Compute what is added to the logits."""
    work = Bias(length, backward)
    logits = work.operands[0]
    copy = Run(copies([work.out], [logits]))

    def prepared(n_thread):
        runs, errors, gaps = prepare(work, n_thread, peers, BIAS_PEERS)
        ours, theirs = (
            max((e for (p, _), e in errors.items() if is_ours(p) is wanted), default=0)
            for wanted in (True, False)
        )
        error = f"{ours:.1e} (listing {theirs:.1e})"
        return {("copy", ""): copy, **runs}, {"error": error, "gaps": gaps}

    name = f"{_bias_name(backward)}, {HEADS} x {length} x {length}, P={N_POSITION}"
    return Case(name, "other", prepared, facts={"logits": logits.numel()})


def _bias_name(backward):
    return f"cope_bias {PASSES[backward]}"


# --- memory --------------------------------------------------------------------------


def _attending(length, backward):
    """Return a function that attends once, after a short call that warms up."""
    short, long = (
        COPE_PEERS["posenc"](Attention(n, n, FLOAT32, backward=backward), 1)["fresh"]
        for n in (8, length)
    )
    short.call()
    return long.call


def peak_memory(lengths=MEMORY_LENGTHS):
    """Attend to long inputs; measure memory, not time."""

    def prepared(n_thread):
        if not memory.can_measure():
            return {}, {"bytes": {}}
        grown = {
            str(length): {
                name: memory.growth(_attending, length, backward)
                for backward, name in PASSES.items()
            }
            for length in lengths
        }
        return {}, {"bytes": grown}

    name = f"cope_attention, memory at {lengths[-1]} x {lengths[-1]}"
    return Case(name, "memory", prepared, one_thread=True, facts={"heads": HEADS})


def cope_cases(peers=tuple(COPE_PEERS)):
    """Return pairs of a name and a function that makes the case."""
    biases = [
        (_bias_name(backward), functools.partial(bias, BIAS_LENGTH, peers, backward))
        for backward in PASSES
    ]
    attentions = [
        (
            _name(*sizes, **options),
            functools.partial(attention, *sizes, peers, **options),
        )
        for *sizes, options in _sizes()
    ]
    return [*biases, *attentions, ("cope_attention, memory", peak_memory)]
