"""Turn the losses measured by ``_extend.py`` into tables, JSON and one sentence."""

# SPDX-License-Identifier: BSD-3-Clause

import itertools
import json
import math

from ._extend import buckets

# A difference between two methods counts when it exceeds this many standard errors
# of its mean over the windows: what chance gives in fewer than one case in twenty.
N_STANDARD_ERROR = 2
# ... and when it is at least one step of the last digit of `number`, in the unit
# printed: a reader must see it.
VISIBLE = 0.01
# Of the curves: means over ranges of position, from this position on.
POINTS_PER_DOUBLING = 4
FIRST_POSITION = 32


def tables(report):
    """Return the tables a reader wants first, as one string."""
    longest = report.lengths[-1]
    windows = "1 window" if report.n_window == 1 else f"{report.n_window} windows"
    lines = [
        f"{report.unit} by position, read at length {longest} "
        f"({windows}; trained length {report.trained}; "
        "lower is better)"
    ]
    lines += _columns(_rows_by_position(report, longest), n_left=2)
    if len(report.lengths) > 1:
        lines += [
            "",
            f"{report.unit} by length read, L: mean over the second half of every "
            "window (positions L/2 to L)",
        ]
        lines += _columns(_rows_by_length(report), n_left=1)
    if report.left_out:
        lines.append("")
        lines += [f"{m} left out: {why}" for m, why in report.left_out.items()]
    return "\n".join(lines)


def _rows_by_position(report, length):
    ranges = buckets(report.trained, length)
    rows = [["method", "setting", *(f"{a}-{b}" for a, b in ranges)]]
    for method in report.methods:
        run = report.run(method, length)
        values = (run.mean(a, b) for a, b in ranges)
        cells = [number(report.in_unit(v)) for v in values]
        rows.append([method, describe(run.setting), *cells])
    return rows


def _rows_by_length(report):
    rows = [["method", *map(str, report.lengths)]]
    for method in report.methods:
        runs = [report.run(method, n) for n in report.lengths]
        values = (r.mean(r.length // 2, r.length) for r in runs)
        rows.append([method, *(number(report.in_unit(v)) for v in values)])
    return rows


def _columns(rows, n_left):
    """Align columns, the first ``n_left`` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        cells = [
            c.ljust(w) if i < n_left else c.rjust(w) for i, (c, w) in enumerate(cells)
        ]
        lines.append(("  " + "   ".join(cells)).rstrip())
    return lines


def describe(setting):
    """Return a setting as a reader writes it: ``factor 8``."""
    for key in ("factor", "alpha", "window"):
        if key in setting:
            return f"{key} {setting[key]:.4g}"
    return ""


def number(value):
    """Return a measured value with as many digits as are worth reading."""
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def to_json(report):
    """Return the report as JSON text."""
    return json.dumps(content_of(report), indent=1) + "\n"


def content_of(report):
    """Return the report as what its JSON holds."""
    runs = [
        {
            "method": run.method,
            "length": run.length,
            "setting": run.setting,
            "buckets": [
                {"start": a, "stop": b, "value": report.in_unit(run.mean(a, b))}
                for a, b in buckets(report.trained, run.length)
            ],
            "curve": [
                {"start": a, "stop": b, "value": report.in_unit(run.mean(a, b))}
                for a, b in curve_ranges(run.length)
            ],
            "second_half": report.in_unit(run.mean(run.length // 2, run.length)),
        }
        for run in report.runs
    ]
    return {
        "model": report.model,
        "text": report.text,
        "unit": report.unit,
        "trained_length": report.trained,
        "n_window": report.n_window,
        "left_out": report.left_out,
        "runs": runs,
        "conclusion": conclusion(report),
    }


def curve_ranges(length):
    """Return the (start, stop) position ranges of a curve, growing with the position.

    >>> curve_ranges(64)
    [(32, 38), (38, 45), (45, 54), (54, 64)]
    """
    first = min(FIRST_POSITION, length // 2)
    n_range = max(1, round(math.log2(length / first) * POINTS_PER_DOUBLING))
    steps = (length / first) ** (1 / n_range)
    edges = sorted({round(first * steps**i) for i in range(n_range)} | {length})
    return list(itertools.pairwise(edges))


# ---------------------------------------------------------------- the last sentence


def conclusion(report):
    """Return one sentence that says what helped past the trained length.

    It compares the losses past the trained length at the longest length, window by
    window; a difference within noise, or too small to see, is called none.
    """
    length, trained = report.lengths[-1], report.trained
    if length <= trained:
        return (
            f"Nothing was extended: the longest length, {length}, does not reach "
            f"past the trained length, {trained}."
        )
    runs = [report.run(m, length) for m in report.methods]
    runs.sort(key=lambda run: run.mean(trained, length))
    by_name = {run.method: run for run in runs}
    unchanged, window = by_name.get("none"), by_name.get("window")
    scaled = [run for run in runs if run.method not in ("none", "window")]
    where = f"Without fine-tuning, past position {trained} of {length},"
    if runs == [unchanged]:
        clause = f"{report.unit} of the unchanged model is {_value(report, unchanged)}"
    elif unchanged is None:
        clause = _ranking(report, scaled or runs)
    else:
        clause = _against_unchanged(report, unchanged, scaled or [window])
    if window is not None and scaled:
        clause += _against_window(report, window, scaled[0])
    if report.n_window == 1 and len(runs) > 1:
        clause += " (from one window, which gives no estimate of the noise)"
    return f"{where} {clause}."


def _value(report, run):
    return number(report.in_unit(run.mean(report.trained, run.length)))


def _named(report, runs):
    """Return ``a (1.70), b (1.80) and c (2.10)``."""
    names = [f"{run.method} ({_value(report, run)})" for run in runs]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _ranking(report, runs):
    best, value = runs[0].method, _value(report, runs[0])
    if not runs[1:]:
        return f"{best} gave {value} {report.unit}"
    first = f"{best} gave the lowest {report.unit} ({value})"
    return f"{first}, then {_named(report, runs[1:])}"


def _against_unchanged(report, unchanged, others):
    gains = [(run, _difference(report, unchanged, run)) for run in others]
    better = [run for run, sign in gains if sign > 0]
    worse = [run for run, sign in gains if sign < 0]
    same = [run for run, sign in gains if sign == 0 and run is not unchanged]
    if better:
        clause = (
            f"{better[0].method} helped most: {report.unit} fell from "
            f"{_value(report, unchanged)} to {_value(report, better[0])}"
        )
        if better[1:]:
            clause += f"; {_named(report, better[1:])} helped too"
    else:
        clause = (
            f"nothing helped: {report.unit} of the unchanged model is "
            f"{_value(report, unchanged)}"
        )
    if same:
        clause += f"; {_named(report, same)} made no difference"
    if worse:
        clause += f"; {_named(report, worse)} made it worse"
    return clause


def _against_window(report, window, best):
    size = window.setting["window"]
    sign = _difference(report, window, best)
    value = _value(report, window)
    if sign > 0:
        return f"; {best.method} also beats a plain sliding window of {size} ({value})"
    verdict = "is as good" if sign == 0 else "is better still"
    return f"; a plain sliding window of {size} ({value}) {verdict}"


def _difference(report, base, run):
    """Return 1 if ``run`` is better than ``base``, -1 if worse, else 0.

    0 is for a difference that is within noise or that cannot be seen when printed.
    """
    values = [report.in_unit(r.mean(report.trained, r.length)) for r in (base, run)]
    if abs(values[0] - values[1]) < VISIBLE or len(set(map(number, values))) == 1:
        return 0
    past = slice(report.trained - 1, None)
    gain = (base.loss[:, past] - run.loss[:, past]).mean(axis=1, dtype=float)
    if len(gain) < 2:
        return 1 if gain[0] > 0 else -1
    noise = N_STANDARD_ERROR * gain.std(ddof=1) / math.sqrt(len(gain))
    return int(gain.mean() > noise) - int(gain.mean() < -noise)
