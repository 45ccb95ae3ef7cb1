"""One micro-batch through the policy: only the positions that the loss reads pass the output layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from nemo_cascade.algorithms.kept import Distribution, logprobs_and_entropy
from nemo_cascade.models.nemotron_h import NemotronH, Row
from nemo_cascade.types import Batch, Sequence

# What a rank runs when another one has more micro-batches and experts are spread over both: nothing of it is trained,
# and its group -1 keeps it out of the routers' counts.
FILLER = Sequence(
    (0,), (0,), advantages=(0.0,), sampler_logprobs=(0.0,), reference_logprobs=(0.0,), teacher_logprobs=(0.0,), group=-1
)  # fmt: skip


def row_of(model: NemotronH, batch: Batch) -> Row:
    """The batch as the model's row."""
    return model.row(batch.tokens_T, batch.cu_seqlens, counted=int(batch.group_S[0]) >= 0)


def target_logprobs(
    model: NemotronH, batch: Batch, distribution: Distribution, everywhere: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets_T` and entropies, both [T], in nats, of the distribution that samples.

    With `everywhere` at every position; else only where `loss_mask_T` is 1, and 0 at the others, which skips the output
    layer for prompts. With context parallelism every rank of the row gets all T of them and computes the logits of its
    own tokens only. On the last pipeline stage.
    """
    row = row_of(model, batch)
    targets_t = row.own(batch.targets_T)
    if everywhere:
        logprobs_t, entropy_t = logprobs_and_entropy(model.run(row), targets_t, distribution)
        return row.whole(logprobs_t), row.whole(entropy_t)
    mask_t = row.own(batch.loss_mask_T)
    rows_N = mask_t.nonzero()[:, 0]
    with output_rows(model, rows_N):
        logits_NV = model.run(row)
    if logits_NV.shape[0] != rows_N.shape[0]:
        logits_NV = logits_NV.index_select(0, rows_N)
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, targets_t[rows_N], distribution)
    empty_t = torch.zeros_like(mask_t)
    return row.whole(empty_t.index_copy(0, rows_N, logprobs_N)), row.whole(empty_t.index_copy(0, rows_N, entropy_N))


def vocabulary_logprobs(model: NemotronH, batch: Batch, temperature: float) -> torch.Tensor:
    """Log-probabilities [T, V] of the whole vocabulary at every position. On the last pipeline stage."""
    row = row_of(model, batch)
    logits_TV = row.whole(model.run(row))
    return torch.log_softmax(logits_TV if temperature == 1.0 else logits_TV / temperature, dim=-1)


@contextlib.contextmanager
def output_rows(model: NemotronH, rows_N: torch.Tensor) -> Iterator[None]:
    """Inside the context the output layer sees only these rows of the packed row.

    With sequence parallelism no rank holds all rows before the output layer; then nothing is selected.
    """
    if model.config.sequence_parallel:
        yield
        return

    def select(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_T1H, *rest = args
        return (hidden_T1H.index_select(0, rows_N), *rest)

    handle = model.output_layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the policy's device; the same object on CPU."""
    if device.type == "cpu":
        return batch
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{name: None if value is None else value.to(device) for name, value in fields.items()})
