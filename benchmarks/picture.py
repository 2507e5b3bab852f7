"""The picture: bars as multiples of the copy. Importing this needs matplotlib."""

# SPDX-License-Identifier: BSD-3-Clause
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from .peers import is_ours
from .report import (
    DOORS,
    DRAWN_LENGTH,
    MODES,
    contestants,
    copy_of,
    in_group,
    ratio_text,
)

PANELS = ("float32", "bfloat16", "float16")
ROWS = ((DRAWN_LENGTH, f"{DRAWN_LENGTH} tokens"), (1, "one token"))
HATCH = dict(zip(MODES, ("", "///", "..."), strict=True))
OURS, THEIRS = "0.25", "0.88"
TITLE = (
    "Time to rotate 32 query and 8 key heads of 128 channels, as a multiple of copying "
    "them (dashed). Layout half, one thread, of each peer its fastest mode."
)


def _bars(record):
    """Return (ratio, peer, mode): all modes of ours, the best mode of each other."""
    bars = {}
    for peer, mode, seconds in contestants(record):
        if peer not in DOORS:
            key = (peer, mode) if peer == "posenc" else peer
            ratio = seconds / copy_of(record)
            bars[key] = min(bars.get(key, (float("inf"),)), (ratio, peer, mode))
    return sorted(bars.values(), reverse=True)


def _draw(axes, bars):
    for y, (ratio, peer, mode) in enumerate(bars):
        ours = is_ours(peer)
        style = {"color": OURS if ours else THEIRS, "hatch": HATCH[mode]}
        axes.barh(y, ratio, edgecolor="white" if ours else "0.4", **style)
        axes.barh(y, ratio, color="none", edgecolor="black", lw=0.8)
        axes.text(
            *(ratio * 1.08, y, ratio_text(ratio)),
            va="center",
            fontsize=8,
            fontweight="bold" if ours else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    names = [f"{peer}, {mode}" for _, peer, mode in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    for label, (_, peer, _) in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if is_ours(peer) else "normal")


def _frame(axes, furthest):
    axes.axvline(1, color="black", lw=1, ls="--", zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(0.1, furthest * 2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw(records, path):
    """Draw README's picture: half layout, one thread."""
    found = {
        (r["length"], r["dtype"]): _bars(r)
        for r in in_group(records, "rotation")
        if r["layout"] == "half" and r["threads"] == 1
    }
    furthest = max((bars[0][0] for bars in found.values() if bars), default=10)
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.subplots(len(ROWS), len(PANELS))
    for row, (length, title) in zip(grid, ROWS, strict=True):
        for axes, dtype in zip(row, PANELS, strict=True):
            axes.set_title(f"{dtype}, {title}", fontsize=10)
            _draw(axes, found.get((length, dtype), []))
            _frame(axes, furthest)
    figure.suptitle(TITLE, fontsize=10)
    handles = [
        Patch(facecolor=THEIRS, edgecolor="black", hatch=HATCH[mode], label=mode)
        for mode in MODES
    ]
    handles.insert(0, Patch(facecolor=OURS, edgecolor="black", label="posenc"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
    )
    figure.savefig(path, dpi=110)
