"""How far off results are that are rounded once, and what is refused."""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np

from .peers import Wrong

# In units of the last place: half of one for rounding the true number, and a bit for
# the formula in float64, which is off by some of its own units.
ROUNDED_ONCE = 0.51


def allowed(error, bound, what="result"):
    """Return an error; refuse the result if it is larger than a bound, or NaN."""
    if not error <= bound:
        raise Wrong(f"{what} off by {error:.3g}, more than {bound:.3g}")
    return error


def last_places(found, true, eps):
    """Return the largest error in units of the last place of the true numbers."""
    _, exponent = np.frexp(true)
    unit = eps * 2.0 ** (exponent - 1.0)
    return float((np.abs(found.astype(np.float64) - true) / unit).max())


def bits_of(peer, ours, theirs):
    """Return that bits are somebody else's; refuse others."""
    if not np.array_equal(ours, theirs):
        raise Wrong(f"other than {peer}")
    return f"bits of {peer}"
