"""Megatron's linear layers cut over tensor-parallel ranks, with another product inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from nemo_cascade.models import onednn

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""x [..., K] and weight [N, K] -> x weight^T [..., N], differentiable."""


def parallel_linear(
    product: Linear,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    allreduce_dgrad: bool = False,
    sequence_parallel: bool = False,
    tp_group: torch.distributed.ProcessGroup | None = None,
    **_: Any,
) -> torch.Tensor:
    """What Megatron's linear layers compute (their `_forward_impl`), with this product."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = product(input, weight)
    return output if bias is None else output + bias


class LocalColumnLinear(ColumnParallelLinear):
    """Cut by output; multiplies with oneDNN where that is faster (onednn.py)."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if onednn.usable(input, weight):
            return parallel_linear(onednn.linear, input, weight, *args, **kwargs)
        return super()._forward_impl(input, weight, *args, **kwargs)


class LocalRowLinear(RowParallelLinear):
    """Cut by input; multiplies with oneDNN where that is faster (onednn.py)."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if onednn.usable(input, weight):
            return parallel_linear(onednn.linear, input, weight, *args, **kwargs)
        return super()._forward_impl(input, weight, *args, **kwargs)
