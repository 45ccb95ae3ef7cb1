"""One micro-batch through the policy: only the positions that the loss reads pass the output layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from nemo_cascade.algorithms.kept import Distribution, logprobs_and_entropy
from nemo_cascade.models.nemotron_h import NemotronH, Row
from nemo_cascade.models.routing import Routing
from nemo_cascade.types import NO_CHOICE, Batch, Sequence, UserError

# What a rank runs when another one has more micro-batches and experts are spread over both: nothing of it is trained,
# and its group -1 keeps it out of the routers' counts.
FILLER = Sequence(
    (0,), (0,), advantages=(0.0,), sampler_logprobs=(0.0,), reference_logprobs=(0.0,), teacher_logprobs=(0.0,), group=-1
)  # fmt: skip


PIECE = 8192
"""Positions whose logits exist at once where no gradient is wanted: 98K over a vocabulary of 131K are 48 GiB."""


def row_of(model: NemotronH, batch: Batch, routing: Routing | None = None) -> Row:
    """The batch as the model's row."""
    return model.row(batch.tokens_T, batch.cu_seqlens, counted=int(batch.group_S[0]) >= 0, routing=routing)


def target_logprobs(
    model: NemotronH, batch: Batch, distribution: Distribution, everywhere: bool, routing: Routing | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets_T` and entropies, both [T], in nats, of the distribution that samples.

    With `everywhere` at every position; else only where `loss_mask_T` is 1, and 0 at the others, which skips the output
    layer for prompts. With context parallelism every rank of the row gets all T of them and computes the logits of its
    own tokens only. On the last pipeline stage.
    """
    row = row_of(model, batch, routing)
    targets_t = row.own(batch.targets_T)
    if everywhere:
        logprobs_t, entropy_t = _everywhere(model, row, targets_t, distribution)
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


def _everywhere(
    model: NemotronH, row: Row, targets_t: torch.Tensor, distribution: Distribution
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of this rank's tokens, both [t].

    Of a long row, where no gradient is wanted: the layers once, then the output layer over PIECE positions at a time.
    """
    if targets_t.shape[0] <= PIECE or torch.is_grad_enabled() or model.config.sequence_parallel:
        return logprobs_and_entropy(model.run(row), targets_t, distribution)
    held: list[torch.Tensor] = []

    def hold(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        held.append(args[0])
        return (args[0][:1], *args[1:])

    handle = model.output_layer.register_forward_pre_hook(hold)
    try:
        model.run(row)
    finally:
        handle.remove()
    found = []
    for rows_N1H, targets_N in zip(held[0].split(PIECE), targets_t.split(PIECE), strict=True):
        logits_N1V, _ = model.output_layer(rows_N1H)
        found.append(logprobs_and_entropy(logits_N1V[:, 0].float(), targets_N, distribution))
    return torch.cat([logprobs_N for logprobs_N, _ in found]), torch.cat([entropy_N for _, entropy_N in found])


def vocabulary_logprobs(
    model: NemotronH, batch: Batch, temperature: float, routing: Routing | None = None
) -> torch.Tensor:
    """Log-probabilities [T, V] of the whole vocabulary at every position. On the last pipeline stage."""
    row = row_of(model, batch, routing)
    logits_TV = row.whole(model.run(row))
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
    highest = int(given_TC.masked_fill(given_TC == NO_CHOICE, 0).max())
    if highest >= config.n_routed_experts:
        raise UserError(
            f"routing_replay: expert {highest} was recorded, the model has {config.n_routed_experts}; the rollouts are "
            "of another model"
        )
    return Routing(given_TC.view(-1, layers, chosen))


@torch.no_grad()
def routed(model: NemotronH, batch: Batch) -> list[bytes]:
    """The experts that the model chooses for the tokens of each sequence, uint8 [tokens, MoE layers, top-k]."""
    if model.hf_config.n_routed_experts > NO_CHOICE:
        raise UserError(f"routing_replay: expert numbers are bytes, the model has {model.hf_config.n_routed_experts}")
    routing = Routing()
    row = row_of(model, batch, routing)
    with output_rows(model, batch.cu_seqlens[:1].long()):  # no logits are read
        model.run(row)
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
