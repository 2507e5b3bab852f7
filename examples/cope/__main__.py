"""Train small models that know positions in different ways, and report how they do.

Tasks compare absolute positions, RoPE and CoPE; language compares all of `SCHEMES`.

    python -m examples.cope train                    # everything, over an hour
    python -m examples.cope train flip_flop --positions cope --seeds 1
    python -m examples.cope report                   # tables and a picture
    python -m examples.cope pictures --models DIR    # of models kept by --models

Results go to a JSON file as they come; what is there already is not run again.
"""

# SPDX-License-Identifier: BSD-3-Clause

import argparse
import itertools
import json
from pathlib import Path

import torch

from . import report
from .experiments import EXPERIMENTS, shortened
from .model import POSITIONS
from .training import new_model, run

HERE = Path(__file__).resolve().parent


def parser():
    """Return the reader of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m examples.cope",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train and measure models")
    training.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS)
    )
    training.add_argument(
        "--positions", nargs="+", choices=POSITIONS, default=POSITIONS
    )
    training.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (3)")
    training.add_argument("--steps", type=int, help="at most so many steps")
    training.add_argument("--measured", type=int, help="at most so many sequences")
    training.add_argument("--threads", type=int, default=1)
    training.add_argument("--models", type=Path, help="folder to keep models in")
    training.add_argument("--again", action="store_true", help="run what is there too")
    reporting = commands.add_parser("report", help="write tables and a picture")
    reporting.add_argument("--readme", type=Path, default=HERE / "README.md")
    reporting.add_argument("--picture", type=Path, default=HERE / "results.png")
    drawing = commands.add_parser("pictures", help="draw positions and attention")
    drawing.add_argument("--models", type=Path, required=True)
    drawing.add_argument("--folder", type=Path, default=HERE, help="where to draw")
    for command in (training, reporting):
        command.add_argument("--results", type=Path, default=HERE / "results.json")
    return top


def load(path):
    """Return the records of a file, none if there is no file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def save(path, records):
    """Write the records in a fixed order."""
    order = [(e, p) for e in EXPERIMENTS for p in POSITIONS]
    records.sort(
        key=lambda r: (order.index((r["experiment"], r["positions"])), r["seed"])
    )
    path.write_text(json.dumps(records, indent=1) + "\n", "utf-8")


def model_path(folder, experiment, positions, seed):
    """Return where a model is kept."""
    return folder / f"{experiment}_{positions}_{seed}.pt"


def train(args):
    """Train and measure what is not in the results yet."""
    torch.set_num_threads(args.threads)
    names = args.experiments or list(EXPERIMENTS)
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise SystemExit(
            f"train: EXPERIMENT must be one of {', '.join(EXPERIMENTS)}; "
            f"got {unknown[0]!r}"
        )
    pairs = [
        (name, positions)
        for name in names
        for positions in EXPERIMENTS[name].positions
        if positions in args.positions
    ]
    if not pairs:
        raise SystemExit(
            f"train: --positions must name some that {', '.join(names)} compare; "
            f"got {', '.join(args.positions)}"
        )
    for seed, (name, positions) in itertools.product(range(args.seeds), pairs):
        if seed < EXPERIMENTS[name].n_seed:
            train_one(args, name, positions, seed)


def train_one(args, name, positions, seed):
    """Train and measure one model, unless it is in the results."""
    key = (name, positions, seed)
    records = load(args.results)
    others = [r for r in records if (r["experiment"], r["positions"], r["seed"]) != key]
    if len(others) < len(records) and not args.again:
        return
    experiment = shortened(EXPERIMENTS[name], args.steps, args.measured)
    model, record = run(experiment, positions, seed, f"{name} {positions} {seed}")
    print(
        name, positions, seed, record["measured"], f"{record['seconds']} s", flush=True
    )
    save(args.results, [*others, {"experiment": name, **record}])
    if args.models:
        args.models.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), model_path(args.models, *key))


def draw(args):
    """Draw positions and attention of models that were kept."""
    from . import pictures

    def trained(name, positions, seed=0):
        model = new_model(EXPERIMENTS[name], positions, seed)
        model.load_state_dict(
            torch.load(model_path(args.models, name, positions, seed))
        )
        return model.eval()

    pictures.draw_all(trained, args.folder)


def main(arguments=None):
    """Do what the command line says."""
    args = parser().parse_args(arguments)
    if args.command == "train":
        train(args)
    elif args.command == "pictures":
        draw(args)
    else:
        report.write(load(args.results), args.readme, args.picture)


if __name__ == "__main__":
    main()
