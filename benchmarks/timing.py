"""Timing: everything in turn, round after round, and the least of each."""

# SPDX-License-Identifier: BSD-3-Clause
import contextlib
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import posenc

SETTLE = 0.002  # seconds in which threads of the one before go to sleep
SPINNING = 0.03  # ... those of ONNX Runtime, which wait in a loop
REPEATED = 5  # rounds at least, where new memory makes the first calls slow


def _nothing():
    pass


@dataclass
class Run:
    """What is timed: `call`; before and after each round something else may run."""

    call: Callable
    before: Callable = _nothing
    after: Callable = _nothing
    read: Callable | None = None  # from what the call returned to NumPy arrays
    least_rounds: int = 1  # however long they take


@dataclass
class Case:
    """Some rows: one for each number of threads.

    `prepare` makes, for a number of threads, what is timed, by peer and mode, and what
    else is to be stored.
    """

    name: str
    group: str
    prepare: Callable[[int], tuple[dict, dict]]
    one_thread: bool = False  # too small for a second one
    patience: int = 1  # times the usual budget; so many rounds at least
    facts: dict = field(default_factory=dict)


def nested(flat):
    """Return {peer: {mode: value}} from {(peer, mode): value}."""
    peers = {}
    for (peer, mode), value in flat.items():
        peers.setdefault(peer, {})[mode] = value
    return peers


def repeated(calls):
    """Return runs that take a few rounds even if one has taken all their time."""
    return {key: Run(call, least_rounds=REPEATED) for key, call in calls.items()}


def time_once(call, budget):
    """Return the least seconds per call, over as many calls as fit a budget."""
    best, begin = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - begin > budget:
            return best


def measure(runs, rounds, budget, least_rounds=1):
    """Time all runs in turn, round after round; return the least of each.

    Each has `rounds * budget` seconds: what is slow leaves earlier, but takes part in
    the first rounds.
    """
    best = dict.fromkeys(runs, float("inf"))
    spent = dict.fromkeys(runs, 0.0)
    gc.collect()
    gc.disable()
    try:
        for n_done in range(rounds):
            for name, run in runs.items():
                least = max(least_rounds, run.least_rounds)
                if n_done >= least and spent[name] > rounds * budget:
                    continue
                run.before()
                time.sleep(SETTLE)
                start = time.perf_counter()
                best[name] = min(best[name], time_once(run.call, budget))
                spent[name] += time.perf_counter() - start
                run.after()
    finally:
        gc.enable()
    return best


def can_pin():
    """Say whether the threads of this process can be held on one processor."""
    return hasattr(os, "sched_setaffinity") and os.path.isdir("/proc/self/task")


@contextlib.contextmanager
def threads(n_thread):
    """Give torch and posenc a number of threads."""
    before = torch.get_num_threads(), posenc.get_num_threads()
    torch.set_num_threads(n_thread)
    posenc.set_num_threads(n_thread)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        posenc.set_num_threads(before[1])


@contextlib.contextmanager
def held_on(n_thread):
    """Hold all threads of this process on one processor while one thread is timed.

    Not every library can be told its number of threads, but no thread leaves the
    processors that it may run on. Libraries must have started before: some count
    processors then.
    """
    held = n_thread == 1 and can_pin()
    allowed = os.sched_getaffinity(0) if held else set()
    if held:
        _allow({max(allowed)})
    try:
        yield
    finally:
        if held:
            _allow(allowed)


def _allow(processors):
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), processors)
