"""Change the RoPE of transformers' models: config, frequencies, exact tables.

Knows transformers' configs and rotary modules; every change can be undone in any
order.  torch and transformers are imported inside functions only.
"""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import threading
import types
import weakref
from dataclasses import dataclass
from typing import NamedTuple

from ._check import must
from ._hf_rotation import make_tensor_obstacle, make_trace_mark, tally
from ._scaling import ntk_theta

# Types whose frequencies are one formula of the config, whatever the length.
EXACT_TYPES = ("default", "linear")
# Types that measure against the trained length.
TRAINED_LENGTH_TYPES = ("llama3", "longrope", "yarn")
# Exact frequencies must be the module's own up to the rounding of its recipe: the
# exponent, the power of theta, the reciprocal and a factor, each a few ulp.
SAME_FREQUENCY_ULP = 16

lock = threading.RLock()
subjects = {}  # id of a config -> Subject, while a patch asks something of it
standing = []  # requests that every model built from now on gets


@dataclass(frozen=True, eq=False)
class Request:
    """What one call of `posenc.hf.patch` asks of RoPE, beyond speed."""

    scaling: dict | None
    length: int | None
    exact: bool

    @property
    def rewrites(self):
        return self.scaling is not None or self.length is not None

    def __bool__(self):
        return self.rewrites or self.exact


class Written(dict):
    """RoPE parameters that patches wrote, with what they replaced.

    A deep copy of the config keeps the memory, so that nothing is scaled twice; a
    pickle holds a plain dict.
    """

    def __init__(self, parameters, before, length, requests):
        super().__init__(parameters)
        self.before, self.length, self.requests = before, length, requests

    def __deepcopy__(self, memo):
        parameters = copy.deepcopy(dict(self), memo)
        return Written(parameters, dict(self.before), self.length, self.requests)

    def __reduce__(self):
        return dict, (dict(self),)


class Pristine(NamedTuple):
    """A config, what its undo brings back, and what no patch has ever touched.

    They differ in a copy of a patched model, which keeps the scaling as its own.
    """

    config: object
    parameters: dict
    length: int
    unscaled: dict
    trained_length: int

    @classmethod
    def of(cls, config, asked=()):
        """Look at a config; what these requests wrote is not its own."""
        written, length = config.rope_parameters, config.max_position_embeddings
        if not isinstance(written, Written):
            return cls(config, written, length, written, length)
        unscaled = dict(written.before), written.length
        own = unscaled if set(written.requests) <= set(asked) else (written, length)
        return cls(config, *own, *unscaled)


class Subject:
    """A config, the rotary modules that follow it, and what patches ask of them.

    Every state is computed from the pristine one and the requests still active, the
    latest of which decides; so patches nest and may be undone in any order.
    """

    def __init__(self, config, twins=(), asked=()):
        self.requests, self.rewritten = [], False
        self.modules = weakref.WeakKeyDictionary()  # -> state to restore, None: none
        self.exact = weakref.WeakKeyDictionary()  # -> ExactForward
        self.pristine = [Pristine.of(each, asked) for each in (config, *twins)]

    @property
    def config(self):
        return self.pristine[0].config

    def settings(self, requests):
        """Return (rope_parameters, max_position_embeddings) as these requests say."""
        config, own, own_length, unscaled, trained_length = self.pristine[0]
        scalings = [r.scaling for r in requests if r.scaling is not None]
        lengths = [r.length for r in requests if r.length is not None]
        if not scalings and not lengths:
            return own, own_length
        after = _rewrite(scalings[-1], unscaled, config) if scalings else dict(own)
        length = lengths[-1] if lengths else own_length
        if "dynamic" in after["rope_type"]:
            length = min(length, trained_length)
        elif after["rope_type"] in TRAINED_LENGTH_TYPES:
            after.setdefault("original_max_position_embeddings", trained_length)
        writers = tuple(request for request in requests if request.rewrites)
        return Written(after, unscaled, trained_length, writers), length

    def adopt(self, module):
        """Let a module follow this config; it comes back to the state it is in."""
        if module not in self.modules:
            self.modules[module] = _state(module) if self.rewritten else None

    def push(self, *new):
        """Add requests if they can be met together; change nothing if they cannot."""
        parameters, length = self.settings([*self.requests, *new])
        rope_type = parameters["rope_type"]
        lengths = [request.length for request in new if request.length is not None]
        if lengths and lengths[-1] > length:
            name = "max_position_embeddings"
            rule = f"be at most {length} under {rope_type!r}, which more would turn off"
            raise ValueError(must("patch", name, rule, lengths[-1]))
        if any(request.exact for request in new) and rope_type not in EXACT_TYPES:
            rule = "be False unless the rope_type is 'default', 'linear' or 'ntk'"
            raise ValueError(must("patch", "exact", rule, f"True with {rope_type!r}"))
        self.requests += new
        self.settle()

    def missing(self):
        """Return what every new model gets and this config has not got yet."""
        return [request for request in standing if request not in self.requests]

    def drop(self, request):
        if request in self.requests:
            self.requests.remove(request)
            self.settle()

    def settle(self):
        """Bring configs and modules to what the active requests say."""
        parameters, length = self.settings(self.requests)
        rewrite = any(request.rewrites for request in self.requests)
        modules = list(self.modules)
        if rewrite and not self.rewritten:
            for module in modules:
                self.modules[module] = _state(module)
        if rewrite or self.rewritten:
            for config, own, own_length, *_ in self.pristine:
                config.rope_parameters = parameters if rewrite else own
                config.max_position_embeddings = length if rewrite else own_length
            for module in modules:
                state = None if rewrite else self.modules[module]
                _recompute(module) if state is None else _restore(module, state)
        self.rewritten = rewrite
        for module in modules:
            self.settle_exact(module)

    def settle_exact(self, module):
        wanted = any(request.exact for request in self.requests)
        exact = self.exact.setdefault(module, ExactForward())
        if wanted and self.config.rope_parameters["rope_type"] in EXACT_TYPES:
            exact.install(module, exact_frequencies(self.config))
        else:
            exact.remove(module)


def subject_of(config, twins=(), asked=()):
    """Return the `Subject` of a config, a new one if no patch asks anything of it."""
    subject = subjects.get(id(config))
    if subject is None or not subject.requests:
        subject = subjects[id(config)] = Subject(config, twins, asked)
    return subject


def drop_everywhere(request):
    """Take a request back from all configs and from models yet to be built."""
    if request in standing:
        standing.remove(request)
    for key, subject in list(subjects.items()):
        subject.drop(request)
        if not subject.requests:
            del subjects[key]


def make_constructor(replacement):
    """Make the ``__init__`` of a rotary class that gives new models what patches ask.

    The config is rewritten before the original constructor reads it; so all that
    transformers computes from it, now or when it loads weights, is right by itself.
    """
    original = replacement.original

    def __init__(self, config, *args, **kwargs):
        with lock:
            subject = subject_of(config, asked=standing) if standing else None
            if subject is not None and (missing := subject.missing()):
                subject.push(*missing)
        original(self, config, *args, **kwargs)
        if subject is not None:
            with lock:
                subject.modules[self] = None
                subject.settle_exact(self)

    return __init__


def _rewrite(scaling, before, config):
    """Return the rope_parameters by which transformers itself does this scaling."""
    after = {k: before[k] for k in ("partial_rotary_factor",) if k in before}
    ntk = scaling["rope_type"] == "ntk"
    after["rope_type"] = "default" if ntk else scaling["rope_type"]
    after["rope_theta"] = scaling.get("rope_theta", before["rope_theta"])
    if "factor" in scaling:
        after["factor"] = scaling["factor"]
    if ntk:
        dim = _rotary_dim(config, before)
        if dim < 4:
            rule = "not be 'ntk' for a model that rotates one pair"
            raise ValueError(must("patch", "scaling['rope_type']", rule, "'ntk'"))
        after["rope_theta"] = ntk_theta(dim, after["rope_theta"], scaling["alpha"])
    return after


def _rotary_dim(config, parameters):
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


_ATTRIBUTES = (
    "rope_type",
    "attention_scaling",
    "max_seq_len_cached",
    "original_max_seq_len",
)
_BUFFERS = ("inv_freq", "original_inv_freq")


def _state(module):
    attributes = {name: getattr(module, name) for name in _ATTRIBUTES}
    return attributes, [getattr(module, name).detach().clone() for name in _BUFFERS]


def _restore(module, state):
    attributes, buffers = state
    for name, value in attributes.items():
        setattr(module, name, value)
    _write_buffers(module, buffers)


def _write_buffers(module, values):
    """Write values; the buffer objects stay, others may hold them."""
    for name, value in zip(_BUFFERS, values, strict=True):
        getattr(module, name).detach().copy_(value)


def _recompute(module):
    """Do what the module's own constructor does, from its config as it is now."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    module.rope_type = module.config.rope_parameters["rope_type"]
    length = module.config.max_position_embeddings
    module.max_seq_len_cached = module.original_max_seq_len = length
    if module.rope_type == "default":
        init = module.compute_default_rope_parameters
    else:
        init = ROPE_INIT_FUNCTIONS[module.rope_type]
    inv_freq, module.attention_scaling = init(module.config)
    _write_buffers(module, (inv_freq, inv_freq))


def exact_frequencies(config):
    """Return the (float64 inv_freq, attention_factor) that the config stands for."""
    from . import rope_inv_freq

    parameters = dict(config.rope_parameters)
    dim = _rotary_dim(config, parameters)
    parameters.pop("partial_rotary_factor", None)
    theta = parameters.pop("rope_theta")
    return rope_inv_freq(dim, theta=theta, scaling=parameters)


def check_exact(name, module):
    """Refuse a module whose frequencies are not those of its config."""
    import torch

    inv_freq, _ = exact_frequencies(module.config)
    ours, theirs = torch.from_numpy(inv_freq), module.inv_freq.double().cpu()
    # They came from float32, and may have been rounded further (model.bfloat16()).
    eps = max(
        torch.finfo(dtype).eps for dtype in (torch.float32, module.inv_freq.dtype)
    )
    tolerance = SAME_FREQUENCY_ULP * eps
    if ours.shape != theirs.shape or ((ours - theirs).abs() > tolerance * ours).any():
        rule = f"be False: {name}.inv_freq is not what the model's config says"
        raise ValueError(must("patch", "exact", rule, True))


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

    from . import rope_table

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
        inv_freq, factor = exact.frequencies
        tables = rope_table(
            position_ids.numpy(),
            inv_freq,
            attention_factor=factor,
            dtype=np.float64 if x.dtype == torch.float64 else np.float32,
        )
        return tuple(
            torch.from_numpy(np.concatenate((table, table), axis=-1)).to(x.dtype)
            for table in tables
        )

    forward.exact, forward.previous = exact, previous
    return forward
