"""Local experts for Megatron's MoELayer: one matrix product per expert over its contiguous slice of tokens.

Router, dispatch and shared expert are Megatron's (TopKRouter: sigmoid scores, expert bias in the choice only, weights
normalised and scaled by 2.5, fp32). Its SequentialMLP runs one small module per expert; this runs two products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter

from nemo_cascade.models.fp8_emulation import BlockRecipe, expert_products
from nemo_cascade.models.sharding import stacked_experts


class _GroupedSquaredReluMLP(torch.autograd.Function):
    """y_t = p_t down_e relu(up_e x_t)^2, tokens sorted by expert e; x [T, h], up [E, f, h], down [E, h, f], p [T]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, probs: torch.Tensor, counts: list[int]
    ) -> torch.Tensor:
        rectified = x.new_empty(x.shape[0], up.shape[1])
        for expert, part in _slices(counts):
            torch.mm(x[part], up[expert].t(), out=rectified[part])
        rectified.relu_()
        squared = rectified.square().mul_(probs[:, None])
        out = torch.empty_like(x)
        for expert, part in _slices(counts):
            torch.mm(squared[part], down[expert].t(), out=out[part])
        ctx.save_for_backward(x, up, down, probs, rectified, squared)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, up, down, probs, rectified, squared = ctx.saved_tensors
        grad = grad.contiguous()
        grad_up, grad_down = torch.zeros_like(up), torch.zeros_like(down)
        inner = torch.empty_like(rectified)
        for expert, part in _slices(ctx.counts):
            torch.mm(grad[part], down[expert], out=inner[part])
            torch.mm(grad[part].t(), squared[part], out=grad_down[expert])
        # squared = p r^2: dp = sum(inner r^2), dr = 2 p r inner
        inner *= rectified
        grad_probs = (inner * rectified).sum(-1)
        inner.mul_((2.0 * probs)[:, None])
        grad_x = torch.empty_like(x)
        for expert, part in _slices(ctx.counts):
            torch.mm(inner[part], up[expert], out=grad_x[part])
            torch.mm(inner[part].t(), x[part], out=grad_up[expert])
        return grad_x, grad_up, grad_down, grad_probs, None


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of tokens sorted by expert; experts without tokens left out."""
    parts, begin = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(begin, begin + count)))
        begin += count
    return parts


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
        operands = (permuted_local_hidden_states, self.up, self.down, probs, tokens_per_expert.tolist())
        if self.fp8 is not None:
            return expert_products(*operands, self.fp8), None
        return _GroupedSquaredReluMLP.apply(*operands), None

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
            router.local_tokens_per_expert -= routed[1][~real_t].sum(dim=0)

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
