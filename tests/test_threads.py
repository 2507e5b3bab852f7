"""Threads of any kind: the same bits, no hang, and nobody else's settings touched."""

# SPDX-License-Identifier: BSD-3-Clause

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference
from fuzz_doors import array_of, tensor_of
from gufuncs import PLANAR
from ml_dtypes import bfloat16

import posenc

HAS_OPENMP = posenc.build_info()["openmp"]
N_THREAD = (1, 2, 3, 4, 7)
PATIENCE = 120  # seconds: a child that hangs fails, it does not stop the run

needs_openmp = pytest.mark.skipif(not HAS_OPENMP, reason="built without OpenMP")


@pytest.fixture(autouse=True)
def back_to_openmps_number():
    yield
    posenc.set_num_threads(None)


def python(code, **environment):
    """Standard output of a fresh interpreter that runs `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def large(seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, 6, 501, 66)).astype(np.float32)
    k = rng.standard_normal((2, 2, 501, 66)).astype(np.float32)
    cos, sin = (rng.standard_normal((501, 32)).astype(np.float32) for _ in "cs")
    return q, k, cos, sin


def every_result(q, k, cos, sin):
    """Results of all functions that use threads, on large arrays."""
    positions = np.arange(501)[::-1]
    in_place = q.copy()
    cis = (cos + 1j * sin).astype(np.complex64)
    return [
        posenc.rope(q, cos, sin),
        posenc.rope(q, cos, sin, layout="interleaved", positions=positions),
        posenc.rope(q.swapaxes(1, 2), cos, sin, axis=1, inverse=True),
        posenc.rope(in_place, cos, sin, out=in_place),
        *posenc.rope_qk(q, k, cos, sin, adjoint=True),
        posenc.rope_complex(q, cis),
        *posenc.rope_table(np.arange(5000), np.linspace(1, 1e-5, 33)),
        *posenc.rope_table(np.arange(5000), np.linspace(1, 1e-5, 33), angles="float32"),
        posenc.rope_cis(np.arange(5000), np.linspace(1, 1e-5, 33)),
        posenc.ufunc.rope_half(q, cos, sin),
        posenc.ufunc.rope_half(q.swapaxes(1, 2), cos[:, None], sin[:, None]),
    ]


def typed(types, seed=0):
    """What `large` makes, in other types."""
    q, k, cos, sin = large(seed)
    kinds = [types.data] * 2 + [types.table] * 2
    return [a.astype(kind) for a, kind in zip((q, k, cos, sin), kinds, strict=True)]


def every_rotation(q, k, cos, sin):
    """Results of rotations of arrays or tensors, with both roundings."""
    positions = np.arange(q.shape[2])[::-1].copy()
    results = []
    for rounding in ("once", "eager"):
        in_place, options = copy.deepcopy(q), {"rounding": rounding}
        turned = posenc.rope(q, cos, sin, positions=positions, layout="interleaved",
                             **options)  # fmt: skip
        results += [
            turned,
            posenc.rope(
                q.swapaxes(1, 2), cos, sin, axis=1, rotary_start=-64, **options
            ),
            posenc.rope(in_place, cos, sin, adjoint=True, out=in_place, **options),
            *posenc.rope_qk(q, k, cos, sin, **options),
        ]
    return [array_of(result) for result in results]


def assert_same(got, want):
    for left, right in zip(got, want, strict=True):
        reference.same_bits(left, right)


def test_any_number_of_threads_gives_the_same_bits():
    arrays = large()
    posenc.set_num_threads(1)
    want = every_result(*arrays)
    for n in N_THREAD[1:]:
        posenc.set_num_threads(n)
        assert_same(every_result(*arrays), want)


@pytest.mark.parametrize("types", PLANAR, ids=str)
@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_any_number_of_threads_gives_the_same_bits_of_any_type(types, kind):
    given = typed(types)
    if kind == "tensors":
        pytest.importorskip("torch")
        given = list(map(tensor_of, given))
    posenc.set_num_threads(1)
    want = every_rotation(*given)
    for n in (2, 5):
        posenc.set_num_threads(n)
        assert_same(every_rotation(*given), want)


def test_several_python_threads_at_once_with_tensors():
    """Small calls keep the lock of Python, large ones give it up."""
    pytest.importorskip("torch")
    work = []
    for seed, types in enumerate(PLANAR):
        q, k, cos, sin = typed(types, seed)
        small = q[:, :, :9], k[:, :, :9], cos[:9], sin[:9]
        work += [list(map(tensor_of, given)) for given in ((q, k, cos, sin), small)]
    want = [every_rotation(*tensors) for tensors in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            got = pool.map(lambda tensors: every_rotation(*tensors), work)
            for left, right in zip(got, want, strict=True):
                assert_same(left, right)


def test_several_python_threads_at_once():
    work = [large(seed) for seed in range(4)]
    want = [every_result(*arrays) for arrays in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda arrays: every_result(*arrays), work))
            for left, right in zip(got, want, strict=True):
                assert_same(left, right)


def test_several_python_threads_change_the_number_meanwhile():
    arrays = large()
    want = every_result(*arrays)

    def work(n):
        posenc.set_num_threads(n)
        return every_result(*arrays)

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(work, N_THREAD):
            assert_same(got, want)


# --- fork ----------------------------------------------------------------------------

FORK = """
import os, sys, threading
import numpy as np
import posenc

x = np.random.default_rng(0).standard_normal((8, 500, 128)).astype(np.float32)
cos, sin = posenc.rope_table(np.arange(500), np.linspace(1, 1e-4, 64))

def results():
    return [
        posenc.rope(x, cos, sin),
        posenc.ufunc.rope_half(x, cos, sin),
        posenc.rope_table(np.arange(5000), np.linspace(1, 1e-4, 64))[0],
    ]

def child(depth):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    same = all(np.array_equal(a, b) for a, b in zip(results(), want))
    if depth and same:
        same = child(depth - 1) == 0
    os._exit(0 if same else 1)

want = results()
if {from_thread}:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(child(0)))
    thread.start()
    thread.join()
else:
    codes = [child(1)]
again = all(np.array_equal(a, b) for a, b in zip(results(), want))
print(posenc.get_num_threads(), codes, again)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("from_thread", [False, True], ids=["main", "thread"])
def test_a_forked_child_finishes_with_the_same_bits(from_thread):
    code = FORK.replace("{from_thread}", str(from_thread))
    n = 3 if HAS_OPENMP else 1
    assert python(code, OMP_NUM_THREADS="3") == f"{n} [0] True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@needs_openmp
def test_a_forked_child_is_serial():
    code = """
import os, posenc
before = posenc.get_num_threads()
pid = os.fork()
if pid == 0:
    os._exit(posenc.get_num_threads())
print(before, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert python(code, OMP_NUM_THREADS="3") == "3 1"


# --- the number of threads -----------------------------------------------------------


@needs_openmp
@pytest.mark.parametrize("n", [1, 2, 5])
def test_omp_num_threads_is_honoured(n):
    code = "import posenc; print(posenc.get_num_threads())"
    assert python(code, OMP_NUM_THREADS=str(n)) == str(n)


@needs_openmp
def test_set_and_get():
    code = """
import posenc
seen = [posenc.get_num_threads()]
for n in (1, 4, None):
    assert posenc.set_num_threads(n) is None
    seen.append(posenc.get_num_threads())
print(seen)
"""
    assert python(code, OMP_NUM_THREADS="3") == "[3, 1, 4, 3]"


@needs_openmp
def test_the_number_holds_in_every_python_thread():
    posenc.set_num_threads(5)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(posenc.get_num_threads).result() == 5
        pool.submit(posenc.set_num_threads, 2).result()
    assert posenc.get_num_threads() == 2


@needs_openmp
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
def test_threads_start_for_large_work_only():
    code = """
import os
import numpy as np
import posenc

def started(n_row):
    before = len(os.listdir("/proc/self/task"))
    x = np.ones((n_row, 128), np.float32)
    posenc.rope(x, np.ones((1, 64), np.float32), np.ones((1, 64), np.float32))
    return len(os.listdir("/proc/self/task")) - before

counts = [started(10)]
posenc.set_num_threads(1)
counts.append(started(20_000))
posenc.set_num_threads(3)
counts += [started(10), started(20_000), started(20_000)]
print(counts)
"""
    assert python(code, OMP_NUM_THREADS="2") == "[0, 0, 0, 2, 0]"


def test_torchs_number_of_threads_is_left_alone():
    pytest.importorskip("torch")
    code = """
import numpy as np
import torch
import posenc

def use():
    x = np.ones((20_000, 128), np.float32)
    posenc.rope(x, np.ones((1, 64), np.float32), np.ones((1, 64), np.float32))

seen = []
for wanted in (2, 1):
    torch.set_num_threads(wanted)
    for n in (3, 1, None):
        posenc.set_num_threads(n)
        use()
        seen.append(torch.get_num_threads())
print(seen)
"""
    assert python(code) == "[2, 2, 2, 1, 1, 1]"


# --- sub-interpreters ----------------------------------------------------------------

SUBINTERPRETER = """
import sys
import _xxsubinterpreters as interpreters
{before}
number = interpreters.create()
code = '''
try:
    {load}
except ImportError as error:
    print("ImportError:", error)
else:
    print("imported")
'''
interpreters.run_string(number, code)
interpreters.destroy(number)
{after}
"""


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11),
    reason="_xxsubinterpreters is CPython 3.11's name for it",
)
def test_a_subinterpreter_is_refused():
    """Without NumPy in between, which itself refuses: only our own check is left."""
    spec = "importlib.util.spec_from_file_location('posenc._core', path)"
    load = (
        f"import importlib.util; path = {posenc._core.__file__!r}; "
        f"module = importlib.util.module_from_spec({spec}); "
        "module.__spec__.loader.exec_module(module)"
    )
    code = SUBINTERPRETER.format(before="", load=load, after="")
    assert python(code).startswith("ImportError: posenc: ")


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11),
    reason="_xxsubinterpreters is CPython 3.11's name for it",
)
def test_the_main_interpreter_goes_on_after_a_refusal():
    after = "print(posenc.rope([[1.0, 0.0]], [[0.0]], [[1.0]]).tolist())"
    code = SUBINTERPRETER.format(
        before="import posenc", load="import posenc", after=after
    )
    lines = python(code).splitlines()
    assert lines[0].startswith("ImportError: ")
    assert lines[-1] == "[[0.0, 1.0]]"


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
def test_threads_flush_subnormals_as_their_caller_does(dtype):
    torch = pytest.importorskip("torch")
    x = np.full((4096, 64), 1e-30, dtype)
    cos = np.full((4096, 32), 1e-9, dtype)
    results = []
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormals")
        for n_thread in (1, 2, 4):
            posenc.set_num_threads(n_thread)
            results.append(posenc.rope(x, cos, cos))
    finally:
        torch.set_flush_denormal(False)
        posenc.set_num_threads(None)
    assert (results[0] == 0).all()  # 1e-39 is subnormal
    reference.same_bits(results[1], results[0])
    reference.same_bits(results[2], results[0])


@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_float16_has_its_subnormals_though_floats_are_flushed(rounding):
    """They are normal numbers where they are computed, in float32."""
    torch = pytest.importorskip("torch")
    x = np.arange(1 << 10, dtype=np.uint16).view(np.float16).reshape(8, 128)
    cos, sin = np.full((1, 64), 0.75, np.float16), np.full((1, 64), 0.5, np.float16)
    want = posenc.rope(x, cos, sin, rounding=rounding)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormals")
        got = posenc.rope(x, cos, sin, rounding=rounding)
    finally:
        torch.set_flush_denormal(False)
    assert got.view(np.uint16).any()
    reference.same_bits(got, want)
