"""Patch Hugging Face models: the same bits faster, or a longer context, with undo.

The public part: `patch`, what it returns, and the table of model families.  The
rotation is in ``_hf_rotation``, configs and frequencies in ``_hf_scaling``.
transformers and torch are imported inside functions only.
"""

# SPDX-License-Identifier: BSD-3-Clause

import functools
import importlib
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from . import _hf_rotation, _hf_scaling
from ._check import must, one_of, real_number, whole_number

__all__ = ["FAMILIES", "Family", "Handle", "Report", "patch"]


class Family(NamedTuple):
    """Where the models of one family keep their RoPE: a row of `FAMILIES`.

    Attributes
    ----------
    module : str
        The modeling file.
    rotary : str
        Its class of modules that make the tables.
    apply : str
        Its function ``(q, k, cos, sin, unsqueeze_dim=1) -> (q, k)``, which attention
        looks up by this name in every call.
    layout : {'half', 'interleaved'}
        Which channels of a head make a pair.
    """

    module: str
    rotary: str
    apply: str
    layout: str


FAMILIES = (
    Family(
        module="transformers.models.llama.modeling_llama",
        rotary="LlamaRotaryEmbedding",
        apply="apply_rotary_pos_emb",
        layout="half",
    ),
)


def patch(
    model=None,
    *,
    scaling=None,
    max_position_embeddings=None,
    exact=False,
    inplace=False,
):
    """Speed up a transformers model bit for bit, or extend its context, until undone.

    Without `scaling`, `max_position_embeddings` and `exact` no bit of any output
    changes, except that a NaN is always the same one.  The rotation of q and k is then
    done by posenc for every model of the same family in this process, because
    transformers keeps that function in a module; what posenc cannot do (gradients,
    16-bit types, other devices, torch.compile) the original does, and `Handle.report`
    counts it.

    Parameters
    ----------
    model : torch.nn.Module, optional
        A model with a ``LlamaRotaryEmbedding``.  None: the models that are built or
        loaded from now to the undo; models that exist keep their frequencies.
    scaling : dict, optional
        A rope type in the spelling of transformers: ``{'rope_type': 'default'}``,
        ``{'rope_type': 'linear', 'factor': 4}``, or ours,
        ``{'rope_type': 'ntk', 'alpha': 8}``, which makes the base
        ``rope_theta * alpha ** (d / (d - 2))`` for d rotated channels. It replaces the
        model's own rope type and keeps its ``rope_theta``, unless it names one. The
        old spelling ``'type'`` is read too; ``'original_max_position_embeddings'``
        may stand there, but none of these types uses it.
    max_position_embeddings : int, optional
        The length for the model's config.
    exact : bool, default False
        Compute frequencies in float64 from the config, and tables that are exact for
        them at any position but for the rounding to float32, or to float64 in a float64
        model; those of a 16-bit model are rounded from float32.  For the types default,
        linear and ntk.
    inplace : bool, default False
        Not available yet.

    Returns
    -------
    Handle
        With ``report()`` and ``undo()``; works in ``with``.

    Raises
    ------
    ImportError
        If torch or transformers is not there.
    TypeError
        If a parameter is of the wrong kind.
    ValueError
        If the model has no known RoPE, is not loaded, or shares its config with another
        patched model; if a scaling is unknown or its numbers are out of range; if the
        length exceeds what a dynamic rope type can be told; if exact frequencies are
        not known for the rope type or are not the model's.
    RuntimeError
        If transformers' own function does not rotate as its family is known to.

    See Also
    --------
    posenc.rope_qk : The rotation.
    posenc.rope_table : Exact tables.

    Notes
    -----
    Patches nest, and may be undone in any order: of those active on a model the latest
    that names a scaling, or a length, decides it, always from the model's own settings.

    Until the undo, the model's config holds the equal setting that transformers
    itself understands (ntk is ``default`` with a larger ``rope_theta``), so
    ``save_pretrained`` gives a model that loads anywhere. A config that several models
    share changes for all of them; of their frequencies, those of the patched one, and
    what transformers computes anew meanwhile (a dynamic type that grows). The undo
    gives everything back, also to models that were built under the patch. A model that
    was saved under a scaling and is loaded under the same one is scaled twice.

    A deep copy of a patched model keeps the scaling and the length as its own, which
    undoing a patch of the copy gives back; a new scaling still starts from the settings
    before the first. Copies and pickles do not keep exact tables: patch them too.

    References
    ----------
    .. [1] J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021, eq. 34. https://arxiv.org/abs/2104.09864
    .. [2] S. Chen et al., "Extending Context Window of Large Language Models via
       Positional Interpolation", 2023, eq. 4. https://arxiv.org/abs/2306.15595
    .. [3] B. Peng et al., "YaRN: Efficient Context Window Extension of Large Language
       Models", 2023, definition 1 ("NTK-aware" interpolation).
       https://arxiv.org/abs/2309.00071

    Examples
    --------
    >>> import posenc.hf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> with posenc.hf.patch(model, scaling={"rope_type": "ntk", "alpha": 8}):
    ...     print(round(model.config.rope_parameters["rope_theta"]))
    107672
    >>> print(round(model.config.rope_parameters["rope_theta"]))
    10000
    """
    _check_flags(exact, inplace)
    length = max_position_embeddings
    if length is not None:
        length = whole_number("patch", "max_position_embeddings", length, 1)
    request = _hf_scaling.Request(_check_scaling(scaling), length, exact)
    _check_model(model)
    with _hf_scaling.lock:
        handle = Handle(request)
        try:
            handle._patch_classes() if model is None else handle._patch_model(model)
        except BaseException:
            handle.undo()
            raise
    return handle


@dataclass(frozen=True, repr=False)
class Report:
    """What a patch replaced, what it left alone, and who did the work since.

    Attributes
    ----------
    active : bool
        False after `Handle.undo`.
    replaced, left_alone : tuple of str
        One line each, with the reason for what was left alone.
    rotations, tables : dict
        Calls since the patch, by who served them: ``'posenc'``, or the reason why the
        original did.  They cover every thread and model of the process.
    """

    active: bool
    replaced: tuple
    left_alone: tuple
    rotations: dict
    tables: dict

    def __str__(self):
        lines = [f"posenc.hf.patch: {'active' if self.active else 'undone'}"]
        lines += [f"  replaced: {line}" for line in self.replaced]
        lines += [f"  left alone: {line}" for line in self.left_alone]
        lines += _count_lines("rotations of q and k", self.rotations)
        lines += _count_lines("exact tables", self.tables) if self.tables else []
        lines += _warning(Counter(self.rotations))
        return "\n".join(lines)

    __repr__ = __str__


def _warning(counts):
    """Say loudly what the user hardly meant: nothing served, or gradients on."""
    total, ours = counts.total(), counts.pop("posenc", 0)
    if total and not ours:
        [(reason, _)] = counts.most_common(1)
        return [f"  WARNING: NOTHING WAS FASTER in {total} calls: {reason}"]
    if n_call := counts[_hf_rotation.GRADIENTS]:
        text = f"{n_call} of {total} calls were not faster: {_hf_rotation.GRADIENTS}"
        return [f"  WARNING: {text}"]
    return []


def _count_lines(title, counts):
    reasons = Counter({why: n for why, n in counts.items() if why != "posenc"})
    ours, theirs = counts.get("posenc", 0), reasons.total()
    lines = [f"  {title}: {ours} by posenc, {theirs} by the original"]
    return lines + [f"    {n} x {why}" for why, n in reasons.most_common()]


class Handle:
    """What `patch` returns: a report of what it did, and the way back.

    Works in ``with``; otherwise the patch stays until `undo`, whether or not anybody
    keeps the handle.
    """

    def __init__(self, request):
        self._request, self._active = request, True
        self._replacements, self._replaced, self._left_alone = [], [], []
        self._before, self._after = _hf_rotation.tally.copy(), None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()

    def __repr__(self):
        return f"<{str(self.report()).splitlines()[0]}>"

    def report(self):
        """Say what was replaced, what was left alone and why, and who did the work.

        Returns
        -------
        Report
            Prints as text.
        """
        since = (self._after or _hf_rotation.tally.copy()) - self._before
        rotations, tables = (
            {why or "posenc": n for (what, why), n in since.items() if what == work}
            for work in ("rotation", "table")
        )
        replaced, left_alone = tuple(self._replaced), tuple(self._left_alone)
        return Report(self._active, replaced, left_alone, rotations, tables)

    def undo(self):
        """Take back all that this patch did; others stay.  Once is enough."""
        with _hf_scaling.lock:
            if not self._active:
                return
            self._active, self._after = False, _hf_rotation.tally.copy()
            _hf_scaling.drop_everywhere(self._request)
            problems = [each.release() for each in self._replacements]
            self._left_alone += filter(None, problems)

    def _replace(self, owner, name, make, check=None):
        replacement = _hf_rotation.Replacement.at(owner, name, make)
        if check is not None:
            check(replacement)
        replacement.acquire()
        self._replacements.append(replacement)
        return replacement

    def _rotate(self, family):
        """Put our kernel behind the function that the family's attention calls."""
        owner = importlib.import_module(family.module)
        make = functools.partial(_hf_rotation.make_dispatcher, layout=family.layout)
        check = functools.partial(_hf_rotation.probe, layout=family.layout)
        replacement = self._replace(owner, family.apply, make, check)
        self._replaced.append(
            f"{replacement}, for all models in this process: same bits"
        )

    def _patch_classes(self):
        for family in FAMILIES:
            self._rotate(family)
            if self._request:
                rotary = getattr(importlib.import_module(family.module), family.rotary)
                make = _hf_scaling.make_constructor
                replacement = self._replace(rotary, "__init__", make)
                self._replaced.append(f"{replacement}, for models built from now on")
        if self._request:
            _hf_scaling.standing.append(self._request)
            self._left_alone.append("frequencies of the models that exist already")

    def _patch_model(self, model):
        known, unknown = _rotary_modules(model)
        for name, module in unknown:
            self._left_alone.append(f"{name}: {type(module).__name__} is not known")
        for family in dict.fromkeys(family for *_, family in known):
            self._rotate(family)
        if not self._request:
            self._left_alone += [f"{n}: its tables keep their bits" for n, *_ in known]
            return
        for subject, names in _subjects_of(model, known):
            subject.push(self._request)
            for name in names:
                self._describe(name, subject, model.get_submodule(name))

    def _describe(self, name, subject, module):
        if subject.rewritten:
            self._replaced.append(f"values in {name}.inv_freq and original_inv_freq")
            parameters = dict(subject.config.rope_parameters)
            length = subject.config.max_position_embeddings
            self._replaced.append(f"config.rope_parameters: {parameters}")
            self._replaced.append(f"config.max_position_embeddings: {length}")
        if self._request.exact:
            _hf_scaling.check_exact(name, module)
            self._replaced.append(f"{name}.forward: exact tables")


def _rotary_modules(model):
    """Return ([(name, module, family)], [(name, module)]): known and other ones."""
    rows = {(family.module, family.rotary): family for family in FAMILIES}
    known, unknown = [], []
    for name, module in model.named_modules():
        classes = [(cls.__module__, cls.__qualname__) for cls in type(module).__mro__]
        family = next((rows[cls] for cls in classes if cls in rows), None)
        if family is not None:
            known.append((name, module, family))
        elif "RotaryEmbedding" in type(module).__name__:
            unknown.append((name, module))
    if known:
        return known, unknown
    others = sorted({type(module).__name__ for _, module in unknown})
    rule = f"contain a {' or a '.join(family.rotary for family in FAMILIES)}"
    got = f"{type(model).__name__} with {', '.join(others) or 'no rotary embedding'}"
    raise ValueError(must("patch", "model", rule, got))


def _subjects_of(model, known):
    """Return [(subject, names)]: configs to rewrite and the modules they rule."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None))}
    ours, found = {module for _, module, _ in known}, {}
    for name, module, _ in known:
        if module.inv_freq.is_meta:
            rule = "be loaded before its frequencies can change"
            raise ValueError(must("patch", "model", rule, f"{name} on device 'meta'"))
        parameters = module.config.rope_parameters
        twins = [
            config
            for config in configs.values()
            if config is not module.config
            and getattr(config, "rope_parameters", None) == parameters
        ]
        subject = _hf_scaling.subject_of(module.config, twins)
        if not ours.issuperset(subject.modules):
            rule, got = (
                "have a config of its own",
                "one that another patched model uses",
            )
            raise ValueError(must("patch", "model", rule, got))
        subject.adopt(module)
        found.setdefault(id(subject), (subject, []))[1].append(name)
    return list(found.values())


_NUMBER_OF_TYPE = {"default": None, "linear": "factor", "ntk": "alpha"}
_COMMON_KEYS = ("rope_type", "rope_theta", "original_max_position_embeddings")


def _check_scaling(scaling):
    """Return a copy with 'rope_type' and plain floats, or None."""
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise TypeError(must("patch", "scaling", "be a dict or None", repr(scaling)))
    scaling = dict(scaling)
    old = scaling.pop("type", None)
    rope_type = scaling.setdefault("rope_type", old)
    one_of("patch", "scaling['rope_type']", rope_type, _NUMBER_OF_TYPE)
    if old not in (None, rope_type):
        rule = f"be the same as its 'rope_type' {rope_type!r}"
        raise ValueError(must("patch", "scaling['type']", rule, repr(old)))
    number = _NUMBER_OF_TYPE[rope_type]
    allowed = (*_COMMON_KEYS, number) if number else _COMMON_KEYS
    if unknown := [key for key in scaling if key not in allowed]:
        rule = f"have only the keys {', '.join(allowed)} for {rope_type!r}"
        raise ValueError(must("patch", "scaling", rule, repr(unknown)))
    if number:
        name, rule = f"scaling[{number!r}]", "be a number of at least 1"
        if number not in scaling:
            raise ValueError(must("patch", name, rule, "no such key"))
        scaling[number] = real_number(
            "patch", name, scaling[number], rule, lambda value: value >= 1
        )
    if "rope_theta" in scaling:
        name, rule = "scaling['rope_theta']", "be a number of more than 1"
        scaling["rope_theta"] = real_number(
            "patch", name, scaling["rope_theta"], rule, lambda value: value > 1
        )
    return scaling


def _check_flags(exact, inplace):
    if not isinstance(exact, bool):
        raise TypeError(must("patch", "exact", "be True or False", repr(exact)))
    if inplace is not False:
        rule = "be False (rotating in place is not available yet)"
        raise ValueError(must("patch", "inplace", rule, repr(inplace)))


def _check_model(model):
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        rule = "be installed: pip install 'posenc[hf]'"
        raise ImportError(
            must("patch", "torch and transformers", rule, error)
        ) from error
    if model is not None and not isinstance(model, torch.nn.Module):
        rule, got = "be a torch.nn.Module or None", type(model).__name__
        raise TypeError(must("patch", "model", rule, got))
