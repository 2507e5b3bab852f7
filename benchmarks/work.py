"""The work: queries and keys as attention has them, and how far off a result is."""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import torch

import posenc

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
N_PAIR = HEAD_DIM // 2
DECODE_POSITION = 1000  # of the single token: at position 0 nothing turns
CHECKED_TOKENS = 2048  # of longer inputs so many are compared, from end to end

# Table entries, products and sum are each off by half an eps of the pair's length at
# most: 1.5 eps. The rest is for tables that differ in the last bit.
ROUNDING = 2.0
# Who makes angles of their own, in float32, is off by the rounding of the frequency
# and of the product, in radians per token.
ANGLE_ROUNDING = 2.0**-22


def queries_keys(length, dtype, memory="BTHD"):
    """Return q and k of shape (1, heads, length, head_dim) in a memory order."""
    generator = torch.Generator().manual_seed(length)
    made = []
    for heads in (HEADS, KEY_HEADS):
        if memory == "BTHD":  # as the projections leave them
            x = torch.empty(1, length, heads, HEAD_DIM, dtype=dtype).transpose(1, 2)
        else:
            x = torch.empty(1, heads, length, HEAD_DIM, dtype=dtype)
        made.append(x.normal_(generator=generator))
    return tuple(made)


def copies(outputs, inputs):
    """Return the roof: a function that copies the same bytes into given outputs."""

    def copy():
        for to, come_from in zip(outputs, inputs, strict=True):
            to.copy_(come_from)

    return copy


def tokens_of(tensors, tokens):
    """Return (1, heads, length, head_dim) as float64 arrays (token, head, channel)."""
    return [t[0].transpose(0, 1)[tokens].double().numpy() for t in tensors]


class Work:
    """Queries, keys, outputs and tables of one case, for all who rotate them."""

    def __init__(self, length, dtype, layout, memory="BTHD"):
        self.length, self.dtype, self.layout = length, dtype, layout
        self.start = DECODE_POSITION if length == 1 else 0
        self.q, self.k = self.inputs = queries_keys(length, dtype, memory)
        self.out = tuple(torch.empty_like(t) for t in self.inputs)
        self.own = tuple(torch.empty_like(t) for t in self.inputs)
        self.copy = copies(self.out, self.inputs)
        self.reset = copies(self.own, self.inputs)  # rotation in place wears out
        self._make_tables()
        n_checked = min(length, CHECKED_TOKENS)
        self.checked = np.linspace(0, length - 1, n_checked).astype(np.int64)
        self.expected = self._rotate_in_float64()

    def _make_tables(self):
        """Make tables by transformers' recipe: float32, of x's type, full width."""
        inv_freq, factor = posenc.rope_inv_freq(HEAD_DIM, dtype=np.float32)
        positions = np.arange(self.start, self.start + self.length)
        made = posenc.rope_table(
            positions, inv_freq, attention_factor=factor, angles="float32"
        )
        wide = torch.promote_types(self.dtype, torch.float32)
        self.tables32 = tuple(torch.from_numpy(t).to(wide) for t in made)
        self.tables = tuple(t.to(self.dtype) for t in self.tables32)
        if self.layout == "half":
            full = [torch.cat([t, t], -1) for t in self.tables]
        else:
            full = [t.repeat_interleave(2, -1) for t in self.tables]
        self.full = tuple(t[None] for t in full)

    def _rotate_in_float64(self):
        cos, sin = (t[self.checked, None].double().numpy() for t in self.tables32)
        rotated = []
        for x in tokens_of(self.inputs, self.checked):
            first, second = pairs_of(x, self.layout)
            result = np.empty_like(x)
            to_first, to_second = pairs_of(result, self.layout)
            to_first[...] = first * cos - second * sin
            to_second[...] = second * cos + first * sin
            rotated.append(result)
        return rotated

    def forget(self):
        """Take away the results that somebody else may have left."""
        for to in self.out:
            to.fill_(torch.nan)
        self.reset()

    def read(self, result):
        """Return what is checked of a result, as float64 arrays."""
        return tokens_of(result, self.checked)

    def error(self, found):
        """Return the largest difference from the rotation in float64."""
        pairs = zip(found, self.expected, strict=True)
        return max(float(np.abs(ours - right).max()) for ours, right in pairs)

    def tolerance(self, own_angles):
        """Return the largest error that rounding explains."""
        longest = max(
            float(np.hypot(*pairs_of(x, self.layout)).max()) for x in self.expected
        )
        bound = ROUNDING * torch.finfo(self.dtype).eps
        if own_angles:
            bound += ANGLE_ROUNDING * (self.start + self.length)
        return longest * bound


def pairs_of(x, layout):
    """Return views of the first and of the second channels of all pairs."""
    if layout == "half":
        return x[..., :N_PAIR], x[..., N_PAIR:]
    return x[..., ::2], x[..., 1::2]
