"""
Who rotates: posenc, and the others as their own users would call them.

A peer is a function from the work and a number of threads to its runs: by name of the
mode, ``in place``, ``out given`` or ``fresh``. It imports its library itself and raises
`Gap` for what that library does not have; a library that is missing is a gap too.
"""

# SPDX-License-Identifier: BSD-3-Clause
import functools
import time

import numpy as np
import torch

import posenc

from .timing import SPINNING, Run, can_pin
from .work import HEAD_DIM, HEADS, KEY_HEADS, pairs_of

THETA = 10000.0
LONG = 32768  # tokens, at which a call of the slowest takes many seconds


class Gap(Exception):
    """Say why a peer has no number."""


class Wrong(Gap):
    """Say by how much a result is off."""


def _only(work, *, layout=None, dtypes=None):
    """Raise a gap unless the work is of a layout and a type."""
    if layout and work.layout != layout:
        raise Gap(f"has layout {layout} only")
    if dtypes and work.dtype not in dtypes:
        raise Gap(f"has no {name_of(work.dtype)}")


def _not_long(work):
    """Raise a gap if the work is long."""
    if work.length >= LONG:
        raise Gap(f"left out at {LONG} tokens: seconds per call")


def name_of(dtype):
    """Return 'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _heads_last(tensors):
    """Return the (1, length, heads, head_dim) that the projections made."""
    return [t.transpose(1, 2) for t in tensors]


def _read_heads_last(result, work):
    """Read what is (length, heads, head_dim) in memory, whatever its shape."""
    flat = [np.asarray(x).reshape(work.length, -1, HEAD_DIM) for x in result]
    return [x[work.checked].astype(np.float64) for x in flat]


def _read_numpy(result, work):
    """Read NumPy arrays (1, heads, length, head_dim)."""
    return [x[0].swapaxes(0, 1)[work.checked].astype(np.float64) for x in result]


# --- posenc --------------------------------------------------------------------------


def _as_numpy(tensors):
    """Return the tensors as arrays on the same memory, bfloat16 as ml_dtypes has it."""
    import ml_dtypes

    if tensors[0].dtype is torch.bfloat16:
        bits = (t.view(torch.int16).numpy() for t in tensors)
        return tuple(b.view(ml_dtypes.bfloat16) for b in bits)
    return tuple(t.numpy() for t in tensors)


def _posenc(work, tables, kind=tuple, **options):
    rotate = functools.partial(posenc.rope_qk, layout=work.layout, **options)
    arrays = (work.inputs, tables, work.out, work.own)
    (q, k), (cos, sin), out, own = (kind(pair) for pair in arrays)
    return {
        "in place": Run(lambda: rotate(*own, cos, sin, out=own), before=work.reset),
        "out given": Run(lambda: rotate(q, k, cos, sin, out=out)),
        "fresh": Run(lambda: rotate(q, k, cos, sin)),
    }


def posenc_once(work, n_thread):
    """Rotate torch tensors by posenc: computed in float32, rounded once."""
    return _posenc(work, work.tables32)


def posenc_eager(work, n_thread):
    """Rotate by posenc with PyTorch's roundings, which differ in 16 bits only."""
    if work.dtype.itemsize > 2:
        return {}
    return _posenc(work, work.tables, rounding="eager")


def posenc_numpy(work, n_thread):
    """Rotate NumPy arrays by posenc."""
    if work.length >= LONG:  # calls cost nothing there
        return {}
    runs = _posenc(work, work.tables32, kind=_as_numpy)
    for run in runs.values():
        run.read = _read_numpy
    return runs


def posenc_torch(work, n_thread):
    """Rotate by the operation that autograd and torch.compile know."""
    from posenc.torch import rope_qk

    cos, sin = work.tables32
    return {"fresh": Run(lambda: rope_qk(*work.inputs, cos, sin, layout=work.layout))}


# --- torch ---------------------------------------------------------------------------


def eager_function(layout):
    """Return transformers' own function: Llama's, or Cohere's for interleaved."""
    if layout == "half":
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    else:
        from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb
    return apply_rotary_pos_emb


def transformers_eager(work, n_thread):
    """Rotate as models of transformers do."""
    eager = eager_function(work.layout)
    return {"fresh": Run(lambda: eager(*work.inputs, *work.full))}


def torch_compile(work, n_thread):
    """Rotate by transformers' function under torch.compile.

    Of long work the fresh mode alone: there are three compilations for each row.
    """
    eager = eager_function(work.layout)

    def into(q, k, cos, sin, q_out, k_out):
        for to, result in zip((q_out, k_out), eager(q, k, cos, sin), strict=True):
            to.copy_(result)

    def in_place(q, k, cos, sin):
        into(q, k, cos, sin, q, k)

    torch.compiler.reset()  # or the compilations of other cases count as its own
    fresh, given, inside = (
        torch.compile(function, dynamic=False) for function in (eager, into, in_place)
    )
    inputs, tables, out, own = work.inputs, work.full, work.out, work.own
    runs = {
        "in place": Run(lambda: inside(*own, *tables) or own, before=work.reset),
        "out given": Run(lambda: given(*inputs, *tables, *out) or out),
        "fresh": Run(lambda: fresh(*inputs, *tables)),
    }
    return {"fresh": runs["fresh"]} if work.length >= LONG else runs


def complex_rotation(inputs, cis):
    """Return a function that rotates as Meta's llama does, with view_as_complex."""
    q, k = _heads_last(inputs)
    cis = cis[None, :, None]

    def rotate(x):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * cis).flatten(3).type_as(x).transpose(1, 2)

    return lambda: (rotate(q), rotate(k))


def complex_form(work, n_thread):
    """Rotate by multiplying complex numbers."""
    _only(work, layout="interleaved")
    return {"fresh": Run(complex_rotation(work.inputs, torch.complex(*work.tables32)))}


def rotary_embedding_torch(work, n_thread):
    """Rotate by lucidrains' module, with its cache filled in float32 beforehand.

    Filled by a 16-bit call it would hold rounded positions.
    """
    from rotary_embedding_torch import RotaryEmbedding

    _only(work, layout="interleaved")
    _not_long(work)
    end = work.start + work.length
    rotary = RotaryEmbedding(HEAD_DIM, cache_max_seq_len=end)
    rotary(rotary.get_seq_pos(end), seq_len=end)
    rotate = functools.partial(rotary.rotate_queries_or_keys, offset=work.start)
    q, k = work.inputs
    return {"fresh": Run(lambda: (rotate(q), rotate(k)))}


# --- others --------------------------------------------------------------------------

ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}


def _onnx_model(work):
    """Return a model of one RotaryEmbedding node for q and one for k."""
    from onnx import TensorProto, helper

    kind, length = ONNX_TYPES[work.dtype], work.length
    table = [length, HEAD_DIM // 2]
    inputs = [
        helper.make_tensor_value_info("positions", TensorProto.INT64, [1, length]),
        helper.make_tensor_value_info("cos", kind, table),
        helper.make_tensor_value_info("sin", kind, table),
    ]
    nodes, outputs = [], []
    for name, heads in (("q", HEADS), ("k", KEY_HEADS)):
        shape = [1, length, heads * HEAD_DIM]  # tokens first: as memory has it
        inputs.append(helper.make_tensor_value_info(name, kind, shape))
        outputs.append(helper.make_tensor_value_info(f"{name}_out", kind, shape))
        nodes.append(
            helper.make_node(
                "RotaryEmbedding",
                [name, "positions", "cos", "sin"],
                [f"{name}_out"],
                domain="com.microsoft",
                interleaved=int(work.layout == "interleaved"),
                num_heads=heads,
            )
        )
    graph = helper.make_graph(nodes, "rope", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _onnx_session(work, n_thread):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_thread
    options.inter_op_num_threads = 1
    model = _onnx_model(work).SerializeToString()
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"]
    )


def onnx_runtime(work, n_thread):
    """Rotate by ONNX Runtime's RotaryEmbedding, on the same memory."""
    session = _onnx_session(work, n_thread)

    def flat(tensors):
        return [t.flatten(2).numpy() for t in _heads_last(tensors)]

    inputs, own, out = flat(work.inputs), flat(work.own), flat(work.out)
    cos, sin = (t.numpy() for t in work.tables)
    rest = {"positions": np.arange(work.length)[None], "cos": cos, "sin": sin}

    def bound(come_from, to):
        binding = session.io_binding()
        feed = {**dict(zip("qk", come_from, strict=True)), **rest}
        for bind, arrays in (
            (binding.bind_input, feed),
            (binding.bind_output, dict(zip(("q_out", "k_out"), to, strict=True))),
        ):
            for name, a in arrays.items():
                bind(name, "cpu", 0, a.dtype, a.shape, a.ctypes.data)
        return lambda: session.run_with_iobinding(binding) or to

    def settle():
        time.sleep(SPINNING if n_thread > 1 else 0)

    feed = {**dict(zip("qk", inputs, strict=True)), **rest}
    run = functools.partial(Run, after=settle, read=_read_heads_last)
    return {
        "in place": run(bound(own, own), before=work.reset),
        "out given": run(bound(inputs, out)),
        "fresh": run(lambda: session.run(None, feed)),
    }


def with_numba(work, n_thread):
    """Rotate by kernels of numba, on the same memory."""
    import numba

    from .numba_kernels import kernels

    _only(work, dtypes=(torch.float32, torch.float64))
    numba.set_num_threads(n_thread)
    into, in_place = kernels(work.layout, parallel=n_thread > 1)
    q, k, q_out, k_out, q_own, k_own = (
        t[0].numpy() for t in _heads_last(work.inputs + work.out + work.own)
    )
    cos, sin = (t.numpy() for t in work.tables)

    def given(q_out, k_out):
        into(q, cos, sin, q_out)
        into(k, cos, sin, k_out)
        return q_out, k_out

    def inside():
        in_place(q_own, cos, sin)
        in_place(k_own, cos, sin)
        return q_own, k_own

    return {
        "in place": Run(inside, before=work.reset, read=_read_heads_last),
        "out given": Run(lambda: given(q_out, k_out), read=_read_heads_last),
        "fresh": Run(
            lambda: given(np.empty_like(q), np.empty_like(k)), read=_read_heads_last
        ),
    }


def with_jax(work, n_thread):
    """Rotate by jax.jit; in place by donating the arguments.

    Of eight ways to write it stacking the two halves compiles to the fastest code.
    """
    import jax
    import jax.numpy as jnp

    if n_thread == 1 and not can_pin():
        raise Gap("cannot be held to one thread here")
    inputs = [jnp.from_dlpack(t.contiguous()) for t in _heads_last(work.inputs)]
    cos, sin = (jnp.from_dlpack(t)[:, None] for t in work.tables)
    axis = -2 if work.layout == "half" else -1

    def rotate(x, cos, sin):
        a, b = pairs_of(x, work.layout)
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis).reshape(x.shape)

    def both(q, k, cos, sin):
        return rotate(q, cos, sin), rotate(k, cos, sin)

    fresh, donating = jax.jit(both), jax.jit(both, donate_argnums=(0, 1))
    state = []

    def reset():
        state[:] = jax.block_until_ready([jnp.copy(x) for x in inputs])

    def in_place():
        state[:] = jax.block_until_ready(donating(*state, cos, sin))
        return state

    return {
        "in place": Run(in_place, before=reset, read=_read_heads_last),
        "fresh": Run(
            lambda: jax.block_until_ready(fresh(*inputs, cos, sin)),
            read=_read_heads_last,
        ),
    }


def with_mlx(work, n_thread):
    """Rotate by mlx.fast.rope on the CPU: it makes its angles anew in each call.

    Its CPU stream is one thread, and no setting changes that.
    """
    import mlx.core as mx

    _not_long(work)
    mx.set_default_device(mx.cpu)
    kind = getattr(mx, name_of(work.dtype))
    q, k = (
        mx.array(t.contiguous().view(_bits(t)).numpy()).view(kind).transpose(0, 2, 1, 3)
        for t in _heads_last(work.inputs)
    )
    rotate = functools.partial(
        mx.fast.rope,
        dims=HEAD_DIM,
        traditional=work.layout == "interleaved",
        base=THETA,
        scale=1.0,
        offset=work.start,
    )

    def fresh():
        result = rotate(q), rotate(k)
        mx.eval(*result)
        return result

    def read(result, work):
        chosen = (x[0][:, mx.array(work.checked)].astype(mx.float32) for x in result)
        return [np.array(x).swapaxes(0, 1).astype(np.float64) for x in chosen]

    return {"fresh": Run(fresh, read=read)}


def _bits(tensor):
    return torch.int16 if tensor.dtype.itemsize == 2 else torch.int32


PEERS = {
    "posenc": posenc_once,
    "posenc eager": posenc_eager,
    "posenc.torch": posenc_torch,
    "posenc NumPy": posenc_numpy,
    "transformers": transformers_eager,
    "torch.compile": torch_compile,
    "complex form": complex_form,
    "ONNX Runtime": onnx_runtime,
    "rotary-embedding-torch": rotary_embedding_torch,
    "numba": with_numba,
    "JAX": with_jax,
    "MLX": with_mlx,
}
OWN_ANGLES = ("rotary-embedding-torch", "MLX")  # not from the tables of the others


def is_ours(peer):
    """Say whether a failure is an error, not a gap."""
    return peer.startswith("posenc")


def _reason(error):
    """Return why a peer failed, in a few words."""
    if isinstance(error, ImportError):
        return f"not installed or not for this machine ({type(error).__name__})"
    text = str(error).partition("\n")[0].rpartition(" : ")[2][:90]
    return text if isinstance(error, Gap) else f"{type(error).__name__}: {text}"


def prepare(work, n_thread, chosen=tuple(PEERS), peers=PEERS):
    """Return the checked runs by (peer, mode), their errors, and why others lack."""
    runs, errors, gaps = {}, {}, {}
    for peer in (name for name in peers if name in chosen):
        try:
            for mode, run in peers[peer](work, n_thread).items():
                work.forget()
                run.before()
                result = run.call()
                found = run.read(result, work) if run.read else work.read(result)
                errors[peer, mode] = _checked(peer, work.error(found), work)
                runs[peer, mode] = run
        except Exception as error:
            if is_ours(peer) and type(error) is not Gap:
                raise
            gaps[peer] = _reason(error)
    return runs, errors, gaps


def _checked(peer, error, work):
    tolerance = work.tolerance(peer in OWN_ANGLES)
    if not error <= tolerance:
        raise Wrong(f"off by {error:.1e}, where rounding explains {tolerance:.1e}")
    return error
