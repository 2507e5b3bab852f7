"""Figures, drawn with matplotlib (``pip install 'posenc[plot]'``)."""

# SPDX-License-Identifier: BSD-3-Clause

import itertools

import numpy as np

__all__ = ["plot_extension"]

# Okabe and Ito's palette, told apart with every kind of colour vision.
COLORS = {
    "none": "#000000",
    "window": "#7f7f7f",
    "linear": "#D55E00",
    "ntk": "#0072B2",
    "dynamic": "#E69F00",
    "yarn": "#009E73",
    "ntk_by_parts": "#56B4E9",
    "llama3": "#CC79A7",
    "longrope": "#B8A200",  # their yellow is too light for a line
}
POINTS_PER_DOUBLING = 4
FIRST_POSITION = 32
LABEL_STEP = 0.048  # least distance of two labels, as a share of the axis


def plot_extension(report, path):
    """
    Draw the loss over the position in the text, a curve per method.

    Parameters
    ----------
    report : Report
        What ``posenc._extend.extend`` returned; its longest length is drawn.
    path : str or path
        File to write; its suffix gives the format.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    length = report.lengths[-1]
    ends = {}
    for method in report.methods:
        run = report.run(method, length)
        positions, values = curve(report, run)
        style = "--" if method == "window" else "-"
        axes.plot(positions, values, style, color=COLORS[method], linewidth=2)
        ends[method] = values[-1]
    _set_axes(axes, report, length)
    _mark_trained_length(axes, report.trained, length)
    _label_ends(axes, ends, length)
    figure.savefig(path, dpi=150)


def curve(report, run):
    """
    Average the losses over ranges of position that grow with the position.

    Parameters
    ----------
    report : Report
        Where the unit comes from.
    run : Run
        One method at one length.

    Returns
    -------
    positions, values : ndarray, shape (n,)
        Middle of each range, and the mean there in the unit of the report.
    """
    first = min(FIRST_POSITION, run.length // 2)
    n_range = max(1, round(np.log2(run.length / first) * POINTS_PER_DOUBLING))
    edges = np.unique(np.geomspace(first, run.length, n_range + 1).round().astype(int))
    ranges = list(itertools.pairwise(edges))
    positions = [np.sqrt(a * b) for a, b in ranges]
    values = [report.in_unit(run.mean(a, b)) for a, b in ranges]
    return np.array(positions), np.array(values)


def _set_axes(axes, report, length):
    unit = report.unit
    axes.set_xscale("log", base=2)
    if unit == "perplexity":
        axes.set_yscale("log")
    first = min(FIRST_POSITION, length // 2)
    axes.set_xlim(first, length)
    ticks = 2 ** np.arange(np.ceil(np.log2(first)), np.floor(np.log2(length)) + 1)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    noun = "byte" if unit == "bits per byte" else "token"
    axes.set_xlabel(f"position in the text ({noun}s)")
    axes.set_ylabel(f"{unit} (lower is better)")
    axes.set_title(
        f"Reading {length} {noun}s with a model trained on {report.trained}",
        loc="left",
        fontsize=12,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _mark_trained_length(axes, trained, length):
    if trained >= length:
        return
    axes.axvspan(trained, length, color="#f5f5f5", zorder=0)
    axes.axvline(trained, color="#999999", linewidth=1)
    axes.annotate(
        "past the trained length",
        (trained, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -5),
        textcoords="offset points",
        va="top",
        color="#555555",
        fontsize=9,
    )


def _label_ends(axes, ends, length):
    """Name each curve at its right end, labels pushed apart where they would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    names = sorted(ends, key=ends.get)
    heights = [to_axes.transform((length, ends[name]))[1] for name in names]
    for name, height in zip(names, spread(heights, LABEL_STEP), strict=True):
        axes.annotate(
            f"{name} {ends[name]:.2f}",
            (1, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[name],
            fontsize=10,
            annotation_clip=False,
        )


def spread(heights, step):
    """
    Move sorted heights as little as needed to be at least a step apart.

    Parameters
    ----------
    heights : list of float
        Where the labels would stand, ascending.
    step : float
        Least distance.

    Returns
    -------
    list of float
        Where they stand, in the same order.

    Examples
    --------
    >>> from posenc.plot import spread
    >>> spread([1.0, 1.0, 5.0], 2.0)
    [0.0, 2.0, 5.0]
    """
    groups = []  # [sum of the places wanted for the lowest label, members]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1:
            (low_sum, n_low), (high_sum, n_high) = groups[-2:]
            if low_sum / n_low + step * n_low <= high_sum / n_high:
                break
            groups[-2:] = [[low_sum + high_sum - step * n_low * n_high, n_low + n_high]]
    return [total / n + step * i for total, n in groups for i in range(n)]
