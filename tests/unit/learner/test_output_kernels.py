"""The output layer's kernels in Triton's interpreter, against torch's log_softmax.

Triton comes with torch's CUDA builds only: `pip install triton==3.6.0` (190 MB) runs these tests without a card. On a
card the kernels are compiled, and tests/gpu/test_output.py tests them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nemo_cascade.algorithms.kept import RAW, Distribution
from nemo_cascade.learner import output
from tests import ranks
from tests.unit.learner import output_over_ranks
from tests.unit.learner.test_output import H, N, V, both, naive

if torch.cuda.is_available():
    pytest.skip("on a card the kernels are compiled: tests/gpu/test_output.py", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined, at the import below
pytest.importorskip("triton", reason="triton is not installed")
output_kernels = pytest.importorskip("nemo_cascade.learner.output_kernels")


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run wherever no token is cut, also without a card."""
    monkeypatch.setattr(output._Vocabulary, "kernels", property(lambda self: not self.distribution.cuts))


@pytest.mark.parametrize("rows", [1, 7, 10 * N])
@pytest.mark.parametrize("distribution", [RAW, Distribution(temperature=0.7)], ids=["raw", "temperature"])
def test_values_and_gradients_are_those_of_the_naive_way(distribution: Distribution, rows: int) -> None:
    """At last with an upstream gradient that is one number for all tokens, and has no stride."""
    expected, found = both(torch.float32, distribution, rows * V)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0.0, atol=1e-5)
        assert one.abs().max() > 0.1
    grads = []
    for way in (naive, output.output_logprobs):
        hidden, weight, targets, _ = output_over_ranks.problem(N, V, H, torch.float32)
        way(hidden, weight, targets, distribution)[0].sum().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_blocks_are_summed_whole(dtype: torch.dtype) -> None:
    """Two blocks and a rest; the highest score is in another block in each row, and one column is minus infinity."""
    width = 2 * output_kernels.BLOCK + 100
    draw = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(4, width, generator=draw)
    logits[0, 5], logits[1, 5000], logits[2, -1], logits[:, 77] = 30.0, 30.0, 30.0, -torch.inf
    logits, columns = logits.to(dtype), torch.tensor([5, 4999, width - 1, output_kernels.ELSEWHERE])
    scores = logits.double() / 0.7
    logprobs = torch.log_softmax(scores, -1)
    top, total, inner, chosen = output_kernels.reduced(logits, columns, 0.7).double()
    torch.testing.assert_close(top + total.log(), scores.logsumexp(-1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        total.log() - inner / total, torch.special.entr(logprobs.exp()).sum(-1), rtol=1e-4, atol=1e-5
    )
    rows = torch.arange(3)
    torch.testing.assert_close(chosen, torch.cat([scores[rows, columns[:3]], scores.new_zeros(1)]), rtol=1e-6, atol=0.0)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = -logprobs.exp()
    expected[rows, columns[:3]] += 1.0
    expected *= upstream.double()[:, None] / 0.7
    found = output_kernels.differentiate_(logits, columns, (top + total.log()).float(), upstream, 0.7)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}[dtype]  # the interpreter cuts off, a card rounds
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=2e-6)


def test_a_logit_that_is_no_number_is_seen() -> None:
    hidden, weight, targets, _ = output_over_ranks.problem(N, V, H, torch.float32)
    with torch.no_grad():
        weight[7] = torch.nan
    logprobs, entropy = output.output_logprobs(hidden, weight, targets)
    assert logprobs.isnan().all() and entropy.isnan().all()


def test_a_vocabulary_cut_over_two_ranks_gives_the_numbers_of_one(tmp_path: Path) -> None:
    ranks.run(output_over_ranks.__file__, str(tmp_path), "float32")
    first, second = (torch.load(tmp_path / f"{rank}.pt")[0] for rank in range(2))
    hidden, weight, targets, upstream = output_over_ranks.problem(N, V, H, torch.float64)
    logprobs, entropy = naive(hidden, weight, targets, RAW)
    (logprobs * upstream).sum().backward()
    found = [first[0], first[1], first[2] + second[2], torch.cat([first[3], second[3]])]
    for one, other in zip([logprobs.detach(), entropy, hidden.grad, weight.grad], found, strict=True):
        torch.testing.assert_close(other.double(), one, rtol=0.0, atol=1e-5)
    assert torch.equal(first[0], second[0])
