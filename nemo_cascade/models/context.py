"""Context parallelism: one packed row cut over ranks, so that a sequence may be longer than what one rank holds.

The row, padded to a multiple of 2 x ranks, is cut into 2 x ranks equal pieces, and rank r holds piece r and piece
2 x ranks - 1 - r: with causal attention a late token costs more than an early one, so each rank gets both kinds. The
cut ignores sequence boundaries. Norms, projections and experts run on the rank's own tokens. Attention gathers keys and
values (few, the queries are grouped) and keeps its own queries; the convolution and the scan exchange tokens for heads
(all to all), run on the whole row for a share of the heads, and exchange back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp, all_to_all_sp2hp


@dataclass(frozen=True)
class Span:
    """The queries of one sequence in one piece, and the keys before and at them: positions own[begin:end] attend to
    row[first:last], the last query to all of them.
    """

    begin: int
    end: int
    first: int
    last: int


@dataclass(frozen=True)
class RowCut:
    """Which tokens of a packed row this rank holds.

    `own_t` [T / ranks] is the row position of each token held here; `by_rank_T` the row positions that the ranks hold,
    rank after rank, and `order_T` its inverse: where each row position lies among them.
    """

    group: dist.ProcessGroup
    spans: tuple[Span, ...]
    own_t: torch.Tensor
    by_rank_T: torch.Tensor
    order_T: torch.Tensor

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, group: dist.ProcessGroup, device: torch.device | None = None) -> RowCut:
        """The cut of the row with these boundaries; its length must be a multiple of 2 x ranks.

        `device`: where its tokens are, None where the boundaries are.
        """
        device = device or cu_seqlens.device
        bounds = [int(value) for value in cu_seqlens.tolist()]
        ranks, rank, length = group.size(), group.rank(), bounds[-1]
        if length % (2 * ranks):
            raise ValueError(f"a row of {length} tokens cannot be cut into {2 * ranks} equal pieces")
        size = length // (2 * ranks)
        held = [(other, 2 * ranks - 1 - other) for other in range(ranks)]
        steps = torch.arange(size, device=device)
        by_rank_T = torch.cat([piece * size + steps for pair in held for piece in pair])
        order_T = torch.empty_like(by_rank_T)
        order_T[by_rank_T] = torch.arange(length, device=device)
        own_t = by_rank_T[rank * 2 * size : (rank + 1) * 2 * size]
        return cls(group, spans_of(bounds, [piece * size for piece in held[rank]], size), own_t, by_rank_T, order_T)

    def own(self, row_T: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of a row that every rank has."""
        return row_T.index_select(0, self.own_t)

    def whole(self, own_t: torch.Tensor, same_use: bool = False) -> torch.Tensor:
        """The row [T, ...] from every rank's tokens [T / ranks, ...]; differentiable.

        By default each rank uses the row for something else, and gradients are summed over the ranks. With `same_use`
        all ranks compute the same loss from it, and each takes its own tokens' gradient once.
        """
        joined = gather_from_sequence_parallel_region(
            own_t.contiguous(), tensor_parallel_output_grad=not same_use, group=self.group
        )
        return joined.index_select(0, self.order_T)

    def to_heads(self, own_tC: torch.Tensor) -> torch.Tensor:
        """[T / ranks, C] -> [T, C / ranks]: the whole row for this rank's share of the channels."""
        return all_to_all_sp2hp(own_tC, self.group).index_select(0, self.order_T)

    def to_tokens(self, row_TC: torch.Tensor) -> torch.Tensor:
        """Undo `to_heads`: [T, C / ranks] -> [T / ranks, C]."""
        return all_to_all_hp2sp(row_TC.index_select(0, self.by_rank_T), self.group)


def spans_of(bounds: Sequence[int], starts: Sequence[int], size: int) -> tuple[Span, ...]:
    """The spans of the pieces of `size` tokens that begin at the row positions `starts`, held one after the other."""
    spans = []
    for held, start in enumerate(starts):
        for first, end in itertools.pairwise(bounds):
            begin, last = max(first, start), min(end, start + size)
            if begin < last:
                offset = held * size - start
                spans.append(Span(begin + offset, last + offset, first, last))
    return tuple(spans)
