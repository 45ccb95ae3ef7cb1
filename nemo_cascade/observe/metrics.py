"""The names of the metrics and how values of several ranks become one.

A name is written down once, here. `a/b` belongs to the family `a` (`reward/math` is a `reward`), so that a new domain
or a new timer needs no entry. The reduction matters: a mean of per-rank means is wrong when ranks hold different
numbers of rollouts, hence the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric: what it says, its unit, and its reduction over ranks.

    `how` is sum, max, min or mean; a mean is weighted by the metric `weight` (plain mean where a rank does not report
    it).
    """

    says: str
    unit: str = ""
    how: str = "mean"
    weight: str = ""


METRICS: dict[str, Metric] = {
    "reward": Metric("mean reward of the valid rollouts", weight="rollouts"),
    "rollouts": Metric("rollouts sampled", how="sum"),
    "groups": Metric("groups in the batch", how="sum"),
    "groups_dropped": Metric(
        "groups kept out of the loss, and why: all_correct, all_wrong, all_equal, invalid, below_max, truncated,"
        " prompt_too_long", how="sum",
    ),
    "refills": Metric("how often the step asked for more tasks, because groups were dropped", how="sum"),
    "prompts_dropped": Metric("prompts over sampling.max_prompt_tokens, since the process began", how="max"),
    "judge_matches": Metric("comparisons that preference groups asked for", how="sum"),
    "judge_matches_dropped": Metric("comparisons without a verdict, which left their answers' means", how="sum"),
    "judge_matches_unreadable": Metric("comparisons to which the judge's answers held no scores", how="sum"),
    "prompts_too_short": Metric("prompts under their domain's min_prompt_tokens, since the process began", how="max"),
    "tokens": Metric("tokens sampled, those of dropped groups included (sft: tokens trained)", "tokens", how="sum"),
    "packed_tokens": Metric("tokens the Learner read, prompts included", "tokens", how="sum"),
    "length": Metric("mean sampled tokens per rollout", "tokens", weight="rollouts"),
    "truncated_share": Metric("rollouts that hit the token limit", weight="rollouts"),
    "invalid_share": Metric("rollouts without a verdict", weight="rollouts"),
    "all_equal_share": Metric("groups whose rewards are all equal", weight="groups"),
    "entropy": Metric("mean -log p of the sampled tokens, an estimate of the entropy", "nat"),
    "kl": Metric("estimate of KL(policy || reference) per token", "nat"),
    "gap": Metric("mean log p(learner) - log p(sampler) of sampled tokens", "nat"),
    "gap_abs": Metric("mean |log p(learner) - log p(sampler)| of sampled tokens", "nat"),
    "gap_abs_max": Metric("largest |log p(learner) - log p(sampler)| of a sampled token", "nat", how="max"),
    "ratio": Metric("mean importance ratio p(learner) / p(sampler)"),
    "ratio_max": Metric("largest importance ratio of a sampled token", how="max"),
    "masked_share": Metric("tokens taken out of the loss by their importance ratio"),
    "masked_sequence_share": Metric("sequences taken out of the loss whole by their importance ratios"),
    "ratio_extreme_share": Metric("tokens whose log importance ratio is beyond +-20, 0 and infinity among them"),
    "clipped_share": Metric("tokens without gradient because PPO's clip holds their ratio"),
    "routing_flips": Metric("replayed experts that the routers would not choose in the update"),
    "reverse_kl": Metric("estimate of KL(student || teacher) per sampled token", "nat"),
    "advantage_abs": Metric("mean |advantage| of trained tokens"),
    "teacher_gap": Metric("mean |log p(teacher) - log p(student)| of sampled tokens", "nat"),
    "skipped": Metric("1 when the step moved nothing", how="max"),
    "non_finite": Metric("1 when the step moved nothing because loss or gradient was no number", how="max"),
    "trained_tokens": Metric("tokens in the loss", "tokens", how="sum"),
    "loss": Metric("the loss that was minimised"),
    "grad_norm": Metric("gradient norm before clipping", how="max"),
    "lr": Metric("learning rate", how="max"),
    "accuracy": Metric("trained tokens predicted first"),
    "tokens_per_second": Metric("tokens / seconds of the step", "tokens/s", how="sum"),
    "seconds": Metric("wall clock of a part of the step", "s", how="max"),
    "device_memory": Metric("peak memory of the accelerator", "GiB", how="max"),
}

SPANS = ("sampling", "reward", "training", "refit", "evaluation")
"""The parts of a step that the report always shows; any other timer is shown too."""


def metric(name: str) -> Metric:
    """The entry of a name, of its family, or a plain mean for a name nobody has described."""
    if name in METRICS:
        return METRICS[name]
    return METRICS.get(name.split("/")[0], Metric(name))


def combine(metrics_R: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One value per name from the values of `_R` ranks; a rank that does not report a name is left out of it.

    Not valid for medians and quantiles: combine their inputs instead.
    """
    names = dict.fromkeys(name for metrics in metrics_R for name in metrics)
    return {name: _combine_one(name, [metrics for metrics in metrics_R if name in metrics]) for name in names}


def _combine_one(name: str, metrics_R: Sequence[Mapping[str, float]]) -> float:
    entry = metric(name)
    values = [metrics[name] for metrics in metrics_R]
    if entry.how == "sum":
        return math.fsum(values)
    if entry.how == "max":
        return max(values)
    if entry.how == "min":
        return min(values)
    weights = [metrics.get(_weight_name(name, entry.weight), 1.0) for metrics in metrics_R]
    total = math.fsum(weights)
    if total == 0.0:
        return math.fsum(values) / len(values)
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / total


def _weight_name(name: str, weight: str) -> str:
    """`reward/math` is weighed by `rollouts/math`."""
    return f"{weight}/{name.split('/', 1)[1]}" if "/" in name else weight
