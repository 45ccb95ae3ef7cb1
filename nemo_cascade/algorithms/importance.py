"""Importance weights between the policy that sampled (pi_inf) and the one that is trained (pi_train), equation 3."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_cascade.config.bounds import choose

MAX_LOG_RATIO = 20.0  # e^20: keeps the metrics finite when sampler and learner disagree beyond all measure


@dataclass(frozen=True)
class Importance:
    """What to do where Learner and Sampler disagree about a token's probability.

    `none`: weight 1. `tis`: r clamped to [low, high]. `icepop`: r inside [low, high] and 0 outside, which takes the
    token out of the loss without changing any denominator (the paper's choice in MOPD, 0.5 to 2.0).
    """

    kind: str
    low: float
    high: float

    def __post_init__(self) -> None:
        choose("importance", self.kind, ("none", "tis", "icepop"))

    def weights(self, ratio_T: torch.Tensor) -> torch.Tensor:
        """Weights [T] for ratios [T]; constants, no gradient flows through them."""
        ratio_T = ratio_T.detach()
        if self.kind == "tis":
            return ratio_T.clamp(self.low, self.high)
        if self.kind == "icepop":
            return torch.where(self.inside(ratio_T), ratio_T, torch.zeros_like(ratio_T))
        return torch.ones_like(ratio_T)

    def inside(self, ratio_T: torch.Tensor) -> torch.Tensor:
        """Bool [T]: low <= r <= high."""
        return (ratio_T >= self.low) & (ratio_T <= self.high)


def ratio(logprobs_T: torch.Tensor, sampler_logprobs_T: torch.Tensor) -> torch.Tensor:
    """r_t = pi_train(y_t) / pi_inf(y_t) [T], without gradient; 1 everywhere when the two engines agree."""
    return (logprobs_T.detach() - sampler_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
