"""What is made of the records: tables, the list of defeats, README's part."""

# SPDX-License-Identifier: BSD-3-Clause
from .peers import PEERS, is_ours

MODES = ("in place", "out given", "fresh")
DOORS = ("posenc.torch", "posenc NumPy")  # in RESULTS.md only
SHOWN = [peer for peer in PEERS if peer not in DOORS]
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
DRAWN_LENGTH = 2048  # tokens; README shows two threads for these only


def in_group(records, group):
    """Return the records of a group."""
    return [record for record in records if record["group"] == group]


def copy_of(record):
    """Return the seconds of the copy, or None."""
    return record["seconds"].get("copy", {}).get("")


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


# --- README --------------------------------------------------------------------------


def _number(record, seconds):
    """Return microseconds for one token, else a multiple of the copy."""
    if record["length"] == 1:
        return ratio_text(seconds * 1e6)
    return ratio_text(seconds / copy_of(record))


def _cell(record, peer):
    """Return the modes of a peer, the fastest of all peers in bold."""
    modes = record["seconds"].get(peer, {})
    if not modes:
        return ""
    texts = []
    for mode in MODES if len(modes) > 1 else modes:
        text = _number(record, modes[mode]) if mode in modes else "-"
        is_best = mode in modes and modes[mode] == fastest(record, mode, SHOWN)
        texts.append(f"**{text}**" if is_best else text)
    return " / ".join(texts)


def _in_readme(record):
    return record["threads"] == 1 or (
        record["length"] == DRAWN_LENGTH and record["layout"] == "half"
    )


def _error_text(record):
    errors = (record["errors"].get(p, {}) for p in ("posenc", "transformers"))
    return " / ".join(f"{max(e.values()):.0e}" if e else "-" for e in errors)


def rotation_table(records):
    """Return README's table: cases and peers."""
    chosen = [r for r in in_group(records, "rotation") if _in_readme(r)]
    peers = [p for p in SHOWN if any(p in r["seconds"] for r in chosen)]
    head = [
        "tokens",
        "type, layout",
        "threads",
        "copy",
        *peers,
        "error: posenc / transformers",
    ]
    rows = [
        [
            str(r["length"]),
            f"{r['dtype']}, {r['layout']}",
            str(r["threads"]),
            time_text(copy_of(r)),
            *(_cell(r, peer) for peer in peers),
            _error_text(r),
        ]
        for r in sorted(chosen, key=lambda r: (r["length"], r["threads"]))
    ]
    return markdown(head, rows)


def model_table(records):
    """Return the end-to-end table."""
    head = ["Llama", "type", "work", "threads", "transformers", "patched"]
    head += ["gain", "share of rotation", "logits"]
    rows = []
    for r in in_group(records, "model"):
        plain, patched, without = (
            r["seconds"][peer][""]
            for peer in ("transformers", "posenc.hf.patch", "no rotation")
        )
        rows.append(
            [r["model"], r["dtype"], r["work"], str(r["threads"])]
            + [time_text(plain), time_text(patched)]
            + [f"{1 - part / plain:.1%}" for part in (patched, without)]
            + ["same bits" if r["same bits"] else "differ"]
        )
    return markdown(head, rows)


def gaps(records):
    """Return a line per peer and reason why it has no number somewhere."""
    where = {}
    for record in in_group(records, "rotation"):
        for peer, reason in record["gaps"].items():
            where.setdefault((peer, reason), []).append(record["case"])
    n_record = len(in_group(records, "rotation"))
    return [
        f"{peer}: {reason} ({len(cases)} of {n_record} rows)"
        for (peer, reason), cases in where.items()
    ]


def losses(records):
    """Return a line for every row and mode in which posenc is not the first."""
    return [
        line
        for record in records
        for mode in sorted({mode for _, mode, _ in contestants(record)})
        for line in _loss(record, mode)
    ]


def _loss(record, mode):
    times = {p: seconds for p, m, seconds in contestants(record) if m == mode}
    ours = {p: seconds for p, seconds in times.items() if is_ours(p)}
    theirs = [(s, p) for p, s in times.items() if p not in (*ours, "no rotation")]
    if not ours or not theirs:
        return
    our_time = ours.get("posenc", min(ours.values()))  # not by another door
    seconds, peer = min(theirs)
    if seconds < our_time:
        what = ", ".join(filter(None, (record["case"], mode)))
        doors = "".join(
            f", {door} {time_text(ours[door])}" for door in DOORS if door in ours
        )
        yield (
            f"{what}, {threads_text(record['threads'])}: {peer} is "
            f"{our_time / seconds:.2f} times as fast "
            f"({time_text(seconds)}, posenc {time_text(our_time)}{doors})"
        )


def facts(machine):
    """Return the machine's line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def listed(lines):
    """Return a Markdown list."""
    return "\n".join(f"- {line}" for line in lines) if lines else "None."


def readme_part(result):
    """Return what stands in README between the marks."""
    records = result["records"]
    return "\n\n".join(
        [
            "![Time of a rotation as a multiple of a copy](benchmarks/speed.png)",
            rotation_table(records),
            "Empty cells:\n\n" + listed(gaps(records)),
            "Whole models, random weights, batch of one:",
            model_table(records),
            f"Taken on: {facts(result['machine'])}.",
        ]
    )


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
        parts.append(_by_contestant(here, _full_cell, copies))
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
    """Return the table of everything that is not the rotation of q and k."""
    chosen = in_group(records, "other")
    head = ["case", "threads", "copy", "posenc", "others", "error"]
    rows = []
    for r in chosen:
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
    if "pairs" in record:
        text += f" ({seconds / record['pairs'] * 1e9:.2f} ns/pair)"
    return text


HEADER = """\
# All results

Written by `python -m benchmarks`. Numbers are multiples of the time that
`torch.Tensor.copy_` of the same bytes into a given output takes in the same run, the
least of many repetitions in turn; the fastest in each mode is bold. Work: q
(1, 32, T, 128) and k (1, 8, T, 128), in memory as the projections leave them."""


def results_page(result):
    """Return the text of RESULTS.md."""
    records = result["records"]
    parts = [HEADER]
    if in_group(records, "rotation"):
        parts += _rotation_sections(records)
    if in_group(records, "other"):
        parts += ["## Other functions", other_table(records)]
    if in_group(records, "model"):
        parts += ["## Whole models", model_table(records)]
    parts += ["## Where posenc is not the first", listed(losses(records))]
    parts += ["## Who has no number, and why", listed(gaps(records))]
    return "\n\n".join([*parts, f"Taken on: {facts(result['machine'])}.\n"])
