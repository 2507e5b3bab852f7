"""Measure every case and print, store, draw and publish the numbers."""

# SPDX-License-Identifier: BSD-3-Clause
import argparse
import gc
import importlib.metadata
import json
import logging
import os
import platform
import time
from pathlib import Path

import torch
from tqdm import tqdm

import posenc

from . import readme, report
from .cases import EVERYBODY, all_cases
from .timing import held_on, measure, nested, threads

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
STORED = HERE / "results.json"
LIBRARIES = (
    *("numpy", "torch", "transformers", "onnxruntime", "rotary-embedding-torch"),
    *("numba", "jax", "mlx", "x-transformers"),
)


def run_all(chosen, numbers_of_threads, options):
    """Return one record per case and number of threads."""
    records = []
    progress = tqdm(chosen, desc="cases")
    for name, make in progress:
        progress.set_postfix_str(name)
        with torch.no_grad():
            case = make()
            for n_thread in numbers_of_threads[: 1 if case.one_thread else None]:
                records.append(_record(case, n_thread, options))
        del case
        gc.collect()
    return records


def _record(case, n_thread, options):
    with threads(n_thread):
        runs, facts = case.prepare(n_thread)
    with threads(n_thread), held_on(n_thread):  # again: numba starts OpenMP anew
        budget = options.budget * case.patience
        seconds = measure(runs, options.rounds, budget, case.patience)
    return {
        "case": case.name,
        "group": case.group,
        "threads": n_thread,
        **case.facts,
        **facts,
        "seconds": nested(seconds),
    }


def processor():
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def _version(library):
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def machine():
    """Describe what the numbers were taken on."""
    info = posenc.build_info()
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "threads": f"{posenc.get_num_threads()} by default",
        "posenc": f"{info['version']} ({info['simd']}, {info['compiler']})",
        **{library: _version(library) for library in LIBRARIES},
        "date": time.strftime("%Y-%m-%d"),
    }


def publish(result):
    """Write README's part between its marks."""
    path = ROOT / "README.md"
    before, _, rest = path.read_text().partition(readme.BEGIN)
    _, _, after = rest.partition(readme.END)
    body = f"{readme.BEGIN}\n{readme.readme_part(result)}\n{readme.END}"
    path.write_text(before + body + after)


def write_files(result):
    """Write RESULTS.md and, with matplotlib, the picture."""
    (HERE / "RESULTS.md").write_text(report.results_page(result))
    try:
        from .picture import draw
    except ImportError as error:
        print(f"no picture: {error}")
    else:
        draw(result["records"], HERE / "speed.png")
    print(f"stored in {HERE.name}: results.json, RESULTS.md, speed.png")


def _parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--threads", default="1,2", help="numbers of threads")
    add("--rounds", type=int, default=15, help="rounds per row, at most")
    add("--budget", type=float, default=0.02, help="seconds per function and round")
    add("--only", default="", help="cases whose name contains this, such as ', 128,'")
    add("--peers", default=",".join(EVERYBODY), help="who takes part")
    add("--readme", action="store_true", help="write README's tables")
    add("--stored", action="store_true", help="measure nothing, use results.json")
    add("--update", action="store_true", help="replace these cases in results.json")
    return parser


def _is_part(parser, options):
    """Say whether less is measured than what is stored."""
    chosen = ("only", "threads", "peers")
    return any(getattr(options, o) != parser.get_default(o) for o in chosen)


def _measured(parser, options):
    """Return the result of a run as the options say."""
    numbers_of_threads = [int(n) for n in options.threads.split(",")]
    if min(numbers_of_threads) < 1:
        parser.error(f"--threads must be numbers of at least 1; got {options.threads}")
    peers = tuple(options.peers.split(","))
    if unknown := set(peers) - set(EVERYBODY):
        parser.error(f"--peers must be of {', '.join(EVERYBODY)}; got {min(unknown)!r}")
    cases = all_cases(peers)
    chosen = [case for case in cases if options.only in case[0]]
    if not chosen:
        names = "; ".join(name for name, _ in cases)
        parser.error(f"--only must be part of one of: {names}; got {options.only!r}")
    records = run_all(chosen, numbers_of_threads, options)
    return {"machine": machine(), "records": records}


def updated(stored, result):
    """Return stored results with the cases of a run in their place, or at the end."""

    def key(record):
        return record["case"], record["threads"]

    new = {key(record): record for record in result["records"]}
    records = [new.pop(key(record), record) for record in stored["records"]]
    cases = {case for case, _ in [*map(key, result["records"])]}
    apart = sorted(set(stored.get("apart", [])) | cases)
    records = [*records, *new.values()]
    return {"machine": result["machine"], "apart": apart, "records": records}


def main():
    """Parse the command line, measure, print and store."""
    parser = _parser()
    options = parser.parse_args()
    part = _is_part(parser, options)
    if part and not options.update and (options.readme or options.stored):
        parser.error("--readme and --stored must be for all cases, threads and peers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.stored:
        result = json.loads(STORED.read_text())
    else:
        result = _measured(parser, options)
    if options.update:
        result = updated(json.loads(STORED.read_text()), result)
        part = False
    print(report.results_page(result))
    if not part:
        STORED.write_text(json.dumps(result, indent=1) + "\n")
        write_files(result)
    if options.readme:
        publish(result)


if __name__ == "__main__":
    main()
