"""Change the RoPE of transformers' models: config and frequencies.

Knows transformers' configs and rotary modules; every change can be undone in any
order.  torch and transformers are imported inside functions only.
"""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import threading
import weakref
from dataclasses import dataclass
from typing import NamedTuple

from ._check import must
from ._hf_exact import EXACT_TYPES, ExactForward, Frequencies, rotary_dim
from ._scaling import ntk_theta
from ._scaling_check import KEYS, LENGTH, TRAINED, betas

# Types that measure against the trained length.
TRAINED_LENGTH_TYPES = ("llama3", "longrope", "yarn")
# ... and whose factor may be left to be the ratio of the lengths.
RATIO_TYPES = ("ntk_by_parts", "longrope", "yarn")

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
        scalings = [r for r in requests if r.scaling is not None]
        lengths = [r.length for r in requests if r.length is not None]
        if not scalings and not lengths:
            return own, own_length
        length = lengths[-1] if lengths else own_length
        after = dict(own)
        if scalings:
            scaling = {TRAINED: trained_length} | scalings[-1].scaling
            # What other patches say of the length may not change a factor.
            scaling = _with_factor(scaling, scalings[-1].length or own_length)
            after = _rewrite(scaling, unscaled, config)
        if "dynamic" in after["rope_type"]:
            length = min(length, trained_length)
        elif after["rope_type"] in TRAINED_LENGTH_TYPES:
            after.setdefault(TRAINED, trained_length)
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
        _check_dynamic(new, rope_type, length)
        if any(request.exact for request in new) and rope_type not in EXACT_TYPES:
            listed = ", ".join(repr(name) for name in KEYS if name != "dynamic")
            rule = f"be False unless the rope_type is one of {listed}"
            raise ValueError(must("patch", "exact", rule, f"True with {rope_type!r}"))
        after = copy.copy(self.config)
        after.rope_parameters, after.max_position_embeddings = dict(parameters), length
        if any(request.exact or request.scaling for request in new):
            Frequencies.of(after)  # or an error that says which number it cannot take
        for module in self.modules:
            _check_width(module, after)
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
        known = self.config.rope_parameters["rope_type"] in EXACT_TYPES
        frequencies = Frequencies.or_none(self.config) if wanted and known else None
        if frequencies is not None:
            exact.install(module, frequencies)
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
    asked, dim = repr(scaling["rope_type"]), rotary_dim(config, before)
    if scaling["rope_type"] in ("ntk", "dynamic") and dim < 4:
        rule = f"not be {asked} for a model that rotates one pair"
        raise ValueError(must("patch", "scaling['rope_type']", rule, asked))
    after = {k: before[k] for k in ("partial_rotary_factor",) if k in before}
    scaling = {"rope_theta": before["rope_theta"]} | in_transformers(scaling)
    after["rope_type"] = scaling.pop("rope_type")
    theta, alpha = scaling.pop("rope_theta"), scaling.pop("alpha", 1.0)
    after["rope_theta"] = theta if alpha == 1 else ntk_theta("patch", dim, theta, alpha)
    if after["rope_type"] not in TRAINED_LENGTH_TYPES:
        del scaling[TRAINED]
    return after | scaling


def in_transformers(scaling):
    """Return a scaling under the name and the keys that transformers knows.

    That of ntk is the default with a larger rope_theta, which needs a model.
    """
    scaling = dict(scaling)
    if scaling["rope_type"] == "ntk":
        scaling["rope_type"] = "default"
    if scaling["rope_type"] == "ntk_by_parts":  # the very formula of Llama 3
        low, high = betas(scaling)
        scaling = {k: v for k, v in scaling.items() if "beta" not in k}
        scaling |= {"low_freq_factor": low, "high_freq_factor": high}
        scaling["rope_type"] = "llama3"
    return scaling


def _with_factor(scaling, length):
    """Return a scaling whose factor, if missing, is the ratio of the lengths."""
    if scaling["rope_type"] not in RATIO_TYPES or "factor" in scaling:
        return scaling
    trained = scaling[TRAINED]
    if scaling["rope_type"] != "longrope" and length <= trained:
        rule = f"be given, or {LENGTH} be more than {trained}"
        raise ValueError(must("patch", "scaling['factor']", rule, length))
    return {**scaling, "factor": max(length / trained, 1.0)}


def _check_dynamic(requests, rope_type, length):
    """Refuse a trained length that transformers would not hear of."""
    scalings = [r.scaling for r in requests if r.scaling is not None]
    trained = scalings[-1].get(TRAINED, length) if scalings else length
    if rope_type == "dynamic" and trained != length:
        rule = f"be {LENGTH}, {length}, under 'dynamic'"
        raise ValueError(must("patch", f"scaling[{TRAINED!r}]", rule, trained))


def _check_width(module, config):
    """Refuse a config under which a module would have another number of pairs."""
    inv_freq, _ = _init_of(module, config.rope_parameters["rope_type"])(config)
    if inv_freq.shape != module.inv_freq.shape:
        rule = f"leave the model its {len(module.inv_freq)} pairs per head"
        raise ValueError(must("patch", "scaling", rule, f"{len(inv_freq)} pairs"))


_ATTRIBUTES = (
    "rope_type",
    "attention_scaling",
    "max_seq_len_cached",
    "original_max_seq_len",
)
# Ends of the names under which longrope and dynamic keep what they computed, the latter
# in some versions of transformers only.
_NOTES = ("long_inv_freq", "_max_seq_len_cached")
_BUFFERS = ("inv_freq", "original_inv_freq")


def _notes(module):
    """Return what the forward of a module noted for later calls, by name."""
    own = vars(module)
    return {name: own[name] for name in own if name.endswith(_NOTES)}


def _state(module):
    attributes = {name: getattr(module, name) for name in _ATTRIBUTES}
    attributes |= _notes(module)
    buffers = [getattr(module, name) for name in _BUFFERS]
    return attributes, buffers, [each.detach().clone() for each in buffers]


def _restore(module, state):
    attributes, buffers, values = state
    for name in _notes(module):
        delattr(module, name)
    for name, value in attributes.items():
        setattr(module, name, value)
    for name, before in zip(_BUFFERS, buffers, strict=True):
        now = getattr(module, name)
        # Dynamic types replace the buffer; a model that was moved has to stay there.
        if (now.dtype, now.device) == (before.dtype, before.device):
            setattr(module, name, before)
    _write_buffers(module, values)


def _write_buffers(module, values):
    """Write values; the buffer objects stay, others may hold them."""
    for name, value in zip(_BUFFERS, values, strict=True):
        getattr(module, name).detach().copy_(value)


def _recompute(module):
    """Do what the module's own constructor does, from its config as it is now."""
    module.rope_type = module.config.rope_parameters["rope_type"]
    length = module.config.max_position_embeddings
    module.max_seq_len_cached = module.original_max_seq_len = length
    for name in _notes(module):
        delattr(module, name)
    if module.inv_freq is module.original_inv_freq:
        # A dynamic type leaves one buffer under both names, longrope writes into one.
        module.inv_freq = module.inv_freq.detach().clone()
    init = _init_of(module, module.rope_type)
    inv_freq, module.attention_scaling = init(module.config)
    _write_buffers(module, (inv_freq, inv_freq))


def _init_of(module, rope_type):
    """Return transformers' function that computes the frequencies of a config."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type == "default":
        return module.compute_default_rope_parameters
    if rope_type not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(map(repr, ROPE_INIT_FUNCTIONS))
        rule = f"be known to the transformers installed here: {known}"
        raise ValueError(must("patch", "scaling['rope_type']", rule, repr(rope_type)))
    return ROPE_INIT_FUNCTIONS[rope_type]
