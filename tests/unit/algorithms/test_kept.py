import math

import pytest
import torch

from nemo_cascade.algorithms.kept import Distribution, keep_mask, kept_logprobs, logprobs_and_entropy
from nemo_cascade.types import UserError

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
LOGITS = PROBABILITIES.log()


def test_raw_is_log_softmax():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(7)
    expected = torch.log_softmax(logits, -1)[torch.arange(7), targets]
    assert torch.equal(kept_logprobs(logits, targets), expected)


def test_temperature_by_hand():
    # temperature 0.5 squares the probabilities: 0.25 / (0.25 + 0.0625 + 0.0225 + 0.01)
    value = kept_logprobs(LOGITS, torch.tensor([0]), temperature=0.5)
    assert value.item() == pytest.approx(math.log(0.25 / 0.345), abs=1e-6)


def test_top_k_then_top_p_by_hand():
    assert kept_logprobs(LOGITS, torch.tensor([1]), top_k=2).item() == pytest.approx(math.log(0.25 / 0.75), abs=1e-6)
    assert keep_mask(LOGITS, 0, 0.75).tolist() == [[True, True, False, False]]
    assert keep_mask(LOGITS, 0, 0.76).tolist() == [[True, True, True, False]]
    # over the top 2, renormalised to 2/3 and 1/3, the first alone reaches 0.6
    assert keep_mask(LOGITS, 2, 0.6).tolist() == [[True, False, False, False]]


def test_top_p_below_the_largest_probability_keeps_one_token():
    assert keep_mask(LOGITS, 0, 0.01).sum().item() == 1


def test_ties_go_to_the_lower_token_id():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    assert keep_mask(logits, 2, 1.0).tolist() == [[False, True, True, False]]


def test_the_target_is_always_kept():
    value = kept_logprobs(LOGITS, torch.tensor([3]), top_k=1)
    assert value.item() == pytest.approx(math.log(0.1 / 0.6), abs=1e-6)


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.8, "temperature": 0.7}])
def test_gradient_is_that_of_the_formula(cut: dict[str, float]):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    targets = torch.randint(9, (5,), generator=generator)
    weights = torch.randn(5, generator=generator, dtype=torch.float64)
    mine, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (kept_logprobs(mine, targets, **cut) * weights).sum().backward()
    scaled = plain / cut.get("temperature", 1.0)
    keep = keep_mask(scaled.detach(), int(cut.get("top_k", 0)), cut.get("top_p", 1.0)).scatter(
        1, targets[:, None], True
    )
    log_softmax = torch.log_softmax(scaled.masked_fill(~keep, -torch.inf), -1)
    (log_softmax.gather(1, targets[:, None])[:, 0] * weights).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-12, atol=1e-14)


def test_entropy_by_hand_also_on_a_cut_set():
    _, entropy = logprobs_and_entropy(torch.zeros(1, 8), torch.tensor([0]))
    assert entropy.item() == pytest.approx(math.log(8), abs=1e-6)
    _, entropy = logprobs_and_entropy(torch.zeros(1, 8), torch.tensor([0]), Distribution(top_k=4))
    assert entropy.item() == pytest.approx(math.log(4), abs=1e-6)


def test_kept_probabilities_sum_to_one():
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(3))
    keep = keep_mask(logits, 0, 0.9)[0]
    total = sum(kept_logprobs(logits, torch.tensor([token]), top_p=0.9).exp().item() for token in keep.nonzero()[:, 0])
    assert total == pytest.approx(1.0, abs=1e-6)


def test_greedy_has_no_density():
    with pytest.raises(UserError, match="sampling.temperature"):
        Distribution(temperature=0.0)
