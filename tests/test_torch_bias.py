"""posenc.torch: relative biases with gradients, in compiled graphs, and as modules."""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import reference  # noqa: E402
from ml_dtypes import bfloat16  # noqa: E402
from test_bias import MLP  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch_tools import Graphs  # noqa: E402

import posenc  # noqa: E402
from posenc import _tensors  # noqa: E402
from posenc.torch import (  # noqa: E402
    ALiBi,
    T5Bias,
    alibi_bias,
    fire_bias,
    kerple_bias,
    t5_bias,
)

# Compilers of torch call it themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("on_one_thread"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Gradients that torch sums in float32, in other order: of about a thousand terms.
SUM_TOLERANCE = 1e-5
# Logarithms and powers of float64, by torch and by NumPy, and a few sums of them.
FLOAT64_TOLERANCE = 1e-14
# Sums in float64 of up to some thousand terms, in the order of another program.
ORDER_TOLERANCE = 1e-12
# Of float32: a sum in float64 that is rounded to it, and may lie beside a middle.
ROUNDED_ONCE = 2.0**-23

# (queries, keys): all, a few of a cache, the last, in any order, batches of them.
PLACES = {
    "square": (range(9), range(9)),
    "cache": (range(20, 25), range(25)),
    "last": ([30], range(31)),
    "shuffled": (
        torch.tensor([4, 1, 3]),
        torch.tensor([7, 2, 11, 0, 5, 9, 1, 10, 4, 8, 3, 6]),
    ),
    "batches": (torch.tensor([[4, 5], [1, 2]]), torch.arange(7)),
    "nothing": (range(3), range(0)),
}
every_place = pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)


def parameters(family, dtype=torch.float64):
    """Return the learned numbers of a family, and the function of them."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*values):
        return torch.tensor(values, dtype=dtype).requires_grad_()

    if family == "t5":
        weight = torch.randn(32, 3, generator=generator, dtype=torch.float64)
        return [weight.to(dtype).requires_grad_()], t5_bias
    slopes, r2 = leaf(0.5, 0.1, 2.0), leaf(1.0, 0.3, 1.7)
    if family in ("alibi", "symmetric"):
        options = {"symmetric": family == "symmetric"}
        return [slopes], lambda s, q, k, **o: alibi_bias(s, q, k, **options, **o)
    if family in ("log", "power"):
        return [slopes, r2], lambda a, b, q, k, **o: kerple_bias(
            a, b, q, k, kernel=family, **o
        )
    flat = [torch.tensor(part, dtype=dtype).requires_grad_() for p in MLP for part in p]
    numbers = leaf(0.3).squeeze(), leaf(5.5).squeeze()

    def function(*given, **options):
        *layers, c, threshold, q, k = given
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        return fire_bias(pairs, q, k, c=c, threshold=threshold, **options)

    return [*flat, *(t.detach().requires_grad_() for t in numbers)], function


# Those whose values torch and NumPy compute alike: the others take logarithms.
SAME_BITS = ("t5", "alibi", "symmetric")
FAMILIES = ("t5", "alibi", "symmetric", "log", "power", "fire")
every_family = pytest.mark.parametrize("family", FAMILIES)


def oracle(family, given, q, k):
    """Each element by itself, in torch: what autograd makes of the formula."""
    q, k = torch.as_tensor(q), torch.as_tensor(k)
    offset = k[..., None, :] - q[..., :, None]
    distance = offset.abs().double()
    if family == "t5":
        bucket = posenc.t5_bucket(offset.long())
        return torch.nn.functional.embedding(bucket, given[0]).movedim(-1, -3)
    if family == "fire":
        *flat, c, threshold = given
        limit = torch.maximum(q.double(), threshold.abs())[..., :, None]
        x = torch.log((c * distance).abs() + 1)
        x = (x / (torch.log((c * limit).abs() + 1) + 1e-6))[..., None]
        for i, (weight, shift) in enumerate(zip(flat[::2], flat[1::2], strict=True)):
            x = torch.nn.functional.linear(torch.relu(x) if i else x, weight, shift)
        return x.movedim(-1, -3)
    a, b = (t[:, None, None] for t in (given[0], given[-1]))
    if family in ("alibi", "symmetric"):
        return a * (-distance if family == "symmetric" else offset)[..., None, :, :]
    distance = distance[..., None, :, :]
    return -a * (torch.log(1 + b * distance) if family == "log" else distance**b)


# --- values and gradients ------------------------------------------------------------


@every_family
@every_place
def test_gradients_are_those_of_the_formula(family, places):
    given, function = parameters(family)
    got, want = function(*given, *places), oracle(family, given, *places)
    assert got.shape == want.shape
    assert torch.allclose(got, want, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)
    weight = torch.randn(got.shape, dtype=torch.float64)
    ours = torch.autograd.grad(got, given, weight)
    theirs = torch.autograd.grad(want, given, weight)
    for own, other in zip(ours, theirs, strict=True):
        size = float(1 + other.abs().max())
        assert torch.allclose(own, other, rtol=0, atol=ORDER_TOLERANCE * size)


@every_family
@every_place
def test_finite_differences(family, places):
    given, function = parameters(family)
    assert gradcheck(lambda *numbers: function(*numbers, *places), given)


@pytest.mark.parametrize("family", ["t5", "alibi", "log", "power"])
def test_second_differences(family):
    given, function = parameters(family)
    assert gradgradcheck(lambda *n: function(*n, range(2, 5), range(6)).square(), given)


@every_family
@every_place
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_those_of_the_plain_function(family, places, dtype):
    """With gradients or without: the same bits, but where float64 itself is meant."""
    given, function = parameters(family, dtype)
    with torch.no_grad():
        want = function(*given, *places)
    got = function(*given, *places)
    assert got.requires_grad
    assert not want.requires_grad
    assert got.dtype == want.dtype == dtype
    if family in SAME_BITS:
        assert torch.equal(got, want)
    else:
        eps = torch.finfo(dtype).eps  # a last bit of float64 may move a rounding
        assert torch.allclose(got, want, rtol=eps, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_gradients_of_t5_are_those_of_transformers(is_decoder):
    """Theirs in float64: in float32 theirs lose the last digits of long sums."""
    models = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = pytest.importorskip("transformers").T5Config(
        num_heads=6, is_decoder=is_decoder
    )
    theirs = models.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    embedding = theirs.relative_attention_bias
    torch.nn.init.normal_(embedding.weight)
    ours = T5Bias(6, bidirectional=not is_decoder)
    ours.load_state_dict(embedding.state_dict())
    got = ours(300, 500)
    theirs.double()
    want = theirs.compute_bias(300, 500, past_seen_tokens=200)[0]
    assert torch.equal(got.double(), want)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    got, want = ours.weight.grad.double(), embedding.weight.grad
    atol = ORDER_TOLERANCE * float(want.abs().max())
    assert torch.allclose(got, want, rtol=ROUNDED_ONCE, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_gradients_for_any_number_of_threads(dtype):
    grads = []
    try:
        for n in (1, 2, 3, 4):
            posenc.set_num_threads(n)
            torch.set_num_threads(n)
            (weight,), _ = parameters("t5", dtype)
            torch.manual_seed(1)
            bias = t5_bias(weight, range(500), range(600))
            bias.backward(torch.randn(bias.shape).to(dtype))
            grads.append(weight.grad)
    finally:
        posenc.set_num_threads(None)
        torch.set_num_threads(1)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    assert grads[0].dtype == dtype


@every_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_added_to(family, dtype):
    real = torch.promote_types(torch.float32, dtype)
    given, function = parameters(family, real)
    torch.manual_seed(2)
    leaf = torch.randn(2, 3, 5, 9, dtype=dtype, requires_grad=True)
    logits = leaf * 1
    result = function(*given, range(4, 9), range(9), add_to=logits)
    assert result is logits
    with torch.no_grad():
        bias = function(*given, range(4, 9), range(9))
        want = (leaf + bias).to(dtype)
        plain = leaf * 1
        assert function(*given, range(4, 9), range(9), add_to=plain) is plain
        assert torch.equal(plain, want)
        if family in SAME_BITS:
            assert torch.equal(result, want)
        else:  # a last bit of float64 may move a rounding, of sums of up to 16
            eps = 16 * torch.finfo(dtype).eps
            assert torch.allclose(result, want, rtol=0, atol=eps)
        out = torch.zeros_like(plain)
        more = {"add_to": leaf.detach(), "out": out}
        assert function(*given, range(4, 9), range(9), **more) is out
        assert torch.equal(out, plain)
    grad = torch.randn_like(result)
    grads = torch.autograd.grad(result, [leaf, *given], grad)
    assert torch.equal(grads[0], grad)
    again = function(*given, range(4, 9), range(9))
    wanted = torch.autograd.grad(again, given, grad.to(real).sum(0))
    for got, other in zip(grads[1:], wanted, strict=True):
        size = float(1 + other.abs().max())
        assert torch.allclose(got, other, rtol=0, atol=SUM_TOLERANCE * size)


def test_transforms_of_torch_func():
    (slopes,), _ = parameters("alibi")
    slopes = slopes.detach()

    def loss(slopes):
        return alibi_bias(slopes, range(3), range(5)).square().sum()

    squares = posenc.alibi_bias([1.0], range(3), range(5)) ** 2
    want = 2 * slopes * squares.sum()
    close = {"rtol": ORDER_TOLERANCE, "atol": 0}
    assert torch.allclose(torch.func.grad(loss)(slopes), want, **close)
    _, tangent = torch.func.jvp(loss, (slopes,), (torch.ones_like(slopes),))
    assert torch.allclose(tangent, want.sum(), **close)
    batch = torch.stack([slopes, 2 * slopes])
    got = torch.func.vmap(torch.func.grad(loss))(batch)
    assert torch.allclose(got, torch.stack([want, 2 * want]), **close)
    hessian = torch.func.hessian(loss)(slopes)
    want = torch.eye(3, dtype=torch.float64) * 2 * squares.sum()
    assert torch.allclose(hessian, want, **close)


# --- compiled ------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_results_and_gradients(family, backend, compiled):
    given, function = parameters(family)
    q, k = torch.tensor([4, 1, 3]), torch.arange(9)
    for places in ((range(4, 9), range(9)), (q, k)):
        fast = compiled(lambda *n, p=places: function(*n, *p), backend)
        got, want = fast(*given), function(*given, *places)
        if family in SAME_BITS:
            assert torch.equal(got, want)
        assert torch.allclose(got, want, rtol=ORDER_TOLERANCE, atol=ORDER_TOLERANCE)
        ours = torch.autograd.grad(got.square().sum(), given)
        theirs = torch.autograd.grad(want.square().sum(), given)
        for own, other in zip(ours, theirs, strict=True):
            assert torch.allclose(
                own, other, rtol=ORDER_TOLERANCE, atol=ORDER_TOLERANCE
            )


def test_compiled_modules_of_any_length_hold_one_operator_each(compiled):
    graphs = Graphs()
    t5, alibi = T5Bias(3), ALiBi(3)

    def biases(logits):
        n_query, n_key = logits.shape[-2:]
        logits = alibi(n_query, n_key, add_to=logits)
        return t5(n_query, n_key) + logits

    step = compiled(biases, graphs, dynamic=True)
    for n_query, n_key in ((5, 9), (4, 12), (2, 7)):
        logits = torch.randn(2, 3, n_query, n_key)
        want = biases(logits.clone())
        assert torch.equal(step(logits), want)
    assert len(graphs) == 1
    trained = compiled(biases, "inductor", dynamic=True)
    for n_query, n_key in ((5, 9), (4, 12)):
        t5.weight.grad = None
        trained(torch.zeros(3, n_query, n_key)).sum().backward()
        got, t5.weight.grad = t5.weight.grad, None
        t5(n_query, n_key).sum().backward()
        assert torch.equal(got, t5.weight.grad)


class OfShape(torch.nn.Module):
    """The bias between as many queries and keys as an array has rows and columns."""

    def __init__(self, bias):
        super().__init__()
        self.bias = bias

    def forward(self, x):
        return self.bias(*x.shape)


def of_tensors(n_query, n_key):
    slopes = torch.tensor([0.5, 0.25])
    return alibi_bias(slopes, torch.arange(n_query), torch.arange(n_key))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [T5Bias, ALiBi, lambda _: of_tensors])
def test_exported_programs_serve_any_length(make, strict):
    bias = make(3)
    sizes = {i: torch.export.Dim(name, max=64) for i, name in enumerate("TS")}
    program = torch.export.export(
        OfShape(bias), (torch.zeros(4, 9),), dynamic_shapes=(sizes,), strict=strict
    )
    for n_query, n_key in ((4, 9), (9, 9), (2, 30), (64, 64)):
        got = program.module()(torch.zeros(n_query, n_key))
        assert torch.equal(got, bias(n_query, n_key))


def test_compiled_numbers_of_fire_vary(compiled):
    given, function = parameters("fire")
    given = [t.detach() for t in given]
    places = torch.arange(5), torch.arange(9)
    fast = compiled(lambda eps: function(*given, *places, eps=eps), "aot_eager")
    for eps in (1e-6, 2e-6, 0.5):
        want = function(*given, *places, eps=eps)
        assert torch.allclose(fast(eps), want, rtol=ORDER_TOLERANCE, atol=0)


@pytest.mark.parametrize("operator", ["bias_spread", "bias_collect", "t5_bucket"])
def test_operators_pass_opcheck(operator):
    arguments = {
        "bias_spread": (torch.randn(2, 3, 12, dtype=torch.float64), 4, torch.bfloat16),
        "bias_collect": (torch.randn(2, 3, 4, 9),),
        "t5_bucket": (torch.arange(-9, 9), 32, 128, True),
    }[operator]
    torch.library.opcheck(getattr(torch.ops.posenc, operator).default, arguments)


def test_buckets_of_offsets_in_any_memory_pass_opcheck():
    offsets = torch.arange(24).reshape(2, 3, 4).transpose(0, 2)
    torch.library.opcheck(torch.ops.posenc.t5_bucket.default, (offsets, 32, 128, True))


@pytest.mark.parametrize("places", [torch.arange(3), range(3)], ids=["tensors", "no"])
def test_a_bias_is_a_tensor_if_positions_are(places):
    is_tensor = isinstance(places, torch.Tensor)
    for bias in (
        posenc.alibi_bias(posenc.alibi_slopes(2), places, range(3)),
        posenc.t5_bias(np.ones((32, 2)), range(3), places),
        posenc.kerple_bias([1.0], [1.0], places, places),
        posenc.sandwich_bias(2, 4, places, places),
    ):
        assert isinstance(bias, torch.Tensor) == is_tensor


def test_meta_tensors_give_meta_tensors():
    with torch.device("meta"):
        module = T5Bias(8)
        assert module.weight.is_meta
    for family in FAMILIES:
        given, function = parameters(family)
        given = [t.detach().to("meta") for t in given]
        some, all_keys = torch.tensor([4, 1]), torch.arange(9)
        for places in (
            (range(5), range(9)),
            (some, all_keys),
            (some.to("meta"), all_keys.to("meta")),
            (some, all_keys.to("meta")),
        ):
            bias = function(*given, *places)
            assert bias.is_meta
            assert bias.shape == (3, len(places[0]), 9)


@every_family
def test_positions_on_meta_want_learned_numbers_there(family):
    given, function = parameters(family)
    places = torch.arange(3, device="meta")
    for q, k, name in ((places, places, "q"), (torch.arange(3), places, "k")):
        with pytest.raises(TypeError, match=f"{name}_positions must be on the CPU, as"):
            function(*given, q, k)


@every_family
def test_no_positions_are_whole_whatever_their_type(family):
    given, function = parameters(family)
    assert function(*given, [1], []).shape == (3, 1, 0)


# --- modules -------------------------------------------------------------------------


def test_modules_give_the_last_rows_with_a_cache():
    for module in (T5Bias(5), T5Bias(5, bidirectional=False), ALiBi(5), ALiBi(6)):
        whole = module(40)
        assert whole.shape[-2:] == (40, 40)
        for n in (1, 3, 40):
            assert torch.equal(module(n, 40), whole[:, 40 - n :])
            logits = torch.zeros(2, *whole.shape)[:, :, 40 - n :]
            with torch.no_grad():
                assert module(n, 40, add_to=logits) is logits
            assert torch.equal(logits[1], whole[:, 40 - n :])


def test_module_state():
    t5, alibi = T5Bias(4, num_buckets=16), ALiBi(4)
    assert list(t5.state_dict()) == ["weight"]
    assert t5.weight.shape == (16, 4)
    assert list(alibi.state_dict()) == []
    assert repr(t5) == (
        "T5Bias(4, num_buckets=16, max_distance=128, bidirectional=True)"
    )
    assert repr(alibi) == "ALiBi(4, symmetric=False)"
    assert T5Bias(4, dtype=torch.bfloat16)(3).dtype == torch.bfloat16
    alibi = copy.deepcopy(alibi).bfloat16()
    reference.same_bits(alibi.slopes.numpy(), posenc.alibi_slopes(4))
    assert alibi(3).dtype == torch.float32
    assert alibi(3, dtype=torch.float16).dtype == torch.float16
    for dtype in (np.float64, "float64", np.dtype("f8"), torch.float64):
        assert alibi(3, dtype=dtype).dtype == torch.float64
        assert T5Bias(4, dtype=dtype).weight.dtype == torch.float64
    assert alibi(3, dtype=bfloat16).dtype == torch.bfloat16
    symmetric = ALiBi(4, symmetric=True)(5, dtype=torch.float64)
    want = posenc.alibi_bias(posenc.alibi_slopes(4), range(5), range(5), symmetric=True)
    reference.same_bits(symmetric.numpy(), want)


@pytest.mark.parametrize("make", [T5Bias, ALiBi])
def test_modules_are_pickled_and_made_on_meta(make):
    module = make(5)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again.eval()(4, 7), module.train()(4, 7))
    with torch.device("meta"):
        module = make(5)
    assert module(4, 7).shape == (5, 4, 7)
    module.to_empty(device="cpu").load_state_dict(again.state_dict())
    assert torch.equal(module(4, 7), again(4, 7))


def test_t5_bias_can_be_learned():
    """A head that prefers the key before the query."""
    torch.manual_seed(0)
    module = T5Bias(1, bidirectional=False)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    values = torch.randn(64, 32, 1)
    for _ in range(60):
        hidden = torch.ones(32, 32, dtype=torch.bool).triu(1)
        weights = module(32).masked_fill(hidden, -torch.inf).softmax(-1)
        loss = ((weights @ values)[:, 1:] - values[:, :-1]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2
    assert int(module.weight[:, 0].argmax()) == 1


# --- bad input -----------------------------------------------------------------------

WEIGHT = torch.zeros(32, 3, requires_grad=True)
LOGITS = torch.zeros(3, 5, 9)
LAYER = WEIGHT[:3, :1], WEIGHT[:3, 0]
ERRORS = [
    (
        lambda: t5_bias(WEIGHT, range(5), [[0.5]]),
        TypeError,
        "k_positions must be whole",
    ),
    (
        lambda: t5_bias(WEIGHT, 5, range(5)),
        ValueError,
        "q_positions must have at least",
    ),
    (
        lambda: t5_bias(WEIGHT, [2**60], [0]),
        ValueError,
        "q_positions must hold whole numbers of magnitude at most 2**53; got "
        "1152921504606846976",
    ),
    (
        lambda: t5_bias(WEIGHT, range(5), range(-(2**53) - 1, 0)),
        ValueError,
        "k_positions must hold whole numbers of magnitude at most 2**53; got "
        "9007199254740993",
    ),
    (
        lambda: alibi_bias(WEIGHT[0], [0, 5], [2**53 + 1]),
        ValueError,
        "k_positions must hold whole numbers of magnitude at most 2**53; got "
        "9007199254740993",
    ),
    (
        lambda: alibi_bias(WEIGHT[0], torch.tensor([True, False]), range(9)),
        TypeError,
        "alibi_bias: q_positions must hold real numbers that float64 can hold; got "
        "dtype bool",
    ),
    (
        lambda: kerple_bias(WEIGHT[0].exp(), WEIGHT[0].exp(), range(2), [True, False]),
        TypeError,
        "kerple_bias: k_positions must hold real numbers that float64 can hold; got "
        "dtype bool",
    ),
    (
        lambda: fire_bias([LAYER], range(2), np.array([1j])),
        TypeError,
        "fire_bias: k_positions must hold real numbers that float64 can hold; got "
        "dtype complex128",
    ),
    (lambda: t5_bias(WEIGHT[0], range(5), range(9)), ValueError, "weight must be of"),
    (lambda: t5_bias(WEIGHT[:2], range(5), range(9)), ValueError, "weight must hold"),
    (
        lambda: t5_bias(WEIGHT, range(5), range(9), max_distance=3),
        ValueError,
        "max_distance must be above 8",
    ),
    (
        lambda: t5_bias(WEIGHT, range(5), range(9), out=LOGITS),
        TypeError,
        "out must be None where gradients are needed",
    ),
    (
        lambda: t5_bias(WEIGHT, range(5), range(9), add_to=LOGITS.long()),
        TypeError,
        "add_to must be float16, bfloat16, float32 or float64; got dtype int64",
    ),
    (
        lambda: t5_bias(WEIGHT, range(5), range(8), add_to=LOGITS.clone()),
        ValueError,
        "add_to must be of shape (..., H, T, S) = (..., 3, 5, 8); got shape (3, 5, 9)",
    ),
    (
        lambda: t5_bias(WEIGHT, range(5), range(9), add_to=[1.0]),
        TypeError,
        "add_to must be a torch.Tensor; got list",
    ),
    (
        lambda: t5_bias(WEIGHT, torch.ones(2, 5).long(), torch.ones(3, 9).long()),
        ValueError,
        "k_positions must have leading axes that broadcast",
    ),
    (
        lambda: kerple_bias(-WEIGHT[:3, 0].exp(), WEIGHT[:3, 0], [1], [1]),
        ValueError,
        "r1 must hold finite numbers above 0; got -1.0",
    ),
    (
        lambda: kerple_bias(LAYER[0], LAYER[1], [1], [1]),
        ValueError,
        "r1 must be of shape (H,) and not empty; got shape (3, 1)",
    ),
    (
        lambda: kerple_bias(WEIGHT[:3, 0], WEIGHT[:2, 0], [1], [1]),
        ValueError,
        "r2 must be of shape (3,) and not empty; got shape (2,)",
    ),
    (
        lambda: kerple_bias(WEIGHT[0].exp(), WEIGHT[0].exp(), [1], [1], kernel="exp"),
        ValueError,
        "kernel must be one of 'log', 'power'; got 'exp'",
    ),
    (
        lambda: alibi_bias(WEIGHT, range(5), range(9)),
        ValueError,
        "slopes must be of shape (H,) and not empty; got shape (32, 3)",
    ),
    (
        lambda: alibi_bias(WEIGHT[0].cfloat(), range(5), range(9)),
        TypeError,
        "slopes must be float16, bfloat16, float32 or float64; got dtype complex64",
    ),
    (
        lambda: alibi_bias(WEIGHT[0], range(5), range(9), symmetric=1),
        TypeError,
        "symmetric must be True or False; got 1",
    ),
    (
        lambda: t5_bias(WEIGHT[:, :0], range(5), range(9)),
        ValueError,
        "weight must be of shape (num_buckets, H) and not empty; got shape (32, 0)",
    ),
    (
        lambda: t5_bias("weight", range(5), range(9)),
        TypeError,
        "weight must be a torch.Tensor or an array that torch can read; got str",
    ),
    (
        lambda: t5_bias(WEIGHT.to_sparse(), range(5), range(9)),
        TypeError,
        "weight must be a dense tensor; got one of layout torch.sparse_coo",
    ),
    (
        lambda: t5_bias(WEIGHT, range(5), torch.arange(9).to_sparse()),
        TypeError,
        "k_positions must be a dense tensor; got one of layout torch.sparse_coo",
    ),
    (
        lambda: t5_bias(WEIGHT, "first", range(9)),
        TypeError,
        "q_positions must be a torch.Tensor or an array that torch can read; got str",
    ),
    (
        lambda: fire_bias(None, range(5), range(9)),
        TypeError,
        "mlp must be a list of pairs of weight and bias; got NoneType",
    ),
    (
        lambda: fire_bias([(WEIGHT,)], range(5), range(9)),
        TypeError,
        "mlp[0] must be a pair of weight and bias; got tuple",
    ),
    (
        lambda: fire_bias([LAYER, LAYER], range(5), range(9)),
        ValueError,
        "mlp[1][0] must be of shape (n_out, 3) and not empty; got shape (3, 1)",
    ),
    (
        lambda: fire_bias([(LAYER[0], WEIGHT[0, :2])], range(5), range(9)),
        ValueError,
        "mlp[0][1] must be of shape (3,) and not empty; got shape (2,)",
    ),
    (
        lambda: fire_bias([LAYER], range(5), range(9), c=LAYER[1]),
        ValueError,
        "c must be of shape (); got shape (3,)",
    ),
    (
        lambda: fire_bias([LAYER], range(5), range(9), threshold=torch.inf),
        ValueError,
        "threshold must be a finite number; got inf",
    ),
    (
        lambda: fire_bias([LAYER], range(5), range(9), eps=None),
        TypeError,
        "eps must be a finite number; got None",
    ),
    (lambda: T5Bias(0), ValueError, "n_head must be a whole number"),
    (lambda: ALiBi(0), ValueError, "n_head must be a whole number of at least 1"),
    (lambda: T5Bias(4, num_buckets=3), ValueError, "num_buckets must be a whole"),
    (lambda: T5Bias(4)(3, 2), ValueError, "n_key must be a whole number of at least 3"),
    (lambda: ALiBi(4)(2.0), TypeError, "n_query must be a whole number"),
    (lambda: ALiBi(4, symmetric=1), TypeError, "symmetric must be True or False"),
    (
        lambda: ALiBi(4)(3, dtype=torch.int32),
        TypeError,
        "ALiBi: dtype must be float16, bfloat16, float32 or float64; got int32",
    ),
    (lambda: ALiBi(4)(3, dtype="c8"), TypeError, "float64; got complex64"),
    (lambda: ALiBi(4)(3, dtype="wide"), TypeError, "float64; got 'wide'"),
    (lambda: ALiBi(4)(3, dtype=None), TypeError, "float64; got None"),
    (
        lambda: ALiBi(4)(3, dtype=int, add_to=torch.zeros(4, 3, 3)),
        TypeError,
        "ALiBi: dtype must be float16, bfloat16, float32 or float64; got int64",
    ),
    (
        lambda: T5Bias(4, dtype=torch.complex64),
        TypeError,
        "T5Bias: dtype must be float16, bfloat16, float32 or float64; got complex64",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_numbers_of_numpy_are_taken():
    slopes = posenc.alibi_slopes(3)
    got = alibi_bias(slopes, np.arange(3), range(5))
    want = posenc.alibi_bias(slopes, range(3), range(5))
    reference.same_bits(got.numpy(), want)


@pytest.mark.parametrize(
    ("shape", "n_made"), [((1 << 20,), 2), ((2, 1 << 19), 2), ((1 << 19,), 1)]
)
def test_large_results_lie_in_memory_of_numpy(shape, n_made, monkeypatch):
    """In the very array that NumPy has made: it asks for huge pages, torch does not.

    Small ones do if their memory order is not that of another tensor.
    """
    made, numpy_empty = [], np.empty

    def empty(*arguments):
        made.append(numpy_empty(*arguments))
        return made[-1]

    like = torch.zeros(shape)
    monkeypatch.setattr(np, "empty", empty)
    results = [
        _tensors.empty(shape, np.dtype(np.float32)),
        _tensors.empty_like(like, np.dtype(np.float32)),
    ]
    monkeypatch.undo()
    assert len(made) == n_made
    for memory, result in zip(made, results, strict=False):
        assert result.data_ptr() == memory.ctypes.data
        assert result.nbytes == memory.nbytes
    assert all(result.shape == shape for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_results_are_tensors_like_others(dtype):
    """They lie in memory of NumPy: of their own, not views, free to be written."""
    weight = torch.randn(32, 2).to(dtype).requires_grad_()
    places = range(1100)
    bias = posenc.torch.t5_bias(weight, places, places)
    plain = posenc.t5_bias(weight.detach(), places, places)
    assert plain.nbytes >= _tensors._MIN_HUGE_SIZE
    assert torch.equal(bias, plain)
    assert all(t.is_contiguous() and not t._is_view() for t in (bias, plain))
    assert plain.untyped_storage().nbytes() == plain.nbytes
    bias.mul_(0).sum().backward()
    assert weight.grad.count_nonzero() == 0
