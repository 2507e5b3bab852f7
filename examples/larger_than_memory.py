"""Positional encodings of arrays larger than memory, by worker processes of dask.

posenc's gufuncs take dask's arrays as they are: chunk by chunk, on threads, on
processes, on the machines of a cluster. Three jobs, on processes that may each use far
less memory than the arrays have:

keys     the keys of a long context lie in a file; rotated, they go to another
decay    what RoPE leaves of a product, at each of many distances, reduced
biases   how far back queries look under CoPE and T5's bias: arrays of shape (T, T)

    pip install 'posenc[dask]'
    python examples/larger_than_memory.py
    python examples/larger_than_memory.py keys --size 50GB --workers 8 --folder /data

Files go to a temporary folder inside --folder, and are deleted in the end.
"""

# SPDX-License-Identifier: BSD-3-Clause

import argparse
import functools
import sys
import tempfile
import time
from pathlib import Path

import dask
import dask.array as da
import numpy as np
from dask.utils import format_bytes, parse_bytes
from distributed import Client, LocalCluster, progress
from ml_dtypes import bfloat16

import posenc
from posenc import ufunc

DTYPES = {"bfloat16": bfloat16, "float16": np.float16, "float32": np.float32}
N_HEAD = 8
HEAD_DIM = 128
CHUNK_BYTES = (
    2**24
)  # few of these fit in a worker at a time, and tasks take long enough
N_SAMPLE = 1000  # tokens that are checked


class File:
    """
    A .npy file as dask wants it: opened where a chunk of it is read or written.

    A `numpy.memmap` would do for threads, but would be sent to other processes with all
    it holds. The format has no name for bfloat16, so the file cannot tell its type.
    """

    def __init__(self, path, dtype, shape):
        self.path, self.dtype, self.shape = str(path), np.dtype(dtype), shape
        self.ndim = len(shape)

    def create(self):
        """Make the file, with room for everything."""
        np.lib.format.open_memmap(self.path, "w+", self.dtype, self.shape)
        return self

    def __getitem__(self, index):
        return np.load(self.path, mmap_mode="r").view(self.dtype)[index]

    def __setitem__(self, index, value):
        np.load(self.path, mmap_mode="r+").view(self.dtype)[index] = value


def parser():
    """Return the reader of the command line."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument(
        "jobs", nargs="*", metavar="JOB", help=", ".join(JOBS) + " (all of them)"
    )
    reader.add_argument("--size", default="4GB", help="of the file of keys (4GB)")
    reader.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of keys")
    reader.add_argument("--distances", type=float, default=1e8, help="how many (1e8)")
    reader.add_argument("--tokens", type=int, default=8192, help="of biases (8192)")
    reader.add_argument("--workers", type=int, default=2, help="processes (2)")
    reader.add_argument("--memory-limit", default="500MB", help="of each (500MB)")
    reader.add_argument(
        "--folder",
        type=Path,
        help="for files of twice --size (that for temporary ones)",
    )
    return reader


def run(client, what, work):
    """Let the workers do lazy work, show how far they are; result and seconds."""
    print(f"\n{what}")
    begin = time.perf_counter()
    future = client.compute(work)
    progress(future)
    result = future.result()
    print()
    return result, time.perf_counter() - begin


def peak_memory(dask_worker):
    """Return the most memory that a worker was seen to have, twice a second."""
    return max(dask_worker.monitor.quantities["memory"])


# --- keys ----------------------------------------------------------------------------


def rotated(keys, inv_freq):
    """Rotate lazy keys, shape (n_head, n_token, head_dim), with exact angles.

    The tables are made chunk by chunk, where they are used: an entry depends on its own
    position alone. dask keeps ``dtype=`` for itself, hence the partial function. The
    last axis must be in one chunk, the others chunked alike in all arrays: positions
    get the chunks of the tokens.
    """
    positions = da.arange(keys.shape[1], chunks=(keys.chunks[1],))
    single = functools.partial(ufunc.cos_sin, dtype=np.float32)
    cos, sin = da.apply_gufunc(single, ufunc.cos_sin.signature, positions, inv_freq)
    return ufunc.rope_half(keys, cos, sin)


def rotate_keys(client, folder, args):
    """Write a file of keys and one of rotated keys; compare some with plain arrays."""
    dtype = np.dtype(DTYPES[args.dtype])
    row = N_HEAD * HEAD_DIM * dtype.itemsize
    n_token = max(parse_bytes(args.size) // row, 1)
    shape = N_HEAD, n_token, HEAD_DIM
    chunks = -1, max(CHUNK_BYTES // row, 1), -1
    before = File(folder / "keys.npy", dtype, shape).create()
    after = File(folder / "rotated.npy", dtype, shape).create()
    rng = da.random.default_rng(0)
    numbers = rng.standard_normal(shape, chunks=chunks, dtype=np.float32).astype(dtype)
    name = f"{n_token} tokens, {N_HEAD} heads, {format_bytes(n_token * row)}"
    store = functools.partial(da.store, lock=False, compute=False)
    run(client, f"Keys of {name}, made up", store(numbers, before))

    inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM)
    keys = da.from_array(before, chunks=chunks)
    work = store(rotated(keys, inv_freq), after)
    _, seconds = run(client, "Rotated, from file to file", work)
    rate = format_bytes(n_token * row / seconds)
    print(f"{rate} of keys per second")

    some = np.random.default_rng(1).integers(0, n_token, N_SAMPLE)
    want = posenc.rope(before[:, some], *posenc.rope_table(some, inv_freq))
    same = np.array_equal(after[:, some].view("u1"), want.view("u1"))
    print(
        f"{N_SAMPLE} tokens {'have' if same else 'DO NOT HAVE'} the bits of posenc.rope"
    )
    return same


# --- decay ---------------------------------------------------------------------------


def decay(client, folder, args):
    """Reduce the sums of cosines at many distances: how large are they, far away."""
    inv_freq, _ = posenc.rope_inv_freq(HEAD_DIM)
    n_distance = int(args.distances)
    distances = da.arange(n_distance, chunks=CHUNK_BYTES // 8, dtype=float)
    sums = ufunc.rope_decay(distances, inv_freq)
    far = [n for n in 10 ** np.arange(1, 12, 2) if n < n_distance]
    work = dask.delayed([sums.std(), *(sums[n:].max() for n in far)])
    what = f"RoPE's sum of cosines at {n_distance} distances, {HEAD_DIM} channels"
    (deviation, *largest), seconds = run(client, what, work)
    print(f"{n_distance / seconds / 1e6:.0f} million distances per second")
    print(f"{HEAD_DIM} at distance 0; deviation {deviation:.1f} over all")
    for n, value in zip(far, largest, strict=True):
        print(f"at most {value:.1f} from distance {n} on")
    return True


# --- biases --------------------------------------------------------------------------


def mean_distance(logits, distance):
    """Return how far back a query looks on average, in tokens."""
    weights = da.exp(logits - logits.max(axis=-1, keepdims=True))
    looks = (weights * distance).sum(axis=-1) / weights.sum(axis=-1)
    return looks.mean()


def biases(client, folder, args):
    """Compare how far back queries look without a bias, and with one of two."""
    n_token, dim, n_position = args.tokens, 64, 64
    rows = max(CHUNK_BYTES // (8 * n_token), 1)
    rng = da.random.default_rng(0)
    positions = da.arange(n_token, chunks=rows)
    inv_freq = 10000.0 ** -np.linspace(0, 1, dim // 2, endpoint=False)
    words = rng.standard_normal((n_token, dim), chunks=(rows, -1), dtype=np.float32)
    x = ufunc.add_sinusoidal_interleaved(words, positions, inv_freq)
    embedding = rng.standard_normal((dim, n_position), chunks=-1, dtype=np.float32)
    weight = np.linspace(2, -2, 32, dtype=np.float32)  # of buckets: near ones more

    # Rows of queries in chunks, all keys in one: cope_bias sums over keys.
    keys = x.rechunk(-1)
    offset = da.arange(n_token, chunks=-1) - positions[:, None]
    logits = da.where(offset > 0, np.float32(-np.inf), x @ keys.T / dim**0.5)
    cope = ufunc.cope_bias(logits, x @ embedding / dim**0.5)
    bucket = ufunc.t5_bucket(offset, 32, 128, False)
    t5 = bucket.map_blocks(weight.__getitem__, dtype=weight.dtype)

    named = {"no bias": logits, "CoPE": logits + cope, "T5's bias": logits + t5}
    work = dask.delayed([mean_distance(sum, -offset) for sum in named.values()])
    n_byte = format_bytes(logits.nbytes)
    what = f"Biases of {n_token} x {n_token} logits, {n_byte} of them"
    results, seconds = run(client, what, work)
    print(f"{logits.size / seconds / 1e6:.0f} million logits per second")
    for name, looks in zip(named, results, strict=True):
        print(f"a query looks back {looks:.0f} tokens with {name}")
    return True


JOBS = {"keys": rotate_keys, "decay": decay, "biases": biases}


def main(arguments=None):
    """Run the jobs; 1 if a result is not what plain arrays give."""
    reader = parser()
    args = reader.parse_args(arguments)
    if unknown := [job for job in args.jobs if job not in JOBS]:
        reader.error(f"JOB must be one of {', '.join(JOBS)}; got {unknown[0]!r}")
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        dask.config.set({"temporary-directory": folder}),
        LocalCluster(
            n_workers=args.workers,
            threads_per_worker=1,
            memory_limit=args.memory_limit,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        # dask starts workers with OMP_NUM_THREADS=1, so posenc runs one thread in each.
        fine = [
            JOBS[name](client, Path(folder), args) for name in args.jobs or list(JOBS)
        ]
        peaks = ", ".join(map(format_bytes, client.run(peak_memory).values()))
        limit = format_bytes(parse_bytes(args.memory_limit))
        print(f"\nPeak memory of the workers: {peaks}; limit {limit}")
    return 0 if all(fine) else 1


if __name__ == "__main__":  # workers import this file
    sys.exit(main())
