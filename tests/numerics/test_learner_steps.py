"""What single steps of the Learner do: each kind of distillation, on-policy choices, and steps that are no number."""

import dataclasses
import math
from pathlib import Path

import pytest

from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.kept import RAW
from nemo_cascade.algorithms.loss import cross_entropy, distillation, policy_gradient
from nemo_cascade.config.schema import DistillConfig, LossConfig, OptimizerConfig
from nemo_cascade.data.packing import to_batch
from nemo_cascade.learner.forward import target_logprobs
from nemo_cascade.types import Batch, Sequence, UserError
from tests.numerics.learner_worker import TINY
from tests.numerics.tiny_learner import build, flat, sequences

pytestmark = pytest.mark.usefixtures("ranks")


@pytest.mark.parametrize("kind", ["sampled", "power", "full_vocab", "topk"])
def test_distilling_from_oneself_moves_nothing(tmp_path: Path, kind: str):
    cfg = DistillConfig(advantage="power") if kind == "power" else DistillConfig(kind=kind, top_k=5)
    learner = build(optimizer=OptimizerConfig(lr=1e-2))
    folder = str(tmp_path / "self")
    learner.export(folder)
    with learner.using(folder):
        scores = learner.logprobs(sequences())
    taught = [
        dataclasses.replace(s, sampler_logprobs=tuple(row), teacher_logprobs=tuple(row), teacher=folder)
        for s, row in zip(sequences(), scores, strict=True)
    ]
    metrics = learner.update(taught, distillation(cfg))
    assert metrics["grad_norm"] < 2e-6
    assert abs(metrics["reverse_kl"]) < 1e-6
    assert metrics["masked_share"] == 0.0


def test_the_top_k_reverse_kl_of_the_whole_vocabulary_is_the_exact_one_and_less_is_less(tmp_path: Path):
    teacher = build(seed=5, optimizer=OptimizerConfig(lr=1e-2))
    for _ in range(5):
        teacher.update(sequences(), cross_entropy("token"))
    folder, steps = str(tmp_path / "teacher"), {}
    teacher.export(folder)
    for name, cfg in {
        "exact": DistillConfig(kind="full_vocab"),
        "whole": DistillConfig(kind="topk", top_k=64),
        "top": DistillConfig(kind="topk", top_k=4),
    }.items():
        student = build(seed=6, micro_batch_tokens=40)
        own = [dataclasses.replace(s, sampler_logprobs=tuple(row), teacher=folder)
               for s, row in zip(sequences(), student.logprobs(sequences()), strict=True)]  # fmt: skip
        steps[name] = student.update(own, distillation(cfg))
    assert steps["whole"]["reverse_kl"] == pytest.approx(steps["exact"]["reverse_kl"], rel=1e-4)
    assert steps["whole"]["grad_norm"] == pytest.approx(steps["exact"]["grad_norm"], rel=1e-4)
    assert 0.0 < steps["top"]["reverse_kl"] < 0.9 * steps["exact"]["reverse_kl"]
    with pytest.raises(UserError, match="distill.top_k: 65 is more than the vocabulary's 64 tokens"):
        build().update(own, distillation(DistillConfig(kind="topk", top_k=65)))


def test_positions_found_before_the_row_are_those_of_its_mask():
    """A batch on a card brings them, so that the host need not wait for their number."""
    model, batch = build().model, to_batch(sequences())
    trained_N = batch.loss_mask_T.nonzero()[:, 0]
    assert batch.trained_N is None and 0 < len(trained_N) < len(batch.tokens_T)
    expected, found, fewer = (
        [values_T.detach() for values_T in target_logprobs(model, given, RAW, everywhere=False)]
        for given in (batch, *(dataclasses.replace(batch, trained_N=own_N) for own_N in (trained_N, trained_N[1:])))
    )
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert fewer[0][trained_N[0]] == 0.0 != expected[0][trained_N[0]]


def test_an_objective_may_report_numbers_beside_tensors() -> None:
    objective = cross_entropy("token")

    def with_more(scores: torch.Tensor, batch: Batch, denominators: dict[str, float]):
        loss, parts = objective.loss(scores, batch, denominators)
        return loss, {**parts, "number": 0.25, "one_element": loss[None]}

    metrics = build().update(sequences(), dataclasses.replace(objective, loss=with_more))
    assert metrics["number"] == 0.25 * metrics["micro_batches"]
    assert metrics["one_element"] == pytest.approx(metrics["loss"], rel=1e-12)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path):
    other = MegatronLearner(dataclasses.replace(TINY, vocab_size=128), LearnerSettings(OptimizerConfig(lr=1e-3), 1))
    other.export(str(tmp_path / "teacher"))
    learner = build()
    before = flat(learner)
    with pytest.raises(UserError, match=r"128.*64|64.*128"), learner.using(str(tmp_path / "teacher")):
        pass
    assert torch.equal(flat(learner), before)


def test_distillation_brings_the_student_to_its_teacher(tmp_path: Path):
    teacher = build(seed=5, optimizer=OptimizerConfig(lr=1e-2))
    for _ in range(10):
        teacher.update(sequences(), cross_entropy("token"))
    folder = str(tmp_path / "teacher")
    teacher.export(folder)
    student = build(seed=6, optimizer=OptimizerConfig(lr=1e-2))
    falling = []
    for _ in range(12):
        sampled = [dataclasses.replace(s, sampler_logprobs=tuple(row), teacher=folder)
                   for s, row in zip(sequences(), student.logprobs(sequences()), strict=True)]  # fmt: skip
        falling.append(student.update(sampled, distillation(DistillConfig(kind="full_vocab")))["reverse_kl"])
    assert falling[-1] < 0.5 * falling[0]
    assert min(falling) > 0.0


def test_a_step_without_trained_tokens_is_skipped():
    learner = build()
    before = flat(learner)
    masked = [dataclasses.replace(s, loss_mask=(0,) * len(s.loss_mask)) for s in sequences()]
    assert learner.update(masked, cross_entropy("token"))["skipped"] == 1.0
    assert learner.update([], cross_entropy("token"))["skipped"] == 1.0
    assert torch.equal(flat(learner), before)


def test_divergence_stops_before_the_weights_are_touched():
    learner = build()
    before = flat(learner)
    with pytest.raises(UserError, match="step 0: loss .* diverged.*optimizer.lr"):
        learner.update(broken(math.inf), policy_gradient(LossConfig()))
    assert torch.equal(flat(learner), before)


def broken(value: float) -> list[Sequence]:
    return [dataclasses.replace(s, advantages=(value,) * len(s.advantages)) for s in sequences()]


def test_a_step_that_is_no_number_is_skipped_counted_and_bounded(tmp_path: Path):
    cfg = OptimizerConfig(lr=1e-2, max_skipped_steps=2, warmup_steps=10, expert_bias_rate=1e-2)
    learner, sound = build(optimizer=cfg), policy_gradient(LossConfig())
    before = flat(learner)
    for value in (math.inf, math.nan):
        metrics = learner.update(broken(value), sound)
        assert (metrics["skipped"], metrics["non_finite"]) == (1.0, 1.0)
        assert torch.equal(flat(learner), before)
    metrics = learner.update(sequences(), sound)  # what was skipped left nothing behind
    assert (metrics["skipped"], metrics["non_finite"], metrics["lr"]) == (0.0, 0.0, pytest.approx(2e-3))
    assert math.isfinite(metrics["grad_norm"]) and not torch.equal(flat(learner), before)
    for _ in range(2):
        learner.update(broken(math.nan), sound)
    learner.save(str(tmp_path / "step_5"), 5)
    resumed = build(optimizer=cfg)
    resumed.load(str(tmp_path / "step_5"))
    for of in (learner, resumed):  # the count of steps in a row outlives the process
        with pytest.raises(UserError, match="step 5: loss nan, gradient norm .* diverged"):
            of.update(broken(math.nan), sound)


@pytest.mark.parametrize("choice", [{"clip_low": 0.2, "clip_high": 0.2}, {"kl": 1.0, "kl_in": "reward"}])
def test_on_policy_choices_that_change_nothing_change_nothing(choice: dict[str, object]):
    """At ratio 1 clipping is the plain gradient; against itself as reference the KL is 0 in the reward as well."""
    plain, chosen = build(), build()
    scores = plain.logprobs(sequences())
    own = [dataclasses.replace(s, sampler_logprobs=tuple(row), reference_logprobs=tuple(row))
           for s, row in zip(sequences(), scores, strict=True)]  # fmt: skip
    one = plain.update(own, policy_gradient(LossConfig()))
    two = chosen.update(own, policy_gradient(LossConfig(**choice)))
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    torch.testing.assert_close(flat(chosen), flat(plain), rtol=0.0, atol=1e-6)
