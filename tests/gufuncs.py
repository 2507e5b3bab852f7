"""One row per gufunc: how to make its operands, and how to judge its results."""

# SPDX-License-Identifier: BSD-3-Clause

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np
import reference
from ml_dtypes import bfloat16
from mpmath import mp

import posenc.ufunc


class Types(NamedTuple):
    """The type of the data, and that of the table or of its real parts."""

    data: type
    table: type

    def __str__(self):
        names = dict.fromkeys(kind.__name__ for kind in self)
        return " by ".join(names)


FLOAT32, FLOAT64 = Types(np.float32, np.float32), Types(np.float64, np.float64)
PLAIN = (FLOAT32, FLOAT64)
# In the order in which NumPy is told of the loops, bfloat16's apart.
SHORT_BY_FLOAT32 = (Types(np.float16, np.float32), Types(bfloat16, np.float32))
SHORT_BY_OWN = (Types(np.float16, np.float16), Types(bfloat16, bfloat16))
WITH_FLOAT64 = tuple(
    Types(kind, np.float64) for kind in (np.float16, np.float32, np.float64, bfloat16)
)
PLANAR = (*PLAIN, *SHORT_BY_FLOAT32, *SHORT_BY_OWN)
SINGLE = (*PLAIN, *SHORT_BY_OWN)

# NaN with a sign and a payload, infinities, zeros, subnormals, overflow.
SPECIAL = {
    np.float32: np.array(
        [0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x80000001, 0x7F7FFFFF],
        np.uint32,
    ).view(np.float32),
    np.float64: np.array(
        [
            0xFFF8123456789ABC,
            0x7FF0 << 48,
            0xFFF0 << 48,
            0x8000 << 48,
            0,
            1,
            0x8000000000000001,
            0x7FEFFFFFFFFFFFFF,
        ],
        np.uint64,
    ).view(np.float64),
    # And signalling NaNs: nothing but integers reads them.
    np.float16: np.array(
        [0xFE23, 0x7C01, 0x7C00, 0xFC00, 0x8000, 0, 1, 0x8001, 0x7BFF], np.uint16
    ).view(np.float16),
    bfloat16: np.array(
        [0xFFE5, 0x7F81, 0x7F80, 0xFF80, 0x8000, 0, 1, 0x8001, 0x7F7F], np.uint16
    ).view(bfloat16),
}

# The contract of the tables, in ulp.
TABLE_ULP = {np.dtype(np.float32): 0.501, np.dtype(np.float64): 1.0}


def normal(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def complex_normal(rng, shape, dtype):
    kind = np.result_type(dtype, np.complex64)
    pairs = normal(rng, (*shape, 2), dtype)
    return pairs.view(kind)[..., 0]


def position(rng, shape, dtype):
    """Positions are float64 whatever the type of the table, some of them whole."""
    values = rng.uniform(-1, 1, shape) * 2.0 ** rng.uniform(0, 31, shape)
    return np.where(rng.random(shape) < 0.5, np.rint(values), values)


def frequency(rng, shape, dtype):
    return (10.0 ** rng.uniform(-6, 0.5, shape)).astype(dtype)


def contextual(rng, shape, dtype):
    """Logits: ordinary ones, some that hide their key, some that are whole gates.

    Those are 1 also in what a count of float32 keeps of a gate, units of 2^-45: at
    whole positions a NaN in the next entry of z is not met.
    """
    values = rng.standard_normal(shape).astype(dtype)
    values[rng.random(shape) < 0.1] = -np.inf
    values[rng.random(shape) < 0.1] = 40
    return values


def between_positions(rng, shape, dtype):
    """Some whole, some beyond the last, some negative."""
    values = rng.uniform(-1, 12, shape)
    return np.where(rng.random(shape) < 0.5, np.rint(values), values).astype(dtype)


def position_count(rng, shape, dtype):
    """Numbers of positions are float64 whatever the type of the gates."""
    return rng.integers(1, 9, shape).astype(np.float64)


def exactly(rotation):
    """Judge by bits: the reference tells what is rounded, and when."""

    def check(results, operands):
        native = [op.astype(op.dtype.newbyteorder("=")) for op in operands]
        reference.same_bits(results[0], rotation(*native))

    return check


def within_table_ulp(results, operands):
    """Judge by mpmath; an angle that is no number gives the one NaN."""
    positions, inv_freq = np.broadcast_arrays(operands[0][..., None], operands[1])
    for cos, sin in [results]:
        assert cos.shape == sin.shape == positions.shape
        assert cos.dtype == sin.dtype
        for index in np.ndindex(cos.shape):
            angle = float(positions[index]), float(inv_freq[index])
            if not np.isfinite(angle).all():
                nan = np.full(2, np.nan, cos.dtype)
                reference.same_bits(np.stack([cos[index], sin[index]]), nan)
                continue
            true = reference.true_cos_sin(*angle)
            for got, value in zip((cos[index], sin[index]), true, strict=True):
                error = reference.ulp_error(got, value, cos.dtype)
                assert error <= TABLE_ULP[cos.dtype], angle


# The contract of sums of cosines, for each of them.
DECAY_BOUND = 2.0**-48


def within_decay_bound(results, operands):
    """Judge by mpmath; an angle that is no number makes the one NaN of a sum."""
    [got] = map(np.asarray, results)
    distances, inv_freq = operands
    inv_freq = np.broadcast_to(inv_freq, (*got.shape, inv_freq.shape[-1]))
    distances = np.broadcast_to(distances, got.shape)
    rounding = 2.0**-24 if got.dtype == np.float32 else 0
    for index in np.ndindex(got.shape):
        distance, freq = float(distances[index]), inv_freq[index].astype(float)
        if freq.size and not np.isfinite([distance, *freq]).all():
            reference.same_bits(got[index], got.dtype.type(np.nan))
            continue
        true = reference.true_decay(distance, freq)
        bound = freq.size * DECAY_BOUND
        bound += rounding * (abs(true) + bound)
        assert abs(mp.mpf(float(got[index])) - true) <= bound, (distance, freq)


# In eps of the greatest number that goes into a result. Products, sums and what two ulp
# of a gate move are a few; of 16 bits it is the one rounding, after float32.
CLOSE = {np.float32: 4, np.float64: 8, np.float16: 0.51, bfloat16: 0.51}


def computed_in(kind):
    """The type in which results of a type are computed."""
    return np.float64 if kind == np.float64 else np.float32


def assert_close(got, want, size):
    """Compare results with those of a reference; NaN is the one NaN."""
    kind = got.dtype.type
    assert got.shape == want.shape
    with np.errstate(all="ignore"):
        rounded = want.astype(kind)
    is_nan = np.isnan(rounded.astype(float))
    reference.same_bits(got[is_nan], np.full(is_nan.sum(), np.nan, kind))
    is_far = np.isinf(rounded.astype(float))
    reference.same_bits(got[is_far], rounded[is_far])
    is_near = ~is_nan & ~is_far
    info = ml_dtypes.finfo(kind)
    size = np.maximum(size, float(info.tiny))[is_near]
    error = np.abs(got[is_near].astype(np.longdouble) - want[is_near])
    assert (error <= CLOSE[kind] * float(info.eps) * size).all()


def closely(function):
    """Judge by a reference that tells how large its terms are."""

    def check(results, operands):
        got = np.asarray(results[0])
        with np.errstate(all="ignore"):
            native = [op.astype(op.dtype.newbyteorder("=")) for op in operands]
            native = [op.astype(float) for op in native]
            want, size = function(*native, dtype=computed_in(got.dtype))
        assert_close(got, want, size)

    return check


def adding(layout):
    """Judge a sum by bits: NumPy's of the data and of what `cos_sin` gives."""

    def check(results, operands):
        x, positions, inv_freq = (
            np.asarray(op, op.dtype.newbyteorder("=")) for op in operands
        )
        kind = np.float64 if x.dtype == np.float64 else np.float32
        inv_freq = inv_freq.astype(np.float64)
        cos, sin = posenc.ufunc.cos_sin(positions, inv_freq, dtype=kind)
        table = reference.sinusoidal_row(cos, sin, x.shape[-1], layout)
        reference.same_bits(results[0], reference.scale_and_add(x, 1, table))

    return check


# Products of two numbers below it leave no type's range.
MODERATE = 100.0


def attention(results, operands):
    """Judge closely the queries that read moderate numbers only.

    A query reads its own row, the keys and values up to its own, and the embedding.
    """
    got = np.asarray(results[0])
    with np.errstate(invalid="ignore"):
        native = [op.astype(op.dtype.newbyteorder("=")) for op in operands]
        native = [op.astype(float) for op in native]
    is_calm = [np.abs(op) < MODERATE for op in native]  # a NaN is not
    q, keys, values, embedding = (
        calm.all((-2, -1) if name == "embedding" else -1)
        for name, calm in zip(("q", "k", "v", "embedding"), is_calm, strict=True)
    )
    n_query, n_key = q.shape[-1], keys.shape[-1]
    shape = np.broadcast_shapes(keys.shape, values.shape)
    seen = np.ones((*shape[:-1], n_key + 1), bool)  # by how many keys are seen
    seen[..., 1:] = np.logical_and.accumulate(keys & values, -1)
    n_seen = np.maximum(np.arange(n_query) + 1 + n_key - n_query, 0)
    is_judged = q & seen[..., n_seen] & embedding[..., None]
    native = [np.where(ok, op, 0) for ok, op in zip(is_calm, native, strict=True)]
    want, size = reference.cope_attention(*native, dtype=computed_in(got.dtype))
    is_judged = np.broadcast_to(is_judged[..., None], want.shape)
    assert got.shape == want.shape
    assert_close(got[is_judged], want[is_judged], size[is_judged])


def size_of(name, sizes):
    """Size of a core dimension, given n and m; there is always a position."""
    least = max(sizes.get("m", 1), 1)
    named = {"s": sizes["n"], "t": sizes["n"], "d": sizes.get("m", 1), "p": least}
    return {**named, **sizes}[name]


@dataclass(frozen=True)
class Spec:
    """What the contract suite must know about one gufunc."""

    name: str
    makers: tuple[Callable, ...]
    check: Callable
    in_place: int  # the operand that `out` may be, if it has the type of the results
    types: tuple[Types, ...]  # of its loops
    data: int | None = None  # the operand whose type the results have; None: in_place

    @property
    def ufunc(self):
        return getattr(posenc.ufunc, self.name)

    @property
    def signature(self):
        """That of the gufunc; elementwise ones have none of their own."""
        return self.ufunc.signature or "()->()"

    @property
    def cores(self):
        """Names of the core dimensions, operand by operand, inputs first."""
        groups = re.findall(r"\(([\w,]*)\)", self.signature)
        return [tuple(filter(None, group.split(","))) for group in groups]

    @property
    def is_elementwise(self):
        return self.ufunc.signature is None

    def has_place(self, types):
        """Whether `out` may be an operand: one has the type of the results."""
        rng = np.random.default_rng()
        operands = self.operands(rng, [()] * self.ufunc.nin, {"n": 1, "m": 1}, types)
        return operands[self.in_place].dtype == types.data

    @property
    def one_output(self):
        """The signature up to its first output: Hypothesis reads no further."""
        inputs, outputs = self.signature.split("->")
        return f"{inputs}->{outputs.split('),')[0].rstrip(')')})"

    def operands(self, rng, loops, sizes, types):
        """Random operands with the given loop shapes and core sizes."""
        shapes = [
            (*loop, *(size_of(name, sizes) for name in core))
            for loop, core in zip(loops, self.cores, strict=False)
        ]
        made = zip(self.makers, shapes, (types.data, *[types.table] * 3), strict=False)
        return [make(rng, shape, dtype) for make, shape, dtype in made]

    def call(self, *operands, **options):
        """Call it; the results as a tuple whatever their number."""
        results = self.ufunc(*operands, **options)
        return results if isinstance(results, tuple) else (results,)

    def fresh(self, operands, sizes):
        """Empty arrays of the results' shapes and types, for `out`."""
        loops = np.broadcast_shapes(
            *(
                op.shape[: op.ndim - len(core)]
                for op, core in zip(operands, self.cores, strict=False)
            )
        )
        kind = operands[self.in_place if self.data is None else self.data].dtype
        return tuple(
            np.full((*loops, *(size_of(name, sizes) for name in core)), 77, kind)
            for core in self.cores[self.ufunc.nin :]
        )


SPECS = {
    spec.name: spec
    for spec in (
        Spec("rope_half", (normal, normal, normal), exactly(reference.half), 0, PLANAR),
        Spec(
            "rope_interleaved",
            (normal, normal, normal),
            exactly(reference.interleaved),
            0,
            PLANAR,
        ),
        Spec(
            "rope_complex",
            (normal, complex_normal),
            exactly(reference.complex_product),
            0,
            (*PLAIN, *SHORT_BY_FLOAT32),
        ),
        Spec("cope_gates", (contextual,), closely(reference.cope_gates), 0, SINGLE),
        Spec(
            "cope_positions",
            (normal, position_count),
            closely(reference.cope_positions),
            0,
            SINGLE,
        ),
        Spec(
            "cope_interpolate",
            (normal, between_positions),
            closely(reference.cope_interpolate),
            1,
            PLANAR,
            0,
        ),
        Spec(
            "cope_bias",
            (contextual, normal),
            closely(reference.cope_bias),
            0,
            PLANAR,
        ),
        Spec("cope_attention", (normal,) * 4, attention, 0, SINGLE),
        Spec("cos_sin", (position, frequency), within_table_ulp, 1, PLAIN),
        Spec("rope_decay", (position, frequency), within_decay_bound, 0, PLAIN, 1),
        *(
            Spec(
                f"add_sinusoidal_{layout}",
                (normal, position, frequency),
                adding(layout),
                0,
                WITH_FLOAT64,
            )
            for layout in ("interleaved", "concat", "concat_flipped")
        ),
    )
}


# Of whole numbers, not of reals: test_bias.py holds it to the contract.
WHOLE = ("t5_bucket",)


def sprinkle(rng, array):
    """Put special values at a few random places of a float or complex array."""
    if array.size == 0:
        return array
    parts = np.ascontiguousarray(array).reshape(-1)
    parts = parts.view(parts.real.dtype)
    places = rng.integers(0, parts.size, 1 + parts.size // 6)
    parts[places] = rng.choice(SPECIAL[parts.dtype.type], places.size)
    return parts.view(array.dtype).reshape(array.shape)


def lay_out(array, choose):
    """Copy an array into another memory layout; `choose` picks from a list.

    Strides of one, two and minus one elements, C and Fortran order, memory that is
    not aligned to the element, the other byte order (bfloat16 has none), read-only.
    """
    orders = ["="] if array.dtype == bfloat16 else ["=", "=", "S"]
    kind = array.dtype.newbyteorder(choose(orders))
    offset = choose([0, 0, 1, kind.itemsize])
    steps = [choose([1, 1, 2, -1]) for _ in array.shape]
    around = tuple(n * abs(step) for n, step in zip(array.shape, steps, strict=True))
    n_byte = int(np.prod(around)) * kind.itemsize
    memory = np.full(n_byte + offset, 0xA5, np.uint8)
    base = np.ndarray(around, kind, memory, offset, order=choose(["C", "F"]))
    view = base[(*(slice(None, None, step) for step in steps), ...)]
    view[...] = array
    view.flags.writeable = choose([True, True, False])
    return view
