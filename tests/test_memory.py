"""References and memory: every call, good or bad, leaves them as they were."""

# SPDX-License-Identifier: BSD-3-Clause

import gc
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import reference
import test_errors
from fuzz_doors import tensor_of
from ml_dtypes import bfloat16

import posenc
from posenc import _core

CALLS = 500
# Caches may grow by a few thousand bytes once; a leak grows with each call, and the
# smallest object that a call can leak, a float, has 24.
MOST_BYTES = CALLS * 20

GOOD = (
    "rope(x, cos, sin)",
    "rope(x, cos, sin, out=out)",
    "rope(x, cos, sin, layout='interleaved', axis=-2, out=x)",
    "rope(x, rows, rows, positions=positions)",
    "rope(x, rows, rows, positions=positions.astype('u2'), adjoint=True)",
    "rope(x, cos, sin, inverse=True)",
    "rope(x, cos.astype('f8'), sin)",
    "rope(x[:, :, ::-1], cos, sin, out=x)",
    "rope(x, rows, rows, offset=2)",
    "rope(x, rows, rows, offset=np.array([2, 0]))",
    "rope(x, rows, rows, cu_seqlens=[0, 2, 5])",
    "rope(short, cos, sin)",
    "rope(short, cos, sin, rounding='eager', rotary_start=-12, out=short)",
    "rope(short, cos.astype(bfloat16), sin.astype(bfloat16))",
    "rope_qk(x, k, cos, sin)",
    "rope_qk(x, k, cos, sin, out=(out, k_out))",
    "rope_qk(x, k, rows, rows, positions=positions)",
    "rope_qk(short, short[:, :1], cos, sin, rounding='eager')",
    "rope_complex(x, cis)",
    "rope_complex(x, cis, inverse=True, out=out)",
    "rope_complex(short, cis)",
    "rope_table(positions, inv_freq)",
    "rope_table(positions, inv_freq, dtype='f8', out=(wide, wide.copy()))",
    "rope_table_axial((4, positions), inv_freq)",
    "rope_table_sections(wide.T, inv_freq, [1] * 3, dtype='f8', out=(wide, wide + 0))",
    "rope_table_xpos(positions, inv_freq, keys=True)",
    "rope_cis(positions, inv_freq)",
    "rope_matrix(positions, inv_freq)",
    "rope_inv_freq(8, scaling={'rope_type': 'ntk', 'alpha': 2})",
    "permute_layout(w, 12, to='half')",
    "ufunc.rope_half(x, cos, sin)",
    "ufunc.rope_half(short, cos, sin)",
    "ufunc.rope_interleaved(x, cos, sin, out=x)",
    "ufunc.rope_complex(x, cis)",
    "ufunc.rope_complex(short, cis)",
    "ufunc.cos_sin(wide, inv_freq, dtype=np.float32)",
    "ufunc.rope_decay(wide, inv_freq)",
    "add_sinusoidal(x, padding_mask=np.zeros(5, bool))",
    "add_sinusoidal(x, positions=positions, out=out)",
    "add_learned(x, x[0, 0], offset=0)",
    "add_learned(short[..., :5], w, positions=positions)",
    "sinusoidal(wide, 7)",
    "t5_bias(weight, range(5), positions)",
    "alibi_bias(slopes, range(4), range(5))",
    "rope_decay(wide, inv_freq, dtype=np.float32)",
    "build_info()",
)
BAD = tuple(call for call, _ in test_errors.cases())

# With tensors of the same elements: their names end in _t.
GOOD_TENSORS = (
    "rope(x_t, cos_t, sin_t)",
    "rope(x_t, cos, sin)",
    "rope(x, cos_t, sin_t)",
    "rope(short_t, cos_t, sin, rounding='eager')",
    "rope(short_t.swapaxes(1, 2), cos_t, sin_t, axis=1, rotary_start=-12)",
    "rope(short_t, cos_t, sin_t, out=short_t)",
    "rope(x_t, cos_t, sin_t, out=out_t)",
    "rope(x_t.flip(1), cos_t, sin_t, out=x_t)",
    "rope(x_t, rows_t, rows_t, positions=positions_t)",
    "rope(x_t, rows_t, rows_t, positions=positions)",
    "rope(x_t, rows_t, rows_t, offset=2)",
    "rope(x_t, cos_t, sin_t, inverse=True)",
    "rope(x_t, cos_t.double(), sin_t)",
    "rope_qk(x_t, k_t, cos_t, sin_t)",
    "rope_qk(x_t, k_t, cos_t, sin_t, out=(x_t, k_t))",
    "rope_qk(x_t, k_t, cos_t, sin_t, out=(None, k_t))",
    "rope_qk(short_t, k_t, cos_t, sin_t)",
    "rope_complex(x_t, cis_t)",
    "rope_complex(short_t, cis_t, out=short_t)",
    "_core.rope_qk_twin(x_t, k_t, twin_t, twin_t, 'half', -2, None)",
    "_core.halves_agree(twin_t, twin_t)",
)
BAD_TENSORS = (
    "rope(x_t, cos_t[:4], sin_t[:4])",
    "rope(x_t, cos_t, sin_t, out=out)",
    "rope(x_t, cos_t, sin_t, out=out_t[:1])",
    "rope(x_t, rows_t, rows_t, positions=positions_t + 4)",
    "rope(x_t, rows_t, rows_t, offset=7)",
    "rope(x_t, cos_t, sin_t, layout='none')",
    "rope(x_t.clone().requires_grad_(), cos_t, sin_t)",
    "rope(x_t.to_sparse(), cos_t, sin_t)",
    "rope(x_t.to('meta'), cos_t, sin_t)",
    "rope_complex(x_t, cis_t.conj())",
    "rope_qk(x_t, k_t, cos_t, sin_t, out=(k_t, x_t))",
    "rope_qk(x_t, x_t, cos_t, sin_t, out=(out_t, out_t))",
)
# What the fast functions themselves leave to others, early and late.
DECLINED = (
    "_core.rope_arrays(x_t, cos_t[:4], sin_t, *options, None, 'once', 0)",
    "_core.rope_arrays(x_t, rows_t, rows_t, *options, None, 'once', 0)",
    "_core.rope_arrays(x_t, rows_t, rows_t, 'half', -2, 5, False, None, 'once', 0)",
    "_core.rope_arrays(x_t, cos_t, sin_t, *options, out, 'once', 0)",
    "_core.rope_qk_arrays(x_t, k_t[..., :4], cos_t, sin_t, *options, None, 'once', 0)",
    "_core.rope_qk_twin(x_t, k_t[:, :, :4], twin_t, twin_t, 'half', -2, None)",
    "_core.rope_complex_arrays(x_t, cis_t, 0, positions_t, True, None, 'once', 0)",
    "_core.rope_arrays(x, rows, rows, *options, None, 'once', 0)",
    "_core.rope_qk_arrays(x, k[..., :4], cos, sin, *options, None, 'once', 0)",
)
EVERY = GOOD + BAD + GOOD_TENSORS + BAD_TENSORS + DECLINED

# With a tensor of a mebibyte; the last ones are declined once there is a result.
LARGE = (
    "rope(x, cos, sin)",
    "rope(x.bfloat16(), cos, sin)",
    "rope(x, cos, sin, out=x)",
    "rope(x, rows, rows, offset=1)",
    "rope(x, cos, sin, inverse=True)",
    "rope_qk(x, x, cos, sin)",
    "rope_complex(x, cis)",
    "rope_qk(x, x[..., :4], cos, sin)",
    "_core.rope_arrays(x, rows, rows, *options, None, 'once', 0)",
    "_core.rope_qk_arrays(x, x[..., :4], cos, sin, *options, None, 'once', 0)",
    "_core.rope_qk_arrays(x, x, cos, sin, *options, (None, x[0]), 'once', 0)",
)
LARGE_CALLS = 100
# Fewer than a leak in a quarter of the calls would be; memory comes in chunks.
MOST_MEBIBYTES = 25


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Spare the collector the objects that torch and others have made by now."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def objects(call):
    """What a call may name: arrays and, if it wants some, tensors."""
    arrays = test_errors.arrays()
    options = {"options": ("half", -2, None, False)}
    arrays["twin"] = np.concatenate([arrays["cos"]] * 2, axis=-1)[None]
    arrays["short"] = np.repeat(arrays["x"], 2, axis=-1).astype(bfloat16)
    if "_t" in call and call not in GOOD + BAD:
        pytest.importorskip("torch")
        arrays.update({f"{name}_t": tensor_of(a) for name, a in arrays.items()})
    return {**arrays, **options}


def repeat(call, things, times):
    names = {**test_errors.TOOLS, **test_errors.FUNCTIONS, "_core": _core, **things}
    code = compile(call, "call", "eval")
    for _ in range(times):
        try:
            eval(code, names)
        except (TypeError, ValueError):
            continue


@pytest.mark.parametrize("call", EVERY)
def test_references_come_back(call):
    things = objects(call)
    repeat(call, things, 3)
    watched = [*things.values(), posenc.ufunc.rope_half, NotImplemented]
    # Not float64's: np.empty without a dtype keeps one reference to it per call.
    watched += [np.dtype(np.float32), np.dtype(np.int64), np.dtype(bfloat16)]
    before = [sys.getrefcount(thing) for thing in watched]
    repeat(call, things, 20)
    after = [sys.getrefcount(thing) for thing in watched]
    gains = [now - then for now, then in zip(after, before, strict=True)]
    assert max(gains) < 20
    assert min(gains) > -20


@pytest.mark.parametrize("call", GOOD + GOOD_TENSORS + DECLINED)
def test_memory_comes_back(call):
    things = objects(call)
    repeat(call, things, 10)
    gc.collect()
    tracemalloc.start()
    try:
        repeat(call, things, 10)
        gc.collect()  # also empties the lists of objects kept for reuse
        before = tracemalloc.get_traced_memory()[0]
        repeat(call, things, CALLS)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < MOST_BYTES


# --- the memory of tensors, which tracemalloc does not see ---------------------------


def large_tensors():
    torch = pytest.importorskip("torch")
    rows, turned = torch.randn(513, 32), torch.randn(512, 32)
    return {
        "x": torch.randn(1, 8, 512, 64),
        "rows": rows,
        "cos": rows[:512],
        "sin": turned,
        "cis": torch.complex(rows[:512], turned),
        "options": ("half", -2, None, False),
    }


# AddressSanitizer keeps what was freed, to see whether it is used.
tells_resident_size = pytest.mark.skipif(
    not Path("/proc/self/status").exists() or "POSENC_SANITIZED" in os.environ,
    reason="no /proc here, or a sanitizer keeps freed memory",
)


def resident_mebibytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@tells_resident_size
@pytest.mark.parametrize("call", LARGE)
def test_memory_of_large_tensors_comes_back(call):
    things = large_tensors()
    repeat(call, things, 10)
    before = resident_mebibytes()
    repeat(call, things, LARGE_CALLS)
    assert resident_mebibytes() - before < MOST_MEBIBYTES


@tells_resident_size
def test_memory_of_small_tensors_comes_back():
    """Of more than a kibibyte each: would they stay, some 60 mebibytes in all."""
    things = objects(GOOD_TENSORS[0])
    calls = GOOD_TENSORS[0], DECLINED[4]
    for call in calls:
        repeat(call, things, 100)
    before = resident_mebibytes()
    for call in calls:
        repeat(call, things, 20_000)
    assert resident_mebibytes() - before < MOST_MEBIBYTES


def test_a_result_lives_as_long_as_its_views():
    torch = pytest.importorskip("torch")
    given = large_tensors()
    x, cos, sin = given["x"], given["cos"], given["sin"]
    want = posenc.rope(x.numpy(), cos.numpy(), sin.numpy())
    views = [posenc.rope(x, cos, sin)[0, 3] for _ in range(20)]
    views += [torch.from_numpy(posenc.rope(x, cos, sin).numpy()[0, 3])]
    del given, x
    for view in views:
        reference.same_bits(view.numpy(), want[0, 3])
