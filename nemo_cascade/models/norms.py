"""RMSNorm, plain and gated, with hand-written gradients: a third of the memory passes that autograd makes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class _GroupedRMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean_group(x^2) + eps) * w over the last dimension cut into groups, computed in at least fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
        size = x.shape[-1] // groups
        wide = x.view(*x.shape[:-1], groups, size)
        if wide.dtype in (torch.bfloat16, torch.float16):
            wide = wide.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(size).add_(eps).rsqrt_()
        unit = (wide * inverse).view(x.shape)
        ctx.save_for_backward(unit, inverse, weight)
        ctx.groups = groups
        return (unit * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        unit, inverse, weight = ctx.saved_tensors
        dtype = grad.dtype
        grad = grad.to(unit.dtype)
        product = grad * unit
        grad_weight = product.view(-1, weight.shape[0]).sum(0)
        shape = (*unit.shape[:-1], ctx.groups, unit.shape[-1] // ctx.groups)
        # sum_i(grad_i w_i unit_i) per group, then dx = (grad w - unit * mean) / rms
        mean = product.mul_(weight).view(shape).mean(-1, keepdim=True)
        grad_x = torch.addcmul((grad * weight).view(shape), unit.view(shape), mean, value=-1.0).mul_(inverse)
        return grad_x.view(unit.shape).to(dtype), grad_weight.to(weight.dtype), None, None


class RMSNorm(torch.nn.Module):
    """The pre-norm of every layer and the final norm, with the constructor that Megatron's specs call.

    megatron's WrappedTorchNorm refuses sequence parallelism, which MoE with tensor parallelism demands; this one marks
    its weight so that its gradient is summed over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None, **_: Any) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        normed: torch.Tensor = _GroupedRMSNorm.apply(hidden, self.weight, 1, self.eps)
        return normed


class _SiluGate(torch.autograd.Function):
    """y * silu(z) in two passes."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.silu(z)
        ctx.save_for_backward(y, z, gate)
        return y * gate

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, z, gate = ctx.saved_tensors
        return grad * gate, torch.ops.aten.silu_backward(grad * y, z)


def gated_rms_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Mamba-2's output norm with the gate before the norm: RMSNorm_group(y * silu(z)) * weight.

    y, z [..., channels]; the mean square runs over channels / groups channels.
    """
    gated = _SiluGate.apply(y.float() if y.dtype == torch.bfloat16 else y, z.to(y.dtype) if z.dtype != y.dtype else z)
    normed: torch.Tensor = _GroupedRMSNorm.apply(gated, weight, groups, eps)
    return normed
