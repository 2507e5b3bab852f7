"""The notebooks of examples/: they run, print what is stored, and are fit to ship."""

# SPDX-License-Identifier: BSD-3-Clause

import ast
import platform
import re
import sys
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from examples.execute import executed, notebooks, plain  # noqa: E402

README = Path(__file__).resolve().parent.parent / "README.md"
NOTEBOOKS = notebooks()
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# A notebook is read on the web, where a large one does not show.
MAX_BYTES = 150_000
NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
# Sums on another processor end in other bits, and may be rounded to the next digit.
LAST_DIGITS = 1


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(notebook):
    """What the cells of a notebook print."""
    return [output.text for output in outputs(notebook) if "text" in output]


def pictures(notebook):
    """Whether each output is a picture."""
    return ["image/png" in output.get("data", ()) for output in outputs(notebook)]


def modules_of(notebook):
    """The modules outside of Python's own library that the cells import."""
    found = set()
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def unit_of(number):
    """The value of the last digit of a number as it is written."""
    mantissa, _, exponent = number.partition("e")
    n_digit = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - n_digit)


def is_near(a, b):
    """Whether two written numbers agree; those without a point exactly."""
    if a == b or a.lstrip("-").isdigit():
        return a == b
    return abs(float(a) - float(b)) <= 1.001 * LAST_DIGITS * unit_of(a)


def same(stored, fresh):
    """Whether two texts agree: words to the letter, numbers but for the last digit."""
    if NUMBER.sub("#", stored).split() != NUMBER.sub("#", fresh).split():
        return False
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(fresh), strict=True)
    return all(is_near(a, b) for a, b in pairs)


def test_texts_are_compared_as_said():
    assert same("a [1.20 -3e-08]\n", "a [1.21  -3e-08]")
    assert not same("a 1.20", "a 1.22")
    assert not same("a 120", "a 121")
    assert not same("a 1.20", "b 1.20")
    assert not same("a 1.20", "a 1.20 1.20")


def test_there_is_one_for_each_theme():
    names = {path.stem for path in NOTEBOOKS}
    themes = "tables_and_decay rope_three_ways extending_a_llama cope biases"
    assert set(themes.split()) <= names


@every_notebook
def test_notebook_prints_what_is_stored(path, measured):
    stored = nbformat.read(path, as_version=4)
    for module in modules_of(stored):
        pytest.importorskip(module)
    start = time.perf_counter()
    fresh = executed(path)
    measured(f"{path.stem}: {time.perf_counter() - start:.0f} s")
    assert pictures(fresh) == pictures(stored)
    for old, new in zip(texts(stored), texts(fresh), strict=True):
        assert same(old, new), f"stored:\n{old}\nfresh:\n{new}"


@every_notebook
def test_notebook_is_stored_as_it_runs(path):
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert stored == plain(stored, keep_outputs=True)  # by python -m examples.execute
    counts = [cell.execution_count for cell in code_cells(stored)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {(o.output_type, o.get("name")) for o in outputs(stored)}
    assert kinds <= {("stream", "stdout"), ("display_data", None)}


@every_notebook
def test_notebook_explains_checks_and_shows(path):
    stored = nbformat.read(path, as_version=4)
    first = stored.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \w", first.source)
    # A title, and a paragraph on what the reader will learn.
    assert len(first.source.split("\n\n")) == 2
    assert all(cell.source.strip() for cell in stored.cells)
    assert any("assert " in cell.source for cell in code_cells(stored))
    assert any(pictures(stored))
    assert path.stat().st_size <= MAX_BYTES


@every_notebook
def test_notebook_holds_nothing_of_a_machine(path):
    stored = nbformat.read(path, as_version=4)
    shown = "\n".join([*texts(stored), *(cell.source for cell in stored.cells)])
    assert not re.search(r"(^|[\s'\"(=])(/[a-z]\w*/|[A-Z]:\\|~/)", shown)
    assert platform.node() not in shown.split()


@every_notebook
def test_notebook_links_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
            if cell.cell_type == "markdown" and "://" not in target:
                assert (path.parent / target).exists(), target


def test_readme_lists_them():
    text = README.read_text()
    assert [p.name for p in NOTEBOOKS if f"(examples/{p.name})" not in text] == []
