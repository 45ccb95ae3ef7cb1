"""Micro-batches through the policy, on one pipeline stage or over all of them by Megatron's 1F1B schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_cascade.learner.forward import row_of
from nemo_cascade.learner.stopwatch import Stopwatch
from nemo_cascade.models.cpu import cuda_as_cpu
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.routing import NO_REPLAY
from nemo_cascade.types import Batch, UserError

T = TypeVar("T")
U = TypeVar("U")


def train(
    model: NemotronH,
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], tuple[torch.Tensor, T]],
    read: Callable[[T], U],
    watch: Stopwatch,
) -> list[U]:
    """Forward and backward of every micro-batch; gradients stay in Megatron's buffers.

    `loss_of` gives a batch's loss and what to keep of it; it runs on the last stage only, and every stage gets what
    `read` says of that. It is read after the last micro-batch, so that no card runs empty meanwhile.
    """
    if model.pg_collection.pp.size() > 1:
        if any(batch.routed_experts_TC is not None for batch in batches):
            raise UserError(NO_REPLAY)
        with watch.measure("pipeline"):
            kept = _scheduled(model, batches, loss_of, backward=True)
            return from_last_stage([read(keep) for keep in kept])
    kept = []
    for batch in batches:
        with watch.measure("forward"):
            loss, keep = loss_of(batch)
        with watch.measure("backward"):
            loss.backward()
        kept.append(keep)
    return [read(keep) for keep in kept]


@torch.no_grad()
def evaluate(model: NemotronH, batches: Sequence[Batch], value_of: Callable[[Batch], T]) -> list[T]:
    """`value_of` each micro-batch, without gradients. With pipeline stages the list is empty on all but the last."""
    if model.pg_collection.pp.size() == 1:
        return [value_of(batch) for batch in batches]
    return _scheduled(model, batches, lambda batch: (torch.zeros(()), value_of(batch)), backward=False)


def _scheduled(
    model: NemotronH, batches: Sequence[Batch], loss_of: Callable[[Batch], tuple[torch.Tensor, T]], backward: bool
) -> list[T]:
    """What the last stage keeps of every micro-batch, an empty list on the others.

    All ranks of a replica hold all its micro-batches, so only hidden states and their gradients travel. The loss is
    divided by its denominators already: the third value that Megatron's schedule would divide by is not used.
    """

    def step(remaining: Iterator[Batch], _: Any) -> tuple[torch.Tensor, Callable[..., Any] | None]:
        batch = next(remaining)
        if not model.post_process:
            return model.run(row_of(model, batch)), None
        loss, keep = loss_of(batch)
        return loss, lambda output: (output, torch.zeros((), dtype=torch.int, device=output.device), keep)

    if not batches:
        return []
    with cuda_as_cpu():
        kept: list[T] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=1,  # the stages tell each other the length of each row
            micro_batch_size=1,
            forward_only=not backward,
        )
    return kept


def from_last_stage(value: T) -> T:
    """The last pipeline stage's value, on all stages of the replica."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, dist.get_global_rank(group, group.size() - 1), group=group)
    return box[0]
