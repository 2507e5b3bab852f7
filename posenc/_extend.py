"""Measure how well ways of context extension work on a model and a text.

Every method at every length L reads the first L tokens of the same windows of text,
and the loss of every single token is kept: the tables, the plot and the closing
sentence (``_extend_report.py``) are means over parts of these losses.
"""

# SPDX-License-Identifier: BSD-3-Clause

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
from pathlib import Path

import numpy as np

from ._check import must
from ._scaling_check import TRAINED

METHODS = {
    "none": "the model as it is",
    "window": "sliding window: in every layer a token attends to the last T tokens, "
    "itself included",
    "linear": "transformers' 'linear' (position interpolation), factor L/T",
    "ntk": "posenc.hf.patch with 'ntk': rope_theta * alpha**(d/(d-2)), alpha below",
    "dynamic": "transformers' 'dynamic' NTK, factor L/T",
    "yarn": "transformers' 'yarn', factor L/T",
    "ntk_by_parts": "NTK-by-parts, factor L/T for pairs that turn little in T tokens: "
    "transformers' 'llama3' with bands 1 and 32",
    "llama3": "transformers' 'llama3', factor L/T, bands 1 and 4",
    "longrope": "transformers' 'longrope' with the short and long factors of --factors",
}
DEFAULT_METHODS = ("none", "window", "linear", "ntk", "dynamic", "yarn")
# transformers runs these through the model's configuration.
CONFIG_METHODS = ("linear", "dynamic", "yarn", "ntk_by_parts", "llama3", "longrope")
# One pass over the longest length serves every length: causal models do not look
# ahead, and nothing in these two depends on the length.
LENGTH_FREE_METHODS = ("none", "window")

ALPHA_EXPONENT = 1.85

MODEL = Path(__file__).parent / "models" / "llama_bytes"
TEXT = Path(__file__).parent / "models" / "held_out.txt"

N_WINDOW = 16
# Logits held at once, in elements: 256 MB of float32.
MAX_LOGITS = 1 << 26
# Tokens per batch, while that is more than one window: enough to keep a core busy.
MAX_TOKENS = 8192


class ExtendError(ValueError):
    """What the user asked for cannot be done; the message is one line."""


def refuse(parameter, rule, got, command="extend"):
    """Raise the error that ends the command."""
    raise ExtendError(must(command, parameter, rule, got)) from None


# ---------------------------------------------------------------- what to measure


def default_alpha(scale):
    """Return the NTK alpha for a context `scale` times the trained length.

    Alpha must exceed the scale. The exponent is fitted to the best alphas at 2, 4 and
    8 times the trained length (3.5, 12 and 48) of the shipped model on the text it was
    trained on, not on the held-out text.
    """
    return max(scale, 1.0) ** ALPHA_EXPONENT


def parse_methods(text):
    """Return the names in a comma-separated list of methods."""
    methods = list(dict.fromkeys(m.strip() for m in text.split(",") if m.strip()))
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        got = repr(unknown[0]) if unknown else repr(text)
        refuse("methods", "be among " + ", ".join(METHODS), got)
    return methods


def parse_lengths(text, trained):
    """Return the sorted lengths in a comma-separated list; None: 1x to 8x trained."""
    if text is None:
        return [trained * k for k in (1, 2, 4, 8)]
    lengths = set()
    for part in text.split(","):
        try:
            length = int(part)
        except ValueError:
            length = 0
        if length < 2:
            refuse("lengths", "be whole numbers of at least 2", repr(part.strip()))
        lengths.add(length)
    return sorted(lengths)


def lengths_that_fit(lengths, n_token):
    """Leave out lengths that the text cannot hold, but keep the shortest two.

    The second of the default lengths is past the trained length: without it there is
    nothing to measure, and `cut_windows` says what to do.
    """
    return lengths[:2] + [n for n in lengths[2:] if n <= n_token]


def read_factors(path, config):
    """Return the short and long factors of longrope, from a file or the model's own.

    The file is JSON that holds both lists: by themselves, or as a model's config does.
    """
    if path is None:
        content, path = config.rope_parameters, "no --factors FILE"
    else:
        content, path = _read_json(path), repr(str(path))
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    keys = ("short_factor", "long_factor")
    if not isinstance(content, dict) or any(key not in content for key in keys):
        refuse("factors", "be JSON with a short_factor and a long_factor", path)
    factors = {key: content[key] for key in keys}
    from ._hf_exact import inv_freq_of

    wanted = {**config.rope_parameters, "rope_type": "longrope", "factor": 1, **factors}
    try:
        inv_freq_of("extend", config, wanted)
    except (TypeError, ValueError) as error:
        raise ExtendError(str(error)) from None
    return factors


def _read_json(path):
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        refuse("factors", "be a readable file", f"{str(path)!r} ({error.strerror})")
    except ValueError as error:
        refuse("factors", "be JSON", f"{str(path)!r} ({error})")


def buckets(trained, length):
    """Return the (start, stop) position ranges: the trained length, then doublings.

    >>> buckets(256, 1500)
    [(0, 256), (256, 512), (512, 1024), (1024, 1500)]
    """
    edges = [0]
    edge = trained
    while edge < length:
        edges.append(edge)
        edge *= 2
    edges.append(length)
    return list(itertools.pairwise(edges))


# ---------------------------------------------------------------- model and text


def require(module, extra, command="extend"):
    """Import an optional module or say which extra installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        rule = f"be installed (pip install 'posenc[{extra}]')"
        refuse(module, rule, "no such module", command)


def load_config(folder):
    """Return the configuration of a checkpoint folder that uses RoPE."""
    transformers = require("transformers", "hf")
    folder = Path(folder)
    if not folder.is_dir():
        refuse("model", "be a folder with a transformers checkpoint", repr(str(folder)))
    if not (folder / "config.json").is_file():
        refuse("model", "be a folder with a config.json", repr(str(folder)))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers and its readers raise
        rule = "be a checkpoint that transformers can read"
        refuse("model", rule, f"{str(folder)!r} ({_first_line(error)})")
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        refuse("model", "use RoPE", f"model_type {config.model_type!r}")
    if "rope_theta" not in rope:
        refuse("model", "have one set of RoPE parameters", repr(rope))
    return config


def load_model(folder, config):
    """Return the causal language model in float32, ready to be measured."""
    torch = require("torch", "hf")
    transformers = require("transformers", "hf")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rule = "be a causal language model with all its weights"
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers and its readers raise
        refuse("model", rule, f"{str(folder)!r} ({_first_line(error)})")
    if info["missing_keys"]:
        lacking = min(info["missing_keys"])
        refuse("model", rule, f"{str(folder)!r} (no {lacking} in it)")
    return model.eval()


def _first_line(error):
    lines = str(error).strip().split("\n")
    return lines[0] or type(error).__name__


def read_tokens(folder, config, path):
    """Return ``(token ids, id to put before every window or None, unit)``.

    Without a tokenizer the tokens are the bytes of the text.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        refuse("text", "be a readable file", f"{str(path)!r} ({error.strerror})")
    if not raw.strip():
        refuse("text", "hold some text", f"{str(path)!r} with {len(raw)} bytes")
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if any((Path(folder) / name).is_file() for name in names):
        return *_tokenize(folder, path, raw), "perplexity"
    if config.vocab_size != 256:
        rule = "have a tokenizer or a vocabulary of the 256 bytes"
        refuse("model", rule, f"vocab_size {config.vocab_size}")
    return np.frombuffer(raw, np.uint8).astype(np.int64), None, "bits per byte"


def _tokenize(folder, path, raw):
    transformers = require("transformers", "hf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("text", "be UTF-8", f"{str(path)!r} ({error.reason})")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        puts_first = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    except Exception as error:  # whatever transformers and its readers raise
        rule = "have a tokenizer that transformers can read"
        refuse("model", rule, f"{str(folder)!r} ({_first_line(error)})")
    return np.array(ids, np.int64), tokenizer.bos_token_id if puts_first else None


def cut_windows(tokens, length, n_window, first=None):
    """Return up to ``n_window`` windows, evenly spread and not overlapping.

    Parameters
    ----------
    tokens : ndarray, shape (n,)
        The text.
    length : int
        Tokens per window, `first` included.
    n_window : int
        How many are wanted; fewer come back when the text is short.
    first : int, optional
        Token to put at the start of every window.

    Returns
    -------
    ndarray, shape (n, length)
        The windows, one per row.
    """
    n_text = length if first is None else length - 1
    n_window = min(n_window, len(tokens) // n_text)
    if n_window == 0:
        rule = (
            f"hold at least as many tokens as the longest length, {length} "
            "(give a longer --text or smaller --lengths)"
        )
        refuse("text", rule, f"{len(tokens)} tokens")
    starts = np.linspace(0, len(tokens) - n_text, n_window).astype(int)
    windows = np.stack([tokens[s : s + n_text] for s in starts])
    if first is not None:
        windows = np.insert(windows, 0, first, axis=1)
    return windows


# ---------------------------------------------------------------- measuring


@dataclasses.dataclass
class Run:
    """One method at one length: the loss of every token in nats."""

    method: str
    length: int
    setting: dict
    loss: np.ndarray  # (n_window, length - 1); column p - 1 predicts position p

    def mean(self, start, stop):
        """Return the mean loss in nats over positions start to stop - 1."""
        return float(self.loss[:, max(start, 1) - 1 : stop - 1].mean())


@dataclasses.dataclass
class Report:
    """All runs on one model and one text."""

    model: str
    text: str
    unit: str  # 'bits per byte' or 'perplexity'
    trained: int
    n_window: int
    methods: list
    lengths: list
    runs: list
    left_out: dict = dataclasses.field(default_factory=dict)  # method: reason

    def run(self, method, length):
        """Return the run of a method at a length."""
        return next(r for r in self.runs if (r.method, r.length) == (method, length))

    def in_unit(self, nats):
        """Return a mean loss in the unit of the report."""
        return math.exp(nats) if self.unit == "perplexity" else nats / math.log(2)


def setting_of(method, length, trained, alpha=None, factors=None):
    """Return the scaling dict of a method, empty where nothing is scaled."""
    scale = length / trained
    if method == "window":
        return {"window": trained}
    if method == "none" or scale <= 1:
        return {}
    if method == "ntk":
        return {"rope_type": "ntk", "alpha": alpha or default_alpha(scale)}
    setting = {"rope_type": method, "factor": scale}
    if method not in ("linear", "dynamic"):
        setting[TRAINED] = trained
    if method == "llama3":
        setting |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if method == "longrope":
        setting |= factors
    return setting


def token_losses(model, windows, window=None, advance=lambda n: None):
    """Return the loss in nats of every token but the first of each window.

    Parameters
    ----------
    model : transformers causal language model
        The model, in evaluation mode.
    windows : ndarray, shape (n_window, length)
        Token ids.
    window : int, optional
        Let every token attend to this many last tokens only, itself included.
    advance : callable, optional
        Called with the number of tokens done.

    Returns
    -------
    ndarray, shape (n_window, length - 1)
        Losses in float32.
    """
    torch = require("torch", "hf")
    ids = torch.from_numpy(windows)
    max_tokens = min(MAX_TOKENS, MAX_LOGITS // model.config.vocab_size)
    n_batch = max(1, max_tokens // ids.shape[1])
    losses = []
    with torch.inference_mode():
        for some in ids.split(n_batch):
            mask = None if window is None else _window_mask(torch, some.shape, window)
            output = model(input_ids=some, attention_mask=mask, use_cache=False)
            logits, labels = output.logits[:, :-1], some[:, 1:]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="none"
            )
            losses.append(loss.view(labels.shape).numpy())
            advance(some.numel())
    return np.concatenate(losses)


def _window_mask(torch, shape, window):
    """Return the additive mask of causal attention to the last ``window`` tokens."""
    n_batch, length = shape
    seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo().min)
    return mask.expand(n_batch, 1, length, length)


def extend(
    folder=None,
    text=None,
    methods=None,
    lengths=None,
    *,
    alpha=None,
    factors=None,
    n_window=N_WINDOW,
    progress=True,
):
    """Measure methods of context extension; see ``python -m posenc extend --help``.

    Parameters
    ----------
    folder, text : path, optional
        Checkpoint folder and text file; the shipped ones by default.
    methods, lengths : str, optional
        Comma-separated names and whole numbers.
    alpha : float, optional
        NTK alpha for every length; `default_alpha` by default.
    factors : path, optional
        JSON file with the factors of longrope; those of the model's own configuration
        by default.
    n_window : int, default 16
        Windows of the text to read.
    progress : bool, default True
        Show a progress bar on stderr.

    Returns
    -------
    Report
        The losses of every run.

    Raises
    ------
    ExtendError
        If a parameter cannot be used; the message says which and why.
    """
    for module in ("torch", "transformers", "tqdm"):
        require(module, "hf")
    if folder == "":
        refuse("model", "be a folder with a transformers checkpoint", repr(folder))
    folder = Path(MODEL if folder is None else folder)
    text = Path(TEXT if text is None else text)
    names = parse_methods(",".join(DEFAULT_METHODS) if methods is None else methods)
    config = load_config(folder)
    trained = config.max_position_embeddings
    wanted = parse_lengths(lengths, trained)
    if n_window < 1:
        refuse("windows", "be at least 1", repr(n_window))
    if alpha is not None and not 1 <= alpha < math.inf:
        refuse("alpha", "be at least 1", repr(alpha))
    if "longrope" in names:
        factors = read_factors(factors, config)
    elif factors is not None:
        refuse("factors", "be left out without longrope among the methods", factors)
    tokens, first, unit = read_tokens(folder, config, text)
    if lengths is None:
        wanted = lengths_that_fit(wanted, len(tokens) + (first is not None))
    lengths = wanted
    windows = cut_windows(tokens, lengths[-1], n_window, first)
    model = load_model(folder, config)
    report = Report(
        str(folder), str(text), unit, trained, len(windows), names, lengths, []
    )
    if "ntk" in names:
        _leave_out_ntk(report, model, required=methods is not None)
    with _progress(report, progress) as bar:
        for method in names:
            bar.set_description(method)
            report.runs += measure(
                model, folder, method, windows, lengths, alpha, factors, bar.update
            )
    return report


def _leave_out_ntk(report, model, required):
    """Take ntk out if posenc.hf does not know the model; refuse if it is required."""
    from . import hf

    try:
        hf.patch(model).undo()
    except ValueError as error:
        if required:
            refuse("methods", "leave out ntk for this model", f"'ntk' ({error})")
        report.methods.remove("ntk")
        report.left_out["ntk"] = str(error)


def _progress(report, shown):
    """Return a bar that counts the tokens that go through the model."""
    tqdm = require("tqdm", "hf").tqdm
    n_token = 0
    for method in report.methods:
        alone = method in LENGTH_FREE_METHODS
        n_token += report.lengths[-1] if alone else sum(report.lengths)
    n_token *= report.n_window
    return tqdm(
        total=n_token, unit=" tokens", unit_scale=True, disable=not shown, leave=False
    )


def measure(model, folder, method, windows, lengths, alpha, factors, advance):
    """Return the runs of one method at every length."""
    trained = model.config.max_position_embeddings
    if method in LENGTH_FREE_METHODS:
        setting = setting_of(method, lengths[-1], trained)
        loss = token_losses(model, windows, setting.get("window"), advance)
        return [Run(method, n, setting, loss[:, : n - 1]) for n in lengths]
    runs = []
    for length in lengths:
        setting = setting_of(method, length, trained, alpha, factors)
        with scaled(model, folder, setting, length) as changed:
            loss = token_losses(changed, windows[:, :length], advance=advance)
        runs.append(Run(method, length, setting, loss))
    return runs


@contextlib.contextmanager
def scaled(model, folder, setting, length):
    """Give the model under a setting: patched, or read anew with another config.

    Anew for every length, because transformers' 'dynamic' remembers earlier ones.
    """
    from ._hf_scaling import in_transformers

    if not setting:
        yield model
    elif setting["rope_type"] in CONFIG_METHODS:
        config = load_config(folder)
        kept = ("rope_theta", "partial_rotary_factor")
        own = {k: v for k, v in config.rope_parameters.items() if k in kept}
        config.rope_parameters = {**own, **in_transformers(setting)}
        yield load_model(folder, config)
    else:
        from . import hf

        with hf.patch(model, scaling=setting, max_position_embeddings=length):
            yield model
