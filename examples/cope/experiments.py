"""What is trained and measured: three tasks and two kinds of text, with their sizes."""

# SPDX-License-Identifier: BSD-3-Clause

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn import functional as F

from .corpora import CORPORA
from .model import POSITIONS
from .tasks import TASKS

MEASURING_SEED = 1_000_000  # sequences to measure on, the same for all models


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a model is trained."""

    n_step: int
    n_batch: int = 32
    rate: float = 2e-3
    n_measured: int = 1000  # sequences, or windows of text, to measure on


@dataclass(frozen=True)
class Synthetic:
    """
    A task: batches in its first setting, errors in all.

    Attributes
    ----------
    task : str
        Key of `TASKS`.
    settings : dict of str to dict
        As in `Task.settings`, at the sizes of this experiment.
    recipe : Recipe
        How a model is trained.
    sizes : dict
        Of the model, as in `Shape`.
    """

    task: str
    settings: dict
    recipe: Recipe
    sizes: dict = field(default_factory=dict)
    n_seed = 3
    positions = ("absolute", "rope", "cope")
    unit = "% wrong"

    @property
    def n_token(self):
        """Size of the vocabulary."""
        return TASKS[self.task].n_token

    @property
    def trained(self):
        """Name of the setting trained on."""
        return next(iter(self.settings))

    def draw(self, rng, n, name=None):
        """Return ``tokens`` and ``is_answer`` of n sequences as tensors."""
        setting = self.settings[name or self.trained]
        tokens, is_answer = TASKS[self.task].make(rng, n, **setting)
        return torch.from_numpy(tokens), torch.from_numpy(is_answer)

    def batch(self, rng):
        """Return a batch to train on."""
        return self.draw(rng, self.recipe.n_batch)

    def measure(self, model):
        """Return the share of sequences answered wrong, in percent, by setting."""
        return {name: self.error(model, name) for name in self.settings}

    def error(self, model, name):
        """Return the share of sequences answered wrong in one setting, in percent."""
        rng = np.random.default_rng(MEASURING_SEED)
        tokens, is_answer = self.draw(rng, self.recipe.n_measured, name)
        if TASKS[self.task].judged == "last":
            is_answer = last_only(is_answer)
        n_wrong = 0
        for some, asked in zip(tokens.split(50), is_answer.split(50), strict=True):
            wrong = model(some[:, :-1]).argmax(-1) != some[:, 1:]
            n_wrong += (wrong & asked[:, 1:]).any(1).sum().item()
        return 100 * n_wrong / len(tokens)


def last_only(is_answer):
    """Keep the last answer of each row."""
    after = is_answer.flip(1).cumsum(1).flip(1)
    return is_answer & (after == 1)


@dataclass(frozen=True)
class Language:
    """
    Bytes of text or code: bits per byte at the trained length and longer.

    The bytes measured are the same at every length: the last `n_judged` of windows
    that end at the same places, so only the length of what stands before differs.

    Attributes
    ----------
    corpus : str
        Key of `CORPORA`.
    lengths : tuple of int
        Lengths to read; the first is the trained one.
    recipe : Recipe
        How a model is trained.
    sizes : dict
        Of the model, as in `Shape`.
    n_judged : int
        Bytes of each window that are measured.
    n_seed : int
        Seeds at most, of each kind of positions.
    """

    corpus: str
    lengths: tuple
    recipe: Recipe
    sizes: dict = field(default_factory=dict)
    n_judged: int = 64
    n_seed: int = 3
    n_token = 256
    positions = POSITIONS
    unit = "bits per byte"

    @property
    def trained(self):
        """Name of the length trained on."""
        return str(self.lengths[0])

    def batch(self, rng):
        """Return a batch of windows to train on, every byte but the first asked."""
        training, _ = CORPORA[self.corpus]()
        size = self.lengths[0] + 1
        starts = rng.integers(len(training) - size, size=self.recipe.n_batch)
        windows = np.stack([training[s : s + size] for s in starts])
        tokens = torch.from_numpy(windows).long()
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def windows(self, length):
        """Return windows of the held-out bytes, one more byte than is read."""
        _, held_out = CORPORA[self.corpus]()
        longest = max(self.lengths) + 1
        ends = np.linspace(longest, len(held_out), self.recipe.n_measured).astype(int)
        return np.stack([held_out[e - length - 1 : e] for e in ends])

    def measure(self, model):
        """Return the mean bits per byte, by length."""
        return {str(length): self.bits(model, length) for length in self.lengths}

    def bits(self, model, length):
        """Return the mean bits per byte at one length."""
        tokens = torch.from_numpy(self.windows(length)).long()
        total = 0.0
        for some in tokens.split(8):
            logits = model(some[:, :-1])[:, -self.n_judged :]
            asked = some[:, -self.n_judged :]
            total += F.cross_entropy(
                logits.flatten(0, 1), asked.flatten(), reduction="sum"
            ).item()
        return total / (len(tokens) * self.n_judged) / math.log(2)


def counting(n_variable, **recipe):
    """Return the experiment of Counting with so many variables."""
    return Synthetic(
        "counting",
        {
            "in": {"n_variable": n_variable, "max_step": 32, "pass_weight": 10},
            "long": {"n_variable": n_variable, "max_step": 64, "pass_weight": 30},
        },
        Recipe(**recipe),
    )


LANGUAGE_SIZES = {"n_layer": 2, "n_head": 3, "width": 96}
LENGTHS = (256, 512, 1024)

EXPERIMENTS = {
    "flip_flop": Synthetic(
        "flip_flop",
        {
            "in": {"n_pair": 32, "p_ignore": 0.8},
            "sparse": {"n_pair": 32, "p_ignore": 0.98},
            "dense": {"n_pair": 32, "p_ignore": 0.1},
            "long": {"n_pair": 64, "p_ignore": 0.8},
            "long sparse": {"n_pair": 64, "p_ignore": 0.98},
        },
        Recipe(n_step=1000),
        {"n_head": 4, "n_position": 16},
    ),
    "selective_copy": Synthetic(
        "selective_copy",
        {
            "in": {"n_symbol": 16, "n_blank": 16},
            "dense": {"n_symbol": 16, "n_blank": 8},
            "sparse": {"n_symbol": 16, "n_blank": 32},
        },
        Recipe(n_step=1500, n_batch=16, rate=3e-3),
    ),
    "counting_1": counting(1, n_step=1500, n_batch=16, rate=3e-3),
    "counting_3": counting(3, n_step=1500, n_batch=16, rate=3e-3),
    "text": Language("text", LENGTHS, Recipe(300, 8, n_measured=100), LANGUAGE_SIZES),
    "code": Language("code", LENGTHS, Recipe(300, 8, n_measured=100), LANGUAGE_SIZES),
    "text_longer": Language(
        "text", LENGTHS, Recipe(1500, 8, n_measured=100), LANGUAGE_SIZES, n_seed=1
    ),
}


def shortened(experiment, n_step, n_measured):
    """Return the experiment with less training and fewer sequences measured."""
    recipe = experiment.recipe
    recipe = replace(
        recipe,
        n_step=min(n_step or recipe.n_step, recipe.n_step),
        n_measured=min(n_measured or recipe.n_measured, recipe.n_measured),
    )
    return replace(experiment, recipe=recipe)
