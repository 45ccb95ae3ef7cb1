"""Context-parallel attention on CUDA kernels: causal from an offset, grouped queries, and no mask in memory.

python -m pytest tests/gpu -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_cascade.learner import parallel
from nemo_cascade.models.attention import CoreAttention
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.context import RowCut
from nemo_cascade.models.nemotron_h import transformer_config
from nemo_cascade.models.packed import packed_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda is not available"),
]


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.ParallelLayout]:
    started = parallel.is_started()
    yield parallel.start()
    if not started:
        parallel.stop()


def heads(tokens: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value of the 30B model's attention: 32 heads, 2 KV groups, width 128."""
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = ((tokens, 32, 128), (tokens, 2, 128), (tokens, 2, 128))
    return tuple(torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16) for size in sizes)


def attend(layout: parallel.ParallelLayout, lengths: list[int], cut: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in row order and the gradient of the keys, of the whole row or of its two pieces."""
    config = NemotronHConfig.preset("nemotron_3_nano_30b_a3b")
    core = CoreAttention(transformer_config(config, layout, "bf16"))
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    row_cut = RowCut.of(bounds, torch.distributed.group.WORLD) if cut else None
    q, k, v = heads(sum(lengths))
    k.requires_grad_()
    out = core(q, k, v, packed_seq_params=packed_row(bounds, config.chunk_size, row_cut))
    some = out[::16].float()
    (some * torch.linspace(-1, 1, some.shape[0], device="cuda")[:, None]).sum().backward()
    return out.detach(), k.grad


def test_two_pieces_attend_like_the_whole_row(layout: parallel.ParallelLayout) -> None:
    lengths = [700, 12, 2000, 1384]
    for one, two in zip(attend(layout, lengths, False), attend(layout, lengths, True), strict=True):
        torch.testing.assert_close(two.float(), one.float(), atol=2e-2, rtol=2e-2)


def test_a_long_sequence_needs_no_mask_in_memory(layout: parallel.ParallelLayout) -> None:
    torch.cuda.reset_peak_memory_stats()
    attend(layout, [131072], True)
    # Queries, outputs and their gradients take 1 GiB each, what the kernel's backward pass adds 5 more: 9.1 measured. A
    # mask of the second piece alone, 65,536 x 131,072 booleans, would take 8 on top.
    assert torch.cuda.max_memory_allocated() < 12 * 2**30
