"""posenc.torch: the numbers of `posenc.rope`, every derivative, compiled graphs.

The oracle of derivatives is finite differences (gradcheck) or autograd through the
formula written in torch; of compiled code, the same call without a compiler.
"""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch_tools import Graphs  # noqa: E402

import posenc  # noqa: E402
import posenc.torch  # noqa: E402
from posenc.torch import RotaryEmbedding, rope, rope_qk  # noqa: E402

# Compilers of torch call it themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("on_one_thread"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("half", "interleaved")
OPERATORS = ("rope", "rope_qk", "rope_out", "rope_qk_out", "rope_table")
# Two float32 sums of at most 24 products, in different order.
SUM_TOLERANCE = 24 * 2.0**-23

# What else a call may say, with a table of 9 rows where rows are chosen.
OPTIONS = {
    "plain": {},
    "adjoint": {"adjoint": True},
    "inverse": {"inverse": True},
    "positions": {"positions": torch.tensor([3, 0, 8])},
    "positions of each": {"positions": torch.tensor([[3, 0, 8], [1, 1, 2]])},
    "offset": {"offset": 6},
    "offset of each": {"offset": torch.tensor([0, 5])},
    "packed": {"cu_seqlens": torch.tensor([0, 1, 1, 3])},
    "packed, offset": {"cu_seqlens": torch.tensor([0, 1, 3]), "offset": 2},
    "packed, offsets": {
        "cu_seqlens": torch.tensor([0, 1, 3]),
        "offset": torch.tensor([4, 7]),
    },
}
PARTS = {"all": (4, 0), "first": (2, 0), "last": (2, -4), "middle": (2, 1)}


def random(*shape, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values.requires_grad_(grad)


def heads(n_head=2, n_token=3, dtype=torch.float32, grad=False):
    """Return queries or keys as they lie after a projection."""
    x = random(2, n_token, n_head, 8, dtype=dtype)
    return x.transpose(1, 2).requires_grad_(grad)


def tables(n_pair=4, n_row=3, dtype=torch.float32, grad=False):
    cos, sin = (random(n_row, n_pair + i, dtype=dtype)[:, :n_pair] for i in range(2))
    return cos.contiguous().requires_grad_(grad), sin.contiguous().requires_grad_(grad)


def tables_for(options, **kwargs):
    chooses = {"positions", "offset", "cu_seqlens"} & set(options)
    return tables(n_row=9 if chooses else 3, **kwargs)


def formula(x, cos, sin):
    """Return the rotation of all channels in the half layout, as torch computes it."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def steps(x):
    """Return the strides that lead anywhere."""
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def assert_same(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert steps(ours) == steps(theirs)
    assert torch.equal(ours, theirs)


# --- numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_results_are_those_of_the_plain_function(options, dtype, layout, grad):
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    table = tables_for(options, n_pair=2, dtype=table_dtype)
    options = {"layout": layout, "rotary_start": -6, **options}
    q, k = heads(4, dtype=dtype), heads(1, dtype=dtype)
    expected = posenc.rope_qk(q, k, *table, **options)
    q.requires_grad_(grad)
    ours = rope_qk(q, k, *table, **options)
    assert_same(ours[0].detach(), expected[0])
    assert_same(ours[1].detach(), expected[1])
    assert_same(rope(q, *table, **options).detach(), expected[0])
    assert ours[0].requires_grad == grad


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_rounding_of_16_bit_data_there_and_back(dtype, rounding):
    x, (cos, sin) = heads(dtype=dtype, grad=True), tables(dtype=dtype)
    out = rope(x, cos, sin, rounding=rounding)
    grad = random(*x.shape, dtype=dtype)
    out.backward(grad)
    plain = x.detach()
    if rounding == "eager":
        expected, back = formula(plain, cos, sin), formula(grad, cos, -sin)
    else:
        wide = [t.float() for t in (plain, grad, cos, sin)]
        expected = formula(wide[0], *wide[2:]).to(dtype)
        back = formula(wide[1], wide[2], -wide[3]).to(dtype)
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, back)


def test_float32_gradients_have_the_bits_of_autograd():
    x, (cos, sin), grad = heads(grad=True), tables(), random(2, 2, 3, 8).float()
    ours = torch.autograd.grad(rope(x, cos, sin), x, grad)
    theirs = torch.autograd.grad(formula(x, cos, sin), x, grad)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.int32), ids=str)
def test_dtypes_of_results_and_gradients(dtype, table_dtype, compiled):
    grad = dtype.is_floating_point
    x, table = heads(), tables(dtype=table_dtype, grad=True)
    x = x.to(dtype).requires_grad_(grad)
    expected = posenc.rope(x.detach(), *(t.detach() for t in table))
    out = rope(x, *table)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)
    with torch.no_grad():
        assert compiled(rope)(x, *table).dtype == expected.dtype
    inputs = (x, *table) if grad else table
    for each, gradient in zip(
        inputs, torch.autograd.grad(out.sum(), inputs), strict=True
    ):
        assert gradient.dtype == each.dtype


def test_arrays_serve_as_tables_and_rows():
    x, (cos, sin) = heads(grad=True), tables(n_row=9)
    expected = rope(x, cos, sin, positions=torch.tensor([1, 2, 0]))
    ours = rope(x, cos.numpy(), sin.numpy(), positions=np.array([1, 2, 0]))
    assert ours.requires_grad
    assert_same(ours, expected)
    assert_same(rope(x, cos, sin, positions=[1, 2, 0]), expected)


def test_negated_and_subclassed_tensors_are_taken():
    class Mine(torch.Tensor):
        pass

    x, table = heads(), tables()
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    assert torch.equal(rope(negated, *table), posenc.rope(-x, *table))
    ours = rope(x.as_subclass(Mine), *table)
    assert type(ours) is Mine
    assert torch.equal(ours.as_subclass(torch.Tensor), posenc.rope(x, *table))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_and_in_place(layout):
    q, k, table = heads(), heads(1), tables()
    expected = posenc.rope_qk(q, k, *table, layout=layout)
    out = torch.empty(2, 2, 3, 8), torch.empty(2, 1, 3, 8)
    result = rope_qk(q, k, *table, layout=layout, out=out)
    assert all(a is b for a, b in zip(result, out, strict=True))
    assert all(map(torch.equal, out, expected))
    assert rope(q, *table, layout=layout, out=q) is q
    assert torch.equal(q, expected[0])


def test_parameters_without_gradients_are_rotated_in_place():
    x, table = torch.nn.Parameter(heads()), tables()
    expected = posenc.rope(x.detach(), *table)
    with torch.no_grad():
        assert rope(x, *table, out=x) is x
    assert torch.equal(x, expected)


# --- derivatives ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_first_and_second_derivatives(layout, part):
    n_pair, start = part
    x = random(1, 2, 2, 8, grad=True)
    table = tables(n_pair, 2, torch.float64, grad=True)

    def rotate(*args):
        return rope(*args, layout=layout, rotary_start=start)

    checks = {"check_batched_grad": True, "check_forward_ad": True}
    assert gradcheck(rotate, (x, *table), **checks)
    assert gradgradcheck(rotate, (x, *table))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_derivatives_with_any_option(options):
    x = random(2, 1, 3, 4, grad=True)
    table = tables_for(options, n_pair=2, dtype=torch.float64, grad=True)
    checks = {"check_batched_grad": True, "check_forward_ad": True}
    assert gradcheck(lambda *args: rope(*args, **options), (x, *table), **checks)
    assert gradgradcheck(lambda x: rope(x, *table, **options), (x,))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 1, 3, 4), (2, 2, 3, 4)])
def test_table_gradients_are_summed_where_tables_are_broadcast(shape):
    q, k = heads(dtype=torch.float64, grad=True), heads(2, dtype=torch.float64)
    cos, sin = (random(*shape, grad=True) for _ in range(2))
    wide = [t[:, None] if t.ndim == 3 else t for t in (cos, sin)]
    theirs = formula(q, *wide).pow(3).sum() + formula(k, *wide).pow(2).sum()
    a, b = rope_qk(q, k, cos, sin)
    ours = a.pow(3).sum() + b.pow(2).sum()
    inputs = q, cos, sin
    for mine, other in zip(
        torch.autograd.grad(ours, inputs),
        torch.autograd.grad(theirs, inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_gradients_of_one_of_two():
    q, k, table = heads(grad=True), heads(1, grad=True), tables()
    both = torch.autograd.grad(sum(t.square().sum() for t in rope_qk(q, k, *table)), q)
    alone = torch.autograd.grad(rope_qk(q, k, *table)[0].square().sum(), q)
    fixed = torch.autograd.grad(rope_qk(q, k.detach(), *table)[0].square().sum(), q)
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[0], fixed[0])
    assert not rope_qk(q.detach(), k.detach(), *table)[0].requires_grad


def test_16_bit_table_gradients_are_summed_in_float32():
    x, table = heads(dtype=torch.bfloat16), tables(dtype=torch.bfloat16, grad=True)
    grad = random(*x.shape, dtype=torch.bfloat16)
    ours = torch.autograd.grad(rope(x, *table), table, grad)
    wide = [t.detach().float().requires_grad_() for t in table]
    theirs = torch.autograd.grad(formula(x.float(), *wide), wide, grad.float())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            mine.float(), other, rtol=2.0**-8 + SUM_TOLERANCE, atol=SUM_TOLERANCE
        )


def test_transforms_of_torch_func():
    x, (cos, sin) = random(2, 3, 4), tables(2, dtype=torch.float64)
    func = torch.func

    def ours(x, cos):
        return rope(x, cos, sin).pow(3).sum()

    def theirs(x, cos):
        return formula(x, cos, sin).pow(3).sum()

    for transform in (
        lambda f: func.grad(f, (0, 1))(x, cos),
        lambda f: func.hessian(f, (0, 1))(x, cos)[0],
        lambda f: func.jacfwd(func.grad(f, 1), 0)(x, cos),
        lambda f: func.vmap(func.grad(f, (0, 1)), (0, None))(x, cos),
        lambda f: func.vmap(f, (None, 0))(x, torch.stack((cos, sin))),
        lambda f: func.vmap(f, (1, 0))(x.transpose(0, 1), torch.stack((cos, sin))),
        lambda f: func.jvp(f, (x, cos), (x + 1, cos + 1)),
    ):
        for a, b in zip(transform(ours), transform(theirs), strict=True):
            torch.testing.assert_close(a, b)


def test_vmap_of_two_and_of_positions():
    q, k, table = heads(), heads(1), tables(n_row=9)
    positions = torch.tensor([[3, 1, 8], [0, 0, 1]])
    ours = torch.vmap(lambda q, k, p: rope_qk(q, k, *table, positions=p))(
        q, k, positions
    )
    for i in range(2):
        one = posenc.rope_qk(q[i], k[i], *table, positions=positions[i])
        assert torch.equal(ours[0][i], one[0])
        assert torch.equal(ours[1][i], one[1])


def test_forward_mode_carries_tangents():
    x, (cos, sin), tangent = heads(), tables(), random(2, 2, 3, 8).float()
    with forward_ad.dual_level():
        dual = rope(forward_ad.make_dual(x, tangent), cos, sin)
        value, ours = forward_ad.unpack_dual(dual)
    assert torch.equal(value, rope(x, cos, sin))
    assert torch.equal(ours, rope(tangent, cos, sin))


# --- compilers -----------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_graph_holds_one_operator(options, grad, compiled):
    graphs, table = Graphs(), tables_for(options)
    q, k = heads(4, grad=grad), heads(1)

    def rotate(q, k):
        return rope_qk(q, k, *table, **options)

    ours, theirs = compiled(rotate, backend=graphs)(q, k), rotate(q, k)
    # With gradients: one there and, in the same graph, one for the way back.
    assert len(graphs) == 1
    assert graphs.operators() == 1 + grad
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step_with_any_length(backend, layout, compiled):
    def step(x, cos, sin):
        return rope(2 * x, cos, sin, layout=layout).pow(2).sum()

    fast = compiled(step, backend=backend, dynamic=True)
    for n_token in (5, 3, 8):
        x, table = heads(n_token=n_token, grad=True), tables(n_row=n_token, grad=True)
        inputs = (x, *table)
        ours = torch.autograd.grad(fast(*inputs), inputs)
        theirs = torch.autograd.grad(step(*inputs), inputs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_out_and_in_place(backend, compiled):
    table = tables()

    def rotate(x, y):
        rope(x, *table, out=y)
        rope_qk(y, x, *table, out=(y, x))
        return x + y

    x, y = heads(), heads(dtype=torch.float32) + 1
    other = x.clone(), y.clone()
    expected = rotate(*other)
    assert torch.equal(compiled(rotate, backend=backend)(x, y), expected)
    assert torch.equal(x, other[0])
    assert torch.equal(y, other[1])


def test_compiled_call_with_one_tensor_twice(compiled):
    x, table = heads(grad=True), tables()
    ours = compiled(lambda x: rope_qk(x, x, *table))(x)
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(ours[0], posenc.rope(x.detach(), *table))


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).pow(3).sum()),
    "vmap": torch.func.vmap,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x + 1,))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_compilers_break_their_graph_under_transforms(transform, compiled):
    x, table = heads(), tables()
    transformed = transform(lambda x: rope(x, *table))
    loose = torch.compile(transformed, backend="aot_eager")
    assert torch.equal(loose(x), transformed(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(transformed)(x)


def test_compilers_break_their_graph_in_forward_mode(compiled):
    x, table = heads(), tables()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x + 1)
        loose = torch.compile(lambda x: rope(x, *table), backend="aot_eager")
        ours = forward_ad.unpack_dual(loose(dual)).tangent
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(lambda x: rope(x, *table))(dual)
    assert torch.equal(ours, rope(x + 1, *table))


def layouts_in_memory():
    fused = random(2, 3, 6, 8, dtype=torch.float32)
    yield "contiguous", random(2, 3, 8, dtype=torch.float32)
    yield "after a projection", heads()
    yield "slice", fused[:, :, 1:3].transpose(1, 2)
    yield "channels first", random(8, 3, 2, dtype=torch.float32).permute(2, 1, 0)
    yield "expanded", random(1, 3, 8, dtype=torch.float32).expand(4, 3, 8)
    yield "one token", random(2, 1, 3, 8, dtype=torch.float32).transpose(1, 2)
    yield "odd strides", torch.empty(9).as_strided((1, 1, 8), (77, 5, 1)).fill_(1)
    yield "every other", random(2, 3, 16, dtype=torch.float32)[..., ::2]
    yield "empty", random(2, 0, 3, 8, dtype=torch.float32).transpose(1, 2)
    yield "parameter", torch.nn.Parameter(random(3, 8, dtype=torch.float32))


IN_MEMORY = dict(layouts_in_memory())


def test_meta_tensors_give_meta_tensors():
    x, table = heads().to("meta"), [t.to("meta") for t in tables()]
    result = rope(x.requires_grad_(), *table)
    assert result.is_meta
    assert (result.shape, result.stride()) == (x.shape, x.stride())
    assert torch.autograd.grad(result.sum(), x)[0].is_meta


@pytest.mark.parametrize("of_table", [*DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("of_x", [*DTYPES, torch.int64], ids=str)
def test_meta_tensors_give_the_dtype_that_others_give(of_x, of_table):
    x, table = torch.ones(3, 4, dtype=of_x), torch.ones(3, 2, dtype=of_table)
    expected = rope(x, table, table).dtype
    assert rope(x.to("meta"), table.to("meta"), table.to("meta")).dtype == expected


@pytest.mark.parametrize("x", IN_MEMORY.values(), ids=IN_MEMORY)
def test_fresh_results_lie_in_memory_as_the_fake_ones_say(x):
    cos, sin = tables(n_row=x.shape[-2])
    with torch.no_grad():
        plain = rope(x, cos, sin)
        by_operator = torch.ops.posenc.rope(x, cos, sin, None, None, None, *TURN)
        with FakeTensorMode() as mode:
            fake = rope(*map(mode.from_tensor, (x, cos, sin)))
    assert steps(by_operator) == steps(fake) == steps(torch.empty_like(x))
    assert_same(plain, by_operator)


TURN = ("half", -2, 0, False, "once")


def operator_cases():
    q, k, table = heads(), heads(1, dtype=torch.float32), tables()
    rows = None, None, None
    positions = torch.tensor([2, 0, 1]), None, None
    turn = "interleaved", -2, 0, True, "once"
    packed = None, torch.tensor([0, 0]), torch.tensor([0, 2, 3])
    yield "rope", (q, *table, *rows, *TURN)
    yield "rope", (q.bfloat16(), *table, *positions, *turn)
    yield "rope", (q, *table, *packed, *TURN)
    yield "rope_qk", (q, k, *table, *positions, *turn)
    yield "rope_out", (q, *table, *rows, *TURN, torch.empty_like(q))
    out = torch.empty_like(q), torch.empty_like(k)
    yield "rope_qk_out", (q, k, *table, *rows, *turn, *out)
    yield (
        "rope_table",
        (torch.arange(3), table[0][0].double(), 1.5, "exact", torch.float32),
    )


@pytest.mark.parametrize(("name", "arguments"), list(operator_cases()))
def test_operators_pass_opcheck(name, arguments):
    operator = getattr(torch.ops.posenc, name).default
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_no_operator_goes_unchecked():
    assert {name for name, _ in operator_cases()} == set(OPERATORS)


def test_traces_hold_the_operator():
    x, table = heads(), tables()
    other = x + 1

    class Rotate(torch.nn.Module):
        def forward(self, x):
            return rope(x, *table)

    exported = torch.export.export(Rotate(), (x,)).module()
    loose = torch.export.export(Rotate(), (x,), strict=False).module()
    for traced in (exported, loose, make_fx(Rotate())(x)):
        targets = [str(node.target) for node in traced.graph.nodes]
        assert targets.count("posenc.rope.default") == 1
        assert torch.equal(traced(other), rope(other, *table))


def test_jit_trace_holds_the_operator():
    x, table = heads(), tables()
    traced = torch.jit.trace(lambda x: rope(x, *table), (x,), check_trace=False)
    assert "posenc::rope" in str(traced.graph)
    assert torch.equal(traced(x + 1), rope(x + 1, *table))


# --- the module ----------------------------------------------------------------------


def qk(n_token=5, dim=8, dtype=torch.float32):
    return (
        random(2, 3, n_token, dim, dtype=dtype),
        random(2, 1, n_token, dim, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("angles", ["exact", "float32"])
def test_module_rotates_by_its_tables(dtype, layout, angles):
    q, k = qk(dtype=dtype)
    scaling = {"rope_type": "linear", "factor": 4}
    rotary = RotaryEmbedding(6, scaling=scaling, layout=layout, angles=angles)
    kind = np.float64 if angles == "exact" else np.float32
    inv_freq, factor = posenc.rope_inv_freq(6, scaling=scaling, dtype=kind)
    table = posenc.rope_table(
        range(5),
        inv_freq,
        attention_factor=factor,
        angles=angles,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    expected = posenc.rope_qk(q, k, *table, layout=layout)
    assert all(map(torch.equal, rotary(q, k), expected))


ROWS = {
    "offset": {"offset": 3},
    "negative offset": {"offset": -3},
    "offset of each": {"offset": torch.tensor([7, 0])},
    "positions": {"positions": torch.tensor([4, 0, 0, 99_999, 2])},
    "positions of each": {"positions": torch.arange(10).view(2, 5)},
    "fractional": {"positions": torch.tensor([0.5, -1, 0, 2, 1e6])},
    "packed": {"cu_seqlens": torch.tensor([0, 2, 5])},
    "packed, offset": {"cu_seqlens": torch.tensor([0, 2, 5]), "offset": 4},
    "packed, offsets": {
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "offset": torch.tensor([3, 1]),
    },
}
POSITIONS = {
    "offset": [3, 4, 5, 6, 7],
    "negative offset": [-3, -2, -1, 0, 1],
    "offset of each": [[7, 8, 9, 10, 11], [0, 1, 2, 3, 4]],
    "packed": [0, 1, 0, 1, 2],
    "packed, offset": [4, 5, 4, 5, 6],
    "packed, offsets": [3, 4, 1, 2, 3],
}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_module_knows_positions(rows, learned, compiled):
    rotary, (q, k) = RotaryEmbedding(8, learned=learned), qk()
    options = ROWS[rows]
    positions = POSITIONS.get(rows, options.get("positions"))
    inv_freq = rotary.inv_freq.detach().numpy()
    table = posenc.rope_table(np.asarray(positions), inv_freq)
    expected = posenc.rope_qk(q, k, *table)
    assert all(map(torch.equal, rotary(q, k, **options), expected))
    assert all(map(torch.equal, compiled(rotary)(q, k, **options), expected))


def test_module_grows_its_table_and_keeps_its_bits():
    rotary, (q, k) = RotaryEmbedding(8, max_seq_len=4), qk(40)
    first = rotary(q[:, :, :3], k[:, :, :3])
    all_of_it = rotary(q, k)
    last = rotary(q[:, :, 39:], k[:, :, 39:], offset=39)
    assert torch.equal(first[0], all_of_it[0][:, :, :3])
    assert torch.equal(last[1], all_of_it[1][:, :, 39:])


def test_module_keeps_its_frequencies_through_any_change_of_type():
    rotary, (q, k) = RotaryEmbedding(8), qk()
    expected = rotary(q, k)
    changed = torch.nn.ModuleList([copy.deepcopy(rotary)]).bfloat16().half()[0]
    pickled = pickle.loads(pickle.dumps(changed))
    for each in (changed, pickled):
        assert not each.state_dict()
        assert all(map(torch.equal, each(q, k), expected))
    learned = RotaryEmbedding(8, learned=True)
    inv_freq = learned.inv_freq.detach().clone()
    assert torch.equal(learned.bfloat16().half().inv_freq, inv_freq)
    assert learned.double().inv_freq.dtype == torch.float64
    assert list(learned.state_dict()) == ["inv_freq"]
    other = RotaryEmbedding(8, theta=100.0, learned=True)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other.inv_freq, inv_freq)


def test_module_learns_its_frequencies():
    rotary = RotaryEmbedding(4, learned=True).double()
    x = random(1, 1, 3, 4)

    def rotate(inv_freq):
        names = {"inv_freq": inv_freq}
        return torch.func.functional_call(rotary, names, (x, x), {"offset": 5})

    inv_freq = rotary.inv_freq.detach().clone().requires_grad_()
    assert gradcheck(rotate, (inv_freq,))
    assert gradgradcheck(rotate, (inv_freq,))


@pytest.mark.parametrize("positions", [None, torch.tensor([[0, 5, 3], [1, 1, 2]])])
def test_compiled_module_learns_too(positions, compiled):
    rotary, (q, k) = RotaryEmbedding(8, learned=True), qk(3)

    def gradient(rotate):
        a, b = rotate(q, k, positions=positions)
        loss = a.pow(3).sum() + b.pow(3).sum()
        return torch.autograd.grad(loss, rotary.inv_freq)[0]

    graphs = Graphs()
    rotary_compiled = compiled(rotary, backend=graphs)
    assert torch.equal(rotary_compiled(q, k)[0], rotary(q, k)[0])
    torch.testing.assert_close(
        gradient(compiled(rotary)),
        gradient(rotary),
        rtol=SUM_TOLERANCE,
        atol=SUM_TOLERANCE,
    )


def test_learned_frequencies_fit_those_of_a_target():
    target, rotary = RotaryEmbedding(8), RotaryEmbedding(8, theta=3000.0, learned=True)
    q, k = qk(16)
    expected = target(q, k)[0]
    optimizer = torch.optim.Adam(rotary.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (rotary(q, k)[0] - expected).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_module_shows_what_it_is():
    assert repr(RotaryEmbedding(64)) == (
        "RotaryEmbedding(64, layout='half', angles='exact', learned=False)"
    )


# --- bad input -----------------------------------------------------------------------


def wrong(x=None, cos=None, sin=None, grad=False, **options):
    x = heads(grad=grad) if x is None else x
    table = tables()
    return (
        x,
        table[0] if cos is None else cos,
        table[1] if sin is None else sin,
        options,
    )


ERRORS = [
    (wrong(x=[1.0]), TypeError, "x must be a torch.Tensor; got list"),
    (wrong(x=np.ones((3, 8))), TypeError, "x must be a torch.Tensor; got ndarray"),
    (
        wrong(cos="cos"),
        TypeError,
        "cos must be a torch.Tensor or an array that torch can read; got str",
    ),
    (
        wrong(x=heads().to_sparse()),
        TypeError,
        "x must be a dense tensor; got one of layout torch.sparse_coo",
    ),
    (
        wrong(grad=True, out=torch.empty(2, 2, 3, 8)),
        TypeError,
        "out must be None where gradients are needed; got a tensor",
    ),
    (
        wrong(out=torch.empty(2, 2, 3, 8, requires_grad=True)),
        TypeError,
        "out must be None where gradients are needed; got a tensor",
    ),
    (
        wrong(grad=True, inverse=True, adjoint=True),
        ValueError,
        "inverse must not be set together with adjoint; got True",
    ),
    (
        wrong(grad=True, inverse=1),
        TypeError,
        "inverse must be True or False; got 1",
    ),
    (
        wrong(grad=True, layout="both"),
        ValueError,
        "layout must be one of 'half', 'interleaved'; got 'both'",
    ),
    (
        wrong(grad=True, positions=torch.tensor([0.0, 1.0, 2.0])),
        TypeError,
        "positions must be whole numbers; got dtype float32",
    ),
    (
        wrong(grad=True, positions=torch.tensor([0, -1, 2])),
        ValueError,
        "positions must lie in [0, 3), the rows of cos; got -1 at index (1,)",
    ),
    (
        wrong(cos=tables(grad=True)[0], positions=torch.tensor([0, -1, 2])),
        ValueError,
        "positions must lie in [0, 3), the rows of cos; got -1 at index (1,)",
    ),
    (
        wrong(cos=tables(grad=True)[0], cu_seqlens=torch.tensor([0, 2])),
        ValueError,
        "cu_seqlens must end with 3, the number of tokens of x; got 2",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS]
)
def test_bad_input(arguments, error, message):
    *tensors, options = arguments
    with pytest.raises(error) as caught:
        rope(*tensors, **options)
    assert str(caught.value) == f"rope: {message}"


def test_one_number_is_an_offset_and_no_positions():
    q, k, table = heads(), heads(), tables(n_row=9)
    for call in (lambda: rope(q, *table, positions=3),
                 lambda: rope_qk(q, k, *table, positions=3)):  # fmt: skip
        with pytest.raises(ValueError, match=r"positions must be of shape \(T,\)"):
            call()


def test_modules_that_do_not_fit_their_queries():
    q, k = heads(), heads()
    shape, width = tuple(q.shape), q.shape[-1]
    with pytest.raises(TypeError) as caught:
        RotaryEmbedding(width)(None, k)
    assert (
        str(caught.value) == "RotaryEmbedding: q must be a torch.Tensor; got NoneType"
    )
    with pytest.raises(ValueError) as caught:
        RotaryEmbedding(width, axis=7)(q, k)
    rule = f"name an axis of q, of shape {shape}, but its last"
    assert str(caught.value) == f"RotaryEmbedding: axis must {rule}; got 7"
    with pytest.raises(ValueError) as caught:
        RotaryEmbedding(2 * width)(q, k)
    rule = f"be at most head_dim = {width}"
    assert str(caught.value) == f"RotaryEmbedding: dim must {rule}; got {2 * width}"
    for name in ("axis", "rotary_start"):
        with pytest.raises(TypeError) as caught:
            RotaryEmbedding(width, **{name: "a"})
        rule = "be a whole number"
        assert str(caught.value) == f"RotaryEmbedding: {name} must {rule}; got 'a'"


def test_module_far_off_makes_no_table_up_to_there():
    q, k, first = heads(), heads(), 2**31 - 10
    rotary = RotaryEmbedding(q.shape[-1])
    positions = torch.arange(first, first + q.shape[-2])
    far = rotary(q, k, offset=first)
    assert all(map(torch.equal, far, rotary(q, k, positions=positions)))


def test_bad_input_of_two():
    q, k, table = heads(), heads(), tables()
    with pytest.raises(TypeError) as caught:
        rope_qk(q, None, *table)
    assert str(caught.value) == "rope_qk: k must be a torch.Tensor; got NoneType"
    with pytest.raises(TypeError) as caught:
        rope_qk(q, k, *table, out=q)
    assert str(caught.value) == "rope_qk: out must be a pair of arrays; got Tensor"


def test_compiled_call_says_what_is_wrong(compiled):
    x, table = heads(), tables(n_row=4)
    with pytest.raises(ValueError, match=r"^rope: cos must be of shape"):
        compiled(lambda x: rope(x, *table))(x)


MODULE_ERRORS = [
    (
        {"layout": "both"},
        {},
        ValueError,
        "layout must be one of 'half', 'interleaved'; got 'both'",
    ),
    (
        {"angles": "float16"},
        {},
        ValueError,
        "angles must be one of 'exact', 'float32'; got 'float16'",
    ),
    ({"learned": 1}, {}, TypeError, "learned must be True or False; got 1"),
    (
        {"max_seq_len": 0},
        {},
        ValueError,
        "max_seq_len must be a whole number of at least 1; got 0",
    ),
    (
        {},
        {"positions": torch.arange(5), "offset": 1},
        ValueError,
        "positions must be None if offset or cu_seqlens is given; got both",
    ),
    (
        {},
        {"cu_seqlens": torch.tensor([0, 3, 2, 5])},
        ValueError,
        "cu_seqlens must rise from 0 to 5, the number of tokens; got [0, 3, 2, 5]",
    ),
    (
        {},
        {"cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        "cu_seqlens must rise from 0 to 5, the number of tokens; got [0, 4]",
    ),
    ({}, {"offset": 1.5}, TypeError, "offset must be whole numbers; got dtype float32"),
    ({}, {"offset": True}, TypeError, "offset must be whole numbers; got dtype bool"),
    (
        {},
        {"offset": torch.tensor([1, 2, 3])},
        ValueError,
        "offset must be a whole number or of shape (B,), for q of shape (2, 3, 5, 8); "
        "got shape (3,)",
    ),
    (
        {},
        {"offset": torch.tensor([1, 2, 3]), "cu_seqlens": torch.tensor([0, 2, 5])},
        ValueError,
        "offset must be a whole number or of shape (2,); got shape (3,)",
    ),
    (
        {},
        {"cu_seqlens": torch.tensor([0.0, 5.0])},
        TypeError,
        "cu_seqlens must be whole numbers; got dtype float32",
    ),
    (
        {},
        {"cu_seqlens": torch.tensor([[0, 5]])},
        ValueError,
        "cu_seqlens must be of shape (N + 1,); got shape (1, 2)",
    ),
    (
        {},
        {"positions": torch.tensor([0, 1])},
        ValueError,
        "positions must be of shape (T,) or (B, T) for 5 tokens; got shape (2,)",
    ),
]


@pytest.mark.parametrize(
    ("setting", "options", "error", "message"),
    MODULE_ERRORS,
    ids=[message for *_, message in MODULE_ERRORS],
)
def test_bad_input_of_the_module(setting, options, error, message):
    with pytest.raises(error) as caught:
        RotaryEmbedding(8, **setting)(*qk(), **options)
    assert str(caught.value) == f"RotaryEmbedding: {message}"


def test_import_of_the_package_does_not_import_torch():
    code = "import sys, posenc; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
