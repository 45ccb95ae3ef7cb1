"""Local experts for Megatron's MoELayer: matrix products of contiguous slices of tokens, one to an expert.

Router, dispatch and shared expert are Megatron's (TopKRouter: sigmoid scores, expert bias in the choice only, weights
normalised and scaled by 2.5, fp32). Its SequentialMLP runs one small module per expert; this runs two products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter

from nemo_cascade.models.fp8_emulation import BlockRecipe, expert_products
from nemo_cascade.models.onednn import multiply_over_rows, multiply_rows
from nemo_cascade.models.sharding import stacked_experts


@dataclass(frozen=True)
class _InTurn:
    """Products of sorted rows with their experts' matrices, one expert after another."""

    counts: list[int]

    def rows(self, x_TK: torch.Tensor, weight_EKN: torch.Tensor) -> torch.Tensor:
        """Each row times the matrix of its expert [T, N]."""
        out_TN = x_TK.new_empty(x_TK.shape[0], weight_EKN.shape[2])
        for expert, part in self._parts():
            multiply_rows(x_TK[part], weight_EKN[expert], out_TN[part])
        return out_TN

    def outer(self, left_TM: torch.Tensor, right_TN: torch.Tensor) -> torch.Tensor:
        """left^T right over the rows of each expert [E, M, N]; zero where an expert has none."""
        out_EMN = left_TM.new_zeros(len(self.counts), left_TM.shape[1], right_TN.shape[1])
        for expert, part in self._parts():
            multiply_over_rows(left_TM[part], right_TN[part], out_EMN[expert])
        return out_EMN

    def _parts(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows); experts without tokens left out."""
        begin = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(begin, begin + count)
            begin += count


@dataclass(frozen=True)
class _AtOnce:
    """The same in one kernel a product, which reads where each expert's rows end on the device.

    On a card a product an expert costs more time to start than to compute.
    """

    ends_E: torch.Tensor  # int32

    def rows(self, x_TK: torch.Tensor, weight_EKN: torch.Tensor) -> torch.Tensor:
        """Each row times the matrix of its expert [T, N]."""
        return F.grouped_mm(x_TK, weight_EKN, offs=self.ends_E)

    def outer(self, left_TM: torch.Tensor, right_TN: torch.Tensor) -> torch.Tensor:
        """left^T right over the rows of each expert [E, M, N]; zero where an expert has none."""
        return F.grouped_mm(left_TM.t(), right_TN, offs=self.ends_E)


def expert_kernel(x_TK: torch.Tensor, weight: torch.Tensor, tokens_E: torch.Tensor) -> _InTurn | _AtOnce:
    """How the products of these rows are computed: at once in bf16 on Hopper, where the kernel takes the widths.

    Elsewhere torch (2.10 and later have the function) makes a product an expert of it, and waits for the device to do
    so; on Blackwell its weight gradients of experts without tokens were not zero (pytorch/pytorch#172439).
    """
    aligned = x_TK.dtype == torch.bfloat16 and all(width % 8 == 0 for width in weight.shape[1:])  # 16 bytes
    if x_TK.is_cuda and aligned and x_TK.shape[0] > 0 and hasattr(F, "grouped_mm"):
        if torch.cuda.get_device_capability(x_TK.device)[0] == 9:
            return _AtOnce(tokens_E.to(x_TK.device, non_blocking=True).cumsum(0).int())
    return _InTurn(tokens_E.tolist())


class _GroupedSquaredReluMLP(torch.autograd.Function):
    """y_t = p_t down_e relu(up_e x_t)^2, tokens sorted by expert e; x [T, h], up [E, f, h], down [E, h, f], p [T]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        probs: torch.Tensor,
        experts: _InTurn | _AtOnce,
    ) -> torch.Tensor:
        rectified = experts.rows(x, up.transpose(1, 2)).relu_()
        squared = rectified.square().mul_(probs[:, None])
        ctx.save_for_backward(x, up, down, probs, rectified, squared)
        ctx.experts = experts
        return experts.rows(squared, down.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, up, down, probs, rectified, squared = ctx.saved_tensors
        experts: _InTurn | _AtOnce = ctx.experts
        grad = grad.contiguous()
        inner = experts.rows(grad, down)
        grad_down = experts.outer(grad, squared)
        # squared = p r^2: dp = sum(inner r^2), dr = 2 p r inner
        inner *= rectified
        grad_probs = (inner * rectified).sum(-1)
        inner.mul_((2.0 * probs)[:, None])
        return experts.rows(inner, up), experts.outer(inner, x), grad_down, grad_probs, None


class LocalExperts(MegatronModule):
    """This rank's experts as two stacked weights, up [E, width, hidden] and down [E, hidden, width]; squared ReLU."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection, **_: Any
    ) -> None:
        super().__init__(config)
        self.pg_collection = pg_collection
        self.fp8: BlockRecipe | None = None  # set where a profile emulates FP8
        width, hidden, dtype = config.moe_ffn_hidden_size, config.hidden_size, config.params_dtype
        self.up = torch.nn.Parameter(torch.empty(num_local_experts, width, hidden, dtype=dtype))
        self.down = torch.nn.Parameter(torch.empty(num_local_experts, hidden, width, dtype=dtype))
        for weight, init in ((self.up, config.init_method), (self.down, config.output_layer_init_method)):
            _fill(weight, init, pg_collection.ep.rank(), pg_collection.ep.size())
            weight.allreduce = counted_as_dense(pg_collection)  # type: ignore[attr-defined]
            # The gradient norm leaves out what it takes for copies on other tensor-parallel ranks. These are not: where
            # experts are copies, the group over which their norm is summed (expert and pipeline ranks) has one of them.
            set_tensor_model_parallel_attributes(weight, True, 0, 1)

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Tokens sorted by expert [T, hidden] -> the same rows, already weighted by the router."""
        probs = permuted_probs.to(permuted_local_hidden_states.dtype)
        rows, weights = permuted_local_hidden_states, (self.up, self.down)
        if self.fp8 is not None:
            return expert_products(rows, *weights, probs, tokens_per_expert.tolist(), self.fp8), None
        kernel = expert_kernel(rows, self.up, tokens_per_expert)
        return _GroupedSquaredReluMLP.apply(rows, *weights, probs, kernel), None

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; ours are never delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's hook for distributed checkpoints; names are those of its grouped experts, which Transformer Engine
        runs.
        """
        names = {"up": "linear_fc1", "down": "linear_fc2"}
        return {
            prefix + own: stacked_experts(
                f"{prefix}experts.{theirs}.weight", self.get_parameter(own), self.pg_collection
            )
            for own, theirs in names.items()
        }


def counted_as_dense(groups: ProcessGroupCollection) -> bool:
    """Whether Megatron may sum experts' gradients like those of dense weights.

    With sequence parallelism each tensor-parallel rank's experts see its own tokens only: their gradients are summed
    over the expert-data-parallel group, which spans those ranks, and so must not count as dense.
    """
    return groups.ep.size() == 1 and groups.tp.size() == 1


def _fill(weight: torch.nn.Parameter, init: Callable[[torch.Tensor], Any], rank: int, ranks: int) -> None:
    """Draw all ranks' experts in order and keep this rank's: a seed gives the same model at every layout and dtype."""
    local = weight.shape[0]
    with torch.no_grad():
        for expert in range(local * ranks):
            drawn = torch.empty(weight.shape[1:], dtype=torch.float32)
            init(drawn)
            if expert // local == rank:
                weight[expert % local].copy_(drawn)


def routers(model: torch.nn.Module) -> list[TopKRouter]:
    """The routers of this rank's layers, in layer order."""
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


@contextmanager
def counting_only(model: torch.nn.Module, real_t: torch.Tensor | None) -> Iterator[None]:
    """Inside the context routers count the tokens marked in `real_t` (None: all) for their bias: padding is no load.

    Megatron's own padding_mask would mask experts instead of tokens (moe/router.py:542 lacks a dimension).
    """
    if real_t is None:
        yield
        return

    def forget(router: TopKRouter, _: Any, routed: tuple[torch.Tensor, torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            # not by selecting rows: a card's host would wait for their number
            router.local_tokens_per_expert -= (routed[1] & ~real_t[:, None]).sum(dim=0)

    handles = [router.register_forward_hook(forget) for router in routers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def freeze_routers(model: torch.nn.Module) -> None:
    """Take the router weights out of training (`optimizer.router_frozen`)."""
    for router in routers(model):
        router.weight.requires_grad_(False)


def update_expert_bias(model: torch.nn.Module, rate: float) -> None:
    """Move each router's bias by `rate` towards experts that got fewer tokens than average, and count anew.

    arXiv 2408.15664. Call once per optimizer step on every rank: token counts are summed over tensor- and data-parallel
    ranks. Rate 0 only resets the counts.
    """
    for router in routers(model):
        if rate > 0.0:
            updated = get_updated_expert_bias(router.local_tokens_per_expert, router.expert_bias, rate)
            router.expert_bias.copy_(updated)
        router.local_tokens_per_expert.zero_()
