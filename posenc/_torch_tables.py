"""Tables of positions added to tensors, for PyTorch: functions, and modules."""

# SPDX-License-Identifier: BSD-3-Clause

import copy

import torch

from . import _learned, _sinusoidal
from ._check import (
    must,
    one_of,
    positive_number,
    real_number,
    true_or_false,
    whole_number,
)
from ._results import REAL_RULE
from ._table_rows import refuse_both
from ._torch_check import (
    FLOATS,
    as_tensor,
    check_out,
    check_tensor,
    float_dtype,
    wrong_dtype,
)
from ._torch_tables_ops import Places, Sines, add_rows, add_sines

# --- functions -----------------------------------------------------------------------


def _places(function, positions, offset, cu_seqlens, padding_mask):
    """Return what tells where tokens stand, as tensors."""
    refuse_both(function, positions, offset, cu_seqlens)
    given = Places(positions, offset, cu_seqlens, padding_mask)._asdict().items()
    return Places(*(None if v is None else as_tensor(function, n, v) for n, v in given))


def _refuse_ids(module, x):
    """Raise for a tensor of whole numbers, where a module is to add to embeddings."""
    if isinstance(x, torch.Tensor) and not (x.is_floating_point() or x.is_complex()):
        rule = "hold embeddings, not token ids"
        raise wrong_dtype(type(module).__name__, "x", rule, x)


def _check_data(function, x):
    check_tensor(function, "x", x)
    if x.ndim < 2:
        rule = "have at least two axes, of tokens and of channels"
        raise ValueError(must(function, "x", rule, f"shape {tuple(x.shape)}"))


def add_sinusoidal(
    x,
    *,
    scale=1.0,
    positions=None,
    offset=None,
    cu_seqlens=None,
    padding_mask=None,
    theta=10000.0,
    layout="interleaved",
    downscale_freq_shift=0.0,
    out=None,
):
    """
    Scale data and add the sinusoidal table of their positions, differentiably.

    The numbers are those of `posenc.add_sinusoidal`, bit for bit. Under `torch.compile`
    the call is one operator.

    Parameters
    ----------
    x : torch.Tensor, shape (..., T, dim)
        Token embeddings on the CPU: float64, float32, bfloat16 or float16, in any
        memory layout.
    scale, positions, offset, cu_seqlens, padding_mask : optional
        As in `posenc.add_sinusoidal`; all but `scale` may be tensors.
    theta, layout, downscale_freq_shift : optional
        As in `posenc.sinusoidal`.
    out : torch.Tensor, optional
        Where the result goes; it may be x itself. Without gradients only.

    Returns
    -------
    torch.Tensor, shape (..., T, dim)
        ``x * scale + table``, zero where padded; `out` if it was given.

    Raises
    ------
    TypeError
        If x is no tensor or neither on the CPU nor on meta, or `out` is given where
        gradients are needed; and as `posenc.add_sinusoidal` does.
    ValueError
        As `posenc.add_sinusoidal` does.

    See Also
    --------
    posenc.add_sinusoidal : The full description.
    SinusoidalEmbedding : The same as a module.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
       https://arxiv.org/abs/1706.03762

    Examples
    --------
    >>> import posenc.torch, torch
    >>> x = torch.zeros(2, 3, 4, requires_grad=True)
    >>> y = posenc.torch.add_sinusoidal(x, scale=2.0)
    >>> y.sum().backward()
    >>> bool((x.grad == 2).all())
    True
    """
    here = "add_sinusoidal"
    scale = real_number(here, "scale", scale)
    _check_data(here, x)
    places = _places(here, positions, offset, cu_seqlens, padding_mask)
    one_of(here, "layout", layout, _sinusoidal.LAYOUTS)
    theta = positive_number(here, "theta", theta)
    shift = real_number(here, "downscale_freq_shift", downscale_freq_shift)
    if out is not None:
        check_out(here, out, (x,))
    return add_sines(x, places, Sines(scale, theta, layout, shift), out)


def add_learned(
    x,
    table,
    *,
    scale=1.0,
    positions=None,
    offset=None,
    cu_seqlens=None,
    padding_mask=None,
    out=None,
):
    """
    Scale data and add the rows of a learned table at their positions, differentiably.

    The numbers are those of `posenc.add_learned`, bit for bit. The gradient of a row of
    the table is the sum over the tokens that stand there. Under `torch.compile` the
    call is one operator.

    Parameters
    ----------
    x : torch.Tensor, shape (..., T, dim)
        Token embeddings on the CPU: float64, float32, bfloat16 or float16, in any
        memory layout.
    table : torch.Tensor, shape (P, dim)
        One row for each position.
    scale, positions, offset, cu_seqlens, padding_mask : optional
        As in `posenc.add_learned`; all but `scale` may be tensors.
    out : torch.Tensor, optional
        Where the result goes; it may be x itself. Without gradients only.

    Returns
    -------
    torch.Tensor, shape (..., T, dim)
        ``x * scale + table[positions]``, zero where padded; `out` if it was given.

    Raises
    ------
    TypeError
        If x or `table` is no tensor or neither on the CPU nor on meta, or `out` is
        given where gradients are needed; and as `posenc.add_learned` does.
    ValueError
        As `posenc.add_learned` does.

    See Also
    --------
    posenc.add_learned : The full description.
    LearnedEmbedding : The same as a module.

    References
    ----------
    .. [1] Gehring et al., "Convolutional Sequence to Sequence Learning", 2017, section
       3.1. https://arxiv.org/abs/1705.03122

    Examples
    --------
    >>> import posenc.torch, torch
    >>> table = torch.zeros(4, 2, requires_grad=True)
    >>> y = posenc.torch.add_learned(torch.ones(3, 2), table, positions=[0, 2, 2])
    >>> y.sum().backward()
    >>> table.grad[:, 0]
    tensor([1., 0., 2., 0.])
    """
    here = "add_learned"
    scale = real_number(here, "scale", scale)
    _check_data(here, x)
    check_tensor(here, "table", table)
    places = _places(here, positions, offset, cu_seqlens, padding_mask)
    if out is not None:
        check_out(here, out, (x, table))
    return add_rows(x, table, places, scale, out)


# --- modules -------------------------------------------------------------------------


class SinusoidalEmbedding(torch.nn.Module):
    """
    Adds the sinusoidal table of positions to token embeddings; it has no parameters.

    Parameters
    ----------
    scale : float, default 1.0
        Multiplies the embeddings, such as ``dim ** 0.5``.
    theta : float, default 10000.0
        Base of the frequencies.
    layout : {'interleaved', 'concat', 'concat_flipped'}, default 'interleaved'
        Where sines and cosines go, as in `posenc.sinusoidal`.
    downscale_freq_shift : float, default 0.0
        As in `posenc.sinusoidal`: 1 for the frequencies of tensor2tensor.

    Raises
    ------
    TypeError, ValueError
        If a parameter is of the wrong kind or unknown.

    See Also
    --------
    add_sinusoidal : The function.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
       https://arxiv.org/abs/1706.03762

    Examples
    --------
    >>> import posenc.torch, torch
    >>> embed = posenc.torch.SinusoidalEmbedding(scale=64**0.5)
    >>> x = torch.randn(2, 10, 64)
    >>> last = embed(x[:, 9:], offset=9)  # a decode step
    >>> torch.equal(last, embed(x)[:, 9:])
    True
    """

    def __init__(
        self,
        *,
        scale=1.0,
        theta=10000.0,
        layout="interleaved",
        downscale_freq_shift=0.0,
    ):
        super().__init__()
        here = "SinusoidalEmbedding"
        one_of(here, "layout", layout, _sinusoidal.LAYOUTS)
        self.scale = real_number(here, "scale", scale)
        self.theta = positive_number(here, "theta", theta)
        self.layout = layout
        self.downscale_freq_shift = real_number(
            here, "downscale_freq_shift", downscale_freq_shift
        )

    def forward(
        self, x, *, positions=None, offset=None, cu_seqlens=None, padding_mask=None
    ):
        """
        Add the table.

        Parameters
        ----------
        x : torch.Tensor, shape (..., T, dim)
            Token embeddings.
        positions, offset, cu_seqlens, padding_mask : optional
            As in `posenc.add_sinusoidal`.

        Returns
        -------
        torch.Tensor, shape (..., T, dim)
            Embeddings that know their positions, zero where padded.

        Raises
        ------
        TypeError, ValueError
            As `add_sinusoidal` does; and if x holds whole numbers, such as token ids.
        """
        _refuse_ids(self, x)
        return add_sinusoidal(
            x,
            scale=self.scale,
            positions=positions,
            offset=offset,
            cu_seqlens=cu_seqlens,
            padding_mask=padding_mask,
            theta=self.theta,
            layout=self.layout,
            downscale_freq_shift=self.downscale_freq_shift,
        )

    def extra_repr(self):
        """Return what `repr` shows between the brackets."""
        return (
            f"scale={self.scale}, theta={self.theta}, layout={self.layout!r}, "
            f"downscale_freq_shift={self.downscale_freq_shift}"
        )


class LearnedEmbedding(torch.nn.Module):
    """
    Adds a learned row for each position to token embeddings.

    Parameters
    ----------
    n_position : int
        Rows of the table.
    dim : int
        Channels.
    scale : float, default 1.0
        Multiplies the embeddings, such as ``dim ** 0.5``.
    device : torch.device or str, optional
        Where the table is made.
    dtype : dtype, optional
        Dtype of the table, of torch or NumPy: float16, bfloat16, float32 or float64.

    Attributes
    ----------
    weight : torch.nn.Parameter, shape (n_position, dim)
        The table, drawn from a normal distribution of deviation 0.02, as BERT's.

    Raises
    ------
    TypeError, ValueError
        If a parameter is of the wrong kind or out of its range.

    See Also
    --------
    add_learned : The function.
    posenc.extend_table : Make a trained table longer.

    References
    ----------
    .. [1] Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for
       Language Understanding", 2018. https://arxiv.org/abs/1810.04805

    Examples
    --------
    >>> import posenc.torch, torch
    >>> embed = posenc.torch.LearnedEmbedding(512, 64)
    >>> embed(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    >>> embed.extended(1024)(torch.randn(1, 1024, 64)).shape
    torch.Size([1, 1024, 64])
    """

    def __init__(self, n_position, dim, *, scale=1.0, device=None, dtype=None):
        super().__init__()
        here = "LearnedEmbedding"
        n_position = whole_number(here, "n_position", n_position, 1)
        dim = whole_number(here, "dim", dim, 1)
        self.scale = real_number(here, "scale", scale)
        dtype = None if dtype is None else float_dtype(here, dtype)
        table = torch.empty(n_position, dim, device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(table)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the table anew."""
        torch.nn.init.normal_(self.weight, std=0.02)

    @classmethod
    def from_table(cls, table, *, scale=1.0, freeze=False):
        """
        Return a module that holds a given table, such as a trained one.

        Parameters
        ----------
        table : torch.Tensor, shape (n_position, dim)
            The table; the module shares its memory.
        scale : float, default 1.0
            Multiplies the embeddings.
        freeze : bool, default False
            Let the table need no gradient.

        Returns
        -------
        LearnedEmbedding
            The module.

        Raises
        ------
        TypeError, ValueError
            If `table` is no tensor of that shape that holds floating-point numbers, or
            `freeze` no bool.
        """
        here = "LearnedEmbedding"
        check_tensor(here, "table", table)
        if table.dtype not in FLOATS:
            raise wrong_dtype(here, "table", REAL_RULE, table)
        if table.ndim != 2:
            rule, got = "be of shape (P, dim)", f"shape {tuple(table.shape)}"
            raise ValueError(must(here, "table", rule, got))
        true_or_false(here, "freeze", freeze)
        made = cls(*table.shape, scale=scale, device="meta")
        made.weight = torch.nn.Parameter(table.detach(), requires_grad=not freeze)
        return made

    def extended(self, length, *, method="hierarchical", alpha=0.4):
        """
        Return a module with a longer table.

        Parameters
        ----------
        length : int
            Rows to arrive at.
        method, alpha : optional
            As in `posenc.extend_table`.

        Returns
        -------
        LearnedEmbedding
            A copy of this module, of its class and mode, but for the table.

        Raises
        ------
        TypeError, ValueError
            As `posenc.extend_table` does.
        """
        table = _learned.extend_table(
            self.weight.detach(), length, method=method, alpha=alpha
        )
        weight = torch.nn.Parameter(table, requires_grad=self.weight.requires_grad)
        return copy.deepcopy(self, {id(self.weight): weight})

    def forward(
        self, x, *, positions=None, offset=None, cu_seqlens=None, padding_mask=None
    ):
        """
        Add the rows of the table.

        Parameters
        ----------
        x : torch.Tensor, shape (..., T, dim)
            Token embeddings.
        positions, offset, cu_seqlens, padding_mask : optional
            As in `posenc.add_learned`.

        Returns
        -------
        torch.Tensor, shape (..., T, dim)
            Embeddings that know their positions, zero where padded.

        Raises
        ------
        TypeError, ValueError
            As `add_learned` does; and if x holds whole numbers, such as token ids.
        """
        _refuse_ids(self, x)
        return add_learned(
            x,
            self.weight,
            scale=self.scale,
            positions=positions,
            offset=offset,
            cu_seqlens=cu_seqlens,
            padding_mask=padding_mask,
        )

    def extra_repr(self):
        """Return what `repr` shows between the brackets."""
        n_position, dim = self.weight.shape
        return f"{n_position}, {dim}, scale={self.scale}"
