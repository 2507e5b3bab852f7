"""How operators of PyTorch are defined, and when a call has to go through one.

Operators are what `torch.compile` keeps in its graphs; they stand below autograd. Where
nobody looks on, the functions behind them do the work themselves, which costs less.
"""

# SPDX-License-Identifier: BSD-3-Clause

import torch
from torch.autograd import forward_ad

is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_tracing = torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack
_level = torch._C._functorch.maybe_current_level
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def undisturbed():
    """Tell whether nobody traces, watches or transforms what is computed now."""
    return not (
        is_dynamo_compiling()
        or _modes()
        or forward_ad._current_level >= 0
        or _level() is not None
        or _is_tracing()
    )


def transformed():
    """Tell whether ``torch.func`` or forward mode wants more than autograd does.

    Dynamo does not follow this question into ``torch.func``, but breaks its graph
    there: loud or slow, but not wrong.
    """
    return _level() is not None or forward_ad._current_level >= 0


def are_plain(tensors):
    """Tell whether these have memory of the CPU, and nobody has to hear about it.

    None stands for a tensor that was not given.
    """
    return undisturbed() and all(
        t is None
        or (type(t) in _PLAIN and t.is_cpu and not (t.is_neg() or _is_batched(t)))
        for t in tensors
    )


def need_gradients(tensors):
    """Tell whether somebody asks for gradients of one of these, tensors or None."""
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )


# --- definitions ---------------------------------------------------------------------

library = torch.library.Library("posenc", "FRAGMENT")


def register(schema, implementation, fake):
    """Define an operator on CPU tensors; return it."""
    name = schema[: schema.index("(")]
    library.define(schema)
    library.impl(name, implementation, "CPU")
    torch.library.register_fake(f"posenc::{name}", fake, lib=library)
    return getattr(torch.ops.posenc, name).default


def register_looped(schema, implementation, fake):
    """Define an operator that ``torch.vmap`` calls once for each of a batch."""
    operator = register(schema, implementation, fake)

    def batched(info, in_dims, *arguments):
        results = [
            operator(
                *(
                    a if dim is None else a.select(dim, i)
                    for a, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(operator, batched)
    return operator


def nothing(*_):
    """Stand for the result of an operator that writes into what it is given."""


def bare(tensor):
    """Return the tensor below autograd, and below a subclass that only adds to it."""
    if type(tensor) not in _PLAIN:
        tensor = tensor.as_subclass(torch.Tensor)
    return tensor.detach() if tensor.requires_grad else tensor


def bares(tensors):
    """Return tensors as `bare` does; None for None."""
    return [None if t is None else bare(t) for t in tensors]


# --- autograd functions --------------------------------------------------------------


def distinct(tensors):
    """Return the tensors, none of them twice: Dynamo does not take that."""
    result = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in result):
            tensor = tensor.view_as(tensor)
        result.append(tensor)
    return result


def spare_gradients(ctx, results, needed):
    """Declare that no gradient is needed of what has come from constants."""
    pairs = zip(results, needed, strict=True)
    ctx.mark_non_differentiable(*[result for result, need in pairs if not need])
