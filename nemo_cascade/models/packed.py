"""Packed rows: many sequences in one row of tokens, with every recurrent state reset at the boundaries.

Norms, projections and experts run on the packed row as it is: they treat tokens alone. Attention, convolution and scan
need whole sequences, so for them the row is unpacked into right-padded [sequences, length] blocks and packed again. All
three are causal, so padding on the right can never reach a real token, neither forward nor backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_cascade.models.context import RowCut

if TYPE_CHECKING:
    from nemo_cascade.models.routing import Routing

BLOCK_COST = 64  # padded positions that cost as much time as one more block (some 60 small operations per layer)


@dataclass(frozen=True)
class Block:
    """One right-padded block of the flat buffer: rows start..start + sequences * length."""

    start: int
    sequences: int
    length: int


@dataclass(frozen=True)
class PackedLayout:
    """Where every token of a packed row lies in the padded blocks. Computed once per batch, used by every layer.

    `to_flat` [F] is the row index that each padded position reads (padding reads its sequence's last token);
    `to_row` [T] is the padded position of each token.
    """

    blocks: tuple[Block, ...]
    to_flat: torch.Tensor
    to_row: torch.Tensor
    identity: bool  # one block without padding in row order: nothing to move


def padded_length(length: int, chunk: int) -> int:
    """The next length that splits into equal chunks of at most `chunk`, each a multiple of an eighth of it."""
    step = -(-length // chunk) * max(1, chunk // 8)
    return -(-length // step) * step


def plan_blocks(lengths: Sequence[int], chunk: int) -> list[tuple[int, list[int]]]:
    """Group sequences of similar length: a list of (padded length, sequence indices).

    Longest first; a sequence joins the block above it until the positions so wasted cost more than another block.
    Padded positions so stay below the rounded lengths plus BLOCK_COST per block: linear in the tokens whatever the
    mixture.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    blocks: list[tuple[int, list[int]]] = []
    wasted = 0
    for index in order:
        own = padded_length(lengths[index], chunk)
        if blocks and wasted + blocks[-1][0] - own <= BLOCK_COST:
            wasted += blocks[-1][0] - own
            blocks[-1][1].append(index)
        else:
            blocks.append((own, [index]))
            wasted = 0
    return [(length, sorted(members)) for length, members in blocks]


def lengths_of(cu_seqlens: torch.Tensor) -> tuple[int, ...]:
    """The lengths of a row's sequences; waits for a card if they are there. ValueError where they are none."""
    bounds = [int(value) for value in cu_seqlens.tolist()]
    lengths = tuple(end - begin for begin, end in itertools.pairwise(bounds))
    if not lengths or bounds[0] != 0 or min(lengths) < 1:
        raise ValueError(f"cu_seqlens must start at 0 and rise at every sequence, got {bounds[:8]}")
    return lengths


def plan(lengths: Sequence[int], chunk: int, device: torch.device) -> PackedLayout:
    """The layout of the row whose sequences have these lengths, for tokens on `device`. `chunk`: the scan's.

    It is computed on the host: a card would make the host wait for the size of every block.
    """
    sizes, count = torch.tensor(lengths), sum(lengths)
    starts = sizes.cumsum(0) - sizes
    to_row = torch.empty(count, dtype=torch.long)
    pieces: list[torch.Tensor] = []
    blocks: list[Block] = []
    flat = 0
    for length, members in plan_blocks(lengths, chunk):
        chosen = torch.tensor(members)
        steps = torch.arange(length)
        source = starts[chosen, None] + torch.minimum(steps[None, :], sizes[chosen, None] - 1)
        real = (steps[None, :] < sizes[chosen, None]).flatten()
        positions = torch.arange(flat, flat + real.numel())
        to_row[source.flatten()[real]] = positions[real]
        pieces.append(source.flatten())
        blocks.append(Block(flat, len(members), length))
        flat += real.numel()
    return PackedLayout(
        blocks=tuple(blocks),
        to_flat=_sent(torch.cat(pieces), device),
        to_row=_sent(to_row, device),
        identity=len(blocks) == 1 and flat == count,
    )


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on the device; from the host to a card without waiting for the copy."""
    if device.type == "cpu" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's packed-sequence record with our layout: it travels through MambaStack to every layer unchanged.

    `lengths` are those of the row's sequences; with context parallelism `cut` says which of its tokens this rank holds.
    """

    lengths: tuple[int, ...] = field(default=())
    chunk: int = field(default=1)
    cut: RowCut | None = field(default=None)
    routing: Routing | None = field(default=None)  # what the routers of this call replay or record

    @cached_property
    def layout(self) -> PackedLayout:
        """The layout of the whole row, made for the first layer that asks."""
        return plan(self.lengths, self.chunk, self.cu_seqlens_q.device)

    @cached_property
    def sequence_1T(self) -> torch.Tensor:
        """The number of each token's sequence, int32 [1, T]: what kernels call `seq_idx`."""
        sizes = torch.diff(self.cu_seqlens_q)
        numbers = torch.arange(len(self.lengths), dtype=torch.int32, device=sizes.device)
        return torch.repeat_interleave(numbers, sizes, output_size=sum(self.lengths))[None]


def packed_row(
    cu_seqlens: torch.Tensor, chunk: int, cut: RowCut | None = None, device: torch.device | None = None
) -> PackedRow:
    """The record to hand to MambaModel.forward as `packed_seq_params`.

    `device`: where the tokens are, None where the boundaries are.
    """
    lengths = lengths_of(cu_seqlens)
    longest, there = max(lengths), cu_seqlens if device is None else _sent(cu_seqlens, device)
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=there,
        cu_seqlens_kv=there,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
        chunk=chunk,
        cut=cut,
    )


class _Unpack(torch.autograd.Function):
    """Row [T, C] -> flat padded [F, C]. Backward reads only real positions: gradients at padding are exactly zero."""

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout = layout
        return row.index_select(0, layout.to_flat)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.index_select(0, ctx.layout.to_row), None


class _Pack(torch.autograd.Function):
    """Flat padded [F, C] -> row [T, C]; padding gets a zero gradient."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout, ctx.positions = layout, flat.shape[0]
        return flat.index_select(0, layout.to_row)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        flat = grad.new_zeros(ctx.positions, grad.shape[1])
        return flat.index_copy_(0, ctx.layout.to_row, grad), None


def unpack(row_TC: torch.Tensor, layout: PackedLayout) -> list[torch.Tensor]:
    """The packed row as right-padded blocks [sequences, length, C]."""
    flat = row_TC if layout.identity else _Unpack.apply(row_TC, layout)
    sizes = [block.sequences * block.length for block in layout.blocks]
    pieces = flat.split(sizes) if len(sizes) > 1 else (flat,)
    return [piece.view(block.sequences, block.length, -1) for piece, block in zip(pieces, layout.blocks, strict=True)]


def pack(blocks: Sequence[torch.Tensor], layout: PackedLayout) -> torch.Tensor:
    """Undo `unpack`: blocks [sequences, length, C] -> row [T, C], padding dropped."""
    flat = torch.cat([block.flatten(0, 1) for block in blocks]) if len(blocks) > 1 else blocks[0].flatten(0, 1)
    return flat if layout.identity else _Pack.apply(flat, layout)
