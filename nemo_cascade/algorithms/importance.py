"""Importance weights between the policy that sampled (pi_inf) and the one that is trained (pi_train), equation 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nemo_cascade.config.bounds import choose
from nemo_cascade.config.schema import IMPORTANCE
from nemo_cascade.types import Batch

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut to +-20 before any exp: a ratio of 0 or infinity becomes e^-20 or e^20, far outside all bounds,
and never a NaN by 0 * inf. Metrics hold the cut values; `ratio_extreme_share` says for how many tokens that mattered.
"""


@dataclass(frozen=True)
class Importance:
    """What to do where Learner and Sampler disagree about a token's probability, r_t = pi_train / pi_inf.

    `none`: weight 1.
    `tis`: r_t clamped to [low, high].
    `icepop`: r_t where it is inside [low, high], else 0, which takes the token out of the loss without changing any
    denominator (the paper's choice in MOPD, 0.5 to 2.0).
    `sequence_mask`: r_t where exp(mean over the sequence's trained tokens of log r_t), the geometric mean, is inside
    [low, high], else 0 for the whole sequence. Inside, single ratios stay as they are. The geometric mean of a long
    answer is close to 1: bounds as tight as 0.999 to 1.002 are usual.
    """

    kind: str
    low: float
    high: float

    def __post_init__(self) -> None:
        choose("importance", self.kind, IMPORTANCE)

    def weights(self, log_ratio_T: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Weights [T] for the log-ratios [T] of a batch; constants, no gradient flows through them.

        Micro-batches hold whole sequences, so a sequence's mean is known here. A NaN stays a NaN: it must be seen in
        the loss, not masked.
        """
        if self.kind == "none":
            return torch.ones_like(log_ratio_T)
        ratio_T = log_ratio_T.exp()
        if self.kind == "tis":
            return ratio_T.clamp(self.low, self.high)
        judged_T = ratio_T
        if self.kind == "sequence_mask":
            tokens_S = per_sequence(batch.loss_mask_T, batch)
            judged_T = (per_sequence(log_ratio_T, batch) / tokens_S.clamp_min(1.0)).exp()[batch.sequence_T]
        return ratio_T.masked_fill((judged_T < self.low) | (judged_T > self.high), 0.0)


def per_sequence(values_T: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sums [S] over the positions of each sequence of a batch."""
    return values_T.new_zeros(batch.group_S.shape[0]).index_add_(0, batch.sequence_T, values_T)


def log_ratio(logprobs_T: torch.Tensor, sampler_logprobs_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """log r_t = log pi_train(y_t) - log pi_inf(y_t) [T], without gradient; 0 outside the loss, cut to MAX_LOG_RATIO."""
    difference_T = (logprobs_T.detach() - sampler_logprobs_T).masked_fill(mask_T == 0.0, 0.0)
    return difference_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def agreement(
    log_ratio_T: torch.Tensor,
    weights_T: torch.Tensor,
    mean_T: torch.Tensor,
    batch: Batch,
    denominators: Mapping[str, float],
) -> dict[str, torch.Tensor]:
    """What tells whether Learner and Sampler agree, and what the importance weights took out of the loss.

    `gap` = Learner minus Sampler log-probability (mean; `gap_abs_max` is the worst token), `ratio` = its exponential.
    `masked_share` = trained tokens of weight 0, `masked_sequence_share` = sequences all of whose trained tokens have
    it, `ratio_extreme_share` = trained tokens at the cut of MAX_LOG_RATIO, ratios 0 and infinity among them.
    `mean_T` is 1 / trained tokens of the step on trained tokens, 0 elsewhere.
    """
    mask_T = batch.loss_mask_T
    ratio_T = log_ratio_T.exp()
    gap_abs_T = log_ratio_T.abs()
    removed_T = mask_T * (weights_T == 0.0)
    tokens_S = per_sequence(mask_T, batch)
    gone_S = (tokens_S > 0.0) & (per_sequence(removed_T, batch) == tokens_S)
    return {
        "ratio": (mean_T * ratio_T).sum(),
        "ratio_max": (mask_T * ratio_T).max(),
        "gap": (mean_T * log_ratio_T).sum(),
        "gap_abs": (mean_T * gap_abs_T).sum(),
        "gap_abs_max": (mask_T * gap_abs_T).max(),
        "masked_share": (mean_T * removed_T).sum(),
        "masked_sequence_share": gone_S.sum() / max(denominators["sequences"], 1.0),
        "ratio_extreme_share": (mean_T * (gap_abs_T >= MAX_LOG_RATIO)).sum(),
    }


def clipped_ratio(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    low: float,
    high: float,
    dual: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate min(rho A, clip(rho, 1 - low, 1 + high) A) [T], and where the clip acts (bool [T]).

    rho_t = pi_train(y_t) / pi_old(y_t) carries the gradient; pi_old are the log-probabilities that were recorded when
    the token was sampled. Where the clip acts the token has no gradient: it has already moved far enough in the
    direction of its advantage. At rho = 1 the gradient is exactly A grad log pi, that of the unclipped loss.

    `dual` (dual clip, arXiv 1912.09729): where A < 0 the surrogate is at least dual A, dual > 1. PPO's own clip does
    not hold a bad token that the newer policy finds more probable by far: rho A has no bound there.
    """
    rho_T = (logprobs_T - old_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free_T, held_T = rho_T * advantages_T, rho_T.clamp(1.0 - low, 1.0 + high) * advantages_T
    surrogate_T, stopped_T = torch.minimum(free_T, held_T), held_T < free_T
    if dual is None:
        return surrogate_T, stopped_T
    floor_T = dual * advantages_T
    below_T = (advantages_T < 0.0) & (surrogate_T < floor_T)
    return torch.where(below_T, floor_T, surrogate_T), stopped_T | below_T
