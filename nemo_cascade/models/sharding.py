"""How the parameters of our own layers are cut over ranks, in the words of megatron-core's distributed checkpoints.

A checkpoint holds whole tensors under names that no layout changes (global layer numbers, all experts stacked), so that
a model cut otherwise finds its part. Names are those of Megatron's own Mamba mixer and grouped experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection


def stacked_rows(
    key: str, parameter: torch.Tensor, parts: Mapping[str, int], groups: ProcessGroupCollection
) -> ShardedTensorFactory:
    """A parameter whose dimension 0 stacks several tensors, each cut over the tensor-parallel ranks by itself.

    `parts`: name -> rows on this rank, in order. in_proj of a rank is [z | x | B | C | dt] with its own slice of each,
    so rows of two ranks laid end to end would be no in_proj; stored are `key`.z, `key`.x, ... whole.
    """

    def cut(
        key: str, tensor: torch.Tensor, replica: ReplicaId, flattened_range: slice | None
    ) -> dict[str, ShardedTensor]:
        assert flattened_range is None, "flattened optimizer state is not stored"
        pieces = tensor.split(list(parts.values()))
        return {
            name: _cut(f"{key}.{name}", piece, groups.tp, replica)
            for name, piece in zip(parts, pieces, strict=True)
        }

    def join(pieces: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([pieces[name] for name in parts])

    return ShardedTensorFactory(key, parameter, cut, join, (0, 0, groups.dp_cp.rank()))


def stacked_experts(key: str, parameter: torch.Tensor, groups: ProcessGroupCollection) -> ShardedTensor:
    """This rank's experts [E, ...] of all: cut over the expert-parallel ranks, copied over the expert-data-parallel."""
    return _cut(key, parameter, groups.ep, (0, 0, groups.expt_dp.rank()))


def _cut(key: str, tensor: torch.Tensor, group: Any, replica: ReplicaId) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, tensor, (0, group.rank(), group.size()), replica_id=replica)
