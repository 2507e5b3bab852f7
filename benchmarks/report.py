"""What is made of the records: the tables of RESULTS.md and the list of defeats."""

# SPDX-License-Identifier: BSD-3-Clause
from .cope_peers import (
    COPE_PEERS,
    HEAD_DIM,
    LISTING_ARRAYS,
    LONG_ROUNDS,
    OUR_ROUNDS,
    THEIR_ROUNDS,
)
from .peers import PEERS, is_ours
from .timing import REPEATED

MODES = ("in place", "out given", "fresh")
DOORS = ("posenc.torch", "posenc NumPy")  # beside "posenc", in RESULTS.md only
UNITS = {"pairs": "pair", "logits": "logit"}
DRAWN_LENGTH = 2048  # tokens
PATCH = "posenc.hf.patch"


def in_group(records, group):
    """Return the records of a group."""
    return [record for record in records if record["group"] == group]


def copy_of(record):
    """Return the seconds of the copy, or None."""
    return record["seconds"].get("copy", {}).get("")


def plain_of(record):
    """Return the seconds of attention without positions."""
    return record["seconds"]["plain attention"]["fresh"]


def contestants(record):
    """Return (peer, mode, seconds) of all but the copy."""
    return [
        (peer, mode, seconds)
        for peer, modes in record["seconds"].items()
        if peer != "copy"
        for mode, seconds in modes.items()
    ]


def fastest(record, mode, peers=tuple(PEERS)):
    """Return the least seconds of a mode."""
    times = (record["seconds"].get(peer, {}).get(mode) for peer in peers)
    return min(filter(None, times), default=None)


def threads_text(n_thread):
    """Return '1 thread', '2 threads'."""
    return "1 thread" if n_thread == 1 else f"{n_thread} threads"


def ratio_text(ratio):
    """Return three digits at most."""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"


def time_text(seconds):
    """Return milliseconds, or microseconds if there are few."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2f} µs"


def markdown(head, rows):
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


ATTENTION = f"""\
Attention with contextual positions (CoPE), eight heads of {HEAD_DIM} channels, causal,
as a multiple of torch's `scaled_dot_product_attention` without positions in the same
run: below 1 it costs less than attention that knows no positions. *Listing* is the
paper's, and attention around it, in eager mode and under torch.compile;
*x-transformers* its own module and attention. Errors are from the listing in float64,
root mean square as a part of the result's, the worst of result and gradients. Posenc
and plain attention take {OUR_ROUNDS} rounds or more, the others {THEIR_ROUNDS}, at 4096
keys {LONG_ROUNDS}. Data are random: a row reaches the last of 64 positions after some
130 keys. The keys before that cost more: the rows of 1024 positions have no others."""

MEMORY = """\
By how much memory grows at most meanwhile, results included, in float32. The listing
was not run: it has {} arrays of shape (H, T, T) at once, {} with gradients."""
MEMORY = MEMORY.format(*LISTING_ARRAYS.values())

OTHERS = f"""\
As multiples of a copy, or in time where nothing is copied. The bytes of a bias are
written and not read: *zeros* fills the same memory. Runs of added tables, biases and
decay take {REPEATED} rounds or more. *Fresh* results lie in new memory, whose cost is
in the time: beside them stand those of a given `out`. `cope_bias` is what CoPE adds to
the logits, alone; the listing's first product, of queries and embeddings, is in none
but x-transformers' time. Errors are from a formula in float64, in units of the last
place (ulp), in eps of the terms, or absolute; *bits of* names with whom all bits are
shared."""

MODELS = """\
Random weights, batch of one. *Share of rotation* is what the same model gains without
any rotation: no patch can gain more, but for noise."""


def error_text(record, other="transformers"):
    """Return the largest errors of posenc and of another, over their modes."""
    errors = (record["errors"].get(p, {}) for p in ("posenc", other))
    return " / ".join(f"{max(e.values()):.0e}" if e else "-" for e in errors)


def model_table(records):
    """Return the end-to-end table."""
    head = ["Llama", "type", "work", "threads", "transformers", "patched"]
    head += ["gain", "share of rotation", "logits"]
    rows = []
    for r in in_group(records, "model"):
        plain, patched, without = (
            r["seconds"][peer][""] for peer in ("transformers", PATCH, "no rotation")
        )
        rows.append(
            [r["model"], r["dtype"], r["work"], str(r["threads"])]
            + [time_text(plain), time_text(patched)]
            + [f"{1 - part / plain:.1%}" for part in (patched, without)]
            + ["same bits" if r["same bits"] else "differ"]
        )
    return markdown(head, rows)


def attention_table(records, peers):
    """Return a table of attention: multiples of torch's without positions."""
    chosen = in_group(records, "attention")
    head = ["pass", "queries x keys", "positions", "type", "threads"]
    head += ["plain attention", *peers, "error: posenc / listing"]
    rows = [
        [r["pass"], f"{r['queries']} x {r['keys']}", str(r["positions"]), r["dtype"]]
        + [str(r["threads"]), time_text(plain_of(r))]
        + [_attention_cell(r, peer, peers) for peer in peers]
        + [error_text(r, "listing")]
        for r in sorted(chosen, key=lambda r: r["threads"])
    ]
    return markdown(head, rows)


def _attention_cell(record, peer, peers):
    """Return a multiple, in bold if it is below 1 and the least of those shown."""
    seconds = record["seconds"].get(peer, {}).get("fresh")
    if seconds is None:
        return ""
    text = ratio_text(seconds / plain_of(record))
    is_first = seconds == fastest(record, "fresh", ("plain attention", *peers))
    return f"**{text}**" if is_first else text


def memory_table(records):
    """Return a table of how much memory grows while attention runs."""
    head = ["tokens", "pass", "posenc", "listing, by formula"]
    rows = []
    for record in in_group(records, "memory"):
        for length, grown in record["bytes"].items():
            array = 4 * record["heads"] * int(length) ** 2
            for pass_, n_byte in grown.items():
                listing = LISTING_ARRAYS[pass_] * array
                rows.append([length, pass_, *map(memory_text, (n_byte, listing))])
    return markdown(head, rows)


def memory_text(n_byte):
    """Return whole megabytes."""
    return f"{n_byte / 1e6:,.0f} MB"


def gaps(records):
    """Return a line per peer and reason why it has no number somewhere."""
    where = {}
    for record in records:
        for peer, reason in record.get("gaps", {}).items():
            where.setdefault((peer, reason), []).append(record["case"])
    n_record = len(records)
    return [
        f"{peer}: {reason} ({len(cases)} of {n_record} rows)"
        for (peer, reason), cases in where.items()
    ]


def all_gaps(records):
    """Return the gaps of each group."""
    groups = dict.fromkeys(record["group"] for record in records)
    return [line for group in groups for line in gaps(in_group(records, group))]


def fastest_other(record, mode, without=()):
    """Return (seconds, peer) of the fastest of others in a mode, or None."""
    without = {"no rotation", *without}
    times = [
        (seconds, peer)
        for peer, its_mode, seconds in contestants(record)
        if its_mode == mode and peer not in without and not is_ours(peer)
    ]
    return min(times, default=None)


def modes_of(record):
    """Return the modes of a record, in order."""
    return list(dict.fromkeys(mode for _, mode, _ in contestants(record)))


def comparisons(record, ours, without=()):
    """Return (mode, our seconds, seconds and name of the fastest other).

    One for each mode that both have; if they share none, each at its fastest.
    """
    ours = record["seconds"].get(ours, {})
    theirs = {m: fastest_other(record, m, without) for m in modes_of(record)}
    theirs = {mode: other for mode, other in theirs.items() if other}
    shared = [(mode, ours[mode], *theirs[mode]) for mode in ours if mode in theirs]
    if shared or not ours or not theirs:
        return shared
    return [("each at its fastest", min(ours.values()), *min(theirs.values()))]


def losses(records):
    """Return a line for every row and mode in which posenc is not the first."""
    return [
        _loss(record, *compared)
        for record in records
        for ours in ("posenc", PATCH)
        for compared in sorted(comparisons(record, ours))
        if compared[2] < compared[1]
    ]


def place(record, mode):
    """Return where a number stands: case, mode and threads."""
    return ", ".join(
        filter(None, (record["case"], mode, threads_text(record["threads"])))
    )


def _loss(record, mode, our_time, seconds, peer):
    modes = ((door, record["seconds"].get(door, {}).get(mode)) for door in DOORS)
    doors = "".join(f", {door} {time_text(time)}" for door, time in modes if time)
    return (
        f"{place(record, mode)}: {peer} is {our_time / seconds:.2f} times as fast "
        f"({time_text(seconds)}, posenc {time_text(our_time)}{doors})"
    )


def facts(machine):
    """Return the machine's line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def listed(lines):
    """Return a Markdown list."""
    return "\n".join(f"- {line}" for line in lines) if lines else "None."


# --- RESULTS.md ----------------------------------------------------------------------


def _full_cell(record, peer, mode):
    seconds = record["seconds"].get(peer, {}).get(mode)
    if seconds is None:
        return ""
    text = ratio_text(seconds / copy_of(record))
    if record["length"] == 1:
        text += f" ({seconds * 1e6:.2f} µs)"
    return f"**{text}**" if seconds == fastest(record, mode) else text


def _by_contestant(records, cell, *rows):
    """Return a table with a row per peer and mode, a column per type and layout."""
    head = ["", *(f"{r['dtype']}, {r['layout']}" for r in records)]
    rows = list(rows)
    for peer in PEERS:
        for mode in MODES:
            cells = [cell(record, peer, mode) for record in records]
            if any(cells):
                rows.append([f"{peer}, {mode}", *cells])
    return markdown(head, rows)


def _error_cell(record, peer, mode):
    error = record["errors"].get(peer, {}).get(mode)
    return "" if error is None else f"{error:.1e}"


def _title(length, threads):
    n_token = "1 token" if length == 1 else f"{length} tokens"
    return f"{n_token}, {threads_text(threads)}"


def _rotation_sections(records):
    chosen = in_group(records, "rotation")
    parts = []
    for length, n_thread in sorted({(r["length"], r["threads"]) for r in chosen}):
        here = [r for r in chosen if (r["length"], r["threads"]) == (length, n_thread)]
        parts.append(f"## {_title(length, n_thread)}")
        copies = ["copy", *(time_text(copy_of(r)) for r in here)]
        errors = ["error: posenc / transformers", *map(error_text, here)]
        parts.append(_by_contestant(here, _full_cell, copies, errors))
    drawn = [r for r in chosen if (r["length"], r["threads"]) == (DRAWN_LENGTH, 1)]
    if drawn:
        parts.append(f"## Largest errors, {_title(DRAWN_LENGTH, 1)}")
        parts.append(_by_contestant(drawn, _error_cell))
    same = sum(r["same bits"] for r in chosen)
    parts.append(
        f"In {same} of {len(chosen)} rows posenc, with tables of the data's type, "
        "gives the bits of transformers' function."
    )
    return parts


def other_table(records):
    """Return a table of functions other than the rotation of q and k."""
    head = ["case", "threads", "copy", "posenc", "others", "error"]
    rows = []
    for r in records:
        ours, theirs = (
            "; ".join(
                f"{'' if peer == 'posenc' else peer + ' '}{mode} {_other_text(r, s)}"
                for peer, mode, s in contestants(r)
                if is_ours(peer) is wanted
            )
            for wanted in (True, False)
        )
        copy = copy_of(r)
        roof = time_text(copy) if copy else ""
        rows.append([r["case"], str(r["threads"]), roof, ours, theirs, r["error"]])
    return markdown(head, rows)


def _other_text(record, seconds):
    copy = copy_of(record)
    text = ratio_text(seconds / copy) if copy else time_text(seconds)
    zeros = record["seconds"].get("zeros", {}).get("out given")
    if zeros and seconds != zeros:
        text += f" ({ratio_text(seconds / zeros)} of zeros)"
    for many, one in UNITS.items():
        if many in record:
            text += f" ({seconds / record[many] * 1e9:.2f} ns/{one})"
    return text


HEADER = """\
# All results

Written by `python -m benchmarks`. Numbers are multiples of the time that
`torch.Tensor.copy_` of the same bytes into a given output takes in the same run, the
least of as many calls in turn as fit 0.3 s, of slower ones at least one, or as many as
are said; the fastest in each mode is bold. Work: q (1, 32, T, 128) and
k (1, 8, T, 128), in memory as the projections leave them. *posenc* rotates torch's
tensors, computed in float32 and rounded once; *posenc eager* rounds as PyTorch does,
which gives the bits of 16-bit models. ONNX Runtime, numba, JAX and MLX get arrays of
their own kind, made beforehand. In-place work can be below one copy: it fetches no
second array."""


def results_page(result):
    """Return the text of RESULTS.md."""
    records = result["records"]
    parts = [HEADER]
    if in_group(records, "rotation"):
        parts += _rotation_sections(records)
    if others := in_group(records, "other"):
        parts += ["## Other functions", OTHERS, other_table(others)]
    if in_group(records, "attention"):
        parts += ["## Attention with contextual positions", ATTENTION]
        parts += [attention_table(records, COPE_PEERS)]
    if in_group(records, "memory"):
        parts += [MEMORY, memory_table(records)]
    if in_group(records, "model"):
        parts += ["## Whole models", MODELS, model_table(records)]
    parts += ["## Where posenc is not the first", listed(losses(records))]
    parts += ["## Who has no number, and why", listed(all_gaps(records))]
    if apart := result.get("apart"):
        parts += [f"Measured in runs of their own: {'; '.join(apart)}."]
    return "\n\n".join([*parts, f"Taken on: {facts(result['machine'])}.\n"])
