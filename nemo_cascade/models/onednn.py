"""Products of fp32 matrices by oneDNN, on processors for which MKL has only AVX2 kernels.

PyTorch's x86 wheels hold both libraries and multiply fp32 with MKL, which keeps its AVX-512 kernels for Intel's
processors. On those of AMD that have AVX-512, oneDNN computes the same products in about half the time
(`python -m tools.bench.learner` prints both). It compiles a kernel for every new shape and keeps a thousand. For an
expert, whose rows are few and change in number with every call, that would cost what it gains: they are cut at a
multiple of ROWS.

Everywhere else, for small products, and with NEMO_CASCADE_NATIVE=0 or torch.backends.mkldnn disabled, MKL multiplies.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LOG = logging.getLogger(__name__)
ROWS = 64
WORTH = 2**21  # multiplications from which on oneDNN is faster, its call of 10 microseconds included


def amd_with_avx512(cpuinfo: str) -> bool:
    """What Linux says of the first processor, in /proc/cpuinfo."""
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    values = {name.strip(): value.split() for name, _, value in lines}
    return values.get("vendor_id") == ["AuthenticAMD"] and "avx512f" in values.get("flags", [])


@functools.cache
def here() -> bool:
    """Whether this machine multiplies with oneDNN; said once."""
    file = Path("/proc/cpuinfo")
    if os.environ.get("NEMO_CASCADE_NATIVE", "1") == "0" or not (file.is_file() and amd_with_avx512(file.read_text())):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        LOG.info("products on the CPU by MKL: this PyTorch has no oneDNN, which would halve their time here")
        return False
    LOG.info("products on the CPU by oneDNN")
    return True


def usable(*tensors: torch.Tensor) -> bool:
    """Whether products of these may be oneDNN's: fp32 on a CPU of the kind."""
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return False
    return here() and torch.backends.mkldnn.enabled


def _worth(left_MK: torch.Tensor, right_KN: torch.Tensor) -> bool:
    return left_MK.shape[0] * left_MK.shape[1] * right_KN.shape[1] >= WORTH and usable(left_MK, right_KN)


def _product(left_MK: torch.Tensor, right_KN: torch.Tensor) -> torch.Tensor:
    """oneDNN's fully connected layer: input [M, K], which must lie row by row in memory, and weight [N, K].

    Where both factors lie the other way (the gradient of a weight), one is copied: the smaller. The product is then a
    transposed view.
    """
    swapped = right_KN.t()
    if not left_MK.is_contiguous() and (swapped.is_contiguous() or swapped.shape[0] < left_MK.shape[0]):
        return _product(swapped.contiguous(), left_MK.t()).t()
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        left_MK.contiguous(), _dense(swapped), None, "none", [], None
    )
    return made


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix without gaps in memory, as it is or transposed."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def multiply(left_MK: torch.Tensor, right_KN: torch.Tensor) -> torch.Tensor:
    """left right [M, N], row by row in memory where `left_MK` is. Not differentiable: `linear` is."""
    return _product(left_MK, right_KN) if _worth(left_MK, right_KN) else torch.mm(left_MK, right_KN)


def multiply_rows(left_MK: torch.Tensor, right_KN: torch.Tensor, out_MN: torch.Tensor) -> None:
    """left right into `out_MN`, for a number of rows M that changes from call to call."""
    cut = left_MK.shape[0] // ROWS * ROWS
    if not _worth(left_MK[:cut], right_KN):
        torch.mm(left_MK, right_KN, out=out_MN)
        return
    out_MN[:cut].copy_(_product(left_MK[:cut], right_KN))
    if cut < left_MK.shape[0]:
        torch.mm(left_MK[cut:], right_KN, out=out_MN[cut:])


def multiply_over_rows(left_TM: torch.Tensor, right_TN: torch.Tensor, out_MN: torch.Tensor) -> None:
    """left^T right into `out_MN`, for a number of rows T that changes from call to call."""
    cut = left_TM.shape[0] // ROWS * ROWS
    if not _worth(left_TM[:cut].t(), right_TN):
        torch.mm(left_TM.t(), right_TN, out=out_MN)
        return
    out_MN.copy_(_product(left_TM[:cut].t(), right_TN[:cut]))
    if cut < left_TM.shape[0]:
        out_MN.addmm_(left_TM[cut:].t(), right_TN[cut:])


class _Linear(torch.autograd.Function):
    """x weight^T; x [T, K], weight [N, K]."""

    @staticmethod
    def forward(ctx: Any, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        # by rows, as all of what leaves here: Megatron adds up over ranks in place, in a copy of what lies otherwise
        return multiply(x_TK.contiguous(), weight_NK.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_TK, weight_NK = ctx.saved_tensors
        grad_TN = grad_TN.contiguous()
        of_x = multiply(grad_TN, weight_NK) if ctx.needs_input_grad[0] else None
        of_weight = multiply(grad_TN.t(), x_TK) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def linear(x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.linear without a bias."""
    if not usable(x, weight_NK):
        return F.linear(x, weight_NK)
    out_TN: torch.Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight_NK)
    return out_TN.view(*x.shape[:-1], weight_NK.shape[0])
