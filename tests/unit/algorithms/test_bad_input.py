"""Numbers that break formulas: ratios of 0 and infinity, NaN, answers of no token, other vocabularies."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nemo_cascade.algorithms.advantage import group_relative
from nemo_cascade.algorithms.loss import count, distillation, policy_gradient
from nemo_cascade.config.schema import AdvantageConfig, DistillConfig, LossConfig
from nemo_cascade.data.packing import to_batch
from nemo_cascade.protocols import Objective
from nemo_cascade.types import Group, Invalid, Rollout, Scored, Sequence, Task, Transcript

GOOD, OTHER = -1.0, -2.0
TASK = Task("math-1", "math", ())


def run(objective: Objective, learner: float, sampler: float, teacher: float = -1.0):
    """Two sequences of one trained token: the first as given, the second sound. Loss, both slopes, metrics."""
    sequences = [
        Sequence((1, 2), (0, 1), (0.0, 1.0), (0.0, sampler), teacher_logprobs=(0.0, teacher)),
        Sequence((3, 4), (0, 1), (0.0, 1.0), (0.0, OTHER), teacher_logprobs=(0.0, OTHER + 1.0)),
    ]
    logprobs_T = torch.tensor([learner, 0.0, OTHER, 0.0], requires_grad=True)
    loss, metrics = objective.loss(logprobs_T, to_batch(sequences), objective.denominators(sequences))
    loss.backward()
    assert logprobs_T.grad is not None
    return loss.item(), logprobs_T.grad[[0, 2]].tolist(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize("kind", ["icepop", "sequence_mask"])
@pytest.mark.parametrize(("learner", "sampler"), [(GOOD, -math.inf), (-math.inf, GOOD), (GOOD, -500.0), (-500.0, GOOD)])
def test_a_ratio_of_zero_or_infinity_is_masked_without_a_nan(kind: str, learner: float, sampler: float) -> None:
    loss, slopes, metrics = run(policy_gradient(LossConfig(importance=kind)), learner, sampler)
    assert slopes == [0.0, -0.5]
    assert loss == 1.0
    assert (metrics["masked_share"], metrics["masked_sequence_share"], metrics["ratio_extreme_share"]) == (0.5,) * 3
    assert metrics["gap_abs_max"] == 20.0
    assert all(math.isfinite(value) for value in metrics.values())
    loss, slopes, _ = run(distillation(DistillConfig()), learner, sampler)
    assert slopes == [0.0, -0.5] and loss == 1.0  # a = 1 on the sound one


def test_an_infinite_ratio_is_clamped_or_ignored_where_nothing_is_masked() -> None:
    for kind, weight in (("tis", 2.0), ("none", 1.0)):
        loss, slopes, metrics = run(policy_gradient(LossConfig(importance=kind)), GOOD, -math.inf)
        assert (loss, slopes) == (0.5 * weight + 1.0, [-0.5 * weight, -0.5])
        assert metrics["masked_share"] == 0.0 and metrics["ratio_extreme_share"] == 0.5


@pytest.mark.parametrize(("learner", "sampler"), [(GOOD, -math.inf), (-math.inf, GOOD)])
def test_an_infinite_ratio_under_the_clip_has_no_gradient(learner: float, sampler: float) -> None:
    loss, slopes, _ = run(policy_gradient(LossConfig(clip_low=0.2, clip_high=0.28)), learner, sampler)
    assert slopes == [0.0, -0.5]
    assert loss == pytest.approx(-0.5 - (0.64 if learner == GOOD else 0.5 * math.exp(-20.0)))


@pytest.mark.parametrize("kind", ["none", "tis"])
def test_a_token_that_the_learner_finds_impossible_is_not_averaged_away(kind: str) -> None:
    loss, _, _ = run(policy_gradient(LossConfig(importance=kind)), -math.inf, GOOD)
    assert loss == math.inf  # what the Learner refuses


@pytest.mark.parametrize("kind", ["none", "tis", "icepop", "sequence_mask"])
def test_a_nan_of_the_learner_is_seen_in_the_loss_and_not_masked(kind: str) -> None:
    loss, _, metrics = run(policy_gradient(LossConfig(importance=kind)), math.nan, GOOD)
    assert math.isnan(loss) and math.isnan(metrics["gap"])
    assert math.isnan(run(distillation(DistillConfig()), math.nan, GOOD)[0])


@pytest.mark.parametrize("kind", ["tis", "icepop", "sequence_mask"])
def test_a_nan_of_the_sampler_is_seen_wherever_its_ratio_weighs(kind: str) -> None:
    assert math.isnan(run(policy_gradient(LossConfig(importance=kind)), GOOD, math.nan)[0])
    assert math.isnan(run(policy_gradient(LossConfig()), GOOD, math.nan)[2]["gap"])


def test_a_teacher_that_finds_a_token_impossible() -> None:
    assert run(distillation(DistillConfig()), GOOD, GOOD, -math.inf)[0] == -math.inf  # a = -inf: refused
    clipped = run(distillation(DistillConfig(clip_advantage=20.0)), GOOD, GOOD, -math.inf)
    assert clipped[1] == [10.0, -0.5]
    bounded = run(distillation(DistillConfig(advantage="power")), GOOD, GOOD, -math.inf)
    assert bounded[1][0] == pytest.approx(0.5 * math.exp(GOOD))
    assert math.isnan(run(distillation(DistillConfig(advantage="power")), GOOD, GOOD, math.nan)[0])


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    objective = distillation(DistillConfig(kind="full_vocab"))
    sequences = [Sequence((1, 2), (0, 1), (0.0, 1.0), (0.0, -1.0))]
    student_TV, teacher_TV = (torch.log_softmax(torch.zeros(2, size), -1) for size in (5, 6))
    batch = dataclasses.replace(to_batch(sequences), teacher_logprobs_TV=teacher_TV)
    with pytest.raises(ValueError, match="vocabularies differ: teacher 6, student 5"):
        objective.loss(student_TV, batch, objective.denominators(sequences))


@pytest.mark.parametrize("normalize", ["batch_tokens", "group_tokens", "sequence"])
def test_an_answer_of_no_token_weighs_nothing(normalize: str) -> None:
    sound, empty = Sequence((1, 2), (0, 1), (0.0, 1.0), (0.0, GOOD)), Sequence((3,), (0,), (0.0,), (0.0,), group=1)
    objective = policy_gradient(LossConfig(normalize=normalize))
    assert count([sound, empty])["sequences"] == count([sound, empty])["groups"] == 1.0
    logprobs_T = torch.tensor([GOOD, 0.0, 0.0], requires_grad=True)
    loss, metrics = objective.loss(logprobs_T, to_batch([sound, empty]), objective.denominators([sound, empty]))
    loss.backward()
    assert loss.item() == 1.0 and logprobs_T.grad is not None and logprobs_T.grad.tolist() == [-1.0, 0.0, 0.0]
    assert metrics["masked_sequence_share"].item() == 0.0


def group(*outcomes: Scored | Invalid) -> Group:
    rollouts = tuple(
        Rollout(TASK, index, (1, 2), (0, 1), (0.0, -0.5), (-1, 0), Transcript(()), outcome)
        for index, outcome in enumerate(outcomes)
    )
    return Group(TASK, rollouts, tuple(isinstance(outcome, Scored) for outcome in outcomes))


@pytest.mark.parametrize("scale", ["std", "sample_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_groups_with_nothing_to_compare_have_advantage_exactly_0(scale: str, baseline: str) -> None:
    cfg = AdvantageConfig(baseline=baseline, scale=scale, eps=0.0)
    lonely, alike, broken = group(Scored(0.3)), group(*[Scored(0.1)] * 3), group(Invalid("down"), Invalid("down"))
    assert group_relative([lonely, alike, broken], cfg) == [[0.0], [0.0, 0.0, 0.0], [None, None]]
