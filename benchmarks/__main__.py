"""Measure every case and print, store and publish the numbers."""

# SPDX-License-Identifier: BSD-3-Clause
import argparse
import gc
import json
import platform
import time
from pathlib import Path

import torch
from tqdm import tqdm

import posenc

from .cases import all_cases

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("in place", "out given", "fresh", "gufunc", "eager", "compiled")
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def time_once(function, budget):
    """Return the least seconds per call, over as many calls as fit a budget."""
    best, begin = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        function()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - begin > budget:
            return best


def measure(case, rounds, budget):
    """Time all functions of a case in turn, round after round; keep the least."""
    best = dict.fromkeys(case.run, float("inf"))
    for function in case.run.values():
        function()
    for _ in range(rounds):
        for name, function in case.run.items():
            best[name] = min(best[name], time_once(function, budget))
    return best


def set_threads(n_thread):
    """Give torch and posenc the same number of threads."""
    torch.set_num_threads(n_thread)
    posenc.set_num_threads(n_thread)


def run_all(chosen, threads, rounds, budget):
    """Return one record per case and number of threads."""
    records = []
    for _, make in tqdm(chosen, desc="cases"):
        set_threads(max(threads))
        with torch.no_grad():
            for case in make():
                for n_thread in threads[:1] if case.one_thread else threads:
                    set_threads(n_thread)
                    records.append(
                        {
                            "case": case.name,
                            "threads": n_thread,
                            "error": case.error,
                            "seconds": measure(case, rounds, budget),
                        }
                    )
        gc.collect()
    set_threads(max(threads))
    return records


def processor():
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def machine():
    """Describe what the numbers were taken on."""
    import numpy
    import transformers

    info = posenc.build_info()
    return {
        "processor": f"{processor()}, {torch.get_num_threads()} cores",
        "posenc": f"{info['version']} ({info['simd']}, {info['compiler']})",
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _time_text(seconds):
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2f} us"


def _cell(record, column):
    """Return a time as a multiple of the copy, or as it is without one."""
    seconds = record["seconds"].get(column)
    if seconds is None:
        return ""
    copy = record["seconds"].get("copy")
    return f"{seconds / copy:.2f}x" if copy else _time_text(seconds)


def as_table(records):
    """Return the records as a Markdown table."""
    head = ["case", "threads", "copy", *COLUMNS, "largest difference"]
    rows = [head, ["---"] * len(head)]
    for record in records:
        copy = record["seconds"].get("copy")
        rows.append(
            [
                record["case"],
                str(record["threads"]),
                _time_text(copy) if copy else "",
                *(_cell(record, column) for column in COLUMNS),
                record["error"],
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def publish(result):
    """Write the table into README between its marks."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    body = f"{BEGIN}\n{as_table(result['records'])}\n\nTaken on: {facts}.\n{END}"
    readme.write_text(before + body + after)


def main():
    """Parse the command line, measure, print and store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", default="1,2", help="numbers of threads")
    parser.add_argument("--rounds", type=int, default=15, help="rounds per case")
    parser.add_argument(
        "--budget", type=float, default=0.05, help="seconds per function and round"
    )
    parser.add_argument(
        "--only", default="", help="cases whose name contains this, such as T=1,"
    )
    parser.add_argument("--readme", action="store_true", help="write README's table")
    options = parser.parse_args()
    threads = [int(n) for n in options.threads.split(",")]
    if min(threads) < 1:
        parser.error(f"--threads must be numbers of at least 1; got {options.threads}")
    chosen = [case for case in all_cases() if options.only in case[0]]
    if not chosen:
        names = "; ".join(name for name, _ in all_cases())
        parser.error(f"--only must be part of one of: {names}; got {options.only!r}")
    records = run_all(chosen, threads, options.rounds, options.budget)
    result = {"machine": machine(), "records": records}
    print(as_table(records))
    if not options.only:
        stored = ROOT / "benchmarks" / "results.json"
        stored.write_text(json.dumps(result, indent=1) + "\n")
        print(f"stored in {stored.relative_to(ROOT)}")
    if options.readme:
        publish(result)


if __name__ == "__main__":
    main()
