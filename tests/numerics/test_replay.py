"""Routing replay through the Learner: recorded in one pass, used by the update, invisible to teachers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

import torch  # isort: skip

from nemo_cascade.algorithms.loss import cross_entropy, distillation, policy_gradient
from nemo_cascade.config.schema import DistillConfig, HardwareConfig, LossConfig, OptimizerConfig
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import routers
from nemo_cascade.models.routing import MoETransformerLayer
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.stages.sequences import with_routing
from nemo_cascade.types import NO_CHOICE, Request, SamplingParams, Sequence, UserError
from tests.numerics.learner_worker import TINY, share

pytestmark = pytest.mark.usefixtures("ranks")
NANO = NemotronHConfig.preset("nano")


def build(seed: int = 1, micro_batch_tokens: int = 64) -> MegatronLearner:
    settings = LearnerSettings(OptimizerConfig(lr=1e-3), num_steps=20, micro_batch_tokens=micro_batch_tokens)
    return MegatronLearner(TINY, settings, seed=seed)


def other_experts(rows: list[Sequence], experts: list[bytes]) -> list[Sequence]:
    """Every choice moved on by one of the four experts."""
    return [
        dataclasses.replace(row, routed_experts=bytes((e + 1) % 4 for e in own))
        for row, own in zip(rows, experts, strict=True)
    ]


def gradients(learner: MegatronLearner, rows: list[Sequence]) -> tuple[dict[str, float], torch.Tensor]:
    """One update, and how it moved every weight."""
    before = torch.cat([tensor.flatten().clone() for _, tensor in learner.weights()])
    metrics = learner.update(rows, policy_gradient(LossConfig()))
    return metrics, torch.cat([tensor.flatten() for _, tensor in learner.weights()]) - before


def test_own_choices_change_nothing_and_other_choices_do():
    rows = share(0, 0, 1)
    plain, moved = gradients(build(), rows)
    assert "routing_flips" not in plain
    learner = build()
    own = with_routing(rows, learner, "learner")
    assert [len(row.routed_experts) for row in own] == [2 * len(row.token_ids) for row in rows]
    replayed, same = gradients(learner, own)
    assert replayed["routing_flips"] == 0.0
    assert replayed["loss"] == plain["loss"] and torch.equal(same, moved)
    learner = build()
    forced, different = gradients(learner, other_experts(rows, learner.routing(rows)))
    assert 0.4 < forced["routing_flips"] <= 1.0
    assert (different - moved).abs().max() > 1e-4


def nano(precision: str = "fp32") -> MegatronLearner:
    hardware = HardwareConfig(precision=precision)
    return MegatronLearner(NANO, LearnerSettings(OptimizerConfig(lr=1e-3), num_steps=20, hardware=hardware), seed=1)


def sampled(learner: MegatronLearner, count: int = 16) -> list[Sequence]:
    """Completions by the Learner's weights, advantages of both signs, with the Sampler's experts."""
    sampler = LocalSampler(learner.config)
    sampler.load_weights(learner.weights(), 0)
    draw = torch.Generator().manual_seed(4)
    asked = [
        Request(tuple(torch.randint(0, 512, (11 + 7 * (index // 4 % 4),), generator=draw).tolist()), index, 24)
        for index in range(count)
    ]
    rows = []
    for index, completion in sorted(sampler.sample(asked, SamplingParams(24, routed_experts=True))):
        given = len(asked[index].token_ids)
        rows.append(
            Sequence(
                asked[index].token_ids + completion.token_ids,
                (0,) * given + (1,) * len(completion.token_ids),
                (0.0,) * given + ((-1.0) ** index,) * len(completion.token_ids),
                (0.0,) * given + completion.logprobs,
                group=index // 4,
                routed_experts=completion.routed_experts,
            )
        )
    return rows


def test_the_samplers_experts_are_the_learners_own_in_fp32():
    """Nano, 728 tokens in two layers of top-2: the same sets but for ties, and the last token of each is free."""
    learner = nano()
    rows = sampled(learner)
    differing, compared, tokens = 0, 0, 0
    for row, own in zip(rows, learner.routing(rows), strict=True):
        theirs, mine = (
            torch.frombuffer(bytearray(experts), dtype=torch.uint8).view(len(row.token_ids), 2, 2)
            for experts in (row.routed_experts, own)
        )
        assert (theirs[-1] == NO_CHOICE).all()
        differing += int((theirs[:-1].sort(-1).values != mine[:-1].sort(-1).values).any(-1).sum())
        compared += 2 * (len(row.token_ids) - 1)
        tokens += len(row.token_ids)
    assert tokens == 16 * 24 + 4 * (11 + 18 + 25 + 32) and differing <= compared // 1000
    assert {expert for row in rows for expert in row.routed_experts} == {*range(8), NO_CHOICE}
    metrics = learner.update(with_routing(rows, learner, "sampler"), policy_gradient(LossConfig()))
    assert metrics["routing_flips"] <= 1e-3 and metrics["gap_abs"] < 1e-4


def test_in_bf16_the_samplers_experts_take_the_largest_gaps_away():
    """The Sampler computes in fp32 with the same weights. Tokens whose experts differ are the far ones; the rest of the
    distance is rounding, which no choice of experts takes away.
    """
    learner = nano("bf16")
    rows = sampled(learner, 64)
    gaps = {
        replay: nano("bf16").update(with_routing(rows, learner, replay), policy_gradient(LossConfig()))
        for replay in ("none", "sampler")
    }
    assert 1e-3 < gaps["sampler"]["routing_flips"] < 0.02
    assert gaps["sampler"]["gap_abs_max"] < 0.5 * gaps["none"]["gap_abs_max"]
    assert gaps["sampler"]["gap_abs"] < gaps["none"]["gap_abs"]


def test_what_the_sampler_recorded_decides_the_update():
    """Altered on purpose it changes the loss and the weights; `none` and `learner` do not look at it."""
    rows = [dataclasses.replace(row, group=0) for row in share(0, 0, 1)]
    learner = build()
    shifted = other_experts(rows, learner.routing(rows))
    plain, moved = gradients(build(), rows)
    forced, different = gradients(learner, with_routing(shifted, learner, "sampler"))
    assert forced["routing_flips"] > 0.4 and abs(forced["gap_abs"] - plain["gap_abs"]) > 1e-4
    assert (different - moved).abs().max() > 1e-4
    for replay in ("none", "learner"):
        learner = build()
        _, same = gradients(learner, with_routing(shifted, learner, replay))
        assert torch.equal(same, moved), replay


def test_packing_changes_neither_the_record_nor_the_replay():
    rows = share(0, 0, 1)
    one, many = build(micro_batch_tokens=4096), build(micro_batch_tokens=32)
    experts = one.routing(rows)
    assert many.routing(rows) == experts
    (first, moved), (second, same) = (gradients(learner, other_experts(rows, experts)) for learner in (one, many))
    assert second["routing_flips"] == first["routing_flips"] and second["micro_batches"] > first["micro_batches"]
    torch.testing.assert_close(same, moved, rtol=0.0, atol=2e-6)


def test_a_teacher_chooses_for_itself(tmp_path: Path):
    """Log-probabilities of teacher, reference and policy do not see what the update replays."""
    teacher = build(seed=9)
    teacher.export(str(tmp_path / "teacher"))
    learner, rows = build(), share(0, 0, 1)
    plain = learner.logprobs(rows)
    forced = other_experts(rows, learner.routing(rows))
    with learner.using(str(tmp_path / "teacher")):
        assert learner.logprobs(forced) == teacher.logprobs(rows)
        with pytest.raises(ValueError, match="routing inside using"):
            learner.routing(rows)
    assert learner.logprobs(forced) == plain
    named = [dataclasses.replace(row, teacher=str(tmp_path / "teacher")) for row in rows]
    exact = distillation(DistillConfig(kind="full_vocab", importance_low=0.0, importance_high=1e9))
    free = build().update(named, exact)["reverse_kl"]
    fixed = build().update([dataclasses.replace(row, routed_experts=f.routed_experts) for row, f in
                            zip(named, forced, strict=True)], exact)  # fmt: skip
    assert fixed["routing_flips"] > 0.4 and fixed["reverse_kl"] != free
    assert all(router.router_replay is None for router in routers(learner.model))


def test_tokens_without_a_record_are_free():
    rows, learner = share(0, 0, 1), build()
    experts = learner.routing(rows)
    half = [
        dataclasses.replace(row, routed_experts=own[: -2] + bytes([NO_CHOICE] * 2))
        for row, own in zip(rows, experts, strict=True)
    ]
    metrics = learner.update(half, cross_entropy("token"))
    assert metrics["routing_flips"] == 0.0 and metrics["skipped"] == 0.0


def test_recomputed_experts_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Nothing of ours turns activation recomputation on; a NeMo config of the user's own may."""
    rows, learner = share(0, 0, 1), build()
    layer = next(layer for layer in learner.model.decoder.layers if isinstance(layer, MoETransformerLayer))
    for granularity, modules, refused in (
        ("full", None, True), ("selective", ["moe"], True), ("selective", ["core_attn"], False), (None, ["moe"], False)
    ):  # fmt: skip
        monkeypatch.setattr(layer.config, "recompute_granularity", granularity)
        monkeypatch.setattr(layer.config, "recompute_modules", modules)
        if not refused:
            assert len(learner.routing(rows)) == len(rows)
            continue
        with pytest.raises(UserError, match="does not work with activation recomputation of the experts"):
            learner.routing(rows)


def test_modes_and_mistakes():
    rows, learner = share(0, 0, 1), build()
    own = with_routing(rows, learner, "learner")
    assert with_routing(rows, learner, "none") == rows
    wide = [dataclasses.replace(row, routed_experts=bytes(6 * len(row.token_ids))) for row in rows]
    with pytest.raises(UserError, match="6 experts a token were recorded, the model uses 1 layers of top-2"):
        learner.update(wide, cross_entropy("token"))
    strange = [dataclasses.replace(row, routed_experts=bytes([4]) + row.routed_experts[1:]) for row in own]
    with pytest.raises(UserError, match="routing_replay: expert 4 was recorded, the model has 4"):
        learner.update(strange, cross_entropy("token"))
    twice = [dataclasses.replace(row, routed_experts=bytes([3, 3]) + row.routed_experts[2:]) for row in own]
    with pytest.raises(UserError, match="routing_replay: a token has the same expert twice in a layer, the model"):
        learner.update(twice, cross_entropy("token"))
    free = [dataclasses.replace(row, routed_experts=bytes([NO_CHOICE] * 2) + row.routed_experts[2:]) for row in own]
    assert learner.update(free, cross_entropy("token"))["skipped"] == 0.0
    with pytest.raises(UserError, match="routing_replay: sampler: 1 of 2 rollouts do not say which experts"):
        with_routing([own[0], rows[1]], learner, "sampler")
    with pytest.raises(ValueError, match="routed_experts: 0 bytes for"):
        learner.update([own[0], rows[1]], cross_entropy("token"))
    with pytest.raises(UserError, match="loss.routing_replay: 'r3' is not one of none, learner, sampler"):
        LossConfig(routing_replay="r3")
