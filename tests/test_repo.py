"""The repository's own rules."""

# SPDX-License-Identifier: BSD-3-Clause

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import posenc

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# What knows the paper, strides or threads, but never Python.
PURE = sorted(
    path
    for pattern in ("*.inc", "posenc.h", "lanes.h", "isa*", "nest.*", "dispatch.*")
    for path in CSRC.glob(pattern)
)
CODE = ("csrc", "posenc", "tests", "benchmarks", "examples")
NAMES = [name for name in posenc.__all__ if not name.startswith("_")]


def files(*folders, suffixes=(".py", ".pyi", ".c", ".h", ".inc", ".ipynb")):
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path


def read(path):
    """The text of a file, without the pictures of a notebook."""
    return re.sub(r'"image/png": "[^"]*"', "", path.read_text())


def text_of(*folders):
    return "\n".join(path.read_text() for path in files(*folders, suffixes=(".py",)))


TEXTS = {folder: text_of(folder) for folder in ("tests", "benchmarks")}


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented_tested_measured_and_shown(name):
    value = getattr(posenc, name)
    if callable(value):
        assert "Examples\n" in (value.__doc__ or ""), "no example"
    word = re.compile(rf"\b{name}\b")
    for place, text in TEXTS.items():
        assert word.search(text), f"not in {place}"
    assert word.search((ROOT / "README.md").read_text()), "not in README.md"


@pytest.mark.parametrize("module", ["torch", "plot", "ufunc"])
def test_public_names_of_a_module_are_shown(module):
    names = pytest.importorskip(f"posenc.{module}").__all__
    text = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"`(?:posenc\.torch\.|posenc\.plot\.)?(\w+)[`(]", text))
    assert set(names) - shown == set()


def test_public_names_exist_once():
    assert len(set(posenc.__all__)) == len(posenc.__all__)
    assert all(hasattr(posenc, name) for name in posenc.__all__)


def test_import_brings_neither_torch_nor_transformers_nor_matplotlib():
    heavy = ("torch", "transformers", "matplotlib", "dask", "tqdm")
    code = f"import sys, posenc; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr


# --- C -------------------------------------------------------------------------------


def test_there_are_kernels():
    assert len(PURE) > 8


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.name)
def test_kernels_know_neither_python_nor_numpy_nor_threads(path):
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text())
    for name in included:
        assert not re.search(r"(?i)python|numpy|omp\.h|pthread", name), name


@pytest.mark.parametrize("name", ["isa_baseline.c", "dispatch.c", "nest.c"])
def test_kernels_compile_without_python(name):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    command = [compiler, "-std=c11", "-fsyntax-only", "-Wall", str(CSRC / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_one_file_knows_openmp():
    knows = {
        path.name
        for path in files("csrc")
        if re.search(r"#\s*pragma\s+omp|\bomp_\w+|omp\.h|_OPENMP", path.read_text())
    }
    assert knows <= {"parallel.c", "parallel.h"}


# --- text ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", CODE)
def test_no_marks_are_left_over(folder):
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")
    mark = re.compile(rf"\b({'|'.join(words)})\b")
    assert [p.name for p in files(folder) if mark.search(read(p))] == []


@pytest.mark.parametrize("folder", CODE)
def test_every_file_names_its_licence(folder):
    lacking = [
        path.name
        for path in files(folder)
        if "SPDX-License-Identifier: BSD-3-Clause" not in read(path)
        and read(path).strip()
    ]
    assert lacking == []


def test_no_path_of_one_machine():
    path = re.compile(r"(^|[^A-Za-z0-9_.])/(work|home|root)/[A-Za-z]", re.MULTILINE)
    suffixes = (".py", ".pyi", ".c", ".h", ".inc", ".md", ".toml", ".json", ".ipynb")
    found = [p.name for p in files(*CODE, suffixes=suffixes)
             if path.search(read(p))]  # fmt: skip
    assert found == []


def test_version_is_written_once():
    version = posenc.__version__
    quoted = re.compile(rf"""["']{re.escape(version)}["']""")
    places = [*files("posenc", "csrc"), ROOT / "pyproject.toml", ROOT / "setup.py"]
    holders = [p.name for p in places if p.exists() and quoted.search(p.read_text())]
    assert holders == ["_version.py"]
    assert posenc.build_info()["version"] == version


def test_changelog_knows_the_version_or_what_is_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{posenc.__version__}]" in text


def test_types_are_shipped():
    assert (ROOT / "posenc" / "py.typed").exists()
    stub = (ROOT / "posenc" / "_core.pyi").read_text()
    for name in posenc.ufunc.__all__:
        assert re.search(rf"\b{name}\b", stub), name
