"""
Pictures of encodings, drawn with matplotlib (``pip install 'posenc[plot]'``).

Every function draws into the axes it is given, or into those of a new pyplot figure,
which a notebook displays and ``matplotlib.pyplot.show`` shows, and returns the axes, so
that all of matplotlib can go on from there. Nothing is told by colour alone.
"""

# SPDX-License-Identifier: BSD-3-Clause

import math

import numpy as np

from ._check import must, positive_number, whole_number
from ._decay import complete_turns, rope_decay, sinusoidal_similarity, wavelengths
from ._plot_axes import (
    CURVES,
    GREY,
    MAP,
    axes_or_new,
    draw_map,
    is_whole,
    label_ends,
    look,
    positions_of,
    set_frame,
    values_of,
    whole_ticks,
)
from ._plot_extension import draw_report, read_report

__all__ = [
    "plot_bias",
    "plot_cope_positions",
    "plot_decay",
    "plot_extension",
    "plot_similarity",
    "plot_table",
    "plot_wavelengths",
]

DISTANCES = 4096  # of a decay, unless given
POSITIONS = 256  # of similarities, unless given
DENSE = 1000  # points of a curve that can touch each other: a thinner line
MARKERS = 32  # per curve, at most: further ones would touch


def plot_table(table, *, positions=None, axes=None):
    """
    Draw a table of positions as a map: a row per position, a column per channel.

    Parameters
    ----------
    table : array_like or torch.Tensor, shape (T, dim)
        From `sinusoidal`, a learned table, cosines of `rope_table`. A tensor may need
        gradients.
    positions : array_like, shape (T,), optional
        Positions of the rows in tokens; counted from 0 by default.
    axes : matplotlib.axes.Axes, optional
        Where to draw; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With the map and a bar of its values. What is not finite is hatched.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or shape.

    Examples
    --------
    >>> import posenc
    >>> from posenc.plot import plot_table
    >>> axes = plot_table(posenc.sinusoidal(range(100), 64))
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('channel', 'position (tokens)')
    """
    here = "plot_table"
    table = values_of(here, "table", table, 2)
    n_row, dim = table.shape
    rows = positions_of(here, "positions", positions, n_row)
    axes = axes_or_new(here, axes, MAP)
    title = f"Table of {n_row} positions, {dim} channels"
    x, y = ("channel", np.arange(dim)), ("position (tokens)", rows)
    draw_map(axes, table, title, "entry (no unit)", x=x, y=y)
    return axes


def plot_decay(inv_freqs, distance=None, *, axes=None):
    """
    Draw how the logit of RoPE decays with distance, a curve per set of frequencies.

    Parameters
    ----------
    inv_freqs : dict of str to array_like, shape (M,)
        Labels, and radians per token of each pair, from `rope_inv_freq`.
    distance : array_like, shape (N,), optional
        In tokens, ascending; whole ones up to 4096 by default.
    axes : matplotlib.axes.Axes, optional
        Where to draw; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With a curve of `rope_decay` for each label.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or shape.

    See Also
    --------
    posenc.rope_decay : The numbers.

    Examples
    --------
    >>> import posenc
    >>> from posenc.plot import plot_decay
    >>> bases = {f"base {b:g}": posenc.rope_inv_freq(128, theta=b)[0]
    ...          for b in (1e4, 5e5)}
    >>> axes = plot_decay(bases)
    >>> [float(line.get_ydata()[0]) for line in axes.lines]
    [128.0, 128.0]
    """
    here = "plot_decay"
    inv_freqs = _frequencies(here, inv_freqs)
    if distance is None:
        distance = np.arange(DISTANCES + 1.0)
    distance = values_of(here, "distance", distance, 1)
    if not (np.diff(distance) > 0).all():
        raise ValueError(must(here, "distance", "be ascending", distance))
    axes = axes_or_new(here, axes, CURVES)
    ends = []
    for index, (label, inv_freq) in enumerate(inv_freqs.items()):
        color, dashes, _ = look(index)
        logits = rope_decay(distance, inv_freq)
        width = 1.5 if distance.size < DENSE else 0.8
        axes.plot(distance, logits, color=color, linestyle=dashes, linewidth=width)
        ends.append((label, _last(logits), color, dashes))
    axes.margins(x=0, y=0.08)
    title = "Decay of RoPE with distance"
    set_frame(axes, title, "distance (tokens)", "sum of cosines (logits)")
    label_ends(axes, ends)
    return axes


def plot_wavelengths(inv_freqs, length, *, axes=None):
    """
    Draw the wavelength of each channel pair against a trained length.

    Parameters
    ----------
    inv_freqs : dict of str to array_like, shape (M,)
        Labels, and radians per token of each pair, from `rope_inv_freq`.
    length : float
        The trained length in tokens.
    axes : matplotlib.axes.Axes, optional
        Where to draw; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With a curve of `wavelengths` for each label, and how many pairs complete a
        turn within the length. Markers of the others are hollow.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or shape, or `length` is not positive.

    See Also
    --------
    posenc.wavelengths, posenc.complete_turns : The numbers.

    Examples
    --------
    >>> import posenc
    >>> from posenc.plot import plot_wavelengths
    >>> linear = {"rope_type": "linear", "factor": 4}
    >>> none, _ = posenc.rope_inv_freq(128)
    >>> slower, _ = posenc.rope_inv_freq(128, scaling=linear)
    >>> axes = plot_wavelengths({"none": none, "linear": slower}, 4096)
    >>> [text.get_text() for text in axes.texts]
    ['none: 46 of 64 turn', 'linear: 36 of 64 turn']
    """
    here = "plot_wavelengths"
    inv_freqs = _frequencies(here, inv_freqs)
    length = positive_number(here, "length", length)
    axes = axes_or_new(here, axes, CURVES)
    axes.set_yscale("log")
    axes.axhline(length, color=GREY, linewidth=1)
    ends = []
    for index, (label, inv_freq) in enumerate(inv_freqs.items()):
        color, dashes, _ = look(index)
        tokens = _draw_wavelengths(axes, inv_freq, length, look(index))
        turns = f"{complete_turns(inv_freq, length)} of {inv_freq.size} turn"
        ends.append((f"{label}: {turns}", _last(tokens), color, dashes))
    title = f"Wavelengths\nhollow: no full turn in {length:g} trained tokens"
    set_frame(axes, title, "channel pair", "wavelength (tokens per turn)")
    label_ends(axes, ends)
    return axes


def plot_similarity(dim=128, positions=None, *, theta=10000.0, axes=None):
    """
    Draw the similarity of positions: products of the rows of a sinusoidal table.

    Parameters
    ----------
    dim : int, default 128
        Channels of a row.
    positions : array_like, shape (T,), optional
        In tokens; 0 to 255 by default.
    theta : float, default 10000.0
        Base of the frequencies.
    axes : matplotlib.axes.Axes, optional
        Where to draw; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With the map of `sinusoidal_similarity` and a bar of its values.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or shape, or out of its range.

    See Also
    --------
    posenc.sinusoidal_similarity : The numbers.

    Examples
    --------
    >>> from posenc.plot import plot_similarity
    >>> axes = plot_similarity(64, range(50))
    >>> axes.images[0].get_array().max().round(2)
    np.float64(32.0)
    """
    here = "plot_similarity"
    dim = whole_number(here, "dim", dim, 1)
    theta = positive_number(here, "theta", theta)
    if positions is None:
        positions = np.arange(POSITIONS)
    positions = values_of(here, "positions", positions, 1)
    products = sinusoidal_similarity(positions, positions, dim, theta=theta)
    axes = axes_or_new(here, axes, MAP)
    title = f"Similarity of positions, {dim} channels, base {theta:g}"
    x = y = "position (tokens)", positions
    draw_map(axes, products, title, "product of rows (no unit)", x=x, y=y, square=True)
    return axes


def plot_bias(bias, *, head=0, q_positions=None, k_positions=None, axes=None):
    """
    Draw what a head adds to its logits: queries downwards, keys across.

    Parameters
    ----------
    bias : array_like or torch.Tensor, shape (H, T, S) or (T, S)
        From `t5_bias`, `alibi_bias` and their like. A tensor may need gradients.
    head : int, default 0
        Which of the heads to draw.
    q_positions, k_positions : array_like, shape (T,), (S,), optional
        What the bias was computed for, in tokens; counted from 0 by default.
    axes : matplotlib.axes.Axes, optional
        Where to draw; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With the map and a bar of its values. What is not finite, such as the -inf of a
        mask, is hatched.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or shape, or there is no such head.

    Examples
    --------
    >>> import posenc
    >>> from posenc.plot import plot_bias
    >>> bias = posenc.alibi_bias(posenc.alibi_slopes(8), range(50), range(50))
    >>> axes = plot_bias(bias, head=7)
    >>> axes.get_title(loc="left")
    'Bias of head 7'
    """
    here = "plot_bias"
    bias = values_of(here, "bias", bias, 2, 3)
    title = "Bias"
    if bias.ndim == 3:
        head = whole_number(here, "head", head, 0)
        if head >= len(bias):
            rule = f"be less than the number of heads, {len(bias)}"
            raise ValueError(must(here, "head", rule, head))
        bias, title = bias[head], f"Bias of head {head}"
    n_query, n_key = bias.shape
    rows = positions_of(here, "q_positions", q_positions, n_query)
    columns = positions_of(here, "k_positions", k_positions, n_key)
    axes = axes_or_new(here, axes, MAP)
    x, y = ("key (tokens)", columns), ("query (tokens)", rows)
    draw_map(axes, bias, title, "bias (logits)", x=x, y=y, square=True)
    return axes


def plot_cope_positions(positions, *, query=None, labels=None, axes=None):
    """
    Draw contextual positions: of all queries as a map, or of one query over its keys.

    Parameters
    ----------
    positions : array_like or torch.Tensor, shape (T, S)
        From `cope_positions`, a row per query. Keys that a query may not see can be
        NaN.
    query : int, optional
        Draw the row of this query alone, as steps.
    labels : sequence of str, shape (S,), optional
        Names of the keys, such as the tokens of a text, of which the queries are the
        last ones; by default they are counted.
    axes : matplotlib.axes.Axes, optional
        Where to draw; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With the map and a bar of its values, NaN hatched, or with the steps.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or shape, or there is no such query.

    Examples
    --------
    A query after the text counts its full stops, from the last key leftwards:

    >>> import posenc
    >>> from posenc.plot import plot_cope_positions
    >>> text = "I came . I saw . I".split()
    >>> positions = posenc.cope_positions([float(word == ".") for word in text], 64)
    >>> axes = plot_cope_positions(positions[None], query=0, labels=text)
    >>> axes.lines[0].get_ydata()
    array([2., 2., 2., 1., 1., 1., 0.])
    """
    here = "plot_cope_positions"
    positions = values_of(here, "positions", positions, 2)
    n_query, n_key = positions.shape
    if labels is not None and len(labels) != n_key:
        rule = f"have {n_key} entries, one for each key"
        raise ValueError(must(here, "labels", rule, f"{len(labels)} entries"))
    unit = "contextual position (sum of gates)"
    if query is None:
        axes = axes_or_new(here, axes, MAP)
        title = "Contextual positions"
        x = "key (tokens)", np.arange(n_key)
        y = "query (tokens)", np.arange(n_query)
        draw_map(axes, positions, title, unit, x=x, y=y)
        if labels is not None and n_query <= n_key:
            axes.set_yticks(range(n_query), labels[n_key - n_query :])
    else:
        query = whole_number(here, "query", query, 0)
        if query >= n_query:
            rule = f"be less than the number of queries, {n_query}"
            raise ValueError(must(here, "query", rule, query))
        axes = axes_or_new(here, axes, CURVES)
        row = positions[query]
        axes.step(range(n_key), row, "k.-", where="mid")
        axes.xaxis.set_major_locator(whole_ticks())
        if is_whole(row):
            axes.yaxis.set_major_locator(whole_ticks())
        set_frame(axes, f"Contextual positions of query {query}", "key (tokens)", unit)
    if labels is not None:
        axes.set_xticks(range(n_key), labels, rotation=90)
    return axes


def plot_extension(report, *, length=None, axes=None):
    """
    Draw the loss over the position in the text, a curve per method of extension.

    Parameters
    ----------
    report : str, path or dict
        What ``python -m posenc extend --json FILE`` wrote: the file, or its content.
    length : int, optional
        The length read that is to be drawn; the longest by default.
    axes : matplotlib.axes.Axes, optional
        Where to draw; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        With a curve for each method, named with its value at the end; what lies past
        the trained length is shaded.

    Raises
    ------
    OSError
        If the file cannot be read.
    TypeError, ValueError
        If an argument is of the wrong kind, `report` is not what ``extend`` writes, or
        the length was not measured.

    Examples
    --------
    >>> from posenc.plot import plot_extension
    >>> curve = [{"start": 128, "stop": 256, "value": 1.7},
    ...          {"start": 256, "stop": 512, "value": 3.2}]
    >>> report = {"unit": "bits per byte", "trained_length": 256,
    ...           "runs": [{"method": "none", "length": 512, "curve": curve}]}
    >>> axes = plot_extension(report)
    >>> axes.get_ylabel()
    'bits per byte (lower is better)'
    """
    here = "plot_extension"
    report = read_report(here, report)
    lengths = sorted({run["length"] for run in report["runs"]})
    length = lengths[-1] if length is None else length
    if length not in lengths:
        rule = f"be among those measured, {', '.join(map(str, lengths))}"
        raise ValueError(must(here, "length", rule, repr(length)))
    axes = axes_or_new(here, axes, CURVES)
    draw_report(axes, report, length)
    return axes


# --- what they share -----------------------------------------------------------------


def _frequencies(function, inv_freqs):
    """Return a dict of frequencies in float64; raise unless it is one."""
    rule = "be a dict of labels and frequencies"
    if not isinstance(inv_freqs, dict):
        got = type(inv_freqs).__name__
        raise TypeError(must(function, "inv_freqs", rule, got))
    if not inv_freqs:
        raise ValueError(must(function, "inv_freqs", rule, "an empty one"))
    return {
        str(label): values_of(function, f"inv_freqs[{label!r}]", inv_freq, 1)
        for label, inv_freq in inv_freqs.items()
    }


def _last(values):
    """Return where a curve ends: its last finite value."""
    finite = values[np.isfinite(values)]
    return finite[-1] if finite.size else 0.0


def _draw_wavelengths(axes, inv_freq, length, look):
    """Draw a curve, its markers hollow past a length; return the wavelengths."""
    color, dashes, marker = look
    tokens, pairs = wavelengths(inv_freq), np.arange(inv_freq.size)
    axes.plot(pairs, tokens, color=color, linestyle=dashes, linewidth=1.5)
    shown = pairs % math.ceil(inv_freq.size / MARKERS) == 0
    within = tokens <= length
    for some, face in ((shown & within, color), (shown & ~within, "white")):
        axes.plot(pairs[some], tokens[some], linestyle="none", marker=marker,
                  markersize=5, color=color, markerfacecolor=face)  # fmt: skip
    return tokens
