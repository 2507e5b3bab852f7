"""Added tables for PyTorch: gradients, compilers and modules."""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import posenc  # noqa: E402
import posenc.torch as pt  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASK = torch.tensor([[False] * 5, [False, False, False, True, True]])
# Sums in float64 of up to 30 numbers like 1, in another order.
ORDER_TOLERANCE = 64 * torch.finfo(torch.float64).eps

PLACES = [
    {},
    {"positions": torch.tensor([3, 0, 3, 1, 8])},
    {"positions": torch.tensor([[3, 0, 3, 1, 8], [1, 1, 1, 1, 1]])},
    {"offset": 2},
    {"offset": torch.tensor([0, 4])},
    {"cu_seqlens": torch.tensor([0, 2, 5])},
    {"padding_mask": MASK},
    {"padding_mask": MASK[1], "positions": torch.tensor([0, 0, 2, -1, -1])},
]
every_place = pytest.mark.parametrize("places", PLACES, ids=lambda p: "-".join(p))


def data(*shape, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def numbers(places, n_token=5, n_batch=2):
    """The position of each token, and which are padding."""
    positions = torch.arange(n_token).expand(n_batch, n_token)
    if "positions" in places:
        positions = places["positions"].expand(n_batch, n_token)
    if "offset" in places:
        positions = positions + torch.as_tensor(places["offset"])[..., None]
    if "cu_seqlens" in places:
        positions = torch.tensor([0, 1, 0, 1, 2]).expand(n_batch, n_token)
    hidden = places.get("padding_mask", torch.zeros(5, dtype=torch.bool))
    return positions, hidden.expand(n_batch, n_token)


def plain_sum(x, rows, scale, places):
    """What they compute, by torch alone."""
    positions, hidden = numbers(places)
    rows = torch.nn.functional.embedding(positions.clamp(min=0), rows)
    return (x * scale + rows).masked_fill(hidden[..., None], 0)


@every_place
@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 3, 5, 6)])
def test_values_and_gradients_are_those_of_torch(places, shape):
    x, table, weight = data(*shape), data(9, 6, seed=1), data(*shape, seed=2).detach()

    y = pt.add_learned(x, table, scale=3.0, **places)
    got = torch.autograd.grad((y * weight).sum(), (x, table))
    if len(shape) == 4:
        want = torch.stack(
            [plain_sum(x[:, h], table, 3.0, places) for h in range(3)], 1
        )
    else:
        want = plain_sum(x, table, 3.0, places)
    assert torch.equal(y, want)
    wanted = torch.autograd.grad((want * weight).sum(), (x, table))
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=ORDER_TOLERANCE)

    y = pt.add_sinusoidal(x, scale=3.0, **places)
    (got,) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(y, posenc.add_sinusoidal(x.detach(), scale=3.0, **places))
    hidden = numbers(places)[1]
    hidden = hidden[:, None, :, None] if len(shape) == 4 else hidden[..., None]
    assert torch.equal(got, (3.0 * weight).masked_fill(hidden, 0))


@pytest.mark.usefixtures("on_one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_gradients_of_an_embedding_bit_for_bit(dtype, shape):
    embed = torch.nn.Embedding(5, 6, dtype=dtype)
    x, positions = data(3, 7, 6, dtype=dtype), torch.randint(0, 5, shape)
    table = embed.weight.detach().clone().requires_grad_()
    grad = data(3, 7, 6, dtype=dtype, seed=1).detach()
    ours = pt.add_learned(x, table, scale=3.3, positions=positions)
    theirs = x * 3.3 + embed(positions)
    got = torch.autograd.grad(ours, (x, table), grad)
    want = torch.autograd.grad(theirs, (x, embed.weight), grad)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2000,), (2, 2000)])
def test_gradients_of_tables_of_16_bits_are_rounded_once(dtype, kind, shape):
    """Of numbers that float32 adds up without rounding, a thousand for each row."""
    x, table = data(2, 2000, 3, dtype=kind), data(4, 3, dtype=dtype, seed=1)
    positions = torch.randint(0, 4, shape)
    grad = (torch.randint(-40, 120, (2, 2000, 3)) / 128).to(kind)
    y = pt.add_learned(x, table, positions=positions)
    assert y.dtype == kind
    (got,) = torch.autograd.grad(y, table, grad)
    want = torch.zeros(4, 3, dtype=torch.float64).index_add_(
        0, positions.expand(2, 2000).flatten(), grad.double().flatten(0, 1)
    )
    assert torch.equal(got, want.to(dtype))


def test_second_derivatives_and_gradcheck():
    x, table = data(2, 5, 3), data(9, 3, seed=1)
    options = {"scale": 2.0, "padding_mask": MASK}
    both = torch.autograd.gradcheck, torch.autograd.gradgradcheck
    for check in both:
        assert check(lambda x: pt.add_sinusoidal(x, **options), (x,))
        assert check(lambda x, t: pt.add_learned(x, t, **options), (x, table))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_mode_and_vmap(dtype):
    """Transforms go through functions of torch, which give the bits of the kernels."""
    x = data(4, 50, 6, dtype=dtype).detach()
    table = data(60, 6, dtype=dtype, seed=1).detach()
    tangent = data(4, 50, 6, dtype=dtype, seed=2).detach()
    for function, given in ((pt.add_sinusoidal, ()), (pt.add_learned, (table,))):

        def add(x, function=function, given=given):
            return function(x, *given, scale=3.3)

        assert torch.equal(torch.vmap(add)(x), add(x))
        value, moved = torch.func.jvp(add, (x,), (tangent,))
        assert torch.equal(value, add(x))
        assert torch.equal(moved, tangent * 3.3)


@every_place
def test_one_operator_in_a_compiled_graph(places):
    from torch_tools import Graphs

    sines, learned = pt.SinusoidalEmbedding(scale=2.0), pt.LearnedEmbedding(9, 6)
    x = data(2, 5, 6, dtype=torch.float32)
    for module in (sines, learned):
        torch._dynamo.reset()
        graphs = Graphs()
        compiled = torch.compile(module, fullgraph=True, backend=graphs)
        with torch.no_grad():
            assert torch.equal(compiled(x, **places), module(x, **places))
        assert graphs.operators() == 1
        compiled(x, **places).sum().backward()
        got, x.grad = x.grad, None
        module(x, **places).sum().backward()
        assert torch.equal(got, x.grad)
        x.grad = None


X, TABLE = data(2, 5, 8).detach(), data(16, 8, seed=1).detach()


@pytest.mark.parametrize(
    "call",
    [
        lambda number: pt.add_sinusoidal(X, scale=number),
        lambda number: pt.add_sinusoidal(X, theta=number),
        lambda number: pt.add_sinusoidal(X, downscale_freq_shift=number / 8),
        lambda number: pt.add_learned(X, TABLE, scale=number),
    ],
    ids=["scale", "theta", "downscale_freq_shift", "of learned tables"],
)
def test_compiled_calls_take_numbers_that_vary(call, compiled):
    fast = compiled(call, "aot_eager")
    for number in (2.0, 3.0, 4.5):
        assert torch.equal(fast(number), call(number))


@pytest.mark.parametrize(
    "make",
    [
        lambda scale: pt.SinusoidalEmbedding(scale=scale),
        lambda scale: pt.LearnedEmbedding.from_table(TABLE, scale=scale),
    ],
    ids=["sines", "learned"],
)
def test_compiled_modules_differ_in_scale(make, compiled):
    for scale in (2.0, 3.0, 4.5):
        module = make(scale)
        want = module(X)
        module.compile(fullgraph=True, backend="aot_eager")
        assert torch.equal(module(X), want)
    fast = compiled(make(2.0), "aot_eager", dynamic=True)
    for n_token in (5, 3):
        assert torch.equal(fast(X[:, :n_token]), make(2.0)(X[:, :n_token]))


def test_operators_keep_the_rules_of_torch():
    x, table = data(2, 5, 6).detach(), data(9, 6, seed=1).detach()
    none = (None, None, None)
    for mask in (None, MASK):
        torch.library.opcheck(
            torch.ops.posenc.add_sinusoidal.default,
            (x, *none, mask, 2.0, 10000.0, "concat", 0.0),
        )
        torch.library.opcheck(
            torch.ops.posenc.add_learned.default, (x, table, *none, mask, 2.0)
        )


def test_out_without_gradients_only():
    x, table = data(2, 5, 6), data(9, 6, seed=1)
    out = torch.empty(2, 5, 6, dtype=torch.float64)
    with pytest.raises(TypeError, match="out must be None where gradients"):
        pt.add_learned(x, table, out=out)
    with torch.no_grad():
        assert pt.add_learned(x, table, out=out) is out
        assert torch.equal(out, pt.add_learned(x, table))
        assert pt.add_sinusoidal(x, out=out) is out
        assert torch.equal(out, pt.add_sinusoidal(x))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: pt.add_sinusoidal([1.0]), "x must be a torch.Tensor; got list"),
        (lambda: pt.add_learned(torch.ones(3), torch.ones(3, 1)), "x must have at"),
        (lambda: pt.add_learned(torch.ones(3, 1), None), "table must be a torch.T"),
        (
            lambda: pt.add_learned(torch.ones(3, 1), data(2, 1)),
            "x must lead to positions in .0, 2., the rows of table; got 2 for token 2",
        ),
        (
            lambda: pt.add_sinusoidal(torch.ones(3, 1), positions=[0] * 3, offset=1),
            "positions must not be given together with offset; got both",
        ),
        (
            lambda: pt.add_sinusoidal(torch.ones(3, 1), positions="first"),
            "positions must be a torch.Tensor or an array that torch can read; got str",
        ),
        (
            lambda: pt.add_sinusoidal(torch.ones(3, 1), scale=None),
            "scale must be a finite number; got None",
        ),
        (
            lambda: pt.add_sinusoidal(torch.ones(3, 1), theta="large"),
            "theta must be a positive number; got 'large'",
        ),
        (
            lambda: pt.add_sinusoidal(torch.ones(3, 1), downscale_freq_shift=None),
            "downscale_freq_shift must be a finite number; got None",
        ),
        (
            lambda: pt.add_sinusoidal(torch.ones(3, 1), layout="half"),
            "layout must be one of 'interleaved', .*; got 'half'",
        ),
        (
            lambda: pt.add_sinusoidal(torch.ones(3, 1), out=[1.0]),
            "out must be a torch.Tensor; got list",
        ),
        (
            lambda: pt.add_sinusoidal(data(3, 1), out=torch.ones(3, 1)),
            "out must be None where gradients are needed; got a tensor",
        ),
        (
            lambda: pt.add_learned(torch.ones(3, 1), torch.ones(3, 1), scale="2"),
            "scale must be a finite number; got '2'",
        ),
        (
            lambda: pt.add_learned(torch.ones(3, 1), torch.ones(3, 1), out=[1.0]),
            "out must be a torch.Tensor; got list",
        ),
        (lambda: pt.SinusoidalEmbedding(theta=0), "theta must be a positive number"),
        (lambda: pt.SinusoidalEmbedding(scale=True), "scale must be a finite number"),
        (
            lambda: pt.SinusoidalEmbedding(downscale_freq_shift="1"),
            "downscale_freq_shift must be a finite number; got '1'",
        ),
        (lambda: pt.SinusoidalEmbedding(layout="x"), "layout must be one of"),
        (lambda: pt.LearnedEmbedding(0, 4), "n_position must be a whole number of"),
        (lambda: pt.LearnedEmbedding(4, 0), "dim must be a whole number of at least 1"),
        (lambda: pt.LearnedEmbedding(4, 4, scale=None), "scale must be a finite"),
        (
            lambda: pt.LearnedEmbedding.from_table([[1.0]]),
            "table must be a torch.Tensor; got list",
        ),
        (
            lambda: pt.LearnedEmbedding.from_table(torch.ones(3)),
            "table must be of shape .P, dim.; got shape .3,.",
        ),
        (
            lambda: pt.LearnedEmbedding(4, 4, dtype=torch.int64),
            "LearnedEmbedding: dtype must be float16, bfloat16, .*64; got int64",
        ),
        (
            lambda: pt.LearnedEmbedding.from_table(torch.ones(3, 4).long()),
            "LearnedEmbedding: table must be float16, .*64; got dtype int64",
        ),
        (
            lambda: pt.LearnedEmbedding.from_table(torch.ones(3, 4).cfloat()),
            "LearnedEmbedding: table must be float16, .*64; got dtype complex64",
        ),
        (
            lambda: pt.LearnedEmbedding.from_table(torch.ones(3, 4), freeze="no"),
            "LearnedEmbedding: freeze must be True or False; got 'no'",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call()


def test_other_devices():
    with FakeTensorMode():
        x, slopes = (torch.empty(shape, device="cuda") for shape in ((3, 4), (3,)))
    calls = [
        lambda: pt.add_sinusoidal(x),
        lambda: pt.add_learned(x, torch.ones(3, 4)),
        lambda: pt.alibi_bias(slopes, range(3), range(3)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="must be on the CPU; got a tensor on cuda"):
            call()


META = torch.ones(3, 4, device="meta")
HERE = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda out: pt.add_sinusoidal(META, out=out),
            "add_sinusoidal: out must be on meta, as x is; got a tensor on cpu",
        ),
        (
            lambda out: pt.add_sinusoidal(HERE, out=META),
            "add_sinusoidal: out must be on the CPU, as x is; got a tensor on meta",
        ),
        (
            lambda out: pt.add_sinusoidal(HERE, positions=META[:, 0], out=out),
            "add_sinusoidal: positions must be on the CPU, as x is; got a tensor on",
        ),
        (
            lambda out: pt.add_learned(META, HERE, out=out),
            "add_learned: out must be on meta, as x is; got a tensor on cpu",
        ),
        (
            lambda out: pt.add_learned(HERE, META, out=out),
            "add_learned: table must be on the CPU, as x is; got a tensor on meta",
        ),
        (
            lambda out: pt.rope(META, HERE[:, :2], HERE[:, :2], out=out),
            "rope: out must be on meta, as x is; got a tensor on cpu",
        ),
        (
            lambda out: pt.rope(HERE, META[:, :2], META[:, :2]),
            "rope: cos must be on the CPU, as x is; got a tensor on meta",
        ),
        (
            lambda out: pt.rope_qk(META, HERE, HERE[:, :2], HERE[:, :2]),
            "rope_qk: k must be on meta, as q is; got a tensor on cpu",
        ),
        (
            lambda out: pt.cope_bias(META, META, out=out),
            "cope_bias: out must be on meta, as logits is; got a tensor on cpu",
        ),
        (
            lambda out: pt.cope_attention(HERE, HERE, HERE, META, out=out),
            "position_embedding must be on the CPU, as q is; got a tensor on meta",
        ),
        (
            lambda out: pt.alibi_bias(META[0], range(3), range(4), out=out),
            "alibi_bias: out must be on meta, as slopes is; got a tensor on cpu",
        ),
        (
            lambda out: pt.alibi_bias(META[0], range(3), range(4), add_to=out),
            "alibi_bias: slopes must be on the CPU, as add_to is; got a tensor on meta",
        ),
    ],
)
def test_nothing_is_computed_from_meta_tensors(call, text):
    out = torch.full((3, 4), 7.0)
    with pytest.raises(TypeError, match=text):
        call(out)
    assert bool((out == 7).all())


# --- modules -------------------------------------------------------------------------


def test_a_learned_module_trains_extends_and_copies():
    module = pt.LearnedEmbedding(8, 4, scale=2.0, dtype=torch.float64)
    x = data(2, 8, 4)
    module(x).square().sum().backward()
    assert module.weight.grad.abs().sum() > 0
    longer = module.extended(20)
    assert longer.weight.shape == (20, 4)
    assert torch.equal(longer(x), module(x))
    assert longer.weight.requires_grad
    again = copy.deepcopy(module)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))
    frozen = pt.LearnedEmbedding.from_table(torch.ones(3, 4), freeze=True)
    assert not frozen.weight.requires_grad
    assert not frozen.extended(9).weight.requires_grad
    assert "8, 4, scale=2.0" in repr(module)
    assert pt.LearnedEmbedding(8, 4, dtype="float16").weight.dtype == torch.float16


def test_an_extended_module_is_a_copy_with_another_table():
    class Scaled(pt.LearnedEmbedding):
        def __init__(self, table):
            super().__init__(*table.shape, scale=3.0)
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, **places):
            return self.gain * super().forward(x, **places)

    module = Scaled(torch.ones(8, 4)).eval()
    x = data(2, 8, 4, dtype=torch.float32)
    module(x).sum().backward()
    longer = module.extended(20)
    assert type(longer) is Scaled
    assert not longer.training
    assert longer.train().extended(30).training
    assert torch.equal(longer(x), module(x))
    assert longer.weight.grad is None
    assert longer.gain is not module.gain
    assert module.weight.shape == (8, 4)
    want = posenc.extend_table(module.weight.detach(), 20)
    assert torch.equal(longer.weight, want)


def test_a_sinusoidal_module_has_no_state():
    module = pt.SinusoidalEmbedding(layout="concat", downscale_freq_shift=1)
    assert not module.state_dict()
    x = torch.randn(2, 5, 6)
    want = posenc.sinusoidal(range(5), 6, layout="concat", downscale_freq_shift=1)
    assert torch.equal(module(x), x + torch.from_numpy(want))
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert "layout='concat', downscale_freq_shift=1.0" in repr(module)


@pytest.mark.parametrize("of_table", [*DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("of_x", [*DTYPES, torch.int64], ids=str)
def test_meta_tensors_give_the_dtype_that_others_give(of_x, of_table):
    x, table = torch.ones(3, 4, dtype=of_x), torch.ones(3, 4, dtype=of_table)
    expected = pt.add_learned(x, table).dtype
    assert pt.add_learned(x.to("meta"), table.to("meta")).dtype == expected


@pytest.mark.parametrize("name", ["SinusoidalEmbedding", "LearnedEmbedding"])
def test_modules_are_pickled_and_made_on_meta(name):
    arguments = (9, 6) if name == "LearnedEmbedding" else ()
    module, x = getattr(pt, name)(*arguments, scale=2.0), torch.randn(2, 5, 6)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again.eval()(x), module.train()(x))
    with torch.device("meta"):
        module = getattr(pt, name)(*arguments)
    result = module(x.to("meta"))
    assert result.is_meta
    assert result.shape == x.shape
    module.to_empty(device="cpu").load_state_dict(again.state_dict())
    module.scale = 2.0
    assert torch.equal(module(x), again(x))


@pytest.mark.parametrize(
    "module",
    [pt.SinusoidalEmbedding(), pt.LearnedEmbedding(64, 5)],
    ids=["sines", "learned"],
)
def test_modules_refuse_token_ids(module):
    says = f"{type(module).__name__}: x must hold embeddings, not token ids; got dtype"
    with pytest.raises(TypeError, match=says + " int64"):
        module(torch.zeros(2, 5, dtype=torch.int64))
