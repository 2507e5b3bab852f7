"""CoPE's steps and bias: against the paper's listing, masks, edges, gradients."""

# SPDX-License-Identifier: BSD-3-Clause

import mpmath
import numpy as np
import pytest
import reference
from ml_dtypes import bfloat16

import posenc
from posenc import _core

torch = pytest.importorskip("torch")

# Of the float32 listing's greatest error on the same numbers: a tenth, but with few
# positions the roundings of the interpolation are as large as all the rest.
SHARE_OF_LISTING = {5: 0.5, 16: 0.3, 64: 0.1, 200: 0.1, 1500: 0.05}
# In float64, both differ by the order of sums up to P in size, times differences of z.
FLOAT64_ERROR = 1e-12
# Gradients sum up to S terms of size one.
GRADIENT_ERROR = {np.float64: 1e-11, np.float32: 2e-4}


def listing(logits, z):
    """Bias of appendix B of the paper, with logits of -inf where a key is hidden."""
    gates = torch.sigmoid(logits)
    pos = gates.flip(-1).cumsum(dim=-1).flip(-1)
    pos = pos.clamp(max=z.shape[-1] - 1)
    pos_ceil = pos.ceil().long()
    pos_floor = pos.floor().long()
    logits_ceil = z.gather(-1, pos_ceil)
    logits_floor = z.gather(-1, pos_floor)
    w = pos - pos_floor
    return logits_ceil * w + logits_floor * (1 - w)


def seen_by(n_query, n_key):
    """Causal: the last query sees the last key."""
    return np.tri(n_query, n_key, n_key - n_query, dtype=bool)


def expected(logits, z, seen=True, dtype=torch.float64):
    """Return the listing's bias in a type of torch, 0 where a key is hidden."""
    seen = torch.tensor(np.broadcast_to(seen, logits.shape))
    logits = torch.tensor(logits, dtype=dtype).masked_fill(~seen, -torch.inf)
    bias = listing(logits, torch.tensor(z, dtype=dtype))
    return torch.where(seen, bias, 0).double().numpy()


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- values --------------------------------------------------------------------------


@pytest.mark.parametrize("n_position", SHARE_OF_LISTING)
@pytest.mark.parametrize("causal", [True, False])
def test_float32_is_nearer_to_the_truth_than_the_listing(n_position, causal, measured):
    logits, z = normal(4, 300, 1100), normal(4, 300, n_position, seed=1)
    seen = seen_by(300, 1100) if causal else True
    true = expected(logits, z, seen)
    theirs = np.abs(expected(logits, z, seen, torch.float32) - true).max()
    ours = np.abs(posenc.cope_bias(logits, z, causal=causal) - true).max()
    assert ours <= SHARE_OF_LISTING[n_position] * theirs
    measured(
        f"cope_bias, {n_position} positions, causal={causal}: error {ours:.1e}, "
        f"{ours / theirs:.2f} of the float32 listing's"
    )


@pytest.mark.parametrize("n_position", [1, 2, 3, 17, 63, 64, 65, 128, 300])
@pytest.mark.parametrize("n_key", [1, 2, 15, 16, 17, 33, 200])
@pytest.mark.parametrize("n_query", [1, 5, 40])
def test_float64_is_the_listing(n_position, n_key, n_query):
    logits = normal(2, n_query, n_key, dtype=np.float64)
    z = normal(2, n_query, n_position, seed=1, dtype=np.float64)
    seen = seen_by(n_query, n_key)
    got = posenc.cope_bias(logits, z)
    np.testing.assert_allclose(got, expected(logits, z, seen), 0, FLOAT64_ERROR)
    narrow = posenc.cope_bias(logits.astype("f"), z.astype("f"))
    np.testing.assert_allclose(narrow, got, 0, 1e-4)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@pytest.mark.parametrize("n_position", [3, 64, 70, 2000])
def test_16_bit_data_are_rounded_once(dtype, n_position):
    logits = normal(3, 40, 333).astype(dtype)
    z = normal(3, 40, n_position, seed=1).astype(dtype)
    wide = posenc.cope_bias(logits.astype("f"), z.astype("f"))
    reference.same_bits(posenc.cope_bias(logits, z), wide.astype(dtype))
    reference.same_bits(posenc.cope_bias(logits, z.astype("f")), wide.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gates_are_within_2_ulp(dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.uniform(-110, 40, 900),
            rng.uniform(-760, -90, 100),
            [17.0, 16.5, -0.0, 1e-40],
        ]
    ).astype(dtype)
    gates = posenc.cope_gates(x)
    for value, gate in zip(x, gates, strict=True):
        with mpmath.mp.workprec(200):
            true = 1 / (1 + mpmath.exp(-mpmath.mpf(float(value))))
        assert reference.ulp_error(gate, true, dtype) <= 2
    assert (gates[x >= 37] == 1).all()
    assert posenc.cope_gates(np.float32(17)) == 1


def test_the_steps_together_are_the_bias():
    logits, z = normal(2, 30, 100, dtype="d"), normal(2, 30, 20, seed=1, dtype="d")
    gates = posenc.cope_gates(logits)
    positions = posenc.cope_positions(gates, 20)
    got = posenc.cope_interpolate(z, positions)
    reference.same_bits(got, posenc.cope_bias(logits, z, causal=False))


def test_whole_positions_are_entries_of_z():
    logits = np.where(np.arange(9) % 2, 40, -np.inf).astype("f")[None]
    z = normal(1, 4)
    got = posenc.cope_bias(logits, z, causal=False)[0]
    at = [3, 3, 3, 3, 3, 2, 2, 1, 0]
    np.testing.assert_array_equal(got, np.where(logits[0] > 0, z[0, at], 0))


def test_saturated_keys_get_the_last_entry_exactly():
    logits, z = normal(50, 700) + 3, normal(50, 9, seed=1)
    bias = posenc.cope_bias(logits, z, causal=False)
    np.testing.assert_array_equal(bias[:, :600], np.repeat(z[:, 8:], 600, 1))


# --- masks ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (7, 40), (40, 7), (1, 100), (100, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hidden_keys_do_not_count(shape, dtype):
    """By causality, by a mask and by -inf: the same bits, 0 where hidden."""
    logits, z = (
        normal(2, *shape, dtype=dtype),
        normal(2, shape[0], 6, seed=1, dtype=dtype),
    )
    mask = np.random.default_rng(2).random((2, *shape)) < 0.6
    seen = mask & seen_by(*shape)
    hidden = np.where(seen, logits, dtype(-np.inf))
    got = posenc.cope_bias(logits, z, mask=mask)
    np.testing.assert_allclose(got, expected(logits, z, seen), 0, 1e-5)
    reference.same_bits(posenc.cope_bias(logits, z, causal=False, mask=seen), got)
    reference.same_bits(posenc.cope_bias(hidden, z, causal=False), got)
    reference.same_bits(posenc.ufunc.cope_bias(hidden, z), got)
    assert not got[~seen].any()


def test_what_is_hidden_is_not_read():
    logits, z = normal(60, 60), normal(60, 64, seed=1)
    want = posenc.cope_bias(logits, z)
    spoilt = np.where(seen_by(60, 60), logits, np.nan)
    reference.same_bits(posenc.cope_bias(spoilt.astype("f"), z), want)
    reference.same_bits(
        posenc.cope_bias(spoilt.astype("f"), z, mask=seen_by(60, 60)), want
    )


def test_padding_is_broadcast():
    logits, z = normal(2, 3, 20, 20), normal(2, 3, 20, 8, seed=1)
    padding = np.ones((2, 1, 1, 20), bool)
    padding[0, ..., 15:] = padding[1, ..., :4] = False
    seen = padding & seen_by(20, 20)
    got = posenc.cope_bias(logits, z, mask=padding)
    np.testing.assert_allclose(got, expected(logits, z, seen), 0, 1e-5)


def test_decoding_gives_the_rows_of_the_whole():
    logits, z = normal(3, 50, 50), normal(3, 50, 12, seed=1)
    whole = posenc.cope_bias(logits, z)
    for t in (1, 16, 33, 50):
        last = posenc.cope_bias(logits[:, t - 1 : t, :t], z[:, t - 1 : t])
        reference.same_bits(last, whole[:, t - 1 : t, :t])


def test_leading_axes_are_broadcast():
    logits, z = normal(3, 1, 5, 20), normal(2, 5, 8, seed=1)
    got = posenc.cope_bias(logits, z)
    assert got.shape == (3, 2, 5, 20)
    same = posenc.cope_bias(
        *(
            np.ascontiguousarray(np.broadcast_to(x, (3, 2, *x.shape[-2:])))
            for x in (logits, z)
        )
    )
    reference.same_bits(got, same)
    reference.same_bits(
        posenc.cope_bias(logits, z[0, 0])[0, 0],
        posenc.cope_bias(logits[0, 0], np.tile(z[0, 0], (5, 1))),
    )


# --- bad numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16])
@pytest.mark.parametrize("place", [3, 100, 299])
def test_nan_spoils_what_lies_left_of_it_in_its_row(dtype, place):
    logits, z = normal(3, 300).astype(dtype), normal(3, 10, seed=1).astype(dtype)
    want = posenc.cope_bias(logits, z, causal=False)
    logits[1, place] = -np.array(np.nan, dtype)
    got = posenc.cope_bias(logits, z, causal=False)
    want[1, : place + 1] = np.nan
    reference.same_bits(got, want)
    z[0, 9] = np.nan
    got = posenc.cope_bias(logits, z, causal=False)
    assert np.isnan(got[0, :200].astype("f")).all()
    reference.same_bits(got[1:], want[1:])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_in_is_nothing_out(shape):
    logits, z = normal(2, *shape), normal(2, shape[0], 4)
    assert posenc.cope_bias(logits, z).shape == (2, *shape)
    assert posenc.ufunc.cope_bias(logits, z).shape == (2, *shape)


# --- memory --------------------------------------------------------------------------


def layouts(array):
    """The same numbers in other memory."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype)
    raw = raw.reshape(array.shape)
    raw[...] = array
    return [
        np.asfortranarray(array),
        wide[..., ::2],
        array[::-1, ::-1].copy()[::-1, ::-1],
        raw,
        array.astype(array.dtype.newbyteorder()),
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_any_memory(dtype):
    logits, z = normal(20, 70).astype(dtype), normal(20, 9, seed=1).astype(dtype)
    mask = np.random.default_rng(0).random((20, 70)) < 0.7
    want = posenc.cope_bias(logits, z, mask=mask)
    for x, table in zip(layouts(logits), layouts(z), strict=True):
        reference.same_bits(
            posenc.cope_bias(x, table, mask=np.asfortranarray(mask)), want
        )
    for out in layouts(np.zeros_like(logits))[:4]:
        assert posenc.cope_bias(logits, z, mask=mask, out=out) is out
        reference.same_bits(out, want)


def test_in_place_and_overlap():
    logits, z = normal(4, 40, 64), normal(4, 40, 64, seed=1)
    want = posenc.cope_bias(logits, z)
    again = logits.copy()
    assert posenc.cope_bias(again, z, out=again) is again
    reference.same_bits(again, want)
    table = z.copy()
    posenc.cope_bias(logits, table, out=table)
    reference.same_bits(table, want)
    memory = np.zeros(logits.size + 5, np.float32)
    x, out = memory[5:].reshape(logits.shape), memory[:-5].reshape(logits.shape)
    x[...] = logits
    posenc.cope_bias(x, z, out=out)
    reference.same_bits(out, want)


def test_tensors_and_their_kinds():
    logits, z = torch.tensor(normal(3, 10, 20)), torch.tensor(normal(3, 10, 5, seed=1))
    got = posenc.cope_bias(logits, z)
    assert isinstance(got, torch.Tensor)
    reference.same_bits(got, posenc.cope_bias(logits.numpy(), z.numpy()))
    short = posenc.cope_bias(logits.bfloat16(), z)
    assert short.dtype == torch.bfloat16
    out = torch.empty(3, 10, 20)
    version = out._version
    assert posenc.cope_bias(logits, z, out=out) is out
    assert out._version > version
    for function in (
        posenc.cope_gates,
        lambda x, **o: posenc.cope_positions(x, 3, **o),
        lambda x, **o: posenc.cope_interpolate(z, x, **o),
    ):
        assert function(logits, out=out) is out
        reference.same_bits(function(logits), out)
    with pytest.raises(TypeError, match=r"posenc\.torch\.cope_bias gives gradients"):
        posenc.cope_bias(logits.requires_grad_(), z)


def test_dask():
    da = pytest.importorskip("dask.array")
    logits, z = normal(4, 10, 20), normal(4, 10, 5, seed=1)
    mask = np.arange(20) > 3
    lazy = posenc.cope_bias(
        da.from_array(logits, chunks=(2, 5, -1)),
        da.from_array(z, chunks=(2, 5, -1)),
        mask=mask,
    )
    assert isinstance(lazy, da.Array)
    reference.same_bits(lazy.compute(), posenc.cope_bias(logits, z, mask=mask))


def test_a_large_result_is_the_same_as_its_rows():
    """Past the caches, by any number of threads."""
    logits, z = normal(4, 1000, 1024), normal(4, 1000, 64, seed=1)
    logits[1, 5, 3] = np.nan
    rows = [
        posenc.cope_bias(logits[:, i : i + 1, : 25 + i], z[:, i : i + 1])
        for i in range(0, 1000, 111)
    ]
    try:
        for n in (1, 2, 3, 8):
            posenc.set_num_threads(n)
            whole = posenc.cope_bias(logits, z)
            for i, row in zip(range(0, 1000, 111), rows, strict=True):
                reference.same_bits(whole[:, i : i + 1, : 25 + i], row)
    finally:
        posenc.set_num_threads(None)


# --- gradients -----------------------------------------------------------------------


def gradients(logits, z, mask, causal, grad):
    real = np.float64 if logits.dtype == np.float64 else np.float32
    dlogits, dz = np.full(logits.shape, 7, real), np.full(z.shape, 7, real)
    _core.cope_bias_backward_arrays(logits, z, mask, causal, grad, dlogits, dz)
    return dlogits, dz


def true_gradients(logits, z, seen, grad):
    logits = torch.tensor(logits.astype("d"), requires_grad=True)
    z = torch.tensor(z.astype("d"), requires_grad=True)
    seen = torch.tensor(np.broadcast_to(seen, logits.shape))
    bias = listing(logits.masked_fill(~seen, -torch.inf), z)
    torch.where(seen, bias, 0).backward(torch.tensor(grad.astype("d")))
    return logits.grad.numpy(), z.grad.numpy()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n_position", [1, 2, 16, 64, 500])
@pytest.mark.parametrize("shape", [(30, 30), (3, 200), (40, 7)])
@pytest.mark.parametrize("is_masked", [True, False])
def test_gradients_are_the_listings(dtype, n_position, shape, is_masked):
    logits = normal(2, *shape, dtype=dtype)
    z, grad = (
        normal(2, shape[0], n_position, seed=1, dtype=dtype),
        normal(2, *shape, seed=2),
    )
    mask = np.random.default_rng(3).random((2, *shape)) < 0.7 if is_masked else None
    seen = seen_by(*shape) & (True if mask is None else mask)
    got = gradients(logits, z, mask, True, grad.astype(dtype))
    for mine, true in zip(got, true_gradients(logits, z, seen, grad), strict=True):
        np.testing.assert_allclose(mine, true, 0, GRADIENT_ERROR[dtype])


def test_nothing_flows_into_whole_positions():
    """As in the listing, whose ceiling is then its floor."""
    logits, z = np.full((1, 6), 40.0), normal(1, 9, dtype="d")
    dlogits, dz = gradients(logits, z, None, False, np.ones((1, 6)))
    assert not dlogits.any()
    assert dz.tolist() == [[0, 1, 1, 1, 1, 1, 1, 0, 0]]


def test_gradients_of_16_bit_data_are_float32():
    logits, z, grad = normal(5, 40), normal(5, 9, seed=1), normal(5, 40, seed=2)
    short = [x.astype(bfloat16) for x in (logits, z, grad)]
    got = gradients(short[0], short[1], None, True, short[2])
    want = gradients(
        *(x.astype("f") for x in short[:2]), None, True, short[2].astype("f")
    )
    for mine, same in zip(got, want, strict=True):
        reference.same_bits(mine, same)


def test_nan_spoils_gradients_of_its_row_only():
    logits, z, grad = normal(3, 50), normal(3, 9, seed=1), normal(3, 50, seed=2)
    want = gradients(logits, z, None, False, grad)
    logits[1, 20] = np.nan
    got = gradients(logits, z, None, False, grad)
    for mine, same in zip(got, want, strict=True):
        assert np.isnan(mine[1]).all()
        reference.same_bits(mine[::2], same[::2])


def test_gradients_are_the_same_for_any_number_of_threads():
    logits, z, grad = (
        normal(9, 200, 150),
        normal(9, 200, 30),
        normal(9, 200, 150, seed=2),
    )
    found = []
    try:
        for n in (1, 2, 5):
            posenc.set_num_threads(n)
            found.append(gradients(logits, z, None, True, grad))
    finally:
        posenc.set_num_threads(None)
    for other in found[1:]:
        for mine, same in zip(other, found[0], strict=True):
            reference.same_bits(mine, same)


def test_the_private_door_wants_what_was_agreed():
    logits, z = normal(2, 3, 4), normal(2, 3, 5)
    for arguments in [
        (),
        (logits, z, None, True, z),
        (logits, z[:1], None, True, logits),
        (logits, z, None, 1, logits),
        (logits, z.astype("d"), None, True, logits),
        (logits, z, z, True, logits),
        (logits[0, 0], z, None, True, logits),
    ]:
        with pytest.raises(TypeError, match="cope_bias_arrays: arguments must"):
            _core.cope_bias_arrays(*arguments)
    with pytest.raises(TypeError, match="cope_bias_backward_arrays: arguments must"):
        _core.cope_bias_backward_arrays(logits, z, None, True, logits, logits, logits)
