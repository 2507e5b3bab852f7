"""``python -m posenc extend``: what it measures, says, writes and refuses."""

# SPDX-License-Identifier: BSD-3-Clause

import json
import math
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from posenc import (  # noqa: E402
    __main__,
    __version__,
    _extend,
    _extend_report,
    rope_inv_freq,
)

TRAINED = 16
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
FACTORS = {
    "type": "su",
    "short_factor": [1.0, 1.0, 1.1, 1.2],
    "long_factor": [1.0, 1.5, 3.0, 4.0],
}
# Losses of one model read in other batches or under a mask differ by float32 rounding
# of sums of a few hundred terms; a wrong mask or frequency changes them by over 1e-2.
ROUNDING = 1e-4


def save_tiny(folder, family="Llama", **changes):
    """Save a small random model and return its folder."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": TRAINED,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    config = getattr(transformers, f"{family}Config")(**settings)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    words = np.random.default_rng(0).choice(WORDS, 200)
    path.write_text(" ".join(words))
    return path


def quiet(*args, **options):
    return _extend.extend(*args, progress=False, **options)


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    """Longrope for the four pairs of the tiny model, as a config.json has it."""
    path = tmp_path_factory.mktemp("factors") / "config.json"
    path.write_text(json.dumps({"model_type": "phi3", "rope_scaling": FACTORS}))
    return path


@pytest.fixture(scope="module")
def report(tiny, text, factors):
    methods = ",".join(_extend.METHODS)
    return quiet(tiny, text, methods, "16,32,64", n_window=3, factors=factors)


# --- what is measured ----------------------------------------------------------------


def test_report_has_a_run_for_every_method_and_length(report):
    wanted = [(m, n) for m in _extend.METHODS for n in (16, 32, 64)]
    assert [(r.method, r.length) for r in report.runs] == wanted
    assert all(r.loss.shape == (3, r.length - 1) for r in report.runs)
    assert (report.unit, report.trained) == ("bits per byte", TRAINED)


@pytest.mark.parametrize("method", _extend.METHODS)
def test_up_to_the_trained_length_every_method_is_the_model_itself(report, method):
    loss = report.run(method, TRAINED).loss
    assert np.abs(loss - report.run("none", TRAINED).loss).max() < ROUNDING


def test_losses_are_those_of_transformers(report, tiny, text):
    model = transformers.LlamaForCausalLM.from_pretrained(tiny)
    tokens = np.frombuffer(text.read_bytes(), np.uint8).astype(np.int64)
    for row, loss in enumerate(report.run("none", 64).loss):
        start = row * (len(tokens) - 64) // 2
        ids = torch.tensor(tokens[start : start + 64])[None]
        with torch.no_grad():
            wanted = model(input_ids=ids, labels=ids).loss.item()
        assert abs(loss.mean() - wanted) < ROUNDING


def test_ntk_is_a_larger_theta(report, tiny):
    config = _extend.load_config(tiny)
    alpha = report.run("ntk", 64).setting["alpha"]
    assert alpha == _extend.default_alpha(4) > 4
    dim = config.head_dim
    config.rope_parameters["rope_theta"] *= alpha ** (dim / (dim - 2))
    model = _extend.load_model(tiny, config)
    windows = windows_of(report)
    wanted = _extend.token_losses(model, windows)
    assert np.abs(report.run("ntk", 64).loss - wanted).max() < ROUNDING


def windows_of(report):
    """Cut the windows of a report again."""
    raw = np.fromfile(report.text, np.uint8).astype(np.int64)
    return _extend.cut_windows(raw, report.lengths[-1], report.n_window)


@pytest.mark.parametrize("method", _extend.CONFIG_METHODS)
def test_scaled_methods_change_the_losses(report, method):
    change = report.run(method, 64).loss - report.run("none", 64).loss
    assert np.abs(change).max() > 100 * ROUNDING


@pytest.mark.parametrize("method", ["yarn", "ntk_by_parts", "llama3", "longrope"])
def test_frequencies_are_those_of_rope_inv_freq(report, method, tiny, monkeypatch):
    setting, config = report.run(method, 64).setting, _extend.load_config(tiny)
    assert setting["factor"] == 64 / TRAINED
    model = _extend.load_model(tiny, config)
    inv_freq, factor = rope_inv_freq(
        config.head_dim, scaling=setting, seq_len=64, dtype=np.float32
    )
    rotary = model.get_submodule("model.rotary_emb")
    rotary.inv_freq.copy_(torch.from_numpy(inv_freq))
    rotary.attention_scaling = factor
    wanted = _extend.token_losses(model, windows_of(report))
    assert np.abs(report.run(method, 64).loss - wanted).max() < ROUNDING


def test_longrope_takes_the_factors_of_the_model_itself(tmp_path, text, factors):
    own = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **FACTORS}
    del own["type"]
    folder = save_tiny(tmp_path / "own", rope_parameters=own)
    options = {"methods": "longrope", "lengths": "32", "n_window": 1}
    given = quiet(folder, text, **options, factors=factors)
    found = quiet(folder, text, **options)
    assert found.runs[0].setting == given.runs[0].setting
    assert (found.runs[0].loss == given.runs[0].loss).all()


def test_default_methods_are_those_of_the_readme(tiny, text):
    report = quiet(tiny, text, lengths="16", n_window=1)
    assert report.methods == ["none", "window", "linear", "ntk", "dynamic", "yarn"]


def test_dynamic_uses_the_length_it_reads(report, tiny):
    config = _extend.load_config(tiny)
    dim, scale = config.head_dim, 64 / TRAINED
    alpha = scale * scale - (scale - 1)
    config.rope_parameters["rope_theta"] *= alpha ** (dim / (dim - 2))
    wanted = _extend.token_losses(_extend.load_model(tiny, config), windows_of(report))
    assert np.abs(report.run("dynamic", 64).loss - wanted).max() < ROUNDING


def test_window_hides_all_but_the_last_tokens(tmp_path, text):
    """With one layer nothing older can be heard of: it is as in a short text."""
    folder = save_tiny(tmp_path / "one_layer", num_hidden_layers=1)
    report = quiet(folder, text, "window", "64", n_window=2)
    windows = windows_of(report)
    model = _extend.load_model(folder, _extend.load_config(folder))
    for end in (TRAINED, 40, 63):
        short = windows[:, end - TRAINED : end + 1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(short[:, :-1].copy())).logits[:, -1]
        wanted = torch.nn.functional.cross_entropy(
            logits, torch.tensor(short[:, -1].copy()), reduction="none"
        )
        got = report.run("window", 64).loss[:, end - 1]
        assert np.abs(got - wanted.numpy()).max() < ROUNDING


def test_windows_do_not_overlap_and_span_the_text():
    windows = _extend.cut_windows(np.arange(1000), 30, 7)
    assert windows.shape == (7, 30)
    assert windows[0, 0] == 0 and windows[-1, -1] == 999
    assert (np.diff(windows[:, 0]) >= 30).all()
    assert _extend.cut_windows(np.arange(65), 30, 7).shape == (2, 30)


def test_every_window_begins_with_the_token_that_a_tokenizer_puts_first():
    windows = _extend.cut_windows(np.arange(5, 100), 30, 3, first=1)
    assert windows.shape == (3, 30)
    assert (windows[:, 0] == 1).all() and windows[0, 1] == 5


def test_model_with_a_tokenizer_is_measured_in_perplexity(tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["<s>", "?", *sorted(set(WORDS))])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = save_tiny(tmp_path / "words", vocab_size=len(vocabulary))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", unk_token="?"
    ).save_pretrained(folder)
    report = quiet(folder, text, "none,ntk", "32", n_window=4)
    assert report.unit == "perplexity"
    assert report.in_unit(math.log(7)) == pytest.approx(7)
    assert "perplexity by position" in _extend_report.tables(report)


def test_model_that_the_patch_does_not_know_goes_without_ntk(tmp_path, text):
    folder = save_tiny(tmp_path / "other", family="Gemma", head_dim=8)
    report = quiet(folder, text, lengths="32", n_window=1)
    assert report.methods == [m for m in _extend.DEFAULT_METHODS if m != "ntk"]
    assert "\nntk left out: patch: model must " in _extend_report.tables(report)
    assert "one window" in _extend_report.conclusion(report)
    assert "(1 window; trained" in _extend_report.tables(report)
    with pytest.raises(_extend.ExtendError, match="methods must leave out ntk for"):
        quiet(folder, text, "none,ntk", "32", n_window=1)


@pytest.mark.parametrize(
    ("trained", "length", "wanted"),
    [
        (256, 100, [(0, 100)]),
        (256, 256, [(0, 256)]),
        (256, 1500, [(0, 256), (256, 512), (512, 1024), (1024, 1500)]),
    ],
)
def test_buckets_double_past_the_trained_length(trained, length, wanted):
    assert _extend.buckets(trained, length) == wanted


def test_default_lengths_come_from_the_trained_length():
    assert _extend.parse_lengths(None, 100) == [100, 200, 400, 800]
    assert _extend.parse_lengths("64, 32,64", 100) == [32, 64]


def test_default_lengths_are_those_that_the_text_can_hold(tiny, text):
    lengths = [100, 200, 400, 800]
    for n_token, n_kept in [(800, 4), (799, 3), (399, 2), (150, 2)]:
        assert _extend.lengths_that_fit(lengths, n_token) == lengths[:n_kept]
    short = text.with_name("short.txt")
    short.write_text("word " * 14)
    assert quiet(tiny, short, "none").lengths == [16, 32, 64]


# --- the closing sentence ------------------------------------------------------------


def made_up(trained=4, length=8, n_window=6, **bits):
    """Report with a made-up mean per method; what is named ``*_noisy`` varies."""
    noise = np.resize([-1.0, 1.0], n_window)[:, None]
    runs = []
    for name, value in bits.items():
        method = name.removesuffix("_noisy")
        loss = np.full((n_window, length - 1), value * math.log(2))
        loss += noise * (name != method)
        setting = {"window": trained} if method == "window" else {}
        runs.append(_extend.Run(method, length, setting, loss))
    methods = [run.method for run in runs]
    return _extend.Report(
        "m", "t", "bits per byte", trained, n_window, methods, [length], runs
    )


START = "Without fine-tuning, past position 4 of 8, "


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        (
            {"none": 5, "window": 1, "linear": 6, "ntk": 3, "yarn": 2},
            "yarn helped most: bits per byte fell from 5.00 to 2.00; ntk (3.00) helped "
            "too; linear (6.00) made it worse; a plain sliding window of 4 (1.00) "
            "is better still",
        ),
        (
            {"none": 5, "window": 3, "ntk": 2},
            "ntk helped most: bits per byte fell from 5.00 to 2.00; ntk also beats a "
            "plain sliding window of 4 (3.00)",
        ),
        (
            {"none": 5, "linear": 6, "yarn": 7},
            "nothing helped: bits per byte of the unchanged model is 5.00; linear "
            "(6.00) and yarn (7.00) made it worse",
        ),
        (
            {"none": 5, "ntk_noisy": 4.9, "window": 4.8},
            "nothing helped: bits per byte of the unchanged model is 5.00; ntk (4.90) "
            "made no difference; a plain sliding window of 4 (4.80) is as good",
        ),
        (
            {"none": 5, "window": 3},
            "window helped most: bits per byte fell from 5.00 to 3.00",
        ),
        (
            {"ntk": 3, "yarn": 2},
            "yarn gave the lowest bits per byte (2.00), then ntk (3.00)",
        ),
        ({"none": 5}, "bits per byte of the unchanged model is 5.00"),
        (
            {"none": 8, "ntk": 7.999},
            "nothing helped: bits per byte of the unchanged model is 8.00; ntk (8.00) "
            "made no difference",
        ),
    ],
)
def test_conclusion(bits, says):
    assert _extend_report.conclusion(made_up(**bits)) == f"{START}{says}."


def test_conclusion_from_one_window_says_so():
    says = _extend_report.conclusion(made_up(n_window=1, none=5, ntk=3))
    assert says.endswith("(from one window, which gives no estimate of the noise).")


def test_conclusion_when_nothing_was_extended():
    says = _extend_report.conclusion(made_up(trained=8, none=5, ntk=3))
    assert says == (
        "Nothing was extended: the longest length, 8, does not reach past the trained "
        "length, 8."
    )


# --- the command ---------------------------------------------------------------------


def test_command_prints_tables_and_writes_files(tiny, text, tmp_path, capsys):
    numbers, picture = tmp_path / "r.json", tmp_path / "r.png"
    pytest.importorskip("matplotlib")
    options = ["--methods", "none,window,ntk", "--lengths", "16,48", "--windows", "2"]
    files = ["--json", str(numbers), "--plot", str(picture)]
    command = ["extend", str(tiny), "--text", str(text), *options, *files]
    assert __main__.main(command) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    content = json.loads(numbers.read_text())
    assert ["method", "setting", "0-16", "16-32", "32-48"] in lines
    assert ["method", "16", "48"] in lines
    assert printed.endswith(f"\n\n{content['conclusion']}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    check_content(content, lines)


def check_content(content, lines):
    """Check that the JSON holds what was printed, and more."""
    assert content["unit"] == "bits per byte"
    assert content["trained_length"] == TRAINED
    assert content["n_window"] == 2
    assert len(content["runs"]) == 6
    last = content["runs"][-1]
    assert (last["method"], last["length"]) == ("ntk", 48)
    assert last["setting"]["alpha"] == _extend.default_alpha(3)
    assert [(b["start"], b["stop"]) for b in last["buckets"]] == [
        (0, 16),
        (16, 32),
        (32, 48),
    ]
    values = [f"{b['value']:.2f}" for b in last["buckets"]]
    assert ["ntk", "alpha", f"{_extend.default_alpha(3):.4g}", *values] in lines


def test_version_is_told():
    done = subprocess.run(
        [sys.executable, "-m", "posenc", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"posenc {__version__}\n"


def test_help_names_every_method_and_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = [sys.executable, "-m", "posenc", "extend", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for word in [*_extend.METHODS, "--plot", "--json", "alpha", "perplexity"]:
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 88


# --- what is refused -----------------------------------------------------------------


def refused(capsys, *arguments):
    """Run a command that must fail, and return its one line on stderr."""
    assert __main__.main(["extend", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.removeprefix("loading\u2026\n").splitlines()
    return line


MODEL_RULE = "extend: model must be a folder with a transformers checkpoint; got "


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nowhere"], MODEL_RULE + "'nowhere'"),
        ([""], MODEL_RULE + "''"),
        (
            ["--methods", "none,magic"],
            f"extend: methods must be among {', '.join(_extend.METHODS)}; got 'magic'",
        ),
        (
            ["--methods", " ,"],
            f"extend: methods must be among {', '.join(_extend.METHODS)}; got ' ,'",
        ),
        *(
            (
                ["--lengths", f"32,{bad}"],
                f"extend: lengths must be whole numbers of at least 2; got '{bad}'",
            )
            for bad in ("0", "-4", "1.5", "many", "", "1")
        ),
        (["--windows", "0"], "extend: windows must be at least 1; got 0"),
        (["--threads", "0"], "extend: threads must be at least 1; got 0"),
        (["--alpha", "0.5"], "extend: alpha must be at least 1; got 0.5"),
        (["--alpha", "nan"], "extend: alpha must be at least 1; got nan"),
        (
            ["--factors", "empty.txt"],
            "extend: factors must be left out without longrope among the methods; got "
            "empty.txt",
        ),
        (
            ["--methods", "longrope"],
            "extend: factors must be JSON with a short_factor and a long_factor; got "
            "no --factors FILE",
        ),
        (
            ["--methods", "longrope", "--factors", "nowhere.json"],
            "extend: factors must be a readable file; got 'nowhere.json' "
            "(No such file or directory)",
        ),
        (
            ["--methods", "longrope", "--factors", "empty.txt"],
            "extend: factors must be JSON; got 'empty.txt' (Expecting value: line 1 "
            "column 1 (char 0))",
        ),
        (
            ["--methods", "longrope", "--factors", "list.json"],
            "extend: factors must be JSON with a short_factor and a long_factor; got "
            "'list.json'",
        ),
        (
            ["--methods", "longrope", "--factors", "factors.json"],
            "extend: scaling['short_factor'] must hold one number per pair, 32; got 4 "
            "numbers",
        ),
        (
            ["--plot", "figure.txt"],
            "extend: plot must end in .png, .svg or .pdf; got 'figure.txt'",
        ),
        (
            ["--json", "no/such/folder/r.json"],
            "extend: json must be a file in an existing folder; got "
            "'no/such/folder/r.json'",
        ),
        (
            ["--text", "nowhere.txt"],
            "extend: text must be a readable file; got 'nowhere.txt' "
            "(No such file or directory)",
        ),
        (
            ["--text", "empty.txt"],
            "extend: text must hold some text; got 'empty.txt' with 0 bytes",
        ),
        (
            ["--text", "short.txt"],
            "extend: text must hold at least as many tokens as the longest length, "
            "512 (give a longer --text or smaller --lengths); got 100 tokens",
        ),
    ],
)
def test_refused(options, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("word " * 20)
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "factors.json").write_text(json.dumps(FACTORS))
    assert refused(capsys, *options) == says


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_refused_where_nothing_can_be_written(option, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "no" / "folder.png")
    name = option.removeprefix("--")
    assert refused(capsys, option, link) == (
        f"extend: {name} must be a file that can be written; got {str(link)!r} "
        "(No such file or directory)"
    )


def test_refused_files_are_left_as_they_were(tmp_path, capsys):
    old, new, link = (tmp_path / name for name in ("old", "new", "link"))
    old.write_text("kept")
    link.symlink_to(tmp_path / "target")
    for path in (old, new, link):
        refused(capsys, "nowhere", "--json", path)
    assert old.read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == [link, old]


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "")]
)
def test_refused_with_a_broken_tokenizer(name, content, tmp_path, capsys):
    folder = save_tiny(tmp_path / "model")
    (folder / name).write_text(content)
    line = refused(capsys, folder)
    rule = "extend: model must have a tokenizer that transformers can read; got "
    assert line.startswith(f"{rule}{str(folder)!r} (")


def test_refused_without_rope(tmp_path, capsys):
    folder = tmp_path / "gpt2"
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(folder)
    says = "extend: model must use RoPE; got model_type 'gpt2'"
    assert refused(capsys, folder) == says


def test_refused_without_tokenizer_or_bytes(tmp_path, capsys):
    folder = save_tiny(tmp_path / "model", vocab_size=300)
    assert refused(capsys, folder) == (
        "extend: model must have a tokenizer or a vocabulary of the 256 bytes; "
        "got vocab_size 300"
    )


def test_refused_without_weights(tmp_path, capsys):
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    line = refused(capsys, folder, "--methods", "none")
    rule = "extend: model must be a causal language model with all its weights; got "
    assert line.startswith(f"{rule}{str(folder)!r} (")


def test_refused_with_some_weights_only(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    line = refused(capsys, folder, "--methods", "none")
    assert line.endswith("(no model.norm.weight in it)")


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "magic"}'])
def test_refused_with_a_broken_config(tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    line = refused(capsys, tmp_path)
    rule = "extend: model must be a checkpoint that transformers can read; got "
    assert line.startswith(f"{rule}{str(tmp_path)!r} (")


@pytest.mark.parametrize(
    ("module", "extra"),
    [("torch", "hf"), ("transformers", "hf"), ("tqdm", "hf"), ("matplotlib", "plot")],
)
def test_refused_without_an_extra(module, extra, tiny, text, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    options = ["--lengths", "16", "--plot", "r.png", "--windows", "1"]
    assert refused(capsys, tiny, "--text", text, *options) == (
        f"extend: {module} must be installed (pip install 'posenc[{extra}]'); "
        "got no such module"
    )


# --- the shipped model ---------------------------------------------------------------


def test_shipped_model_needs_its_context_extended():
    report = quiet(methods="none,window,ntk", lengths="256,512,1024", n_window=4)

    def bits(method, start, stop):
        return report.in_unit(report.run(method, stop).mean(start, stop))

    assert bits("none", 0, 256) < 2
    for length in (512, 1024):
        assert bits("none", length // 2, length) > bits("ntk", length // 2, length) + 1
        assert bits("ntk", length // 2, length) < 2.2
        assert bits("window", length // 2, length) < 2
    assert "ntk helped most" in _extend_report.conclusion(report)


def test_shipped_files_are_small_and_carry_the_licence():
    folder = _extend.MODEL
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    notice = (folder / "LICENSE.postgresql").read_text(encoding="utf-8")
    assert "PostgreSQL Global Development Group" in notice
    assert _extend.TEXT.stat().st_size > 20 * 4096
