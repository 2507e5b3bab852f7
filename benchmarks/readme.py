"""README's part of the results: a summary of all, then a row for each work and type."""

# SPDX-License-Identifier: BSD-3-Clause
import statistics

from .cope_peers import HEAD_DIM, LISTING_ARRAYS
from .peers import is_ours
from .report import (
    MODES,
    PATCH,
    comparisons,
    contestants,
    copy_of,
    error_text,
    facts,
    fastest_other,
    in_group,
    markdown,
    memory_text,
    modes_of,
    place,
    plain_of,
    ratio_text,
    time_text,
)

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
PICTURE = "![Time of a rotation as a multiple of a copy](benchmarks/speed.png)"

# Rows of the summary: what the names of their cases start with, and whose time counts.
# Every case is in one of them.
THEMES = {
    "q and k rotated, `half`": (("rope_qk half",), "posenc"),
    "q and k rotated, `interleaved`": (("rope_qk interleaved",), "posenc"),
    "q and k in 16 bits, `rounding='eager'`": (("rope_qk",), "posenc eager"),
    "tables of RoPE, other rotations": (
        ("rope_table", "rope_inv_freq", "rope_complex", "rope and", "permute_layout"),
        "posenc",
    ),
    "sinusoidal and learned tables": (
        ("sinusoidal", "add_", "extend_table"),
        "posenc",
    ),
    "attention with CoPE": (("cope_attention",), "posenc"),
    "CoPE's bias and steps": (
        ("cope_bias", "cope_gates", "cope_positions", "cope_interpolate"),
        "posenc",
    ),
    "relative biases": (("t5_", "alibi_", "kerple_", "fire_", "sandwich_"), "posenc"),
    "decay and wavelengths": (("rope_decay", "wavelengths"), "posenc"),
    "whole Llamas, patched": (("Llama",), PATCH),
}
YARDSTICKS = ("zeros", "ones", "plain attention")  # they do less than the work
# Functions with a row for each case; the others are in the summary alone.
SHOWN = ("cope_bias", "add_", "sinusoidal, ", "t5_bias", "alibi_bias", "rope_decay")

SUMMARY = """\
The time of the fastest other that does the work, as a multiple of posenc's, over every
result stored: below 1 posenc is not the first."""
ROTATION = """\
q and k rotated in layout `half`, as multiples of the copy; one token as time, on one
thread."""
ATTENTION = f"""\
Attention with CoPE, causal, eight heads of {HEAD_DIM} channels, as multiples of torch's
attention without positions; *listing* is the paper's code."""
MEMORY = """\
Over {} tokens posenc takes {} of memory, with gradients {}; the listing's arrays
would take {} and {}."""
FUNCTIONS = """\
Other functions, as multiples of the copy, or as time where nothing is copied; *zeros*
and *ones* only fill the memory."""
MODELS = """\
Whole Llamas of random weights: the time that the patch saves, and what leaving out the
rotation would save."""


def _by_case(records):
    """Return lists of the records of each case, in the order of their threads."""
    cases = {}
    for record in sorted(records, key=lambda r: r["threads"]):
        cases.setdefault(record["case"], []).append(record)
    return list(cases.values())


def summary_table(records):
    """Return a row per theme: how its results compare with the fastest others."""
    rows = []
    for title, (prefixes, ours) in THEMES.items():
        ratios = [
            (seconds / our_time, f"{peer}; {place(record, mode)}")
            for record in records
            if record["case"].startswith(prefixes)
            for mode, our_time, seconds, peer in comparisons(record, ours, YARDSTICKS)
        ]
        if ratios:
            rows.append([title, *_spread(ratios)])
    head = ["work", "results", "posenc first", "median", "most", "least"]
    return markdown(head, rows)


def _spread(ratios):
    numbers = [ratio for ratio, _ in ratios]
    least, where = min(ratios)
    return [
        str(len(numbers)),
        str(sum(number >= 1 for number in numbers)),
        ratio_text(statistics.median(numbers)),
        ratio_text(max(numbers)),
        f"{ratio_text(least)} ({where})",
    ]


# --- cells: one number for each number of threads ------------------------------------


def _number(record, seconds):
    """Return a multiple of the copy or of plain attention, or a time."""
    basis = copy_of(record) or record["seconds"].get("plain attention", {}).get("fresh")
    if basis is None or record.get("length") == 1:
        return time_text(seconds)
    return ratio_text(seconds / basis)


def _marked(record, mode, seconds):
    """Return the number, in bold if posenc and others compete and none is faster."""
    ours = record["seconds"].get("posenc", {}).get(mode)
    others = fastest_other(record, mode)
    text = _number(record, seconds)
    is_first = ours and others and seconds == min(ours, others[0])
    return f"**{text}**" if is_first else text


def _times(here, seconds_of):
    times = [seconds_of(record) for record in here]
    return " / ".join(map(time_text, times)) if all(times) else ""


def _cell(here, peer, mode):
    """Return what a peer takes in a mode."""
    times = [(r, r["seconds"].get(peer, {}).get(mode)) for r in here]
    return " / ".join(_marked(r, mode, seconds) for r, seconds in times if seconds)


def _fastest_cell(here, mode, without=()):
    """Return who is the fastest other in a mode, and what it takes."""
    texts, last = [], None
    for record in here:
        if other := fastest_other(record, mode, without):
            seconds, peer = other
            texts.append(f"{peer} " * (peer != last) + _marked(record, mode, seconds))
            last = peer
    return " / ".join(texts)


def _our_cell(here, mode):
    """Return what posenc takes in a mode, or another of its doors, by name."""
    doors = [p for p, m, _ in contestants(here[0]) if m == mode and is_ours(p)]
    if "posenc" in doors or not doors:
        return _cell(here, "posenc", mode)
    return f"{doors[0]} {_cell(here, doors[0], mode)}"


# --- a row for each case -------------------------------------------------------------


def rotation_table(records):
    """Return a row for each number of tokens and type, layout half."""
    chosen = [r for r in in_group(records, "rotation") if r["layout"] == "half"]
    head = ["tokens", "type", "copy"]
    for mode in MODES:
        head += [f"posenc, {mode}", "fastest other"]
    rows = []
    for here in _by_case(sorted(chosen, key=lambda r: r["length"])):
        row = [str(here[0]["length"]), here[0]["dtype"], _times(here, copy_of)]
        for mode in MODES:
            row += [_cell(here, "posenc", mode), _fastest_cell(here, mode)]
        rows.append([*row, _cell(here, "transformers", "fresh")])
    return markdown([*head, "transformers"], rows)


def attention_table(records):
    """Return a row for each case of attention."""
    rows = [
        [
            here[0]["case"].removeprefix("cope_attention "),
            _times(here, plain_of),
            _cell(here, "posenc", "fresh"),
            _fastest_cell(here, "fresh", YARDSTICKS),
            _cell(here, "listing", "fresh"),
            error_text(here[0], "listing"),
        ]
        for here in _by_case(in_group(records, "attention"))
    ]
    head = ["pass, type, queries x keys, positions", "without positions", "posenc"]
    head += ["fastest other", "listing", "error: posenc / listing"]
    return markdown(head, rows)


def memory_line(records):
    """Return what attention takes at the greatest length."""
    lines = []
    for record in in_group(records, "memory"):
        length = max(map(int, record["bytes"]))
        array = 4 * record["heads"] * length**2
        taken = record["bytes"][str(length)].values()
        arrays = (n_array * array for n_array in LISTING_ARRAYS.values())
        lines.append(MEMORY.format(length, *map(memory_text, (*taken, *arrays))))
    return "\n".join(lines)


def function_table(records):
    """Return a row for each case of some functions, each with all of its modes."""
    rows = []
    for here in _by_case([r for r in records if r["case"].startswith(SHOWN)]):
        modes = modes_of(here[0])
        ours = {mode: _our_cell(here, mode) for mode in modes}
        theirs = {mode: _fastest_cell(here, mode) for mode in modes}
        texts = (
            "; ".join(f"{mode}: {text}" for mode, text in cells.items() if text)
            for cells in (ours, theirs)
        )
        copies = _times(here, copy_of)
        rows.append([here[0]["case"], copies, *texts, here[0]["error"]])
    head = ["case", "copy", "posenc", "fastest other", "error"]
    return markdown(head, rows)


def model_table(records):
    """Return a row for each whole model, type and work."""
    rows = []
    for here in _by_case(in_group(records, "model")):
        saved, share = (
            " / ".join(f"{_saved(record, peer):.1%}" for record in here)
            for peer in (PATCH, "no rotation")
        )
        same = all(record["same bits"] for record in here)
        plain = _times(here, lambda r: r["seconds"]["transformers"][""])
        row = [here[0]["case"].removeprefix("Llama "), plain, saved, share]
        rows.append([*row, "same bits" if same else "differ"])
    head = ["Llama", "transformers", "patch saves", "no rotation saves", "logits"]
    return markdown(head, rows)


def _saved(record, peer):
    """Return the part of transformers' time that a peer does not take."""
    return 1 - record["seconds"][peer][""] / record["seconds"]["transformers"][""]


def readme_part(result):
    """Return what stands in README between the marks."""
    records = result["records"]
    parts = [PICTURE, SUMMARY, summary_table(records)]
    parts += [ROTATION, rotation_table(records)]
    parts += [f"{ATTENTION}\n{memory_line(records)}", attention_table(records)]
    parts += [FUNCTIONS, function_table(records)]
    parts += [MODELS, model_table(records)]
    return "\n\n".join([*parts, f"Taken on: {facts(result['machine'])}."])
