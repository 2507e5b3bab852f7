"""What ``python -m posenc extend`` measured, read and drawn."""

# SPDX-License-Identifier: BSD-3-Clause

import json
import math
from pathlib import Path

import numpy as np

from ._check import must
from ._extend import METHODS, Report
from ._extend_report import content_of
from ._plot_axes import GREY, label_ends, look, set_frame

# In the order of looks, so that a method has the same in every picture.
ORDER = ("none", "linear", "ntk", "yarn", "dynamic", "llama3", "ntk_by_parts",
         "longrope", "window")  # fmt: skip


def read_report(function, report):
    """
    Return what ``extend --json`` writes.

    Parameters
    ----------
    function : str
        Which asks, for errors.
    report : str, path, dict or Report
        A file, its content, or what it is made of.

    Returns
    -------
    dict
        With what is drawn.

    Raises
    ------
    OSError
        If the file cannot be read.
    TypeError, ValueError
        If it is something else.
    """
    rule = "be what `python -m posenc extend --json` writes"
    if isinstance(report, Report):
        return content_of(report)
    got = type(report).__name__
    if isinstance(report, str | Path):
        got = repr(str(report))
        try:
            report = json.loads(Path(report).read_bytes())
        except ValueError as error:
            got += f" ({error})"
            raise ValueError(must(function, "report", rule, got)) from None
    elif not isinstance(report, dict):
        raise TypeError(must(function, "report", rule, got))
    if not _is_report(report):
        raise ValueError(must(function, "report", rule, got))
    return report


def _is_report(content):
    """Tell whether all is there that is drawn."""
    try:
        math.log2(content["trained_length"]), f"{content['unit']}"
        for run in content["runs"]:
            parts = [(p["start"], p["stop"] * p["value"]) for p in run["curve"]]
            is_drawn = len(parts) > 0 and min(start for start, _ in parts) > 0
            if run["method"] not in METHODS or run["length"] < 2 or not is_drawn:
                return False
        return len(content["runs"]) > 0
    except (KeyError, TypeError, ValueError):
        return False


def draw_report(axes, report, length):
    """
    Draw the loss over the position at one length, a curve per method.

    Parameters
    ----------
    axes : Axes
        Where it goes.
    report : dict
        From `read_report`.
    length : int
        Among those measured.
    """
    runs = [run for run in report["runs"] if run["length"] == length]
    ends = []
    for run in runs:
        color, dashes, _ = look(ORDER.index(run["method"]))
        places = [math.sqrt(part["start"] * part["stop"]) for part in run["curve"]]
        values = [part["value"] for part in run["curve"]]
        axes.plot(places, values, color=color, linestyle=dashes, linewidth=2)
        ends.append((f"{run['method']} {values[-1]:.2f}", values[-1], color, dashes))
    first = runs[0]["curve"][0]["start"]
    _set_axes(axes, report["unit"], report["trained_length"], first, length)
    axes.margins(y=0.08)
    label_ends(axes, ends)


def _set_axes(axes, unit, trained, first, length):
    axes.set_xscale("log", base=2)
    if unit == "perplexity":
        axes.set_yscale("log")
    axes.set_xlim(first, length)
    ticks = 2 ** np.arange(np.ceil(np.log2(first)), np.floor(np.log2(length)) + 1)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    noun = "byte" if unit == "bits per byte" else "token"
    title = f"Reading {length} {noun}s with a model trained on {trained}"
    x_label = f"position in the text ({noun}s)"
    set_frame(axes, title, x_label, f"{unit} (lower is better)")
    if trained < length:
        axes.axvspan(trained, length, color="#f5f5f5", zorder=0)
        axes.axvline(trained, color="#999999", linewidth=1)
        axes.annotate(
            "past the trained length",
            (trained, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -5),
            textcoords="offset points",
            va="top",
            color=GREY,
            fontsize=9,
        )
