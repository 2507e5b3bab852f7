"""``posenc.plot`` and ``python -m posenc plot``: what is drawn, written and refused."""

# SPDX-License-Identifier: BSD-3-Clause

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib import colormaps, pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import posenc
from posenc import __main__, _extend, _plot_axes, _plot_command, _plot_extension, plot

T5 = np.random.default_rng(0).standard_normal((32, 3))
BIAS = posenc.t5_bias(T5, range(6), range(6))
WORDS = ["I", "came", ".", "I", "saw", ".", "I"]
COPE = posenc.cope_positions([float(word == ".") for word in WORDS], 8)[None]
BASES = {"a": posenc.rope_inv_freq(16)[0], "b": posenc.rope_inv_freq(16, theta=5e5)[0]}
PNG, PDF = b"\x89PNG", b"%PDF"


@pytest.fixture(autouse=True)
def no_figures():
    pyplot.close("all")
    yield
    pyplot.close("all")


@pytest.fixture
def axes():
    return Figure().add_subplot()


def run(method, length, *values):
    """One run as the JSON of extend holds it; ranges of four positions."""
    curve = [
        {"start": 4 * i + 4, "stop": 4 * i + 8, "value": v}
        for i, v in enumerate(values)
    ]
    return {"method": method, "length": length, "curve": curve}


def report(*runs):
    return {"unit": "bits per byte", "trained_length": 8, "runs": list(runs)}


REPORT = report(
    run("none", 8, 2.0), run("none", 16, 2, 5, 6), run("window", 16, 2, 2.5, 2.25)
)

# Every picture with the labels of its axes and, of maps, of the bar.
CALLS = {
    "table": (
        lambda **kw: plot.plot_table(posenc.sinusoidal(range(9), 6), **kw),
        ["channel", "position (tokens)", "entry (no unit)"],
    ),
    "decay": (
        lambda **kw: plot.plot_decay(BASES, **kw),
        ["distance (tokens)", "sum of cosines (logits)"],
    ),
    "wavelengths": (
        lambda **kw: plot.plot_wavelengths(BASES, 100, **kw),
        ["channel pair", "wavelength (tokens per turn)"],
    ),
    "similarity": (
        lambda **kw: plot.plot_similarity(8, range(7), **kw),
        ["position (tokens)", "position (tokens)", "product of rows (no unit)"],
    ),
    "bias": (
        lambda **kw: plot.plot_bias(BIAS, **kw),
        ["key (tokens)", "query (tokens)", "bias (logits)"],
    ),
    "cope_positions": (
        lambda **kw: plot.plot_cope_positions(COPE, **kw),
        ["key (tokens)", "query (tokens)", "contextual position (sum of gates)"],
    ),
    "cope_positions of a query": (
        lambda **kw: plot.plot_cope_positions(COPE, query=0, **kw),
        ["key (tokens)", "contextual position (sum of gates)"],
    ),
    "extension": (
        lambda **kw: plot.plot_extension(REPORT, **kw),
        ["position in the text (bytes)", "bits per byte (lower is better)"],
    ),
}
each = pytest.mark.parametrize("name", CALLS)


def labels_of(axes):
    bars = [image.colorbar.ax.get_ylabel() for image in axes.images]
    return [axes.get_xlabel(), axes.get_ylabel(), *bars]


def shown(axes):
    """The array of a map."""
    (image,) = axes.images
    return image.get_array()


def end_labels(axes):
    """Names of the curves, from the lowest."""
    texts = [text for text in axes.texts if text.arrow_patch is not None]
    return [text.get_text() for text in sorted(texts, key=lambda t: t.xyann[1])]


# --- every picture -------------------------------------------------------------------


def test_every_function_is_here():
    assert {f"plot_{name.split()[0]}" for name in CALLS} == set(plot.__all__)


@each
def test_axes_are_labelled_with_units(name, axes):
    draw, labels = CALLS[name]
    assert draw(axes=axes) is axes
    assert labels_of(axes) == labels
    assert axes.get_title(loc="left")


@each
def test_given_axes_are_used_and_pyplot_left_alone(name, axes):
    CALLS[name][0](axes=axes)
    assert pyplot.get_fignums() == []
    axes.figure.draw_without_rendering()


@each
def test_own_figure_is_one_that_pyplot_shows(name):
    axes = CALLS[name][0]()
    assert isinstance(axes, Axes)
    assert pyplot.gcf() is axes.figure
    assert pyplot.get_fignums() == [axes.figure.number]


@each
def test_nothing_lies_outside_the_figure(name):
    """Names beside the axes, bars and titles find room."""
    figure = CALLS[name][0]().figure
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= width and box.y1 <= height


@each
def test_axes_must_be_axes(name):
    says = r"plot_\w+: axes must be the Axes of a matplotlib figure; got ndarray"
    with pytest.raises(TypeError) as caught:
        CALLS[name][0](axes=np.array([None]))
    assert re.fullmatch(says, str(caught.value))
    assert pyplot.get_fignums() == []


# --- black and white -----------------------------------------------------------------


def lightness(colors):
    """CIE L* of sRGB colours (n, 3)."""
    colors = np.asarray(colors)
    linear = np.where(
        colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4
    )
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def test_maps_get_lighter_evenly():
    steps = np.diff(lightness(colormaps[_plot_axes.COLOR_MAP](np.arange(256))[:, :3]))
    assert (steps > 0).all()
    assert steps.max() < 3 * steps.mean()


@each
def test_maps_use_that_colormap(name, axes):
    for image in CALLS[name][0](axes=axes).images:
        assert image.get_cmap().name == _plot_axes.COLOR_MAP


def test_lines_differ_in_more_than_colour():
    looks = [_plot_axes.look(i) for i in range(len(_plot_axes.LOOKS) ** 2)]
    assert len({(color, dashes) for color, dashes, _ in looks}) == len(looks)
    first = looks[: len(_plot_axes.LOOKS)]
    for kind in range(3):
        assert len({look[kind] for look in first}) == len(first)


def test_lines_are_dark_enough_on_white():
    """White is 100, the ground past the trained length 96."""
    for color, _, _ in _plot_axes.LOOKS:
        assert lightness([to_rgb(color)])[0] < 76


def test_methods_of_extension_have_looks_of_their_own():
    assert sorted(_plot_extension.ORDER) == sorted(_extend.METHODS)
    assert len(_plot_extension.ORDER) <= len(_plot_axes.LOOKS)


def test_labels_keep_apart():
    places = _plot_axes.spread([0.1, 0.1, 0.11, 0.9], 0.05)
    assert np.diff(places).min() == pytest.approx(0.05)
    assert places[-1] == 0.9
    assert sum(places[:3]) == pytest.approx(0.31)


def test_names_of_curves_do_not_overlap(axes):
    same = {str(i): posenc.rope_inv_freq(16)[0] for i in range(9)}
    plot.plot_decay(same, axes=axes)
    axes.figure.draw_without_rendering()
    texts = [text for text in axes.texts if text.arrow_patch is not None]
    boxes = sorted(t.get_window_extent().intervaly.tolist() for t in texts)
    assert len(boxes) == 9
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(boxes))


# --- what is drawn -------------------------------------------------------------------


def test_table_is_the_table(axes):
    table = posenc.sinusoidal(range(9), 6)
    plot.plot_table(table, axes=axes)
    assert (shown(axes) == table).all()
    assert axes.get_xlim() == (-0.5, 5.5)
    assert axes.get_ylim() == (8.5, -0.5)  # the first position on top


def test_table_stands_at_its_positions(axes):
    positions = np.arange(1000, 1018, 2)
    plot.plot_table(posenc.sinusoidal(positions, 6), positions=positions, axes=axes)
    assert axes.get_ylim() == (1017, 999)


def test_uneven_positions_are_named(axes):
    positions = [0, 1, 2, 0, 1, 70]
    plot.plot_table(posenc.sinusoidal(positions, 6), positions=positions, axes=axes)
    assert axes.get_ylim() == (5.5, -0.5)
    name = axes.yaxis.get_major_formatter()
    assert [name(i) for i in (-1, 0, 3, 5, 6)] == ["", "0", "0", "70", ""]


def test_tensors_with_gradients_are_drawn(axes):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.bfloat16))
    plot.plot_table(weight, axes=axes)
    assert (shown(axes) == weight.detach().double().numpy()).all()


def test_decay_is_rope_decay(axes):
    distance = np.linspace(-5, 50, 99)
    plot.plot_decay(BASES, distance, axes=axes)
    for line, inv_freq in zip(axes.lines, BASES.values(), strict=True):
        assert (line.get_xdata() == distance).all()
        assert (line.get_ydata() == posenc.rope_decay(distance, inv_freq)).all()
    assert end_labels(axes) == ["a", "b"]


def test_wavelengths_are_told_apart_by_the_length(axes):
    plot.plot_wavelengths(BASES, 100, axes=axes)
    _, *lines = axes.lines
    for i, inv_freq in enumerate(BASES.values()):
        curve, within, past = lines[3 * i : 3 * i + 3]
        tokens = posenc.wavelengths(inv_freq)
        assert (curve.get_ydata() == tokens).all()
        assert (within.get_ydata() == tokens[tokens <= 100]).all()
        assert (past.get_ydata() == tokens[tokens > 100]).all()
        assert past.get_markerfacecolor() == "white" != within.get_markerfacecolor()
    counts = [posenc.complete_turns(f, 100) for f in BASES.values()]
    assert end_labels(axes) == [
        f"{k}: {n} of 8 turn" for k, n in zip(BASES, counts, strict=True)
    ]


def test_wavelengths_of_pairs_that_do_not_turn_are_left_out(axes):
    plot.plot_wavelengths({"a": [1.0, 0.0], "b": [0.0]}, 100, axes=axes)
    axes.figure.draw_without_rendering()
    assert end_labels(axes) == ["b: 0 of 1 turn", "a: 1 of 2 turn"]


def test_similarity_is_that_of_the_rows(axes):
    plot.plot_similarity(8, range(7), theta=100.0, axes=axes)
    wanted = posenc.sinusoidal_similarity(range(7), range(7), 8, theta=100.0)
    assert (shown(axes) == wanted).all()


@pytest.mark.parametrize("head", [0, 2])
def test_bias_is_that_of_the_head(axes, head):
    plot.plot_bias(BIAS, head=head, axes=axes)
    assert (shown(axes) == BIAS[head]).all()
    assert axes.get_title(loc="left") == f"Bias of head {head}"


def test_bias_of_one_head_and_its_positions(axes):
    plot.plot_bias(BIAS[0, 4:], q_positions=[4, 5], axes=axes)
    assert (shown(axes) == BIAS[0, 4:]).all()
    assert axes.get_ylim() == (5.5, 3.5)


def test_masked_keys_are_hatched(axes):
    bias = np.where(np.tri(6, dtype=bool), BIAS[0], -np.inf)
    plot.plot_bias(bias, axes=axes)
    assert (shown(axes).mask == ~np.tri(6, dtype=bool)).all()
    assert axes.patch.get_hatch()
    assert np.isfinite(axes.images[0].get_clim()).all()


def test_contextual_positions_are_those_given(axes):
    positions = np.triu(np.ones((3, 7))).cumsum(1)
    plot.plot_cope_positions(positions, labels=WORDS, axes=axes)
    assert (shown(axes) == positions).all()
    assert [t.get_text() for t in axes.get_xticklabels()] == WORDS
    assert [t.get_text() for t in axes.get_yticklabels()] == WORDS[-3:]


def test_contextual_positions_of_a_query(axes):
    plot.plot_cope_positions(COPE, query=0, labels=WORDS, axes=axes)
    (line,) = axes.lines
    assert (line.get_ydata() == COPE[0]).all()
    assert [t.get_text() for t in axes.get_xticklabels()] == WORDS


def test_extension_draws_the_longest_length(axes):
    plot.plot_extension(REPORT, axes=axes)
    none, window, trained = axes.lines
    assert list(none.get_ydata()) == [2, 5, 6]
    assert list(window.get_ydata()) == [2, 2.5, 2.25]
    assert none.get_xdata() == pytest.approx(np.sqrt([4 * 8, 8 * 12, 12 * 16]))
    assert set(trained.get_xdata()) == {8}
    assert end_labels(axes) == ["window 2.25", "none 6.00"]


def test_extension_draws_the_length_asked_for(axes):
    plot.plot_extension(REPORT, length=8, axes=axes)
    (none,) = axes.lines
    assert list(none.get_ydata()) == [2]
    assert axes.get_title(loc="left") == "Reading 8 bytes with a model trained on 8"


@pytest.mark.parametrize("kind", [str, Path])
def test_extension_is_read_from_a_file(kind, tmp_path, axes):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT))
    plot.plot_extension(kind(path), axes=axes)
    assert end_labels(axes) == ["window 2.25", "none 6.00"]


def test_extension_of_tokens_is_in_perplexity(axes):
    plot.plot_extension({**REPORT, "unit": "perplexity"}, axes=axes)
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "perplexity (lower is better)"
    assert axes.get_xlabel() == "position in the text (tokens)"


def test_extension_takes_what_extend_returns_and_writes(tmp_path, axes):
    losses = np.log(2) * np.arange(1.0, 64.0)[None]
    runs = [_extend.Run("none", 64, {}, losses)]
    given = _extend.Report("m", "t", "bits per byte", 16, 1, ["none"], [64], runs)
    plot.plot_extension(given, axes=axes)
    ranges = [(32, 38), (38, 45), (45, 54), (54, 64)]
    means = [np.arange(a, b).mean() for a, b in ranges]  # at position p the loss is p
    assert axes.lines[0].get_ydata() == pytest.approx(means)
    path = tmp_path / "report.json"
    path.write_text(__main__._extend_report.to_json(given))
    again = plot.plot_extension(path, axes=Figure().add_subplot())
    assert (again.lines[0].get_ydata() == axes.lines[0].get_ydata()).all()


# --- what is refused -----------------------------------------------------------------

REPORT_RULE = (
    "plot_extension: report must be what `python -m posenc extend --json` writes"
)
REFUSED = [
    (
        lambda: plot.plot_table([1.0, 2.0]),
        "ValueError: plot_table: table must be of 2 dimensions and not be empty; got "
        "shape (2,)",
    ),
    (
        lambda: plot.plot_table(np.ones((0, 4))),
        "ValueError: plot_table: table must be of 2 dimensions and not be empty; got "
        "shape (0, 4)",
    ),
    (
        lambda: plot.plot_table(["a"]),
        "TypeError: plot_table: table must hold real numbers that float64 can hold; "
        "got dtype <U1",
    ),
    (
        lambda: plot.plot_table(np.ones((3, 4)), positions=[0, 1]),
        "ValueError: plot_table: positions must have 3 entries, one for each row or "
        "column; got 2 entries",
    ),
    (
        lambda: plot.plot_decay([1.0, 2.0]),
        "TypeError: plot_decay: inv_freqs must be a dict of labels and frequencies; "
        "got list",
    ),
    (
        lambda: plot.plot_decay({}),
        "ValueError: plot_decay: inv_freqs must be a dict of labels and frequencies; "
        "got an empty one",
    ),
    (
        lambda: plot.plot_decay({"a": 1.0}),
        "ValueError: plot_decay: inv_freqs['a'] must be of 1 dimension and not be "
        "empty; got shape ()",
    ),
    (
        lambda: plot.plot_decay(BASES, 5.0),
        "ValueError: plot_decay: distance must be of 1 dimension and not be empty; got "
        "shape ()",
    ),
    (
        lambda: plot.plot_decay(BASES, [5, 1, 3]),
        "ValueError: plot_decay: distance must be ascending; got [5. 1. 3.]",
    ),
    (
        lambda: plot.plot_wavelengths(BASES["a"], 5),
        "TypeError: plot_wavelengths: inv_freqs must be a dict of labels and "
        "frequencies; got ndarray",
    ),
    (
        lambda: plot.plot_wavelengths(BASES, 0),
        "ValueError: plot_wavelengths: length must be a positive number; got 0.0",
    ),
    (
        lambda: plot.plot_wavelengths(BASES, "4096"),
        "TypeError: plot_wavelengths: length must be a positive number; got '4096'",
    ),
    (
        lambda: plot.plot_similarity(0),
        "ValueError: plot_similarity: dim must be a whole number of at least 1; got 0",
    ),
    (
        lambda: plot.plot_similarity(theta=-1.0),
        "ValueError: plot_similarity: theta must be a positive number; got -1.0",
    ),
    (
        lambda: plot.plot_similarity(8, 100),
        "ValueError: plot_similarity: positions must be of 1 dimension and not be "
        "empty; got shape ()",
    ),
    (
        lambda: plot.plot_bias(T5[0]),
        "ValueError: plot_bias: bias must be of 2 or 3 dimensions and not be empty; "
        "got shape (3,)",
    ),
    (
        lambda: plot.plot_bias(BIAS, head=3),
        "ValueError: plot_bias: head must be less than the number of heads, 3; got 3",
    ),
    (
        lambda: plot.plot_bias(BIAS, head=-1),
        "ValueError: plot_bias: head must be a whole number of at least 0; got -1",
    ),
    (
        lambda: plot.plot_bias(BIAS, k_positions=[1]),
        "ValueError: plot_bias: k_positions must have 6 entries, one for each row or "
        "column; got 1 entries",
    ),
    (
        lambda: plot.plot_cope_positions(COPE[0]),
        "ValueError: plot_cope_positions: positions must be of 2 dimensions and not be "
        "empty; got shape (7,)",
    ),
    (
        lambda: plot.plot_cope_positions(COPE, query=1),
        "ValueError: plot_cope_positions: query must be less than the number of "
        "queries, 1; got 1",
    ),
    (
        lambda: plot.plot_cope_positions(COPE, labels=["a"]),
        "ValueError: plot_cope_positions: labels must have 7 entries, one for each "
        "key; got 1 entries",
    ),
    (lambda: plot.plot_extension(5), f"TypeError: {REPORT_RULE}; got int"),
    (lambda: plot.plot_extension({}), f"ValueError: {REPORT_RULE}; got dict"),
    (
        lambda: plot.plot_extension(report()),
        f"ValueError: {REPORT_RULE}; got dict",
    ),
    (
        lambda: plot.plot_extension(report(run("magic", 16, 1.0))),
        f"ValueError: {REPORT_RULE}; got dict",
    ),
    (
        lambda: plot.plot_extension(report(run("none", 16))),
        f"ValueError: {REPORT_RULE}; got dict",
    ),
    (
        lambda: plot.plot_extension(REPORT, length=7),
        "ValueError: plot_extension: length must be among those measured, 8, 16; got 7",
    ),
]


@pytest.mark.parametrize(("call", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_refused(call, says):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert f"{caught.type.__name__}: {caught.value}" == says
    assert pyplot.get_fignums() == []


def test_refused_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as caught:
        plot.plot_bias(BIAS)
    says = "plot_bias: matplotlib must be installed: pip install 'posenc[plot]'; got "
    assert str(caught.value).startswith(says)


# --- the command ---------------------------------------------------------------------


def command(*arguments):
    return __main__.main(["plot", *map(str, arguments)])


@pytest.fixture
def json_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT))
    return path


@pytest.mark.parametrize("name", _plot_command.PICTURES)
@pytest.mark.parametrize("suffix", ["png", "SVG", "pdf"])
def test_command_writes_every_picture(name, suffix, tmp_path, json_file, capsys):
    path = tmp_path / f"picture.{suffix}"
    options = ["--json", json_file] if name == "extension" else []
    assert command(name, "-o", path, *options) == 0
    assert capsys.readouterr() == ("", "")
    start = path.read_bytes()[:400]
    wanted = {"png": PNG, "SVG": b"<?xml", "pdf": PDF}[suffix]
    assert start.startswith(wanted)
    assert pyplot.get_fignums() == []


def figure_of(name, **given):
    """The figure that the command line draws."""
    args = dict.fromkeys(_plot_command.NAMES) | given
    options = _plot_command.check(__main__.argparse.Namespace(name=name, **args))
    return _plot_command.draw(name, options)


@pytest.mark.parametrize(
    "name", [n for n in _plot_command.PICTURES if n != "extension"]
)
def test_command_leaves_room_for_everything(name):
    figure = figure_of(name)
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= width and box.y1 <= height


def test_command_uses_the_options():
    (axes,) = figure_of("table", dim=6, length=9, theta=100.0).axes
    assert (shown(axes) == posenc.sinusoidal(range(9), 6, theta=100.0)).all()
    (axes,) = figure_of("similarity", dim=6, length=9, theta=100.0).axes
    assert shown(axes)[0, 0] == 3
    (axes,) = figure_of("wavelengths", dim=6, length=9, theta=100.0).axes
    inv_freq, _ = posenc.rope_inv_freq(6, theta=100.0)
    assert (axes.lines[1].get_ydata() == posenc.wavelengths(inv_freq)).all()
    assert len(end_labels(axes)) == 4
    (axes,) = figure_of("decay", dim=6, length=90, theta=100.0).axes
    line = axes.lines[0]
    assert (line.get_ydata() == posenc.rope_decay(line.get_xdata(), inv_freq)).all()
    assert line.get_xdata()[-1] == 90
    assert shown(figure_of("t5_bias", length=5).axes[1]).shape == (5, 5)
    panels = figure_of("alibi_bias", length=5, heads=8).axes
    assert [shown(axes)[4, 0] for axes in panels] == [-4 / 2, -4 / 8, -4 / 32]


def test_command_draws_the_four_cases_of_decay():
    alike, narrow, wide, widest = figure_of("decay").axes
    x = alike.lines[0].get_xdata()
    zero, one, _ = (line.get_ydata() for line in alike.lines)
    assert (zero == 128).all()
    assert one == pytest.approx(128 * np.cos(x), abs=1e-9)  # the sum of 64 rounded ones
    marks = [
        [text.get_text() for text in axes.texts if "T" in text.get_text()]
        for axes in (narrow, wide, widest)
    ]
    quarter = "\u00bc T"
    assert marks == [
        [f"{quarter} = 157", "T = 628"],
        [f"{quarter} = 14617 (base 10000)"],
        [f"{quarter} = 15637 (base 10000)"],
    ]


def test_command_says_what_is_not_trained():
    _, right = figure_of("t5_bias").axes
    assert "random" in right.get_title(loc="left")
    left, _ = figure_of("cope_positions").axes
    assert "by hand" in left.get_title(loc="left")


def test_command_counts_sentences():
    left, right = figure_of("cope_positions").axes
    words = _plot_command.TEXT.split()
    wanted = [words[i:].count(".") for i in range(len(words))]
    assert list(right.lines[0].get_ydata()) == wanted
    assert list(shown(left)[-1]) == wanted


def test_extension_runs_the_shipped_model_without_json(tmp_path, monkeypatch):
    monkeypatch.setattr(_extend, "extend", lambda: REPORT)
    path = tmp_path / "picture.png"
    assert command("extension", "-o", path) == 0
    assert path.read_bytes().startswith(PNG)


def test_no_display_is_needed(tmp_path):
    """Not even where a backend is asked for that needs one."""
    code = [sys.executable, "-m", "posenc", "plot", "alibi_bias", "-o", "a.png"]
    done = subprocess.run(
        code, cwd=tmp_path, env={"MPLBACKEND": "tkagg", "PATH": "", **path_of_posenc()},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a.png").exists()


def path_of_posenc():
    return {"PYTHONPATH": str(Path(posenc.__file__).parent.parent)}


def test_help_names_every_picture_and_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        command("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in _plot_command.PICTURES:
        assert re.search(rf"^  {name} +\w", text, re.MULTILINE)
    for name in _plot_command.NAMES:
        assert f"--{name} " in text
    assert max(map(len, text.splitlines())) <= 80


def refused(capsys, *arguments):
    """Run a command that must fail, and return its one line on stderr."""
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "magic -o a.png",
            "plot: name must be one of table, decay, wavelengths, similarity, t5_bias, "
            "alibi_bias, cope_positions, extension; got 'magic'",
        ),
        (
            "table -o a.txt",
            "plot: output must end in .png, .svg or .pdf; got 'a.txt'",
        ),
        ("table -o png", "plot: output must end in .png, .svg or .pdf; got 'png'"),
        (
            "table -o no/such/folder/a.png",
            "plot: output must be a file in an existing folder; got "
            "'no/such/folder/a.png'",
        ),
        (
            "table -o link.png",
            "plot: output must be a file that can be written; got 'link.png' (No such "
            "file or directory)",
        ),
        (
            "table -o a.png --heads 8",
            "plot: heads must be left out for table; got 8",
        ),
        ("table -o a.png --dim 1", "plot: dim must be from 2 to 4096; got 1"),
        (
            "table -o a.png --length 5000",
            "plot: length must be from 2 to 4096; got 5000",
        ),
        (
            "table -o a.png --theta 1",
            "plot: theta must be more than 1 and at most 1e+12; got 1.0",
        ),
        (
            "decay -o a.png --theta nan",
            "plot: theta must be more than 1 and at most 1e+12; got nan",
        ),
        ("decay -o a.png --dim 7", "plot: dim must be even; got 7"),
        (
            "wavelengths -o a.png --dim 2",
            "plot: dim must be even and at least 4; got 2",
        ),
        ("alibi_bias -o a.png --heads 0", "plot: heads must be from 1 to 1024; got 0"),
        (
            "extension -o a.png --json nowhere.json",
            "plot: json must be a readable file; got 'nowhere.json' (No such file or "
            "directory)",
        ),
        (
            "extension -o a.png --json text.json",
            f"{REPORT_RULE}; got 'text.json' (Expecting value: line 1 column 1 "
            "(char 0))",
        ),
        (
            "extension -o a.png --json report.json --length 9",
            "plot_extension: length must be among those measured, 8, 16; got 9",
        ),
    ],
)
def test_command_refuses(arguments, says, tmp_path, monkeypatch, capsys, json_file):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("text")
    Path("link.png").symlink_to("no/folder.png")
    before = sorted(tmp_path.iterdir())
    assert refused(capsys, *arguments.split()) == says
    assert sorted(tmp_path.iterdir()) == before


def test_command_refuses_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused(capsys, "table", "-o", tmp_path / "a.png") == (
        "plot: matplotlib must be installed (pip install 'posenc[plot]'); got no such "
        "module"
    )


@pytest.mark.parametrize("arguments", [[], ["table"], ["-o", "a.png"]])
def test_command_wants_a_name_and_a_file(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 2
    assert "required: " in capsys.readouterr().err.splitlines()[-1]
