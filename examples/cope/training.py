"""Train one model on one experiment and measure it."""

# SPDX-License-Identifier: BSD-3-Clause

import math
import platform
import time

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from .model import Decoder, Shape

FINAL_RATE = 0.05  # of the full rate, at the end of the cosine
CLIPPED = 1.0  # greatest length of a gradient


def new_model(experiment, positions, seed):
    """Return the untrained model of an experiment."""
    torch.manual_seed(seed)
    return Decoder(Shape(experiment.n_token, **experiment.sizes), positions)


def schedule(step, n_step):
    """Return the share of the full rate: a linear warm-up, then a cosine."""
    n_warm_up = max(1, min(100, n_step // 10))
    cosine = 0.5 * (1 + math.cos(math.pi * step / n_step))
    return min((step + 1) / n_warm_up, FINAL_RATE + (1 - FINAL_RATE) * cosine)


def answer_loss(model, tokens, is_answer):
    """Return the mean cross entropy of the answers, in nats."""
    asked = is_answer[:, 1:]
    return F.cross_entropy(model(tokens[:, :-1])[asked], tokens[:, 1:][asked])


def train(model, experiment, seed, name=""):
    """
    Train a model in place and return its losses.

    Parameters
    ----------
    model : Decoder
        What to train.
    experiment : Synthetic or Language
        Where batches and the recipe come from.
    seed : int
        Of the batches.
    name : str, default ''
        What stands before the progress bar.

    Returns
    -------
    list of float
        The loss of each step, in nats.
    """
    rng, recipe = np.random.default_rng(seed), experiment.recipe
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, recipe.n_step)
    )
    losses = []
    bar = tqdm(range(recipe.n_step), desc=name, unit="step", mininterval=1)
    for _ in bar:
        loss = answer_loss(model, *experiment.batch(rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {np.mean(losses[-50:]):.4f}", refresh=False)
    return losses


def run(experiment, positions, seed, name=""):
    """
    Train and measure one model.

    Returns
    -------
    model : Decoder
        The trained model.
    record : dict
        What it was, how long it took, and what came out; fit for JSON.
    """
    model = new_model(experiment, positions, seed)
    began = time.process_time()  # not the clock: others may use the machine too
    losses = train(model, experiment, seed, name)
    seconds = time.process_time() - began
    with torch.no_grad():
        measured = experiment.measure(model)
    record = {
        "positions": positions,
        "seed": seed,
        "n_step": experiment.recipe.n_step,
        "n_parameter": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "loss": round(float(np.mean(losses[-50:])), 5),
        "unit": experiment.unit,
        "measured": {key: round(value, 4) for key, value in measured.items()},
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
    }
    return model, record
