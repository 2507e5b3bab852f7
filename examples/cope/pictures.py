"""Pictures of trained models: positions that CoPE gives, and attention maps."""

# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import torch
from matplotlib.figure import Figure

import posenc

from .corpora import CORPORA
from .experiments import EXPERIMENTS
from .report import NAMES
from .tasks import BLANK, COPY

DARKEST = 0.75  # grey of a gate of 1: the letter on it can still be read


# --- what a model does inside --------------------------------------------------------


@torch.no_grad()
def layer_inputs(model, tokens):
    """Return (attention module, its input) of each layer."""
    streams = model.streams(tokens)
    return [
        (layer.attention, layer.attention_norm(x))
        for layer, x in zip(model.layers, streams, strict=False)
    ]


@torch.no_grad()
def causal_logits(attention, x):
    """Return queries and their logits, -inf for keys to come, as arrays."""
    q, k, _ = attention.project(x)
    logits = q @ k.transpose(-1, -2) / attention.head_dim**0.5
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return q.numpy(), logits.masked_fill(future, -torch.inf).numpy()


def attention_weights(attention, x):
    """Return how much each query takes from each key; rows add up to 1."""
    q, logits = causal_logits(attention, x)
    if attention.embedding is not None:
        z = q @ attention.embedding.detach().numpy()
        logits = logits + posenc.cope_bias(logits, z)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# --- positions over a text -----------------------------------------------------------


def draw_positions(model, text, path, n_head=2):
    """
    Draw a text as its last byte sees it: what is counted, and up to what position.

    First with gates set by hand, that count lines and words; then as heads of a
    model do, those whose gates differ most from byte to byte.

    Parameters
    ----------
    model : Decoder
        A model of bytes with CoPE.
    text : bytes
        What it reads.
    path : str or path
        File to write.
    n_head : int, default 2
        Heads of the model to draw.
    """
    panels = gates_by_hand(text) + gates_of_heads(model, text)[:n_head]
    n_position = model.shape.n_position
    lines = text.decode("ascii", "replace").splitlines(keepends=True)
    height = (0.2 * len(lines) + 0.5) * len(panels)
    figure = Figure(figsize=(11, height), layout="constrained")
    for axes, (title, gates) in zip(
        figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True
    ):
        positions = posenc.cope_positions(gates, n_position)
        draw_text(axes, lines, title, gates, positions)
    figure.savefig(path, dpi=100)


def gates_by_hand(text):
    """Return (title, gates) of counting lines and words."""
    letters = np.frombuffer(text, dtype=np.uint8)
    ends = np.isin(letters, np.frombuffer(b" \n", dtype=np.uint8))
    words = ends & ~np.append(ends[1:], False)
    return [
        ("Set by hand: lines", (letters == ord("\n")).astype(np.float32)),
        ("Set by hand: words", words.astype(np.float32)),
    ]


def gates_of_heads(model, text):
    """Return (title, gates of the last byte) of all heads, the most uneven first."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
    heads = []
    for index, (attention, x) in enumerate(layer_inputs(model, tokens)):
        _, logits = causal_logits(attention, x)
        gates = posenc.cope_gates(logits[0, :, -1])
        heads += [
            (f"Trained: layer {index + 1}, head {head + 1}", row)
            for head, row in enumerate(gates)
        ]
    return sorted(heads, key=lambda head: -head[1].std())


def draw_text(axes, lines, title, gates, positions):
    """Draw the lines: a letter is the darker the more it counts, positions beside."""
    width = max(map(len, lines)) + 1
    shade = np.full((len(lines), width), np.nan)
    start = 0
    for row, line in enumerate(lines):
        stop = start + len(line)
        shade[row, : len(line)] = gates[start:stop]
        for column, letter in enumerate(line):
            shown = {"\n": "\u21b5", " ": ""}.get(letter, letter)
            axes.text(
                column, row, shown, ha="center", va="center", fontsize=7,
                family="DejaVu Sans Mono",
            )  # fmt: skip
        axes.text(width + 0.5, row, f"{positions[start]:.1f}", va="center", fontsize=8)
        start = stop
    axes.imshow(
        shade,
        cmap="Greys",
        vmin=0,
        vmax=1 / DARKEST,
        aspect="auto",
        interpolation="none",
    )
    axes.text(width + 0.5, -1, "position", va="center", fontsize=8)
    axes.set_title(
        f"{title} (grey: gate, white 0, dark 1)",
        loc="left",
        fontsize=9,
    )
    axes.set_axis_off()


# --- attention maps ------------------------------------------------------------------


def copying_head(model, tokens, n_symbol):
    """Return (layer, head, weights) of the head that best looks at what to copy."""
    mixture = tokens[0, : -n_symbol - 1].numpy()
    sources = np.flatnonzero((mixture != BLANK) & (mixture != COPY))
    best = None
    for index, (attention, x) in enumerate(layer_inputs(model, tokens[:, :-1])):
        for head, weights in enumerate(attention_weights(attention, x)[0]):
            hit = weights[-n_symbol:][np.arange(n_symbol), sources].mean()
            if best is None or hit > best[0]:
                best = hit, index + 1, head + 1, weights[-n_symbol:]
    return best, sources


def draw_attention(models, experiment, name, path):
    """
    Draw which tokens are looked at while symbols are copied, one panel per model.

    Parameters
    ----------
    models : dict of str to Decoder
        By the name of their positions.
    experiment : Synthetic
        Selective Copy.
    name : str
        The setting to draw a sequence of.
    path : str or path
        File to write.
    """
    tokens, is_answer = experiment.draw(np.random.default_rng(1), 1, name)
    n_symbol = int(is_answer.sum())
    figure = Figure(figsize=(10, 3.0 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False, sharex=True).flat
    for axes, (positions, model) in zip(panels, models.items(), strict=True):
        (hit, layer, head, weights), sources = copying_head(model, tokens, n_symbol)
        axes.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axes.plot(
            sources, np.arange(n_symbol), "s", markersize=5, markerfacecolor="none",
            markeredgecolor="#D55E00", markeredgewidth=0.7,
        )  # fmt: skip
        axes.set_title(
            f"{NAMES[positions]}: layer {layer}, head {head}, "
            f"{100 * hit:.0f} % of its attention on the symbol to copy (squares)",
            loc="left",
            fontsize=10,
        )
        axes.set_ylabel("symbol copied")
    axes.set_xlabel("token read (grey: attention weight, white 0, black 1)")
    figure.savefig(path, dpi=110)


def draw_all(trained, folder):
    """
    Draw every picture.

    Parameters
    ----------
    trained : callable
        ``trained(experiment, positions)`` gives a trained model.
    folder : path
        Where the pictures go.
    """
    for name in CORPORA:
        text = passage(name)
        draw_positions(trained(name, "cope"), text, folder / f"positions_{name}.png")
    experiment = EXPERIMENTS["selective_copy"]
    models = {p: trained("selective_copy", p) for p in experiment.positions}
    draw_attention(models, experiment, "sparse", folder / "attention.png")


def passage(name, n_line=12):
    """Return some whole lines of held-out text, as many as fit the trained length."""
    _, held_out = CORPORA[name]()
    start = len(held_out) // 2
    text = held_out[start : start + 4000].tobytes()
    lines = text.split(b"\n", 1)[1].splitlines(keepends=True)[:n_line]
    return b"".join(lines)[: EXPERIMENTS[name].lengths[0]].rstrip()
