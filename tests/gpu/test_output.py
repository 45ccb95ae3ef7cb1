"""The output layer's kernels on a card against the same in PyTorch, and the memory that they take.

python -m pytest tests/gpu/test_output.py -m gpu
"""

from __future__ import annotations

import pytest
import torch

from nemo_cascade.algorithms.kept import RAW, Distribution
from nemo_cascade.learner import output

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda is not available"),
]
VOCABULARY = 131072


def numbers(count: int, dtype: torch.dtype, distribution: Distribution) -> list[torch.Tensor]:
    """Log-probabilities, entropies, and gradients of hidden states and weight, of logits with a spread of 2."""
    draw = torch.Generator("cuda").manual_seed(3)
    hidden, weight, upstream = (
        torch.randn(shape, generator=draw, device="cuda") for shape in ((count, 256), (VOCABULARY, 256), (count,))
    )
    hidden, weight = ((value / scale).to(dtype).requires_grad_() for value, scale in ((hidden, 8.0), (weight, 1.0)))
    targets = torch.randint(0, VOCABULARY, (count,), generator=draw, device="cuda")
    logprobs, entropy = output.output_logprobs(hidden, weight, targets, distribution)
    (logprobs * upstream).sum().backward()
    return [logprobs.detach(), entropy, hidden.grad, weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", [RAW, Distribution(temperature=0.7)], ids=["raw", "temperature"])
def test_the_kernels_are_the_passes_in_pytorch(
    dtype: torch.dtype, distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,500 tokens: a whole chunk of the kernels and a part of one. Both ways have the same logits."""
    found = numbers(2500, dtype, distribution)
    monkeypatch.setattr(output._Vocabulary, "kernels", False)
    expected = numbers(2500, dtype, distribution)
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.dtype == other.dtype == dtype
        # sums of rounded products, over chunks of other sizes
        limit = {torch.float32: 1e-4, torch.bfloat16: 5e-3}[dtype]
        assert (one.float() - other.float()).norm() < limit * other.float().norm()


def test_a_row_of_8192_tokens_takes_no_more_than_a_chunk_and_the_gradients() -> None:
    """Its logits are 2.1 GB in bf16; the fp32 sum of the weight's gradient is 134 MB."""
    numbers(16, torch.bfloat16, RAW)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    numbers(8192, torch.bfloat16, RAW)
    chunk = 2 * output.KERNEL_CHUNK_LOGITS
    assert torch.cuda.max_memory_allocated() - before < chunk + 600e6
