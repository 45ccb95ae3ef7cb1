"""Log-probabilities of the distribution that sampled: logits over temperature, on the kept set of top-k and top-p.

Sampler and Learner both use this file, so that their log-probabilities differ by rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_cascade.types import UserError


@dataclass(frozen=True)
class Distribution:
    """Which distribution log-probabilities belong to. The default is `raw`: the model's own, nothing cut.

    `top_k` 0 and `top_p` 1 keep every token. Temperature 0 (greedy) has no density and is refused.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0.0:
            raise UserError(
                f"sampling.temperature: {self.temperature} has no log-probabilities to train on; use a value above 0"
            )

    @property
    def cuts(self) -> bool:
        """Whether tokens are left out at all."""
        return self.top_k > 0 or self.top_p < 1.0


RAW = Distribution()


def keep_mask(scaled_TV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Bool [T, V]: the tokens that sampling may draw, from logits already divided by the temperature.

    First the `top_k` largest, then, renormalised over those, the smallest set whose probability reaches `top_p` (at
    least one token). Equal logits are taken in the order of their token ids, so the set is the same on every machine.
    """
    sorted_TV, order_TV = torch.sort(scaled_TV, dim=-1, descending=True, stable=True)
    vocabulary = scaled_TV.shape[-1]
    rank_V = torch.arange(vocabulary, device=scaled_TV.device)
    kept_TV = (rank_V < (top_k if top_k > 0 else vocabulary)).expand_as(sorted_TV)
    if top_p < 1.0:
        probability_TV = torch.softmax(sorted_TV.masked_fill(~kept_TV, -torch.inf), dim=-1)
        before_TV = probability_TV.cumsum(dim=-1) - probability_TV
        kept_TV = kept_TV & ((before_TV < top_p) | (rank_V == 0))
    return torch.zeros_like(kept_TV).scatter_(-1, order_TV, kept_TV)


class _TargetLogprobs(torch.autograd.Function):
    """log softmax, gather and entropy in one node: keeps the probabilities, so that backward needs no second exp."""

    @staticmethod
    def forward(ctx, logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
        chosen_T = logprobs_TV.gather(-1, targets_T[:, None])[:, 0]
        probabilities_TV = logprobs_TV.exp()
        # A token that was cut has log-probability -inf and probability 0; their product counts as 0.
        entropy_T = logprobs_TV.clamp_min_(-1.0e30).mul_(probabilities_TV).sum(dim=-1).neg_()
        ctx.save_for_backward(probabilities_TV, targets_T)
        ctx.mark_non_differentiable(entropy_T)
        return chosen_T, entropy_T

    @staticmethod
    def backward(ctx, grad_T: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        probabilities_TV, targets_T = ctx.saved_tensors
        grad_TV = probabilities_TV * -grad_T[:, None]
        grad_TV.scatter_add_(-1, targets_T[:, None], grad_T[:, None])
        return grad_TV, None


def logprobs_and_entropy(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, distribution: Distribution = RAW
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target [T] (differentiable) and the entropy of each position [T] (not), in nats."""
    scaled_TV = logits_TV if distribution.temperature == 1.0 else logits_TV / distribution.temperature
    if distribution.cuts:
        with torch.no_grad():
            kept_TV = keep_mask(scaled_TV, distribution.top_k, distribution.top_p)
            kept_TV.scatter_(-1, targets_T[:, None], True)
        scaled_TV = scaled_TV.masked_fill(~kept_TV, -torch.inf)
    return _TargetLogprobs.apply(scaled_TV, targets_T)


def kept_logprobs(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Log-probabilities [T] of `targets_T` under the distribution that sampled them.

    A target is always counted as kept, even where rounding would put it just outside: it was drawn, so its
    probability was not zero. Differentiable in the logits; the kept set itself is a constant.
    """
    return logprobs_and_entropy(logits_TV, targets_T, Distribution(temperature, top_p, top_k))[0]
