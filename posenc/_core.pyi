# SPDX-License-Identifier: BSD-3-Clause
from types import NotImplementedType
from typing import Any, Final

import numpy as np

add_sinusoidal_concat: Final[np.ufunc]
add_sinusoidal_concat_flipped: Final[np.ufunc]
add_sinusoidal_interleaved: Final[np.ufunc]
cope_attention: Final[np.ufunc]
cope_bias: Final[np.ufunc]
cope_gates: Final[np.ufunc]
cope_interpolate: Final[np.ufunc]
cope_positions: Final[np.ufunc]
cos_sin: Final[np.ufunc]
rope_complex: Final[np.ufunc]
rope_decay: Final[np.ufunc]
rope_half: Final[np.ufunc]
rope_interleaved: Final[np.ufunc]
t5_bucket: Final[np.ufunc]

def build_info() -> dict[str, Any]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
def rope_arrays(
    x: Any,
    cos: Any,
    sin: Any,
    layout: Any,
    axis: Any,
    positions: Any,
    adjoint: Any,
    out: Any,
    rounding: Any,
    start: Any,
    /,
) -> Any | NotImplementedType: ...
def rope_qk_arrays(
    q: Any,
    k: Any,
    cos: Any,
    sin: Any,
    layout: Any,
    axis: Any,
    positions: Any,
    adjoint: Any,
    out: Any,
    rounding: Any,
    start: Any,
    /,
) -> tuple[Any, Any] | NotImplementedType: ...
def rope_qk_twin(
    q: Any, k: Any, cos: Any, sin: Any, layout: Any, axis: Any, out: Any, /
) -> tuple[Any, Any] | NotImplementedType: ...
def halves_agree(cos: Any, sin: Any, /) -> bool | NotImplementedType: ...
def rope_complex_arrays(
    x: Any,
    cis: Any,
    axis: Any,
    positions: Any,
    adjoint: Any,
    out: Any,
    rounding: Any,
    start: Any,
    /,
) -> Any | NotImplementedType: ...
def cos_sin_arrays(
    positions: Any,
    inv_freq: Any,
    factor: float,
    float32_angles: bool,
    cos: Any,
    sin: Any,
    /,
) -> NotImplementedType | None: ...
def cope_attention_arrays(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    gate_key: np.ndarray | None,
    embedding: np.ndarray,
    mask: np.ndarray | None,
    scale: float,
    position_scale: float,
    causal: bool,
    out: np.ndarray,
    statistics: np.ndarray | None,
    /,
) -> None: ...
def cope_attention_backward_arrays(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    gate_key: np.ndarray | None,
    embedding: np.ndarray,
    mask: np.ndarray | None,
    scale: float,
    position_scale: float,
    causal: bool,
    out: np.ndarray,
    statistics: np.ndarray,
    grad_out: np.ndarray,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    dgate_key: np.ndarray | None,
    dembedding: np.ndarray,
    /,
) -> None: ...
def cope_attention_chunks(n_unit: int, n_row: int, /) -> int: ...
def cope_bias_arrays(
    logits: np.ndarray,
    z: np.ndarray,
    mask: np.ndarray | None,
    causal: bool,
    out: np.ndarray,
    /,
) -> None: ...
def cope_bias_backward_arrays(
    logits: np.ndarray,
    z: np.ndarray,
    mask: np.ndarray | None,
    causal: bool,
    grad_out: np.ndarray,
    dlogits: np.ndarray,
    dz: np.ndarray,
    /,
) -> None: ...
def add_learned_arrays(
    x: Any,
    table: Any,
    positions: Any,
    start: int,
    mask: Any,
    scale: float,
    out: Any,
    /,
) -> Any: ...
def add_sinusoidal_arrays(
    x: Any,
    inv_freq: np.ndarray,
    interleaved: bool,
    cos_first: bool,
    positions: Any,
    start: int,
    mask: Any,
    scale: float,
    out: Any,
    /,
) -> Any: ...
def sinusoidal_arrays(
    positions: Any, inv_freq: Any, interleaved: bool, cos_first: bool, out: Any, /
) -> None: ...
def bias_arrays(
    values: np.ndarray, logits: np.ndarray | None, out: np.ndarray, /
) -> None: ...
def bias_collect_arrays(grad: np.ndarray, sums: np.ndarray, /) -> None: ...
def t5_values_arrays(
    weight: np.ndarray,
    offsets: np.ndarray,
    max_distance: int,
    bidirectional: bool,
    values: np.ndarray,
    /,
) -> None: ...
def consecutive(positions: np.ndarray, /) -> range | None: ...
