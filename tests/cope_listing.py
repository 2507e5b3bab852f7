"""The paper's listing of CoPE (arXiv 2405.18719, appendix B), and attention with it.

The oracle of all tests of CoPE: in float64, through torch's own autograd.
"""

# SPDX-License-Identifier: BSD-3-Clause

import torch


def listing(query, attn_logits, pos_emb):
    """Positional logits as the paper prints them; pos_emb is (..., D, P)."""
    gates = torch.sigmoid(attn_logits)
    pos = gates.flip(-1).cumsum(dim=-1).flip(-1)
    pos = pos.clamp(max=pos_emb.shape[-1] - 1)
    pos_ceil = pos.ceil().long()
    pos_floor = pos.floor().long()
    logits_int = torch.matmul(query, pos_emb)
    logits_ceil = logits_int.gather(-1, pos_ceil)
    logits_floor = logits_int.gather(-1, pos_floor)
    w = pos - pos_floor
    return logits_ceil * w + logits_floor * (1 - w)


def visible(n_query, n_key, causal, mask=None):
    """Which key each query sees: with `causal`, the last query sees the last key."""
    seen = torch.ones(n_query, n_key, dtype=torch.bool)
    if causal:
        seen = seen.tril(n_key - n_query)
    return seen if mask is None else seen & mask


def attention(
    q,
    k,
    v,
    position_embedding,
    *,
    scale=None,
    causal=True,
    mask=None,
    position_scale=1.0,
    gate_key=None,
):
    """Attention by the listing, for q (..., H, T, D) and k, v (..., G, S, D)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gate_key = k if gate_key is None else gate_key
    each = q.shape[-3] // max(k.shape[-3], 1)
    k, v, gate_key = (x.repeat_interleave(each, -3) for x in (k, v, gate_key))
    seen = visible(q.shape[-2], k.shape[-2], causal, mask)
    sees = seen.any(-1, keepdim=True)
    products = torch.matmul(q, gate_key.mT) * scale
    gate_logits = products.masked_fill(~seen, -torch.inf)
    bias = listing(q * position_scale, gate_logits, position_embedding)
    # Rows that see nothing: without NaN here, and zeros in the end.
    logits = (torch.matmul(q, k.mT) * scale + bias).masked_fill(
        ~seen & sees, -torch.inf
    )
    return torch.softmax(logits, -1).masked_fill(~sees, 0) @ v
