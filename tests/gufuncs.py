"""One row per gufunc: how to make its operands, and how to judge its results."""

# SPDX-License-Identifier: BSD-3-Clause

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import reference
from ml_dtypes import bfloat16

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


@dataclass(frozen=True)
class Spec:
    """What the contract suite must know about one gufunc."""

    name: str
    makers: tuple[Callable, ...]
    check: Callable
    in_place: int  # the operand that `out` may be
    types: tuple[Types, ...]  # of its loops

    @property
    def ufunc(self):
        return getattr(posenc.ufunc, self.name)

    @property
    def cores(self):
        """Names of the core dimensions, operand by operand, inputs first."""
        groups = re.findall(r"\(([\w,]*)\)", self.ufunc.signature)
        return [tuple(filter(None, group.split(","))) for group in groups]

    @property
    def one_output(self):
        """The signature up to its first output: Hypothesis reads no further."""
        inputs, outputs = self.ufunc.signature.split("->")
        return f"{inputs}->{outputs.split('),')[0].rstrip(')')})"

    def operands(self, rng, loops, sizes, types):
        """Random operands with the given loop shapes and core sizes."""
        shapes = [
            (*loop, *(sizes[name] for name in core))
            for loop, core in zip(loops, self.cores, strict=False)
        ]
        made = zip(self.makers, shapes, (types.data, *[types.table] * 2), strict=False)
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
        kind = operands[self.in_place].dtype
        return tuple(
            np.full((*loops, *(sizes[name] for name in core)), 77, kind)
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
        Spec("cos_sin", (position, frequency), within_table_ulp, 1, PLAIN),
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
