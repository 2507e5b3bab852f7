"""Positions of relative biases as torch tensors, and the way from there to a result.

A bias between consecutive positions is a row of values per head, which is spread; that
between any others is evaluated for each pair.
"""

# SPDX-License-Identifier: BSD-3-Clause

from typing import Any, NamedTuple

import torch

from ._bias_spread import check_logits
from ._check import REAL_NUMBERS, must
from ._results import REAL_RULE
from ._torch_bias_ops import spread
from ._torch_check import (
    as_tensor,
    check_tensor,
    check_together,
    is_whole,
    wrong_dtype,
)
from ._torch_register import is_dynamo_compiling, undisturbed

# --- positions -----------------------------------------------------------------------


class Grid(NamedTuple):
    """Where queries and keys are: consecutive from two starts on, or anywhere."""

    n_query: int
    n_key: int
    q_start: Any = None
    k_start: Any = None
    q: Any = None
    k: Any = None

    def is_consecutive(self):
        """Tell whether the starts say it all."""
        return self.q_start is not None

    def offsets(self):
        """Return the offsets, (n,) if they are consecutive, else (..., T, S)."""
        if self.is_consecutive():
            first = self.k_start - self.q_start - self.n_query + 1
            return torch.arange(first, first + self.n_query + self.n_key - 1)
        return self.k[..., None, :] - self.q[..., :, None]

    def apart(self, start=0):
        """Return the queries from one on, as positions anywhere."""
        if not self.is_consecutive():
            return self
        q = torch.arange(self.q_start + start, self.q_start + self.n_query)
        k = torch.arange(self.k_start, self.k_start + self.n_key)
        return Grid(self.n_query - start, self.n_key, q=q, k=k)


def grid_of(function, learned, q_positions, k_positions, whole=False):
    """Return the grid of such positions, or a grid as it is; raise for others.

    `learned` is the name and the tensor with whom positions are to go together.
    """
    if isinstance(q_positions, Grid):
        return q_positions
    given = {"q_positions": q_positions, "k_positions": k_positions}
    if all(isinstance(part, range) and part.step == 1 for part in given.values()):
        for name, part in given.items():
            _check_reach(function, name, part[:1], part[-1:])
        return consecutive(
            q_positions.start, len(q_positions), k_positions.start, len(k_positions)
        )
    places = {n: _positions(function, n, part, whole) for n, part in given.items()}
    check_together(function, learned, places)
    q, k = places.values()
    if q.is_meta != k.is_meta:
        q, k = q.to("meta"), k.to("meta")
    if not is_dynamo_compiling() and undisturbed() and _are_steps(q) and _are_steps(k):
        return consecutive(int(q[0]), len(q), int(k[0]), len(k))
    try:
        torch.broadcast_shapes(q.shape[:-1], k.shape[:-1])
    except RuntimeError:
        rule = f"have leading axes that broadcast with {tuple(q.shape[:-1])}"
        got = tuple(k.shape[:-1])
        raise ValueError(must(function, "k_positions", rule, got)) from None
    return Grid(q.shape[-1], k.shape[-1], q=q, k=k)


def consecutive(q_start, n_query, k_start, n_key):
    """Return the grid of queries and keys from two starts on."""
    grid = Grid(n_query, n_key, q_start, k_start)
    return grid.apart() if n_query == 0 or n_key == 0 else grid


def _positions(function, name, value, whole):
    value = as_tensor(function, name, value)
    check_tensor(function, name, value)
    if value.dim() == 0:
        raise ValueError(must(function, name, "have at least one axis", "shape ()"))
    may_be_fractional = not whole or value.numel() == 0
    if not (is_whole(value) or (value.is_floating_point() and may_be_fractional)):
        rule = "be whole numbers" if whole else REAL_NUMBERS
        raise wrong_dtype(function, name, rule, value)
    is_seen = undisturbed() and not value.is_meta
    if is_seen and value.dtype == torch.int64 and value.numel():
        _check_reach(function, name, [value.min()], [value.max()])
    return value.to(torch.int64 if whole else torch.float64)


def _check_reach(function, name, least, most):
    """Raise if whole numbers are such as float64 rounds; compiled code does not ask."""
    if not is_dynamo_compiling():
        extreme = max((abs(int(end)) for end in (*least, *most)), default=0)
        if extreme > 2**53:
            rule = "hold whole numbers of magnitude at most 2**53"
            raise ValueError(must(function, name, rule, extreme))


def _are_steps(positions):
    if positions.dim() != 1 or not len(positions) or positions.is_meta:
        return False
    first = positions[0]
    if not torch.isfinite(first) or first != first.round():
        return False
    return bool((positions - first == torch.arange(len(positions))).all())


# --- results -------------------------------------------------------------------------


def matrix(evaluate, grid, dtype):
    """Return evaluated offsets as (..., H, T, S)."""
    if grid.is_consecutive():
        return spread(evaluate(grid.offsets()), grid.n_query, dtype)
    values = evaluate(grid.offsets()).movedim(0, -3)
    if dtype.itemsize == 2:
        values = values.float()
    return values.to(dtype)


def finish(function, make, dtype, add_to, out):
    """Return the bias that `make` gives in a dtype, added or written as asked for."""
    if add_to is not None:
        if not add_to.is_floating_point():
            raise wrong_dtype(function, "add_to", REAL_RULE, add_to)
        bias = make(torch.promote_types(torch.float32, add_to.dtype))
        if not is_dynamo_compiling():
            shape = tuple(bias.shape)
            check_logits(function, tuple(add_to.shape), shape[:-3], shape[-3:])
        if out is None:
            # Expanded, so that gradients of 16 bits are summed over batches as these.
            return add_to.add_(bias.expand_as(add_to))
        return out.copy_(add_to + bias)
    bias = make(dtype)
    return bias if out is None else out.copy_(bias)
