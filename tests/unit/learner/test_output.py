"""The chunked output layer gives the naive one's log-probabilities, entropies and gradients, on one rank or two."""

from pathlib import Path

import pytest
import torch

from nemo_cascade.algorithms.kept import RAW, Distribution, keep_mask
from nemo_cascade.learner.output import output_logprobs
from tests import ranks
from tests.unit.learner import output_over_ranks

DISTRIBUTIONS = {
    "raw": RAW,
    "temperature": Distribution(temperature=0.7),
    "top_p": Distribution(top_p=0.8),
    "top_k": Distribution(top_k=5),
    "all": Distribution(temperature=1.3, top_p=0.9, top_k=11),
}
N, V, H = 23, 48, 10


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, distribution: Distribution):
    """Log-probabilities and entropies from torch's own log_softmax of all logits."""
    scores = hidden @ weight.t() / distribution.temperature
    if distribution.cuts:
        kept = keep_mask(scores.detach(), distribution.top_k, distribution.top_p)
        kept[torch.arange(len(targets)), targets] = True
        scores = scores.masked_fill(~kept, -1e30)
    logprobs = torch.log_softmax(scores, -1)
    return logprobs[torch.arange(len(targets)), targets], -(logprobs.exp() * logprobs).sum(-1).detach()


def both(dtype: torch.dtype, distribution: Distribution, chunk_logits: int):
    """(log-probabilities, entropies, gradients of hidden and weight), the naive way's and ours."""
    answers = []
    for way in (naive, lambda *args: output_logprobs(*args, chunk_logits=chunk_logits)):
        hidden, weight, targets, upstream = output_over_ranks.problem(N, V, H, dtype)
        logprobs, entropy = way(hidden, weight, targets, distribution)
        (logprobs * upstream).sum().backward()
        answers.append((logprobs.detach(), entropy, hidden.grad, weight.grad))
    return answers


@pytest.mark.parametrize("rows", [1, 7, 16, N, 10 * N])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_values_and_gradients_are_those_of_the_naive_way(name: str, rows: int):
    """7 and 16 do not divide 23; 10 N is the single pass."""
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        expected, found = both(dtype, DISTRIBUTIONS[name], rows * V)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=0.0, atol=close)
            assert one.abs().max() > 0.1


def test_equal_scores_are_cut_by_token_id_also_in_backward():
    """All columns alike: top-k keeps the first ids, and backward knows which, without sorting again."""
    hidden, weight, targets, upstream = output_over_ranks.problem(N, V, H, torch.float64)
    with torch.no_grad():
        weight.copy_(weight[:1].expand(V, H))
    targets = torch.where(torch.arange(N) % 2 == 0, 1, V - 1)  # inside the kept set, and outside: then it is added
    logprobs, entropy = output_logprobs(hidden, weight, targets, Distribution(top_k=4), chunk_logits=5 * V)
    number = torch.where(targets == 1, 4.0, 5.0).double()
    torch.testing.assert_close(logprobs.detach(), -number.log(), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(entropy, number.log(), rtol=0.0, atol=1e-12)
    (logprobs * upstream).sum().backward()
    assert weight.grad[4 : V - 1].abs().max() == 0.0
    first = ((upstream / -number)[:, None] * hidden.detach()).sum(0)  # token 0 is kept everywhere and never the target
    torch.testing.assert_close(weight.grad[0], first, rtol=0.0, atol=1e-12)


def test_bf16_sums_chunks_in_fp32():
    """4,096 equal tokens, one a chunk: added in bf16 the gradient would stop growing at 256 of them."""
    hidden = torch.ones(4096, 2, dtype=torch.bfloat16)
    weight = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = output_logprobs(hidden, weight, torch.zeros(4096, dtype=torch.long), chunk_logits=2)
    assert logprobs.dtype == torch.float32
    logprobs.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [[2048.0, 2048.0], [-2048.0, -2048.0]]


@pytest.mark.parametrize("distribution", [RAW, Distribution(top_p=0.9), Distribution(top_k=5)])
@pytest.mark.parametrize("chunk_logits", [2**26, 40])
def test_a_logit_that_is_no_number_is_seen_in_every_way(distribution: Distribution, chunk_logits: int):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=generator), torch.randn(20, 8, generator=generator)
    weight[7] = torch.nan
    logprobs, entropy = output_logprobs(hidden, weight, torch.arange(1, 5), distribution, None, chunk_logits)
    assert logprobs.isnan().all() and entropy.isnan().all()


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient(trained: str):
    hidden, weight, targets, _ = output_over_ranks.problem(N, V, H, torch.float32)
    frozen = weight if trained == "hidden" else hidden
    frozen.requires_grad_(False)
    output_logprobs(hidden, weight, targets, chunk_logits=5 * V)[0].sum().backward()
    assert frozen.grad is None
    assert {"hidden": hidden, "weight": weight}[trained].grad.abs().max() > 0.0


def test_a_vocabulary_cut_over_two_ranks_gives_the_numbers_of_one(tmp_path: Path):
    """Each rank has half of the columns: its weight gradient is its rows of the whole, hidden's are to be summed."""
    ranks.run(output_over_ranks.__file__, str(tmp_path), "float64")
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for index, distribution in enumerate(output_over_ranks.DISTRIBUTIONS):
        hidden, weight, targets, upstream = output_over_ranks.problem(N, V, H, torch.float64)
        logprobs, entropy = naive(hidden, weight, targets, distribution)
        (logprobs * upstream).sum().backward()
        first, second = (answers[index] for answers in halves)
        found = [first[0], first[1], first[2] + second[2], torch.cat([first[3], second[3]])]
        expected = [logprobs.detach(), entropy, hidden.grad, weight.grad]
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=0.0, atol=1e-10)
        assert torch.equal(first[0], second[0])


def test_a_logit_of_minus_infinity_counts_as_nothing_in_chunks_too() -> None:
    hidden, weight = torch.ones(4, 1), torch.tensor([[0.0], [1.0], [-torch.inf]])
    targets = torch.tensor([0, 1, 0, 1])
    whole, chunked = (output_logprobs(hidden, weight, targets, chunk_logits=size) for size in (100, 6))
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(chunked[1]).all()
