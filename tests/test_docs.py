"""The documentation: its form, and that every example prints what it shows."""

# SPDX-License-Identifier: BSD-3-Clause

import contextlib
import doctest
import importlib
import io
import re
from pathlib import Path

import pytest

import posenc

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

# Modules with a public surface of their own, and what they need.
PUBLIC_MODULES = {
    "ufunc": None,
    "torch": "torch",
    "hf": "transformers",
    "plot": "matplotlib",
}

# numpydoc's checks that are off, each with its reason.
NUMPYDOC_OFF = {
    "ES01": "an extended summary is written where there is more to say",
    "EX01": "test_repo.py asks for examples, of the flat surface",
    "GL01": "the summary may stand on the line of the quotes, as ruff's D212/213 allow",
    "GL08": "test_repo.py asks for docstrings",
    "RT02": "a single returned value may be named",
    "SA01": "See Also is written where there is a neighbour",
    "YD01": "nothing yields",
}
# A ufunc has no Python signature: NumPy's text stands before ours.
UFUNC_OFF = {"SS03", "SS05", "SS06", "PR01", "PR02", "RT01", "RT03", "GL03", "GL02"}
# Users are given instances; they do not make them.
CLASS_OFF = {"PR01"}


def members(module):
    """Public names of a module: its `__all__`, or what it defines itself."""
    module = importlib.import_module(f"posenc.{module}")
    own = [
        name
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", "") == module.__name__
    ]
    return getattr(module, "__all__", own)


def public_names():
    """Dotted names of everything public whose module can be imported here."""
    names = [f"posenc.{name}" for name in posenc.__all__ if name[0] != "_"]
    for module, needs in PUBLIC_MODULES.items():
        if needs is None or importlib.util.find_spec(needs):
            names += [f"posenc.{module}.{name}" for name in members(module)]
    return names


def resolve(name):
    """The object of a dotted name below posenc."""
    value = importlib.import_module("posenc")
    for part in name.split(".")[1:]:
        if not hasattr(value, part):
            importlib.import_module(f"{value.__name__}.{part}")
        value = getattr(value, part)
    return value


def documented():
    return [name for name in public_names() if callable(resolve(name))]


@pytest.mark.parametrize("name", documented())
def test_docstring_has_the_form_of_numpydoc(name):
    validate = pytest.importorskip("numpydoc.validate").validate
    off = set(NUMPYDOC_OFF)
    if name.startswith("posenc.ufunc."):
        off |= UFUNC_OFF
    if isinstance(resolve(name), type):
        off |= CLASS_OFF
    found = [error for error in validate(name)["errors"] if error[0] not in off]
    assert found == []


@pytest.mark.parametrize("name", ["posenc", *public_names()])
def test_examples_print_what_they_show(name):
    value = posenc if name == "posenc" else resolve(name)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    output = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        for test in doctest.DocTestFinder(recurse=False).find(value, name):
            runner.run(test, out=output.write)
    assert runner.failures == 0, output.getvalue()


# --- README --------------------------------------------------------------------------


def blocks(text):
    """Fenced blocks of a Markdown text: (language, content, line)."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(m.group(1), m.group(2), text.count("\n", 0, m.start()) + 2) for m in found]


def tiny_llama():
    """What README calls `model` and `inputs`: a Llama with random weights."""
    torch, transformers = (pytest.importorskip(m) for m in ("torch", "transformers"))
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.arange(8)[None]
    mask = torch.ones_like(tokens)
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 4}
    return {"model": model, "inputs": inputs}


def test_readme_examples_print_what_they_show(tmp_path, monkeypatch):
    """Blocks of Python run in order, in one namespace.

    A block with prompts is a doctest. One without is run, and if the block after it
    is marked `text`, that is what it must print.
    """
    found = blocks(README.read_text())
    assert any(language == "python" for language, _, _ in found)
    monkeypatch.chdir(tmp_path)
    names, parser = tiny_llama(), doctest.DocTestParser()
    for index, (language, content, line) in enumerate(found):
        if language != "python":
            continue
        if ">>>" in content:
            runner, output = doctest.DocTestRunner(optionflags=OPTIONS), io.StringIO()
            test = parser.get_doctest(content, names, "README.md", "README.md", line)
            runner.run(test, out=output.write, clear_globs=False)
            assert runner.failures == 0, output.getvalue()
            names.update(test.globs)
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(content, f"README.md:{line}", "exec"), names)
        after = found[index + 1] if index + 1 < len(found) else ("", "", 0)
        if after[0] == "text":
            assert output.getvalue().split() == after[1].split(), f"line {line}"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), target
