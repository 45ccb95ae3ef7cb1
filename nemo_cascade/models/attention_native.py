"""Causal attention of a packed row as one node in C (`attention.c`), for training in fp32 on a CPU.

The numbers of torch's scaled_dot_product_attention up to rounding. That one wants blocks of sequences of one length:
the row is copied there and back, padding is computed with, and its kernel for the CPU is slow at small sizes. Where
there is no C compiler, on processors where it was not measured, for other dtypes and widths, on several threads and
with context parallelism PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nemo_cascade.models.native import compiled

LOG = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("attention.c")
QUERIES, WIDEST = 16, 256  # as in the C file
MEASURED = ("AVX2", "AVX512")  # by torch's name; with vectors of 4 floats it was slower than torch


class _Shape(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("heads", "groups", "width")), ("scale", ctypes.c_float)]


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled attention, or None where it cannot be had; says once which it is."""
    if torch.backends.cpu.get_cpu_capability() not in MEASURED:
        LOG.info("training attention in plain PyTorch: this processor has neither AVX2 nor AVX-512")
        return None
    loaded = compiled(SOURCE, "training attention")
    if loaded is not None:
        loaded.attention_scratch.restype = ctypes.c_int64
    return loaded


def usable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether C takes these."""
    if torch.get_num_threads() > 1 or any(
        part.device.type != "cpu" or part.dtype != torch.float32 for part in (query, key, value)
    ):
        return False
    width = query.shape[2]
    return width % QUERIES == 0 and width <= WIDEST and library() is not None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Sequence[int], scale: float
) -> torch.Tensor:
    """query [T, heads, width], key and value [T, groups, width] -> [T, heads * width]; differentiable.

    `bounds`: cu_seqlens. A head attends to the keys of its group, tokens to those before them in their sequence.
    """
    attended: torch.Tensor = _Attend.apply(query, key, value, tuple(bounds), scale)
    return attended


class _Attend(torch.autograd.Function):
    """The node. Keeps its inputs, its output and, of each query, highest score and inverse sum of the weights."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *operands, bounds, scale = inputs
        loaded = library()
        assert loaded is not None
        query, key, value = (part if part.stride(2) == 1 else part.contiguous() for part in operands)
        tokens, heads, width = query.shape
        out = query.new_empty(tokens, heads * width)
        tops, inverses = (query.new_empty(tokens, heads) for _ in range(2))
        shape = _Shape(heads, key.shape[1], width, scale)
        scratch = _scratch(loaded, shape, bounds)
        loaded.attention_forward(
            ctypes.byref(shape), _view(query), _view(key), _view(value), _bounds(bounds), _number(len(bounds) - 1),
            _pointer(out), _pointer(tops), _pointer(inverses), _pointer(scratch),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, tops, inverses)
        ctx.bounds, ctx.shape = bounds, shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, tops, inverses = ctx.saved_tensors
        loaded, shape, bounds = library(), ctx.shape, ctx.bounds
        assert loaded is not None
        grads = [torch.empty(part.shape, dtype=part.dtype) for part in (query, key, value)]
        scratch, grad_TI = _scratch(loaded, shape, bounds), grad_TI.contiguous()
        loaded.attention_backward(
            ctypes.byref(shape), _view(query), _view(key), _view(value), _bounds(bounds), _number(len(bounds) - 1),
            _pointer(out), _pointer(tops), _pointer(inverses), _pointer(grad_TI), *(_pointer(grad) for grad in grads),
            _pointer(scratch),
        )  # fmt: skip
        return *grads, None, None


def _number(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _view(tensor: torch.Tensor) -> Any:
    return ctypes.byref(_View(tensor.data_ptr(), tensor.stride(0), tensor.stride(1)))


def _bounds(bounds: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(bounds))(*bounds)


def _scratch(loaded: ctypes.CDLL, shape: _Shape, bounds: Sequence[int]) -> torch.Tensor:
    """What C works in; the caller holds it until C has returned."""
    longest = max(end - begin for begin, end in itertools.pairwise(bounds))
    return torch.empty(loaded.attention_scratch(ctypes.byref(shape), _number(longest)), dtype=torch.float32)
