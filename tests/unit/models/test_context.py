"""How a packed row is cut over context-parallel ranks, and what each of them scans."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from nemo_cascade.models import nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.context import RowCut, Span, spans_of
from nemo_cascade.models.mamba import share_columns
from nemo_cascade.models.packed import packed_row
from nemo_cascade.models.parallel import ParallelLayout


class Group:
    """Size and rank are all that a cut asks of its process group."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = lambda: size, lambda: rank


def test_every_token_has_one_rank_and_every_rank_early_and_late_ones() -> None:
    bounds = torch.tensor([0, 5, 6, 24])
    cuts = [RowCut.of(bounds, Group(3, rank)) for rank in range(3)]  # type: ignore[arg-type]
    assert cuts[0].own_t.tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert cuts[1].own_t.tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert cuts[2].own_t.tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    joined = torch.cat([cut.own(torch.arange(24)) for cut in cuts])
    assert joined[cuts[1].order_T].tolist() == list(range(24))
    work = [sum((span.end - span.begin) * (span.last - span.first) for span in cut.spans) for cut in cuts]
    assert max(work) <= 1.5 * min(work)


def test_a_piece_attends_from_the_start_of_each_of_its_sequences() -> None:
    assert spans_of([0, 5, 6, 24], [4, 16], 4) == (
        Span(0, 1, 0, 5),  # the last token of the first sequence sees all five
        Span(1, 2, 5, 6),
        Span(2, 4, 6, 8),
        Span(4, 8, 6, 20),
    )


def test_spans_compute_causal_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    bounds = torch.tensor([0, 5, 6, 24])
    q, k, v = (torch.randn(24, 2, 4, generator=generator, dtype=torch.float64).transpose(0, 1) for _ in range(3))
    sequence = torch.repeat_interleave(torch.arange(3), torch.diff(bounds))
    mask = (sequence[:, None] == sequence) & torch.ones(24, 24, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for rank in range(3):
        cut = RowCut.of(bounds, Group(3, rank))  # type: ignore[arg-type]
        own = q[:, cut.own_t]
        parts = [
            F.scaled_dot_product_attention(
                own[None, :, span.begin : span.end], k[None, :, span.first : span.last],
                v[None, :, span.first : span.last],
                attn_mask=causal_lower_right(span.end - span.begin, span.last - span.first),
            )[0]
            for span in cut.spans
        ]  # fmt: skip
        torch.testing.assert_close(torch.cat(parts, dim=1), expected[:, cut.own_t], atol=1e-12, rtol=0)


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="30 tokens cannot be cut into 4 equal pieces"):
        RowCut.of(torch.tensor([0, 30]), Group(2, 0))  # type: ignore[arg-type]


def test_one_rank_gives_the_row_back_with_its_gradient(layout: ParallelLayout) -> None:
    cut = RowCut.of(torch.tensor([0, 6]), dist.group.WORLD)
    row = torch.randn(6, 4, requires_grad=True)
    assert torch.equal(cut.to_tokens(cut.to_heads(row)), row)
    assert torch.equal(cut.whole(cut.own(row)), row)
    (cut.whole(cut.own(row), same_use=True) * torch.arange(6.0)[:, None]).sum().backward()
    assert row.grad.tolist() == [[float(index)] * 4 for index in range(6)]


def test_ranks_scan_their_heads_and_the_groups_these_read() -> None:
    # [x: 4 heads of 2 | B: 2 groups of 3 | C | dt: 4 heads]
    two = share_columns(heads=4, head_dim=2, groups=2, state=3, ranks=2).tolist()
    assert two == [[0, 1, 2, 3, 8, 9, 10, 14, 15, 16, 20, 21], [4, 5, 6, 7, 11, 12, 13, 17, 18, 19, 22, 23]]
    four = share_columns(heads=4, head_dim=2, groups=2, state=3, ranks=4).tolist()
    assert four[1] == [2, 3, 8, 9, 10, 14, 15, 16, 21]  # the second rank reads the group of the first
    assert four[2] == [4, 5, 11, 12, 13, 17, 18, 19, 22]


def test_a_cut_row_gives_the_logits_and_gradients_of_the_whole_one(layout: ParallelLayout) -> None:
    # One rank that holds both pieces: every exchange and every attention span of the cut runs, between it and itself.
    config = NemotronHConfig.preset("nano")
    torch.manual_seed(5)
    model = nemotron_h.build(config, layout)
    tokens, bounds = torch.randint(0, config.vocab_size, (90,)), torch.tensor([0, 7, 8, 61, 90]).int()
    cut = RowCut.of(bounds, dist.group.WORLD)
    packed = packed_row(bounds, config.chunk_size, cut)
    found = []
    for row in (model.row(tokens, bounds), nemotron_h.Row(cut.own(tokens), packed, 90, 90)):
        model.zero_grad()
        logits = row.whole(model.run(row))
        (logits * torch.linspace(-1, 1, 90)[:, None]).square().sum().backward()
        found.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, atol=1e-5 * float(one.abs().max()), rtol=0)
