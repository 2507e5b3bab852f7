"""The benchmarks: that they check what they time, and what they make of the numbers."""

# SPDX-License-Identifier: BSD-3-Clause

import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import peers, report  # noqa: E402
from benchmarks.cases import rotation  # noqa: E402
from benchmarks.timing import Run, measure, nested  # noqa: E402
from benchmarks.work import Work  # noqa: E402

CHEAP = ("posenc", "posenc eager", "transformers", "complex form")


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 5])
def test_all_modes_pass_their_check(length, dtype, layout):
    case = rotation(length, dtype, layout, CHEAP)
    with torch.no_grad():
        runs, facts = case.prepare(1)
    modes = {mode for peer, mode in runs if peer == "posenc"}
    assert modes == set(report.MODES)
    assert ("transformers", "fresh") in runs
    assert facts["same bits"]
    assert set(facts["gaps"]) == ({"complex form"} if layout == "half" else set())


def test_a_wrong_result_gets_no_time(monkeypatch):
    def wrong(work, n_thread):
        return {"fresh": Run(lambda: work.inputs)}

    monkeypatch.setitem(peers.PEERS, "wrong", wrong)
    runs, errors, gaps = peers.prepare(Work(5, torch.float32, "half"), 1, ("wrong",))
    assert (runs, errors) == ({}, {})
    assert gaps["wrong"].startswith("off by")


def test_an_error_of_ours_is_no_gap(monkeypatch):
    def wrong(work, n_thread):
        return {"fresh": Run(lambda: work.inputs)}

    monkeypatch.setitem(peers.PEERS, "posenc", wrong)
    with pytest.raises(peers.Wrong):
        peers.prepare(Work(5, torch.float32, "half"), 1, ("posenc",))


@pytest.mark.parametrize(
    ("peer", "library"),
    [
        ("ONNX Runtime", "onnxruntime"),
        ("rotary-embedding-torch", "rotary_embedding_torch"),
        ("numba", "numba"),
        ("JAX", "jax"),
        ("MLX", "mlx.core"),
    ],
)
def test_a_missing_library_is_a_gap(monkeypatch, peer, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "benchmarks.numba_kernels", raising=False)
    work = Work(5, torch.float32, "interleaved")
    runs, _, gaps = peers.prepare(work, 1, (peer,))
    assert not runs
    assert gaps[peer].startswith("not installed")


def test_every_round_restores_what_is_rotated_in_place():
    seen = []
    run = Run(lambda: seen.append("call"), before=lambda: seen.append("before"))
    measure({("posenc", "in place"): run}, rounds=3, budget=0, least_rounds=3)
    assert seen == ["before", "call"] * 3


def record(**seconds):
    """A row of one token with times in seconds by peer and mode."""
    flat = {tuple(key.split("|")): value for key, value in seconds.items()}
    return {
        "case": "rope_qk half, float32, 1",
        "group": "rotation",
        "threads": 1,
        "length": 1,
        "dtype": "float32",
        "layout": "half",
        "errors": {},
        "gaps": {"numba": "has none"},
        "same bits": True,
        "seconds": nested({("copy", ""): 2e-6, **flat}),
    }


def test_defeats_are_listed_by_mode():
    row = record(**{"posenc|fresh": 2e-6, "JAX|fresh": 1e-6, "posenc|in place": 1e-6})
    assert report.losses([row]) == [
        "rope_qk half, float32, 1, fresh, 1 thread: JAX is 2.00 times as fast "
        "(1.00 µs, posenc 2.00 µs)"
    ]


def test_tables_mark_the_fastest_and_name_the_gaps():
    row = record(**{"posenc|fresh": 1e-6, "JAX|fresh": 4e-6})
    assert "| **1.00** | 4.00 |" in report.rotation_table([row])
    assert report.gaps([row]) == ["numba: has none (1 of 1 rows)"]
    page = report.results_page({"machine": {"processor": "any"}, "records": [row]})
    assert "| posenc, fresh | **0.50 (1.00 µs)** |" in page


def test_nobody_passes_with_what_another_left():
    work = Work(5, torch.float32, "half")
    posenc_runs = peers.PEERS["posenc"](work, 1)
    posenc_runs["out given"].call()
    work.forget()
    assert not work.error(peers.tokens_of(work.out, work.checked)) <= 1
