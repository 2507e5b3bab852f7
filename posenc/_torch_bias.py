"""Relative biases for PyTorch: differentiable functions, and modules."""

# SPDX-License-Identifier: BSD-3-Clause

import functools
import math

import torch

from ._bias import KERNELS, alibi_slopes, check_buckets, check_kerple, pairs_of
from ._bias import alibi_bias as plain_alibi_bias
from ._bias import fire_bias as plain_fire_bias
from ._bias import kerple_bias as plain_kerple_bias
from ._bias import t5_bias as plain_t5_bias
from ._bias_spread import check_shape
from ._check import one_of, real_number, true_or_false, whole_number
from ._results import REAL_RULE
from ._torch_bias_ops import bucket
from ._torch_bias_spread import consecutive, finish, grid_of, matrix
from ._torch_check import (
    as_tensor,
    check_call,
    common_dtype,
    float_dtype,
    wrong_dtype,
)
from ._torch_register import is_dynamo_compiling, need_gradients, undisturbed

# --- arguments -----------------------------------------------------------------------


def _plain(given, add_to, out):
    """Tell whether NumPy's function may answer: no gradients and nobody listens."""
    given = (*given, add_to, out)
    if not undisturbed() or any(t is not None and t.is_meta for t in given):
        return False
    return not need_gradients(given)


def _check(function, given, add_to, out):
    """Return the tensors of a call; refuse what no operator takes."""
    given = {name: as_tensor(function, name, value) for name, value in given.items()}
    logits = {} if add_to is None else {"add_to": add_to}
    check_call(function, logits | given, out)
    return list(given.values())


def _check_shapes(function, **given):
    """Raise unless learned numbers are real and have shapes, given as (tensor, shape).

    Compiled code leaves sizes to torch.
    """
    for name, (tensor, shape) in given.items():
        if tensor.is_complex():
            raise wrong_dtype(function, name, REAL_RULE, tensor)
        if tensor.dim() != len(shape) or not is_dynamo_compiling():
            check_shape(function, name, tuple(tensor.shape), shape)


def _per_head(parameter, like):
    """Return numbers (H,) in float64, ready to meet the offsets."""
    return parameter.double().reshape((-1,) + (1,) * like.dim())


# --- functions -----------------------------------------------------------------------


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
    Compute T5's relative bias of all queries and keys, differentiably.

    The numbers are those of `posenc.t5_bias`, bit for bit.

    Parameters
    ----------
    weight : torch.Tensor, shape (num_buckets, H)
        The learned numbers of the buckets, on the CPU.
    q_positions, k_positions : range, torch.Tensor or ndarray, shape (..., T), (..., S)
        Positions in tokens, whole. Under `torch.compile` only ranges are known to be
        consecutive, which takes far less time. Under `torch.export` ranges fix the
        lengths, but tensors do not, nor does `T5Bias`.
    bidirectional, max_distance : optional
        As in `posenc.t5_bias`.
    add_to : torch.Tensor, shape (..., H, T, S), optional
        Logits to add the bias to, in place, unless there is `out`.
    out : torch.Tensor, shape (..., H, T, S), optional
        Where the result goes. Without gradients only.

    Returns
    -------
    torch.Tensor, shape (..., H, T, S)
        The bias, in the dtype of `weight`, or the logits with it, in theirs.

    Raises
    ------
    TypeError
        If an argument is no tensor or neither on the CPU nor on meta, or `out` is given
        where gradients are needed; and as `posenc.t5_bias` does.
    ValueError
        As `posenc.t5_bias` does.

    See Also
    --------
    posenc.t5_bias : The full description.
    T5Bias : A module with the weight.

    Notes
    -----
    The gradient of a bucket is the sum over its diagonals, taken in float64 in an order
    that does not depend on the number of threads. Derivatives of any order work.

    References
    ----------
    .. [1] Raffel et al., "Exploring the Limits of Transfer Learning with a Unified
       Text-to-Text Transformer", 2020, section 2.1. https://arxiv.org/abs/1910.10683

    Examples
    --------
    >>> import posenc.torch, torch
    >>> weight = torch.zeros(4, 1, requires_grad=True)
    >>> bias = posenc.torch.t5_bias(weight, range(3), range(3), max_distance=8)
    >>> bias.sum().backward()
    >>> weight.grad.T  # how often each bucket is used: a key itself, before, after
    tensor([[3., 3., 0., 3.]])
    """
    here, given = "t5_bias", {"weight": weight}
    (weight,) = _check(here, given, add_to, out)
    if _plain((weight,), add_to, out):
        return plain_t5_bias(
            weight,
            q_positions,
            k_positions,
            bidirectional=bidirectional,
            max_distance=max_distance,
            add_to=add_to,
            out=out,
        )
    _check_shapes(here, weight=(weight, ("num_buckets", "H")))
    if not is_dynamo_compiling():
        check_buckets(here, bidirectional, weight.shape[0], max_distance, "weight")
    grid = grid_of(here, {"weight": weight}, q_positions, k_positions, whole=True)

    def evaluate(offsets):
        offsets = offsets.to(weight.device)
        buckets = bucket(offsets, weight.shape[0], max_distance, bidirectional)
        values = torch.nn.functional.embedding(buckets, weight.double())
        return values.movedim(-1, 0)

    return finish(
        here,
        lambda dtype: matrix(evaluate, grid, dtype),
        common_dtype(weight),
        add_to,
        out,
    )


def alibi_bias(
    slopes, q_positions, k_positions, *, symmetric=False, add_to=None, out=None
):
    """
    Compute the linear biases of ALiBi, differentiably.

    The numbers are those of `posenc.alibi_bias`, bit for bit.

    Parameters
    ----------
    slopes : torch.Tensor or ndarray, shape (H,)
        The slope of each head.
    q_positions, k_positions : range, torch.Tensor or ndarray, shape (..., T), (..., S)
        Positions in tokens, as in `t5_bias`; they need not be whole.
    symmetric : bool, default False
        Use the distance, and not the offset.
    add_to : torch.Tensor, shape (..., H, T, S), optional
        Logits to add the bias to, in place, unless there is `out`.
    out : torch.Tensor, shape (..., H, T, S), optional
        Where the result goes. Without gradients only.

    Returns
    -------
    torch.Tensor, shape (..., H, T, S)
        The bias, in the dtype of `slopes`, or the logits with it, in theirs.

    Raises
    ------
    TypeError, ValueError
        As `posenc.alibi_bias` and `t5_bias` do.

    See Also
    --------
    posenc.alibi_bias : The full description.
    ALiBi : A module with the slopes.

    References
    ----------
    .. [1] Press et al., "Train Short, Test Long: Attention with Linear Biases Enables
       Input Length Extrapolation", 2022, section 3. https://arxiv.org/abs/2108.12409

    Examples
    --------
    >>> import posenc.torch, torch
    >>> slopes = torch.tensor([0.5], requires_grad=True)
    >>> bias = posenc.torch.alibi_bias(slopes, range(3), range(3))
    >>> torch.autograd.grad(bias[0, 2].sum(), slopes)
    (tensor([-3.]),)
    """
    here = "alibi_bias"
    (slopes,) = _check(here, {"slopes": slopes}, add_to, out)
    if _plain((slopes,), add_to, out):
        return plain_alibi_bias(
            slopes,
            q_positions,
            k_positions,
            symmetric=symmetric,
            add_to=add_to,
            out=out,
        )
    _check_shapes(here, slopes=(slopes, ("H",)))
    if not is_dynamo_compiling():
        true_or_false(here, "symmetric", symmetric)
    grid = grid_of(here, {"slopes": slopes}, q_positions, k_positions)
    make = functools.partial(_linear, slopes, grid, symmetric)
    return finish(here, make, common_dtype(slopes), add_to, out)


def _linear(slopes, grid, symmetric, dtype):
    """Return the linear biases of a grid in a dtype."""

    def evaluate(offsets):
        offsets = offsets.to(slopes.device)
        offsets = -offsets.abs() if symmetric else offsets
        return _per_head(slopes, offsets) * offsets + 0.0

    return matrix(evaluate, grid, dtype)


def kerple_bias(
    r1, r2, q_positions, k_positions, *, kernel="log", add_to=None, out=None
):
    """
    Compute the kernelized biases of KERPLE, differentiably.

    The numbers are those of `posenc.kerple_bias` but for the last bits of float64.

    Parameters
    ----------
    r1, r2 : torch.Tensor, shape (H,)
        The learned numbers of each head, positive; r2 at most 2 for the power kernel.
        Those who train them keep them so.
    q_positions, k_positions : range, torch.Tensor or ndarray, shape (..., T), (..., S)
        Positions in tokens, as in `t5_bias`; they need not be whole.
    kernel : {'log', 'power'}, default 'log'
        ``-r1 * log(1 + r2 * d)`` or ``-r1 * d**r2`` of the distance d.
    add_to : torch.Tensor, shape (..., H, T, S), optional
        Logits to add the bias to, in place, unless there is `out`.
    out : torch.Tensor, shape (..., H, T, S), optional
        Where the result goes. Without gradients only.

    Returns
    -------
    torch.Tensor, shape (..., H, T, S)
        The bias, in the common dtype of r1 and r2, or the logits with it, in theirs.

    Raises
    ------
    TypeError, ValueError
        As `posenc.kerple_bias` and `t5_bias` do.

    See Also
    --------
    posenc.kerple_bias : The full description.

    References
    ----------
    .. [1] Chi et al., "KERPLE: Kernelized Relative Positional Embedding for Length
       Extrapolation", 2022, section 4. https://arxiv.org/abs/2205.09921

    Examples
    --------
    >>> import posenc.torch, torch
    >>> r1, r2 = torch.tensor([2.0], requires_grad=True), torch.tensor([1.0])
    >>> bias = posenc.torch.kerple_bias(r1, r2, [3], range(4), kernel="power")
    >>> torch.autograd.grad(bias.sum(), r1)
    (tensor([-6.]),)
    """
    here = "kerple_bias"
    r1, r2 = _check(here, {"r1": r1, "r2": r2}, add_to, out)
    if _plain((r1, r2), add_to, out):
        return plain_kerple_bias(
            r1, r2, q_positions, k_positions, kernel=kernel, add_to=add_to, out=out
        )
    _check_shapes(here, r1=(r1, ("H",)), r2=(r2, tuple(r1.shape)))
    if not is_dynamo_compiling():
        one_of(here, "kernel", kernel, KERNELS)
    if undisturbed() and not (r1.is_meta or r2.is_meta):
        check_kerple(here, *(_doubles(part) for part in (r1, r2)), kernel)
    grid = grid_of(here, {"r1": r1}, q_positions, k_positions)

    def evaluate(offsets):
        distance = offsets.to(r1.device).abs().double()
        a, b = _per_head(r1, distance), _per_head(r2, distance)
        if kernel == "log":
            return 0.0 - a * torch.log1p(b * distance)
        is_zero = distance == 0  # where the logarithm in the derivatives is none
        power = torch.where(is_zero, 1.0, distance) ** b
        return 0.0 - torch.where(is_zero, 0.0, a * power)

    return finish(
        here,
        lambda dtype: matrix(evaluate, grid, dtype),
        common_dtype(r1, r2),
        add_to,
        out,
    )


def _doubles(tensor):
    return tensor.detach().double().numpy()


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
    Compute the interpolated biases of FIRE, differentiably.

    The numbers are those of `posenc.fire_bias` but for the last bits of float64.

    Parameters
    ----------
    mlp : sequence of pairs of torch.Tensor
        Weight (n_out, n_in) and bias (n_out,) of each layer, from one input to H
        outputs, with ReLU between layers: of a Sequential that is ``[(m.weight, m.bias)
        for m in mlp[::2]]``.
    q_positions, k_positions : range, torch.Tensor or ndarray, shape (..., T), (..., S)
        Positions in tokens from the start of the text, as in `t5_bias`; they need not
        be whole.
    c, threshold : float or torch.Tensor, shape ()
        The learned numbers of the logarithm and of the length below which numbers do
        not depend on the query.
    eps : float, default 1e-6
        What the divisor is more than its logarithm.
    add_to : torch.Tensor, shape (..., H, T, S), optional
        Logits to add the bias to, in place, unless there is `out`.
    out : torch.Tensor, shape (..., H, T, S), optional
        Where the result goes. Without gradients only.

    Returns
    -------
    torch.Tensor, shape (..., H, T, S)
        The bias, in the common dtype of `mlp`, or the logits with it, in theirs.

    Raises
    ------
    TypeError, ValueError
        As `posenc.fire_bias` and `t5_bias` do.

    See Also
    --------
    posenc.fire_bias : The full description.

    Notes
    -----
    Under `torch.compile` the network runs for each query and key.

    References
    ----------
    .. [1] Li et al., "Functional Interpolation for Relative Positions Improves Long
       Context Transformers", 2023. https://arxiv.org/abs/2310.04418

    Examples
    --------
    >>> import posenc.torch, torch
    >>> mlp = torch.nn.Sequential(
    ...     torch.nn.Linear(1, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
    ... )
    >>> layers = [(m.weight, m.bias) for m in mlp[::2]]
    >>> c = torch.tensor(0.1, requires_grad=True)
    >>> bias = posenc.torch.fire_bias(layers, range(10), range(10), c=c)
    >>> bias.shape
    torch.Size([8, 10, 10])
    >>> bias.sum().backward()
    >>> c.grad.shape, mlp[0].weight.grad.shape
    (torch.Size([]), torch.Size([32, 1]))
    """
    here = "fire_bias"
    given = {
        f"mlp[{i}][{j}]": part
        for i, pair in enumerate(pairs_of(here, mlp))
        for j, part in enumerate(pair)
    }
    given |= {"c": c, "threshold": threshold}
    *flat, c, threshold = _check(here, given, add_to, out)
    _check_shapes(here, c=(c, ()), threshold=(threshold, ()))
    layers = list(zip(flat[::2], flat[1::2], strict=True))
    if _plain((*flat, c, threshold), add_to, out):
        return plain_fire_bias(
            layers,
            q_positions,
            k_positions,
            c=c.item(),
            threshold=threshold.item(),
            eps=eps,
            add_to=add_to,
            out=out,
        )
    _check_layers(here, layers)
    eps = real_number(here, "eps", eps)
    for name, number in (("c", c), ("threshold", threshold)):
        if undisturbed() and not number.is_meta:
            real_number(here, name, number.item())
    c, threshold = c.double().abs(), threshold.double().abs()
    grid = grid_of(here, {"mlp[0][0]": flat[0]}, q_positions, k_positions)

    def ratio(offsets, limit):
        offsets, limit = offsets.to(flat[0].device), limit.to(flat[0].device)
        return torch.log1p(c * offsets.abs()) / (torch.log1p(c * limit) + eps)

    def network(x):
        x = x[..., None]
        for i, (weight, shift) in enumerate(layers):
            x = torch.relu(x) if i else x
            x = torch.nn.functional.linear(x, weight.double(), shift.double())
        return x.movedim(-1, 0)

    def make(dtype):
        near, far = _split(grid, threshold)
        parts = []
        if near is not None:
            parts.append(
                matrix(lambda offsets: network(ratio(offsets, threshold)), near, dtype)
            )
        if far is not None:
            query = far.q.to(threshold.device, torch.float64)
            query = torch.maximum(query, threshold)[..., :, None]
            parts.append(
                matrix(lambda offsets: network(ratio(offsets, query)), far, dtype)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    return finish(here, make, common_dtype(*flat), add_to, out)


def _check_layers(function, layers):
    """Raise unless the layers of a network continue each other."""
    n_in = 1
    for i, (weight, shift) in enumerate(layers):
        _check_shapes(function, **{f"mlp[{i}][0]": (weight, ("n_out", n_in))})
        _check_shapes(function, **{f"mlp[{i}][1]": (shift, tuple(weight.shape[:1]))})
        n_in = weight.shape[0]


def _split(grid, threshold):
    """Return the grids of the queries below a threshold and of the others, or None."""
    if not grid.is_consecutive() or not undisturbed() or threshold.is_meta:
        return None, grid.apart()
    below = math.ceil(min(max(threshold.item() - grid.q_start, 0), grid.n_query))
    near = grid._replace(n_query=below) if below else None
    return near, grid.apart(below) if below < grid.n_query else None


# --- modules -------------------------------------------------------------------------


def _places(function, n_query, n_key):
    """Return the positions of the last queries of some keys."""
    n_key = n_query if n_key is None else n_key
    if is_dynamo_compiling() or any(
        isinstance(n, torch.SymInt) for n in (n_query, n_key)
    ):  # a range would fix the numbers in the graph
        grid = consecutive(n_key - n_query, n_query, 0, n_key)
        return grid, grid
    n_query = whole_number(function, "n_query", n_query, 0)
    n_key = whole_number(function, "n_key", n_key, n_query)
    return range(n_key - n_query, n_key), range(n_key)


class T5Bias(torch.nn.Module):
    """
    Relative bias of T5, with its learned numbers.

    The state dict is that of transformers' ``relative_attention_bias``.

    Parameters
    ----------
    n_head : int
        The number of heads H.
    num_buckets : int, default 32
        The number of buckets, for both directions together.
    max_distance : int, default 128
        The distance from which on all are in the last bucket.
    bidirectional : bool, default True
        Whether keys after the query have buckets of their own: True for encoders.
    device, dtype : optional
        Of the parameter: float16, bfloat16, float32 or float64, of torch or NumPy.

    Attributes
    ----------
    weight : torch.nn.Parameter, shape (num_buckets, H)
        The learned numbers, normally distributed to begin with.

    Raises
    ------
    TypeError, ValueError
        As `posenc.t5_bucket` does, or if `n_head` is no whole number of at least 1 or
        `dtype` none of these.

    See Also
    --------
    t5_bias : The function.

    References
    ----------
    .. [1] Raffel et al., "Exploring the Limits of Transfer Learning with a Unified
       Text-to-Text Transformer", 2020, section 2.1. https://arxiv.org/abs/1910.10683

    Examples
    --------
    >>> import posenc.torch, torch
    >>> relative = posenc.torch.T5Bias(8, bidirectional=False)
    >>> bias = relative(10)  # of 10 queries and keys
    >>> last = relative(1, 10)  # of the last query, with a cache
    >>> bias.shape, torch.equal(last, bias[:, 9:])
    (torch.Size([8, 10, 10]), True)
    """

    def __init__(
        self,
        n_head,
        *,
        num_buckets=32,
        max_distance=128,
        bidirectional=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        here = "T5Bias"
        n_head = whole_number(here, "n_head", n_head, 1)
        num_buckets, self.max_distance, self.bidirectional = check_buckets(
            here, bidirectional, num_buckets, max_distance
        )
        dtype = None if dtype is None else float_dtype(here, dtype)
        weight = torch.empty(num_buckets, n_head, device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(weight)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the weight anew, as ``torch.nn.Embedding`` does."""
        torch.nn.init.normal_(self.weight)

    def forward(self, n_query, n_key=None, *, add_to=None):
        """
        Compute the bias of the last queries of some keys.

        Parameters
        ----------
        n_query : int
            The number of queries T.
        n_key : int, optional
            The number of keys S, as many as queries by default; more with a cache.
        add_to : torch.Tensor, shape (..., H, T, S), optional
            Logits to add the bias to, in place.

        Returns
        -------
        torch.Tensor, shape (..., H, T, S)
            The bias; `add_to` if it was given.

        Raises
        ------
        TypeError, ValueError
            If a number is no whole one or `add_to` does not fit.
        """
        return t5_bias(
            self.weight,
            *_places("T5Bias", n_query, n_key),
            bidirectional=self.bidirectional,
            max_distance=self.max_distance,
            add_to=add_to,
        )

    def extra_repr(self):
        """Return what `repr` shows between the brackets."""
        num_buckets, n_head = self.weight.shape
        return (
            f"{n_head}, num_buckets={num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )


class ALiBi(torch.nn.Module):
    """
    Linear biases, with the slopes of their heads.

    The slopes are float64 and no buffer: no change of the module's dtype rounds them,
    and a state dict does not hold them. Nor does the dtype of the bias follow the
    module's: it is that of the logits, or what the call asks for, float32 by default.

    Parameters
    ----------
    n_head : int
        The number of heads H, any.
    symmetric : bool, default False
        Use the distance, as encoders do, and not the offset.

    Attributes
    ----------
    slopes : torch.Tensor, shape (H,)
        The slopes of the heads.

    Raises
    ------
    TypeError, ValueError
        If `n_head` is no whole number of at least 1, or `symmetric` no bool.

    See Also
    --------
    alibi_bias : The function.

    References
    ----------
    .. [1] Press et al., "Train Short, Test Long: Attention with Linear Biases Enables
       Input Length Extrapolation", 2022, section 3. https://arxiv.org/abs/2108.12409

    Examples
    --------
    >>> import posenc.torch, torch
    >>> alibi = posenc.torch.ALiBi(8)
    >>> logits = torch.zeros(2, 8, 1, 3)
    >>> alibi(1, 3, add_to=logits)[0, 0]  # of the last of three queries
    tensor([[-1.0000, -0.5000,  0.0000]])
    """

    def __init__(self, n_head, *, symmetric=False):
        super().__init__()
        here = "ALiBi"
        n_head = whole_number(here, "n_head", n_head, 1)
        true_or_false(here, "symmetric", symmetric)
        self.slopes = torch.from_numpy(alibi_slopes(n_head))
        self.symmetric = bool(symmetric)

    def forward(self, n_query, n_key=None, *, add_to=None, dtype=torch.float32):
        """
        Compute the bias of the last queries of some keys.

        Parameters
        ----------
        n_query : int
            The number of queries T.
        n_key : int, optional
            The number of keys S, as many as queries by default; more with a cache.
        add_to : torch.Tensor, shape (..., H, T, S), optional
            Logits to add the bias to, in place.
        dtype : dtype, default torch.float32
            Of the result, without logits: float16, bfloat16, float32 or float64, of
            torch or NumPy.

        Returns
        -------
        torch.Tensor, shape (..., H, T, S)
            The bias; `add_to` if it was given.

        Raises
        ------
        TypeError, ValueError
            If a number is no whole one, `dtype` none of these or `add_to` does not fit.
        """
        places = _places("ALiBi", n_query, n_key)
        dtype = float_dtype("ALiBi", dtype)
        if add_to is None:
            grid = grid_of("ALiBi", {"slopes": self.slopes}, *places)
            return _linear(self.slopes, grid, self.symmetric, dtype)
        return alibi_bias(self.slopes, *places, symmetric=self.symmetric, add_to=add_to)

    def extra_repr(self):
        """Return what `repr` shows between the brackets."""
        return f"{len(self.slopes)}, symmetric={self.symmetric}"
