"""A small decoder-only model whose way of knowing positions can be switched."""

# SPDX-License-Identifier: BSD-3-Clause

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from posenc.torch import ALiBi, RotaryEmbedding, SinusoidalEmbedding, cope_attention

from .biases import Fire, Kerple, Sandwich, t5


@dataclass(frozen=True)
class Shape:
    """
    Sizes of a model.

    Attributes
    ----------
    n_token : int
        Size of the vocabulary.
    n_layer, n_head, width : int
        Layers, heads, and channels of the residual stream.
    n_position : int
        Positions that CoPE can tell apart.
    max_length : int
        Rows of the table of absolute positions.
    gate_key : bool
        Whether CoPE's gates have a key of their own, as the published code offers.
    """

    n_token: int
    n_layer: int = 2
    n_head: int = 2
    width: int = 64
    n_position: int = 64
    max_length: int = 1024
    gate_key: bool = False


class Learned(nn.Embedding):
    """Adds a learned row for each position."""

    def forward(self, x):
        """Return x, shape (n, length, width), with the first rows added."""
        return x + self.weight[: x.shape[1]]


# What a scheme adds to the vectors of tokens, and what to the logits of every layer.
# The rest is done inside attention: 'rope' turns queries and keys, 'cope' counts.
SCHEMES = {
    "absolute": {"table": lambda shape: Learned(shape.max_length, shape.width)},
    "sinusoidal": {"table": lambda shape: SinusoidalEmbedding(scale=shape.width**0.5)},
    "rope": {},
    "t5": {"bias": lambda shape: t5(shape.n_head, shape.width)},
    "alibi": {"bias": lambda shape: ALiBi(shape.n_head)},
    "kerple": {"bias": lambda shape: Kerple(shape.n_head)},
    "fire": {"bias": lambda shape: Fire(shape.n_head)},
    "sandwich": {"bias": lambda shape: Sandwich(shape.n_head)},
    "cope": {},
    "none": {},
}
POSITIONS = tuple(SCHEMES)


class Attention(nn.Module):
    """Causal self-attention with RoPE, CoPE, a bias, or no positions of its own."""

    def __init__(self, shape, positions):
        super().__init__()
        self.n_head = shape.n_head
        self.head_dim = shape.width // shape.n_head
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.rotary = RotaryEmbedding(self.head_dim) if positions == "rope" else None
        self.embedding = None
        if positions == "cope":  # zero, as in the paper: no position at first
            self.embedding = nn.Parameter(torch.zeros(self.head_dim, shape.n_position))
        self.gate_key = None
        if positions == "cope" and shape.gate_key:
            self.gate_key = nn.Linear(shape.width, shape.width, bias=False)

    def project(self, x):
        """Return queries, keys and values, shape (n, n_head, length, head_dim)."""
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.n_head, -1).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rotary is not None:
            q, k = self.rotary(q, k)
        return q, k, v

    def project_gate(self, x):
        """Return the keys of the gates, or None where they are the keys themselves."""
        if self.gate_key is None:
            return None
        n, length, _ = x.shape
        return self.gate_key(x).view(n, length, self.n_head, -1).transpose(1, 2)

    def forward(self, x, bias=None):
        """Return what each position gathers from those up to it, shape of x."""
        q, k, v = self.project(x)
        if self.embedding is not None:
            y = cope_attention(q, k, v, self.embedding, gate_key=self.project_gate(x))
        else:
            y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    """Attention and a two-layer network, each added to its normalised input."""

    def __init__(self, shape, positions):
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = Attention(shape, positions)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width, bias=False),
            nn.ReLU(),
            nn.Linear(4 * shape.width, shape.width, bias=False),
        )

    def forward(self, x, bias=None):
        """Return the next residual stream."""
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """
    Predict each next token from the tokens so far.

    Parameters
    ----------
    shape : Shape
        Sizes.
    positions : str
        Key of `SCHEMES`. One bias serves all layers, as in T5.
    """

    def __init__(self, shape, positions):
        super().__init__()
        if positions not in POSITIONS:
            raise ValueError(
                f"Decoder: positions must be one of {', '.join(POSITIONS)}; "
                f"got {positions!r}"
            )
        self.shape, self.positions = shape, positions
        self.embed = nn.Embedding(shape.n_token, shape.width)
        scheme = SCHEMES[positions]
        self.table = scheme["table"](shape) if "table" in scheme else None
        layers = (Layer(shape, positions) for _ in range(shape.n_layer))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.n_token, bias=False)
        self.apply(self.initialize)
        self.bias = scheme["bias"](shape) if "bias" in scheme else None

    @staticmethod
    def initialize(module):
        """Draw small weights, as GPT-2 does."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)

    def causal_bias(self, length):
        """Return what layers add to their logits, -inf for keys to come; or None."""
        if self.bias is None:
            return None
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        return self.bias(length).masked_fill(future, -torch.inf)[None]

    def streams(self, tokens):
        """Return the residual stream before each layer and after the last."""
        x = self.embed(tokens)
        if self.table is not None:
            x = self.table(x)
        bias = self.causal_bias(tokens.shape[1])
        streams = [x]
        for layer in self.layers:
            streams.append(layer(streams[-1], bias))
        return streams

    def forward(self, tokens):
        """Return logits of the next token, shape (n, length, n_token)."""
        return self.head(self.norm(self.streams(tokens)[-1]))
