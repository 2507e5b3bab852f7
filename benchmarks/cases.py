"""
The cases: what is computed, by us and by the others, and how far off all are.

Every case makes its inputs, checks the results, and only then hands out what is timed.
`copy` moves the same bytes as the result with ``torch.Tensor.copy_`` into a given
output: the roof.
"""

# SPDX-License-Identifier: BSD-3-Clause
import functools

import numpy as np
import torch

import posenc

from .added import added_cases
from .bias import bias_cases
from .cope import cope_cases
from .cope_peers import COPE_PEERS, N_POSITION, Bias, between, counted
from .models import model_cases
from .peers import PEERS, Wrong, complex_rotation, eager_function, name_of, prepare
from .timing import Case, Run, nested, repeated
from .work import HEAD_DIM, HEADS, N_PAIR, Work, copies

LENGTHS = (1, 128, 2048, 32768)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLE_LENGTH = 131072
COPY = ("copy", "")
EVERYBODY = tuple(dict.fromkeys((*PEERS, *COPE_PEERS)))


def _compare(ours, theirs):
    """Return the largest difference, as text; 'same bits' if there is none."""
    pairs = list(zip(ours, theirs, strict=True))
    if all(np.array_equal(a, b) for a, b in pairs):
        return "same bits"
    return f"{max(float(np.abs(a - b).max()) for a, b in pairs):.1e}"


def _has_bits_of_transformers(work):
    """Say whether posenc gives the bits that transformers' own function gives.

    Llama's rounds 16-bit products and sums, Cohere's the result alone.
    """
    rounding = "eager" if work.layout == "half" else "once"
    layout = work.layout
    ours = posenc.rope_qk(*work.inputs, *work.tables, layout=layout, rounding=rounding)
    theirs = eager_function(layout)(*work.inputs, *work.full)
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def rotation(length, dtype, layout, peers):
    """Rotate q and k: everybody, in every mode that they have."""
    work = Work(length, dtype, layout)

    def prepared(n_thread):
        runs, errors, gaps = prepare(work, n_thread, peers)
        facts = {
            "errors": nested(errors),
            "gaps": gaps,
            "same bits": _has_bits_of_transformers(work),
        }
        return {COPY: Run(work.copy), **runs}, facts

    kind = name_of(dtype)
    return Case(
        f"rope_qk {layout}, {kind}, {length}",
        "rotation",
        prepared,
        one_thread=length == 1,
        facts={"length": length, "dtype": kind, "layout": layout},
    )


def other_memory(dtype, layout, memory):
    """Rotate q and k in float64, or with the tokens of a head together (BHTD)."""
    length = 2048
    work = Work(length, dtype, layout, memory)

    def prepared(n_thread):
        runs, errors, _ = prepare(work, n_thread, ("posenc", "transformers"))
        worst = max(errors.values())
        return {COPY: Run(work.copy), **runs}, {"error": f"{worst:.1e}"}

    name = f"rope_qk {layout}, {name_of(dtype)}, {length}, {memory}"
    return Case(name, "other", prepared)


def _fixed(name, runs, error, one_thread=False, **facts):
    """Return a case whose runs are the same for any number of threads."""
    runs = repeated(runs)
    return Case(
        name,
        "other",
        lambda n_thread: (runs, {"error": error}),
        one_thread=one_thread,
        facts=facts,
    )


def gufunc_door(length=2048):
    """Rotate q alone by rope, and by the gufunc of posenc.ufunc."""
    work = Work(length, torch.float32, "half")
    x, out = work.q.numpy(), work.out[0].numpy()
    cos, sin = (t.numpy() for t in work.tables)
    gufunc = posenc.ufunc.rope_half
    runs = {
        COPY: copies(work.out[:1], work.inputs[:1]),
        ("posenc", "out given"): lambda: posenc.rope(x, cos, sin, out=out),
        ("posenc.ufunc", "out given"): lambda: gufunc(x, cos, sin, out=out),
    }
    error = _compare([posenc.rope(x, cos, sin)], [gufunc(x, cos, sin)])
    return _fixed(f"rope and its gufunc, {length}", runs, error)


def complex_product(length=2048):
    """Rotate q and k by rope_complex, and by torch's view_as_complex."""
    work = Work(length, torch.float32, "interleaved")
    inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM, dtype=np.float32)
    cis = posenc.rope_cis(np.arange(length), inv_freq)
    theirs = complex_rotation(work.inputs, torch.from_numpy(cis))
    inputs, out = ([t.numpy() for t in pair] for pair in (work.inputs, work.out))

    def ours():
        for x, to in zip(inputs, out, strict=True):
            posenc.rope_complex(x, cis, out=to)

    ours()
    error = _compare(out, [t.numpy() for t in theirs()])
    runs = {COPY: work.copy, ("posenc", "out given"): ours, ("torch", "fresh"): theirs}
    return _fixed(f"rope_complex, {length}", runs, error)


def _worst_table_error(tables, inv_freq):
    """Return the largest error of a float32 table, from long double angles."""
    cos, sin = (t.numpy() for t in tables)
    rows = np.linspace(0, len(cos) - 1, 997, dtype=np.int64)
    angle = rows[:, None].astype(np.longdouble) * inv_freq.astype(np.longdouble)
    errors = [cos[rows] - np.cos(angle), sin[rows] - np.sin(angle)]
    return f"{max(float(np.abs(e).max()) for e in errors):.1e}"


def table(angles):
    """Fill a table of 131072 x 64 by rope_table, and as transformers does."""
    inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM)
    positions = np.arange(TABLE_LENGTH, dtype=np.float64)
    tables, spare = ([torch.empty(TABLE_LENGTH, N_PAIR) for _ in "cs"] for _ in "ot")
    out = tuple(t.numpy() for t in tables)
    float_positions = torch.arange(TABLE_LENGTH).float()[:, None]
    float_freq = torch.from_numpy(inv_freq).float()

    def ours():
        posenc.rope_table(positions, inv_freq, angles=angles, out=out)

    def theirs():
        angle = float_positions * float_freq
        torch.cos(angle, out=spare[0])
        torch.sin(angle, out=spare[1])

    ours(), theirs()
    error = (
        f"{_worst_table_error(tables, inv_freq)} "
        f"(torch {_worst_table_error(spare, inv_freq)})"
    )
    runs = {
        COPY: copies(spare, tables),
        ("posenc", "out given"): ours,
        ("torch", "out given"): theirs,
    }
    name = f"rope_table {angles}, {TABLE_LENGTH} x {N_PAIR}"
    return _fixed(name, runs, error, pairs=TABLE_LENGTH * N_PAIR)


def axial_table(side=64):
    """Make the table of a grid by rope_table_axial, and as Qwen2-VL does."""
    inv_freq, _ = posenc.rope_inv_freq(N_PAIR)
    float_freq = torch.from_numpy(inv_freq).float()
    out = tuple(np.empty((side, side, N_PAIR), np.float32) for _ in "cs")

    def ours():
        posenc.rope_table_axial((side, side), inv_freq, out=out)

    def theirs():
        rows, columns = torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")
        parts = [p.float()[..., None] * float_freq for p in (rows, columns)]
        angle = torch.cat(parts, -1)
        return angle.cos(), angle.sin()

    ours()
    runs = {("posenc", "out given"): ours, ("torch", "fresh"): theirs}
    error = _compare(out, [t.numpy() for t in theirs()])
    return _fixed(f"rope_table_axial, {side} x {side} x {N_PAIR}", runs, error)


def sections_table(length=2048):
    """Make the table of M-RoPE by rope_table_sections, and as Qwen3-VL does."""
    sections, inv_freq = [24, 20, 20], posenc.rope_inv_freq(2 * N_PAIR)[0]
    float_freq = torch.from_numpy(inv_freq).float()
    positions = torch.randint(length, (3, length))
    out = torch.empty(length, N_PAIR), torch.empty(length, N_PAIR)

    def ours():
        posenc.rope_table_sections(
            positions, inv_freq, sections, interleaved=True, out=out
        )

    def theirs():
        angle = positions[..., None].float() * float_freq
        tables = angle.cos(), angle.sin()
        for table in tables:
            for axis in (1, 2):
                pairs = slice(axis, 3 * sections[axis], 3)
                table[0][..., pairs] = table[axis][..., pairs]
        return tables[0][0], tables[1][0]

    ours()
    runs = {("posenc", "out given"): ours, ("torch", "fresh"): theirs}
    error = _compare([t.numpy() for t in out], [t.numpy() for t in theirs()])
    return _fixed(f"rope_table_sections interleaved, {length}", runs, error)


def xpos_table(length=2048):
    """Make the table of keys by rope_table_xpos, and by torchscale's recipe."""
    inv_freq, _ = posenc.rope_inv_freq(2 * N_PAIR)
    float_freq = torch.from_numpy(inv_freq).float()
    zeta = (torch.arange(N_PAIR) / N_PAIR + 0.4) / 1.4
    positions = torch.arange(length)
    out = torch.empty(length, N_PAIR), torch.empty(length, N_PAIR)

    def ours():
        posenc.rope_table_xpos(positions, inv_freq, keys=True, out=out)

    def theirs():
        positions_ = positions.float()[:, None]
        angle, scale = positions_ * float_freq, 1 / zeta ** (positions_ / 512)
        return angle.cos() * scale, angle.sin() * scale

    ours()
    runs = {("posenc", "out given"): ours, ("torch", "fresh"): theirs}
    error = _compare([t.numpy() for t in out], [t.numpy() for t in theirs()])
    return _fixed(f"rope_table_xpos, {length}", runs, error)


def frequencies():
    """Make frequencies by rope_inv_freq, and as transformers does."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    make = LlamaRotaryEmbedding.compute_default_rope_parameters
    ours, _ = posenc.rope_inv_freq(HEAD_DIM, dtype=np.float32)
    runs = {
        ("posenc", "fresh"): lambda: posenc.rope_inv_freq(HEAD_DIM, dtype=np.float32),
        ("transformers", "fresh"): lambda: make(config),
    }
    error = _compare([ours], [make(config)[0].numpy()])
    return _fixed("rope_inv_freq float32", runs, error, one_thread=True)


def _decay_errors(results, distance, inv_freq):
    """Return the largest error of each sum of cosines, from long double angles."""
    rows = np.linspace(0, len(distance) - 1, 997, dtype=np.int64)
    angle = distance[rows, None].astype(np.longdouble) * inv_freq
    true = 2 * np.cos(angle).sum(-1)
    return [float(np.abs(result[rows] - true).max()) for result in results]


def decay(fraction=0.0):
    """Sum cosines by rope_decay, and by NumPy and torch, with angles that are rounded.

    Beside them, what our own table costs if its cosines are all that is wanted.
    """
    inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM)
    distance = np.arange(TABLE_LENGTH) + fraction
    out, spare = np.empty(TABLE_LENGTH), np.empty((2, TABLE_LENGTH, N_PAIR))
    operands = torch.from_numpy(distance), torch.from_numpy(inv_freq)

    def ours():
        return posenc.rope_decay(distance, inv_freq, out=out)

    def by_table():
        cos, _ = posenc.rope_table(distance, inv_freq, out=tuple(spare), dtype="f8")
        return 2 * cos.sum(-1)

    def by_numpy():
        return 2 * np.cos(np.multiply.outer(distance, inv_freq)).sum(-1)

    def by_torch():
        return 2 * torch.outer(*operands).cos_().sum(-1)

    results = [ours(), by_numpy(), by_torch().numpy()]
    errors = _decay_errors(results, distance, inv_freq)
    if not errors[0] <= N_PAIR * 2.0**-48:
        raise Wrong(f"off by {errors[0]:.1e}")
    runs = {
        ("posenc", "out given"): ours,
        ("posenc", "table and sum"): by_table,
        ("NumPy", "fresh"): by_numpy,
        ("torch", "fresh"): by_torch,
    }
    kind = "fractional " if fraction else ""
    return _fixed(
        f"rope_decay, {kind}{TABLE_LENGTH} x {N_PAIR}",
        runs,
        "{:.1e} (NumPy {:.1e}, torch {:.1e})".format(*errors),
        pairs=TABLE_LENGTH * N_PAIR,
    )


def similarity(length=1024):
    """Multiply sinusoidal rows by sinusoidal_similarity, and by NumPy."""
    dim, positions = 512, np.arange(length, dtype=np.float64)
    angle = positions[:, None] * 10000.0 ** (-2 * np.arange(dim // 2) / dim)

    def theirs():
        rows = np.concatenate([np.sin(angle), np.cos(angle)], -1)
        return rows @ rows.T

    def ours():
        return posenc.sinusoidal_similarity(positions, positions, dim)

    runs = {("posenc", "fresh"): ours, ("NumPy", "fresh"): theirs}
    error = _compare([ours()], [theirs()])
    return _fixed(f"sinusoidal_similarity, {length} x {dim}", runs, error)


def periods():
    """Compute rope_period, wavelengths and complete_turns, which are small."""
    inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM)
    runs = {
        ("posenc", "rope_period"): lambda: posenc.rope_period(HEAD_DIM),
        ("posenc", "wavelengths"): lambda: posenc.wavelengths(inv_freq),
        ("posenc", "complete_turns"): lambda: posenc.complete_turns(inv_freq, 4096),
        ("NumPy", "fresh"): lambda: 2 * np.pi / inv_freq,
    }
    error = _compare([posenc.wavelengths(inv_freq)], [2 * np.pi / inv_freq])
    return _fixed("wavelengths and periods", runs, error, one_thread=True)


def dense_matrix():
    """Rotate one vector by rope, and by multiplying with rope_matrix."""
    vector = np.linspace(-1, 1, HEAD_DIM)
    inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM)
    cos, sin = posenc.rope_table([5], inv_freq, dtype=np.float64)
    dense = posenc.rope_matrix(5, inv_freq)
    runs = {
        ("posenc", "fresh"): lambda: posenc.rope(vector[None], cos, sin),
        ("NumPy, dense matrix", "fresh"): lambda: dense @ vector,
    }
    error = _compare([dense @ vector], posenc.rope(vector[None], cos, sin))
    return _fixed("rope and rope_matrix @ x", runs, error, one_thread=True)


def weights():
    """Permute weights by permute_layout, and by torch."""
    weight = torch.randn(HEADS * HEAD_DIM, 1024)
    spare = torch.empty_like(weight)
    halves = weight.view(HEADS, N_PAIR, 2, 1024).transpose(1, 2)
    array = weight.numpy()
    runs = {
        COPY: copies([spare], [weight]),
        ("posenc", "fresh"): lambda: posenc.permute_layout(array, HEAD_DIM, to="half"),
        ("torch", "fresh"): lambda: halves.reshape(weight.shape),
    }
    permuted = posenc.permute_layout(array, HEAD_DIM, to="half")
    error = _compare([permuted], [halves.reshape(weight.shape).numpy()])
    return _fixed("permute_layout (4096, 1024)", runs, error)


def cope_step(name, length=1024):
    """Take one of the three steps that cope_bias takes at once."""
    logits, z = Bias(length).operands
    gates = torch.sigmoid(logits)
    ours, theirs, operands = {
        "cope_gates": (posenc.cope_gates, torch.sigmoid, [logits]),
        "cope_positions": (
            functools.partial(posenc.cope_positions, n_position=N_POSITION),
            counted,
            [gates],
        ),
        "cope_interpolate": (posenc.cope_interpolate, between, [z, counted(gates)]),
    }[name]
    out = torch.empty_like(logits)
    runs = {
        COPY: copies([out], [logits]),
        ("posenc", "out given"): lambda: ours(*operands, out=out),
        ("posenc", "fresh"): lambda: ours(*operands),
        ("torch", "fresh"): lambda: theirs(*operands),
    }
    error = _compare([ours(*operands).numpy()], [theirs(*operands).numpy()])
    return _fixed(f"{name}, {length}", runs, error, logits=logits.numel())


def all_cases(peers=EVERYBODY):
    """Return pairs of a name and a function that makes the case.

    Made one by one: each holds much memory.
    """
    rotations = [
        (
            f"rope_qk {layout}, {name_of(dtype)}, {length},",
            lambda arguments=(length, dtype, layout): rotation(*arguments, peers),
        )
        for length in LENGTHS
        for dtype in DTYPES
        for layout in ("half", "interleaved")
    ]
    return [
        *rotations,
        (
            "rope_qk half, float32, BHTD",
            lambda: other_memory(torch.float32, "half", "BHTD"),
        ),
        (
            "rope_qk interleaved, float32, BHTD",
            lambda: other_memory(torch.float32, "interleaved", "BHTD"),
        ),
        (
            "rope_qk half, float64",
            lambda: other_memory(torch.float64, "half", "BTHD"),
        ),
        ("rope gufunc", gufunc_door),
        ("rope_complex", complex_product),
        ("rope_table exact", lambda: table("exact")),
        ("rope_table float32", lambda: table("float32")),
        ("rope_table_axial", axial_table),
        ("rope_table_sections", sections_table),
        ("rope_table_xpos", xpos_table),
        ("rope_inv_freq", frequencies),
        ("rope_decay", decay),
        ("rope_decay fractional", functools.partial(decay, 0.3)),
        ("sinusoidal_similarity", similarity),
        ("wavelengths", periods),
        ("rope_matrix", dense_matrix),
        ("permute_layout", weights),
        *(
            (step, functools.partial(cope_step, step))
            for step in ("cope_gates", "cope_positions", "cope_interpolate")
        ),
        *cope_cases(peers),
        *added_cases(),
        *bias_cases(),
        *model_cases(),
    ]
