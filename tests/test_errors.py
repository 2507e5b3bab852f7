"""What users get wrong: the exception, its whole text, and nothing written.

The table is errors.txt beside this file: a call, then the type and the text.
"""

# SPDX-License-Identifier: BSD-3-Clause

import re
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy.lib.stride_tricks import as_strided

import posenc

TABLE = Path(__file__).resolve().parent / "errors.txt"
FORM = re.compile(r"(\w+): [\w\[\]' ]+ must .+; got .*[^.]", re.DOTALL)


def cases():
    """Pairs (call, what it says); lines that begin with # are headings."""
    lines = [line for line in TABLE.read_text().splitlines() if line[:1] != "#"]
    blocks = "\n".join(lines).split("\n\n")
    return [tuple(b.strip().split("\n    ")) for b in blocks if b.strip()]


def floats(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def arrays():
    """What the calls of the table find; sizes B 2, H 3, T 5, D 12, M 6, P 9."""
    return {
        "x": floats(2, 3, 5, 12, seed=0),
        "k": floats(2, 1, 5, 12, seed=1),
        "cos": floats(5, 6, seed=2),
        "sin": floats(5, 6, seed=3),
        "cis": floats(5, 12, seed=4).view(np.complex64),
        "rows": floats(9, 6, seed=5),
        "positions": np.array([0, 8, 3, 3, 1]),
        "inv_freq": np.array([1.0, 0.5, 0.1]),
        "out": floats(2, 3, 5, 12, seed=6),
        "k_out": floats(2, 1, 5, 12, seed=7),
        "wide": np.full((5, 3), 7.0),
        "w": floats(24, 5, seed=8),
        "embedding": floats(12, 4, seed=9),
        "weight": floats(32, 3, seed=10),
        "slopes": np.abs(floats(3, seed=11)),
    }


def readonly(array):
    array = array.view()
    array.flags.writeable = False
    return array


TOOLS = {"np": np, "as_strided": as_strided, "bfloat16": bfloat16, "readonly": readonly}
FUNCTIONS = {name: getattr(posenc, name) for name in posenc.__all__}


@pytest.mark.parametrize(("call", "says"), cases(), ids=[call for call, _ in cases()])
def test_error(call, says):
    given = arrays()
    before = {name: array.tobytes() for name, array in given.items()}
    with pytest.raises((TypeError, ValueError)) as caught:
        eval(call, {**TOOLS, **FUNCTIONS, **given})
    assert f"{caught.type.__name__}: {caught.value}" == says
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert before == {name: array.tobytes() for name, array in given.items()}


@pytest.mark.parametrize(("call", "says"), cases(), ids=[call for call, _ in cases()])
def test_text_has_the_form(call, says):
    kind, text = says.split(": ", 1)
    assert kind in ("TypeError", "ValueError")
    form = FORM.fullmatch(text)
    assert form, text
    assert call.startswith(f"{form[1]}(")


def test_every_function_that_can_fail_is_in_the_table():
    called = {call.split("(")[0] for call, _ in cases()}
    silent = {"build_info", "get_num_threads", "ufunc", "__version__"}
    assert called == set(posenc.__all__) - silent


def test_the_slow_door_says_the_same():
    """Subclasses go through the gufuncs: other path, same words."""

    class Marked(np.ndarray):
        pass

    def outcome(call, view):
        given = {
            name: array.view(Marked) if view and name in ("x", "k") else array
            for name, array in arrays().items()
        }
        try:
            eval(call, {**TOOLS, **FUNCTIONS, **given})
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    calls = [call for call, _ in cases() if call.startswith("rope") and "x" in call]
    different = [call for call in calls if outcome(call, False) != outcome(call, True)]
    assert different == []


def test_wrong_number_of_arguments_in_the_private_door():
    for name in ("rope_arrays", "rope_qk_arrays", "rope_complex_arrays"):
        with pytest.raises(TypeError, match="arguments must number"):
            getattr(posenc._core, name)(1)
