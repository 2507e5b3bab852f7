"""What was built, and how many threads run."""

# SPDX-License-Identifier: BSD-3-Clause
import os

from . import _core
from ._check import whole_number
from ._version import __version__


def build_info():
    """
    Tell what was built and what runs.

    Returns
    -------
    dict
        ``'version'`` of the package; ``'simd'``, the instruction set that was
        picked at import: ``'baseline'``, ``'v3'`` (AVX2), ``'v4'`` (AVX-512) or
        ``'v4_bf16'`` (with AVX512-BF16), or
        what the environment variable ``POSENC_SIMD`` asked for; ``'openmp'``,
        whether threads were compiled in; ``'compiler'``.

    See Also
    --------
    get_num_threads : How many threads large calls use.

    Examples
    --------
    >>> import posenc
    >>> sorted(posenc.build_info())
    ['compiler', 'openmp', 'simd', 'version']
    """
    return {"version": __version__, **_core.build_info()}


def get_num_threads():
    """
    Tell how many threads a large call made now would use.

    Returns
    -------
    int
        What `set_num_threads` has set, else what OpenMP says now (its environment
        variables, threadpoolctl and, on Linux, ``torch.set_num_threads`` all act on
        it). 1 without OpenMP and in a forked child, where threads cannot run.

    See Also
    --------
    set_num_threads : Choose the number.

    Examples
    --------
    >>> import posenc
    >>> posenc.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


def set_num_threads(n):
    """
    Choose how many threads large calls use; results do not depend on it.

    Only calls of posenc are affected, in all Python threads: OpenMP's own settings
    and those of other libraries stay as they are.

    Parameters
    ----------
    n : int or None
        Number of threads, at least 1; more than eight per processor are cut to that.
        None goes back to what OpenMP says.

    Raises
    ------
    TypeError, ValueError
        If `n` is not a whole number of at least 1.

    See Also
    --------
    get_num_threads : What is in force.

    Examples
    --------
    >>> import posenc
    >>> posenc.set_num_threads(1)
    >>> posenc.get_num_threads()
    1
    >>> posenc.set_num_threads(None)
    """
    wanted = 0 if n is None else whole_number("set_num_threads", "n", n, 1)
    # A process that cannot make the threads it asks OpenMP for is aborted.
    _core.set_num_threads(min(wanted, 8 * (os.cpu_count() or 1)))
