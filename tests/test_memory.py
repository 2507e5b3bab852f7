"""References and memory: every call, good or bad, leaves them as they were."""

# SPDX-License-Identifier: BSD-3-Clause

import gc
import sys
import tracemalloc

import numpy as np
import pytest
import test_errors

import posenc

CALLS = 2000
# Caches may grow by a few thousand bytes once; a leak grows with each call, and the
# smallest object a call can leak, a float, is three times this.
MOST_BYTES = CALLS * 8

GOOD = (
    "rope(x, cos, sin)",
    "rope(x, cos, sin, out=out)",
    "rope(x, cos, sin, layout='interleaved', axis=-2, out=x)",
    "rope(x, rows, rows, positions=positions)",
    "rope(x, rows, rows, positions=positions.astype('u2'), adjoint=True)",
    "rope(x, cos, sin, inverse=True)",
    "rope(x, cos.astype('f8'), sin)",
    "rope(x[:, :, ::-1], cos, sin, out=x)",
    "rope_qk(x, k, cos, sin)",
    "rope_qk(x, k, cos, sin, out=(out, k_out))",
    "rope_qk(x, k, rows, rows, positions=positions)",
    "rope_complex(x, cis)",
    "rope_complex(x, cis, inverse=True, out=out)",
    "rope_table(positions, inv_freq)",
    "rope_table(positions, inv_freq, dtype='f8', out=(wide, wide.copy()))",
    "rope_cis(positions, inv_freq)",
    "rope_matrix(positions, inv_freq)",
    "rope_inv_freq(8, scaling={'rope_type': 'ntk', 'alpha': 2})",
    "permute_layout(w, 12, to='half')",
    "ufunc.rope_half(x, cos, sin)",
    "ufunc.rope_interleaved(x, cos, sin, out=x)",
    "ufunc.rope_complex(x, cis)",
    "ufunc.cos_sin(wide, inv_freq, dtype=np.float32)",
    "build_info()",
)
BAD = tuple(call for call, _ in test_errors.cases())


def repeat(code, names, times):
    for _ in range(times):
        try:
            eval(code, names)
        except (TypeError, ValueError):
            continue


@pytest.mark.parametrize("call", GOOD + BAD)
def test_references_come_back(call):
    arrays = test_errors.arrays()
    names = {**test_errors.TOOLS, **test_errors.FUNCTIONS, **arrays}
    code = compile(call, "call", "eval")
    repeat(code, names, 3)
    watched = [*arrays.values(), posenc.ufunc.rope_half, NotImplemented]
    # Not float64's: np.empty without a dtype keeps one reference to it per call.
    watched += [np.dtype(np.float32), np.dtype(np.int64)]
    before = [sys.getrefcount(thing) for thing in watched]
    repeat(code, names, 20)
    after = [sys.getrefcount(thing) for thing in watched]
    gains = [now - then for now, then in zip(after, before, strict=True)]
    assert max(gains) < 20
    assert min(gains) > -20


@pytest.mark.parametrize("call", GOOD)
def test_memory_comes_back(call):
    names = {**test_errors.TOOLS, **test_errors.FUNCTIONS, **test_errors.arrays()}
    code = compile(call, "call", "eval")
    repeat(code, names, 10)
    gc.collect()
    tracemalloc.start()
    try:
        repeat(code, names, 10)
        gc.collect()  # also empties the lists of objects kept for reuse
        before = tracemalloc.get_traced_memory()[0]
        repeat(code, names, CALLS)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < MOST_BYTES
