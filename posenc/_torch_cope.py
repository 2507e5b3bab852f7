"""Contextual positions (CoPE) for PyTorch: differentiable functions, and modules."""

# SPDX-License-Identifier: BSD-3-Clause

import torch

from . import _torch_cope_ops
from ._check import must, one_of, real_number, true_or_false, whole_number
from ._torch_check import as_tensor, check_call, check_tensor
from ._torch_register import is_dynamo_compiling

GATES = ("key", "gate_key", "value")


def cope_bias(logits, z, *, causal=True, mask=None, out=None):
    """
    Compute what contextual positions add to the logits, differentiably.

    The numbers are those of `posenc.cope_bias`, bit for bit. Under `torch.compile` the
    call is one operator.

    Parameters
    ----------
    logits : torch.Tensor, shape (..., T, S)
        Products of queries and keys on the CPU; -inf where a key may not be seen.
    z : torch.Tensor, shape (..., T, P)
        Products of queries and position embeddings.
    causal : bool, default True
        Query i sees the keys up to ``i + S - T``.
    mask : torch.Tensor of bool, broadcast to (..., T, S), optional
        True where a key may be seen.
    out : torch.Tensor, shape (..., T, S), optional
        Where the result goes. Without gradients only.

    Returns
    -------
    torch.Tensor, shape (..., T, S)
        What is to be added to the logits: 0 where a key may not be seen; `out` if it
        was given.

    Raises
    ------
    TypeError
        If an argument is no tensor or neither on the CPU nor on meta, or `out` is given
        where gradients are needed; and as `posenc.cope_bias` does.
    ValueError
        As `posenc.cope_bias` does.

    See Also
    --------
    posenc.cope_bias : The full description.
    cope_attention : Whole attention, without an array of shape (T, S).

    Notes
    -----
    Where a position is a whole number or P - 1, its derivative is taken as 0: so does
    the paper's listing, where ``ceil(p) == floor(p)``. Gradients of 16-bit tensors are
    summed in float32. Second derivatives are an error.

    References
    ----------
    .. [1] Golovneva et al., "Contextual Position Encoding: Learning to Count What's
       Important", 2024, appendix B. https://arxiv.org/abs/2405.18719

    Examples
    --------
    >>> import posenc.torch, torch
    >>> logits = torch.zeros(3, 3, requires_grad=True)  # gates of one half
    >>> z = torch.tensor([0.0, 1.0, 4.0]).expand(3, 3)  # of the positions 0, 1, 2
    >>> bias = posenc.torch.cope_bias(logits, z)
    >>> bias
    tensor([[0.5000, 0.0000, 0.0000],
            [1.0000, 0.5000, 0.0000],
            [2.5000, 1.0000, 0.5000]], grad_fn=<_BiasBackward>)
    >>> torch.autograd.grad(bias[2, 0], logits)[0][2]  # slope 3, of the gates 1/4
    tensor([0.7500, 0.7500, 0.7500])
    """
    here, given = "cope_bias", {"logits": logits, "z": z}
    if mask is not None:
        given["mask"] = mask = as_tensor(here, "mask", mask)
    if not is_dynamo_compiling():
        true_or_false(here, "causal", causal)
    check_call(here, given, out)
    return _torch_cope_ops.bias((logits, z, mask), causal, out)


def cope_attention(
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
    out=None,
):
    """
    Attend with contextual positions, differentiably.

    The numbers are those of `posenc.cope_attention`, bit for bit. The way back computes
    logits and gates once more, so that memory grows with T and S and not with their
    product. Under `torch.compile` the call is one operator.

    Parameters
    ----------
    q : torch.Tensor, shape (..., H, T, D)
        Queries on the CPU: float64, float32, bfloat16 or float16, in any memory layout.
    k, v : torch.Tensor, shape (..., G, S, D)
        Keys and values; G divides H.
    position_embedding : torch.Tensor or ndarray, shape (D, P) or (H, D, P)
        Embeddings of the positions 0 to P - 1, also as (1, D, P).
    scale, causal : optional
        As in `posenc.cope_attention`.
    mask : torch.Tensor or ndarray of bool, broadcast to (..., H, T, S), optional
        True where a key may be seen.
    position_scale : float, default 1.0
        What the products of queries with position embeddings are multiplied by.
    gate_key : torch.Tensor, shape (..., G, S, D), optional
        Keys that only the gates use; default k.
    out : torch.Tensor, shape (..., H, T, D), optional
        Where the result goes. Without gradients only.

    Returns
    -------
    torch.Tensor, shape (..., H, T, D)
        The attended values, in the memory order of q where shapes agree; `out` if it
        was given.

    Raises
    ------
    TypeError
        If an argument is no tensor or neither on the CPU nor on meta, or `out` is given
        where gradients are needed; and as `posenc.cope_attention` does.
    ValueError
        As `posenc.cope_attention` does.
    NotImplementedError
        If a second derivative is asked for.

    See Also
    --------
    posenc.cope_attention : The full description, with the variants of the paper's code.
    CoPEAttention : A module with projections and a cache.

    Notes
    -----
    There are gradients of q, k, v, the embedding and the gate key, each in the dtype of
    its tensor, summed in float32 at least and in an order that does not depend on the
    number of threads. Where a position is a whole number or P - 1, its derivative is
    taken as 0: so does the paper's listing, where ``ceil(p) == floor(p)``. In float32
    a gate is exactly 1 for logits from 17 on. ``torch.func.grad`` and ``vmap`` work,
    forward mode does not.

    References
    ----------
    .. [1] Golovneva et al., "Contextual Position Encoding: Learning to Count What's
       Important", 2024. https://arxiv.org/abs/2405.18719

    Examples
    --------
    >>> import posenc.torch, torch
    >>> q, k, v = torch.randn(3, 2, 4, 10, 16).unbind()  # batch, heads, tokens, D
    >>> embedding = torch.zeros(16, 8, requires_grad=True)
    >>> out = posenc.torch.cope_attention(q, k, v, embedding)
    >>> plain = torch.nn.functional.scaled_dot_product_attention
    >>> torch.allclose(out, plain(q, k, v, is_causal=True), atol=1e-5)  # zeros add none
    True
    >>> out.square().sum().backward()
    >>> embedding.grad.shape
    torch.Size([16, 8])
    """
    here = "cope_attention"
    given = {"q": q, "k": k, "v": v}
    embedding = as_tensor(here, "position_embedding", position_embedding)
    given["position_embedding"] = embedding
    if gate_key is not None:
        given["gate_key"] = gate_key
    if mask is not None:
        given["mask"] = mask = as_tensor(here, "mask", mask)
    if not is_dynamo_compiling():
        scale = None if scale is None else real_number(here, "scale", scale)
        position_scale = real_number(here, "position_scale", position_scale)
        true_or_false(here, "causal", causal)
    check_call(here, given, out)
    operands = q, k, v, embedding, gate_key, mask
    return _torch_cope_ops.attend(operands, (scale, position_scale, causal), out)


# --- modules -------------------------------------------------------------------------


class CoPE(torch.nn.Module):
    """
    Contextual positions as in the paper's listing, but in one pass.

    Takes the place of the class of that name in the paper's appendix B: same arguments,
    same parameter, same state dict.

    Parameters
    ----------
    npos_max : int
        Number of positions; those beyond ``npos_max - 1`` are ``npos_max - 1``.
    head_dim : int
        Channels of a query.
    device, dtype : optional
        Of the parameter.

    Attributes
    ----------
    pos_emb : torch.nn.Parameter, shape (1, head_dim, npos_max)
        Embeddings of the positions, zeros to begin with.

    Raises
    ------
    TypeError, ValueError
        If a size is no whole number of at least 1.

    See Also
    --------
    CoPEAttention : Whole attention, without an array of shape (T, S).

    References
    ----------
    .. [1] Golovneva et al., "Contextual Position Encoding: Learning to Count What's
       Important", 2024, appendix B. https://arxiv.org/abs/2405.18719

    Examples
    --------
    >>> import posenc.torch, torch
    >>> cope = posenc.torch.CoPE(npos_max=8, head_dim=16)
    >>> query, key = torch.randn(2, 4, 10, 16)  # batch, tokens, channels
    >>> future = torch.ones(10, 10).triu(1).bool()
    >>> logits = (query @ key.mT / 4).masked_fill(future, -torch.inf)
    >>> logits = logits + cope(query, logits)
    """

    def __init__(self, npos_max, head_dim, *, device=None, dtype=None):
        super().__init__()
        self.npos_max = whole_number("CoPE", "npos_max", npos_max, 1)
        head_dim = whole_number("CoPE", "head_dim", head_dim, 1)
        zeros = torch.zeros(1, head_dim, npos_max, device=device, dtype=dtype)
        self.pos_emb = torch.nn.Parameter(zeros)

    def forward(self, query, attn_logits, *, causal=False, mask=None):
        """
        Return what is to be added to the logits.

        Parameters
        ----------
        query : torch.Tensor, shape (..., T, head_dim)
            Queries.
        attn_logits : torch.Tensor, shape (..., T, S)
            Scaled products of queries and keys. They hold -inf where a key may not be
            seen, unless `causal` or `mask` say so: else the future would be counted.
        causal : bool, default False
            Query i sees the keys up to ``i + S - T``.
        mask : torch.Tensor of bool, broadcast to (..., T, S), optional
            True where a key may be seen.

        Returns
        -------
        torch.Tensor, shape (..., T, S)
            Positional logits, 0 where a key may not be seen.
        """
        z = query @ self.pos_emb[0]
        return cope_bias(attn_logits, z, causal=causal, mask=mask)

    def extra_repr(self):
        """Return what `repr` shows between the brackets."""
        return f"npos_max={self.npos_max}, head_dim={self.pos_emb.shape[1]}"


class KVCache:
    """
    Keys and values of the tokens so far, in memory that doubles when it is full.

    One cache serves one layer. With gradients enabled nothing is overwritten, at the
    price of a copy for each call: decode under `torch.no_grad` or `inference_mode`.

    See Also
    --------
    CoPEAttention : Takes one as `cache`.

    Examples
    --------
    >>> import posenc.torch, torch
    >>> cache = posenc.torch.KVCache()
    >>> k, v = cache.append(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    >>> k, v = cache.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    >>> len(cache), k.shape
    (6, torch.Size([1, 2, 6, 8]))
    """

    def __init__(self):
        self._memory, self._n_token = (), 0

    def __len__(self):
        return self._n_token

    def append(self, *new):
        """
        Add what belongs to new tokens, and return what belongs to all.

        Parameters
        ----------
        *new : torch.Tensor, shape (..., T, D)
            Keys, values and whatever else there is for each token, the same number of
            tensors in every call.

        Returns
        -------
        tuple of torch.Tensor, shape (..., S, D)
            The same of all tokens so far, as views of the cache.

        Raises
        ------
        TypeError
            If one is no tensor.
        ValueError
            If tensors differ from earlier ones in number, dtype or shape, but for T.
        """
        self._check(new)
        first, last = self._n_token, self._n_token + new[0].shape[-2]
        if torch.is_grad_enabled():
            old = [memory[..., :first, :] for memory in self._memory]
            if first:
                new = [torch.cat(pair, -2) for pair in zip(old, new, strict=True)]
            self._memory = tuple(new)
        else:
            self._reserve(new, last)
            for memory, tensor in zip(self._memory, new, strict=True):
                memory[..., first:last, :] = tensor
        self._n_token = last
        return tuple(memory[..., :last, :] for memory in self._memory)

    def _check(self, new):
        """Raise unless new tensors continue those in memory."""
        for tensor in new:
            check_tensor("KVCache", "new", tensor)
        kinds = [(t.dtype, (*t.shape[:-2], "T", *t.shape[-1:])) for t in new]
        old = [(t.dtype, (*t.shape[:-2], "T", *t.shape[-1:])) for t in self._memory]
        if min(t.ndim for t in new) < 2 or any(
            t.shape[-2] != new[0].shape[-2] for t in new
        ):
            rule = "be tensors (..., tokens, channels) of one number of tokens"
            got = [tuple(t.shape) for t in new]
            raise ValueError(must("KVCache", "new", rule, got))
        if self._memory and kinds != old:
            raise ValueError(must("KVCache", "new", f"continue {old}", kinds))

    def _reserve(self, new, n_token):
        """Make room for so many tokens."""
        n_row = self._memory[0].shape[-2] if self._memory else 0
        if self._memory and n_token <= n_row:
            return
        n_row = max(n_token, 2 * n_row)
        memory = [t.new_empty((*t.shape[:-2], n_row, t.shape[-1])) for t in new]
        for fresh, old in zip(memory, self._memory, strict=False):
            fresh[..., : self._n_token, :] = old[..., : self._n_token, :]
        self._memory = tuple(memory)


class CoPEAttention(torch.nn.Module):
    """
    Self-attention with contextual positions, between projections.

    Parameters
    ----------
    embed_dim : int
        Channels of a token, a multiple of `num_heads`.
    num_heads : int
        Number of query heads.
    num_kv_heads : int, optional
        Number of heads of keys and values, which divides `num_heads`; default as many.
    npos_max : int, default 64
        Number of positions; those beyond ``npos_max - 1`` are ``npos_max - 1``.
    bias : bool, default True
        Whether the projections have a bias.
    gates : {'key', 'gate_key', 'value'}, default 'key'
        What the gates compare queries with: the keys, keys from a projection of their
        own, or the values.
    per_head : bool, default False
        Whether each head has position embeddings of its own.
    scale : float, optional
        Of logits and gates; default ``head_dim ** -0.5``.
    position_scale : float, default 1.0
        Of the positional logits; ``head_dim ** -0.5`` is the default of the paper's
        code, 1.0 that of its listing.
    causal : bool, default True
        Whether later keys are hidden.
    device, dtype : optional
        Of the parameters.

    Attributes
    ----------
    q_proj, k_proj, v_proj, out_proj, gate_proj : torch.nn.Linear
        The projections; `gate_proj` is None unless ``gates='gate_key'``.
    pos_emb : torch.nn.Parameter, shape (1, head_dim, npos_max)
        Embeddings of the positions, zeros to begin with; with `per_head` of shape
        (num_heads, head_dim, npos_max). Layers may share it.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If sizes do not divide each other or `gates` is unknown.

    See Also
    --------
    cope_attention : What is between the projections.
    KVCache : Keys and values of earlier tokens.

    Notes
    -----
    There is no dropout of attention weights: they are never in memory.

    References
    ----------
    .. [1] Golovneva et al., "Contextual Position Encoding: Learning to Count What's
       Important", 2024. https://arxiv.org/abs/2405.18719

    Examples
    --------
    >>> import posenc.torch, torch
    >>> attention = posenc.torch.CoPEAttention(64, 4, num_kv_heads=2)
    >>> x = torch.randn(2, 10, 64)  # batch, tokens, channels
    >>> out = attention(x)

    Decoding, a prompt and then token by token:

    >>> cache = posenc.torch.KVCache()
    >>> with torch.no_grad():
    ...     parts = [attention(x[:, :7], cache=cache)]
    ...     parts += [attention(x[:, i : i + 1], cache=cache) for i in range(7, 10)]
    >>> torch.allclose(torch.cat(parts, 1), out, atol=1e-5)
    True
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_kv_heads=None,
        npos_max=64,
        *,
        bias=True,
        gates="key",
        per_head=False,
        scale=None,
        position_scale=1.0,
        causal=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        here = "CoPEAttention"
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "npos_max": npos_max,
        }
        for name, value in sizes.items():
            whole_number(here, name, value, 1)
        for whole, part in (("embed_dim", "num_heads"), ("num_heads", "num_kv_heads")):
            if sizes[whole] % sizes[part]:
                rule = f"divide {whole}, {sizes[whole]}"
                raise ValueError(must(here, part, rule, sizes[part]))
        one_of(here, "gates", gates, GATES)
        flags = {"bias": bias, "per_head": per_head, "causal": causal}
        for name, value in flags.items():
            true_or_false(here, name, value)
        head_dim = embed_dim // num_heads
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.npos_max, self.gates, self.causal = npos_max, gates, causal
        self.scale = None if scale is None else real_number(here, "scale", scale)
        self.position_scale = real_number(here, "position_scale", position_scale)
        kind = {"device": device, "dtype": dtype}

        def projection(n_head):
            return torch.nn.Linear(embed_dim, n_head * head_dim, bias=bias, **kind)

        self.q_proj = projection(num_heads)
        self.k_proj, self.v_proj = projection(num_kv_heads), projection(num_kv_heads)
        self.gate_proj = projection(num_kv_heads) if gates == "gate_key" else None
        self.out_proj = torch.nn.Linear(embed_dim, embed_dim, bias=bias, **kind)
        n_table = num_heads if per_head else 1
        zeros = torch.zeros(n_table, head_dim, npos_max, **kind)
        self.pos_emb = torch.nn.Parameter(zeros)

    def forward(self, x, *, mask=None, cache=None):
        """
        Attend from every token to those that it sees.

        Parameters
        ----------
        x : torch.Tensor, shape (..., T, embed_dim)
            Tokens; with a cache the new ones.
        mask : torch.Tensor of bool, broadcast to (..., num_heads, T, S), optional
            True where a key may be seen; S counts the tokens in the cache too. Padding
            of keys is of shape (B, 1, 1, S).
        cache : KVCache, optional
            Keys and values of earlier tokens, to which those of x are added.

        Returns
        -------
        torch.Tensor, shape (..., T, embed_dim)
            The attended and projected values.

        Raises
        ------
        TypeError
            If `mask` or `cache` is of the wrong kind.
        ValueError
            If `mask` does not fit, or x does not continue the cache.
        """
        q = _split(self.q_proj(x), self.num_heads)
        projections = [self.k_proj, self.v_proj]
        if self.gate_proj is not None:
            projections.append(self.gate_proj)
        keys = [_split(project(x), self.num_kv_heads) for project in projections]
        if cache is not None:
            if not isinstance(cache, KVCache):
                got = type(cache).__name__
                raise TypeError(must("CoPEAttention", "cache", "be a KVCache", got))
            keys = cache.append(*keys)
        gate_key = {"key": None, "value": keys[1], "gate_key": keys[-1]}[self.gates]
        out = cope_attention(
            q,
            keys[0],
            keys[1],
            self.pos_emb,
            scale=self.scale,
            causal=self.causal,
            mask=mask,
            position_scale=self.position_scale,
            gate_key=gate_key,
        )
        return self.out_proj(out.transpose(-3, -2).flatten(-2))

    def extra_repr(self):
        """Return what `repr` shows between the brackets."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"npos_max={self.npos_max}, gates={self.gates!r}"
        )


def _split(x, n_head):
    """Return heads before tokens, as a view."""
    return x.unflatten(-1, (n_head, -1)).transpose(-3, -2)
