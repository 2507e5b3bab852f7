"""Peak memory of a call, in a process of its own."""

# SPDX-License-Identifier: BSD-3-Clause
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

RESET_PEAK = "5"  # what Linux wants to be told


def _field(name):
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(name + ":"))
    return 1024 * int(found.split()[1])


def can_measure():
    """Say whether the system tells a peak since a moment."""
    return Path("/proc/self/clear_refs").exists()


def _growth(make, arguments):
    call = make(*arguments)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _field("VmRSS")
    call()
    return _field("VmHWM") - before


def growth(make, *arguments):
    """Return by how many bytes memory grows at most while ``make(*arguments)()`` runs.

    Both run in a new process: memory that was freed before would hide the growth.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_growth, make, arguments).result()
