"""Fixed seeds, no windows, what tests measured, fixtures for torch."""

# SPDX-License-Identifier: BSD-3-Clause

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "posenc",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("posenc")

# MPLBACKEND would reach the kernels of notebooks, which have a backend of their own.
os.environ.setdefault("MATPLOTLIBRC", str(Path(__file__).with_name("matplotlibrc.txt")))

LINES = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[LINES] = []


@pytest.fixture(scope="session")
def measured(request):
    """Call it with one line of text: the line stands at the end of the run."""
    return request.config.stash[LINES].append


@pytest.fixture(autouse=True)
def seeded():
    """The same random tensors in every run, whichever tests are selected."""
    if importlib.util.find_spec("torch"):
        importlib.import_module("torch").manual_seed(0)


@pytest.fixture
def on_one_thread():
    """One thread of torch, which is fastest for small work."""
    from torch_tools import one_thread

    with one_thread():
        yield


@pytest.fixture
def compiled():
    """Return a function that compiles without graph breaks; clean up after it."""
    import torch

    torch._dynamo.reset()
    yield lambda function, backend="aot_eager", **options: torch.compile(
        function, backend=backend, fullgraph=True, **options
    )
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[LINES]:
        terminalreporter.section("measured")
    for line in config.stash[LINES]:
        terminalreporter.write_line(line)
