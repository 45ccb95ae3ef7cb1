"""The numbers of a batch of rollouts: reward, length, entropy, and the shares that tell a run is going wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from nemo_cascade.types import Group, Invalid, Rollout


def summarise(groups_P: Sequence[Group]) -> dict[str, float]:
    """Metrics of this rank's groups, named as in `metrics.METRICS` so that ranks can be combined.

    Rewards are means over valid rollouts (per domain as `reward/NAME`); `entropy` is the mean of -log p over sampled
    tokens, an unbiased estimate of the entropy where nothing was cut by top-p or top-k. Empty for no groups.
    """
    rollouts = [rollout for group in groups_P for rollout in group.rollouts]
    if not rollouts:
        return {}
    valid = [rollout for rollout in rollouts if not isinstance(rollout.outcome, Invalid)]
    tokens = sum(rollout.num_sampled for rollout in rollouts)
    line = {
        "rollouts": float(len(rollouts)),
        "groups": float(len(groups_P)),
        "tokens": float(tokens),
        "length": tokens / len(rollouts),
        "truncated_share": mean(float(rollout.transcript.truncated) for rollout in rollouts),
        "invalid_share": 1.0 - len(valid) / len(rollouts),
        "all_equal_share": mean(float(all_equal(group)) for group in groups_P),
    }
    if tokens:
        line["entropy"] = -math.fsum(sampled_logprobs(rollouts)) / tokens
    if valid:
        line["reward"] = mean(rollout.reward for rollout in valid)
    by_domain: dict[str, list[float]] = {}
    for rollout in valid:
        by_domain.setdefault(rollout.task.domain, []).append(rollout.reward)
    for domain, rewards in by_domain.items():
        line[f"reward/{domain}"] = mean(rewards)
        line[f"rollouts/{domain}"] = float(len(rewards))
    return line


def sampled_logprobs(rollouts: Iterable[Rollout]) -> Iterable[float]:
    """Log-probabilities of the sampled tokens only."""
    for rollout in rollouts:
        for logprob, sampled in zip(rollout.logprobs, rollout.loss_mask, strict=True):
            if sampled:
                yield logprob


def all_equal(group: Group) -> bool:
    """Whether a group teaches nothing: every valid reward is the same."""
    return len({rollout.reward for rollout in group.rollouts if not isinstance(rollout.outcome, Invalid)}) <= 1


def mean(values: Iterable[float]) -> float:
    """The mean of at least one number."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
