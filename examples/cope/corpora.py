"""Text and Python code that come with Python, as bytes, split by page or file."""

# SPDX-License-Identifier: BSD-3-Clause

import functools
import random
import sysconfig
from pathlib import Path

import numpy as np

HELD_OUT = 0.1  # of the pages or files
SEED = 0
# Packages that are not the library proper: tests, and lists of numbers.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
SKIPPED |= {"pydoc_data", "lib2to3"}


def split(documents):
    """
    Split documents into bytes to train on and bytes held out.

    Parameters
    ----------
    documents : dict of str to str
        By name. Which are held out depends on the names alone.

    Returns
    -------
    training, held_out : ndarray of uint8
        The documents one after the other, in order of their names.
    """
    names = sorted(documents)
    n_held_out = max(1, round(HELD_OUT * len(names)))
    held_out = set(random.Random(SEED).sample(names, n_held_out))
    parts = (
        [documents[name] for name in names if (name in held_out) == wanted]
        for wanted in (False, True)
    )
    return tuple(as_bytes("\n".join(part)) for part in parts)


def as_bytes(text):
    """Return the UTF-8 bytes of a text as an array."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


@functools.cache
def text():
    """Return the split of Python's reference manual, the pages of ``help()``."""
    from pydoc_data.topics import topics

    return split(topics)


@functools.cache
def code():
    """Return the split of the sources of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    return split({
        name.as_posix(): (root / name).read_text("utf-8", errors="replace")
        for name in names
        if not SKIPPED & set(name.parts)
    })  # fmt: skip


CORPORA = {"text": text, "code": code}
