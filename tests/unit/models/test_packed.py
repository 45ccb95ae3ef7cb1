from __future__ import annotations

import pytest
import torch

from nemo_cascade.models.packed import BLOCK_COST, PackedLayout, pack, packed_row, padded_length, plan_blocks, unpack


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plan(lengths: list[int], chunk: int) -> PackedLayout:
    return packed_row(bounds(lengths), chunk).layout


def test_blocks_hold_every_token_once_and_their_gradients() -> None:
    lengths = [5, 1, 70, 33, 32, 8]
    layout = plan(lengths, 32)
    row = torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    blocks = unpack(row, layout)
    assert [block.shape[:2] for block in blocks] == [(2, 72), (3, 32), (1, 4)]
    assert torch.equal(pack(blocks, layout), row)
    weight = torch.randn_like(row)
    (pack([block * 2.0 for block in blocks], layout) * weight).sum().backward()
    assert torch.equal(row.grad, 2.0 * weight)


def test_a_block_is_right_padded_in_row_order() -> None:
    row = torch.arange(1.0, 13.0)[:, None]
    (block,) = unpack(row, plan([4, 3, 5], 8))
    assert block[..., 0].tolist() == [[1, 2, 3, 4, 4], [5, 6, 7, 7, 7], [8, 9, 10, 11, 12]]


def test_padding_stays_bounded_for_any_mixture_of_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [int(2 ** (10 * float(draw))) for draw in torch.rand(300, generator=generator)]
    blocks = plan_blocks(lengths, 32)
    padded = sum(length * len(members) for length, members in blocks)
    assert sorted(index for _, members in blocks for index in members) == list(range(300))
    rounded = sum(padded_length(length, 32) for length in lengths)
    assert padded <= rounded + BLOCK_COST * len(blocks)
    assert padded < 1.15 * sum(lengths)
    assert len(blocks) < 40


def test_padded_lengths_split_into_equal_chunks() -> None:
    for length in range(1, 300):
        padded = padded_length(length, 32)
        assert 0 <= padded - length < 4 * -(-length // 32)
        assert padded % -(-padded // 32) == 0


def test_a_few_sequences_share_a_block_where_padding_is_cheaper() -> None:
    assert plan_blocks([60, 20, 16, 50], 32) == [(64, [0, 1, 3]), (16, [2])]


def test_equal_full_lengths_move_nothing() -> None:
    layout = plan([32, 32, 32], 32)
    assert layout.identity
    row = torch.randn(96, 4)
    assert unpack(row, layout)[0].data_ptr() == row.data_ptr()


@pytest.mark.parametrize("values", [[1, 5], [0, 4, 4], [0]])
def test_broken_boundaries_are_refused(values: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        packed_row(torch.tensor(values).int(), 32)


def test_the_row_says_how_long_its_sequences_are_and_which_one_a_token_is_of() -> None:
    row = packed_row(bounds([2, 1, 3]), 32)
    assert row.lengths == (2, 1, 3) and row.max_seqlen_q == 3
    assert row.sequence_1T.dtype == torch.int32 and row.sequence_1T.tolist() == [[0, 0, 1, 2, 2, 2]]
