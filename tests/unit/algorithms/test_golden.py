"""Golden values: losses and gradients of one small step in float64, derived by hand. No refactoring may move them.

The step: three sequences in two groups, five trained tokens. Log-probabilities are powers of two, so that every loss is
a multiple of ln 2 = 0.6931471805599453. Trained tokens, in the order of the packed row:

    token                 a1     a2     b1     c1     c2      group of a and b: 0, of c: 1
    learner p             1/2    1/4    1/8    1/2    1/4     log p = -ln2 * (1, 2, 3, 1, 2)
    ratio r to sampler    1      3      0.6    0.8    2.5
    advantage A           1      1      -1     2      2
    reference, log p/ref  ln2    0      -ln2   0      ln2
    teacher p             1/4    1/4    1/2    1/4    1/8     a = log teacher/p = ln2 * (-1, 0, 2, -1, -1)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence as SequenceOf

import pytest
import torch

from nemo_cascade.algorithms.advantage import relative
from nemo_cascade.algorithms.loss import cross_entropy, distillation, policy_gradient
from nemo_cascade.config.schema import AdvantageConfig, DistillConfig, LossConfig
from nemo_cascade.protocols import Objective
from nemo_cascade.types import Batch

TRAINED = [0, 1, 3, 5, 6]  # positions of a1, a2, b1, c1, c2; 2, 4 and 7 are the last positions of their sequences
LEARNER = [1 / 2, 1 / 4, 1 / 8, 1 / 2, 1 / 4]
RATIO = [1.0, 3.0, 0.6, 0.8, 2.5]
REFERENCE = [1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 8]
TEACHER = [1 / 4, 1 / 4, 1 / 2, 1 / 4, 1 / 8]
COUNTS = {
    "tokens": 5.0, "sequences": 3.0, "groups": 2.0, "local:group 0": 3.0, "local:group 1": 2.0,
    "sequences of domain 0": 2.0, "sequences of domain 1": 1.0, "tokens of domain 0": 3.0, "tokens of domain 1": 2.0,
}  # fmt: skip


def row(values: SequenceOf[float]) -> torch.Tensor:
    """Values of the five trained tokens as a packed row [8] in float64, 0 elsewhere."""
    whole = torch.zeros(8, dtype=torch.float64)
    whole[TRAINED] = torch.tensor(values, dtype=torch.float64)
    return whole


BATCH = Batch(
    tokens_T=torch.zeros(8, dtype=torch.int64),
    targets_T=torch.zeros(8, dtype=torch.int64),
    loss_mask_T=row([1.0] * 5),
    cu_seqlens=torch.tensor([0, 3, 5, 8], dtype=torch.int32),
    sequence_T=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]),
    group_S=torch.tensor([0, 0, 1]),
    advantages_T=row([1.0, 1.0, -1.0, 2.0, 2.0]),
    sampler_logprobs_T=row([math.log(p / r) for p, r in zip(LEARNER, RATIO, strict=True)]),
    teacher_logprobs_T=row([math.log(p) for p in TEACHER]),
    domain_S=torch.tensor([0, 0, 1]),
)
WITH_REFERENCE = dataclasses.replace(BATCH, reference_logprobs_T=row([math.log(p) for p in REFERENCE]))


def step(objective: Objective, batch: Batch = BATCH) -> tuple[float, list[float], dict[str, float]]:
    """Loss, its derivative by each trained log-probability, and metrics."""
    logprobs_T = row([math.log(p) for p in LEARNER]).requires_grad_()
    loss, metrics = objective.loss(logprobs_T, batch, COUNTS)
    loss.backward()
    gradient_T = logprobs_T.grad
    assert gradient_T is not None and loss.dtype == torch.float64
    assert gradient_T[[2, 4, 7]].tolist() == [0.0, 0.0, 0.0]
    return loss.item(), gradient_T[TRAINED].tolist(), {name: value.item() for name, value in metrics.items()}


def exactly(values):
    return pytest.approx(values, rel=1e-12, abs=1e-15)


# -1/N sum A log p: without weights sum A log p = -ln2 (1 + 2 - 3 + 2 + 4) = -6 ln2; the gradient is -A c.
#   batch_tokens: c = 1/5. group_tokens: c = 1/(3*2) in group 0, whose terms cancel, 1/(2*2) in group 1: 6/4 ln2.
#   sequence: c = 1/(2*3), 1/3, 1/(2*3): ln2 (3/6 - 3/3 + 6/6). constant 10: c = 1/10.
NORMALIZE = {
    "batch_tokens": (0.8317766166719344, [-0.2, -0.2, 0.2, -0.4, -0.4]),
    "group_tokens": (1.0397207708399179, [-0.16666666666666666, -0.16666666666666666, 0.16666666666666666, -0.5, -0.5]),
    "sequence": (
        0.34657359027997264,
        [-0.16666666666666666, -0.16666666666666666, 0.3333333333333333, -0.3333333333333333, -0.3333333333333333],
    ),
    "constant": (0.4158883083359672, [-0.1, -0.1, 0.1, -0.2, -0.2]),
}


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_normalisers(normalize: str) -> None:
    constant = 10.0 if normalize == "constant" else None
    loss, gradient, _ = step(policy_gradient(LossConfig(normalize=normalize, constant=constant)))
    assert (loss, gradient) == (exactly(NORMALIZE[normalize][0]), exactly(NORMALIZE[normalize][1]))


# Over the batch's tokens the gradient is -A w / 5 and the loss ln2/5 (w_a1 + 2 w_a2 - 3 w_b1 + 2 w_c1 + 4 w_c2).
#   tis [0.5, 2]: w = 1, 2, .6, .8, 2: ln2/5 (1 + 4 - 1.8 + 1.6 + 8) = 2.56 ln2.
#   icepop [0.5, 2]: w = 1, 0, .6, .8, 0: ln2/5 (1 - 1.8 + 1.6) = 0.16 ln2; 2 of 5 tokens masked, no whole sequence.
#   sequence_mask [0.7, 1.5]: geometric means sqrt(3) = 1.73 (out), 0.6 (out), sqrt(2) = 1.41 (in):
#   w = 0, 0, 0, .8, 2.5: ln2/5 (1.6 + 10) = 2.32 ln2; 3 of 5 tokens and 2 of 3 sequences masked.
IMPORTANCE = {
    "tis": ((0.5, 2.0), 1.77445678223346, [-0.2, -0.4, 0.12, -0.32, -0.8], 0.0, 0.0),
    "icepop": ((0.5, 2.0), 0.11090354888959125, [-0.2, 0.0, 0.12, -0.32, 0.0], 0.4, 0.0),
    "sequence_mask": ((0.7, 1.5), 1.608101458899073, [0.0, 0.0, 0.0, -0.32, -1.0], 0.6, 0.6666666666666666),
}


@pytest.mark.parametrize("kind", IMPORTANCE)
def test_importance_corrections(kind: str) -> None:
    (low, high), expected, slopes, tokens, sequences = IMPORTANCE[kind]
    cfg = LossConfig(importance=kind, importance_low=low, importance_high=high)
    loss, gradient, metrics = step(policy_gradient(cfg))
    assert (loss, gradient) == (exactly(expected), exactly(slopes))
    assert metrics["masked_share"] == exactly(tokens)
    assert metrics["masked_sequence_share"] == pytest.approx(sequences, rel=1e-6)  # a count over a count, in float32
    # mean r = (1 + 3 + .6 + .8 + 2.5)/5; mean log r = ln(1 * 3 * .6 * .8 * 2.5)/5 = ln(3.6)/5
    assert metrics["ratio"] == exactly(1.58)
    assert metrics["gap"] == exactly(0.25618676909241284)


def test_clipping_by_ppo() -> None:
    # Bounds 1 - .3 and 1 + .28. rho A: 1, 3, -.6, 1.6, 5; clipped: 1, 1.28, -.7, 1.6, 2.56; the smaller counts:
    # 1 + 1.28 - .7 + 1.6 + 2.56 = 5.74. Where the clip acts (a2, b1, c2) there is no gradient, else rho A.
    loss, gradient, metrics = step(policy_gradient(LossConfig(clip_low=0.3, clip_high=0.28)))
    assert loss == exactly(-1.148)
    assert gradient == exactly([-0.2, 0.0, 0.0, -0.32, 0.0])
    assert metrics["clipped_share"] == exactly(0.6)


def test_dual_clip() -> None:
    # Advantages negated: rho A = -1, -3, .6, -1.6, -5; clipped at .7 and 1.28: -1, -1.28, .7, -1.6, -2.56; the smaller:
    # -1, -3, .6, -1.6, -5. At least 1.5 A where A < 0 (a1 -1.5, a2 -1.5, c1 -3, c2 -3): -1, -1.5, .6, -1.6, -3, sum
    # -6.5. Held there, a2 and c2 have no gradient; the others rho A.
    minus = dataclasses.replace(BATCH, advantages_T=-BATCH.advantages_T)
    cfg = LossConfig(clip_low=0.3, clip_high=0.28, dual_clip=1.5)
    loss, gradient, metrics = step(policy_gradient(cfg), minus)
    assert loss == exactly(1.3)
    assert gradient == exactly([0.2, 0.0, -0.12, 0.32, 0.0])
    assert metrics["clipped_share"] == exactly(0.4)


# kl 0.1 over the batch's tokens: 0.02 sum KL_t is added to 6/5 ln2, and 0.02 dKL_t to (-.2, -.2, .2, -.4, -.4).
#   d = ln2 (1, 0, -1, 0, 1). k1: values d, slopes d (score function). k2: values d^2/2: 0.02 * 1.5 ln2^2; slopes d.
#   k3: e^-d - 1 + d = (ln2 - 1/2, 0, 1 - ln2, 0, ln2 - 1/2), sum ln2; slopes 1 - e^-d = (1/2, 0, -1, 0, 1/2).
KL = {
    "k1": (0.8456395602831333, [-0.1861370563888011, -0.2, 0.1861370563888011, -0.4, -0.38613705638880114]),
    "k2": (0.8461902070894805, [-0.1861370563888011, -0.2, 0.1861370563888011, -0.4, -0.38613705638880114]),
    "k3": (0.8456395602831333, [-0.19, -0.2, 0.18, -0.4, -0.39]),
}
# In the reward: the gradient is -(A - 0.1 KL_t)/5 with the values above. The loss changes by
# 0.02 sum KL_t log p = -0.02 ln2 (KL_a1 + 3 KL_b1 + 2 KL_c2): k1 ln2 (1 - 3 + 2) = 0; k2 ln2^2/2 (1 + 3 + 2) = 3 ln2^2;
# k3 3 (ln2 - 1/2) + 3 (1 - ln2) = 3/2.
KL_IN_REWARD = {
    "k1": (0.8317766166719344, [-0.1861370563888011, -0.2, 0.1861370563888011, -0.4, -0.38613705638880114]),
    "k2": (0.8117951375525986, [-0.19519546986081798, -0.2, 0.20480453013918204, -0.4, -0.395195469860818]),
    "k3": (0.810982201255136, [-0.1961370563888011, -0.2, 0.20613705638880112, -0.4, -0.3961370563888011]),
}


@pytest.mark.parametrize("kind", KL)
def test_kl_in_the_loss_and_in_the_reward(kind: str) -> None:
    for place, table in (("loss", KL), ("reward", KL_IN_REWARD)):
        loss, gradient, _ = step(policy_gradient(LossConfig(kl=0.1, kl_type=kind, kl_in=place)), WITH_REFERENCE)
        assert (loss, gradient) == (exactly(table[kind][0]), exactly(table[kind][1])), place


# Equation 4: c = 1/(2*3), 1/3, 1/(2*3) as in `sequence`; w = 1, 0, .6, .8, 0 as in icepop; gradient -c w a.
#   log_ratio: a = ln2 (-1, ., 2, -1, .): (ln2/6, 0, -0.4 ln2, 0.8/6 ln2, 0); loss -c w a log p:
#   ln2^2 (-1/6 + 1.2 - 0.8/6) = 0.9 ln2^2.
#   clip 1: a_b1 = 1: gradient -0.2, loss ln2^2 (-1/6 - 0.8/6) + 0.6 ln2.
#   power 1: a = (-1/4, ., 3/8, -1/4, .): gradient (1/24, 0, -0.075, 1/30, 0),
#   loss ln2 (-1/24 + .225 - 1/30) = 0.15 ln2.
#   power 2: a = (p^2 - q^2)/2 = (-3/32, ., 15/128, -3/32, .): gradient (1/64, 0, -3/128, 1/80, 0),
#   loss ln2 (-1/64 + 9/128 - 1/80) = 0.0421875 ln2.
SAMPLED = {
    "log_ratio": ({}, 0.43240771252638127, [0.11552453009332421, 0.0, -0.2772588722239781, 0.09241962407465937, 0.0]),
    "clipped": (
        {"clip_advantage": 1.0},
        0.2717524041605067,
        [0.11552453009332421, 0.0, -0.2, 0.09241962407465937, 0.0],
    ),
    "power 1": (
        {"advantage": "power"},
        0.1039720770839918,
        [0.041666666666666664, 0.0, -0.075, 0.03333333333333333, 0.0],
    ),
    "power 2": (
        {"advantage": "power", "power_alpha": 2.0},
        0.029242146679872693,
        [0.015625, 0.0, -0.0234375, 0.0125, 0.0],
    ),
}


@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_distillation(case: str) -> None:
    options, expected, slopes = SAMPLED[case]
    loss, gradient, metrics = step(distillation(DistillConfig(**options)))
    assert (loss, gradient) == (exactly(expected), exactly(slopes))
    # -mean a, masked tokens included: -ln2 (-1 + 0 + 2 - 1 - 1)/5
    assert metrics["reverse_kl"] == exactly(0.13862943611198905)
    assert metrics["masked_share"] == exactly(0.4)


def test_domain_weights_and_metrics_by_domain_and_teacher() -> None:
    # Domain 0 holds a and b, domain 1 holds c; equal weights: factors N lambda/(n Lambda) = 3/(2*2), 3/(1*2) on the
    # gradient of log_ratio: ln2/6 * 3/4, -0.4 ln2 * 3/4, 0.8/6 ln2 * 3/2; loss ln2^2 ((1.2 - 1/6) 3/4 - 0.8/6 * 3/2).
    cfg = DistillConfig(domain_weights={"code": 1.0, "math": 1.0})
    objective = distillation(cfg, ["code", "math"], {"code": "sft", "math": "sft"})
    loss, gradient, metrics = step(objective)
    assert gradient == exactly([0.08664339756999316, 0.0, -0.2079441541679836, 0.13862943611198905, 0.0])
    assert loss == exactly(0.2762604830029658)
    # domain 0: a = ln2 (-1, 0, 2), one of three tokens masked; domain 1: a = -ln2 twice, one of two masked
    assert metrics["reverse_kl/code"] == exactly(-0.23104906018664842)
    assert metrics["reverse_kl/math"] == exactly(0.6931471805599453)
    assert metrics["reverse_kl/teacher_sft"] == exactly(0.13862943611198905)
    assert metrics["teacher_gap/code"] == exactly(0.6931471805599453)
    assert metrics["teacher_gap/teacher_sft"] == exactly(0.6931471805599453)
    assert metrics["masked_share/code"] == exactly(0.3333333333333333)
    assert metrics["masked_share/math"] == exactly(0.5)


def test_distillation_over_the_vocabulary_and_its_top() -> None:
    # One trained position over three tokens: student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4).
    # full_vocab: 1/2 ln2 - 1/4 ln2; by log p_v the derivative is p_v (log p_v/q_v + 1).
    # topk 1: 1/2 ln2 + 1/2 ln(1/2 / 3/4) = 1/2 ln(4/3); by log p_0: p (ln2 + 1) - p (ln(2/3) + 1) = 1/2 ln3.
    student_TV = torch.tensor([[1 / 2, 1 / 4, 1 / 4]] * 2, dtype=torch.float64).log()
    teacher_TV = torch.tensor([[1 / 4, 1 / 2, 1 / 4]] * 2, dtype=torch.float64).log()
    batch = Batch(
        torch.tensor([0, 2]), torch.tensor([2, 0]), torch.tensor([1.0, 0.0], dtype=torch.float64),
        torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 0]), torch.tensor([0]),
        sampler_logprobs_T=torch.tensor([math.log(1 / 4), 0.0], dtype=torch.float64),
        teacher_logprobs_TV=teacher_TV, top_tokens_TK=torch.tensor([[0], [0]]),
        teacher_logprobs_TK=teacher_TV[:, :1],
    )  # fmt: skip
    expected = {
        "full_vocab": (0.17328679513998632, [0.8465735902799727, 0.07671320486001368, 0.25]),
        "topk": (0.14384103622589042, [0.5493061443340549, 0.0, 0.0]),
    }
    for kind, (value, slopes) in expected.items():
        scores_TV = student_TV.clone().requires_grad_()
        counts = {"tokens": 1.0, "sequences": 1.0}
        loss, metrics = distillation(DistillConfig(kind=kind, top_k=1)).loss(scores_TV, batch, counts)
        loss.backward()
        assert loss.item() == exactly(value) and metrics["reverse_kl"].item() == exactly(value)
        assert scores_TV.grad is not None
        assert scores_TV.grad[0].tolist() == exactly(slopes)
        assert scores_TV.grad[1].tolist() == [0.0, 0.0, 0.0]


def test_cross_entropy() -> None:
    # token: ln2 (1 + 2 + 3 + 1 + 2)/5; sequence: the mean of 1.5 ln2, 3 ln2 and 1.5 ln2.
    loss, gradient, _ = step(cross_entropy("token"))
    assert (loss, gradient) == (exactly(1.2476649250079015), exactly([-0.2] * 5))
    loss, gradient, _ = step(cross_entropy("sequence"))
    assert loss == exactly(1.3862943611198906)
    assert gradient == exactly(
        [-0.16666666666666666, -0.16666666666666666, -0.3333333333333333, -0.16666666666666666, -0.16666666666666666]
    )


# Rewards 1, 0, 0, 1/2: mean 3/8, differences (5, -3, -3, 1)/8, squares sum to 44/64: population std sqrt(11)/8 =
# 0.41457809879442498, sample std sqrt(11/48) = 0.47871355387816905. Leave-one-out: 4/3 of the differences.
ADVANTAGES = {
    ("mean", "none"): [0.625, -0.375, -0.375, 0.125],
    ("leave_one_out", "none"): [0.8333333333333334, -0.5, -0.5, 0.16666666666666666],
    ("mean", "std"): [1.507556722888818, -0.9045340337332909, -0.9045340337332909, 0.30151134457776363],
    ("mean", "sample_std"): [1.3055824196677337, -0.7833494518006403, -0.7833494518006403, 0.26111648393354675],
    ("leave_one_out", "std"): [2.010075630518424, -1.2060453783110545, -1.2060453783110545, 0.40201512610368484],
    ("leave_one_out", "sample_std"): [1.7407765595569782, -1.044465935734187, -1.044465935734187, 0.34815531191139565],
}


@pytest.mark.parametrize(("baseline", "scale"), ADVANTAGES)
def test_group_relative_advantages(baseline: str, scale: str) -> None:
    values = relative([1.0, 0.0, 0.0, 0.5], AdvantageConfig(baseline=baseline, scale=scale, eps=0.0))
    assert values == exactly(ADVANTAGES[baseline, scale])


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    # rewards 1, 0: differences 1/2, std 1/2: 1/2 / (1/2 + 1e-6)
    assert relative([1.0, 0.0], AdvantageConfig()) == exactly([0.9999980000039999, -0.9999980000039999])
