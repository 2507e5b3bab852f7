"""Generators of Flip-Flop, Selective Copy and Counting.

Each gives a batch: ``tokens`` (n, length) and ``is_answer``, True where a token has
to be predicted from those before it. Rows that are shorter are padded at the right,
where a causal model never looks. Sizes are parameters: the papers' are in README.md.
"""

# SPDX-License-Identifier: BSD-3-Clause

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Flip-Flop: Liu et al. 2023, "Exposing Attention Glitches with Flip-Flop Language
# Modeling". Tokens 0 and 1 are the bits.
WRITE, READ, IGNORE = 2, 3, 4

# Selective Copy: Gu and Dao 2023, section 4.1.1. Symbols come after these two.
BLANK, COPY, FIRST_SYMBOL = 0, 1, 2
N_SYMBOL = 16

# Counting: Golovneva et al. 2024, section 5.3. Tokens 0 to 10 are the values.
MAX_VALUE = 10
PASS, INCREMENT, SET, END, PRINT, PAD, FIRST_NAME = range(MAX_VALUE + 1, MAX_VALUE + 8)
MAX_VARIABLES = 5


@dataclass(frozen=True)
class Task:
    """
    A generator and how its sequences are judged.

    Attributes
    ----------
    make : callable
        ``make(rng, n, **setting)`` gives a batch of n sequences.
    n_token : int
        Size of the vocabulary.
    judged : {'all', 'last'}
        Whether a sequence counts as right when all its answers are, or the last is.
    """

    make: Callable
    n_token: int
    judged: str = "all"


def flip_flop(rng, n, *, n_pair, p_ignore):
    """
    Draw strings of a memory of one bit: what was written last must be read.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of chance.
    n : int
        Number of strings.
    n_pair : int
        Instructions in a string, each followed by a bit: write, then a mixture,
        then read.
    p_ignore : float
        Share of ``ignore`` in the mixture; write and read halve the rest.

    Returns
    -------
    tokens : ndarray of int64, shape (n, 2 * n_pair)
        Instructions and bits by turns.
    is_answer : ndarray of bool, of the same shape
        True at the bits after ``read``.
    """
    p_other = (1 - p_ignore) / 2
    kinds = rng.choice(
        [WRITE, READ, IGNORE], p=[p_other, p_other, p_ignore], size=(n, n_pair)
    )
    kinds[:, 0], kinds[:, -1] = WRITE, READ
    bits = rng.integers(2, size=(n, n_pair))
    where = np.where(kinds == WRITE, np.arange(n_pair), 0)
    last_write = np.maximum.accumulate(where, axis=1)
    memory = np.take_along_axis(bits, last_write, axis=1)
    bits = np.where(kinds == READ, memory, bits)
    tokens = np.stack([kinds, bits], axis=2).reshape(n, -1)
    is_answer = np.zeros_like(tokens, dtype=bool)
    is_answer[:, 1::2] = kinds == READ
    return tokens, is_answer


def selective_copy(rng, n, *, n_symbol, n_blank):
    """
    Draw symbols strewn among blanks, to be repeated without the blanks.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of chance.
    n : int
        Number of sequences.
    n_symbol, n_blank : int
        Symbols and blanks in each, in random order.

    Returns
    -------
    tokens : ndarray of int64, shape (n, 2 * n_symbol + n_blank + 1)
        The mixture, the token ``COPY``, and the symbols again.
    is_answer : ndarray of bool, of the same shape
        True at the repeated symbols.
    """
    symbols = rng.integers(N_SYMBOL, size=(n, n_symbol)) + FIRST_SYMBOL
    is_symbol = np.arange(n_symbol + n_blank) < n_symbol
    is_symbol = rng.permuted(np.tile(is_symbol, (n, 1)), axis=1)
    mixture = np.full(is_symbol.shape, BLANK)
    mixture[is_symbol] = symbols.ravel()
    tokens = np.hstack([mixture, np.full((n, 1), COPY), symbols])
    is_answer = np.zeros_like(tokens, dtype=bool)
    is_answer[:, -n_symbol:] = True
    return tokens, is_answer


def counting(rng, n, *, n_variable, max_step, pass_weight):
    """
    Draw programs that set variables to 0, increment them, pass, and print one.

    An operation is drawn by weight, set 1, increment 7 and `pass_weight`, until it
    is one that can be done: no variable is incremented that was not set or has
    reached ``MAX_VALUE``. A program that set none is drawn again.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of chance.
    n : int
        Number of programs.
    n_variable : int
        Names to choose from.
    max_step : int
        Longest program; its number of statements is between 3 and this.
    pass_weight : float
        Weight of the statement that does nothing.

    Returns
    -------
    tokens : ndarray of int64, shape (n, length)
        ``pass;`` is one token, ``a ++;`` two, ``a = 0 ;`` four, ``print a`` two,
        then the value, then padding.
    is_answer : ndarray of bool, of the same shape
        True at the value.
    """
    programs = []
    while len(programs) < n:
        programs += draw_programs(rng, n, n_variable, max_step, pass_weight)
    programs = programs[:n]
    tokens = np.full((n, max(map(len, programs))), PAD)
    is_answer = np.zeros_like(tokens, dtype=bool)
    for row, program in enumerate(programs):
        tokens[row, : len(program)] = program
        is_answer[row, len(program) - 1] = True
    return tokens, is_answer


def draw_programs(rng, n, n_variable, max_step, pass_weight):
    """Return up to n programs as lists of tokens, those dropped that set nothing."""
    values = np.full((n, n_variable), -1)  # -1: not yet set
    n_step = rng.integers(3, max_step + 1, size=n)
    programs = [[] for _ in range(n)]
    for step in range(n_step.max()):
        for row, kind, name in draw_statements(rng, values, pass_weight):
            if step >= n_step[row]:
                continue
            programs[row] += statement(kind, name)
            if kind != PASS:
                values[row, name] = 0 if kind == SET else values[row, name] + 1
    finished = []
    for program, known in zip(programs, values, strict=True):
        names = np.flatnonzero(known >= 0)
        if len(names):
            name = rng.choice(names)
            finished.append([*program, PRINT, FIRST_NAME + name, known[name]])
    return finished


def draw_statements(rng, values, pass_weight):
    """Draw (row, kind, variable) for each row, given the values of its variables."""
    is_set = values >= 0
    can_grow = is_set & (values < MAX_VALUE)
    share = can_grow.sum(1) / np.maximum(is_set.sum(1), 1)
    weights = np.stack([np.ones(len(values)), 7 * share], axis=1)
    chance = rng.random(len(values)) * (weights.sum(1) + pass_weight)
    kinds = np.full(len(values), PASS)
    kinds[chance < weights.sum(1)] = INCREMENT
    kinds[chance < weights[:, 0]] = SET
    names = rng.integers(values.shape[1], size=len(values))
    lottery = np.where(can_grow, rng.random(values.shape), -1)
    names = np.where(kinds == INCREMENT, lottery.argmax(1), names)
    return zip(range(len(values)), kinds, names, strict=True)


def statement(kind, name):
    """Return the tokens of one statement."""
    name = FIRST_NAME + name
    return {PASS: [PASS], INCREMENT: [name, INCREMENT], SET: [name, SET, 0, END]}[kind]


TASKS = {
    "flip_flop": Task(flip_flop, n_token=5, judged="last"),
    "selective_copy": Task(selective_copy, n_token=FIRST_SYMBOL + N_SYMBOL),
    "counting": Task(counting, n_token=FIRST_NAME + MAX_VARIABLES),
}
