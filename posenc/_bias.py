"""Relative biases of attention: T5, ALiBi, KERPLE, FIRE and Sandwich."""

# SPDX-License-Identifier: BSD-3-Clause
import math

import numpy as np

from . import _core
from . import _tensors as tensors
from ._bias_spread import Bias, parameters, places_of, spread
from ._check import (
    as_array,
    must,
    one_of,
    out_array,
    positive_number,
    real_dtype,
    real_number,
    true_or_false,
    whole_number,
)
from ._results import widest
from ._tensors import are_tensors

KERNELS = ("log", "power")


def t5_bucket(
    relative_position,
    *,
    bidirectional=True,
    num_buckets=32,
    max_distance=128,
    out=None,
):
    """
    Find the bucket of each relative position, as T5 does.

    Half of the buckets of a direction are one distance each, the others grow with the
    logarithm up to `max_distance`; what is further away is in the last one.

    Parameters
    ----------
    relative_position : array_like of int or torch.Tensor, shape (...)
        Position of the key less that of the query, in tokens.
    bidirectional : bool, default True
        Keys after the query have half of the buckets, as in an encoder. If False they
        all count as distance 0, as in a decoder, which hides them anyway.
    num_buckets : int, default 32
        The number of buckets, for both directions together.
    max_distance : int, default 128
        The distance from which on all are in the last bucket.
    out : ndarray or torch.Tensor of int64, shape (...), optional
        Where the result goes. It may be `relative_position`.

    Returns
    -------
    ndarray or torch.Tensor of int64, shape (...)
        Numbers of buckets, from 0 to ``num_buckets - 1``; `out` if it was given.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype.
    ValueError
        If there are fewer than two buckets for a direction, `max_distance` does not
        exceed half of them, or `out` does not fit.

    See Also
    --------
    t5_bias : The bias of all queries and keys.

    Notes
    -----
    With n buckets for a direction, m = n // 2 and distance d >= m::

        bucket = min(m + int(log(d / m) / log(max_distance / m) * (n - m)), n - 1)

    computed in float32, as transformers does: where that rounds to the other side of
    a whole number, so do the buckets here.

    References
    ----------
    .. [1] Raffel et al., "Exploring the Limits of Transfer Learning with a Unified
       Text-to-Text Transformer", 2020, section 2.1. https://arxiv.org/abs/1910.10683

    Examples
    --------
    >>> import posenc
    >>> posenc.t5_bucket([-1000, -20, -2, -1, 0, 1, 2, 20, 1000])
    array([15, 10,  2,  1,  0, 17, 18, 26, 31])
    >>> posenc.t5_bucket([-1000, -20, -2, -1, 0, 1], bidirectional=False)
    array([31, 17,  2,  1,  0,  0])
    """
    here = "t5_bucket"
    x = as_array(here, "relative_position", relative_position)
    if x.dtype.kind not in "iu":
        rule = "be whole numbers"
        got = f"dtype {x.dtype}"
        raise TypeError(must(here, "relative_position", rule, got))
    buckets = check_buckets(here, bidirectional, num_buckets, max_distance)
    if x.dtype == np.uint64:  # those past int64 share the bucket of the last in it
        x = np.minimum(x, np.uint64(np.iinfo(np.int64).max))
    x = x.astype(np.int64, copy=False)
    if not isinstance(x, np.ndarray):
        if out is not None:
            rule = f"be None for relative_position of type {type(x).__name__}"
            raise TypeError(must(here, "out", rule, type(out).__name__))
        return _core.t5_bucket(x, *buckets)
    is_tensor = tensors.is_tensor(relative_position)
    if out is not None:
        result = out_array(here, out, x.shape, np.dtype(np.int64), "out", is_tensor)
        _core.t5_bucket(x, *buckets, out=result)
        tensors.mark_changed(out)
        return out
    result = _core.t5_bucket(x, *buckets)
    return tensors.from_numpy(np.asarray(result)) if is_tensor else result


def t5_bias(
    weight,
    q_positions,
    k_positions,
    *,
    bidirectional=True,
    max_distance=128,
    add_to=None,
    out=None,
):
    """
    Compute T5's relative bias of all queries and keys.

    Each pair of a query and a key has the learned number of the bucket of their
    distance. Between consecutive positions these are looked up once for each distance.

    Parameters
    ----------
    weight : array_like or torch.Tensor, shape (num_buckets, H)
        The learned numbers, as ``relative_attention_bias.weight`` of transformers holds
        them: float16, bfloat16 (of ml_dtypes, in NumPy), float32 or float64.
    q_positions, k_positions : array_like or torch.Tensor, shape (..., T), (..., S)
        Positions in tokens, whole and of either sign. With a cache of keys, those of
        the new queries are ``range(S - T, S)``. Leading axes are batches. Positions
        that are not consecutive take longer.
    bidirectional : bool, default True
        Whether keys after the query have buckets of their own: True for encoders.
    max_distance : int, default 128
        The distance from which on all are in the last bucket.
    add_to : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Logits to add the bias to, in place, unless there is `out`.
    out : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Where the result goes, overwritten: of the kind and dtype of the result.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., H, T, S)
        The bias, in the dtype of `weight`, to be added to logits before softmax; or
        the logits with it, in their dtype, summed in float32 at least and rounded once;
        `out` or `add_to` if one was given. A tensor if an argument is one.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient
        (`posenc.torch.t5_bias` gives it) or is no plain CPU tensor.
    ValueError
        If shapes do not fit, or as `t5_bucket` does. Nothing has been written.

    See Also
    --------
    t5_bucket : The buckets.
    alibi_bias : A bias without learned numbers.

    Notes
    -----
    The bits are those of transformers' ``T5Attention.compute_bias``.

    References
    ----------
    .. [1] Raffel et al., "Exploring the Limits of Transfer Learning with a Unified
       Text-to-Text Transformer", 2020, section 2.1. https://arxiv.org/abs/1910.10683

    Examples
    --------
    Four buckets for one head: the key itself, the keys before it, the next key (it has
    the distance 0 of the other direction to itself), and those after it.

    >>> import numpy as np, posenc
    >>> weight = np.array([[0.0], [-1.0], [7.0], [5.0]])
    >>> posenc.t5_bias(weight, range(3), range(3), max_distance=8)
    array([[[ 0.,  5.,  5.],
            [-1.,  0.,  5.],
            [-1., -1.,  0.]]])

    A decoder's last query, added to its logits in place:

    >>> logits = np.ones((1, 1, 3))
    >>> posenc.t5_bias(
    ...     weight, [2], range(3), bidirectional=False, max_distance=8, add_to=logits
    ... )
    array([[[8., 0., 1.]]])
    """
    here = "t5_bias"
    table = parameters(here, "weight", weight, ("num_buckets", "H"))
    buckets = check_buckets(here, bidirectional, len(table), max_distance, "weight")
    q, k = places_of(here, q_positions, k_positions, whole=True)
    n_head = table.shape[1]

    def evaluate(offsets):
        values = np.empty((n_head, len(offsets)), table.dtype)
        _core.t5_values_arrays(table, offsets, *buckets[1:], values)
        return values

    is_tensor = are_tensors(weight, q_positions, k_positions)
    bias = Bias(here, n_head, table.dtype, is_tensor, evaluate, position_type=np.int64)
    return spread(bias, q, k, add_to, out)


def alibi_slopes(n_head, *, dtype=np.float64):
    """
    Give the slopes of ALiBi's heads.

    Parameters
    ----------
    n_head : int
        The number of heads, any.
    dtype : dtype, default float64
        Either float32 or float64.

    Returns
    -------
    ndarray, shape (n_head,)
        For a power of two the geometric series ``2**(-8 / n_head)``, ...,
        ``2**-8``. Else the slopes of the power of two below, then every other one of
        those of the power of two above.

    Raises
    ------
    TypeError, ValueError
        If `n_head` is no whole number of at least 1, or `dtype` another.

    See Also
    --------
    alibi_bias : The bias.

    References
    ----------
    .. [1] Press et al., "Train Short, Test Long: Attention with Linear Biases Enables
       Input Length Extrapolation", 2022, section 3. https://arxiv.org/abs/2108.12409

    Examples
    --------
    >>> import posenc
    >>> posenc.alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    >>> posenc.alibi_slopes(3)
    array([0.0625    , 0.00390625, 0.25      ])
    """
    here = "alibi_slopes"
    n_head = whole_number(here, "n_head", n_head, 1)
    dtype = real_dtype(here, dtype)
    power = 1 << (n_head.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    more = [2.0 ** (-4 * (2 * h + 1) / power) for h in range(n_head - power)]
    return np.array(slopes + more).astype(dtype)


def alibi_bias(
    slopes, q_positions, k_positions, *, symmetric=False, add_to=None, out=None
):
    """
    Compute the linear biases of ALiBi.

    Parameters
    ----------
    slopes : array_like or torch.Tensor, shape (H,)
        The slope of each head, from `alibi_slopes` or others; float16, bfloat16 (of
        ml_dtypes, in NumPy), float32 or float64.
    q_positions, k_positions : array_like or torch.Tensor, shape (..., T), (..., S)
        Positions in tokens, whole or not, of either sign. Leading axes are batches.
    symmetric : bool, default False
        Use the distance, as encoders do, and not the offset, which is positive for keys
        after the query.
    add_to : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Logits to add the bias to, in place, unless there is `out`.
    out : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Where the result goes, overwritten: of the kind and dtype of the result.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., H, T, S)
        ``slope * (key - query)``, or ``-slope * abs(key - query)`` if symmetric: a
        float64 product, rounded to the dtype of `slopes`; or the logits with it, in
        their dtype; `out` or `add_to` if one was given. A tensor if an argument is one.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient or is
        no plain CPU tensor.
    ValueError
        If shapes do not fit. Nothing has been written.

    See Also
    --------
    alibi_slopes : The slopes.
    t5_bias : A learned bias, with more on positions and memory.

    Notes
    -----
    Models with a causal mask may add ``slope * key`` alone, as transformers' Bloom
    does: that differs by a constant for each query, which softmax does not see.

    References
    ----------
    .. [1] Press et al., "Train Short, Test Long: Attention with Linear Biases Enables
       Input Length Extrapolation", 2022, section 3. https://arxiv.org/abs/2108.12409

    Examples
    --------
    >>> import posenc
    >>> posenc.alibi_bias([0.5], range(3), range(3))
    array([[[ 0. ,  0.5,  1. ],
            [-0.5,  0. ,  0.5],
            [-1. , -0.5,  0. ]]])
    >>> posenc.alibi_bias([0.5], [2], range(5), symmetric=True)
    array([[[-1. , -0.5,  0. , -0.5, -1. ]]])
    """
    here = "alibi_bias"
    true_or_false(here, "symmetric", symmetric)
    own = parameters(here, "slopes", slopes, ("H",))
    q, k = places_of(here, q_positions, k_positions)
    wide = own.astype(np.float64)[:, None]

    def evaluate(offsets):
        values = wide * (-np.abs(offsets) if symmetric else offsets)
        values += 0.0  # no zero is negative
        return values

    is_tensor = are_tensors(slopes, q_positions, k_positions)
    bias = Bias(here, len(own), own.dtype, is_tensor, evaluate)
    return spread(bias, q, k, add_to, out)


def kerple_bias(
    r1, r2, q_positions, k_positions, *, kernel="log", add_to=None, out=None
):
    """
    Compute the kernelized biases of KERPLE.

    Parameters
    ----------
    r1, r2 : array_like or torch.Tensor, shape (H,)
        The learned numbers of each head, positive; r2 at most 2 for the power kernel.
        In the authors' code they are ``bias_p`` and ``bias_a``.
    q_positions, k_positions : array_like or torch.Tensor, shape (..., T), (..., S)
        Positions in tokens, whole or not, of either sign. Leading axes are batches.
    kernel : {'log', 'power'}, default 'log'
        ``-r1 * log(1 + r2 * d)`` or ``-r1 * d**r2`` of the distance d.
    add_to : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Logits to add the bias to, in place, unless there is `out`.
    out : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Where the result goes, overwritten: of the kind and dtype of the result.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., H, T, S)
        The bias, computed in float64 and rounded to the common dtype of r1 and r2; or
        the logits with it, in their dtype; `out` or `add_to` if one was given. A tensor
        if an argument is one.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient
        (`posenc.torch.kerple_bias` gives it) or is no plain CPU tensor.
    ValueError
        If shapes or numbers do not fit. Nothing has been written.

    See Also
    --------
    t5_bias : Another learned bias, with more on positions and memory.

    Notes
    -----
    The paper's eq. 1 adds the bias before logits are divided by ``sqrt(head_dim)``: for
    logits that already are, r1 is the paper's over ``sqrt(head_dim)``.

    References
    ----------
    .. [1] Chi et al., "KERPLE: Kernelized Relative Positional Embedding for Length
       Extrapolation", 2022, section 4. https://arxiv.org/abs/2205.09921

    Examples
    --------
    >>> import posenc
    >>> posenc.kerple_bias([2.0], [1.0], [3], range(4)).round(3)
    array([[[-2.773, -2.197, -1.386,  0.   ]]])
    >>> posenc.kerple_bias([2.0], [0.5], [4], range(5), kernel="power").round(3)
    array([[[-4.   , -3.464, -2.828, -2.   ,  0.   ]]])
    """
    here = "kerple_bias"
    one_of(here, "kernel", kernel, KERNELS)
    first = parameters(here, "r1", r1, ("H",))
    second = parameters(here, "r2", r2, (len(first),))
    check_kerple(here, first, second, kernel)
    q, k = places_of(here, q_positions, k_positions)
    a, b = (part.astype(np.float64)[:, None] for part in (first, second))

    def evaluate(offsets):
        distance = np.abs(offsets)
        return 0.0 - a * (np.log1p(b * distance) if kernel == "log" else distance**b)

    dtype = widest(first.dtype, second.dtype)
    is_tensor = are_tensors(r1, r2, q_positions, k_positions)
    bias = Bias(here, len(first), dtype, is_tensor, evaluate)
    return spread(bias, q, k, add_to, out)


def fire_bias(
    mlp,
    q_positions,
    k_positions,
    *,
    c=0.1,
    threshold=512.0,
    eps=1e-6,
    add_to=None,
    out=None,
):
    """
    Compute the interpolated biases of FIRE.

    A small network turns one number for each query and key into one for each head.
    Between consecutive positions it runs once for each distance, and for each element
    in the rows of queries beyond the threshold, whose numbers depend on the query.

    Parameters
    ----------
    mlp : sequence of pairs of array_like or torch.Tensor
        Weight (n_out, n_in) and bias (n_out,) of each layer, as ``nn.Linear`` holds
        them, from one input to H outputs, with ReLU between layers.
    q_positions, k_positions : array_like or torch.Tensor, shape (..., T), (..., S)
        Positions in tokens from the start of the text, whole or not. Leading axes are
        batches.
    c : float, default 0.1
        The learned number of the logarithm.
    threshold : float, default 512.0
        The learned length L below which numbers do not depend on the query.
    eps : float, default 1e-6
        What the divisor is more than its logarithm.
    add_to : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Logits to add the bias to, in place, unless there is `out`.
    out : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Where the result goes, overwritten: of the kind and dtype of the result.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., H, T, S)
        The bias, computed in float64 and rounded to the common dtype of `mlp`; or the
        logits with it, in their dtype; `out` or `add_to` if one was given. A tensor
        if an argument is one.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient
        (`posenc.torch.fire_bias` gives it) or is no plain CPU tensor.
    ValueError
        If shapes do not fit. Nothing has been written.

    See Also
    --------
    t5_bias : Another learned bias, with more on positions and memory.

    Notes
    -----
    With i and j the positions of query and key, psi(x) = log(abs(c x) + 1)::

        bias = mlp(psi(i - j) / (psi(max(i, abs(threshold))) + eps))

    References
    ----------
    .. [1] Li et al., "Functional Interpolation for Relative Positions Improves Long
       Context Transformers", 2023. https://arxiv.org/abs/2310.04418

    Examples
    --------
    A network that multiplies by -2, with a threshold of 4 and of 0:

    >>> import posenc
    >>> mlp = [([[2.0]], [0.0]), ([[-1.0]], [0.0])]
    >>> posenc.fire_bias(mlp, [2, 3], range(4), c=1.0, threshold=4.0).round(2)
    array([[[-1.37, -0.86,  0.  , -0.86],
            [-1.72, -1.37, -0.86,  0.  ]]])
    >>> posenc.fire_bias(mlp, [2, 3], range(4), c=1.0, threshold=0.0).round(2)
    array([[[-2.  , -1.26,  0.  , -1.26],
            [-2.  , -1.58, -1.  ,  0.  ]]])
    """
    here = "fire_bias"
    layers = _layers(here, mlp)
    c = abs(real_number(here, "c", c))
    threshold = abs(real_number(here, "threshold", threshold))
    eps = real_number(here, "eps", eps)
    q, k = places_of(here, q_positions, k_positions)
    dtype = widest(*(part.dtype for pair in layers for part in pair))
    wide = [tuple(part.astype(np.float64) for part in pair) for pair in layers]

    def evaluate(offsets, query):
        limit = np.log1p(c * np.maximum(query, threshold)) + eps
        return _network(wide, np.log1p(c * np.abs(offsets)) / limit)

    flat = [part for pair in mlp for part in pair]
    n_head, width = len(layers[-1][1]), max(len(part) for _, part in layers)
    is_tensor = are_tensors(*flat, q_positions, k_positions)
    bias = Bias(here, n_head, dtype, is_tensor, evaluate, width, threshold)
    return spread(bias, q, k, add_to, out)


def sandwich_bias(
    n_head,
    dim,
    q_positions,
    k_positions,
    *,
    theta=10000.0,
    dtype=np.float64,
    add_to=None,
    out=None,
):
    """
    Compute the biases of Sandwich: products of sinusoidal embeddings.

    Parameters
    ----------
    n_head : int
        The number of heads H.
    dim : int
        Channels of the embeddings, even; 128 in the paper.
    q_positions, k_positions : array_like or torch.Tensor, shape (..., T), (..., S)
        Positions in tokens, whole or not, of either sign. Leading axes are batches.
    theta : float, default 10000.0
        Base of the wavelengths.
    dtype : dtype, default float64
        Of the result, float32 or float64; with `add_to` it is that of the logits.
    add_to : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Logits to add the bias to, in place, unless there is `out`.
    out : ndarray or torch.Tensor, shape (..., H, T, S), optional
        Where the result goes, overwritten: of the kind and dtype of the result.

    Returns
    -------
    ndarray or torch.Tensor, shape (..., H, T, S)
        The bias, computed in float64; or the logits with it, in their dtype; `out` or
        `add_to` if one was given. A tensor if an argument is one.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype; if a tensor needs a gradient or is
        no plain CPU tensor.
    ValueError
        If shapes or sizes do not fit. Nothing has been written.

    See Also
    --------
    alibi_bias : The bias that it resembles.

    Notes
    -----
    For head h, counted from 1, and positions m and n::

        bias = sum(cos((m - n) / theta**(2 * i / dim)) for i < dim / 2) * H / (8 * h)

    which is the product of the embeddings of m and n, compressed as ALiBi's slopes are.

    References
    ----------
    .. [1] Chi et al., "Dissecting Transformer Length Extrapolation via the Lens of
       Receptive Field Analysis", 2023. https://arxiv.org/abs/2212.10356

    Examples
    --------
    >>> import posenc
    >>> posenc.sandwich_bias(8, 4, [2], range(3))[0].round(4)
    array([[0.5837, 1.5403, 2.    ]])
    """
    here = "sandwich_bias"
    n_head = whole_number(here, "n_head", n_head, 1)
    dim = whole_number(here, "dim", dim, 2)
    if dim % 2:
        raise ValueError(must(here, "dim", "be even", dim))
    theta = positive_number(here, "theta", theta)
    dtype = real_dtype(here, dtype)
    q, k = places_of(here, q_positions, k_positions)
    inv_freq = theta ** (-2 * np.arange(dim // 2) / dim)
    compression = 8 * np.arange(1, n_head + 1)[:, None] / n_head

    def evaluate(offsets):
        return _core.rope_decay(offsets, inv_freq) / (2 * compression)

    is_tensor = are_tensors(q_positions, k_positions)
    bias = Bias(here, n_head, dtype, is_tensor, evaluate)
    return spread(bias, q, k, add_to, out)


# --- what is given -------------------------------------------------------------------


def check_buckets(
    function, bidirectional, num_buckets, max_distance, parameter="num_buckets"
):
    """Return the arguments of the gufunc; raise unless there are such buckets."""
    true_or_false(function, "bidirectional", bidirectional)
    least = 4 if bidirectional else 2
    if parameter == "weight":
        if num_buckets < least:
            rule = f"hold at least {least} buckets"
            raise ValueError(must(function, parameter, rule, num_buckets))
    else:
        num_buckets = whole_number(function, parameter, num_buckets, least)
    exact = num_buckets // (4 if bidirectional else 2)
    max_distance = whole_number(function, "max_distance", max_distance, 1)
    if not exact < max_distance <= 2**53:
        rule = f"be above {exact}, half of the buckets of a direction"
        if max_distance > exact:
            rule = "be at most 2**53"
        raise ValueError(must(function, "max_distance", rule, max_distance))
    return num_buckets, max_distance, bool(bidirectional)


def check_kerple(function, r1, r2, kernel):
    """Raise unless the numbers make a kernel."""
    rule, most = "hold finite numbers above 0", math.inf
    for name, values in (("r1", r1), ("r2", r2)):
        if name == "r2" and kernel == "power":
            rule, most = "hold numbers above 0 and of at most 2", 2.0
        is_good = (values > 0) & np.isfinite(values) & (values <= most)
        if not is_good.all():
            raise ValueError(must(function, name, rule, values[~is_good][0]))


def pairs_of(function, mlp):
    """Return the pairs of weight and bias of a network."""
    if not isinstance(mlp, list | tuple):
        rule, got = "be a list of pairs of weight and bias", type(mlp).__name__
        raise TypeError(must(function, "mlp", rule, got))
    if not mlp:
        raise ValueError(must(function, "mlp", "hold at least one layer", repr(mlp)))
    for i, pair in enumerate(mlp):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            rule, got = "be a pair of weight and bias", type(pair).__name__
            raise TypeError(must(function, f"mlp[{i}]", rule, got))
    return mlp


def _layers(function, mlp):
    """Return pairs of weight and bias, as arrays, that continue each other."""
    layers, n_in = [], 1
    for i, (weight, shift) in enumerate(pairs_of(function, mlp)):
        weight = parameters(function, f"mlp[{i}][0]", weight, ("n_out", n_in))
        n_in = len(weight)
        layers.append((weight, parameters(function, f"mlp[{i}][1]", shift, (n_in,))))
    return layers


def _network(layers, x):
    """Run a network on numbers (n,); return (H, n).

    Sums go in one order, which those of a matrix product would not for any n.
    """
    x = x[None]
    for i, (weight, shift) in enumerate(layers):
        inputs = np.maximum(x, 0) if i else x
        x = np.zeros((len(shift), x.shape[-1]))
        for column, row in zip(weight.T, inputs, strict=True):
            x += column[:, None] * row
        x += shift[:, None]
    return x
