"""What lies between a Mamba-2 mixer's projections as one node in C (`mixer.c`), for training in fp32 on a CPU.

The same formulas as scan.py and norms.py, and the same numbers up to rounding. In PyTorch they are some 150 operations
a layer, forward and backward, and most of their time goes into moving intermediates through memory; here a chunk of
tokens stays in the cache. Where there is no C compiler, for other dtypes and shapes, on several threads and with
context parallelism PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nemo_cascade.models.native import compiled

SOURCE = Path(__file__).with_name("mixer.c")
LANES, CHUNK = 16, 16  # as in the C file


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "width", "groups", "state", "taps")), ("eps", ctypes.c_float)
    ]  # fmt: skip


_Pointers = ctypes.c_void_p * 6  # Weights and Gradients of the C file


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled mixer, or None where it cannot be had; says once which it is."""
    loaded = compiled(SOURCE, "training the Mamba mixer")
    if loaded is not None:
        loaded.mixer_scratch.restype = ctypes.c_int64
    return loaded


@dataclass(frozen=True)
class MixerSizes:
    """Heads of a rank and their sizes."""

    heads: int
    width: int
    groups: int
    state: int
    taps: int
    eps: float

    def usable(self, row: torch.Tensor) -> bool:
        """Whether the C mixer takes this row."""
        if row.device.type != "cpu" or row.dtype != torch.float32 or torch.get_num_threads() > 1:
            return False
        return self.width % LANES == 0 and self.state % 2 == 0 and library() is not None

    def struct(self) -> _Shape:
        """For C."""
        return _Shape(self.heads, self.width, self.groups, self.state, self.taps, self.eps)


def mix(
    row_TC: torch.Tensor, weights: Sequence[torch.Tensor], bounds: Sequence[int], sizes: MixerSizes
) -> torch.Tensor:
    """The projected row [z | x B C | dt] -> what out_proj reads [T, heads * width]; differentiable.

    `weights`: convolution [channels, taps] and its bias, dt_bias, A_log, D, norm weight. `bounds`: cu_seqlens.
    """
    kept = torch.is_grad_enabled()
    mixed: torch.Tensor = _Mix.apply(row_TC, *weights, tuple(bounds), sizes, kept)
    return mixed


class _Mix(torch.autograd.Function):
    """The node. Keeps the row, y, and a state for every CHUNK tokens of a sequence."""

    @staticmethod
    def forward(ctx: Any, row_TC: torch.Tensor, *rest: Any) -> torch.Tensor:
        *weights, bounds, sizes, kept = rest
        loaded = library()
        assert loaded is not None
        if row_TC.stride(1) != 1:
            row_TC = row_TC.contiguous()
        operands = [weights[0].t().contiguous(), *(weight.contiguous() for weight in weights[1:])]
        inner = sizes.heads * sizes.width
        chunks = sum(-(-(end - begin) // CHUNK) for begin, end in itertools.pairwise(bounds))
        out, y = (row_TC.new_empty(row_TC.shape[0], inner) for _ in range(2))
        states = row_TC.new_empty(chunks, sizes.heads, sizes.state, sizes.width) if kept else None
        shape = sizes.struct()
        scratch = _scratch(loaded, shape)
        loaded.mixer_forward(
            ctypes.byref(shape), _pointers(operands), _pointer(row_TC), _number(row_TC.stride(0)), _bounds(bounds),
            _number(len(bounds) - 1), _pointer(out), _pointer(y), None if states is None else _pointer(states),
            _pointer(scratch),
        )  # fmt: skip
        if kept:
            ctx.save_for_backward(row_TC, y, states, *operands)
            ctx.bounds, ctx.sizes = bounds, sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        row_TC, y, states, *operands = ctx.saved_tensors
        loaded, shape, bounds = library(), ctx.sizes.struct(), ctx.bounds
        assert loaded is not None
        grad_row = torch.empty_like(row_TC, memory_format=torch.contiguous_format)
        grads = [torch.zeros_like(operand) for operand in operands]
        scratch, grad_TI = _scratch(loaded, shape), grad_TI.contiguous()
        loaded.mixer_backward(
            ctypes.byref(shape), _pointers(operands), _pointer(row_TC), _number(row_TC.stride(0)), _bounds(bounds),
            _number(len(bounds) - 1), _pointer(y), _pointer(states), _pointer(grad_TI),
            _pointer(grad_row), _pointers(grads), _pointer(scratch),
        )  # fmt: skip
        return grad_row, grads[0].t(), *grads[1:], None, None, None


def _number(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _pointers(tensors: Sequence[torch.Tensor]) -> Any:
    return ctypes.byref(_Pointers(*(tensor.data_ptr() for tensor in tensors)))


def _bounds(bounds: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(bounds))(*bounds)


def _scratch(loaded: ctypes.CDLL, shape: _Shape) -> torch.Tensor:
    """What C works in; the caller holds it until C has returned."""
    return torch.empty(loaded.mixer_scratch(ctypes.byref(shape)), dtype=torch.float32)
