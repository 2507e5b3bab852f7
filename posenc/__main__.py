"""The command line: ``python -m posenc extend`` and ``python -m posenc plot``."""

# SPDX-License-Identifier: BSD-3-Clause

import argparse
import contextlib
import sys
import textwrap
from pathlib import Path

from . import _extend, _extend_report, _plot_command
from ._version import __version__

EXTEND = """\
Measure how well a model reads text longer than it was trained on, under several
ways of context extension. The text is cut into windows, the same for every method;
the loss is averaged by position. T is the model's trained length
(max_position_embeddings), L the length read:

{methods}

alpha, unless given, is (L/T)**{exponent}: it must exceed L/T, and this rule fits the
best values of the shipped model on the text it was trained on.
none and window keep a scaling that the model has of its own (such as llama3); the
others take its place, at every length past T. The rope type 'proportional' does not
extend a context. longrope needs factors that were searched for one model.
Byte-level models are measured in bits per byte, models with a tokenizer in
perplexity. Nothing is trained and no file of the model is changed.
"""
PLOT = """\
Draw a picture. NAME is one of

{pictures}
"""
PLOT_OPTIONS = {
    "dim": (int, "D", "channels"),
    "length": (int, "L", "tokens"),
    "theta": (float, "B", "base of the frequencies"),
    "heads": (int, "H", "how many heads there are"),
    "json": (str, "FILE", "what `extend --json` wrote"),
}
WIDTH = 80
DPI = 150
SUFFIXES = (".png", ".svg", ".pdf")
LENGTHS = (
    "comma-separated (default: T,2T,4T,8T without those of 4T and 8T that the text "
    "is too short for)"
)


def parser():
    """Return the argument parser of ``python -m posenc``."""
    top = argparse.ArgumentParser(
        prog="python -m posenc",
        description="Positional encodings for transformers on the CPU.",
    )
    top.add_argument("--version", action="version", version=f"posenc {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_extend(commands)
    add_plot(commands)
    return top


def add_extend(commands):
    """Add the parser of ``extend``."""
    methods = listed(_extend.METHODS)
    extend = commands.add_parser(
        "extend",
        help="compare ways to extend the context of a model, on real text",
        description=EXTEND.format(methods=methods, exponent=_extend.ALPHA_EXPONENT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = extend.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder of a transformers checkpoint with a causal language model that "
        "uses RoPE (default: the small byte-level Llama that comes with posenc)",
    )
    add(
        "--text",
        metavar="FILE",
        help="text to read (default: held-out text that comes with posenc)",
    )
    add(
        "--methods",
        metavar="NAMES",
        help="comma-separated (default: the first six, without ntk where posenc.hf "
        "does not know the model)",
    )
    add("--lengths", metavar="L,L,...", help=LENGTHS)
    add("--alpha", type=float, metavar="A", help="NTK alpha for every length past T")
    add(
        "--factors",
        metavar="FILE",
        help="JSON with the short_factor and long_factor of longrope, such as the "
        "config.json of a model that has them (default: those of the model)",
    )
    add(
        "--windows",
        type=int,
        default=_extend.N_WINDOW,
        metavar="N",
        help="how many windows of the text to read (default: %(default)s)",
    )
    add("--threads", type=int, metavar="N", help="threads for the model")
    add(
        "--plot",
        metavar="FILE",
        help="write a figure, loss over position (PNG, SVG, PDF)",
    )
    add("--json", metavar="FILE", help="write all numbers")
    extend.set_defaults(run=run_extend)


def add_plot(commands):
    """Add the parser of ``plot``."""
    pictures = {k: v.help for k, v in _plot_command.PICTURES.items()}
    plot = commands.add_parser(
        "plot",
        help="draw a picture of an encoding",
        description=PLOT.format(pictures=listed(pictures)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    add = plot.add_argument
    add("name", metavar="NAME", help="which picture, see above")
    add("-o", "--output", metavar="FILE", required=True, help="PNG, SVG or PDF")
    for name, (kind, metavar, text) in PLOT_OPTIONS.items():
        defaults = _plot_command.defaults(name)
        add(f"--{name}", type=kind, metavar=metavar, help=f"{text}: {defaults}")
    plot.set_defaults(run=run_plot)


def listed(items):
    """Return names and what they mean, one a line, for a help text."""
    width = max(map(len, items))
    return "\n".join(
        textwrap.fill(f"  {k:{width}} {v}", WIDTH, subsequent_indent=" " * (width + 3))
        for k, v in items.items()
    )


def run_extend(args):
    """Measure, print the tables and the sentence, write the files asked for."""
    check_outputs(args)
    print("loading\u2026", file=sys.stderr, flush=True)
    set_threads(args.threads)
    report = _extend.extend(
        args.model,
        args.text,
        args.methods,
        args.lengths,
        alpha=args.alpha,
        factors=args.factors,
        n_window=args.windows,
    )
    print(_extend_report.tables(report))
    print()
    print(_extend_report.conclusion(report))
    if args.json:
        with writing("json", args.json):
            Path(args.json).write_text(_extend_report.to_json(report), encoding="utf-8")
    if args.plot:
        with writing("plot", args.plot):
            options = argparse.Namespace(json=report, length=None)
            figure = _plot_command.draw("extension", options)
            figure.savefig(args.plot, dpi=DPI)


def run_plot(args):
    """Draw a picture and write it."""
    options = _plot_command.check(args)
    check_picture("output", args.output, "plot")
    figure = _plot_command.draw(args.name, options)
    with writing("output", args.output, "plot"):
        figure.savefig(args.output, dpi=DPI)


@contextlib.contextmanager
def writing(name, path, command="extend"):
    """Turn the error of a file that cannot be written into one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        rule = "be a file that can be written"
        _extend.refuse(name, rule, f"{path!r} ({why})", command)


def check_outputs(args):
    """Refuse a file that cannot be written before the measuring starts."""
    if args.plot is not None:
        check_picture("plot", args.plot)
    if args.json is not None:
        check_output("json", args.json)


def check_picture(name, path, command="extend"):
    """Refuse a picture that cannot be drawn or written."""
    _extend.require("matplotlib", "plot", command)
    if Path(path).suffix.lower() not in SUFFIXES:
        _extend.refuse(name, "end in .png, .svg or .pdf", repr(path), command)
    check_output(name, path, command)


def check_output(name, path, command="extend"):
    """Refuse a file that cannot be written."""
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        _extend.refuse(name, "be a file in an existing folder", repr(path), command)
    with writing(name, path, command):
        try_to_write(Path(path))


def try_to_write(path):
    """Open a file for writing and leave it, or its absence, as it was."""
    is_new = not path.exists()
    with path.open("ab"):
        pass
    if is_new:
        path.resolve().unlink()


def set_threads(n_thread):
    """Set the threads of the model and of posenc."""
    if n_thread is None:
        return
    if n_thread < 1:
        _extend.refuse("threads", "be at least 1", repr(n_thread))
    from . import set_num_threads

    _extend.require("torch", "hf").set_num_threads(n_thread)
    set_num_threads(n_thread)


def main(argv=None):
    """Run the command line and return the exit status."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except _extend.ExtendError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
