"""
Who attends with contextual positions: posenc, and what people run today.

A peer is a function from the work to its runs, as in peers.py. Its results are checked
against the paper's listing in float64, gradients included.
"""

# SPDX-License-Identifier: BSD-3-Clause
import functools

import torch
from torch.nn.functional import scaled_dot_product_attention

import posenc

from .timing import Run

HEADS, HEAD_DIM, N_POSITION = 8, 64, 64
EMBEDDING_SIZE = 0.1  # standard deviation
# Rounds at least: of posenc and of plain attention; of the others, and of those if they
# take many seconds. All have run once for the check before.
OUR_ROUNDS, THEIR_ROUNDS, LONG_ROUNDS = 7, 3, 1
LONG = 2**22  # logits of a head
# Arrays of (H, T, T) float32 by which memory grows while `listing_attention` runs: its
# two of int64 count twice. Gradients keep more. Both as measured at T = 2048.
LISTING_ARRAYS = {"forward": 12, "forward + backward": 15}

# Largest error, as `Task.error` has it. A wrong neighbour, scale or mask gives a tenth
# and more. Rounding gives less: of 16-bit logits, and of a count in float32, where the
# listing's derivative is zero if the sum happens to be whole.
TOLERANCE = {torch.float32: 2.0**-7, torch.bfloat16: 2.0**-4}


def counted(gates, n_position=N_POSITION):
    """Return the positions of the paper's listing."""
    return gates.flip(-1).cumsum(dim=-1).flip(-1).clamp(max=n_position - 1)


def between(logits_int, pos):
    """Return what the listing takes from the products with the embeddings."""
    pos_ceil = pos.ceil().long()
    pos_floor = pos.floor().long()
    logits_ceil = logits_int.gather(-1, pos_ceil)
    logits_floor = logits_int.gather(-1, pos_floor)
    w = pos - pos_floor
    return logits_ceil * w + logits_floor * (1 - w)


def listing(attn_logits, logits_int):
    """Return what the listing in the paper's appendix B returns.

    But for its first product: logits_int is of queries and embeddings.
    """
    pos = counted(torch.sigmoid(attn_logits), logits_int.shape[-1])
    return between(logits_int, pos)


def listing_attention(q, k, v, embedding, hidden):
    """Attend as the listing is used; 16-bit logits are counted in float32.

    In 16 bits a count stands still from some point on.
    """
    logits = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf)
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    bias = listing(logits, (q @ embedding).to(logits.dtype))
    return torch.softmax(logits + bias, -1).to(v.dtype) @ v


class Task:
    """Operands of one case, for all who compute from them; gradients too if asked."""

    def __init__(self, operands, hidden, grad, backward):
        self.operands, self.hidden = operands, hidden
        self.grad, self.backward, self.dtype = grad, backward, grad.dtype

    def run(self, compute, operands=None, grad=None):
        """Return the result of a function of the operands, and the gradients."""
        operands = self.operands if operands is None else operands
        if not self.backward:
            return [compute(*operands)]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in operands]
            out = compute(*leaves)
            grad = self.grad if grad is None else grad
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def fresh(self, compute, least_rounds=None):
        """Return the mode that all have: results in memory of their own."""
        if least_rounds is None:
            is_long = self.hidden.numel() >= LONG
            least_rounds = LONG_ROUNDS if is_long else THEIR_ROUNDS
        return {"fresh": Run(lambda: self.run(compute), least_rounds=least_rounds)}

    def forget(self):
        """Take away the results that somebody else may have left."""

    def read(self, result):
        """Return results as they are compared."""
        return [x.double() for x in result]

    def error(self, found):
        """Return the root mean square of the error, as a part of that of the result.

        The worst of the result and its gradients.
        """
        pairs = zip(found, self.expected, strict=True)
        return max(float((f - e).norm() / e.norm()) for f, e in pairs)

    def tolerance(self, own_angles):
        """Return the largest error that rounding explains."""
        return TOLERANCE[self.dtype]


# --- attention -----------------------------------------------------------------------


class Attention(Task):
    """Queries, keys, values and embeddings."""

    def __init__(self, n_query, n_key, dtype, n_position=N_POSITION, backward=False):
        generator = torch.Generator().manual_seed(n_key)
        draw = functools.partial(torch.randn, generator=generator)
        lengths = n_query, n_key, n_key, n_query
        memory = (draw(1, n, HEADS, HEAD_DIM).to(dtype) for n in lengths)
        q, k, v, grad = (x.transpose(1, 2) for x in memory)  # as projections leave them
        embedding = (EMBEDDING_SIZE * draw(HEAD_DIM, n_position)).to(dtype)
        ones = torch.ones(n_query, n_key, dtype=torch.bool)
        hidden = ones.triu(n_key - n_query + 1)
        super().__init__((q, k, v, embedding), hidden, grad, backward)

    @functools.cached_property
    def expected(self):
        """Results of the listing in float64, one head after the other."""
        q, k, v, embedding = (x.double() for x in self.operands)
        heads = [
            self.run(
                functools.partial(listing_attention, hidden=self.hidden),
                (q[:, h], k[:, h], v[:, h], embedding),
                self.grad[:, h].double(),
            )
            for h in range(HEADS)
        ]
        merged = [torch.stack(parts, 1) for parts in zip(*heads, strict=True)]
        if self.backward:
            merged[-1] = merged[-1].sum(1)  # the heads share the embedding
        return merged


def plain(work):
    """Attend without positions, by torch: what CoPE is to cost less than."""
    is_causal = bool(work.hidden.any())

    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    call = functools.partial(work.run, attend, work.operands[:3])
    return Run(call, least_rounds=OUR_ROUNDS)


def ours(work, n_thread):
    """Attend by posenc; gradients are those of posenc.torch."""
    from posenc.torch import cope_attention

    attend = cope_attention if work.backward else posenc.cope_attention
    return work.fresh(attend, OUR_ROUNDS)


def ours_torch(work, n_thread):
    """Attend by the operator that autograd and torch.compile know."""
    from posenc.torch import cope_attention

    return {} if work.backward else work.fresh(cope_attention, OUR_ROUNDS)


def compiled_listing(work, n_thread):
    """Attend by the listing under torch.compile."""
    attend = _compiled(listing_attention)
    return work.fresh(functools.partial(attend, hidden=work.hidden))


def eager_listing(work, n_thread):
    """Attend by the listing."""
    return work.fresh(functools.partial(listing_attention, hidden=work.hidden))


def _compiled(function):
    torch.compiler.reset()  # or the compilations of other cases count as its own
    return torch.compile(function, dynamic=False)


def x_transformers(work, n_thread):
    """Attend by x-transformers' Attend, in which CoPE has its place.

    By definition it is the listing with -finfo.max where others have -inf: the same
    numbers, but for queries that see no key. It counts in 16 bits if data have so many,
    and keeps two copies of the logits for others to read.
    """
    from x_transformers.attend import Attend

    cope = _x_cope(work.operands[-1])
    attention = Attend(heads=HEADS, causal=True, scale=HEAD_DIM**-0.5, cope=cope)

    def attend(q, k, v, embedding):
        cope.pos_emb = embedding.mT
        return attention(q, k, v)[0]

    return work.fresh(attend)


def _x_cope(embedding):
    """Return x-transformers' module; its embeddings are a tensor (D, P) of ours."""
    from x_transformers.x_transformers import CoPE

    module = CoPE(embedding.shape[0], heads=HEADS, max_pos=embedding.shape[1])
    del module.pos_emb  # a parameter, where gradients of a tensor are asked for
    module.pos_emb = embedding.mT
    return module


COPE_PEERS = {
    "posenc": ours,
    "posenc.torch": ours_torch,
    "compiled listing": compiled_listing,
    "listing": eager_listing,
    "x-transformers": x_transformers,
}


# --- the bias ------------------------------------------------------------------------


class Bias(Task):
    """Causal logits, and the products of queries and embeddings."""

    def __init__(self, length, backward=False):
        attention = Attention(length, length, torch.float32)
        self.q, k, _, self.embedding = attention.operands
        hidden = attention.hidden
        logits = (self.q @ k.mT * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf)
        grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        operands = logits, self.q @ self.embedding
        super().__init__(operands, hidden, grad.masked_fill(hidden, 0), backward)
        self.out = torch.empty_like(logits)

    @functools.cached_property
    def expected(self):
        """Results of the listing in float64."""
        logits, z = (x.double() for x in self.operands)
        return self.read(self.run(listing, (logits, z), self.grad.double()))

    def forget(self):
        """Take away the results that somebody else may have left."""
        self.out.fill_(torch.nan)

    def read(self, result):
        """Return results where keys are seen: elsewhere the listing's mean nothing."""
        bias, *gradients = super().read(result)
        return [bias.masked_fill(self.hidden, 0), *gradients]


def _our_bias(work, n_thread):
    """Compute the bias by posenc; with gradients by posenc.torch."""
    if work.backward:
        from posenc.torch import cope_bias

        return work.fresh(cope_bias, OUR_ROUNDS)
    given = functools.partial(posenc.cope_bias, *work.operands, out=work.out)
    runs = work.fresh(posenc.cope_bias, OUR_ROUNDS)
    return {"out given": Run(lambda: [given()], least_rounds=OUR_ROUNDS), **runs}


def _x_bias(work, n_thread):
    """Compute the bias by x-transformers' module, which makes z itself."""
    if work.backward:
        return {}
    cope = _x_cope(work.embedding)
    return work.fresh(lambda logits, z: cope(work.q, logits))


BIAS_PEERS = {
    "posenc": _our_bias,
    "compiled listing": lambda work, n_thread: work.fresh(_compiled(listing)),
    "listing": lambda work, n_thread: work.fresh(listing),
    "x-transformers": _x_bias,
}
