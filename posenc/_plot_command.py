"""The pictures of ``python -m posenc plot NAME``: what each draws, and its options."""

# SPDX-License-Identifier: BSD-3-Clause

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np

from . import _extend
from ._bias import alibi_bias, alibi_slopes, t5_bias, t5_bucket
from ._cope import cope_positions
from ._decay import rope_period
from ._plot_axes import CURVES, GREY, MAP, draw_map
from ._scaling import rope_inv_freq
from ._sinusoidal import sinusoidal

# Options of all pictures, and the least of a number.
NAMES = ("dim", "length", "theta", "heads", "json")
LEAST = {"dim": 2, "length": 2, "heads": 1}
MAP_CELLS = 4096  # along a side, at most: more than a screen shows
CURVE_TOKENS = 1 << 24
CHANNELS = 1 << 14
LARGEST_BASE = 1e12
PAD = 0.1  # inches around each part of a picture
BASES = (1e4, 5e5)
EXTENSION = 4  # factor of the methods whose wavelengths are compared
SEED = 0
TEXT = "I came . I saw a cat . It saw me and ran . I sat"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of the command line."""

    draw: Callable  # of (figure, options)
    size: tuple
    help: str
    options: dict  # name: (default, the most a number may be)


def draw_table(figure, options):
    """Draw the sinusoidal table."""
    from .plot import plot_table

    table = sinusoidal(range(options.length), options.dim, theta=options.theta)
    axes = plot_table(table, axes=figure.add_subplot())
    title = f"Sinusoidal table, {options.dim} channels, base {options.theta:g}"
    axes.set_title(title, loc="left")


def draw_decay(figure, options):
    """Draw four cases of decay, or the one asked for."""
    if (options.dim, options.theta, options.length) == (None, None, None):
        _draw_four_decays(figure)
        return
    dim, theta = options.dim or 128, options.theta or 1e4
    if dim % 2:
        refuse("dim", "be even", dim)
    _draw_decay(figure.add_subplot(), dim, [theta], options.length or 4096)


def _draw_four_decays(figure):
    """Draw equal frequencies, then narrow and wide heads, with two bases."""
    from .plot import plot_decay

    figure.set_size_inches(12, 7.2)
    grid = figure.subplots(2, 2)
    alike = {
        "\u03b8\u1d62 = 0": np.zeros(64),
        "\u03b8\u1d62 = 1": np.ones(64),
        "geometric": rope_inv_freq(128)[0],
    }
    axes = plot_decay(alike, np.linspace(0, 32, 513), axes=grid[0, 0])
    axes.set_title(
        "128 channels: equal and geometric frequencies \u03b8\u1d62", loc="left"
    )
    _draw_decay(grid[0, 1], 4, BASES[:1], 1500)
    _draw_decay(grid[1, 0], 256, BASES, 32768)
    _draw_decay(grid[1, 1], 4096, BASES, 32768)


def _draw_decay(axes, dim, bases, length):
    """Draw the decay of bases; mark the longest period, or a quarter, of the first."""
    from .plot import plot_decay

    inv_freqs = {f"base {b:g}": rope_inv_freq(dim, theta=b)[0] for b in bases}
    plot_decay(inv_freqs, np.linspace(0, length, 1025), axes=axes)
    axes.set_title(f"{dim} channels", loc="left")
    period = rope_period(dim, bases[0])
    whose = f" (base {bases[0]:g})" if bases[1:] else ""
    is_crowded = period < length / 5  # the labels would lie upon each other
    quarter = [] if is_crowded else [(period / 4, "\u00bc T")]
    for place, name in (*quarter, (period, "T")):
        if place < length:
            axes.axvline(place, color=GREY, linewidth=1, zorder=0)
            axes.annotate(
                f"{name} = {place:.{0 if place > 10 else 2}f}{whose}",
                (place, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -4),
                textcoords="offset points",
                va="top",
                color=GREY,
                fontsize=9,
            )


def draw_wavelengths(figure, options):
    """Draw the wavelengths of three methods of extension."""
    from .plot import plot_wavelengths

    if options.dim % 2 or options.dim < 4:
        refuse("dim", "be even and at least 4", options.dim)
    scalings = {
        "none": None,
        f"linear, factor {EXTENSION}": {"rope_type": "linear", "factor": EXTENSION},
        f"ntk, alpha {EXTENSION}": {"rope_type": "ntk", "alpha": EXTENSION},
        f"yarn, factor {EXTENSION}": {
            "rope_type": "yarn",
            "factor": EXTENSION,
            "original_max_position_embeddings": options.length,
        },
    }
    inv_freqs = {
        name: rope_inv_freq(options.dim, theta=options.theta, scaling=scaling)[0]
        for name, scaling in scalings.items()
    }
    plot_wavelengths(inv_freqs, options.length, axes=figure.add_subplot())


def draw_similarity(figure, options):
    """Draw the similarity of positions."""
    from .plot import plot_similarity

    plot_similarity(
        options.dim,
        range(options.length),
        theta=options.theta,
        axes=figure.add_subplot(),
    )


def draw_t5_bias(figure, options):
    """Draw the buckets of T5, and a bias of random numbers for them."""
    from .plot import plot_bias

    left, right = figure.subplots(1, 2)
    positions = np.arange(options.length)
    buckets = t5_bucket(positions - positions[:, None])
    x, y = ("key (tokens)", positions), ("query (tokens)", positions)
    title = "T5: bucket of each distance"
    draw_map(left, buckets, title, "bucket", x=x, y=y, square=True)
    weight = np.random.default_rng(SEED).standard_normal((32, 1))
    axes = plot_bias(t5_bias(weight, positions, positions), axes=right)
    axes.set_title("A random weight per bucket (not trained)", loc="left")


def draw_alibi_bias(figure, options):
    """Draw ALiBi's bias of heads with ever smaller slopes, on one scale."""
    from .plot import plot_bias

    positions = np.arange(options.length)
    slopes = alibi_slopes(options.heads)
    steepest = np.argsort(-slopes, kind="stable")
    places = {0, max(options.heads // 4, 1), max(options.heads // 2, 2)}
    heads = steepest[sorted(place for place in places if place < options.heads)]
    slopes = slopes[heads]
    bias = alibi_bias(slopes, positions, positions)
    bias[:, positions[:, None] < positions] = -np.inf
    figure.set_size_inches(1.6 + 4 * len(heads), 4.4)
    panels = figure.subplots(1, len(heads), squeeze=False)[0]
    for i, axes in enumerate(panels):
        image = plot_bias(bias, head=i, axes=axes).images[0]
        image.set_clim(bias[:, -1].min(), 0)
        if axes is not panels[-1]:
            image.colorbar.remove()
        title = f"ALiBi, head {heads[i]} of {options.heads}: slope {slopes[i]:.3g}"
        axes.set_title(title, loc="left")


def draw_cope_positions(figure, options):
    """Draw positions that count the sentences of a short text."""
    from .plot import plot_cope_positions

    words = TEXT.split()
    gates = np.tril(np.tile([float(word == ".") for word in words], (len(words), 1)))
    positions = cope_positions(gates, len(words))
    positions[np.triu_indices(len(words), 1)] = np.nan
    left, right = figure.subplots(1, 2)
    axes = plot_cope_positions(positions, labels=words, axes=left)
    axes.set_title("Each full stop counts 1 (gates set by hand)", loc="left")
    last = len(words) - 1
    axes = plot_cope_positions(positions, query=last, labels=words, axes=right)
    axes.set_title(f"The keys of the last query, {words[-1]!r}", loc="left")


def draw_extension(figure, options):
    """Draw the losses in a file, or those of the model that comes with posenc."""
    from .plot import plot_extension

    axes = figure.add_subplot()
    report = _extend.extend() if options.json is None else options.json
    try:
        plot_extension(report, length=options.length, axes=axes)
    except OSError as error:
        got = f"{report!r} ({error.strerror})"
        refuse("json", "be a readable file", got)
    except ValueError as error:
        raise _extend.ExtendError(str(error)) from None


PICTURES = {
    "table": Picture(
        draw_table,
        MAP,
        "sinusoidal table: position by channel",
        {"dim": (128, MAP_CELLS), "length": (128, MAP_CELLS), "theta": (1e4, None)},
    ),
    "decay": Picture(
        draw_decay,
        CURVES,
        "how RoPE's logit decays with distance: four cases, or the one of the options; "
        "T is the longest period",
        {
            "dim": (None, CHANNELS),
            "length": (None, CURVE_TOKENS),
            "theta": (None, None),
        },
    ),
    "wavelengths": Picture(
        draw_wavelengths,
        CURVES,
        "which pairs complete a turn in the trained length: none, linear, ntk, yarn",
        {"dim": (128, CHANNELS), "length": (4096, CURVE_TOKENS), "theta": (1e4, None)},
    ),
    "similarity": Picture(
        draw_similarity,
        MAP,
        "similarity of positions in the sinusoidal table",
        {"dim": (128, MAP_CELLS), "length": (256, MAP_CELLS), "theta": (1e4, None)},
    ),
    "t5_bias": Picture(
        draw_t5_bias,
        (11.0, 4.8),
        "T5's buckets, and a bias with random weights (none are shipped)",
        {"length": (160, MAP_CELLS)},
    ),
    "alibi_bias": Picture(
        draw_alibi_bias,
        MAP,
        "ALiBi's causal bias of three of the heads",
        {"length": (64, MAP_CELLS), "heads": (8, 1 << 10)},
    ),
    "cope_positions": Picture(
        draw_cope_positions,
        (13.0, 5.2),
        "contextual positions that count sentences, gates set by hand",
        {},
    ),
    "extension": Picture(
        draw_extension,
        CURVES,
        "loss by position from `extend --json`, or of the shipped model",
        {"json": (None, None), "length": (None, None)},
    ),
}


def defaults(option):
    """Return the pictures that have an option, with its defaults, as a text."""
    having = {
        k: v.options[option][0] for k, v in PICTURES.items() if option in v.options
    }
    return ", ".join(k if v is None else f"{k} ({v:g})" for k, v in having.items())


def check(args):
    """Return the options of a picture, defaults filled in; refuse what is not its."""
    if args.name not in PICTURES:
        refuse("name", f"be one of {', '.join(PICTURES)}", repr(args.name))
    options = {
        name: default for name, (default, _) in PICTURES[args.name].options.items()
    }
    for name in NAMES:
        value = getattr(args, name)
        if value is None:
            continue
        if name not in options:
            refuse(name, f"be left out for {args.name}", value)
        _check_range(name, value, PICTURES[args.name].options[name][1])
        options[name] = value
    return argparse.Namespace(**options)


def _check_range(name, value, most):
    """Refuse a number that is not from the least there is to the most."""
    if name == "theta" and not 1 < value <= LARGEST_BASE:
        refuse(name, f"be more than 1 and at most {LARGEST_BASE:g}", value)
    if name in LEAST and most is not None and not LEAST[name] <= value <= most:
        refuse(name, f"be from {LEAST[name]} to {most}", value)


def draw(name, options):
    """
    Draw a picture.

    Parameters
    ----------
    name : str
        Among those of `PICTURES`.
    options : Namespace
        From `check`.

    Returns
    -------
    Figure
        Not one of pyplot's, so no display is looked for.
    """
    from matplotlib.figure import Figure

    picture = PICTURES[name]
    figure = Figure(figsize=picture.size, layout="constrained")
    figure.get_layout_engine().set(w_pad=PAD, h_pad=PAD)
    picture.draw(figure, options)
    return figure


def refuse(parameter, rule, got):
    """Raise the error that ends the command."""
    _extend.refuse(parameter, rule, got, "plot")
