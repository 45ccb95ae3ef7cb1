"""The advantage of a rollout is how much better than its group it did (equation 1). Plain floats, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_cascade.config.schema import AdvantageConfig
from nemo_cascade.types import Group, Scored


def group_relative(groups_P: Sequence[Group], cfg: AdvantageConfig) -> list[list[float | None]]:
    """Advantages [P][G] of the rollouts of a step, None where a rollout is Invalid.

    Equation 1: A_i = (r_i - baseline) / (std + eps) over the valid rollouts of one group. A rollout outside the loss
    (`in_loss` False, overlong filtering) stays in the baseline and gets its advantage; whoever builds the batch masks
    it. A None must not be trained on: an infrastructure failure says nothing about the policy.
    """
    advantages_P_G: list[list[float | None]] = []
    for group in groups_P:
        rewards = [rollout.outcome.reward for rollout in group.rollouts if isinstance(rollout.outcome, Scored)]
        valid = iter(relative(rewards, cfg))
        advantages_P_G.append(
            [next(valid) if isinstance(rollout.outcome, Scored) else None for rollout in group.rollouts]
        )
    return advantages_P_G


def relative(rewards: Sequence[float], cfg: AdvantageConfig) -> list[float]:
    """Rewards of one group turned into advantages.

    `mean` is the paper's baseline; `leave_one_out` takes the mean of the other rollouts, which is n / (n - 1) times
    the same difference. `std` divides by the population's standard deviation (over n), `sample_std` by that over
    n - 1, `none` leaves the unit of the reward. A group whose rewards are all equal gets exactly 0, and so does a
    group with fewer than two valid rollouts: there is nothing to compare with.
    """
    count = len(rewards)
    if count < 2 or all(reward == rewards[0] for reward in rewards):
        return [0.0] * count
    mean = math.fsum(rewards) / count
    centred = [reward - mean for reward in rewards]
    scale = 1.0
    if cfg.scale != "none":
        degrees = count if cfg.scale == "std" else count - 1
        scale = math.sqrt(math.fsum(difference**2 for difference in centred) / degrees) + cfg.eps
    if cfg.baseline == "leave_one_out":
        scale *= (count - 1) / count
    return [difference / scale for difference in centred]
