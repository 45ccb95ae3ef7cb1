import random

import pytest
import torch

from nemo_cascade.data.packing import first_fit_decreasing, pack, to_batch
from nemo_cascade.types import Sequence


def test_first_fit_decreasing_by_hand():
    assert first_fit_decreasing([3, 8, 5, 2, 5], 10) == [[1, 3], [2, 4], [0]]


def test_a_sequence_longer_than_the_limit_is_alone():
    assert first_fit_decreasing([4, 25, 4], 10) == [[1], [0, 2]]


def test_every_sequence_once_and_no_bin_over_the_limit():
    lengths = random.Random(0).choices(range(1, 60), k=200)
    bins = first_fit_decreasing(lengths, 128)
    assert sorted(index for members in bins for index in members) == list(range(200))
    assert max(sum(lengths[index] for index in members) for members in bins) <= 128
    assert len(bins) <= -(-sum(lengths) // 128) + 1
    assert bins == first_fit_decreasing(lengths, 128)


def test_fields_move_to_the_position_that_predicts_them():
    batch = to_batch(
        [
            Sequence((5, 6, 7), (1, 0, 1), (9.0, 0.0, 2.0), (9.0, -1.0, -2.0), group=4),
            Sequence((8, 9), (0, 1), (0.0, 3.0), (0.0, -3.0), group=7),
        ]
    )
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.targets_T.tolist() == [6, 7, 0, 9, 0]
    assert batch.loss_mask_T.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]  # the mask of the very first token is lost
    assert batch.advantages_T.tolist() == [0.0, 2.0, 0.0, 3.0, 0.0]
    assert batch.sampler_logprobs_T.tolist() == [-1.0, -2.0, 0.0, -3.0, 0.0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.sequence_T.tolist() == [0, 0, 0, 1, 1]
    assert batch.group_S.tolist() == [4, 7]
    assert batch.teacher_logprobs_T is None


def test_unpack_returns_the_order_and_the_index_of_the_input():
    sequences = [Sequence(tuple(range(10 * n, 10 * n + n)), (1,) * n) for n in (2, 5, 1, 4)]
    packed = pack(sequences, 6)
    assert len(packed.batches) == 2
    values = packed.unpack([batch.targets_T.float() for batch in packed.batches])
    assert values == [[0.0, *map(float, sequence.token_ids[1:])] for sequence in sequences]


def test_partly_given_fields_and_wrong_lengths_are_errors():
    whole, bare = Sequence((1, 2), (0, 1), (0.0, 1.0)), Sequence((1, 2), (0, 1))
    with pytest.raises(ValueError, match="advantages: given for 1 of 2"):
        pack([whole, bare], 10)
    with pytest.raises(ValueError, match="3 values for 2 tokens"):
        pack([Sequence((1, 2), (0, 1), (0.0, 1.0, 2.0))], 10)
    with pytest.raises(ValueError, match="empty sequence"):
        pack([Sequence((), ())], 10)


def test_nothing_to_pack():
    assert pack([], 10).batches == ()
    assert pack([], 10).unpack([]) == []
