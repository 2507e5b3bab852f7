"""Torch CPU tensors in the functions on arrays: the bits of NumPy, torch's memory."""

# SPDX-License-Identifier: BSD-3-Clause

import subprocess
import sys
import warnings

import numpy as np
import pytest
import reference
from ml_dtypes import bfloat16

import posenc

torch = pytest.importorskip("torch")

TYPES = {
    torch.float16: np.float16,
    torch.bfloat16: bfloat16,
    torch.float32: np.float32,
    torch.float64: np.float64,
}
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
both_layouts = pytest.mark.parametrize("layout", ["half", "interleaved"])
both_kinds = pytest.mark.parametrize("tables", ["tensors", "arrays"])


def random(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def array_of(tensor):
    """A copy of a tensor, as NumPy has it."""
    tensor = tensor.detach().resolve_neg().resolve_conj().clone()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


def table(n_position, n_pair, dtype=torch.float32, tables="tensors"):
    """Random cos and sin; 16-bit x gets float32 tables."""
    dtype = torch.float64 if dtype is torch.float64 else torch.float32
    made = [random((n_position, n_pair), dtype, seed) for seed in (1, 2)]
    return [array_of(part) for part in made] if tables == "arrays" else made


def same_bits(tensor, array):
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad
    reference.same_bits(array_of(tensor), array)


def views(shape, dtype):
    """Tensors of one shape as models make them, and some that they do not."""
    b, h, t, d = shape
    yield "contiguous", random(shape, dtype)
    yield "transposed", random((b, t, h, d), dtype).transpose(1, 2)
    fused = random((b, t, 3 * h, d), dtype)
    yield "slice of fused qkv", fused[:, :, h : 2 * h].transpose(1, 2)
    yield "chunk", random((b, h, t, 2 * d), dtype).chunk(2, dim=-1)[1]
    yield "one row for all", random((b, 1, 1, d), dtype).expand(shape)
    yield "one batch for all", random((1, h, t, d), dtype).expand(shape)
    yield "every second", random((b, h, t, 2 * d), dtype)[..., ::2]
    yield "channels outermost", random((d, t, h, b), dtype).permute(3, 2, 1, 0)
    yield "channels last", random(shape, dtype).to(memory_format=torch.channels_last)
    yield "parameter", torch.nn.Parameter(random(shape, dtype), requires_grad=False)
    yield "one token", random((b, h, 9, d), dtype)[:, :, 2:3].expand(shape)
    yield "shifted", random(b * h * t * d + 1, dtype)[1:].view(shape)


# --- the bits of NumPy, in the memory of torch ---------------------------------------


@every_type
@both_layouts
@both_kinds
@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_every_view_gives_numpys_bits_and_torchs_strides(
    dtype, layout, tables, rounding
):
    cos, sin = table(5, 6, dtype, tables)
    options = {"layout": layout, "rounding": rounding}
    for name, x in views((2, 3, 5, 16), dtype):
        for start in (0, 3, -12):
            options["rotary_start"] = start
            got = posenc.rope(x, cos, sin, **options)
            want = posenc.rope(array_of(x), *table(5, 6, dtype, "arrays"), **options)
            same_bits(got, want)
            assert got.stride() == torch.empty_like(x).stride(), name
            assert got.dtype is dtype


@every_type
def test_own_type_tables(dtype):
    x = random((2, 3, 5, 16), dtype)
    cos, sin = (random((5, 6), dtype, seed) for seed in (1, 2))
    for rounding in ("once", "eager"):
        got = posenc.rope(x, cos, sin, rounding=rounding)
        arrays = map(array_of, (x, cos, sin))
        same_bits(got, posenc.rope(*arrays, rounding=rounding))


@every_type
def test_arrays_with_tables_of_tensors_stay_arrays(dtype):
    x, (cos, sin) = random((2, 3, 5, 16), dtype), table(5, 6, dtype)
    got = posenc.rope(array_of(x), cos, sin)
    assert type(got) is np.ndarray
    reference.same_bits(got, array_of(posenc.rope(x, cos, sin)))
    assert type(posenc.rope(x.tolist(), cos, sin)) is np.ndarray


@every_type
@pytest.mark.parametrize("shape", [(0, 3, 5, 16), (2, 0, 5, 16), (2, 3, 5, 0)], ids=str)
def test_nothing_to_rotate(dtype, shape):
    x, (cos, sin) = random(shape, dtype), table(5, shape[-1] // 2, dtype)
    got = posenc.rope(x, cos, sin)
    assert got.shape == x.shape
    assert got.dtype is dtype
    assert posenc.rope(x, cos, sin, out=x) is x


@pytest.mark.parametrize("n_axis", [1, 2, 3, 5, 7, 8, 9, 12])
def test_any_number_of_axes(n_axis):
    shape = (*(2,) * (n_axis - 1), 16)
    x = random(shape)
    rows = () if n_axis == 1 else (2,)
    cos, sin = (random((*rows, 6), seed=seed) for seed in (1, 2))
    got = posenc.rope(x, cos, sin)
    same_bits(got, posenc.rope(*map(array_of, (x, cos, sin))))
    assert got.stride() == torch.empty_like(x).stride()


@every_type
@both_layouts
def test_rope_qk(dtype, layout):
    fused = random((2, 7, 12, 32), dtype)
    q, k = fused[:, :, :8].transpose(1, 2), fused[:, :, 8:10].transpose(1, 2)
    cos, sin = table(7, 16, dtype)
    got = posenc.rope_qk(q, k, cos, sin, layout=layout)
    arrays = [array_of(a) for a in (q, k, cos, sin)]
    want = posenc.rope_qk(*arrays, layout=layout)
    for left, right, x in zip(got, want, (q, k), strict=True):
        same_bits(left, right)
        assert left.stride() == torch.empty_like(x).stride()
    values = fused[:, :, 10:].clone()
    there = posenc.rope_qk(q, k, cos, sin, layout=layout, out=(q, k))
    assert there[0] is q
    assert there[1] is k
    for left, right in zip(there, want, strict=True):
        same_bits(left, right)
    assert torch.equal(fused[:, :, 10:], values)


def test_rope_qk_of_two_kinds_and_types():
    q, k = random((2, 4, 5, 16)), random((2, 1, 5, 16), torch.bfloat16, 1)
    cos, sin = table(5, 8)
    want = posenc.rope(q, cos, sin), posenc.rope(k, cos, sin)
    got = posenc.rope_qk(q, k, cos, sin)
    assert [part.dtype for part in got] == [torch.float32, torch.bfloat16]
    for left, right in zip(got, want, strict=True):
        assert torch.equal(left, right)
    left, right = posenc.rope_qk(array_of(q), k, cos, sin)
    reference.same_bits(left, array_of(want[0]))
    assert torch.equal(right, want[1])


@every_type
def test_rope_complex(dtype):
    x, (cos, sin) = random((2, 3, 5, 16), dtype), table(5, 6, dtype)
    cis = torch.complex(cos, sin)
    got = posenc.rope_complex(x, cis)
    assert torch.equal(got, posenc.rope(x, cos, sin, layout="interleaved"))
    same_bits(got, posenc.rope_complex(array_of(x), array_of(cis)))
    assert torch.equal(posenc.rope_complex(x, array_of(cis)), got)
    assert posenc.rope_complex(x, cis, out=x) is x
    assert torch.equal(x, got)


@both_layouts
def test_options_mean_the_same(layout):
    x, (cos, sin) = random((2, 3, 4, 16)), table(9, 6)
    arrays = [array_of(a) for a in (x, cos, sin)]
    for options in (
        {"positions": torch.tensor([1, 8, 0, 3])},
        {"positions": torch.tensor([[1, 8, 0, 3], [2, 2, 2, 2]], dtype=torch.int32)},
        {"positions": torch.arange(8)[::2]},
        {"positions": [1, 8, 0, 3]},
        {"offset": 5},
        {"offset": torch.tensor(5)},
        {"offset": torch.tensor([5, 0])},
        {"offset": torch.tensor([5, 0], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 1, 4], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 1, 4]), "offset": torch.tensor([3, 4])},
    ):
        plain = {
            name: value.numpy() if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        for direction in ({}, {"adjoint": True}, {"inverse": True}):
            got = posenc.rope(x, cos, sin, layout=layout, **options, **direction)
            want = posenc.rope(*arrays, layout=layout, **plain, **direction)
            same_bits(got, want)
            assert got.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    ("x", "tables", "result"),
    [
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.int32, torch.float32, torch.float64),
        (torch.bool, torch.float16, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_mixed_types(x, tables, result, rounding):
    x = (3 * random((2, 5, 3, 16))).to(x).transpose(1, 2)
    cos, sin = (random((5, 6), tables, seed) for seed in (1, 2))
    got = posenc.rope(x, cos, sin, rounding=rounding)
    same_bits(got, posenc.rope(*map(array_of, (x, cos, sin)), rounding=rounding))
    assert got.dtype is result
    assert got.stride() == torch.empty_like(x).stride()


# --- out and in place ----------------------------------------------------------------


@every_type
@both_layouts
def test_out_and_in_place_for_every_view(dtype, layout):
    cos, sin = table(5, 6, dtype)
    for name, x in views((2, 3, 5, 16), dtype):
        want = array_of(posenc.rope(x, cos, sin, layout=layout))
        out = torch.zeros((2, 3, 5, 16), dtype=dtype)
        assert posenc.rope(x, cos, sin, layout=layout, out=out) is out
        same_bits(out, want)
        if "for all" in name or name == "one token":
            with pytest.raises(ValueError, match=r"^rope: out must not overlap itself"):
                posenc.rope(x, cos, sin, layout=layout, out=x)
            continue
        assert posenc.rope(x, cos, sin, layout=layout, out=x) is x
        reference.same_bits(array_of(x), want)


@every_type
@pytest.mark.parametrize("shift", [1, -1, 16, -80])
@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_out_that_overlaps_x(dtype, shift, rounding):
    cos, sin = table(5, 6, dtype)
    memory = random(240 + abs(shift), dtype)
    low, high = memory[:240], memory[abs(shift) :]
    source, target = (low, high) if shift > 0 else (high, low)
    x, out = source.view(3, 5, 16), target.view(3, 5, 16)
    want = array_of(posenc.rope(x.clone(), cos, sin, rounding=rounding))
    assert posenc.rope(x, cos, sin, out=out, rounding=rounding) is out
    same_bits(out, want)


def test_memory_is_shared_with_arrays():
    memory = random((2, 5, 16)).numpy()
    x = torch.from_numpy(memory)
    cos, sin = table(5, 8)
    want = posenc.rope(memory.copy(), cos, sin)
    posenc.rope(x, cos, sin, out=x)
    reference.same_bits(memory, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"offset": 1}], ids=["fast", "general"])
def test_torch_knows_that_out_was_written(dtype, options):
    """Else autograd would use what it saved of it, changed."""
    x, (cos, sin) = random((2, 5, 16), dtype), table(6 if options else 5, 8)
    weight = torch.nn.Parameter(random((2, 5, 16), dtype, 3))
    loss = (x * weight).sum()
    version = x._version
    posenc.rope(x, cos, sin, out=x, **options)
    assert x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- gradients -----------------------------------------------------------------------


def test_gradients_are_refused_while_they_are_on():
    x, (cos, sin) = random((2, 5, 16)), table(5, 8)
    needs = x.clone().requires_grad_()
    parameter = torch.nn.Parameter(x.clone())
    out = torch.full_like(x, 7)
    says = (
        r"^rope: {} must need no gradient \(posenc\.torch\.rope gives gradients\); "
        "got a tensor with requires_grad=True$"
    )
    for name, call in {
        "x": lambda: posenc.rope(needs, cos, sin, out=out),
        "x ": lambda: posenc.rope(parameter, cos, sin, out=out),
        "x  ": lambda: posenc.rope(needs * 2, cos, sin, out=out),
        "cos": lambda: posenc.rope(x, cos.clone().requires_grad_(), sin, out=out),
        "sin": lambda: posenc.rope(x, cos, sin.clone().requires_grad_(), out=out),
        "out": lambda: posenc.rope(x, cos, sin, out=needs),
    }.items():
        with pytest.raises(TypeError, match=says.format(name.strip())):
            call()
    assert (out == 7).all()
    with pytest.raises(TypeError, match=r"^rope_qk: k must .*\(posenc\.torch\.rope_qk"):
        posenc.rope_qk(x, needs, cos, sin)
    with pytest.raises(TypeError, match=r"^rope_complex: x must .*\(posenc\.torch\."):
        posenc.rope_complex(needs, torch.complex(cos, sin))
    with pytest.raises(
        TypeError, match=r"^rope_table: inv_freq must need no gradient;"
    ):
        posenc.rope_table([1], cos[0].clone().requires_grad_())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_type
def test_gradients_that_are_off_do_not_matter(mode, dtype):
    x, (cos, sin) = random((2, 5, 16), dtype), table(5, 8, dtype)
    want = array_of(posenc.rope(x, cos, sin))
    parameter = torch.nn.Parameter(x)
    with mode():
        same_bits(posenc.rope(parameter, cos, sin), want)
        same_bits(posenc.rope(parameter * 1, cos, sin), want)
        same_bits(posenc.rope(x, cos, sin), want)
        again = (x.clone(), x.clone())
        for part in posenc.rope_qk(*again, cos, sin, out=again):
            same_bits(part, want)
        assert posenc.rope(parameter, cos, sin, out=parameter) is parameter
    assert parameter.requires_grad
    reference.same_bits(array_of(parameter), want)


# --- tensors that are not plain ------------------------------------------------------


class Marked(torch.Tensor):
    """A subclass of tensors."""


def strange():
    """Tensors whose memory is not all there is, and what is said of them."""
    x = random((2, 3, 5, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            fake = torch.zeros(2, 3, 5, 16)
        return [
            (x.as_subclass(Marked), "a Marked"),
            (fake, "a FakeTensor"),
            (torch.nn.UninitializedParameter(), "an? UninitializedParameter"),
            (torch.nested.nested_tensor([x[0], x[1]]), "a nested tensor"),
            (
                torch.nested.nested_tensor([x[0, 0], x[1, 1]], layout=torch.jagged),
                "a NestedTensor",
            ),
            (x.to("meta"), "a tensor on meta"),
            (x.to_sparse(), "a tensor of layout torch.sparse_coo"),
            (x[0, 0].to_sparse_csr(), "a tensor of layout torch.sparse_csr"),
            (x.to_mkldnn(), "a tensor of layout torch._mkldnn"),
            (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "a quantized tensor"),
            (
                torch._neg_view(x),
                r"a lazily negated tensor \(of it: its resolve_neg\(\)\)",
            ),
            (torch._efficientzerotensor(5, 16), "a tensor without memory of its own"),
        ]


@pytest.mark.parametrize("index", range(12))
def test_a_tensor_that_is_not_plain_is_refused(index):
    tensor, got = strange()[index]
    x, (cos, sin) = random((2, 3, 5, 16)), table(5, 8)
    positions = np.arange(5)
    out = torch.full_like(x, 7)
    rule = f"must be a plain CPU tensor; got {got}$"
    for name, call in {
        "rope: x": lambda: posenc.rope(tensor, cos, sin, out=out),
        "rope: cos": lambda: posenc.rope(x, tensor, sin, out=out),
        "rope: sin": lambda: posenc.rope(x, cos, tensor, out=out),
        "rope: out": lambda: posenc.rope(x, cos, sin, out=tensor),
        "rope: positions": lambda: posenc.rope(x, cos, sin, positions=tensor, out=out),
        "rope: offset": lambda: posenc.rope(x, cos, sin, offset=tensor, out=out),
        "rope_qk: q": lambda: posenc.rope_qk(tensor, x, cos, sin),
        "rope_qk: k": lambda: posenc.rope_qk(x, tensor, cos, sin),
        "rope_complex: cis": lambda: posenc.rope_complex(x, tensor, out=out),
        "rope_table: positions": lambda: posenc.rope_table(tensor, [1.0]),
        "rope_table: inv_freq": lambda: posenc.rope_table(positions, tensor),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} {rule}"):
            call()
    assert (out == 7).all()


def test_lazy_conjugates_are_refused_and_their_copies_taken():
    x, (cos, sin) = random((2, 3, 5, 16)), table(5, 8)
    cis = torch.complex(cos, sin)
    with pytest.raises(TypeError, match=r"got a lazily conjugated tensor \(of it: "):
        posenc.rope_complex(x, cis.conj())
    with pytest.raises(TypeError, match=r"got a lazily negated tensor \(of it: "):
        posenc.rope(x, cos, cis.conj().imag)
    for negated in (torch._neg_view(cis), torch._neg_view(cis).conj()):
        with pytest.raises(TypeError, match=r"^rope_complex: cis .* got a lazily neg"):
            posenc.rope_complex(x, negated)
    got = posenc.rope_complex(x, cis.conj().resolve_conj())
    assert torch.equal(got, posenc.rope_complex(x, cis, adjoint=True))


def test_tensors_with_a_tangent_are_refused_and_others_taken_beside_them():
    x, (cos, sin) = random((3, 5, 16)), table(5, 8)
    want = posenc.rope(x, cos, sin)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(TypeError, match=r"got a dual tensor of forward-mode deriv"):
            posenc.rope(dual, cos, sin)
        assert torch.equal(posenc.rope(x, cos, sin), want)


def test_tensors_whose_memory_is_gone_are_refused():
    x, (cos, sin) = random((2, 3, 5, 16)), table(5, 8)
    rule = "^rope: x must be a plain CPU tensor; got a tensor without memory"
    with pytest.raises(TypeError, match=rule):
        torch.func.functionalize(lambda x: posenc.rope(x, cos, sin))(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=rule):
        posenc.rope(x, cos, sin)


def test_a_result_beyond_all_memory_is_an_error():
    # So many elements that their bytes, counted in 64 bits, would be none.
    x = torch.zeros(2).as_strided((1, 2**61, 2), (0, 0, 1))
    cos, sin = torch.zeros(1, 1), torch.zeros(1, 1)
    with pytest.raises(MemoryError):
        posenc.rope(x, cos, sin, axis=0)


def test_inside_function_transforms_tensors_are_refused():
    x, (cos, sin) = random((3, 5, 16)), table(5, 8)
    rule = "^rope: x must be a plain CPU tensor; got a tensor without memory"
    with pytest.raises(TypeError, match=rule):
        torch.func.vmap(lambda row: posenc.rope(row, cos, sin))(x)
    with pytest.raises(TypeError, match=r"^rope: x must need no gradient"):
        torch.func.grad(lambda row: posenc.rope(row, cos, sin).sum())(x)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda x: x.to(torch.float8_e4m3fn),
            "have a dtype that NumPy knows; got torc",
        ),
        (lambda x: x + 0j, "be float16, bfloat16, float32 or float64; got dtype comp"),
    ],
)
def test_other_types_are_refused(make, says):
    x, (cos, sin) = random((2, 3, 5, 16)), table(5, 8)
    with pytest.raises(TypeError, match=f"^rope: x must {says}"):
        posenc.rope(make(x), cos, sin)
    with pytest.raises(TypeError, match=f"^rope: sin must {says}"):
        posenc.rope(x, cos, make(sin))


def test_out_is_of_the_kind_of_x():
    x, (cos, sin) = random((2, 3, 5, 16)), table(5, 8)
    array = array_of(x)
    before = array.copy()
    with pytest.raises(TypeError, match=r"^rope: out must be a torch.Tensor; got nd"):
        posenc.rope(x, cos, sin, out=array)
    with pytest.raises(TypeError, match=r"^rope: out must be a plain NumPy array; got"):
        posenc.rope(array, cos, sin, out=x)
    with pytest.raises(TypeError, match=r"^rope_qk: out\[1\] must be a torch.Tensor"):
        posenc.rope_qk(x, x, cos, sin, out=(x, array))
    with pytest.raises(
        TypeError, match=r"^rope: out must have dtype float32; got dtyp"
    ):
        posenc.rope(x, cos, sin, out=x.double())
    with pytest.raises(ValueError, match=r"^rope_qk: out must hold two arrays that do"):
        posenc.rope_qk(x, x, cos, sin, out=(x, x))
    reference.same_bits(array, before)
    reference.same_bits(array_of(x), before)


# --- tables, and the rest ------------------------------------------------------------


@pytest.mark.parametrize("angles", ["exact", "float32"])
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, torch.float32, torch.float64], ids=str
)
def test_table_of_tensors(angles, dtype):
    positions = torch.arange(12).reshape(3, 4) * 1000
    inv_freq, factor = posenc.rope_inv_freq(16)
    options = {"angles": angles, "attention_factor": factor, "dtype": dtype}
    got = posenc.rope_table(positions, torch.from_numpy(inv_freq), **options)
    want = posenc.rope_table(positions.numpy(), inv_freq, **options)
    for left, right in zip(got, want, strict=True):
        assert isinstance(right, np.ndarray)
        same_bits(left, right)
    out = tuple(torch.zeros_like(part) for part in got)
    there = posenc.rope_table(positions, inv_freq, **options, out=out)
    for left, right, place in zip(there, want, out, strict=True):
        assert left is place
        same_bits(left, right)
    with pytest.raises(
        TypeError, match=r"^rope_table: out\[0\] must be a torch.Tensor"
    ):
        posenc.rope_table(positions, inv_freq, **options, out=want)
    with pytest.raises(ValueError, match=r"^rope_table: out must hold two arrays that"):
        posenc.rope_table(positions, inv_freq, **options, out=(out[0], out[0]))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, "c8"], ids=str)
def test_complex_table_of_tensors(dtype):
    positions = torch.arange(5)
    got = posenc.rope_cis(positions, [1.0, 0.1], dtype=dtype)
    want = posenc.rope_cis(positions.numpy(), [1.0, 0.1], dtype=array_of(got).dtype)
    reference.same_bits(array_of(got), want)
    out = torch.zeros_like(got)
    assert posenc.rope_cis(positions, [1.0, 0.1], dtype=dtype, out=out) is out
    assert torch.equal(out, got)


def test_table_dtypes_of_torch_are_named_in_errors():
    with pytest.raises(
        TypeError, match="dtype must be float32 or float64; got float16"
    ):
        posenc.rope_table([1], [1.0], dtype=torch.float16)
    with pytest.raises(TypeError, match=r"must be float32 or float64; got bfloat16"):
        posenc.rope_table([1], [1.0], dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"complex64 or complex128; got dtype"):
        posenc.rope_cis([1], [1.0], dtype=torch.complex32)


def tables_of(x, inv_freq):
    """All that functions make of positions and frequencies."""
    return [
        *posenc.rope_table(x, inv_freq),
        *posenc.rope_table_axial((2, x), inv_freq),
        *posenc.rope_table_sections(x, inv_freq, [1, 0, 1]),
        *posenc.rope_table_xpos(x, inv_freq),
        posenc.rope_cis(x, inv_freq),
        posenc.rope_matrix(x, inv_freq),
        posenc.rope_decay(x, inv_freq),
    ]


def test_tables_are_tensors_if_an_argument_is_one():
    x, inv_freq = np.array([0.0, 3.0, 1.5]), np.array([1.0, 0.1])
    arrays = tables_of(x, inv_freq)
    both = torch.from_numpy(x), torch.from_numpy(inv_freq)
    for given in (both, (x, both[1]), (both[0], inv_freq)):
        for tensor, array in zip(tables_of(*given), arrays, strict=True):
            assert type(array) is np.ndarray
            same_bits(tensor, array)


def test_grids_of_tensors():
    places = torch.tensor([0.5, 2.0, 7.0])
    got = posenc.sinusoidal_grid((2, places), 8)
    same_bits(got, posenc.sinusoidal_grid((2, places.numpy()), 8))
    assert type(posenc.sinusoidal_grid(torch.Size([2, 3]), 8)) is np.ndarray
    out = torch.zeros_like(got)
    version = out._version
    assert posenc.sinusoidal_grid((2, places), 8, out=out) is out
    assert torch.equal(out, got)
    assert out._version > version
    inv_freq = torch.tensor([1.0, 0.5])
    outs = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    versions = [out._version for out in outs]
    there = posenc.rope_table_axial((2, 3), inv_freq, out=outs)
    want = posenc.rope_table_axial((2, 3), inv_freq.numpy())
    for left, right, out, version in zip(there, want, outs, versions, strict=True):
        assert left is out
        assert out._version > version
        same_bits(left, right)
    with pytest.raises(TypeError, match=r"^rope_table_axial: out\[0\] must be a torch"):
        posenc.rope_table_axial((2, 3), inv_freq, out=want)
    with pytest.raises(TypeError, match=r"^sinusoidal_grid: out must be a torch.Tenso"):
        posenc.sinusoidal_grid((2, places), 8, out=np.empty((2, 3, 8), np.float32))


@pytest.mark.parametrize(
    ("parameter", "call"),
    [
        ("rope_table: positions", lambda t: posenc.rope_table(t, [1.0])),
        ("rope_cis: positions", lambda t: posenc.rope_cis(t, [1.0])),
        ("sinusoidal: positions", lambda t: posenc.sinusoidal(t, 4)),
        ("rope_decay: distance", lambda t: posenc.rope_decay(t, [1.0])),
        ("alibi_bias: k_positions", lambda t: posenc.alibi_bias([1.0], [2], t)),
        (
            "add_sinusoidal: positions",
            lambda t: posenc.add_sinusoidal(torch.zeros(3, 4), positions=t),
        ),
    ],
)
def test_booleans_are_no_positions(parameter, call):
    rule = "must hold real numbers that float64 can hold; got dtype bool"
    with pytest.raises(TypeError, match=f"^{parameter} {rule}$"):
        call(torch.tensor([True, False, True]))


def test_tables_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        cos, sin = posenc.rope_table(torch.arange(5, device="cpu"), [1.0])
    assert cos.is_cpu
    assert sin.is_cpu


def test_matrix_of_tensors():
    got = posenc.rope_matrix(torch.tensor([1.0, 2.0]), [1.0, 0.1])
    same_bits(got, posenc.rope_matrix([1.0, 2.0], [1.0, 0.1]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("to", ["half", "interleaved"])
def test_permute_layout_of_any_tensor(dtype, to):
    w = torch.arange(24 * 5).reshape(24, 5) % 7
    want = posenc.permute_layout(w.numpy(), 12, to=to)
    got = posenc.permute_layout(w.to(dtype), 12, to=to)
    assert got.dtype is dtype
    assert torch.equal(got.to(torch.int64), torch.from_numpy(want))
    assert posenc.permute_layout(w.to("meta"), 12, to=to).is_meta


def test_permute_layout_has_a_gradient():
    w = random((24, 5)).requires_grad_()
    weights = random((24, 5), seed=1)
    (posenc.permute_layout(w, 12, to="half") * weights).sum().backward()
    assert torch.equal(w.grad, posenc.permute_layout(weights, 12, to="interleaved"))


def test_torch_may_be_imported_later():
    code = (
        "import posenc, numpy, sys; x = numpy.ones((5, 16), 'f4');"
        "tables = posenc.rope_table(range(5), posenc.rope_inv_freq(16)[0]);"
        "want = posenc.rope(x, *tables); assert 'torch' not in sys.modules;"
        "import torch; got = posenc.rope(torch.from_numpy(x), *tables);"
        "assert isinstance(got, torch.Tensor); assert (got.numpy() == want).all()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
