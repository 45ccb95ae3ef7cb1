"""One micro-batch through the policy: only the positions that the loss reads pass the output layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from nemo_cascade.algorithms.kept import Distribution, logprobs_and_entropy
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.routing import NO_CHOICE, Routing
from nemo_cascade.types import Batch, Sequence, UserError

# What a rank runs when another one has more micro-batches and experts are spread over both: nothing of it is trained.
FILLER = Sequence(
    (0,), (0,), advantages=(0.0,), sampler_logprobs=(0.0,), reference_logprobs=(0.0,), teacher_logprobs=(0.0,)
)


PIECE = 8192
"""Positions whose logits exist at once where no gradient is wanted: 98K over a vocabulary of 131K are 48 GiB."""


def target_logprobs(
    model: NemotronH, batch: Batch, distribution: Distribution, everywhere: bool, routing: Routing | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets_T` and entropies, both [T], in nats, of the distribution that samples.

    With `everywhere` at every position; else only where `loss_mask_T` is 1, and 0 at the others, which skips the output
    layer for prompts.
    """
    if everywhere and batch.tokens_T.shape[0] > PIECE and not model.config.sequence_parallel:
        assert routing is None and not torch.is_grad_enabled()
        return _logprobs_in_pieces(model, batch, distribution)
    if everywhere:
        return logprobs_and_entropy(
            model.packed_logits(batch.tokens_T, batch.cu_seqlens, routing=routing), batch.targets_T, distribution
        )
    rows_N = batch.loss_mask_T.nonzero()[:, 0]
    with output_rows(model, rows_N):
        logits_NV = model.packed_logits(batch.tokens_T, batch.cu_seqlens, routing=routing)
    if logits_NV.shape[0] != rows_N.shape[0]:
        logits_NV = logits_NV.index_select(0, rows_N)
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, batch.targets_T[rows_N], distribution)
    empty_T = torch.zeros_like(batch.loss_mask_T)
    return empty_T.index_copy(0, rows_N, logprobs_N), empty_T.index_copy(0, rows_N, entropy_N)


def _logprobs_in_pieces(
    model: NemotronH, batch: Batch, distribution: Distribution
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `target_logprobs` everywhere: the layers once, then the output layer over PIECE positions at a time."""
    held: list[torch.Tensor] = []

    def hold(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        held.append(args[0])
        return (args[0][:1], *args[1:])

    handle = model.output_layer.register_forward_pre_hook(hold)
    try:
        model.packed_logits(batch.tokens_T, batch.cu_seqlens)
    finally:
        handle.remove()
    hidden_T1H = held[0][: batch.tokens_T.shape[0]]
    found = []
    for rows_N1H, targets_N in zip(hidden_T1H.split(PIECE), batch.targets_T.split(PIECE), strict=True):
        logits_N1V, _ = model.output_layer(rows_N1H)
        found.append(logprobs_and_entropy(logits_N1V[:, 0].float(), targets_N, distribution))
    return torch.cat([logprobs_N for logprobs_N, _ in found]), torch.cat([entropy_N for _, entropy_N in found])


def vocabulary_logprobs(
    model: NemotronH, batch: Batch, temperature: float, routing: Routing | None = None
) -> torch.Tensor:
    """Log-probabilities [T, V] of the whole vocabulary at every position."""
    logits_TV = model.packed_logits(batch.tokens_T, batch.cu_seqlens, routing=routing)
    return torch.log_softmax(logits_TV if temperature == 1.0 else logits_TV / temperature, dim=-1)


def replayed(model: NemotronH, batch: Batch) -> Routing | None:
    """What the routers must choose in this micro-batch; None where the sequences leave it to them."""
    given_TC = batch.routed_experts_TC
    if given_TC is None:
        return None
    config = model.hf_config
    layers, chosen = len(config.layers("E")), config.num_experts_per_tok
    if given_TC.shape[1] != layers * chosen:
        raise UserError(
            f"routing_replay: {given_TC.shape[1]} experts a token were recorded, the model uses {layers} layers of "
            f"top-{chosen}; the rollouts are of another model"
        )
    return Routing(given_TC.view(-1, layers, chosen))


@torch.no_grad()
def routed(model: NemotronH, batch: Batch) -> list[bytes]:
    """The experts that the model chooses for the tokens of each sequence, uint8 [tokens, MoE layers, top-k]."""
    if model.hf_config.n_routed_experts > NO_CHOICE:
        raise UserError(f"routing_replay: expert numbers are bytes, the model has {model.hf_config.n_routed_experts}")
    routing = Routing()
    with output_rows(model, batch.cu_seqlens[:1].long()):  # no logits are read
        model.packed_logits(batch.tokens_T, batch.cu_seqlens, routing=routing)
    sizes = torch.diff(batch.cu_seqlens).tolist()
    return [part.contiguous().cpu().numpy().tobytes() for part in routing.chosen().split(sizes)]


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
