"""Fixed seeds for Hypothesis, and a place where tests report what they measured."""

# SPDX-License-Identifier: BSD-3-Clause

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

LINES = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[LINES] = []


@pytest.fixture(scope="session")
def measured(request):
    """Call it with one line of text: the line stands at the end of the run."""
    return request.config.stash[LINES].append


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[LINES]:
        terminalreporter.section("measured")
    for line in config.stash[LINES]:
        terminalreporter.write_line(line)
