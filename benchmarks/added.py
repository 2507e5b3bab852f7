"""
The cases of tables that are added to data: sinusoidal and learned, and how they come.

What users have instead is a table in memory, which torch multiplies, gathers and adds.
"""

# SPDX-License-Identifier: BSD-3-Clause
import functools

import numpy as np
import torch

import posenc
from posenc._tensors import as_numpy

from .timing import Case, Run
from .work import copies

BATCH, LENGTH, DIM, GRID = 8, 2048, 768, (14, 14)


def _case(name, runs, error):
    runs = {key: Run(call) for key, call in runs.items()}
    return Case(name, "other", lambda n_thread: (runs, {"error": error}))


def _difference(ours, theirs):
    """Return the largest difference, as text; 'same bits' if there is none."""
    if np.array_equal(ours, theirs):
        return "same bits"
    return f"{np.abs(ours - theirs).max():.1e}"


def usual_table(length, dim, dtype=torch.float32):
    """Return sines and cosines by turns, as most PyTorch code makes them."""
    positions = torch.arange(length, dtype=dtype)[:, None]
    exponents = torch.arange(0, dim, 2, dtype=dtype) * (-np.log(10000.0) / dim)
    table = torch.empty(length, dim, dtype=dtype)
    table[:, 0::2] = torch.sin(positions * torch.exp(exponents))
    table[:, 1::2] = torch.cos(positions * torch.exp(exponents))
    return table


def _data(batch, length, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, DIM, generator=generator).to(dtype)
    return x, torch.empty_like(x)


def add_sinusoidal(batch=BATCH, length=LENGTH, dtype=torch.float32, offset=0):
    """Scale data and add the table: ours makes it on the way, torch's lies ready."""
    x, out = _data(batch, length, dtype)
    own = x.clone()
    table, scale = usual_table(offset + length, DIM)[offset:].to(dtype), DIM**0.5
    array, result, inside = as_numpy(x), as_numpy(out), as_numpy(own)
    function = functools.partial(posenc.add_sinusoidal, scale=scale, offset=offset)
    function(array, out=result)
    true = usual_table(offset + length, DIM, torch.float64)[offset:]
    error = f"{(out.double() - (x.double() * scale + true)).abs().max():.1e}"
    positions = np.arange(offset, offset + length)
    runs = {
        ("copy", ""): copies([out], [x]),
        ("posenc", "out given"): lambda: function(array, out=result),
        ("posenc", "in place"): lambda: function(inside, scale=1.0, out=inside),
        ("posenc", "out and positions given"): lambda: posenc.add_sinusoidal(
            array, scale=scale, positions=positions, out=result
        ),
        ("posenc", "tensor, fresh"): lambda: function(x),
        ("torch, table ready", "out given"): lambda: torch.add(
            table, x, alpha=scale, out=out
        ),
    }
    kind = "" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    return _case(f"add_sinusoidal, {batch} x {length} x {DIM}{kind}", runs, error)


def add_sinusoidal_bfloat16():
    """Do the same with 16 bits."""
    return add_sinusoidal(dtype=torch.bfloat16)


def add_sinusoidal_decode():
    """Do it for the next token."""
    return add_sinusoidal(1, 1, offset=1000)


def add_learned(batch=BATCH, length=LENGTH):
    """Add the rows of a table at counted positions, as nn.Embedding and a sum do."""
    x, out = _data(batch, length)
    embedding = torch.nn.Embedding(length, DIM).requires_grad_(False)
    positions = torch.arange(length)
    array, result, table = x.numpy(), out.numpy(), embedding.weight.numpy()
    posenc.add_learned(array, table, out=result)
    error = _difference(result, (x + embedding(positions)).numpy())
    runs = {
        ("copy", ""): copies([out], [x]),
        ("posenc", "out given"): lambda: posenc.add_learned(array, table, out=result),
        ("torch", "out given"): lambda: torch.add(x, embedding(positions), out=out),
    }
    return _case(f"add_learned, {batch} x {length} x {DIM}", runs, error)


def sinusoidal(length=LENGTH):
    """Make the table, and as most PyTorch code does."""
    positions, out = np.arange(length), np.empty((length, DIM), np.float32)
    true = usual_table(length, DIM, torch.float64).numpy()
    posenc.sinusoidal(positions, DIM, out=out)
    theirs = usual_table(length, DIM).numpy()
    errors = (f"{np.abs(table - true).max():.1e}" for table in (out, theirs))
    spare = torch.empty(length, DIM)
    runs = {
        ("copy", ""): copies([spare], [torch.from_numpy(out)]),
        ("posenc", "out given"): lambda: posenc.sinusoidal(positions, DIM, out=out),
        ("torch", "fresh"): lambda: usual_table(length, DIM),
    }
    error = "{} (torch {})".format(*errors)
    return _case(f"sinusoidal, {length} x {DIM}", runs, error)


def sinusoidal_grid():
    """Make the table of a ViT's patches."""
    runs = {("posenc", "fresh"): lambda: posenc.sinusoidal_grid(GRID, DIM)}
    return _case(f"sinusoidal_grid, {GRID[0]} x {GRID[1]} x {DIM}", runs, "-")


def extend_table(length=512):
    """Make a learned table twice as long, and by torch's interpolation."""
    table = np.random.default_rng(0).standard_normal((length, DIM), np.float32)
    channels = torch.from_numpy(table).T[None]

    def theirs():
        return torch.nn.functional.interpolate(
            channels, size=2 * length, mode="linear", align_corners=True
        )

    runs = {
        ("posenc hierarchical", "fresh"): lambda: posenc.extend_table(
            table, 2 * length
        ),
        ("posenc linear", "fresh"): lambda: posenc.extend_table(
            table, 2 * length, method="linear"
        ),
        ("torch, linear", "fresh"): theirs,
    }
    ours = posenc.extend_table(table, 2 * length, method="linear")
    error = _difference(ours, theirs()[0].T.numpy())
    return _case(f"extend_table, {length} to {2 * length} x {DIM}", runs, error)


def added_cases():
    """Return pairs of a name and a function that makes the case."""
    made = (
        *(add_sinusoidal, add_sinusoidal_bfloat16, add_sinusoidal_decode),
        *(add_learned, sinusoidal, sinusoidal_grid, extend_table),
    )
    return [(function.__name__, function) for function in made]
