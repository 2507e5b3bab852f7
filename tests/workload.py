"""Print a digest of every kernel's output on a fixed workload, as JSON.

Run once per instruction set: POSENC_SIMD=baseline python tests/workload.py
"""

# SPDX-License-Identifier: BSD-3-Clause

import hashlib
import json

import numpy as np
from gufuncs import DTYPES, SPECS, sprinkle

import posenc

# Around the widths of vectors of 2, 4, 8 and 16 lanes, and those of real models.
N_PAIR = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40, 48, 64, 65, 80, 128)


def digest(*arrays):
    """SHA-256 of the arrays' elements, in C order."""
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def off_by_one(array):
    """The same values in memory that no vector width divides."""
    memory = np.empty(array.size + 1, array.dtype)
    memory[1:] = array.reshape(-1)
    return memory[1:].reshape(array.shape)


def gufunc_digests():
    """Each gufunc: shared tables, own tables, shifted memory, special values."""
    for spec in SPECS.values():
        for dtype in DTYPES:
            for m in N_PAIR:
                rng = np.random.default_rng(m)
                sizes = {"n": 2 * m + m % 4, "m": m}
                digests = []
                for loops in [[(3, 5)] + [(5,)] * 2, [(5, 3)] + [(5, 1)] * 2]:
                    loops = loops[: spec.ufunc.nin]
                    operands = spec.operands(rng, loops, sizes, dtype)
                    special = [sprinkle(rng, op.copy()) for op in operands]
                    digests += [
                        digest(*spec.call(*operands)),
                        digest(*spec.call(*map(off_by_one, operands))),
                        digest(*spec.call(*special)),
                        digest(*spec.call(*(op[..., ::-1] for op in special))),
                    ]
                yield f"{spec.name} {np.dtype(dtype)} {m}", digests


def table_digests():
    """Tables: ordinary, next to multiples of pi/2, huge, with a factor."""
    rng = np.random.default_rng(0)
    inv_freq = np.concatenate([1e4 ** (-np.arange(50) / 50), [1e300, 1e-300, 5e-324]])
    whole = rng.integers(-(2**31) + 1, 2**31, 500)
    hard = [0, 355, 103993, 245850922, 411557987, -411557987]
    for positions in (whole, rng.uniform(-(2.0**31), 2.0**31, 500), np.array(hard)):
        for dtype in DTYPES:
            for angles in ("exact", "float32"):
                ordinary = inv_freq[:50] if angles == "float32" else inv_freq
                tables = posenc.rope_table(
                    positions,
                    ordinary,
                    attention_factor=1.1902380714238083,
                    angles=angles,
                    dtype=dtype,
                )
                yield f"table {len(positions)} {np.dtype(dtype)} {angles}", tables


def rope_digests():
    """The fast door: layouts, directions, in place, gathered rows."""
    rng = np.random.default_rng(3)
    for dtype in DTYPES:
        for m in (5, 16, 40, 64):
            x = rng.standard_normal((2, 3, 9, 2 * m + 3)).astype(dtype)
            cos, sin = posenc.rope_table(np.arange(20), 1e4 ** (-np.arange(m) / m),
                                         attention_factor=1.5, dtype=dtype)  # fmt: skip
            positions = rng.integers(0, 20, (2, 9))
            for layout in ("half", "interleaved"):
                options = {"layout": layout, "positions": positions}
                results = [
                    posenc.rope(x, cos, sin, **options),
                    posenc.rope(x, cos, sin, **options, inverse=True),
                    posenc.rope(x, cos, sin, **options, adjoint=True),
                ]
                again = x.copy()
                posenc.rope(again, cos[:9], sin[:9], layout=layout, out=again)
                yield f"rope {np.dtype(dtype)} {m} {layout}", [*results, again]


def large_digests():
    """Results that are written around the caches."""
    rng = np.random.default_rng(4)
    for dtype in DTYPES:
        for m in (16, 40, 64):
            n_token = (9 << 20) // (4 * 2 * m * np.dtype(dtype).itemsize)
            x = rng.standard_normal((n_token, 4, 2 * m)).astype(dtype)
            x[::7, 1, 3] = np.nan
            cos, sin = (rng.standard_normal((n_token, m)).astype(dtype) for _ in "cs")
            for layout in ("half", "interleaved"):
                result = posenc.rope(x, cos, sin, layout=layout, axis=0)
                yield f"large {np.dtype(dtype)} {m} {layout}", [result]


def main():
    """Print all digests."""
    found = {"simd": posenc.build_info()["simd"]}
    for name, digests in gufunc_digests():
        found[name] = "".join(digests)
    for group in (table_digests(), rope_digests(), large_digests()):
        for name, arrays in group:
            found[name] = digest(*arrays)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
