"""Who did the work, posenc or transformers, and for what reason the latter.

Knows neither rotations nor tables, models nor configs. torch is imported inside
functions only.
"""

# SPDX-License-Identifier: BSD-3-Clause

import threading
from collections import Counter

TRACING = "traced by torch.compile or torch.export (counted once per trace)"


class Tally:
    """Who did the work and why: (work, None) is posenc, (work, reason) is not."""

    def __init__(self):
        self._counts = Counter()
        self._lock = threading.Lock()

    def add(self, work, reason=None):
        with self._lock:
            self._counts[work, reason] += 1

    def copy(self):
        with self._lock:
            return self._counts.copy()


tally = Tally()


def make_trace_mark(work):
    """Make a function that counts a trace and leaves nothing in the traced graph."""
    import torch

    @torch.compiler.assume_constant_result
    def traced():
        tally.add(work, TRACING)
        return True

    return traced


def make_tensor_obstacle():
    """Make the function that says why NumPy may not read these tensors, or None."""
    import torch
    from torch.autograd import forward_ad

    plain = torch.Tensor, torch.nn.Parameter
    dispatch_modes = torch._C._len_torch_dispatch_stack
    function_modes = torch._C._len_torch_function_stack
    transform = torch._C._functorch.peek_interpreter_stack

    def obstacle(tensors):
        for tensor in tensors:
            if type(tensor) not in plain:
                return f"a {type(tensor).__name__} instead of a plain tensor"
        if torch.jit.is_tracing():
            return "traced by torch.jit"
        if dispatch_modes() or function_modes() or transform() is not None:
            return "a torch mode or function transform is active"
        if forward_ad._current_level >= 0:
            return "forward-mode derivatives are on"
        for tensor in tensors:
            if not tensor.is_cpu:
                return f"device {tensor.device.type}"
            if tensor.layout is not torch.strided or tensor.is_neg():
                return "a sparse or lazily negated tensor"
        return None

    return obstacle
