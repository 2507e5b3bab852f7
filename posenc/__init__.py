"""
Positional encodings for transformers on the CPU.

C kernels behind plain functions on NumPy arrays and torch's CPU tensors; the raw
gufuncs are in `posenc.ufunc`. These modules want an import of their own:
`posenc.torch`, functions with gradients; `posenc.hf`, the patch for Hugging Face
models; `posenc.plot`, pictures.
"""

# SPDX-License-Identifier: BSD-3-Clause
from . import ufunc
from ._bias import (
    alibi_bias,
    alibi_slopes,
    fire_bias,
    kerple_bias,
    sandwich_bias,
    t5_bias,
    t5_bucket,
)
from ._cope import cope_bias, cope_gates, cope_interpolate, cope_positions
from ._cope_attention import cope_attention
from ._decay import (
    complete_turns,
    rope_decay,
    rope_period,
    sinusoidal_similarity,
    wavelengths,
)
from ._learned import add_learned, extend_table
from ._rope import (
    permute_layout,
    rope,
    rope_cis,
    rope_complex,
    rope_matrix,
    rope_qk,
    rope_table,
)
from ._rope_variants import rope_table_axial, rope_table_sections, rope_table_xpos
from ._runtime import build_info, get_num_threads, set_num_threads
from ._scaling import rope_inv_freq
from ._sinusoidal import add_sinusoidal, sinusoidal, sinusoidal_grid
from ._version import __version__

__all__ = [
    "__version__",
    "add_learned",
    "add_sinusoidal",
    "alibi_bias",
    "alibi_slopes",
    "build_info",
    "complete_turns",
    "cope_attention",
    "cope_bias",
    "cope_gates",
    "cope_interpolate",
    "cope_positions",
    "extend_table",
    "fire_bias",
    "get_num_threads",
    "kerple_bias",
    "permute_layout",
    "rope",
    "rope_cis",
    "rope_complex",
    "rope_decay",
    "rope_inv_freq",
    "rope_matrix",
    "rope_period",
    "rope_qk",
    "rope_table",
    "rope_table_axial",
    "rope_table_sections",
    "rope_table_xpos",
    "sandwich_bias",
    "set_num_threads",
    "sinusoidal",
    "sinusoidal_grid",
    "sinusoidal_similarity",
    "t5_bias",
    "t5_bucket",
    "ufunc",
    "wavelengths",
]
