"""Read the scaling dicts of transformers, old and new: their keys, checked numbers."""

# SPDX-License-Identifier: BSD-3-Clause
import itertools
from typing import NamedTuple

import numpy as np

from ._check import must, real_number, whole_number

TRAINED, LENGTH = "original_max_position_embeddings", "max_position_embeddings"
# The borders of NTK-by-parts and YaRN, where a dict names no other.
BETA_FAST, BETA_SLOW = 32.0, 1.0
# Beyond it not every whole number is a float64.
MAX_LENGTH = 2**53


class Keys(NamedTuple):
    """What is read for a rope type."""

    required: tuple = ()
    optional: tuple = ()


# By the names of transformers; ntk and ntk_by_parts are ours.
KEYS = {
    "default": Keys(),
    "linear": Keys(("factor",)),
    "ntk": Keys(("alpha",)),
    "dynamic": Keys(("factor",), (LENGTH,)),
    "ntk_by_parts": Keys((), ("factor", "beta_fast", "beta_slow", TRAINED, LENGTH)),
    "yarn": Keys(
        (),
        (
            *("factor", "beta_fast", "beta_slow", "truncate"),
            *("attention_factor", "mscale", "mscale_all_dim", TRAINED, LENGTH),
        ),
    ),
    "longrope": Keys(
        ("short_factor", "long_factor"),
        ("factor", "attention_factor", "short_mscale", "long_mscale", TRAINED, LENGTH),
    ),
    "llama3": Keys(
        ("factor", "low_freq_factor", "high_freq_factor"), (TRAINED, LENGTH)
    ),
    "proportional": Keys((), ("factor", "partial_rotary_factor")),
}
# Spellings of old configs and of other models.
ALIASES = {
    "su": "longrope",
    "mrope": "default",
    "xdrope": "dynamic",
    "ntk_alpha": "ntk",
    "ntk-by-parts": "ntk_by_parts",
}
# What dicts hold for a model of their own, under the name there and the type meant.
_HUNYUAN = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_FOREIGN = {
    ("mrope", "default"): ("mrope_section",),
    ("dynamic", "ntk"): _HUNYUAN,
    ("xdrope", "ntk"): _HUNYUAN,
}
# What a Llama takes from its config, or not at all.
_ELSEWHERE = (LENGTH, "short_mscale", "long_mscale")
# Pairs of which the second must be more, and what stands for a missing one.
_ORDERED = (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))
_DEFAULTS = {"beta_slow": BETA_SLOW, "beta_fast": BETA_FAST}


def rope_type_of(scaling, name):
    """Return our name for the rope type that a dict calls `name`."""
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name == "dynamic" and scaling.get("alpha") is not None:
        return "ntk"  # as configs of HunYuan have it
    if name == "yarn" and "short_factor" in scaling:
        return "longrope"  # as early configs of Phi-3 have it
    return name


def read_scaling(function, scaling):
    """Return the rope type of a dict, and plain numbers for the keys that it reads.

    Other keys, and those that are None, are left out.
    """
    named = scaling.get("rope_type", scaling.get("type", "default"))
    rope_type = rope_type_of(scaling, named)
    if not isinstance(rope_type, str) or rope_type not in KEYS:
        rule = f"be one of {', '.join(map(repr, KEYS))}"
        raise ValueError(must(function, "scaling['rope_type']", rule, repr(named)))
    numbers, (required, optional) = {"rope_type": rope_type}, KEYS[rope_type]
    for key in required + optional:
        if scaling.get(key) is not None:
            numbers[key] = _READERS[key](function, f"scaling[{key!r}]", scaling[key])
        elif key in required:
            raise _missing(function, key, rope_type, scaling)
    if rope_type == "yarn" and "truncate" in scaling and "truncate" not in numbers:
        # Transformers takes None for False here, not for what is usual.
        _flag(function, "scaling['truncate']", None)
    for pair in _ORDERED:
        _check_order(function, numbers, *pair)
    return numbers


def read_strictly(function, scaling):
    """Read a dict that is to be written into a model, and refuse what it ignores."""
    old = scaling.get("type")
    named = scaling.get("rope_type", old)
    numbers = read_scaling(function, {**scaling, "rope_type": named})
    rope_type = numbers["rope_type"]
    if old is not None and rope_type_of(scaling, old) != rope_type:
        rule = f"be the same as its 'rope_type' {named!r}"
        raise ValueError(must(function, "scaling['type']", rule, repr(old)))
    own = [key for keys in KEYS[rope_type] for key in keys if key not in _ELSEWHERE]
    allowed = dict.fromkeys(("rope_type", "rope_theta", TRAINED, *own))
    foreign = (_FOREIGN.get((name, rope_type), ()) for name in (named, old))
    known = {"type", *allowed, *itertools.chain(*foreign)}
    if unknown := [key for key in scaling if key not in known]:
        rule = f"have only the keys {', '.join(allowed)} for {rope_type!r}"
        raise ValueError(must(function, "scaling", rule, repr(unknown)))
    for key in ("rope_theta", TRAINED):
        if scaling.get(key) is not None:
            numbers[key] = _READERS[key](function, f"scaling[{key!r}]", scaling[key])
    return numbers


def number_of(function, numbers, key, when=""):
    """Return a number that only some ways to use a rope type need."""
    if key not in numbers:
        raise _missing(function, key, numbers["rope_type"], numbers, when)
    return numbers[key]


def trained_length(function, numbers):
    """Return the length before the extension; transformers reads dicts so, too."""
    if TRAINED not in numbers and LENGTH in numbers:
        return numbers[LENGTH]
    return number_of(function, numbers, TRAINED)


def extension_factor(function, numbers):
    """Return the factor of a scaling: given, or the ratio of its two lengths."""
    if "factor" in numbers:
        return numbers["factor"]
    length, trained = numbers.get(LENGTH), numbers.get(TRAINED)
    if length is None or trained is None or length < trained:
        rule = f"be given, or follow from {LENGTH} >= {TRAINED}"
        raise ValueError(must(function, "scaling['factor']", rule, _shown(numbers)))
    return length / trained


def betas(numbers):
    """Return the turns in the trained length between which a scaling sets in."""
    return tuple(numbers.get(key, default) for key, default in _DEFAULTS.items())


def _missing(function, key, rope_type, scaling, when=""):
    rule = f"be given for rope_type {rope_type!r}{when}"
    return ValueError(must(function, f"scaling[{key!r}]", rule, _shown(scaling)))


def _shown(scaling):
    """Return a dict as an error shows it: lists by how much they hold."""
    return {
        key: f"{len(value)} numbers" if isinstance(value, list | tuple) else value
        for key, value in scaling.items()
    }


def _check_order(function, numbers, low, high):
    if low not in numbers and high not in numbers:
        return
    least, value = (numbers.get(key, _DEFAULTS.get(key)) for key in (low, high))
    if value <= least:
        rule = f"be more than scaling[{low!r}], {least}"
        raise ValueError(must(function, f"scaling[{high!r}]", rule, value))


# --- readers: (function, parameter, value) -> a plain number, or an error ------------


def _number(which, holds):
    def read(function, name, value):
        return real_number(function, name, value, f"be a number {which}", holds)

    return read


def _is_positive(value):
    return value > 0


def _flag(function, name, value):
    if not isinstance(value, bool | np.bool):
        raise TypeError(must(function, name, "be True or False", repr(value)))
    return bool(value)


def _length(function, name, value):
    value = whole_number(function, name, value, 2)
    if value > MAX_LENGTH:
        raise ValueError(must(function, name, "be at most 2**53", value))
    return value


def _list(function, name, value):
    rule = "be a list of numbers of more than 0"
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list | tuple):
        raise TypeError(must(function, name, rule, repr(value)))
    return [real_number(function, name, each, rule, _is_positive) for each in value]


_AT_LEAST_1 = _number("of at least 1", lambda value: value >= 1)
_POSITIVE = _number("of more than 0", _is_positive)
_WEIGHT = _number("of at least 0", lambda value: value >= 0)
# Further out their logarithms and quotients leave float64.
_TURNS = _number("from 1e-9 to 1e9", lambda value: 1e-9 <= value <= 1e9)
_READERS = {
    "factor": _AT_LEAST_1,
    "alpha": _AT_LEAST_1,
    "attention_factor": _POSITIVE,
    "short_mscale": _POSITIVE,
    "long_mscale": _POSITIVE,
    "mscale": _WEIGHT,
    "mscale_all_dim": _WEIGHT,
    "low_freq_factor": _TURNS,
    "high_freq_factor": _TURNS,
    "beta_slow": _TURNS,
    "beta_fast": _TURNS,
    "truncate": _flag,
    "short_factor": _list,
    "long_factor": _list,
    "partial_rotary_factor": _number("from 0 to 1", lambda value: 0 <= value <= 1),
    "rope_theta": _number("of more than 1", lambda value: value > 1),
    TRAINED: _length,
    LENGTH: _length,
}
# Keys that tell that somebody meant a scaling.
TELLING = set(_READERS) - {"rope_theta", "partial_rotary_factor", TRAINED, LENGTH}
