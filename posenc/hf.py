"""Patch Hugging Face models: the same bits faster, or a longer context, with undo.

`patch` does it, and returns a `Handle` with ``report()`` and ``undo()``; `FAMILIES` are
the models that it knows.
"""

# SPDX-License-Identifier: BSD-3-Clause
#
# The rotation is in _hf_rotation, configs and frequencies in _hf_scaling, exact tables
# in _hf_exact. transformers and torch are imported inside functions only.

import functools
import importlib
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from . import _hf_exact, _hf_rotation, _hf_scaling
from ._check import must, whole_number
from ._hf_tally import tally
from ._scaling_check import read_strictly

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
    changes, except that a NaN is always the same one, and none of a gradient but the
    sign of a zero. The rotation of q and k, in float32, bfloat16, float16 and float64,
    forward and backward, is then done by posenc for every model of the same family in
    this process, because transformers keeps that function in a module. Under
    `torch.compile` it is one operator of the graph, with the bits of eager, where
    inductor by itself rounds 16-bit numbers less often. What posenc cannot do (other
    devices, tables of another type than q, exported programs) the original does, and
    `Handle.report` counts it.

    Parameters
    ----------
    model : torch.nn.Module, optional
        A model with a ``LlamaRotaryEmbedding``.  None: the models that are built or
        loaded from now to the undo; models that exist keep their frequencies.
    scaling : dict, optional
        A rope type with its numbers, as in a config of transformers, of any version:
        ``{'rope_type': 'yarn', 'factor': 4}``; the types and their numbers are those of
        `posenc.rope_inv_freq`. It replaces the model's own rope type and keeps its
        ``rope_theta`` and partial factor, unless it names them. A missing
        ``'original_max_position_embeddings'`` is the model's
        ``max_position_embeddings`` before the patch; a missing ``'factor'`` of yarn,
        ntk_by_parts and longrope is the new one over it.
    max_position_embeddings : int, optional
        The length for the model's config.
    exact : bool, default False
        Compute frequencies in float64 from the config, and tables that are exact for
        them at any position but for the rounding to float32, or to float64 in a float64
        model; those of a 16-bit model are rounded from float32.  For all types but
        dynamic, whose frequencies depend on the lengths of earlier calls.
    inplace : bool, default False
        Write the rotated q and k where q and k lie, if no gradient is needed and no
        other tensor holds that memory: the same bits, with less of it. In a model it
        is the fresh output of a projection, which attention does not look at again. It
        is left alone if a hook or a residual still holds that output, or a slice of it,
        as that of a fused projection. Who calls ``apply_rotary_pos_emb`` directly finds
        q and k changed. It holds for all models in this process; compiled ones decide
        for themselves what they overwrite.

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
    itself understands (ntk is ``default`` with a larger ``rope_theta``; ntk_by_parts is
    ``llama3``, which is the same formula, with the betas as its bands), so
    ``save_pretrained`` gives a model that loads anywhere. A config that several models
    share changes for all of them; of their frequencies, those of the patched one, and
    what transformers computes anew meanwhile (a dynamic type that grows). The undo
    gives everything back, also to models that were built under the patch. A model that
    was saved under a scaling and is loaded under the same one is scaled twice.

    Under dynamic and longrope transformers itself changes the frequencies with the
    length it reads, as it does in any model. Dynamic counts from the config's
    ``max_position_embeddings``, so this cannot be raised with it, and another trained
    length is given as ``max_position_embeddings``.

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
       Models", 2023, definitions 1 to 3. https://arxiv.org/abs/2309.00071

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
        handle = Handle(request, inplace)
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
    """Say loudly what the user hardly meant: that nothing was served."""
    if not counts or "posenc" in counts:
        return []
    [(reason, _)] = counts.most_common(1)
    return [f"  WARNING: NOTHING WAS FASTER in {counts.total()} calls: {reason}"]


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

    def __init__(self, request, inplace):
        self._request, self._inplace, self._active = request, inplace, True
        self._replacements, self._replaced, self._left_alone = [], [], []
        self._before, self._after = tally.copy(), None

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
        since = (self._after or tally.copy()) - self._before
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
            self._active, self._after = False, tally.copy()
            _hf_scaling.drop_everywhere(self._request)
            problems = [each.release(self._inplace) for each in self._replacements]
            self._left_alone += filter(None, problems)

    def _replace(self, owner, name, make, check=None):
        replacement = _hf_rotation.Replacement.at(owner, name, make)
        if check is not None:
            check(replacement)
        replacement.acquire(self._inplace)
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
            _hf_exact.check_exact(name, module)
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


def _check_scaling(scaling):
    """Return the rope type and plain numbers of the keys that are given, or None."""
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise TypeError(must("patch", "scaling", "be a dict or None", repr(scaling)))
    return read_strictly("patch", scaling)


def _check_flags(exact, inplace):
    if not isinstance(exact, bool):
        raise TypeError(must("patch", "exact", "be True or False", repr(exact)))
    if not isinstance(inplace, bool):
        raise TypeError(must("patch", "inplace", "be True or False", repr(inplace)))


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
