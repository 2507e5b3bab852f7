"""CoPE's tasks: the generators, the small model, training, and what is reported."""

# SPDX-License-Identifier: BSD-3-Clause

import json
from dataclasses import replace

import numpy as np
import pytest
import reference

import posenc

torch = pytest.importorskip("torch")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from examples.cope import __main__ as program  # noqa: E402
from examples.cope import biases, report, tasks  # noqa: E402
from examples.cope.corpora import CORPORA, split  # noqa: E402
from examples.cope.experiments import EXPERIMENTS, Recipe, last_only  # noqa: E402
from examples.cope.model import POSITIONS, Decoder, Shape  # noqa: E402
from examples.cope.training import answer_loss, new_model, run, schedule  # noqa: E402

TASK_POSITIONS = EXPERIMENTS["flip_flop"].positions
SMALL = {"n_layer": 2, "n_head": 2, "width": 32, "n_position": 16}


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- generators ----------------------------------------------------------------------


@pytest.mark.parametrize("p_ignore", [0.1, 0.8, 0.98])
def test_flip_flop_reads_what_was_written_last(p_ignore):
    tokens, is_answer = tasks.flip_flop(generator(), 200, n_pair=50, p_ignore=p_ignore)
    assert tokens.shape == is_answer.shape == (200, 100)
    assert (tokens[:, 0] == tasks.WRITE).all()
    assert (tokens[:, -2] == tasks.READ).all()
    for row, asked in zip(tokens, is_answer, strict=True):
        memory = None
        for kind, bit, kind_asked, bit_asked in zip(
            row[::2], row[1::2], asked[::2], asked[1::2], strict=True
        ):
            assert bit in (0, 1)
            assert not kind_asked
            assert bit_asked == (kind == tasks.READ)
            memory = bit if kind == tasks.WRITE else memory
            assert kind != tasks.READ or bit == memory
    mixture = tokens[:, 2:-2:2]
    assert abs((mixture == tasks.IGNORE).mean() - p_ignore) < 0.02
    n_write, n_read = (mixture == tasks.WRITE).sum(), (mixture == tasks.READ).sum()
    assert abs(n_write - n_read) < 5 * (n_write + n_read) ** 0.5
    assert abs(tokens[:, 1].mean() - 0.5) < 0.2


@pytest.mark.parametrize(("n_symbol", "n_blank"), [(5, 5), (5, 20), (7, 0)])
def test_selective_copy_repeats_what_is_not_blank(n_symbol, n_blank):
    size = {"n_symbol": n_symbol, "n_blank": n_blank}
    tokens, is_answer = tasks.selective_copy(generator(), 300, **size)
    assert tokens.shape == (300, 2 * n_symbol + n_blank + 1)
    for row, asked in zip(tokens.tolist(), is_answer.tolist(), strict=True):
        mixture, copied = row[: n_symbol + n_blank], row[-n_symbol:]
        assert row[n_symbol + n_blank] == tasks.COPY
        assert copied == [token for token in mixture if token != tasks.BLANK]
        assert asked == [False] * (n_symbol + n_blank + 1) + [True] * n_symbol
    assert set(np.unique(tokens[:, -n_symbol:])) == set(range(2, 18))
    blank = (tokens[:, : n_symbol + n_blank] == tasks.BLANK).mean(0)
    assert np.ptp(blank) < 0.25  # as likely at any place


def execute(program):
    """Run a program of Counting; return what it prints and how often each operation."""
    values, counts, i = {}, {"set": 0, "increment": 0, "pass": 0}, 0
    while program[i] != tasks.PRINT:
        if program[i] == tasks.PASS:
            counts["pass"] += 1
            i += 1
        elif program[i + 1] == tasks.INCREMENT:
            values[program[i]] += 1
            assert values[program[i]] <= tasks.MAX_VALUE
            counts["increment"] += 1
            i += 2
        else:
            assert program[i + 1 : i + 4] == [tasks.SET, 0, tasks.END]
            values[program[i]] = 0
            counts["set"] += 1
            i += 4
    assert i + 3 == len(program)
    return values[program[i + 1]], counts


@pytest.mark.parametrize("n_variable", [1, 3, 5])
def test_counting_prints_what_the_program_counts(n_variable):
    size = {"n_variable": n_variable, "max_step": 40, "pass_weight": 10}
    tokens, is_answer = tasks.counting(generator(), 300, **size)
    assert (is_answer.sum(1) == 1).all()
    names, n_steps, answers = set(), [], []
    for row, asked in zip(tokens.tolist(), is_answer, strict=True):
        end = int(asked.argmax())
        assert set(row[end + 1 :]) <= {tasks.PAD}
        printed, counts = execute(row[: end + 1])
        assert row[end] == printed
        n_steps.append(sum(counts.values()))
        names |= {token for token in row if token >= tasks.FIRST_NAME}
        answers.append(printed)
    assert len(names) == n_variable
    assert min(n_steps) >= 3
    assert max(n_steps) == 40
    assert max(answers) >= 4


def test_counting_draws_operations_by_weight():
    size = {"n_variable": 1, "max_step": 400, "pass_weight": 50}
    tokens, is_answer = tasks.counting(generator(), 200, **size)
    total = {"set": 0, "increment": 0, "pass": 0}
    for row, asked in zip(tokens.tolist(), is_answer, strict=True):
        _, counts = execute(row[: int(asked.argmax()) + 1])
        total = {key: total[key] + counts[key] for key in total}
    n = sum(total.values())
    # Far from the start, all but the increments past the greatest value can be done.
    assert abs(total["pass"] / n - 50 / 58) < 0.05
    assert 0.6 < total["increment"] / total["set"] / 7 < 1


def test_the_same_seed_draws_the_same():
    for experiment in EXPERIMENTS.values():
        first, again = (experiment.batch(generator(3)) for _ in range(2))
        assert all(map(torch.equal, first, again))


def test_experiments_leave_the_distribution_as_the_papers_do():
    flip_flop = EXPERIMENTS["flip_flop"].settings
    trained = flip_flop["in"]["n_pair"]
    assert {name: tuple(setting.values()) for name, setting in flip_flop.items()} == {
        "in": (trained, 0.8),
        "sparse": (trained, 0.98),
        "dense": (trained, 0.1),
        "long": (2 * trained, 0.8),
        "long sparse": (2 * trained, 0.98),
    }
    copy = EXPERIMENTS["selective_copy"].settings
    shares = [s["n_blank"] / s["n_symbol"] for s in copy.values()]
    assert shares == [1, 0.5, 2]
    for name in ("counting_1", "counting_3"):
        counting = EXPERIMENTS[name].settings
        assert counting["long"]["max_step"] == 2 * counting["in"]["max_step"]
        assert counting["long"]["pass_weight"] > counting["in"]["pass_weight"]


def test_last_only_keeps_the_last_answer():
    asked = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool()
    assert last_only(asked).int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


# --- text ----------------------------------------------------------------------------


def test_documents_are_trained_on_or_held_out():
    documents = {f"page {i}": chr(ord("a") + i) * 3 for i in range(20)}
    training, held_out = (part.tobytes().decode() for part in split(documents))
    letters = [set(part) - {"\n"} for part in (training, held_out)]
    assert not letters[0] & letters[1]
    assert (len(letters[0]), len(letters[1])) == (18, 2)


@pytest.mark.parametrize("name", ["text", "code"])
def test_the_same_bytes_are_measured_at_every_length(name):
    experiment = EXPERIMENTS[name]
    training, held_out = CORPORA[name]()
    assert len(training) > 2 * len(held_out) > 20 * max(experiment.lengths)
    n = experiment.n_judged
    ends = [experiment.windows(length)[:, -n:] for length in experiment.lengths]
    assert all((end == ends[0]).all() for end in ends)
    tokens, is_answer = experiment.batch(generator())
    assert tokens.shape == (experiment.recipe.n_batch, experiment.lengths[0] + 1)
    assert is_answer.all()


def test_a_model_that_knows_nothing_needs_eight_bits():
    experiment = replace(EXPERIMENTS["text"], recipe=Recipe(1, n_measured=3))
    measured = experiment.measure(lambda tokens: torch.zeros(*tokens.shape, 256))
    assert measured == pytest.approx({"256": 8.0, "512": 8.0, "1024": 8.0})


# --- the model -----------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("gate_key", [False, True])
def test_the_model_is_causal_and_learns_everywhere(positions, gate_key):
    torch.manual_seed(0)
    model = Decoder(Shape(9, gate_key=gate_key, **SMALL), positions)
    tokens = torch.randint(9, (2, 20))
    logits = model(tokens)
    assert logits.shape == (2, 20, 9)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 9
    assert torch.allclose(model(changed)[:, :12], logits[:, :12], atol=1e-5)
    assert not torch.allclose(model(changed)[:, 12:], logits[:, 12:], atol=1e-2)
    if positions == "cope":  # zero at first, so that gates would get no gradient
        for layer in model.layers:
            torch.nn.init.normal_(layer.attention.embedding)
    torch.nn.functional.cross_entropy(
        model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("positions", POSITIONS)
def test_one_layer_knows_the_order_of_tokens_only_by_positions(positions):
    torch.manual_seed(0)
    model = Decoder(Shape(9, **{**SMALL, "n_layer": 1}), positions)
    if positions == "cope":
        torch.nn.init.normal_(model.layers[0].attention.embedding)
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 1, 3, 4]])
    same = torch.allclose(model(one)[:, -1], model(other)[:, -1], atol=1e-4)
    assert same == (positions == "none")


def test_sinusoids_are_added_to_embeddings_of_length_as_in_their_paper():
    model = Decoder(Shape(9, **SMALL), "sinusoidal")
    tokens = torch.tensor([[4, 2, 7]])
    embedded = model.embed(tokens)[0].detach().numpy()
    expected = 32**0.5 * embedded + posenc.sinusoidal(range(3), 32)
    first = model.streams(tokens)[0][0].detach().numpy()
    np.testing.assert_allclose(first, expected, atol=1e-5)


def expected_bias(bias, positions, length):
    """Return by the slow reference what a module of three heads gives."""
    places = range(length)
    if positions == "alibi":
        return reference.alibi(reference.alibi_slopes(3), places, places)
    if positions == "sandwich":
        return reference.sandwich(3, biases.Sandwich.dim, places, places, 10000.0)
    numbers = {name: p.detach().numpy() for name, p in bias.named_parameters()}
    if positions == "kerple":
        return reference.kerple(numbers["r1"], numbers["r2"], places, places, "log")
    if positions == "fire":
        mlp = [(numbers[f"mlp.{i}.weight"], numbers[f"mlp.{i}.bias"]) for i in (0, 2)]
        threshold = bias.first_threshold * numbers["stretch"]
        return reference.fire(mlp, places, places, numbers["c"], threshold, 1e-6)
    buckets = [
        [reference.t5_bucket(k - q, 32, 128, False) for k in places] for q in places
    ]
    return np.moveaxis(numbers["weight"][buckets], -1, 0)


@pytest.mark.parametrize("positions", ["t5", "alibi", "kerple", "fire", "sandwich"])
def test_biases_are_added_to_the_logits_of_every_layer(positions, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(biases.Fire, "first_threshold", 4.0)  # before the last query
    model = Decoder(Shape(9, n_head=3, width=48), positions).eval()
    bias = expected_bias(model.bias, positions, 7)
    tokens = torch.randint(9, (2, 7))
    for layer, x in zip(model.layers, model.streams(tokens), strict=False):
        x = layer.attention_norm(x)
        q, k, v = layer.attention.project(x)
        logits = q @ k.transpose(-1, -2) / 16**0.5 + torch.from_numpy(bias).float()
        future = torch.ones(7, 7, dtype=torch.bool).triu(1)
        gathered = logits.masked_fill(future, -torch.inf).softmax(-1) @ v
        expected = layer.attention.out(gathered.transpose(1, 2).flatten(2))
        found = layer.attention(x, model.causal_bias(7))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_schemes_differ_in_positions_alone():
    bare = new_model(tiny(1), "none", 0).state_dict()
    for positions in set(POSITIONS) - {"absolute"}:  # draws its table before the rest
        state = new_model(tiny(1), positions, 0).state_dict()
        assert all(torch.equal(state[name], value) for name, value in bare.items())


def test_kerples_numbers_stay_positive():
    bias = biases.Kerple(2)
    with torch.no_grad():
        bias.r1.copy_(torch.tensor([-1.0, 3.0]))
    bias(4).sum().backward()
    assert bias.r1.tolist() == pytest.approx([bias.least, 3.0])
    assert (bias.r1.grad != 0).all()


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match=r"one of absolute, .*, none; got 'xpos'"):
        Decoder(Shape(9), "xpos")


# --- training ------------------------------------------------------------------------


def test_the_rate_rises_and_falls():
    shares = [schedule(step, 100) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9] > 0.97
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert shares[-1] == pytest.approx(0.05)


def test_the_loss_is_that_of_the_answers():
    tokens = torch.tensor([[3, 1, 2]])
    is_answer = torch.tensor([[False, False, True]])

    def sure(_):
        logits = torch.zeros(1, 2, 4)
        logits[0, 1, 2] = 50.0  # knows the answer, and nothing else
        return logits

    assert answer_loss(sure, tokens, is_answer) < 1e-6


def tiny(n_step):
    """Flip-Flop of eight instructions, with a small model."""
    settings = {
        "in": {"n_pair": 8, "p_ignore": 0.5},
        "sparse": {"n_pair": 8, "p_ignore": 0.9},
    }
    recipe = Recipe(n_step, n_batch=64, rate=5e-3, n_measured=200)
    sizes = {**SMALL, "max_length": 16}
    return replace(
        EXPERIMENTS["flip_flop"], settings=settings, recipe=recipe, sizes=sizes
    )


@pytest.mark.parametrize("positions", TASK_POSITIONS)
def test_a_short_training_solves_a_tiny_task(positions):
    experiment = tiny(300)
    before = new_model(experiment, positions, 0)
    with torch.no_grad():
        untrained = experiment.measure(before)
    _, record = run(experiment, positions, 0)
    assert untrained["in"] > 25
    assert record["measured"]["in"] < 5
    assert record["loss"] < 0.1
    assert record["positions"] == positions


@pytest.mark.parametrize("positions", EXPERIMENTS["text"].positions)
def test_language_is_learned_and_read_past_the_trained_length(positions):
    recipe = Recipe(8, n_batch=4, rate=1e-2, n_measured=3)
    sizes = {**SMALL, "max_length": 64}
    experiment = replace(
        EXPERIMENTS["text"], lengths=(16, 64), n_judged=8, recipe=recipe, sizes=sizes
    )
    before = dict(new_model(experiment, positions, 0).named_parameters())
    model, record = run(experiment, positions, 0)
    assert set(record["measured"]) == {"16", "64"}
    assert all(0 < bits < 8.5 for bits in record["measured"].values())
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_seed_gives_the_same_model():
    records = [run(tiny(5), "cope", seed)[1] for seed in (1, 1, 2)]
    for record in records:
        del record["seconds"]
    assert records[0] == records[1]
    assert records[0]["loss"] != records[2]["loss"]


# --- the program ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A folder with results and models of the shortest trainings there are."""
    folder = tmp_path_factory.mktemp("cope")
    where = ["--results", str(folder / "results.json"), "--models", str(folder)]
    program.main([
        *["train", "--seeds", "1", "--steps", "1", "--measured", "2"], *where
    ])  # fmt: skip
    return folder


def test_training_writes_every_result(short, capsys):
    path = short / "results.json"
    records = json.loads(path.read_text())
    keys = [(r["experiment"], r["positions"]) for r in records]
    assert keys == [(e, p) for e in EXPERIMENTS for p in EXPERIMENTS[e].positions]
    assert {p for e, p in keys if e == "flip_flop"} == {"absolute", "rope", "cope"}
    assert {p for e, p in keys if e == "code"} == set(POSITIONS) == set(report.NAMES)
    before = path.read_text()
    program.main(["train", "--seeds", "1", "--results", str(path)])
    assert (path.read_text(), capsys.readouterr().out) == (before, "")


def test_the_report_fills_readme_and_draws(short, capsys):
    readme, picture = short / "README.md", short / "results.png"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    where = ["--readme", str(readme), "--picture", str(picture)]
    program.main(["report", "--results", str(short / "results.json"), *where])
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert capsys.readouterr().out.strip() in text
    words = [*report.TITLES.values(), *report.NAMES.values()]
    assert all(word in text for word in words)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_pictures_are_drawn(short):
    program.main(["pictures", "--models", str(short), "--folder", str(short)])
    for name in ("attention", "positions_text", "positions_code"):
        assert (short / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_experiment_is_refused():
    with pytest.raises(
        SystemExit, match=r"EXPERIMENT must be one of .*; got 'sorting'"
    ):
        program.main(["train", "sorting"])


def test_positions_that_no_experiment_compares_are_refused():
    with pytest.raises(SystemExit, match=r"--positions must .* flip_flop .*; got t5"):
        program.main(["train", "flip_flop", "--positions", "t5"])


def test_cells_show_the_mean_and_the_spread():
    assert report.spread_text([1.0, 1.0], 1) == "1.0"
    assert report.spread_text([1.0, 3.0], 1) == "2.0 (1.0 to 3.0)"
    assert report.spread_text([], 1) == ""
    assert report.bold_best([[2.0], [], [1.0]], 1) == ["2.0", "", "**1.0**"]


def test_readme_shows_the_results_that_are_kept():
    records = program.load(program.HERE / "results.json")
    text = (program.HERE / "README.md").read_text("utf-8")
    shown = text.partition(report.BEGIN)[2].partition(report.END)[0]
    assert shown.strip() == report.tables(records)
