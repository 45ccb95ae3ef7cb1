import dataclasses
import math
from collections.abc import Sequence as SequenceOf

import pytest
import torch

from nemo_cascade.algorithms.loss import count, cross_entropy, distillation, policy_gradient
from nemo_cascade.config.schema import DistillConfig, LossConfig
from nemo_cascade.data.packing import pack
from nemo_cascade.protocols import Objective
from nemo_cascade.types import Sequence, UserError

# Two groups; trained tokens per sequence: 2, 1 | 3, 0. Sampler log-probabilities belong to the token itself.
SEQUENCES = [
    Sequence((5, 6, 7), (0, 1, 1), (0.0, 1.0, 1.0), (0.0, -1.0, -2.0), group=0),
    Sequence((5, 8), (0, 1), (0.0, -1.0), (0.0, -0.5), group=0),
    Sequence((1, 2, 3, 4), (1, 1, 1, 1), (2.0,) * 4, (0.0, -0.1, -0.2, -0.3), group=1),
    Sequence((9, 9), (0, 0), (0.0, 0.0), (0.0, 0.0), group=1),
]
LOGPROBS = [[-1.0, -2.0], [-0.5], [-0.1, -0.2, -0.3], [-4.0]]  # per sequence, from its second token on


def evaluate(
    objective: Objective, sequences: SequenceOf[Sequence], logprobs: SequenceOf[list[float]], capacity: int = 100
) -> tuple[float, list[list[float]], dict[str, float]]:
    """Loss, d loss / d logprob per sequence, and metrics of a whole step, added over its micro-batches."""
    packed = pack(sequences, capacity)
    denominators = objective.denominators(sequences)
    total, metrics, grads = 0.0, {}, []
    for batch, members in zip(packed.batches, packed.order, strict=True):
        values = torch.tensor([v for index in members for v in [*logprobs[index], 0.0]], requires_grad=True)
        loss, parts = objective.loss(values, batch, denominators)
        loss.backward()
        grads.append(values.grad)
        total += loss.item()
        for name, part in parts.items():
            old = metrics.get(name, 0.0)
            metrics[name] = max(old, part.item()) if name.endswith("_max") else old + part.item()
    return total, [row[1:] for row in packed.unpack(grads)], metrics


def test_counts():
    assert count(SEQUENCES) == {
        "tokens": 6.0, "sequences": 3.0, "groups": 2.0, "local:group 0": 3.0, "local:group 1": 3.0,
    }  # fmt: skip


def test_policy_gradient_over_batch_tokens_by_hand():
    loss, grads, metrics = evaluate(policy_gradient(LossConfig()), SEQUENCES, LOGPROBS)
    assert grads[0] == pytest.approx([-1 / 6, -1 / 6])
    assert grads[1] == pytest.approx([1 / 6])
    assert grads[2] == pytest.approx([-2 / 6] * 3)
    assert grads[3] == [0.0]
    assert loss == pytest.approx((3.0 - 0.5 + 1.2) / 6)
    assert metrics["ratio"] == pytest.approx(1.0)
    assert metrics["gap_abs_max"] == 0.0


def test_policy_gradient_over_group_tokens_is_equation_1():
    uneven = [*SEQUENCES[:2], dataclasses.replace(SEQUENCES[2], loss_mask=(0, 0, 0, 1))]
    _, grads, _ = evaluate(policy_gradient(LossConfig(normalize="group_tokens")), uneven, LOGPROBS[:3])
    assert grads[0] == pytest.approx([-1 / 6, -1 / 6])  # 3 tokens in the group, 2 groups
    assert grads[2] == pytest.approx([0.0, 0.0, -2 / 2])  # 1 token in the group, 2 groups


def test_policy_gradient_over_sequences_ignores_sequences_without_trained_tokens():
    _, grads, _ = evaluate(policy_gradient(LossConfig(normalize="sequence")), SEQUENCES, LOGPROBS)
    assert grads[0] == pytest.approx([-1 / 6, -1 / 6])  # 1 / (3 sequences * 2 tokens)
    assert grads[1] == pytest.approx([1 / 3])
    assert grads[2] == pytest.approx([-2 / 9] * 3)


CHOICES = [
    *({"normalize": name} for name in ("batch_tokens", "group_tokens", "sequence")),
    {"normalize": "constant", "constant": 12.0},
    {"importance": "sequence_mask", "importance_low": 0.5, "importance_high": 1.2},
    {"clip_low": 0.2, "clip_high": 0.28},
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("capacity", [4, 5, 7])
def test_packing_changes_nothing(choice: dict[str, object], capacity: int):
    objective, far = policy_gradient(LossConfig(**choice)), shifted(math.log(1.5))
    whole = evaluate(objective, SEQUENCES, far)
    split = evaluate(objective, SEQUENCES, far, capacity)
    back = evaluate(objective, SEQUENCES[::-1], far[::-1], capacity)
    assert split[0] == pytest.approx(whole[0], abs=1e-6)
    assert split[1] == [pytest.approx(row, abs=1e-7) for row in whole[1]]
    assert back[1][::-1] == [pytest.approx(row, abs=1e-7) for row in whole[1]]
    assert split[2] == pytest.approx(whole[2], abs=1e-6)


def shifted(difference: float) -> list[list[float]]:
    """Learner log-probabilities that differ from the sampler's on the first trained token only."""
    return [[LOGPROBS[0][0] + difference, LOGPROBS[0][1]], *LOGPROBS[1:]]


def test_tis_clamps_and_icepop_masks():
    far = shifted(math.log(3.0))
    tis = evaluate(policy_gradient(LossConfig(importance="tis")), SEQUENCES, far)
    assert tis[1][0] == pytest.approx([-2.0 / 6, -1 / 6])
    icepop = evaluate(policy_gradient(LossConfig(importance="icepop")), SEQUENCES, far)
    assert icepop[1][0] == pytest.approx([0.0, -1 / 6])  # the denominator stays 6
    assert icepop[2]["masked_share"] == pytest.approx(1 / 6)
    assert icepop[2]["ratio_max"] == pytest.approx(3.0)
    near = evaluate(policy_gradient(LossConfig(importance="icepop")), SEQUENCES, shifted(math.log(1.5)))
    assert near[1][0] == pytest.approx([-1.5 / 6, -1 / 6])


def test_a_sequence_leaves_whole_when_its_geometric_mean_ratio_does():
    # Sequence 0 has two trained tokens, ratios 3 and 1: geometric mean sqrt(3) = 1.732.
    for high, kept in ((1.75, 1.0), (1.7, 0.0)):
        cfg = LossConfig(importance="sequence_mask", importance_high=high)
        _, grads, metrics = evaluate(policy_gradient(cfg), SEQUENCES, shifted(math.log(3.0)))
        assert grads[0] == pytest.approx([-3.0 / 6 * kept, -1 / 6 * kept])  # inside, single ratios are kept raw
        assert grads[1] == pytest.approx([1 / 6])
        assert metrics["masked_share"] == pytest.approx((1 - kept) * 2 / 6)
        assert metrics["masked_sequence_share"] == pytest.approx((1 - kept) / 3)  # the one without tokens counts not


def test_too_many_masked_sequences_abort():
    cfg = LossConfig(importance="sequence_mask", importance_high=1.7, max_masked_share=0.332)
    metrics = evaluate(policy_gradient(cfg), SEQUENCES, shifted(math.log(3.0)))[2]
    with pytest.raises(UserError, match=r"loss.max_masked_share.*takes out 33% of the trained tokens"):
        policy_gradient(cfg).check(metrics)
    with pytest.raises(UserError, match=r"takes out 33% of the sequences, more than 33%"):
        policy_gradient(cfg).check(metrics | {"masked_share": 0.0})


def test_on_policy_clipping_is_the_plain_gradient_to_the_bit():
    plain = evaluate(policy_gradient(LossConfig()), SEQUENCES, LOGPROBS)
    clipped = evaluate(policy_gradient(LossConfig(clip_low=0.2, clip_high=0.2)), SEQUENCES, LOGPROBS)
    assert clipped[1] == plain[1]
    assert clipped[2]["clipped_share"] == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.1, 1.0, 1.1), (1.3, 1.0, 0.0), (1.3, -1.0, -1.3), (0.9, -1.0, -0.9), (0.7, -1.0, 0.0), (0.7, 1.0, 0.7)],
)
def test_the_clip_holds_only_what_has_already_moved_far_enough(ratio: float, advantage: float, slope: float):
    """By the definition of PPO: no gradient above 1.28 for A > 0 and below 0.8 for A < 0, else rho A."""
    one = [Sequence((5, 6), (0, 1), (0.0, advantage), (0.0, -1.0))]
    objective = policy_gradient(LossConfig(clip_low=0.2, clip_high=0.28))
    _, grads, metrics = evaluate(objective, one, [[-1.0 + math.log(ratio)]])
    assert grads[0] == pytest.approx([-slope], rel=1e-6)
    assert metrics["clipped_share"] == float(slope == 0.0)


def test_clipping_needs_the_old_log_probabilities():
    bare = [dataclasses.replace(sequence, sampler_logprobs=()) for sequence in SEQUENCES]
    with pytest.raises(UserError, match=r"loss\.clip_low needs the sampler's log-probabilities"):
        evaluate(policy_gradient(LossConfig(clip_low=0.2, clip_high=0.2)), bare, LOGPROBS)


def test_too_many_masked_tokens_abort():
    objective = policy_gradient(LossConfig(importance="icepop", max_masked_share=0.1))
    metrics = evaluate(objective, SEQUENCES, shifted(math.log(3.0)))[2]
    with pytest.raises(UserError, match="loss.max_masked_share.*17%"):
        objective.check(metrics)
    policy_gradient(LossConfig(importance="icepop")).check(metrics)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_term_is_added_with_its_coefficient(kind: str):
    reference = [(0.0, -1.5, -2.5), (0.0, -0.5), (0.0, -0.1, -0.2, -0.3), (0.0, 0.0)]
    sequences = [
        dataclasses.replace(sequence, advantages=(0.0,) * len(sequence.token_ids), reference_logprobs=values)
        for sequence, values in zip(SEQUENCES, reference, strict=True)
    ]
    loss, grads, metrics = evaluate(policy_gradient(LossConfig(kl=0.03, kl_type=kind)), sequences, LOGPROBS)
    value = {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 1 + 0.5}[kind]
    slope = {"k1": 0.5, "k2": 0.5, "k3": 1 - math.exp(-0.5)}[kind]
    assert metrics["kl"] == pytest.approx(2 * value / 6, rel=1e-5)
    assert loss == pytest.approx(0.03 * 2 * value / 6, rel=1e-5)
    assert grads[0] == pytest.approx([0.03 * slope / 6] * 2, rel=1e-5)
    assert grads[2] == pytest.approx([0.0] * 3, abs=1e-8)


def test_kl_without_reference_is_an_error():
    with pytest.raises(ValueError, match="reference log-probabilities"):
        evaluate(policy_gradient(LossConfig(kl=0.1)), SEQUENCES, LOGPROBS)


def with_teacher(rows: SequenceOf[tuple[float, ...]]) -> list[Sequence]:
    return [dataclasses.replace(sequence, teacher_logprobs=row) for sequence, row in zip(SEQUENCES, rows, strict=True)]


TEACHER = [(0.0, -0.5, -2.0), (0.0, -1.5), (0.0, -0.1, -0.2, -0.6), (0.0, 0.0)]


def test_distillation_by_hand_equations_2_to_4():
    student = shifted(math.log(1.5))  # r = 1.5 on the first token, 1 elsewhere
    loss, grads, metrics = evaluate(distillation(DistillConfig()), with_teacher(TEACHER), student)
    advantage = -0.5 - student[0][0]
    assert grads[0] == pytest.approx([-1.5 * advantage / (3 * 2), 0.0], abs=1e-7)
    assert grads[1] == pytest.approx([1.0 / 3])  # a = -1, one token, three sequences
    assert grads[2] == pytest.approx([0.0, 0.0, 0.3 / (3 * 3)], abs=1e-7)
    assert metrics["reverse_kl"] == pytest.approx((-advantage + 1.0 + 0.3) / 6, abs=1e-6)
    assert loss == pytest.approx(-(1.5 * advantage * student[0][0] / 6 - 1.0 * -0.5 / 3 - 0.3 * -0.3 / 9), abs=1e-6)


def test_distillation_masks_outside_half_to_two_without_reweighting_the_rest():
    _, grads, _ = evaluate(distillation(DistillConfig()), with_teacher(TEACHER), shifted(math.log(2.5)))
    assert grads[0] == [0.0, 0.0]
    assert grads[2][2] == pytest.approx(0.3 / 9, abs=1e-7)


def test_distillation_advantage_can_be_clipped():
    _, grads, _ = evaluate(distillation(DistillConfig(clip_advantage=0.25)), with_teacher(TEACHER), LOGPROBS)
    assert grads[1] == pytest.approx([0.25 / 3])


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 5.0])
def test_the_power_advantage_is_bounded_has_the_sign_and_tends_to_the_log_ratio(alpha: float):
    far = with_teacher([(0.0, -0.5, -60.0), (0.0, -1.5), (0.0, -0.1, -0.2, -0.6), (0.0, 0.0)])
    plain = evaluate(distillation(DistillConfig()), far, LOGPROBS)[1]
    power = evaluate(distillation(DistillConfig(advantage="power", power_alpha=alpha)), far, LOGPROBS)[1]
    for mine, other, weight in zip(power, plain, (1 / 6, 1 / 3, 1 / 9, 0.0), strict=True):
        for bounded, free in zip(mine, other, strict=True):
            assert abs(bounded) <= weight / alpha
            assert math.copysign(1.0, bounded) == math.copysign(1.0, free) or bounded == free == 0.0
    if alpha == 1e-3:
        assert power[1] == pytest.approx(plain[1], rel=2e-3)


def test_domain_weights_decide_the_shares_whatever_the_numbers_of_sequences():
    """Domain 0 has two sequences of 2 and 1 tokens, domain 1 one of 3: with weights 1 and 3 it gets three quarters."""
    far = with_teacher([(-9.0,) * len(sequence.token_ids) for sequence in SEQUENCES])
    placed = [dataclasses.replace(sequence, domain=sequence.group) for sequence in far]
    cfg = DistillConfig(domain_weights={"code": 1.0, "math": 3.0}, advantage="power", importance_high=9.0)
    for capacity in (100, 4):
        _, grads, metrics = evaluate(distillation(cfg, ["code", "math"]), placed, LOGPROBS, capacity)
        pulls = [[g / (math.exp(lp) - math.exp(-9.0)) for g, lp in zip(*rows, strict=True)]
                 for rows in zip(grads[:3], LOGPROBS, strict=False)]  # fmt: skip
        assert pulls[0] == pytest.approx([1 / 16] * 2) and pulls[1] == pytest.approx([1 / 8])  # 1/4, in equal parts
        assert pulls[2] == pytest.approx([1 / 4] * 3)
        assert metrics["reverse_kl/math"] == pytest.approx(9.0 - 0.2, rel=1e-6)
    weights, names = {"code": 1.0, "math": 3.0}, ["code", "math"]
    present = distillation(DistillConfig(domain_weights=weights), names)
    absent = distillation(DistillConfig(domain_weights=weights | {"rlhf": 9.0}), [*names, "rlhf"])
    one, two = evaluate(absent, placed, LOGPROBS), evaluate(present, placed, LOGPROBS)
    assert one[:2] == two[:2] and "reverse_kl/rlhf" not in one[2]  # a domain without tokens takes no share


@pytest.mark.parametrize("advantage", ["log_ratio", "power"])
def test_distilling_from_oneself_has_no_gradient(advantage: str):
    own = with_teacher([(0.0, *row) for row in LOGPROBS])
    loss, grads, metrics = evaluate(distillation(DistillConfig(advantage=advantage)), own, LOGPROBS)
    assert (loss, metrics["reverse_kl"]) == (0.0, 0.0)
    assert all(value == 0.0 for row in grads for value in row)


def test_full_vocabulary_distillation_is_the_exact_reverse_kl():
    objective = distillation(DistillConfig(kind="full_vocab"))
    generator = torch.Generator().manual_seed(0)
    batch = pack(SEQUENCES, 100).batches[0]
    positions = batch.tokens_T.numel()
    student = torch.log_softmax(torch.randn(positions, 10, generator=generator), -1).requires_grad_()
    teacher = torch.log_softmax(torch.randn(positions, 10, generator=generator), -1)
    sampled = student.detach().gather(1, batch.targets_T[:, None])[:, 0]
    batch = dataclasses.replace(batch, teacher_logprobs_TV=teacher, sampler_logprobs_T=sampled)
    loss, metrics = objective.loss(student, batch, objective.denominators(SEQUENCES))
    per_position = (student.exp() * (student - teacher)).sum(-1)
    # packed longest first: 4 tokens (3 trained), 3 tokens (2 trained), then the pairs
    expected = (per_position[0:3].mean() + per_position[4:6].mean() + per_position[7]) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["masked_share"].item() == 0.0


def test_cross_entropy_token_and_sequence_reduction():
    plain = [Sequence(s.token_ids, s.loss_mask) for s in SEQUENCES]
    token, _, metrics = evaluate(cross_entropy("token"), plain, LOGPROBS)
    assert token == pytest.approx((3.0 + 0.5 + 0.6) / 6)
    assert metrics == {"loss": pytest.approx(token)}
    sequence, _, _ = evaluate(cross_entropy("sequence"), plain, LOGPROBS)
    assert sequence == pytest.approx((1.5 + 0.5 + 0.2) / 3)


def test_a_step_without_trained_tokens_is_zero_not_nan():
    empty = [Sequence((1, 2), (0, 0), (0.0, 0.0), (0.0, 0.0))]
    loss, grads, _ = evaluate(policy_gradient(LossConfig(normalize="group_tokens")), empty, [[-1.0]])
    assert (loss, grads) == (0.0, [[0.0]])
