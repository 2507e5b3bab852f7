"""posenc.torch: CoPE with gradients, in compiled graphs, and as modules.

The oracle is the paper's listing in float64 (cope_listing.py), by torch's autograd.
"""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cope_listing import attention as by_listing  # noqa: E402
from cope_listing import listing, visible  # noqa: E402
from test_cope_attention import (  # noqa: E402
    EMPTY,
    MASKS,
    SIZES,
    VARIANTS,
    masks,
    operands,
)
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd import gradcheck  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch_tools import Graphs  # noqa: E402

import posenc  # noqa: E402
from posenc.torch import (  # noqa: E402
    CoPE,
    CoPEAttention,
    KVCache,
    cope_attention,
    cope_bias,
)

# Compilers of torch call it themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("on_one_thread"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("q", "k", "v", "position_embedding", "gate_key")
# Of sums of up to 300 products, of the size of the largest gradient.
FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-4
# Results of 16 bits are rounded on the way and once more as gradients.
TOLERANCE_16_BIT = {torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
# With two positions nearly all keys share one, so that positions cost the listing next
# to nothing, and both errors are those of plain attention. There the listing takes
# p . dP from the numbers it is then subtracted from, we from the rounded result.
FEW_POSITIONS = 1.5
# A token's queries in a batch of other size: products in other order.
MODULE_TOLERANCE = 1e-5
N_THREAD = (1, 2, 3, 4)
SCALARS = (None, 1.0, True)


def random(*shape, dtype=torch.float64, grad=False, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values.requires_grad_(grad)


def tensors(size, dtype=torch.float64, grad=True, **forms):
    """Operands by name; q, k, v in the memory order of projections."""
    given = zip(NAMES, operands(SIZES.get(size, size), **forms), strict=True)
    return {
        name: torch.from_numpy(x).to(dtype).requires_grad_(grad)
        for name, x in given
        if x is not None
    }


def steps(x):
    """Return the strides that lead anywhere."""
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def as_tensor(mask):
    return torch.from_numpy(np.array(mask))


def gradients(function, given, **options):
    """Result and gradients by name, for the same random gradient of the result."""
    out = function(**given, **options)
    grad = random(*out.shape[-2:], seed=7, dtype=out.dtype).to(out.device)
    grad = grad.expand(out.shape)
    return out, dict(
        zip(given, torch.autograd.grad(out, list(given.values()), grad), strict=True)
    )


def largest_difference(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0


def assert_near(ours, theirs, tolerance):
    """Compare gradients by name, each by its largest element."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        size = max(theirs[name].abs().max().item(), 1) if gradient.numel() else 1
        assert largest_difference(gradient, theirs[name]) < tolerance * size, name


# --- attention: gradients ------------------------------------------------------------


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_the_listing(size, masked):
    options = masks(SIZES[size])[masked]
    if "mask" in options:
        options["mask"] = as_tensor(options["mask"])
    given = tensors(size)
    _, theirs = gradients(by_listing, given, **options)
    _, ours = gradients(cope_attention, given, **options)
    assert_near(ours, theirs, FLOAT64_TOLERANCE)
    narrow = {name: x.detach().float().requires_grad_() for name, x in given.items()}
    _, ours = gradients(cope_attention, narrow, **options)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert_near(ours, theirs, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("size", ["square", "cache", "20 channels", "far"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_gradients_of_variants(variant, size):
    options = dict(variant)
    forms = {name: options.pop(name, False) for name in ("per_head", "gate_key")}
    given = tensors(size, **forms)
    for causal in (True, False):
        _, theirs = gradients(by_listing, given, causal=causal, **options)
        _, ours = gradients(cope_attention, given, causal=causal, **options)
        assert_near(ours, theirs, FLOAT64_TOLERANCE)


@pytest.mark.parametrize("masked", ["causal", "padding on the left, all", "some"])
@pytest.mark.parametrize("gate_key", [False, True])
def test_finite_differences(masked, gate_key):
    size = 2, 4, 2, 3, 4, 3, 3
    given = tensors(size, gate_key=gate_key, per_head=gate_key)
    options = masks(size)[masked]
    if "mask" in options:
        options["mask"] = as_tensor(options["mask"])

    def attend(*values):
        named = dict(zip(given, values, strict=True))
        return cope_attention(**named, position_scale=0.7, **options)

    assert gradcheck(attend, tuple(given.values()), check_batched_grad=True)


@pytest.mark.parametrize("n_position", [2, 8, 64, 500])
def test_float32_gradients_are_no_worse_than_the_listings(n_position, measured):
    size, squares = (1, 2, 2, 300, 300, 64, n_position), {}
    for seed in range(4):
        given = tensors(size, torch.float32, seed=10 * seed)
        wide = {n: x.detach().double().requires_grad_() for n, x in given.items()}
        grad = random(1, 2, 300, 64, dtype=torch.float32, seed=seed)
        exact, listed, ours = (
            torch.autograd.grad(f(**x), list(x.values()), grad.to(x["q"].dtype))
            for f, x in (
                (by_listing, wide),
                (by_listing, given),
                (cope_attention, given),
            )
        )
        for name, true, *found in zip(given, exact, listed, ours, strict=True):
            errors = [(x - true).square().mean() for x in found]
            squares.setdefault(name, []).append(torch.stack(errors))
    slack = FEW_POSITIONS if n_position == 2 else 1
    for name, each in squares.items():
        theirs, ours = torch.stack(each).mean(0).sqrt().tolist()
        measured(
            f"cope_attention float32 gradient of {name}, P = {n_position}: "
            f"error {ours:.1e}, listing {theirs:.1e}"
        )
        assert ours <= slack * theirs, name


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("size", ["grouped", "64 channels"])
def test_16_bit_gradients_have_the_types_of_their_tensors(size, dtype):
    given = tensors(size, dtype, gate_key=True)
    wide = {n: x.detach().double().requires_grad_() for n, x in given.items()}
    out, ours = gradients(cope_attention, given)
    _, theirs = gradients(by_listing, wide)
    assert out.dtype == dtype
    assert all(gradient.dtype == dtype for gradient in ours.values())
    assert_near(ours, theirs, TOLERANCE_16_BIT[dtype])


def test_16_bit_data_with_a_float32_embedding():
    given = tensors("grouped", torch.bfloat16)
    wide = {n: x.detach().float().requires_grad_() for n, x in given.items()}
    given["position_embedding"] = wide["position_embedding"]
    out, ours = gradients(cope_attention, given)
    expected, theirs = gradients(cope_attention, wide)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    assert [ours[name].dtype for name in given] == 3 * [torch.bfloat16] + [
        torch.float32
    ]
    assert_near(ours, theirs, TOLERANCE_16_BIT[torch.bfloat16])


def test_gradients_are_summed_where_operands_are_broadcast():
    given = {
        "q": random(3, 1, 4, 5, 8, grad=True),
        "k": random(2, 2, 6, 8, grad=True),
        "v": random(3, 1, 2, 6, 8, grad=True),
        "position_embedding": random(1, 8, 3, grad=True),
    }
    full = {
        "q": given["q"].expand(3, 2, 4, 5, 8),
        "k": given["k"].expand(3, 2, 2, 6, 8),
        "v": given["v"].expand(3, 2, 2, 6, 8),
        "position_embedding": given["position_embedding"][0],
    }
    grad = random(3, 2, 4, 5, 8)
    inputs = list(given.values())
    ours = torch.autograd.grad(cope_attention(**given), inputs, grad)
    theirs = torch.autograd.grad(by_listing(**full), inputs, grad)
    ours, theirs = (dict(zip(given, x, strict=True)) for x in (ours, theirs))
    assert_near(ours, theirs, FLOAT64_TOLERANCE)


def test_gradients_without_a_head_axis():
    given = tensors("64 channels")
    heads = {n: x[0, :1] if x.ndim == 4 else x for n, x in given.items()}
    flat = {n: x[0, 0] if x.ndim == 4 else x for n, x in given.items()}
    for options in (
        {},
        {"mask": as_tensor(masks(SIZES["64 channels"])["few, causal"]["mask"])},
    ):
        _, theirs = gradients(by_listing, heads, **options)
        out, ours = gradients(cope_attention, flat, **options)
        assert out.shape == (65, 64)
        ours = {n: x[None] if n in "qkv" else x for n, x in ours.items()}
        assert_near(ours, theirs, FLOAT64_TOLERANCE)


@pytest.mark.parametrize("size", EMPTY.values(), ids=EMPTY)
def test_gradients_of_nothing(size):
    given = tensors(size, gate_key=True)
    _, ours = gradients(cope_attention, given)
    assert {n: x.shape for n, x in ours.items()} == {
        n: x.shape for n, x in given.items()
    }
    assert not any(x.any() for x in ours.values())


def test_gradients_of_some_operands():
    given = tensors("cache", gate_key=True)
    _, theirs = gradients(cope_attention, given)
    for name in NAMES:
        alone = {n: x if n == name else x.detach() for n, x in given.items()}
        out = cope_attention(**alone)
        grad = random(*out.shape[-2:], seed=7).expand(out.shape)
        assert torch.equal(torch.autograd.grad(out, alone[name], grad)[0], theirs[name])
    still = {name: x.detach() for name, x in given.items()}
    assert not cope_attention(**still).requires_grad


def test_positions_that_are_whole_have_no_derivative():
    """Gates of exactly 1, where ceil and floor are one in the listing."""
    size = 1, 1, 1, 12, 12, 4, 9
    for dtype in (torch.float64, torch.float32):
        given = tensors(size, dtype, gate_key=True)
        with torch.no_grad():
            given["q"][..., 0], given["gate_key"][..., 0] = 50, 50
        _, theirs = gradients(by_listing, given)
        _, ours = gradients(cope_attention, given)
        assert not ours["gate_key"].any()
        assert not theirs["gate_key"].any()
        assert ours["position_embedding"].any()
        tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else FLOAT32_TOLERANCE
        assert_near(ours, theirs, tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["k", "v", "gate_key"])
def test_bad_keys_reach_only_the_gradients_of_who_sees_them(name, bad):
    given = tensors("grouped", torch.float32, gate_key=True)
    _, theirs = gradients(cope_attention, given)
    with torch.no_grad():
        given[name][1, 1, 23, 3] = bad
    _, ours = gradients(cope_attention, given)
    sees = torch.zeros(2, 6, 40, dtype=torch.bool)
    sees[1, 3:] = visible(40, 40, True)[:, 23]
    # Not the same bits: what is not finite is kept apart by other sums.
    difference = largest_difference(ours["q"][~sees], theirs["q"][~sees])
    assert difference < FLOAT32_TOLERANCE
    for key in ("k", "v", "gate_key"):
        assert torch.equal(ours[key][0], theirs[key][0])
        assert torch.equal(ours[key][1, 0], theirs[key][1, 0])


@pytest.mark.parametrize("name", ["k", "v", "gate_key"])
def test_bad_padding_reaches_no_gradient(name):
    """Padding of whole tiles, which no query of a block sees."""
    given = tensors((2, 4, 2, 70, 200, 16, 8), torch.float32, gate_key=True)
    for hidden in (slice(100, 200), slice(100)):
        mask = torch.ones(2, 1, 1, 200, dtype=torch.bool)
        mask[1, ..., hidden] = False
        _, theirs = gradients(cope_attention, given, mask=mask)
        changed = given[name].detach().clone()
        changed[1, :, hidden] = math.nan
        changed = given | {name: changed.requires_grad_()}
        _, ours = gradients(cope_attention, changed, mask=mask)
        for key, gradient in ours.items():
            assert largest_difference(gradient, theirs[key]) < FLOAT32_TOLERANCE, key


def test_bad_queries_reach_no_gradient_of_padding():
    given = tensors((2, 4, 2, 70, 200, 16, 8), torch.float32, gate_key=True)
    with torch.no_grad():
        given["q"][1, 2, 50] = math.nan
    mask = torch.arange(200) < 100
    _, ours = gradients(cope_attention, given, mask=mask)
    for key in ("k", "v", "gate_key"):
        assert not ours[key][..., 100:, :].any(), key


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "grad"])
def test_bad_queries_reach_only_the_gradients_of_what_they_see(name, bad):
    given = tensors("grouped", torch.float32, gate_key=True)
    grad, results = random(2, 6, 40, 16, dtype=torch.float32), []
    for value in (None, bad):
        if value is not None:
            with torch.no_grad():
                (grad if name == "grad" else given["q"])[1, 3, 17, 5] = value
        out = cope_attention(**given)
        found = torch.autograd.grad(out, list(given.values()), grad)
        results.append(dict(zip(given, found, strict=True)))
    theirs, ours = results
    others = torch.ones(2, 6, 40, dtype=torch.bool)
    others[1, 3, 17] = False
    pairs = [(ours["q"][others], theirs["q"][others])]
    for key in ("k", "v", "gate_key"):
        pairs += [(ours[key][1, 1, 18:], theirs[key][1, 1, 18:])]
        pairs += [(ours[key][0], theirs[key][0]), (ours[key][1, 0], theirs[key][1, 0])]
    for mine, other in pairs:
        assert largest_difference(mine, other) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size", [(1, 2, 1, 1100, 300, 32, 16), (3, 4, 2, 70, 70, 16, 8)]
)
def test_same_gradients_for_any_number_of_threads(size, dtype):
    given = tensors(size, dtype, gate_key=True)
    results = []
    try:
        for n_thread in N_THREAD:
            posenc.set_num_threads(n_thread)
            torch.set_num_threads(n_thread)
            out, found = gradients(cope_attention, given)
            results.append([out, *found.values()])
    finally:
        posenc.set_num_threads(None)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# --- attention: numbers --------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["square", "cache", "64 channels"])
def test_results_are_those_of_the_plain_function(size, dtype, grad):
    given = tensors(size, dtype, grad=False, gate_key=True)
    mask = as_tensor(masks(SIZES[size])["some"]["mask"])
    expected = posenc.cope_attention(**given, mask=mask)
    for name in given if grad else ():
        given[name].requires_grad_()
    ours = cope_attention(**given, mask=mask)
    assert torch.equal(ours, expected)
    assert ours.stride() == expected.stride() == given["q"].stride()
    assert ours.requires_grad == grad
    with torch.no_grad():
        assert torch.equal(cope_attention(**given, mask=mask), expected)
        out = torch.empty_like(expected)
        assert cope_attention(**given, mask=mask, out=out) is out
        assert torch.equal(out, expected)


def test_arrays_serve_as_embedding_and_mask():
    given = tensors("square")
    mask = masks(SIZES["square"])["some"]["mask"]
    expected = cope_attention(**given, mask=as_tensor(mask))
    embedding = given.pop("position_embedding").detach().numpy()
    ours = cope_attention(**given, position_embedding=embedding, mask=mask)
    assert torch.equal(ours, expected)


def test_negated_and_subclassed_tensors_are_taken():
    class Mine(torch.Tensor):
        pass

    given = tensors("square", grad=False)
    expected = cope_attention(**given)
    negated = given | {"v": torch.complex(given["v"], -given["v"]).conj().imag}
    assert negated["v"].is_neg()
    assert torch.equal(cope_attention(**negated), expected)
    ours = cope_attention(**(given | {"q": given["q"].as_subclass(Mine)}))
    assert type(ours) is Mine
    assert torch.equal(ours.as_subclass(torch.Tensor), expected)


def test_second_derivatives_are_an_error():
    given = tensors("small")
    (first,) = torch.autograd.grad(
        cope_attention(**given).square().sum(), given["q"], create_graph=True
    )
    with pytest.raises(NotImplementedError) as caught:
        first.sum().backward()
    assert str(caught.value) == (
        "cope_attention: gradients must be of first order; got a second derivative"
    )


def test_transforms_of_torch_func():
    given = tensors("grouped", grad=False)
    fixed = {name: x[0] for name, x in given.items() if name in "kv"}
    embedding = given["position_embedding"]

    def loss(q, function):
        out = function(q=q, **fixed, position_embedding=embedding)
        return out.pow(2).sum()

    def each(function):
        return torch.func.vmap(torch.func.grad(lambda q: loss(q, function)))

    ours, theirs = each(cope_attention)(given["q"]), each(by_listing)(given["q"])
    torch.testing.assert_close(ours, theirs)
    ours = torch.func.vmap(cope_attention, (0, None, 0, None))(
        given["q"], fixed["k"], given["v"], embedding
    )
    assert torch.equal(ours, cope_attention(**(given | {"k": fixed["k"]})))


def test_autocast_to_bfloat16():
    attention, x = CoPEAttention(32, 4), random(2, 5, 32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert attention.pos_emb.grad.dtype == torch.float32
    assert largest_difference(out, attention(x)) < TOLERANCE_16_BIT[torch.bfloat16]


# --- bias ----------------------------------------------------------------------------

BIAS = {
    "causal": ((2, 3, 9, 9), 4, {}),
    "cache": ((2, 3, 9), 5, {}),
    "more queries than keys": ((9, 5), 3, {}),
    "all": ((2, 9, 9), 4, {"causal": False}),
    "mask": ((2, 9, 9), 4, {"causal": False, "mask": True}),
    "one position": ((2, 9, 9), 1, {}),
    "two positions": ((2, 9, 9), 2, {}),
    "many positions": ((2, 9, 9), 40, {}),
}


def bias_case(shape, n_position, options, dtype=torch.float64):
    logits = random(*shape, dtype=dtype, grad=True)
    z = random(*shape[:-1], n_position, dtype=dtype, grad=True)
    options = dict(options)
    if "mask" in options:
        options["mask"] = random(*shape[-2:]) > 0
    return logits, z, options


def bias_by_listing(logits, z, causal=True, mask=None):
    """The listing, with z as product of a query and an embedding."""
    seen = visible(*logits.shape[-2:], causal, mask)
    one = torch.eye(z.shape[-1], dtype=z.dtype)
    found = listing(z, logits.masked_fill(~seen, -torch.inf), one)
    return found.masked_fill(~seen, 0)


@pytest.mark.parametrize("case", BIAS.values(), ids=BIAS)
def test_bias_and_its_gradients(case):
    logits, z, options = bias_case(*case)
    ours, theirs = (
        cope_bias(logits, z, **options),
        bias_by_listing(logits, z, **options),
    )
    assert torch.equal(ours, posenc.cope_bias(logits.detach(), z.detach(), **options))
    assert largest_difference(ours, theirs) < FLOAT64_TOLERANCE
    grad = random(*ours.shape)
    for a, b in zip(
        torch.autograd.grad(ours, (logits, z), grad),
        torch.autograd.grad(theirs, (logits, z), grad),
        strict=True,
    ):
        assert largest_difference(a, b) < FLOAT64_TOLERANCE
    assert gradcheck(lambda *x: cope_bias(*x, **options), (logits, z))


@pytest.mark.parametrize("z_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_of_bias_and_gradients(dtype, z_dtype):
    logits = random(2, 9, 9, dtype=dtype, grad=True)
    z = random(2, 9, 4, dtype=z_dtype, grad=True)
    ours = cope_bias(logits, z)
    expected = posenc.cope_bias(logits.detach(), z.detach())
    assert ours.dtype == expected.dtype
    assert torch.equal(ours, expected)
    assert cope_bias(logits.to("meta"), z.to("meta")).dtype == expected.dtype
    grad = random(2, 9, 9, dtype=ours.dtype, seed=1)
    found = torch.autograd.grad(ours, (logits, z), grad)
    assert [x.dtype for x in found] == [dtype, z_dtype]
    wide = [x.detach().double().requires_grad_() for x in (logits, z)]
    theirs = torch.autograd.grad(bias_by_listing(*wide), wide, grad.double())
    for a, b, own in zip(found, theirs, (dtype, z_dtype), strict=True):
        tolerance = TOLERANCE_16_BIT.get(own, TOLERANCE_16_BIT.get(dtype))
        tolerance = FLOAT32_TOLERANCE if tolerance is None else tolerance
        assert largest_difference(a, b) < tolerance * b.abs().max()


def test_one_tensor_in_several_places(compiled):
    x, embedding = random(2, 3, 9, 8, grad=True), random(8, 4)
    for given in ({}, {"gate_key": x}):
        ours = cope_attention(x, x, x, embedding, **given)
        theirs = by_listing(x, x, x, embedding)
        fast = compiled(lambda x, e: cope_attention(x, x, x, e, gate_key=x))
        grad = random(2, 3, 9, 8, seed=1)
        found, expected, third = (
            torch.autograd.grad(out, x, grad)[0]
            for out in (ours, theirs, fast(x, embedding))
        )
        assert largest_difference(found, expected) < FLOAT64_TOLERANCE * 10
        assert largest_difference(third, expected) < FLOAT64_TOLERANCE * 10


def test_bias_gradients_are_summed_where_z_is_broadcast():
    logits, z = random(2, 3, 5, 7, grad=True), random(3, 5, 4, grad=True)
    ours, theirs = cope_bias(logits, z), bias_by_listing(logits, z.expand(2, 3, 5, 4))
    grad = random(2, 3, 5, 7, seed=1)
    for a, b in zip(
        torch.autograd.grad(ours, (logits, z), grad),
        torch.autograd.grad(theirs, (logits, z), grad),
        strict=True,
    ):
        assert largest_difference(a, b) < FLOAT64_TOLERANCE


def test_second_derivatives_of_bias_are_an_error():
    logits, z, _ = bias_case((3, 3), 3, {})
    bias = cope_bias(logits, z)
    (first,) = torch.autograd.grad(bias.square().sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^cope_bias: gradients must be"):
        first.sum().backward()


def test_bias_out():
    logits, z, _ = bias_case((3, 4), 3, {})
    logits, z = logits.detach(), z.detach()
    out = torch.empty(3, 4, dtype=torch.float64)
    assert cope_bias(logits, z, out=out) is out
    assert torch.equal(out, cope_bias(logits, z))


# --- compilers -----------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ["attention", "masked, gate key", "bias"])
def test_compiled_graph_holds_one_operator(form, grad, compiled):
    graphs = Graphs()
    if form == "bias":
        logits, z, _ = bias_case((2, 9, 9), 4, {})
        given, function = {"logits": logits, "z": z}, cope_bias
    else:
        given, function = (
            tensors("grouped", gate_key=form != "attention"),
            cope_attention,
        )
    if form == "masked, gate key":
        given["mask"] = as_tensor(masks(SIZES["grouped"])["some"]["mask"])
    for tensor in given.values():
        if tensor.is_floating_point():
            tensor.requires_grad_(grad)
    ours = compiled(lambda **x: function(**x), backend=graphs)(**given)
    assert len(graphs) == 1
    assert graphs.operators() == 1 + grad
    assert torch.equal(ours, function(**given))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step_with_any_length(backend, compiled):
    def step(q, k, v, position_embedding):
        out = cope_attention(2 * q, k, v, position_embedding, position_scale=0.5)
        return out.pow(2).sum()

    fast = compiled(step, backend=backend, dynamic=True)
    for n_token in (9, 5, 17):
        given = list(tensors((2, 4, 2, n_token, n_token, 8, 6)).values())
        ours = torch.autograd.grad(fast(*given), given)
        theirs = torch.autograd.grad(step(*given), given)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_out(backend, compiled):
    given = tensors("square", grad=False)
    out = torch.empty_like(given["q"])
    logits, z = random(3, 4), random(3, 3)
    bias = torch.empty(3, 4, dtype=torch.float64)

    def both(logits, z, **given):
        cope_attention(**given, out=out)
        cope_bias(logits, z, out=bias)
        return out + 1

    assert torch.equal(
        compiled(both, backend=backend)(logits, z, **given), cope_attention(**given) + 1
    )
    assert torch.equal(bias, cope_bias(logits, z))


def test_compiled_call_says_what_is_wrong(compiled):
    given = tensors("square") | {"position_embedding": random(15, 4)}
    rule = r"cope_attention: position_embedding must be of shape \(D, P\)"
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=rule):
        compiled(lambda **x: cope_attention(**x))(**given)


@pytest.mark.parametrize("size", ["grouped", "cache", "one query"])
def test_fresh_results_lie_in_memory_as_the_fake_ones_say(size):
    given = tensors(size, torch.bfloat16, grad=False)
    arguments = [*given.values(), None, None, *SCALARS]
    out, statistics = torch.ops.posenc.cope_attention(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in given.values()]
        fake = torch.ops.posenc.cope_attention(*fakes, None, None, *SCALARS)
    for real, other in zip((out, statistics), fake, strict=True):
        assert (real.dtype, real.shape) == (other.dtype, other.shape)
        assert steps(real) == steps(other)
    assert torch.equal(out, cope_attention(**given))


def test_meta_tensors_give_meta_tensors():
    given = tensors("grouped", torch.float32)
    meta = {n: x.detach().to("meta").requires_grad_() for n, x in given.items()}
    out, found = gradients(cope_attention, meta)
    assert out.is_meta
    assert out.shape == given["q"].shape
    assert {n: x.shape for n, x in found.items()} == {
        n: x.shape for n, x in given.items()
    }


def operator_cases():
    """Arguments of every operator of CoPE."""
    given = tensors("small", torch.float32, grad=False, gate_key=True)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    arguments = [*given.values(), mask, *SCALARS]
    out, statistics = torch.ops.posenc.cope_attention(*arguments)
    plain = [*list(given.values())[:4], None, None, 0.5, 1.0, False]
    yield "cope_attention", arguments
    yield "cope_attention", plain
    yield "cope_attention_out", [*arguments, torch.empty_like(out)]
    yield "cope_attention_backward", [out, out, statistics, *arguments]
    yield "cope_attention_backward", [out, out, statistics, *plain]
    logits, z = random(2, 3, 3), random(2, 3, 2)
    yield "cope_bias", [logits, z, mask, False]
    yield "cope_bias_out", [logits, z, None, True, torch.empty_like(logits)]
    yield "cope_bias_backward", [logits, logits, z, mask, True]


OPERATORS = (
    "cope_attention",
    "cope_attention_out",
    "cope_attention_backward",
    "cope_bias",
    "cope_bias_out",
    "cope_bias_backward",
)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_pass_opcheck(operator):
    cases = [arguments for name, arguments in operator_cases() if name == operator]
    assert cases
    for arguments in cases:
        results = torch.library.opcheck(
            getattr(torch.ops.posenc, operator).default, arguments
        )
        assert set(results.values()) == {"SUCCESS"}


def test_traces_hold_the_operator():
    given = list(tensors("square", grad=False).values())

    class Attend(torch.nn.Module):
        def forward(self, *given):
            return cope_attention(*given)

    exported = torch.export.export(Attend(), tuple(given)).module()
    for traced in (exported, make_fx(Attend())(*given)):
        targets = [str(node.target) for node in traced.graph.nodes]
        assert targets.count("posenc.cope_attention.default") == 1
        assert torch.equal(traced(*given), cope_attention(*given))


# --- modules -------------------------------------------------------------------------


class Paper(torch.nn.Module):
    """The listing's class."""

    def __init__(self, npos_max, head_dim):
        super().__init__()
        self.npos_max = npos_max
        self.pos_emb = torch.nn.Parameter(torch.zeros(1, head_dim, npos_max))

    def forward(self, query, attn_logits):
        return listing(query, attn_logits, self.pos_emb)


def test_cope_takes_the_place_of_the_papers_class(compiled):
    paper, ours = Paper(6, 8).double(), CoPE(6, 8).double()
    assert not ours.pos_emb.any()
    torch.nn.init.normal_(paper.pos_emb)
    ours.load_state_dict(paper.state_dict())
    assert ours.npos_max == 6
    query, key, grad = (random(4, 9, 8, seed=i) for i in range(3))
    hidden = ~visible(9, 9, True)
    logits = (query @ key.mT / 8**0.5).masked_fill(hidden, -torch.inf)

    def attend(cope):
        weights = torch.softmax(logits + cope(query, logits), -1)
        (gradient,) = torch.autograd.grad(weights @ key, cope.pos_emb, grad)
        return weights, gradient

    for a, b in zip(attend(ours), attend(paper), strict=True):
        assert largest_difference(a, b) < FLOAT64_TOLERANCE
    bias = ours(query, logits)
    open_logits = query @ key.mT / 8**0.5
    assert torch.equal(ours(query, open_logits, causal=True), bias)
    assert torch.equal(ours(query, open_logits, mask=~hidden), bias)
    assert torch.equal(compiled(ours)(query, logits), bias)
    assert ours(query[0], logits[0]).shape == (9, 9)
    assert repr(ours) == "CoPE(npos_max=6, head_dim=8)"


KINDS = {
    "default": {},
    "grouped": {"num_kv_heads": 2},
    "gate keys": {"gates": "gate_key", "num_kv_heads": 1},
    "values": {"gates": "value", "position_scale": 0.3, "bias": False},
    "per head": {"per_head": True, "scale": 0.2},
    "all": {"causal": False},
}


def module(**options):
    torch.manual_seed(0)
    attention = CoPEAttention(32, 4, npos_max=5, **options)
    torch.nn.init.normal_(attention.pos_emb)
    return attention


def heads(projection, x):
    return projection(x).unflatten(-1, (-1, 8)).transpose(1, 2)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_module_is_attention_between_projections(options, compiled):
    attention, x = module(**options).double(), random(2, 9, 32)
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None, None, None]
    gates = options.get("gates", "key")
    theirs = by_listing(
        heads(attention.q_proj, x),
        heads(attention.k_proj, x),
        heads(attention.v_proj, x),
        attention.pos_emb,
        scale=options.get("scale"),
        causal=options.get("causal", True),
        mask=mask,
        position_scale=options.get("position_scale", 1.0),
        gate_key={
            "key": None,
            "value": heads(attention.v_proj, x),
            "gate_key": heads(attention.gate_proj or attention.k_proj, x),
        }[gates],
    )
    theirs = attention.out_proj(theirs.transpose(1, 2).flatten(-2))
    ours = attention(x, mask=mask)
    assert largest_difference(ours, theirs) < FLOAT64_TOLERANCE
    assert torch.equal(compiled(attention)(x, mask=mask), ours)
    assert largest_difference(attention(x[0]), attention(x)[0]) < FLOAT64_TOLERANCE
    ours.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in attention.parameters()
               if p is not getattr(attention.k_proj, "bias", None))  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", list(KINDS.values())[:-1], ids=list(KINDS)[:-1])
def test_decoding_with_a_cache(options, grad):
    attention, x = module(**options), random(2, 21, 32, dtype=torch.float32)
    full, cache = attention(x), KVCache()
    with torch.set_grad_enabled(grad):
        parts = [attention(x[:, :6], cache=cache), attention(x[:, 6:9], cache=cache)]
        parts += [attention(x[:, i : i + 1], cache=cache) for i in range(9, 21)]
    assert len(cache) == 21
    assert largest_difference(torch.cat(parts, 1), full) < MODULE_TOLERANCE
    if grad:
        parameters = list(attention.parameters())
        loss = torch.cat(parts, 1).square().sum()
        ours = torch.autograd.grad(loss, parameters)
        theirs = torch.autograd.grad(full.square().sum(), parameters)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_compiled_decoding(compiled):
    attention, x = module(), random(2, 9, 32, dtype=torch.float32)
    fast, cache = compiled(attention, dynamic=True), KVCache()
    with torch.no_grad():
        parts = [fast(x[:, :5], cache=cache)]
        parts += [fast(x[:, i : i + 1], cache=cache) for i in range(5, 9)]
        assert largest_difference(torch.cat(parts, 1), attention(x)) < MODULE_TOLERANCE


def test_decoding_of_padded_prompts():
    """Padding on the left is as if it were not there."""
    attention, x = module(), random(2, 12, 32, dtype=torch.float32)
    cache = KVCache()
    mask = torch.arange(12) >= torch.tensor([0, 4])[:, None, None, None]
    with torch.no_grad():
        attention(x[:, :9], mask=mask[..., :9], cache=cache)
        ours = [
            attention(x[:, i : i + 1], mask=mask[..., : i + 1], cache=cache)
            for i in range(9, 12)
        ]
        theirs = attention(x[:1]), attention(x[1:, 4:])
    ours = torch.cat(ours, 1)
    assert largest_difference(ours[:1], theirs[0][:, 9:]) < MODULE_TOLERANCE
    assert largest_difference(ours[1:], theirs[1][:, 5:]) < MODULE_TOLERANCE


def test_cache_doubles_its_memory():
    cache, places = KVCache(), set()
    with torch.no_grad():
        for _ in range(64):
            k, v = cache.append(random(1, 2, 1, 4), random(1, 2, 1, 4, seed=1))
            places.add(k.untyped_storage().data_ptr())
    assert len(places) <= 8
    assert len(cache) == 64
    assert torch.equal(k, random(1, 2, 1, 4).expand(1, 2, 64, 4))
    assert torch.equal(v, random(1, 2, 1, 4, seed=1).expand(1, 2, 64, 4))


def test_module_state():
    attention = module(gates="gate_key", per_head=True, bias=False)
    shapes = {name: tuple(p.shape) for name, p in attention.state_dict().items()}
    assert shapes == {
        "pos_emb": (4, 8, 5),
        **{f"{name}_proj.weight": (32, 32) for name in ("q", "k", "v", "out", "gate")},
    }
    other = copy.deepcopy(attention).bfloat16()
    x = random(1, 6, 32, dtype=torch.bfloat16)
    assert other(x).dtype == torch.bfloat16
    assert not CoPEAttention(8, 2).pos_emb.any()
    assert CoPEAttention(8, 2, device="meta", dtype=torch.float16).pos_emb.is_meta
    first = repr(module(num_kv_heads=2)).splitlines()[1].strip()
    assert first == "num_heads=4, num_kv_heads=2, npos_max=5, gates='key'"


def test_module_learns_to_find_the_last_mark():
    """The value at the last of the keys that are marked: a count from the right."""
    torch.manual_seed(0)
    attention = CoPEAttention(8, 1, npos_max=4)
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.02)
    losses = []
    for _ in range(80):
        x = torch.randn(16, 12, 8)
        x[..., 0] = (torch.rand(16, 12) < 0.4).float() * 4
        marked = torch.arange(12) * (x[..., 0] > 0)
        last = marked.cummax(-1).values
        target = x.gather(1, last[..., None].expand(-1, -1, 8))[..., 1:]
        loss = (attention(x)[..., 1:] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


# --- bad input -----------------------------------------------------------------------


def wrong(**changes):
    return tensors("small") | changes


X = (1, 1, 3, 4)
ERRORS = [
    (wrong(q=np.zeros(X)), TypeError, "q must be a torch.Tensor; got ndarray"),
    (wrong(k=None), TypeError, "k must be a torch.Tensor; got NoneType"),
    (wrong(gate_key=[1.0]), TypeError, "gate_key must be a torch.Tensor; got list"),
    (
        wrong(position_embedding="e"),
        TypeError,
        "position_embedding must be a torch.Tensor or an array that torch can read; "
        "got str",
    ),
    (
        wrong(v=torch.zeros(X).to_sparse()),
        TypeError,
        "v must be a dense tensor; got one of layout torch.sparse_coo",
    ),
    (
        wrong(out=torch.empty(X)),
        TypeError,
        "out must be None where gradients are needed; got a tensor",
    ),
    (
        wrong(mask=torch.zeros(3, 3)),
        TypeError,
        "mask must be of dtype bool, True where a key may be seen; got dtype float32",
    ),
    (wrong(causal=1), TypeError, "causal must be True or False; got 1"),
    (wrong(scale="a"), TypeError, "scale must be a finite number; got 'a'"),
    (
        wrong(position_scale=math.inf),
        ValueError,
        "position_scale must be a finite number; got inf",
    ),
    (
        wrong(position_embedding=torch.zeros(3, 4)),
        ValueError,
        "position_embedding must be of shape (D, P) or (H, D, P) for H = 1, D = 4, "
        "P > 0; got shape (3, 4)",
    ),
    (
        wrong(v=torch.zeros(1, 1, 2, 4)),
        ValueError,
        "v must have heads, keys and channels as k, (1, 3, 4); got shape (1, 1, 2, 4)",
    ),
]


@pytest.mark.parametrize(
    ("given", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS]
)
def test_bad_input(given, error, message):
    with pytest.raises(error) as caught:
        cope_attention(**given)
    assert str(caught.value) == f"cope_attention: {message}"


BIAS_ERRORS = [
    ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor; got list"),
    ({"z": np.zeros((3, 2))}, TypeError, "z must be a torch.Tensor; got ndarray"),
    ({"causal": None}, TypeError, "causal must be True or False; got None"),
    (
        {"out": torch.empty(3, 3)},
        TypeError,
        "out must be None where gradients are needed; got a tensor",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BIAS_ERRORS)
def test_bad_input_of_bias(changes, error, message):
    logits, z, _ = bias_case((3, 3), 2, {})
    with pytest.raises(error) as caught:
        cope_bias(**({"logits": logits, "z": z} | changes))
    assert str(caught.value) == f"cope_bias: {message}"


MODULE_ERRORS = [
    (
        (8.0, 2),
        {},
        TypeError,
        "embed_dim must be a whole number of at least 1; got 8.0",
    ),
    ((8, 0), {}, ValueError, "num_heads must be a whole number of at least 1; got 0"),
    ((8, 3), {}, ValueError, "num_heads must divide embed_dim, 8; got 3"),
    ((8, 4, 3), {}, ValueError, "num_kv_heads must divide num_heads, 4; got 3"),
    (
        (8, 4),
        {"npos_max": 0},
        ValueError,
        "npos_max must be a whole number of at least 1; got 0",
    ),
    (
        (8, 4),
        {"gates": "query"},
        ValueError,
        "gates must be one of 'key', 'gate_key', 'value'; got 'query'",
    ),
    ((8, 4), {"bias": 1}, TypeError, "bias must be True or False; got 1"),
    ((8, 4), {"per_head": 0}, TypeError, "per_head must be True or False; got 0"),
    ((8, 4), {"causal": None}, TypeError, "causal must be True or False; got None"),
    ((8, 4), {"scale": "a"}, TypeError, "scale must be a finite number; got 'a'"),
    (
        (8, 4),
        {"position_scale": math.nan},
        ValueError,
        "position_scale must be a finite number; got nan",
    ),
]


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    MODULE_ERRORS,
    ids=[message for *_, message in MODULE_ERRORS],
)
def test_bad_input_of_the_module(sizes, options, error, message):
    with pytest.raises(error) as caught:
        CoPEAttention(*sizes, **options)
    assert str(caught.value) == f"CoPEAttention: {message}"


def test_bad_sizes_of_cope():
    with pytest.raises(ValueError) as caught:
        CoPE(0, 8)
    rule = "be a whole number of at least 1"
    assert str(caught.value) == f"CoPE: npos_max must {rule}; got 0"
    with pytest.raises(TypeError) as caught:
        CoPE(8, None)
    assert str(caught.value) == f"CoPE: head_dim must {rule}; got None"


def test_what_does_not_continue_a_cache():
    cache, k = KVCache(), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError) as caught:
        cache.append(k, k[:, :, :2])
    assert str(caught.value) == (
        "KVCache: new must be tensors (..., tokens, channels) of one number of "
        "tokens; got [(1, 2, 3, 4), (1, 2, 2, 4)]"
    )
    with pytest.raises(ValueError, match=r"^KVCache: new must be tensors \("):
        cache.append(torch.ones(3))
    cache.append(k)
    for other in ((k, k), (k.double(),), (k[:, :1],)):
        with pytest.raises(ValueError, match=r"^KVCache: new must continue \[\(torch"):
            cache.append(*other)
    assert len(cache) == 3
    with pytest.raises(TypeError) as caught:
        cache.append([k])
    assert str(caught.value) == "KVCache: new must be a torch.Tensor; got list"
    with pytest.raises(TypeError) as caught:
        CoPEAttention(8, 2)(torch.zeros(1, 3, 8), cache=(k, k))
    assert str(caught.value) == "CoPEAttention: cache must be a KVCache; got tuple"


@pytest.mark.parametrize("factor", [1e4, 1e8, 1e12])
def test_gradients_of_large_logits_keep_weights_below_one(factor):
    generator = torch.Generator().manual_seed(0)
    q, k, v, embedding = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((16, 8), (16, 8), (16, 8), (8, 4))
    )
    out = cope_attention(q * factor, k, v, embedding)
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v, embedding))
    assert (v.grad >= 0).all()
    torch.testing.assert_close(v.grad.sum(0), torch.full((8,), 16.0))


class TwoSteps(torch.nn.Module):
    """Attention to tokens, and then with their cache to others."""

    def __init__(self):
        super().__init__()
        self.attention = CoPEAttention(8, 2)

    def forward(self, first, second):
        cache = KVCache()
        self.attention(first, cache=cache)
        return self.attention(second, cache=cache)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_caches_take_any_length(strict):
    torch.manual_seed(0)
    model = TwoSteps()
    sizes = tuple({1: torch.export.Dim(name, max=64)} for name in "TS")
    given = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    program = torch.export.export(model, given, dynamic_shapes=sizes, strict=strict)
    for n_first, n_second in ((5, 3), (9, 2), (2, 20)):
        given = torch.randn(2, n_first, 8), torch.randn(2, n_second, 8)
        assert torch.equal(program.module()(*given), model(*given))
