"""Relative biases as modules: from a length to numbers (n_head, length, length).

What is learned begins as in the papers, or as in code of their authors.
"""

# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import torch
from torch import nn

import posenc
from posenc.torch import T5Bias, fire_bias, kerple_bias


def t5(n_head, width):
    """Return the bias of T5's decoder, as small at first as transformers makes it."""
    bias = T5Bias(n_head, bidirectional=False)
    nn.init.normal_(bias.weight, std=width**-0.5)
    return bias


class Kerple(nn.Module):
    """KERPLE's logarithmic kernel (Chi et al. 2022), which needs positive numbers."""

    least = 0.01

    def __init__(self, n_head):
        super().__init__()
        self.r1 = nn.Parameter(2 * torch.rand(n_head))
        self.r2 = nn.Parameter(torch.rand(n_head))

    def forward(self, length):
        """Return the bias, after numbers that training made too small are mended."""
        with torch.no_grad():
            for parameter in (self.r1, self.r2):
                parameter.clamp_(min=self.least)
        return kerple_bias(self.r1, self.r2, range(length), range(length))


class Fire(nn.Module):
    """FIRE (Li et al. 2023): a learned function of distance by length."""

    first_threshold = 512.0

    def __init__(self, n_head, width=32):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(1, width), nn.ReLU(), nn.Linear(width, n_head)
        )
        self.c = nn.Parameter(torch.tensor(0.1))
        self.stretch = nn.Parameter(torch.tensor(1.0))

    def forward(self, length):
        """Return the bias."""
        return fire_bias(
            [(layer.weight, layer.bias) for layer in self.mlp[::2]],
            range(length),
            range(length),
            c=self.c,
            threshold=self.first_threshold * self.stretch,
        )


class Sandwich(nn.Module):
    """Sandwich (Chi et al. 2023), which learns nothing."""

    dim = 128

    def __init__(self, n_head):
        super().__init__()
        self.n_head = n_head

    def forward(self, length):
        """Return the bias."""
        places = torch.arange(length)
        return posenc.sandwich_bias(
            self.n_head, self.dim, places, places, dtype=np.float32
        )
