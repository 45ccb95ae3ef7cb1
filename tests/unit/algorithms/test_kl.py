import pytest
import torch

from nemo_cascade.algorithms import kl
from nemo_cascade.types import UserError

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


def test_exact_reverse_and_its_zero():
    policy = torch.log_softmax(LOGITS, -1)[None]
    assert kl.exact_reverse(policy, REFERENCE[None]).item() == pytest.approx(exact(LOGITS).item(), abs=1e-12)
    assert kl.exact_reverse(policy, policy).item() == 0.0


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="kl_type"):
        kl.estimate("k4", LOGITS, REFERENCE)
