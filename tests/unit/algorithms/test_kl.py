import math

import pytest
import torch

from nemo_cascade.algorithms import kl
from nemo_cascade.algorithms.loss import policy_gradient
from nemo_cascade.config.schema import LossConfig
from nemo_cascade.types import Batch, UserError

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, generator=GENERATOR, dtype=torch.float64)
REFERENCE = torch.log_softmax(LOGITS + 0.3 * torch.randn(5, generator=GENERATOR, dtype=torch.float64), -1)


def exact(logits: torch.Tensor) -> torch.Tensor:
    policy = torch.log_softmax(logits, -1)
    return (policy.exp() * (policy - REFERENCE)).sum()


def expected(kind: str, logits: torch.Tensor) -> torch.Tensor:
    """The estimator's expectation over the policy's own tokens, drawn with fixed probabilities."""
    policy = torch.log_softmax(logits, -1)
    return (policy.detach().exp() * kl.estimate(kind, policy, REFERENCE)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind: str):
    assert expected(kind, LOGITS).item() == pytest.approx(exact(LOGITS).item(), abs=1e-12)


def test_k3_is_never_negative_and_k1_is_the_difference():
    policy = torch.log_softmax(LOGITS, -1)
    assert (kl.estimate("k3", policy, REFERENCE) >= 0).all()
    assert torch.equal(kl.estimate("k1", policy, REFERENCE), policy - REFERENCE)


@pytest.mark.parametrize("kind", ["k1", "k2"])
def test_gradient_of_k1_and_k2_is_the_true_gradient_on_average(kind: str):
    mine, truth = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    expected(kind, mine).backward()
    exact(truth).backward()
    torch.testing.assert_close(mine.grad, truth.grad)


def forward(logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || policy), the other direction."""
    return (REFERENCE.exp() * (REFERENCE - torch.log_softmax(logits, -1))).sum()


def gradient_of(value) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    value(logits).backward()
    assert logits.grad is not None
    return logits.grad


def expected_gradient(kind: str, place: str) -> torch.Tensor:
    """The mean over the policy's own tokens of what `policy_gradient` makes of one token with advantage 0 and kl 1.

    All five tokens are enumerated: token v is drawn with probability p_v, its loss has the slope g_v in log p_v.
    """
    objective = policy_gradient(LossConfig(kl=1.0, kl_type=kind, kl_in=place))
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    policy = torch.log_softmax(LOGITS, -1)
    slopes = []
    for token in range(5):
        batch = Batch(
            torch.tensor([0]), torch.tensor([token]), one, torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([0]),
            advantages_T=none, reference_logprobs_T=REFERENCE[token : token + 1],
        )  # fmt: skip
        logprobs_T = policy[token : token + 1].clone().requires_grad_()
        objective.loss(logprobs_T, batch, {"tokens": 1.0})[0].backward()
        assert logprobs_T.grad is not None
        slopes.append(logprobs_T.grad[0])
    weights = policy.exp() * torch.stack(slopes)
    return gradient_of(lambda logits: (weights * torch.log_softmax(logits, -1)).sum())


EXPECTED = {
    ("k1", "loss"): lambda reverse, other: reverse,
    ("k2", "loss"): lambda reverse, other: reverse,
    ("k3", "loss"): lambda reverse, other: other,  # the gradient of KL(reference || policy)
    ("k1", "reward"): lambda reverse, other: reverse,
    ("k3", "reward"): lambda reverse, other: reverse - other,
}


@pytest.mark.parametrize(("kind", "place"), EXPECTED)
def test_what_the_loss_follows_on_average(kind: str, place: str):
    truth = EXPECTED[kind, place](gradient_of(exact), gradient_of(forward))
    torch.testing.assert_close(expected_gradient(kind, place), truth, rtol=1e-12, atol=1e-14)


def test_k2_in_the_reward_follows_neither_direction():
    found = expected_gradient("k2", "reward")
    for direction in (exact, forward):
        assert torch.nn.functional.cosine_similarity(found, gradient_of(direction), dim=0) < 0.9


def test_k3_goes_on_as_a_straight_line_where_exp_would_overflow():
    policy = torch.tensor([-21.0, -1000.0], requires_grad=True)
    values = kl.estimate("k3", policy, torch.zeros(2))
    values.sum().backward()
    slope = math.exp(20.0)
    assert values.tolist() == pytest.approx([2 * slope - 22, 981 * slope - 1001], rel=1e-6)
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([1 - slope] * 2, rel=1e-6)


def top(logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return kl.topk_reverse(logprobs[tokens][None], REFERENCE[tokens][None])[0]


def test_top_k_and_a_bucket_bound_the_exact_kl_from_below():
    policy = torch.log_softmax(LOGITS, -1)
    values = [top(policy, policy.topk(k)[1]).item() for k in range(1, 6)]
    assert 0.0 < values[0] < values[1] < values[2] < values[3]
    # a bucket of one token hides nothing, and an empty one adds nothing
    assert values[3:] == pytest.approx([exact(LOGITS).item()] * 2, abs=1e-12)
    # nothing is lost where the tokens of the bucket differ from the reference by one factor
    shifted = torch.log_softmax(REFERENCE + torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64), -1)
    full = kl.exact_reverse(shifted[None], REFERENCE[None]).item()
    assert top(shifted, torch.tensor([0])).item() == pytest.approx(full, abs=1e-12)


def test_top_k_of_the_reference_itself_has_neither_value_nor_gradient():
    logits = REFERENCE.clone().requires_grad_()
    value = top(torch.log_softmax(logits, -1), torch.tensor([3, 1]))
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-15)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-15


def test_exact_reverse_and_its_zero():
    policy = torch.log_softmax(LOGITS, -1)[None]
    assert kl.exact_reverse(policy, REFERENCE[None]).item() == pytest.approx(exact(LOGITS).item(), abs=1e-12)
    assert kl.exact_reverse(policy, policy).item() == 0.0


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="kl_type"):
        kl.estimate("k4", LOGITS, REFERENCE)
