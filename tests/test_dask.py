"""Gufuncs on dask's arrays: on two processes, larger than memory, in the example."""

# SPDX-License-Identifier: BSD-3-Clause

import functools
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import gufuncs
import numpy as np
import pytest
import reference
from gufuncs import SPECS
from ml_dtypes import bfloat16

import posenc
from posenc import ufunc

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"n": 12, "m": 5}
LOOPS = [(spec, types) for spec in SPECS.values() for types in spec.types]
TIMEOUT = 120  # seconds, after which a test fails instead of hanging


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that starts a cluster of two processes."""
    folder = str(tmp_path_factory.mktemp("dask"))
    return functools.partial(
        distributed.LocalCluster,
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=":0",
        memory_limit=0,
        local_directory=folder,
    )


@pytest.fixture(scope="module")
def client(start):
    with start() as cluster, distributed.Client(cluster) as client:
        yield client


def workers_of(client):
    return sorted(client.scheduler_info()["workers"])


def chunked(spec, operands, chunks=(2, 3)):
    """Return operands as dask's: loops cut, each core dimension in one chunk."""
    return [
        da.from_array(op, chunks=chunks + (-1,) * len(core))
        for op, core in zip(operands, spec.cores, strict=False)
    ]


# --- processes -----------------------------------------------------------------------


def test_workers_are_two_other_processes_of_one_thread_each(client):
    pids = client.run(os.getpid)
    assert len({os.getpid(), *pids.values()}) == 3
    assert set(client.run(posenc.get_num_threads).values()) == {1}


@pytest.mark.parametrize(
    ("spec", "types"), LOOPS, ids=[f"{spec.name} {types}" for spec, types in LOOPS]
)
def test_each_process_gives_the_bits_of_plain_arrays(client, spec, types):
    operands = spec.operands(
        np.random.default_rng(0), ((4, 6),) * spec.ufunc.nin, SIZES, types
    )
    want = spec.call(*operands)
    halves = []
    for half, address in enumerate(workers_of(client)):
        parts = (op[2 * half : 2 * half + 2] for op in chunked(spec, operands))
        work = list(spec.call(*parts))
        halves.append(client.compute(work, workers=[address]))
    top, bottom = (client.gather(half) for half in halves)
    for above, below, wanted in zip(top, bottom, want, strict=True):
        assert above.dtype == wanted.dtype
        reference.same_bits(np.concatenate([above, below]), wanted)


def test_buckets_on_two_processes(client):
    offset = np.arange(-300, 300).reshape(20, 30)
    got = ufunc.t5_bucket(da.from_array(offset, chunks=7), 32, 128, True)
    want = ufunc.t5_bucket(offset, 32, 128, True)
    reference.same_bits(client.compute(got).result(TIMEOUT), want)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_data_and_tables_of_16_bits_travel_between_processes(client, dtype):
    spec = SPECS["rope_half"]
    rng = np.random.default_rng(0)
    types = gufuncs.Types(dtype, dtype)
    operands = spec.operands(rng, ((4, 6),) * 3, SIZES, types)
    first, second = workers_of(client)
    x, cos, sin = (
        client.persist(op, workers=[place])
        for op, place in zip(
            chunked(spec, operands), (first, second, second), strict=True
        )
    )
    got = client.compute(spec.ufunc(x, cos, sin)).result(TIMEOUT)
    reference.same_bits(got, spec.ufunc(*operands))


def test_a_worker_that_dies_is_replaced(start):
    x, cos, sin = SPECS["rope_half"].operands(
        np.random.default_rng(0), ((8, 6),) * 3, SIZES, gufuncs.FLOAT32
    )
    rows = functools.partial(da.from_array, chunks=(1, 3, -1))
    with start() as cluster, distributed.Client(cluster) as client:
        before = client.run(os.getpid)
        kept = client.persist(ufunc.rope_half(*map(rows, (x, cos, sin))))
        distributed.wait(kept, timeout=TIMEOUT)
        os.kill(min(before.values()), signal.SIGKILL)
        got = client.compute(kept).result(TIMEOUT)
        client.wait_for_workers(2, timeout=TIMEOUT)
    reference.same_bits(got, ufunc.rope_half(x, cos, sin))


# --- what dask asks for --------------------------------------------------------------


def keys(chunks):
    return da.ones((2, 12, 8), chunks=chunks, dtype=np.float32)


def tables(chunks):
    return ufunc.cos_sin(da.arange(12, chunks=chunks), np.ones(4, np.float32))


def test_a_core_axis_in_chunks_is_refused_until_rechunked():
    parts = keys((1, 4, 4))
    with pytest.raises(ValueError, match=r"Core dimension `'n'`.*single chunk"):
        ufunc.rope_half(parts, *tables(4))
    whole = ufunc.rope_half(parts.rechunk({-1: -1}), *tables(4))
    assert whole.chunks == ((1, 1), (4, 4, 4), (8,))


def test_loops_chunked_otherwise_are_refused_until_unified():
    x, parts = keys((1, 4, -1)), tables(6)
    with pytest.raises(ValueError, match="different chunksize"):
        ufunc.rope_half(x, *parts)
    _, alike = da.core.unify_chunks(x, "btn", parts[0], "tm", parts[1], "tm")
    want = ufunc.rope_half(x.compute(), *(part.compute() for part in parts))
    reference.same_bits(ufunc.rope_half(*alike).compute(), want)


def test_tables_of_another_type_than_that_of_frequencies():
    """dask keeps ``dtype=`` for itself: README says how to ask for it."""
    inv_freq = 10000.0 ** -np.linspace(0, 1, 4)
    positions = np.arange(1e9, 1e9 + 12)
    got = da.apply_gufunc(
        functools.partial(ufunc.cos_sin, dtype=np.float32),
        ufunc.cos_sin.signature,
        da.from_array(positions, chunks=5),
        inv_freq,
    )
    want = posenc.rope_table(positions, inv_freq)
    for part, wanted in zip(dask.compute(*got), want, strict=True):
        reference.same_bits(part, wanted)


# --- larger than memory --------------------------------------------------------------

# Threads write a file from another, both larger than what the process may have.
LARGER = """
import resource, sys
from pathlib import Path
import dask.array as da
import numpy as np
import posenc
from examples.larger_than_memory import HEAD_DIM, N_HEAD, File, rotated

folder = Path(sys.argv[1])
shape = N_HEAD, 2**16, HEAD_DIM
ROWS = 2**10
before, after = (File(folder / name, "f4", shape).create() for name in "ab")
n_byte = 4 * np.prod(shape)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(name)).split()[1])

rng = np.random.default_rng(0)
some = rng.standard_normal((N_HEAD, ROWS, HEAD_DIM), np.float32)
for start in range(0, shape[1], ROWS):
    before[:, start : start + ROWS] = some + start

inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM)
work = rotated(da.from_array(before, chunks=(-1, ROWS, -1)), inv_freq)
room = n_byte // 2
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + room,) * 2)
try:
    np.ones(shape, np.float32)
except MemoryError:
    print("an array of that size does not fit")
da.store(work, after, lock=False, scheduler="threads", num_workers=2)

for start in range(0, shape[1], ROWS):
    rows = np.arange(start, start + ROWS)
    want = posenc.rope(some + start, *posenc.rope_table(rows, inv_freq))
    assert np.array_equal(after[:, start : start + ROWS].view("u4"), want.view("u4"))
print("same bits", status("VmHWM") < n_byte)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="limits data as Linux does"
)
def test_files_larger_than_the_memory_of_a_process(tmp_path):
    command = [sys.executable, "-c", LARGER, str(tmp_path)]
    lines = run(command, cwd=ROOT).splitlines()
    assert lines == ["an array of that size does not fit", "same bits True"]


# --- the example ---------------------------------------------------------------------


def run(command, **options):
    """Standard output of a command that must succeed."""
    options = {"capture_output": True, "text": True, "timeout": TIMEOUT} | options
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def processes_with(mark):
    """Return the processes with a variable of that value in their environment."""
    psutil = pytest.importorskip("psutil")
    found = []
    for process in psutil.process_iter():
        try:
            found += [process] if process.environ().get("MARK") == mark else []
        except psutil.Error:
            continue
    return found


def test_example_runs_and_leaves_nothing_behind(tmp_path):
    mark = uuid.uuid4().hex
    small = ["--size", "8MB", "--distances", "1e5", "--tokens", "256", "--folder"]
    script = ROOT / "examples" / "larger_than_memory.py"
    shown = run(
        [sys.executable, str(script), *small, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MARK": mark},
    )
    assert "1000 tokens have the bits of posenc.rope" in shown
    assert "128 at distance 0; deviation" in shown
    assert "tokens with T5's bias" in shown
    assert "Peak memory of the workers" in shown
    assert not list(tmp_path.iterdir())
    assert not processes_with(mark)
