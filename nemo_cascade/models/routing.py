"""Which experts a forward pass uses: recorded from one pass, replayed in another.

A policy whose sampler, log-probability pass and update choose different experts for the same token compares
log-probabilities of different functions. Replay fixes the choice (arXiv 2507.18071, 2510.11370) and nothing else: the
weights are computed anew from the router's own scores of the replayed experts, and carry its gradient.

megatron-core 0.16.1 has RouterReplay for this (moe_enable_routing_replay), but keeps every router of the process in one
list in the order of construction, and its state on the routers from one call to the next: a teacher's or reference's
pass through the same parameters would read or overwrite the policy's choices, and a second model changes what the first
replays. Here the choices travel with the packed row through one forward call; a layer hands its router what is its own
and takes it back before it returns. Not valid with activation recomputation of the experts, which runs the router again
after the call; pipeline stages and context parallelism are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_cascade.models.dispatch import LocalDispatcher
from nemo_cascade.types import NO_CHOICE, UserError

NO_REPLAY = (
    "routing_replay: does not work with hardware.pipeline_parallel or hardware.context_parallel above 1; set it to none"
)


@dataclass
class Routing:
    """The experts of one packed row in one forward pass; make a new one for each call.

    `given` [T, MoE layers, top-k] uint8: what to replay, None to let the routers choose. After the call `chosen` says
    what was used and `difference` how many replayed choices are not the router's own.
    """

    given: torch.Tensor | None = None
    _counts: torch.Tensor | None = None
    _used: dict[int, torch.Tensor] = field(default_factory=dict)
    _count: int = 0  # tokens of the row without padding
    _group: dist.ProcessGroup | None = None

    def begin(self, count: int, padded: int, top_k: int, group: dist.ProcessGroup) -> None:
        """Called by the model: the row has `count` tokens, `padded` with padding, cut evenly over the ranks of `group`.

        Each rank keeps the part whose tokens its routers see.
        """
        assert not self._used, "a Routing belongs to one forward call"
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        if stages > 1 or parallel_state.get_context_parallel_world_size() > 1:
            raise UserError(NO_REPLAY)
        self._count, self._group = count, group
        if self.given is not None:
            if self.given.shape[0] != count or self.given.shape[2] != top_k:
                raise ValueError(f"routing {list(self.given.shape)} does not fit {count} tokens of top-{top_k}")
            filler = self.given.new_full((padded - count, *self.given.shape[1:]), NO_CHOICE)
            rows = torch.cat([self.given, filler])
            self.given = rows.chunk(group.size())[group.rank()] if group.size() > 1 else rows

    def choose(self, layer: int, scores_TE: torch.Tensor, top_k: int, own: Callable[..., Any]) -> Any:
        """(scores of the chosen [T, k], indices [T, k]) of MoE layer `layer`, in the form of torch.topk."""
        own_values, own_Tk = own(scores_TE, top_k)
        if self.given is None:
            self._used[layer] = own_Tk
            return own_values, own_Tk
        given_Tk = self.given[:, layer].long()
        known_T1 = (given_Tk != NO_CHOICE).all(-1, keepdim=True)
        differs_Tk = (given_Tk[:, :, None] != own_Tk[:, None, :]).all(-1) & known_T1
        counts = torch.stack([differs_Tk.sum(), known_T1.sum() * top_k])
        self._counts = counts if self._counts is None else self._counts + counts
        used_Tk = torch.where(known_T1, given_Tk, own_Tk)
        self._used[layer] = used_Tk
        return scores_TE.gather(1, used_Tk), used_Tk

    def difference(self) -> torch.Tensor:
        """After a replay, int64 [2]: replayed choices that are not among the router's own, and replayed choices.

        On the device: whoever reads it waits, this does not. Collective as `chosen`.
        """
        assert self._counts is not None, "nothing was replayed"
        counts = self._counts.clone()
        if self._group is not None and self._group.size() > 1:
            dist.all_reduce(counts, group=self._group)
        return counts

    def chosen(self) -> torch.Tensor:
        """The experts used, uint8 [T, MoE layers, top-k]; collective over tensor-parallel ranks."""
        assert self._group is not None, "no forward call has used this Routing"
        local = torch.stack([self._used[layer] for layer in sorted(self._used)], dim=1).to(torch.uint8)
        if self._group.size() > 1:
            parts = [torch.empty_like(local) for _ in range(self._group.size())]
            dist.all_gather(parts, local.contiguous(), group=self._group)
            local = torch.cat(parts)
        return local[: self._count]


@dataclass(frozen=True)
class _LayerRouting:
    """One layer's view of a Routing, under the method that megatron's topk_routing_with_score_function calls."""

    routing: Routing
    layer: int

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice among `scores` (with the expert bias); megatron weighs it by the scores without."""
        return self.routing.choose(
            self.layer, scores, topk, lambda values, count: default_compute_topk(values, count, num_groups, group_topk)
        )


class MoETransformerLayer(TransformerLayer):
    """Megatron's layer, whose router follows the row's Routing for the length of one call.

    The layer spec gives `moe_layers`, the numbers (from 1) of the model's MoE layers in order, and `local`: tokens stay
    on this rank, in place of the dispatcher that Megatron's config names, which has no word for that.
    """

    def __init__(self, *args: Any, moe_layers: tuple[int, ...], local: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moe_index = moe_layers.index(self.layer_number)
        if local:
            self.mlp.token_dispatcher = LocalDispatcher(self.config, self.pg_collection)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLayer; UserError where the router would run again after the call, without the Routing."""
        routing = getattr(kwargs.get("packed_seq_params"), "routing", None)
        if routing is None:
            return super().forward(*args, **kwargs)
        granularity, selected = self.config.recompute_granularity, self.config.recompute_modules or ()
        if granularity == "full" or (granularity == "selective" and "moe" in selected):
            raise UserError(
                "routing_replay: does not work with activation recomputation of the experts (recompute_granularity), "
                "whose second pass would choose others; set it to none"
            )
        router = self.mlp.router
        router.router_replay = _LayerRouting(routing, self.moe_index)
        try:
            return super().forward(*args, **kwargs)
        finally:
            router.router_replay = None
