"""Tokens to experts that are all on this rank, and back: the host never waits for the device, the bits never change.

Megatron's dispatchers serve experts on any rank. Where all are here its alltoall still selects by mask (the host waits
for the number of rows), copies the counts to the host and all rows once more, and adds the experts' outputs with
atomics, in the order in which they happen to finish. But each token has exactly k experts: every size is known
beforehand, and a token's k rows can be gathered and added, forward as backward.

Experts see the very rows that Megatron's dispatchers give them. A token's outputs are added in fp32 and rounded once,
where atomics round each partial sum to bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


@dataclass(frozen=True)
class Places:
    """Which token each of the R = T k rows is, sorted by expert and then by token, and where a token's k rows are."""

    entry_R: torch.Tensor  # place of (expert, token) in [E, T], flattened; rising
    token_R: torch.Tensor
    rows_Tk: torch.Tensor  # in the order of the experts
    count_E: torch.Tensor  # rows of each expert

    @classmethod
    def of(cls, routing_TE: torch.Tensor, top_k: int) -> Places:
        """From the router's map, in which exactly `top_k` experts of each token are True."""
        tokens = routing_TE.shape[0]
        # A map with fewer would leave indices of -1, at which the next gather stops.
        entry_R = torch.nonzero_static(routing_TE.t().reshape(-1), size=tokens * top_k)[:, 0]
        token_R = entry_R % tokens
        rows_Tk = token_R.argsort(stable=True).view(tokens, top_k)
        return cls(entry_R, token_R, rows_Tk, routing_TE.sum(dim=0))


def _added(rows_RH: torch.Tensor, rows_Tk: torch.Tensor) -> torch.Tensor:
    """The sum of each token's rows [T, H]; in fp32 for bf16 rows, rounded once."""
    return rows_RH.index_select(0, rows_Tk.flatten()).view(*rows_Tk.shape, -1).sum(dim=1)


class _Spread(torch.autograd.Function):
    """Tokens [T, H] -> the rows of all experts [R, H]. A token's gradient is the sum of its rows'."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: torch.Tensor, token_R: torch.Tensor, rows_Tk: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows_Tk)
        return hidden_TH.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rows_Tk,) = ctx.saved_tensors
        return _added(grad_RH, rows_Tk), None, None


class _Gather(torch.autograd.Function):
    """The rows of all experts [R, H] -> their sum for each token [T, H]. A row's gradient is its token's."""

    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, token_R: torch.Tensor, rows_Tk: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token_R)
        return _added(rows_RH, rows_Tk)

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return grad_TH.index_select(0, token_R), None, None


class LocalDispatcher(MoETokenDispatcher):
    """Megatron's interface for experts that are all on this rank; tokens per expert stay on the device.

    With tensor parallelism each rank holds all experts and its own tokens (sequence parallelism): nothing moves either.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.ep_size == 1 and self.tp_size == 1, "the layout was checked"
        self.places: Places | None = None  # of the pass that is under way

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [T, 1, H], the router's map and weights [T, E] -> rows [R, H] and the weight of each [R]."""
        self.hidden_shape = tokens.shape
        self.places = places = Places.of(routing_map, self.config.moe_router_topk)
        rows_RH = _Spread.apply(tokens.reshape(-1, tokens.shape[-1]), places.token_R, places.rows_Tk)
        # The gradient is added to zeros, but at most once to each.
        return rows_RH, probs.t().reshape(-1).gather(0, places.entry_R)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """No other rank has experts for these rows."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the experts take: the rows, how many each expert has, and the weights."""
        assert self.places is not None, "dispatch_preprocess comes first"
        return hidden_states, self.places.count_E, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The rows are where they were."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """No other rank has rows of these tokens."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The experts' rows [R, H] -> their sum for each token, in the shape of the tokens."""
        assert self.places is not None, "dispatch_preprocess comes first"
        places, self.places = self.places, None
        return _Gather.apply(hidden_states, places.token_R, places.rows_Tk).view(self.hidden_shape)
