"""Print a digest of every kernel's output on a fixed workload, as JSON.

Run once per instruction set: POSENC_SIMD=baseline python tests/workload.py
"""

# SPDX-License-Identifier: BSD-3-Clause

import hashlib
import json
from itertools import chain, product

import numpy as np
from gufuncs import PLAIN, PLANAR, SHORT_BY_FLOAT32, SINGLE, SPECS, sprinkle

import posenc

LAYOUTS = ("half", "interleaved")
# Around the widths of vectors of 2, 4, 8, 16 and 32 lanes, and those of real models.
N_PAIR = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40, 48, 64, 65, 80, 128)


def digest(*arrays):
    """BLAKE2 of the arrays' elements, in C order."""
    summary = hashlib.blake2b(digest_size=16)
    for array in arrays:
        summary.update(np.ascontiguousarray(array).view(np.uint8))
    return summary.hexdigest()


def off_by_one(array):
    """The same values in memory that no vector width divides."""
    memory = np.empty(array.size + 1, array.dtype)
    memory[1:] = array.reshape(-1)
    return memory[1:].reshape(array.shape)


def gufunc_digests():
    """Each gufunc: shared tables, own tables, shifted memory, special values.

    Attention's products may be fused: its last bits are the instruction set's own.
    """
    for spec in SPECS.values():
        if spec.name == "cope_attention":
            continue
        for types in spec.types:
            for m in N_PAIR:
                rng = np.random.default_rng(m)
                sizes = {"n": 2 * m + m % 4, "m": m}
                digests = []
                for loops in [[(3, 5)] + [(5,)] * 2, [(5, 3)] + [(5, 1)] * 2]:
                    loops = loops[: spec.ufunc.nin]
                    operands = spec.operands(rng, loops, sizes, types)
                    special = [sprinkle(rng, op.copy()) for op in operands]
                    digests += [
                        digest(*spec.call(*operands)),
                        digest(*spec.call(*map(off_by_one, operands))),
                        digest(*spec.call(*special)),
                        digest(*spec.call(*(op[..., ::-1] for op in special))),
                    ]
                yield f"{spec.name} {types} {m}", digests


def table_digests():
    """Tables: ordinary, next to multiples of pi/2, huge, with a factor."""
    rng = np.random.default_rng(0)
    inv_freq = np.concatenate([1e4 ** (-np.arange(50) / 50), [1e300, 1e-300, 5e-324]])
    whole = rng.integers(-(2**31) + 1, 2**31, 500)
    hard = [0, 355, 103993, 245850922, 411557987, -411557987]
    for positions in (whole, rng.uniform(-(2.0**31), 2.0**31, 500), np.array(hard)):
        for dtype, _ in PLAIN:
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
    rows = np.arange(-3000, 3000)
    yield "table rows", posenc.rope_table(rows, 5e5 ** (-np.arange(50) / 50))


def cope_digests():
    """The bias by its fast door: causal or not, masked, past the caches; and back."""
    rng = np.random.default_rng(5)
    for types, n_position in product(PLANAR, (1, 5, 40, 64, 65, 100, 1500)):
        for shape in ((2, 9, 70), (3, 300, 257)):
            logits = 2 * rng.standard_normal(shape).astype("f")
            logits = sprinkle(rng, logits.astype(types.data))
            z = rng.standard_normal((*shape[:2], n_position)).astype(types.table)
            mask = rng.random(shape) < 0.8
            results = [
                posenc.cope_bias(logits, z, **options)
                for options in ({}, {"causal": False}, {"mask": mask})
            ]
            real = np.float64 if types.data == np.float64 else np.float32
            dlogits, dz = np.empty(shape, real), np.empty(z.shape, real)
            grad = np.ones(shape, types.data)
            for given in (None, mask):
                posenc._core.cope_bias_backward_arrays(
                    logits, z, given, True, grad, dlogits, dz
                )
                results += [dlogits.copy(), dz.copy()]
            yield f"cope {types} {n_position} {shape}", results
    for dtype in (np.float32, np.float16):
        logits = rng.standard_normal((3, 1024, 1024)).astype(dtype)
        for n_position in (64, 128):
            z = rng.standard_normal((3, 1024, n_position)).astype(dtype)
            bias = posenc.cope_bias(logits, z)
            yield f"large cope {np.dtype(dtype)} {n_position}", [bias]


def bias_digests():
    """Buckets, and biases spread and added, within the caches and past them."""
    rng = np.random.default_rng(6)
    offset = np.arange(-5000, 5000)
    for numbers in ((32, 128, True), (32, 128, False), (100, 3000, True)):
        yield f"buckets {numbers}", [posenc.ufunc.t5_bucket(offset, *numbers)]
    for types, shape in product(SINGLE, ((2, 9, 70), (7, 1001, 1003))):
        weight = rng.standard_normal((32, shape[0])).astype(types.data)
        places = range(shape[1]), range(shape[2])
        logits = sprinkle(rng, rng.standard_normal(shape).astype(types.data))
        spread = np.empty((shape[0], shape[1], shape[2] + 1), types.data)[..., 1:]
        posenc.t5_bias(weight, *places, out=spread)
        added = posenc.t5_bias(weight, *places, add_to=logits, out=spread.copy())
        strided = posenc.t5_bias(weight, *places, add_to=logits[..., ::-1], out=spread)
        sums = np.zeros((shape[0], sum(shape[1:]) - 1))
        posenc._core.bias_collect_arrays(added, sums)
        sums[np.isnan(sums)] = np.nan  # which NaN is left open
        yield f"bias {types} {shape}", [added, strided, sums]


def roundings(types):
    """What there is to choose: for 16-bit data only, 'eager' differs."""
    return ("once",) if types in PLAIN else ("once", "eager")


def rope_digests():
    """The fast door: layouts, directions, roundings, starts, in place, gathered."""
    rng = np.random.default_rng(3)
    for types, m, layout in product(PLANAR, (5, 16, 40, 64), LAYOUTS):
        x = rng.standard_normal((2, 3, 9, 2 * m + 3)).astype(types.data)
        tables = posenc.rope_table(np.arange(20), 1e4 ** (-np.arange(m) / m),
                                   attention_factor=1.5)  # fmt: skip
        cos, sin = (table.astype(types.table) for table in tables)
        positions = rng.integers(0, 20, (2, 9))
        for rounding in roundings(types):
            options = {"layout": layout, "rounding": rounding}
            results = [
                posenc.rope(x, cos, sin, positions=positions, **options, **more)
                for more in ({}, {"inverse": True}, {"adjoint": True},
                             {"rotary_start": 2}, {"rotary_start": -2 * m})
            ]  # fmt: skip
            special = sprinkle(rng, x)
            results.append(posenc.rope(special, cos, sin, offset=3, **options))
            posenc.rope(special, cos[:9], sin[:9], out=special, **options)
            yield f"rope {types} {m} {layout} {rounding}", [*results, special]


def large_digests():
    """Results that are written around the caches."""
    rng = np.random.default_rng(4)
    numbers = rng.standard_normal(9 << 18)
    for types, m in product(PLANAR, (16, 40, 64)):
        n_token = (9 << 20) // (4 * 2 * m * np.dtype(types.data).itemsize)
        x = np.resize(numbers.astype(types.data), (n_token, 4, 2 * m))
        x[::7, 1, 3] = np.nan
        cos, sin = (
            np.resize(numbers[start:].astype(types.table), (n_token, m))
            for start in (11, 1 << 18)
        )
        for layout, rounding in product(LAYOUTS, roundings(types)):
            options = {"layout": layout, "rounding": rounding}
            whole = posenc.rope(x, cos, sin, axis=0, **options)
            memory = np.empty(x.size + 64, x.dtype)
            skew = (-memory.ctypes.data % 64 + 16) // memory.itemsize
            out = memory[skew : skew + x.size].reshape(x.shape)
            posenc.rope(x, cos, sin, axis=0, out=out, **options)
            narrow = cos[:, : m // 2], sin[:, : m // 2]
            part = posenc.rope(x, *narrow, axis=0, rotary_start=m // 2, **options)
            yield f"large {types} {m} {layout} {rounding}", [whole, part, out]


def added_digests():
    """Rows of tables added to data, past the caches and anywhere in a vector."""
    rng = np.random.default_rng(7)
    for types, n_channel in product(SINGLE, (5, 603)):
        shape = 3, (9 << 20) // (6 * n_channel), n_channel
        x = sprinkle(rng, rng.standard_normal(shape).astype(types.data))
        table = rng.standard_normal(shape[1:]).astype(types.data)
        added, sines = (np.empty(x.size + 1, x.dtype)[1:].reshape(shape) for _ in "ab")
        posenc.add_learned(x, table, scale=0.7, out=added)
        posenc.add_sinusoidal(x, scale=0.7, layout="concat", out=sines)
        yield f"added {types} {n_channel}", [added, sines]


def pattern_digests():
    """Every number of 16 bits, by tables that change nothing, little and much."""
    turns = ((1, 0), (0, 1), (-1, 0), (0.6, 0.8), (1e-3, -(2.0**-130)), (3e38, 1e-38))
    for types in PLANAR[len(PLAIN) :]:
        x = np.arange(1 << 16, dtype=np.uint16).view(types.data).reshape(-1, 128)
        for turn, layout in product(turns, LAYOUTS):
            # In float16 the largest is infinite and the least zero, which is as good.
            with np.errstate(over="ignore"):
                cos, sin = (np.full((1, 64), part).astype(types.table) for part in turn)
            results = [
                posenc.rope(x, cos, sin, layout=layout, rounding=rounding)
                for rounding in roundings(types)
            ]
            yield f"patterns {types} {turn} {layout}", results
    for types in SHORT_BY_FLOAT32:
        x = np.arange(1 << 16, dtype=np.uint16).view(types.data).reshape(-1, 128)
        result = posenc.rope_complex(x, np.full((1, 64), 0.6 + 0.8j, np.complex64))
        yield f"patterns {types} complex", [result]


def main():
    """Print all digests."""
    found = {"simd": posenc.build_info()["simd"]}
    for name, digests in gufunc_digests():
        found[name] = "".join(digests)
    groups = table_digests(), rope_digests(), large_digests(), pattern_digests()
    groups += cope_digests(), bias_digests(), added_digests()
    for name, arrays in chain(*groups):
        found[name] = digest(*arrays)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
