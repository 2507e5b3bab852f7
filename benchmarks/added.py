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

from .errors import ROUNDED_ONCE, allowed, bits_of, last_places
from .timing import Case, repeated
from .work import copies

BATCH, LENGTH, DIM, GRID = 8, 2048, 768, (14, 14)
EPS = torch.finfo(torch.float32).eps


def _case(name, runs, error):
    runs = repeated(runs)
    return Case(name, "other", lambda n_thread: (runs, {"error": error}))


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
    positions = np.arange(offset, offset + length)
    true = usual_table(offset + length, DIM, torch.float64)[offset:]

    def theirs():
        return torch.add(table, x, alpha=scale, out=out)

    def error(found, scale=scale):
        size = x.double().abs() * scale + 1  # the table's numbers come to 1
        wrong = (found.double() - (x.double() * scale + true)).abs()
        return float((wrong / size).max()) / torch.finfo(dtype).eps

    # The sum is rounded to the data's type; in float32 before it the scale, the product
    # and the table's number.
    bound = 0.5 + EPS / torch.finfo(dtype).eps
    function(inside, scale=1.0, out=inside)
    allowed(error(own, 1.0), bound, "in place")
    function(array, out=result)
    error_of_ours = allowed(error(out), bound)
    by_positions = posenc.add_sinusoidal(array, scale=scale, positions=positions)
    bits_of("counted positions", by_positions, result)
    bits_of("out given", as_numpy(function(x)), result)
    runs = {
        ("copy", ""): copies([out], [x]),
        ("posenc", "out given"): lambda: function(array, out=result),
        ("posenc", "in place, scale 1"): lambda: function(
            inside, scale=1.0, out=inside
        ),
        ("posenc", "out and positions given"): lambda: posenc.add_sinusoidal(
            array, scale=scale, positions=positions, out=result
        ),
        ("posenc", "tensor, fresh"): lambda: function(x),
        ("torch, table ready", "out given"): theirs,
    }
    errors = f"{error_of_ours:.2f} eps of the terms (torch {error(theirs()):.2f})"
    kind = "" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    return _case(f"add_sinusoidal, {batch} x {length} x {DIM}{kind}", runs, errors)


def add_sinusoidal_bfloat16():
    """Do the same with 16 bits."""
    return add_sinusoidal(dtype=torch.bfloat16)


def add_sinusoidal_decode():
    """Do it for the next token."""
    return add_sinusoidal(1, 1, offset=1000)


def add_sinusoidal_numbered():
    """Do it at positions that differ from sequence to sequence."""
    x, out = _data(BATCH, LENGTH)
    array, result, starts = x.numpy(), out.numpy(), 100 * np.arange(BATCH)
    positions = starts[:, None] + np.arange(LENGTH)
    packed, packed_out = array.reshape(1, -1, DIM), result.reshape(1, -1, DIM)
    ends = LENGTH * np.arange(BATCH + 1)
    function = functools.partial(posenc.add_sinusoidal, array)
    in_a_row = functools.partial(posenc.add_sinusoidal, packed, cu_seqlens=ends)
    want = function(positions=positions)
    bits_of("offset", function(offset=starts), want)
    bits_of("counted", in_a_row().reshape(x.shape), function())
    runs = {
        ("copy", ""): copies([out], [x]),
        ("posenc", "positions (B, T)"): lambda: function(
            positions=positions, out=result
        ),
        ("posenc", "offset (B,)"): lambda: function(offset=starts, out=result),
        ("posenc", "cu_seqlens"): lambda: in_a_row(out=packed_out),
    }
    name = f"add_sinusoidal, {BATCH} x {LENGTH} x {DIM}, numbered"
    return _case(name, runs, "bits of each other")


def add_learned(batch=BATCH, length=LENGTH):
    """Add the rows of a table at counted positions, as nn.Embedding and a sum do."""
    x, out = _data(batch, length)
    embedding = torch.nn.Embedding(length, DIM).requires_grad_(False)
    positions = torch.arange(length)
    array, result, table = x.numpy(), out.numpy(), embedding.weight.numpy()
    posenc.add_learned(array, table, out=result)
    error = bits_of("torch", result, (x + embedding(positions)).numpy())
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
    ours, theirs = (
        float(np.abs(table - true).max())
        for table in (out, usual_table(length, DIM).numpy())
    )
    allowed(ours, ROUNDED_ONCE * EPS / 2)  # the last place of numbers below 1
    spare = torch.empty(length, DIM)
    runs = {
        ("copy", ""): copies([spare], [torch.from_numpy(out)]),
        ("posenc", "out given"): lambda: posenc.sinusoidal(positions, DIM, out=out),
        ("torch", "fresh"): lambda: usual_table(length, DIM),
    }
    error = f"{ours:.1e} (torch {theirs:.1e})"
    return _case(f"sinusoidal, {length} x {DIM}", runs, error)


def sinusoidal_grid():
    """Make the table of a ViT's patches, and as transformers does, in float64."""
    from transformers.models.vit_mae import modeling_vit_mae

    theirs = functools.partial(
        modeling_vit_mae.build_2d_sinusoidal_position_embedding, *GRID, DIM
    )
    ours = functools.partial(posenc.sinusoidal_grid, GRID, DIM, indexing="ij")
    true = theirs(dtype=torch.float64).numpy()
    error = float(np.abs(ours().reshape(true.shape) - true).max())
    allowed(error, ROUNDED_ONCE * EPS / 2)
    runs = {("posenc", "fresh"): ours, ("transformers", "fresh"): theirs}
    name = f"sinusoidal_grid, {GRID[0]} x {GRID[1]} x {DIM}"
    return _case(name, runs, f"{error:.1e}")


def extend_table(length=512):
    """Make a learned table twice as long: linearly as torch does, and by hierarchy."""
    table = np.random.default_rng(0).standard_normal((length, DIM), np.float32)
    channels = torch.from_numpy(table).T[None]
    extended = functools.partial(posenc.extend_table, table, 2 * length)
    linear = functools.partial(extended, method="linear")

    def theirs(channels=channels):
        return torch.nn.functional.interpolate(
            channels, size=2 * length, mode="linear", align_corners=True
        )

    true = theirs(channels.double())[0].T.numpy()
    ours = linear()
    allowed(last_places(ours, true, EPS), ROUNDED_ONCE)
    errors = (np.abs(t - true).max() for t in (ours, theirs()[0].T.numpy()))
    runs = {
        ("posenc", "linear, fresh"): linear,
        ("posenc", "hierarchical, fresh"): extended,
        ("torch", "linear, fresh"): theirs,
    }
    error = "{:.1e} (torch {:.1e})".format(*errors)
    return _case(f"extend_table, {length} to {2 * length} x {DIM}", runs, error)


def added_cases():
    """Return pairs of a name and a function that makes the case."""
    made = (
        *(add_sinusoidal, add_sinusoidal_bfloat16, add_sinusoidal_decode),
        *(
            add_sinusoidal_numbered,
            add_learned,
            sinusoidal,
            sinusoidal_grid,
            extend_table,
        ),
    )
    return [(function.__name__, function) for function in made]
