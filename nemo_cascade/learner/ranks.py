"""What the ranks tell each other in a step: counts, metrics and failures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_cascade.types import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Which rank this process is: `replica` of `replicas` data-parallel copies; `leads` on the replica's first rank."""

    rank: int
    replica: int
    replicas: int
    leads: bool


def where() -> Place:
    """This process among the ranks that Megatron has arranged."""
    state = parallel_state
    within = (
        state.get_tensor_model_parallel_rank(),
        state.get_context_parallel_rank(),
        state.get_pipeline_model_parallel_rank(),
    )
    return Place(dist.get_rank(), state.get_data_parallel_rank(), state.get_data_parallel_world_size(), not any(within))


def share_in_replica(found: T | None) -> T:
    """The leader's groups for every rank of its replica: along its tensor ranks, then context, then pipeline."""
    state = parallel_state
    for group in (
        state.get_tensor_model_parallel_group(),
        state.get_context_parallel_group(),
        state.get_pipeline_model_parallel_group(),
    ):
        found = next((value for value in gathered(found, group=group) if value is not None), None)
    assert found is not None, "the replica's leader has collected nothing"
    return found


def gathered(value: T, everyone: bool = False, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of each data-parallel rank (or of every rank, or of a group's members), in rank order."""
    if group is None:
        group = dist.group.WORLD if everyone else parallel_state.get_data_parallel_group()
    if dist.get_world_size(group) == 1:
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def added(local: Mapping[str, float]) -> dict[str, float]:
    """Sums over the data-parallel ranks; keys that begin with `local:` stay as they are."""
    totals = {key: value for key, value in local.items() if key.startswith("local:")}
    for other in gathered({key: value for key, value in local.items() if not key.startswith("local:")}):
        for key, value in other.items():
            totals[key] = totals.get(key, 0.0) + value
    return totals


def combined(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of micro-batches or ranks: the maximum where the name ends in `_max`, else the sum; a NaN stays one."""
    totals: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            if key.partition("/")[0].endswith("_max"):
                totals[key] = max(totals.get(key, value), value, key=lambda number: (math.isnan(number), number))
            else:
                totals[key] = totals.get(key, 0.0) + value
    return totals


def fail_together(problem: str, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank when one has a problem, so that none waits for a rank that is gone."""
    problems = [text for text in gathered(problem, everyone=True, group=group) if text]
    if problems:
        raise UserError(problems[0])
