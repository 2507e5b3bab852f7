"""The benchmarks: that they check what they time, and what they make of the numbers."""

# SPDX-License-Identifier: BSD-3-Clause

import functools
import json
import operator
import re
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import cope_listing  # noqa: E402

import posenc  # noqa: E402
from benchmarks import (  # noqa: E402
    added,
    bias,
    cope,
    cope_peers,
    memory,
    peers,
    readme,
    report,
)
from benchmarks.__main__ import ROOT, STORED, updated  # noqa: E402
from benchmarks.cases import all_cases, cope_step, rotation  # noqa: E402
from benchmarks.timing import REPEATED, Run, measure, nested  # noqa: E402
from benchmarks.work import Work  # noqa: E402

CHEAP = ("posenc", "posenc eager", "transformers", "complex form")
ATTENDING = ("posenc", "posenc.torch", "listing")


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


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_query", "n_key"), [(40, 40), (1, 40), (3, 5)])
def test_attention_passes_its_check(n_query, n_key, dtype, backward):
    case = cope.attention(n_query, n_key, dtype, ATTENDING, 6, backward)
    with torch.no_grad():
        runs, facts = case.prepare(1)
    assert facts["gaps"] == {}
    attending = {"plain attention", *ATTENDING} - (
        {"posenc.torch"} if backward else set()
    )
    assert set(runs) == {(peer, "fresh") for peer in attending}
    results = runs["posenc", "fresh"].call()
    assert len(results) == (5 if backward else 1)


def test_the_listing_that_is_timed_is_the_one_of_the_tests():
    work = cope_peers.Attention(7, 20, torch.float64, 6)
    ours = cope_peers.listing_attention(*work.operands, work.hidden)
    assert torch.equal(ours, cope_listing.attention(*work.operands))
    assert torch.allclose(ours, work.expected[0])


@pytest.mark.parametrize("backward", [False, True])
def test_the_bias_passes_its_check(backward):
    runs, facts = cope.bias(40, ATTENDING, backward).prepare(1)
    assert facts["gaps"] == {}
    assert {peer for peer, _ in runs} == {"copy", "posenc", "listing"}


@pytest.mark.parametrize("name", ["cope_gates", "cope_positions", "cope_interpolate"])
def test_the_steps_of_cope_agree_with_torch(name):
    runs, facts = cope_step(name, 40).prepare(1)
    assert ("posenc", "out given") in runs
    assert facts["error"] == "same bits" or float(facts["error"]) < 1e-5


def test_wrong_attention_gets_no_time(monkeypatch):
    def without_positions(work, n_thread):
        return {"fresh": cope_peers.plain(work)}

    monkeypatch.setitem(cope_peers.COPE_PEERS, "wrong", without_positions)
    case = cope.attention(40, 40, torch.float32, ("wrong",))
    with torch.no_grad():
        runs, facts = case.prepare(1)
    assert ("wrong", "fresh") not in runs
    assert facts["gaps"]["wrong"].startswith("off by")


def test_missing_x_transformers_is_a_gap(monkeypatch):
    monkeypatch.setitem(sys.modules, "x_transformers.attend", None)
    case = cope.attention(5, 5, torch.float32, ("x-transformers",))
    _, facts = case.prepare(1)
    assert facts["gaps"]["x-transformers"].startswith("not installed")


@pytest.mark.skipif(not memory.can_measure(), reason="needs Linux")
def test_memory_is_what_a_call_takes():
    n_byte = 10**8
    grown = memory.growth(functools.partial, operator.mul, b"x", n_byte)
    assert 0.9 * n_byte < grown < 1.1 * n_byte  # the system counts roughly


def test_every_case_has_a_name_of_its_own():
    names = [name for name, _ in all_cases()]
    assert len(set(names)) == len(names)


def test_what_is_slow_takes_the_rounds_it_must():
    seen = []
    runs = {n: Run(functools.partial(seen.append, n), least_rounds=n) for n in (1, 3)}
    measure(runs, rounds=5, budget=0)
    assert [seen.count(n) for n in runs] == [1, 3]


def test_every_round_restores_what_is_rotated_in_place():
    seen = []
    run = Run(lambda: seen.append("call"), before=lambda: seen.append("before"))
    measure({("posenc", "in place"): run}, rounds=3, budget=0, least_rounds=3)
    assert seen == ["before", "call"] * 3


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


def test_every_stored_result_is_in_a_theme_of_the_summary(stored):
    prefixes = tuple(p for theme, _ in readme.THEMES.values() for p in theme)
    timed = [r["case"] for r in stored["records"] if r["seconds"]]
    assert timed
    assert [case for case in timed if not case.startswith(prefixes)] == []


def test_what_is_published_is_what_is_stored(stored):
    text = (ROOT / "README.md").read_text()
    shown = text.partition(readme.BEGIN)[2].partition(readme.END)[0]
    assert shown.strip() == readme.readme_part(stored)
    assert STORED.with_name("RESULTS.md").read_text() == report.results_page(stored)


def record(n_thread=1, length=1, **seconds):
    """A row of a rotation with times in seconds by peer and mode."""
    flat = {tuple(key.split("|")): value for key, value in seconds.items()}
    return {
        "case": f"rope_qk half, float32, {length}",
        "group": "rotation",
        "threads": n_thread,
        "length": length,
        "dtype": "float32",
        "layout": "half",
        "errors": {"posenc": {"fresh": 1e-7}, "transformers": {"fresh": 2e-7}},
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


def test_a_defeat_needs_no_mode_in_common():
    row = record(
        **{"posenc|out given": 2e-6, "posenc|in place": 4e-6, "JAX|fresh": 1e-6}
    )
    (line,) = report.losses([row])
    assert "each at its fastest, 1 thread: JAX is 2.00 times as fast" in line


def test_results_mark_the_fastest_and_name_errors_and_gaps():
    row = record(**{"posenc|fresh": 1e-6, "JAX|fresh": 4e-6})
    assert report.gaps([row]) == ["numba: has none (1 of 1 rows)"]
    page = report.results_page({"machine": {"processor": "any"}, "records": [row]})
    assert "| posenc, fresh | **0.50 (1.00 µs)** |" in page
    assert "| error: posenc / transformers | 1e-07 / 2e-07 |" in page
    assert "- numba: has none (1 of 1 rows)" in page


def test_readme_shows_posenc_beside_the_fastest_other_for_each_number_of_threads():
    one = {"posenc|fresh": 1e-6, "JAX|fresh": 4e-6, "MLX|fresh": 8e-6}
    two = {"posenc|fresh": 3e-6, "JAX|fresh": 4e-6, "MLX|fresh": 2e-6}
    rows = [record(2, 5, **two), record(1, 5, **one)]
    table = readme.rotation_table(rows)
    assert "| **0.50** / 1.50 | JAX 2.00 / MLX **1.00** |" in table
    assert "| 5 | float32 | 2.00 µs / 2.00 µs |" in table


def test_the_summary_counts_all_results_and_says_where_the_least_is():
    rows = [
        record(1, **{"posenc|fresh": 1e-6, "JAX|fresh": 4e-6}),
        record(2, **{"posenc|fresh": 4e-6, "JAX|fresh": 1e-6, "MLX|fresh": 9e-6}),
        record(1, 5, **{"posenc|fresh": 1e-6, "MLX|fresh": 2e-6}),
        record(1, 6, **{"posenc|fresh": 1e-6}),
    ]
    least = "0.25 (JAX; rope_qk half, float32, 1, fresh, 2 threads)"
    row = f"| q and k rotated, `half` | 3 | 2 | 2.00 | 4.00 | {least} |"
    assert readme.summary_table(rows).splitlines()[2:] == [row]


def test_what_does_less_than_the_work_is_no_rival_in_the_summary():
    row = attention_record(posenc=2.0, listing=4.0)
    least = (
        "2.00 (listing; cope_attention forward, float32, 8 x 8, P=4, fresh, 1 thread)"
    )
    assert least in readme.summary_table([row])


def other_record(n_thread, **seconds):
    """A row of a function with times in seconds by peer and mode."""
    row = record(n_thread, **seconds)
    return {**row, "case": "t5_bias, 1 x 5 x 5", "group": "other", "error": "none"}


def test_readme_shows_every_mode_of_a_function():
    times = {"posenc|out given": 1e-6, "zeros|out given": 4e-6, "torch|fresh": 8e-6}
    times["posenc.torch|backward"] = 2e-6
    rows = [other_record(1, **times), other_record(2, **times)]
    for row in rows:
        del row["length"]
    ours = "out given: **0.50** / **0.50**; backward: posenc.torch 1.00 / 1.00"
    theirs = "out given: zeros 2.00 / 2.00; fresh: torch 4.00 / 4.00"
    assert f"| {ours} | {theirs} | none |" in readme.function_table(rows)


def test_readme_shows_what_a_patch_saves():
    seconds = {"transformers": {"": 4.0}, "posenc.hf.patch": {"": 3.0}}
    row = {
        "case": "Llama 1M, float32, decode",
        "group": "model",
        "threads": 1,
        "same bits": True,
        "seconds": {**seconds, "no rotation": {"": 2.0}},
    }
    shown = "| 1M, float32, decode | 4000.00 ms | 25.0% | 50.0% | same bits |"
    assert shown in readme.model_table([row])
    assert report.losses([row]) == []


def attention_record(**seconds):
    """A row of attention with times in seconds by peer; plain attention takes one."""
    times = {"plain attention": 1.0, **seconds}
    return {
        "case": "cope_attention forward, float32, 8 x 8, P=4",
        "group": "attention",
        "threads": 1,
        "pass": "forward",
        "queries": 8,
        "keys": 8,
        "positions": 4,
        "dtype": "float32",
        "errors": {"posenc": {"fresh": 1e-7}, "listing": {"fresh": 2e-7}},
        "gaps": {"x-transformers": "not installed"},
        "seconds": nested({(peer, "fresh"): s for peer, s in times.items()}),
    }


def test_attention_is_shown_as_a_multiple_of_plain_attention():
    row = attention_record(posenc=0.75, listing=25.0)
    table = report.attention_table([row], ["posenc", "listing", "x-transformers"])
    assert table.endswith("| 1000.00 ms | **0.75** | 25 |  | 1e-07 / 2e-07 |")
    page = report.results_page({"machine": {}, "records": [row]})
    assert "- x-transformers: not installed (1 of 1 rows)" in page
    shown = "| 1000.00 ms | **0.75** | listing 25 | 25 | 1e-07 / 2e-07 |"
    assert shown in readme.readme_part({"machine": {}, "records": [row]})


def test_attention_slower_than_without_positions_is_a_defeat():
    row = attention_record(posenc=1.25)
    (line,) = report.losses([row])
    assert "plain attention is 1.25 times as fast" in line
    assert "**" not in readme.attention_table([row])


def test_memory_of_the_listing_is_a_formula():
    grown = {"1024": {"forward": 2_500_000, "forward + backward": 9_900_000}}
    row = {"group": "memory", "heads": 8, "bytes": grown}
    table = report.memory_table([row])
    assert "| 1024 | forward | 2 MB | 403 MB |" in table
    assert "| 1024 | forward + backward | 10 MB | 503 MB |" in table
    line = readme.memory_line([row]).split()
    assert line[:4] == ["Over", "1024", "tokens", "posenc"]
    assert [word for word in line if word.isdigit()] == [
        "1024",
        "2",
        "10",
        "403",
        "503",
    ]


def test_nobody_passes_with_what_another_left():
    work = Work(5, torch.float32, "half")
    posenc_runs = peers.PEERS["posenc"](work, 1)
    posenc_runs["out given"].call()
    work.forget()
    assert not work.error(work.read(work.out)) <= 1


def test_an_update_replaces_its_cases_and_says_so():
    def record(case, threads, value):
        return {"case": case, "threads": threads, "value": value}

    stored = {"machine": {}, "records": [record("a", 1, 0), record("b", 1, 0)]}
    new = {
        "machine": {"date": "now"},
        "records": [record("a", 1, 1), record("c", 2, 1)],
    }
    result = updated(stored, new)
    values = [(r["case"], r["value"]) for r in result["records"]]
    assert values == [("a", 1), ("b", 0), ("c", 1)]
    assert (result["apart"], result["machine"]) == (["a", "c"], new["machine"])


@pytest.mark.parametrize("name", bias.BIASES)
def test_biases_agree_with_others_or_with_the_formula(name):
    with torch.no_grad():
        case = bias.bias(name, 40, compiles=False)
        row = bias.bias(name, 40, n_query=1, compiles=False)
        for runs, facts in (case.prepare(1), row.prepare(1)):
            for run in runs.values():
                run.call()
                assert run.least_rounds == REPEATED
            error = "bits of " if name in bias.PEERS else "0.[0-5][0-9]* ulp of the f"
            assert re.match(error, facts["error"])
            assert bias.ZEROS in runs


def test_the_bias_of_t5_has_the_bits_of_transformers_in_bfloat16():
    with torch.no_grad():
        case = bias.bias("t5_bias", 40, torch.bfloat16, compiles=False)
        runs, facts = case.prepare(1)
    assert facts["error"] == "bits of transformers"
    assert runs["posenc", "tensor, fresh"].call().dtype is torch.bfloat16


def make_wrong(monkeypatch, name):
    """Let a function of posenc give results that are a little too large."""
    right = getattr(posenc, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        result *= 1 + 2.0**-20
        return result

    monkeypatch.setattr(posenc, name, wrong)


@pytest.mark.parametrize("name", bias.BIASES)
def test_a_wrong_bias_is_refused(monkeypatch, name):
    make_wrong(monkeypatch, name)
    with torch.no_grad(), pytest.raises(peers.Wrong):
        bias.bias(name, 40, compiles=False)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("add_sinusoidal", functools.partial(added.add_sinusoidal, 2, 40)),
        ("add_learned", functools.partial(added.add_learned, 2, 40)),
        ("sinusoidal", functools.partial(added.sinusoidal, 40)),
        ("sinusoidal_grid", added.sinusoidal_grid),
        ("extend_table", functools.partial(added.extend_table, 40)),
        ("alibi_slopes", bias.slopes),
    ],
)
def test_a_wrong_table_is_refused(monkeypatch, name, make):
    make_wrong(monkeypatch, name)
    with pytest.raises(peers.Wrong):
        make()


def test_wrong_buckets_are_refused(monkeypatch):
    right = posenc.t5_bucket
    monkeypatch.setattr(posenc, "t5_bucket", lambda offset: right(offset) + 1)
    with pytest.raises(peers.Wrong):
        bias.buckets(500)


def test_buckets_and_slopes_are_timed():
    for case, error in (
        (bias.buckets(500), "bits of transformers"),
        (bias.slopes(), r"0\.[0-5]\d ulp .*"),
    ):
        runs, facts = case.prepare(1)
        for run in runs.values():
            run.call()
        assert re.fullmatch(error, facts["error"])


def test_added_tables_agree_with_those_of_others():
    for make, error in (
        (added.add_sinusoidal, r"[01]\.\d\d eps of the terms \(torch [0-9.]+\)"),
        (added.add_learned, "bits of torch"),
    ):
        runs, facts = make(2, 40).prepare(1)
        assert re.fullmatch(error, facts["error"])
        assert {peer for peer, _ in runs} > {"copy", "posenc"}
        for run in runs.values():
            run.call()


def test_tables_are_made_and_extended():
    for make in (added.sinusoidal, added.sinusoidal_grid, added.extend_table):
        runs, _ = make().prepare(1)
        for run in runs.values():
            run.call()


def test_linear_extension_is_timed_against_linear():
    runs, _ = added.extend_table(40).prepare(1)
    modes = {mode: {p for p, m in runs if m == mode} for _, mode in runs}
    assert modes == {
        "linear, fresh": {"posenc", "torch"},
        "hierarchical, fresh": {"posenc"},
    }
