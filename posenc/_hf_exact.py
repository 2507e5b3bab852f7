"""Exact tables for the rotary modules of transformers, from the config in float64.

torch is imported inside functions only.
"""

# SPDX-License-Identifier: BSD-3-Clause

import math
import types
import weakref
from typing import NamedTuple

from ._check import must
from ._hf_tally import make_tensor_obstacle, make_trace_mark, tally
from ._scaling import frequencies
from ._scaling_check import LENGTH, TRAINED, extension_factor, read_scaling

# Types whose frequencies follow from the config and the positions of one call. Those
# of 'dynamic' also depend on the calls before.
EXACT_TYPES = ("default", "linear", "yarn", "longrope", "llama3", "proportional")
# Exact frequencies must be the module's own up to the rounding of its recipe: the
# exponent, the power of theta, the reciprocal and a factor, each a few ulp. Where two
# speeds are mixed, an ulp of the faster one counts up to `factor` times.
SAME_FREQUENCY_ULP = 16


def rotary_dim(config, parameters):
    """Return how many channels of a head these parameters rotate."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def inv_freq_of(function, config, parameters, seq_len=None):
    """Return the float64 (inv_freq, attention_factor) of a model and its parameters."""
    is_whole = parameters["rope_type"] == "proportional"
    dim = rotary_dim(config, {} if is_whole else parameters)
    parameters = {LENGTH: config.max_position_embeddings, **parameters}
    return frequencies(
        function, dim, parameters["rope_theta"], parameters, seq_len, "float64"
    )


class Frequencies(NamedTuple):
    """What a config stands for, in float64."""

    usual: object  # the inv_freq of sequences up to `length`
    beyond: object
    length: float
    attention_factor: float
    mixed: float  # how far apart the speeds are that are mixed in a pair

    @classmethod
    def of(cls, config):
        """Compute them from the config."""
        parameters = config.rope_parameters
        usual, attention_factor = inv_freq_of("patch", config, parameters)
        beyond, length, mixed = usual, math.inf, 1.0
        if parameters["rope_type"] == "longrope":
            length = parameters[TRAINED]
            beyond, _ = inv_freq_of("patch", config, parameters, length + 1)
        if parameters["rope_type"] in ("llama3", "yarn"):
            lengths = {LENGTH: config.max_position_embeddings}
            numbers = read_scaling("patch", lengths | parameters)
            mixed = extension_factor("patch", numbers)
        return cls(usual, beyond, length, attention_factor, mixed)

    @classmethod
    def or_none(cls, config):
        """Compute them, if the config holds only numbers that we know."""
        try:
            return cls.of(config)
        except (TypeError, ValueError):
            return None

    def at(self, seq_len):
        """Return the inv_freq for a sequence of this length."""
        return self.usual if seq_len <= self.length else self.beyond


def check_exact(name, module):
    """Refuse a module whose frequencies are not those of its config."""
    import torch

    wanted, theirs = Frequencies.of(module.config), module.inv_freq.double().cpu()
    # They came from float32, and may have been rounded further (model.bfloat16()).
    eps = torch.finfo(torch.float32).eps * wanted.mixed
    tolerance = SAME_FREQUENCY_ULP * max(eps, torch.finfo(module.inv_freq.dtype).eps)
    for inv_freq in (wanted.usual, wanted.beyond):
        ours = torch.from_numpy(inv_freq)
        if ours.shape == theirs.shape and _all_near(ours, theirs, tolerance):
            return
    rule = f"be False: {name}.inv_freq is not what the model's config says"
    raise ValueError(must("patch", "exact", rule, True))


def _all_near(ours, theirs, tolerance):
    return bool(((ours - theirs).abs() <= tolerance * ours).all())


def _nothing():
    """Stand for a weak reference whose object is gone."""


class ExactForward:
    """The ``forward`` that makes exact tables for one rotary module.

    A deep copy of the module inherits the function, which there does what the class
    does: it knows neither the copy's frequencies nor what may change them.
    """

    def __init__(self):
        self.frequencies = None  # None: stand aside
        self.function = self.module = _nothing

    def install(self, module, frequencies):
        self.frequencies = frequencies
        if self.function() is None:
            self.module = weakref.ref(module)
            forward = _make_exact_forward(self, _foreign_forward(module))
            # A bound method, which a deep copy of the model binds to the copy.
            module.forward = types.MethodType(forward, module)
            self.function = weakref.ref(forward)

    def remove(self, module):
        self.frequencies, ours = None, self.function()
        current = module.__dict__.get("forward")
        if ours is None or getattr(current, "__func__", None) is not ours:
            return  # nothing to remove, or it stands aside inside somebody's wrapper
        self.function = _nothing
        del module.forward
        if ours.previous is not None:
            module.forward = ours.previous


def _foreign_forward(module):
    """Return what stands on the instance, unless it is what a copy inherits."""
    current = module.__dict__.get("forward")
    exact = getattr(getattr(current, "__func__", None), "exact", None)
    inherited = isinstance(exact, ExactForward) and exact.module() is not module
    return None if inherited else current


def _make_exact_forward(exact, previous):
    """Make a rotary module's ``forward``, around what stood on the instance."""
    import numpy as np
    import torch

    from ._rope import rope_table

    tensor_obstacle, traced = make_tensor_obstacle(), make_trace_mark("table")

    def original(self, x, position_ids):
        if previous is not None and self is exact.module():
            return previous(x, position_ids)
        return type(self).forward(self, x, position_ids)

    def forward(self, x, position_ids):
        if torch.compiler.is_compiling():
            traced()
            return original(self, x, position_ids)
        if exact.frequencies is None or self is not exact.module():
            return original(self, x, position_ids)
        reason = tensor_obstacle((x, position_ids))
        tally.add("table", reason)
        if reason is not None:
            return original(self, x, position_ids)
        positions = position_ids.numpy()
        tables = rope_table(
            positions,
            exact.frequencies.at(positions.max(initial=0) + 1),
            attention_factor=exact.frequencies.attention_factor,
            dtype=np.float64 if x.dtype == torch.float64 else np.float32,
        )
        return tuple(
            torch.from_numpy(np.concatenate((table, table), axis=-1)).to(x.dtype)
            for table in tables
        )

    forward.exact, forward.previous = exact, previous
    return forward
