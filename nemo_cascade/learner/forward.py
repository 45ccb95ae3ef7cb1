"""One micro-batch through the policy: only the positions that the loss reads pass the output layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from nemo_cascade.algorithms.kept import Distribution, logprobs_and_entropy
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.types import Batch, Sequence

# What a rank runs when another one has more micro-batches and experts are spread over both: nothing of it is trained.
FILLER = Sequence(
    (0,), (0,), advantages=(0.0,), sampler_logprobs=(0.0,), reference_logprobs=(0.0,), teacher_logprobs=(0.0,)
)


def target_logprobs(
    model: NemotronH, batch: Batch, distribution: Distribution, everywhere: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets_T` and entropies, both [T], in nats, of the distribution that samples.

    With `everywhere` at every position; else only where `loss_mask_T` is 1, and 0 at the others, which skips the output
    layer for prompts.
    """
    if everywhere:
        return logprobs_and_entropy(
            model.packed_logits(batch.tokens_T, batch.cu_seqlens), batch.targets_T, distribution
        )
    rows_N = batch.loss_mask_T.nonzero()[:, 0]
    with output_rows(model, rows_N):
        logits_NV = model.packed_logits(batch.tokens_T, batch.cu_seqlens)
    if logits_NV.shape[0] != rows_N.shape[0]:
        logits_NV = logits_NV.index_select(0, rows_N)
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, batch.targets_T[rows_N], distribution)
    empty_T = torch.zeros_like(batch.loss_mask_T)
    return empty_T.index_copy(0, rows_N, logprobs_N), empty_T.index_copy(0, rows_N, entropy_N)


def vocabulary_logprobs(model: NemotronH, batch: Batch, temperature: float) -> torch.Tensor:
    """Log-probabilities [T, V] of the whole vocabulary at every position."""
    logits_TV = model.packed_logits(batch.tokens_T, batch.cu_seqlens)
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
