"""Results that go to memory of a subclass, np.memmap: as to that of plain arrays."""

# SPDX-License-Identifier: BSD-3-Clause

import inspect

import numpy as np
import pytest
import reference

import posenc

X = np.random.default_rng(0).standard_normal((2, 5, 9)).astype(np.float32)
LOGITS = np.random.default_rng(1).standard_normal((3, 5, 5)).astype(np.float32)
INV_FREQ = np.array([1.0, 0.1, 0.01])
COS, SIN = posenc.rope_table(np.arange(5), INV_FREQ)
CIS = COS + 1j * SIN
MLP = [([[2.0]], [0.0]), ([[-1.0]], [0.0])]
BIAS = (range(5), range(5))

CALLS = {
    "sinusoidal": lambda out: posenc.sinusoidal(np.arange(5), 9, out=out),
    "sinusoidal_grid": lambda out: posenc.sinusoidal_grid((2, 3), 4, out=out),
    "sinusoidal_similarity": lambda out: posenc.sinusoidal_similarity(
        [1, 2], [3, 4, 5], 8, out=out
    ),
    "add_sinusoidal": lambda out: posenc.add_sinusoidal(X, scale=0.5, out=out),
    "add_learned": lambda out: posenc.add_learned(X, X[0], scale=0.5, out=out),
    "extend_table": lambda out: posenc.extend_table(X[0], 20, out=out),
    "rope": lambda out: posenc.rope(X, COS, SIN, out=out),
    "rope_qk": lambda out: posenc.rope_qk(X, X, COS, SIN, out=out),
    "rope_complex": lambda out: posenc.rope_complex(X, CIS, out=out),
    "rope_cis": lambda out: posenc.rope_cis(range(5), INV_FREQ, out=out),
    "rope_table": lambda out: posenc.rope_table(range(5), INV_FREQ, out=out),
    "rope_table_axial": lambda out: posenc.rope_table_axial((2, 3), INV_FREQ, out=out),
    "rope_table_sections": lambda out: posenc.rope_table_sections(
        [range(5)] * 3, INV_FREQ, [1, 1, 1], out=out
    ),
    "rope_table_xpos": lambda out: posenc.rope_table_xpos(range(5), INV_FREQ, out=out),
    "rope_decay": lambda out: posenc.rope_decay(np.arange(5), INV_FREQ, out=out),
    "cope_gates": lambda out: posenc.cope_gates(LOGITS, out=out),
    "cope_positions": lambda out: posenc.cope_positions(LOGITS, 3, out=out),
    "cope_interpolate": lambda out: posenc.cope_interpolate(LOGITS, LOGITS, out=out),
    "cope_bias": lambda out: posenc.cope_bias(LOGITS, LOGITS, out=out),
    "cope_attention": lambda out: posenc.cope_attention(
        LOGITS, LOGITS, LOGITS, LOGITS[0], out=out
    ),
    "t5_bucket": lambda out: posenc.t5_bucket(np.arange(9), out=out),
    "t5_bias": lambda out: posenc.t5_bias(X[0, :4], *BIAS, out=out),
    "alibi_bias": lambda out: posenc.alibi_bias([0.5, 1.0], *BIAS, out=out),
    "kerple_bias": lambda out: posenc.kerple_bias([0.5], [1.0], *BIAS, out=out),
    "fire_bias": lambda out: posenc.fire_bias(MLP, *BIAS, out=out),
    "sandwich_bias": lambda out: posenc.sandwich_bias(2, 8, *BIAS, out=out),
}


@pytest.mark.parametrize("name", CALLS)
def test_result_goes_to_a_file(name, tmp_path):
    want = CALLS[name](None)
    wants = want if isinstance(want, tuple) else (want,)
    files = tuple(
        np.memmap(tmp_path / f"{i}", part.dtype, "w+", shape=part.shape)
        for i, part in enumerate(wants)
    )
    out = files if isinstance(want, tuple) else files[0]
    got = CALLS[name](out)
    got = got if isinstance(got, tuple) else (got,)
    for result, file, part in zip(got, files, wants, strict=True):
        assert result is file
        reference.same_bits(np.asarray(file), part)


@pytest.mark.parametrize("name", ["add_sinusoidal", "add_learned"])
def test_sum_in_place_in_a_file(name, tmp_path):
    table = [X[0]] if name == "add_learned" else []
    file = np.memmap(tmp_path / "x", X.dtype, "w+", shape=X.shape)
    file[...] = X
    function = getattr(posenc, name)
    assert function(file, *table, out=file) is file
    reference.same_bits(np.asarray(file), function(X, *table))


def test_every_function_with_an_out_is_here():
    functions = {name: getattr(posenc, name) for name in posenc.__all__}
    with_out = {
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and "out" in inspect.signature(function).parameters
    }
    assert with_out == set(CALLS)
