"""
The raw gufuncs, for composition and for dask.

They broadcast, take ``out=``, ``axes=`` and ``dtype=``, keep array subclasses, and
run chunk by chunk on dask arrays. Their functions in `posenc` add names, defaults
and checks, take torch tensors, and are faster on plain arrays.

- ``rope_half(x, cos, sin)``, ``(n),(m),(m)->(n)``: pairs ``(i, i + m)``
- ``rope_interleaved(x, cos, sin)``, the same: pairs ``(2*i, 2*i + 1)``
- ``rope_complex(x, cis)``, ``(n),(m)->(n)``: the same pairs by a complex table
- ``cos_sin(position, inv_freq)``, ``(),(m)->(m),(m)``: exact angles, in the type of
  `inv_freq` unless ``dtype=`` or ``out=`` says other
- ``rope_decay(distance, inv_freq)``, ``(),(m)->()``: twice the sum of those cosines, of
  that type too
- ``add_sinusoidal_interleaved(x, position, inv_freq)``, ``(n),(),(m)->(n)``: x and the
  sines and cosines of the angles by turns; those of ``add_sinusoidal_concat`` go one
  after the other, those of ``add_sinusoidal_concat_flipped`` with cosines first
- ``cope_gates(logits)``, ``()->()``, elementwise: sigmoids
- ``cope_positions(gates, n_position)``, ``(s),()->(s)``: their sums from the right
- ``cope_interpolate(z, positions)``, ``(p),(s)->(s)``: z between its entries
- ``cope_bias(logits, z)``, ``(s),(p)->(s)``: the three in one pass; -inf logits hide
  a key
- ``cope_attention(q, k, v, position_embedding)``, ``(t,d),(s,d),(s,d),(d,p)->(t,d)``:
  causal, scaled by ``d**-0.5``
- ``t5_bucket(relative_position, num_buckets, max_distance, bidirectional)``,
  ``(),(),(),()->()``, elementwise: buckets, of int64 and a bool

The rotations take float32 and float64; and float16 and ml_dtypes' bfloat16 data with a
float32 (complex64) table or, but for ``rope_complex``, one of their own type; so do
``cope_bias`` and ``cope_interpolate`` with their second operand, and n_position is
float64. The sums take data of these types with float64 positions and frequencies.
Results are of the data's type, that of x, logits, gates or z; those of 16 bits
are computed in float32 and rounded once. Other mixtures NumPy casts to the first of
these types that holds them all safely.

Examples
--------
>>> import numpy as np
>>> from posenc import ufunc
>>> cos, sin = ufunc.cos_sin(np.arange(3.0), np.array([1.0, 0.1]))
>>> ufunc.rope_half(np.ones((3, 4)), cos, sin).shape
(3, 4)
"""

# SPDX-License-Identifier: BSD-3-Clause
from ._core import (
    add_sinusoidal_concat,
    add_sinusoidal_concat_flipped,
    add_sinusoidal_interleaved,
    cope_attention,
    cope_bias,
    cope_gates,
    cope_interpolate,
    cope_positions,
    cos_sin,
    rope_complex,
    rope_decay,
    rope_half,
    rope_interleaved,
    t5_bucket,
)

__all__ = [
    "add_sinusoidal_concat",
    "add_sinusoidal_concat_flipped",
    "add_sinusoidal_interleaved",
    "cope_attention",
    "cope_bias",
    "cope_gates",
    "cope_interpolate",
    "cope_positions",
    "cos_sin",
    "rope_complex",
    "rope_decay",
    "rope_half",
    "rope_interleaved",
    "t5_bucket",
]
