"""The rotation as one would write it in numba. Importing this needs numba."""

# SPDX-License-Identifier: BSD-3-Clause
import functools

import numba
from numba import prange


def half(x, cos, sin, out):
    m = cos.shape[1]
    for t in prange(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(m):
                a, b = x[t, h, i], x[t, h, i + m]
                out[t, h, i] = a * cos[t, i] - b * sin[t, i]
                out[t, h, i + m] = b * cos[t, i] + a * sin[t, i]


def half_in_place(x, cos, sin):
    m = cos.shape[1]
    for t in prange(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(m):
                a, b = x[t, h, i], x[t, h, i + m]
                x[t, h, i] = a * cos[t, i] - b * sin[t, i]
                x[t, h, i + m] = b * cos[t, i] + a * sin[t, i]


def interleaved(x, cos, sin, out):
    for t in prange(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(cos.shape[1]):
                a, b = x[t, h, 2 * i], x[t, h, 2 * i + 1]
                out[t, h, 2 * i] = a * cos[t, i] - b * sin[t, i]
                out[t, h, 2 * i + 1] = b * cos[t, i] + a * sin[t, i]


def interleaved_in_place(x, cos, sin):
    for t in prange(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(cos.shape[1]):
                a, b = x[t, h, 2 * i], x[t, h, 2 * i + 1]
                x[t, h, 2 * i] = a * cos[t, i] - b * sin[t, i]
                x[t, h, 2 * i + 1] = b * cos[t, i] + a * sin[t, i]


@functools.cache
def kernels(layout, parallel):
    """Return (into an output, in place), compiled.

    The parallel ones cost microseconds per call, so one thread has serial ones. In
    place has a function of its own: with ``out=x`` the other one is not vectorised.
    """
    chosen = (half, half_in_place)
    if layout == "interleaved":
        chosen = (interleaved, interleaved_in_place)
    return [numba.njit(function, parallel=parallel) for function in chosen]
