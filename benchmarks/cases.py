"""
The cases: what is computed, by us and by the others, and how far off we are.

Every case makes its inputs, checks our result, and only then hands out functions to
be timed. ``copy`` moves the same bytes as the result with ``torch.Tensor.copy_``
into a given output: the roof.
"""

# SPDX-License-Identifier: BSD-3-Clause
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

import posenc

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
N_PAIR = HEAD_DIM // 2
TABLE_LENGTH = 131072


@dataclass
class Case:
    """One row: functions by name, and the largest error of ours."""

    name: str
    error: str
    run: dict[str, Callable] = field(default_factory=dict)
    one_thread: bool = False  # too small for a second one


def _transformers_rope():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb


def _queries_keys(length, dtype, memory):
    """Return q and k of shape (1, heads, length, head_dim) in a memory order."""
    generator = torch.Generator().manual_seed(length)
    made = []
    for heads in (HEADS, KEY_HEADS):
        shape = (1, heads, length, HEAD_DIM)
        if memory == "BTHD":  # as the projections leave them
            x = torch.empty(1, length, heads, HEAD_DIM, dtype=dtype).transpose(1, 2)
        else:
            x = torch.empty(shape, dtype=dtype)
        made.append(x.copy_(torch.randn(shape, generator=generator, dtype=dtype)))
    return made


def _copies(outputs, inputs):
    def copy():
        for to, come_from in zip(outputs, inputs, strict=True):
            to.copy_(come_from)

    return copy


def _tables(length, dtype):
    inv_freq, factor = posenc.rope_inv_freq(HEAD_DIM, dtype=np.float32)
    return posenc.rope_table(
        np.arange(length),
        inv_freq,
        attention_factor=factor,
        angles="float32",
        dtype=str(dtype).removeprefix("torch."),
    )


def _compare(ours, theirs):
    """Return the largest difference, as text; 'same bits' if there is none."""
    pairs = list(zip(ours, theirs, strict=True))
    if all(np.array_equal(a, b) for a, b in pairs):
        return "same bits"
    return f"{max(float(np.abs(a - b).max()) for a, b in pairs):.1e}"


def _interleaved_eager(q, k, cos, sin):
    """Rotate as GPT-J's family does in transformers: Cohere's rotate_half."""

    def rotate(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)

    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def rotation(length, layout, dtype=torch.float32, memory="BTHD", compiled=True):
    """Rotate q and k by rope_qk: with out given, in place, and by the others."""
    q, k = _queries_keys(length, dtype, memory)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    cos, sin = _tables(length, dtype)
    arrays = [t.numpy() for t in (q, k)]
    outputs = tuple(t.numpy() for t in (q_out, k_out))
    if layout == "half":
        full = [torch.from_numpy(np.concatenate([t, t], -1))[None] for t in (cos, sin)]
        eager = _transformers_rope()
        theirs = eager(q, k, *full)
    else:
        full = [torch.from_numpy(np.repeat(t, 2, -1)) for t in (cos, sin)]
        eager = _interleaved_eager
        theirs = eager(q, k, *full)
    ours = posenc.rope_qk(*arrays, cos, sin, layout=layout, out=outputs)
    case = Case(
        f"rope_qk {layout}, {str(dtype)[6:]}, T={length}, {memory}",
        _compare(ours, [t.numpy() for t in theirs]),
        one_thread=length == 1,
    )
    # In place on arrays of its own: repeated rotation keeps the norm.
    own = tuple(a.copy(order="K") for a in arrays)
    own_torch = [torch.empty_like(t) for t in (q, k)]
    own = tuple(t.copy_(s).numpy() for t, s in zip(own_torch, (q, k), strict=True))
    case.run = {
        "copy": _copies((q_out, k_out), (q, k)),
        "in place": lambda: posenc.rope_qk(*own, cos, sin, layout=layout, out=own),
        "out given": lambda: posenc.rope_qk(
            *arrays, cos, sin, layout=layout, out=outputs
        ),
        "fresh": lambda: posenc.rope_qk(*arrays, cos, sin, layout=layout),
        "eager": lambda: eager(q, k, *full),
    }
    if compiled:
        torch.compiler.reset()  # or the compilations of other cases count as its own
        fast = torch.compile(eager, dynamic=False)
        case.run["compiled"] = lambda: fast(q, k, *full)
    return case


def single(length=2048):
    """Rotate q alone by rope, and by the gufunc of posenc.ufunc."""
    q, _ = _queries_keys(length, torch.float32, "BTHD")
    q_out = torch.empty_like(q)
    cos, sin = _tables(length, torch.float32)
    x, out = q.numpy(), q_out.numpy()
    ours = posenc.rope(x, cos, sin)
    gufunc = posenc.ufunc.rope_half
    case = Case(f"rope against its gufunc, T={length}", "")
    case.error = _compare([ours], [gufunc(x, cos, sin)])
    case.run = {
        "copy": _copies([q_out], [q]),
        "out given": lambda: posenc.rope(x, cos, sin, out=out),
        "gufunc": lambda: gufunc(x, cos, sin, out=out),
    }
    return case


def complex_product(length=2048):
    """Rotate q by rope_complex, and by torch's view_as_complex."""
    q, _ = _queries_keys(length, torch.float32, "BTHD")
    q_out = torch.empty_like(q)
    cis = posenc.rope_cis(np.arange(length), posenc.rope_inv_freq(HEAD_DIM)[0])
    table = torch.from_numpy(cis)
    x, out = q.numpy(), q_out.numpy()

    def eager():
        pairs = torch.view_as_complex(q.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2)

    case = Case(
        f"rope_complex, T={length}",
        _compare([posenc.rope_complex(x, cis)], [eager().numpy()]),
    )
    case.run = {
        "copy": _copies([q_out], [q]),
        "out given": lambda: posenc.rope_complex(x, cis, out=out),
        "eager": eager,
    }
    return case


def _worst_table_error(cos, sin, inv_freq):
    """Return the largest error of a float32 table, from long double angles."""
    rows = np.linspace(0, len(cos) - 1, 997, dtype=np.int64)
    angle = rows[:, None].astype(np.longdouble) * inv_freq.astype(np.longdouble)
    errors = [cos[rows] - np.cos(angle), sin[rows] - np.sin(angle)]
    return f"{max(float(np.abs(e).max()) for e in errors):.1e}"


def table(angles):
    """Fill a table of 131072 x 64 by rope_table, and as transformers does."""
    inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM)
    positions = np.arange(TABLE_LENGTH, dtype=np.float64)
    cos, sin = (torch.empty(TABLE_LENGTH, N_PAIR) for _ in range(2))
    spare = [torch.empty_like(t) for t in (cos, sin)]
    out = (cos.numpy(), sin.numpy())
    posenc.rope_table(positions, inv_freq, angles=angles, out=out)
    case = Case(
        f"rope_table {angles}, {TABLE_LENGTH} x {N_PAIR}",
        _worst_table_error(*out, inv_freq),
    )
    float_positions = torch.arange(TABLE_LENGTH).float()[:, None]
    float_freq = torch.from_numpy(inv_freq).float()

    def eager():
        angle = float_positions * float_freq
        torch.cos(angle, out=spare[0])
        torch.sin(angle, out=spare[1])

    case.run = {
        "copy": _copies(spare, (cos, sin)),
        "out given": lambda: posenc.rope_table(
            positions, inv_freq, angles=angles, out=out
        ),
        "eager": eager,
    }
    eager()
    theirs = _worst_table_error(*(t.numpy() for t in spare), inv_freq)
    case.error += f" (torch {theirs})"
    return case


def small_calls():
    """Time rope_inv_freq, rope_matrix, permute_layout: called once per model."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    theirs, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    ours, _ = posenc.rope_inv_freq(HEAD_DIM, dtype=np.float32)
    frequencies = Case(
        "rope_inv_freq float32", _compare([ours], [theirs.numpy()]), one_thread=True
    )
    frequencies.run = {
        "fresh": lambda: posenc.rope_inv_freq(HEAD_DIM, dtype=np.float32),
        "eager": lambda: LlamaRotaryEmbedding.compute_default_rope_parameters(config),
    }

    vector = np.linspace(-1, 1, HEAD_DIM)
    inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM)
    cos, sin = posenc.rope_table([5], inv_freq, dtype=np.float64)
    dense = posenc.rope_matrix(5, inv_freq)
    matrix = Case(
        "rope_matrix @ x against rope",
        _compare([dense @ vector], posenc.rope(vector[None], cos, sin)),
        one_thread=True,
    )
    matrix.run = {
        "fresh": lambda: posenc.rope(vector[None], cos, sin),
        "eager": lambda: dense @ vector,
    }

    weight = torch.randn(HEADS * HEAD_DIM, 1024)
    halves = weight.view(HEADS, N_PAIR, 2, 1024).transpose(1, 2)
    permuted = posenc.permute_layout(weight.numpy(), HEAD_DIM, to="half")
    layout = Case(
        "permute_layout (4096, 1024)",
        _compare([permuted], [halves.reshape(weight.shape).numpy()]),
    )
    spare = torch.empty_like(weight)
    layout.run = {
        "copy": _copies([spare], [weight]),
        "fresh": lambda: posenc.permute_layout(weight.numpy(), HEAD_DIM, to="half"),
        "eager": lambda: halves.reshape(weight.shape),
    }
    return [frequencies, matrix, layout]


def all_cases():
    """Return pairs (what the names contain, a function that makes the cases).

    Made one by one: each holds much memory.
    """

    def rotations(layout, length, memory="BTHD", **options):
        name = f"rope_qk {layout}, T={length}, {memory}"
        return name, lambda: [rotation(length, layout, memory=memory, **options)]

    return [
        rotations("half", 2048),
        rotations("half", 128),
        rotations("interleaved", 2048),
        rotations("interleaved", 128),
        rotations("half", 2048, "BHTD"),
        rotations("interleaved", 2048, "BHTD", compiled=False),
        rotations("half", 2048, dtype=torch.float64, compiled=False),
        rotations("half", 1),
        ("rope against its gufunc", lambda: [single()]),
        ("rope_complex", lambda: [complex_product()]),
        ("rope_table exact", lambda: [table("exact")]),
        ("rope_table float32", lambda: [table("float32")]),
        ("rope_inv_freq rope_matrix permute_layout", small_calls),
    ]
