"""One micro-batch through the policy: only the positions that the loss reads pass the output layer."""

from __future__ import annotations

import dataclasses

import torch

from nemo_cascade.algorithms.kept import Distribution
from nemo_cascade.learner.output import output_logprobs
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.nemotron_h import NemotronH, Row
from nemo_cascade.models.routing import Routing
from nemo_cascade.types import NO_CHOICE, Batch, Sequence, UserError

# What a rank runs when another one has more micro-batches and experts are spread over both: nothing of it is trained,
# and its group -1 keeps it out of the routers' counts.
FILLER = Sequence(
    (0,), (0,), advantages=(0.0,), sampler_logprobs=(0.0,), reference_logprobs=(0.0,), teacher_logprobs=(0.0,), group=-1
)  # fmt: skip


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
    targets_t, mask_t = row.own(batch.targets_T), row.own(batch.loss_mask_T)
    rows_N = None if everywhere else _trained(batch, row, mask_t)
    hidden_tH = model.hidden(row)
    weight, group = model.output_layer.weight, model.pg_collection.tp
    if rows_N is None:
        logprobs_t, entropy_t = output_logprobs(hidden_tH, weight, targets_t, distribution, group)
        return row.whole(logprobs_t), row.whole(entropy_t)
    hidden_NH = hidden_tH.index_select(0, rows_N)
    logprobs_N, entropy_N = output_logprobs(hidden_NH, weight, targets_t[rows_N], distribution, group)
    empty_t = torch.zeros_like(mask_t)
    return row.whole(empty_t.index_copy(0, rows_N, logprobs_N)), row.whole(empty_t.index_copy(0, rows_N, entropy_N))


def _trained(batch: Batch, row: Row, mask_t: torch.Tensor) -> torch.Tensor:
    """This rank's positions whose targets are trained. Asked of a card, the host waits for all it has given it."""
    if batch.trained_N is not None and row.packed.cut is None:  # a row that is not cut is padded at its end only
        return batch.trained_N
    return mask_t.nonzero()[:, 0]


def vocabulary_logprobs(
    model: NemotronH, batch: Batch, temperature: float, routing: Routing | None = None
) -> torch.Tensor:
    """Log-probabilities [T, V] of the whole vocabulary at every position. On the last pipeline stage."""
    row = row_of(model, batch, routing)
    logits_TV = row.whole(model.run(row))
    return torch.log_softmax(logits_TV if temperature == 1.0 else logits_TV / temperature, dim=-1)


def replayed(model: NemotronH, batch: Batch) -> Routing | None:
    """What the routers must choose in this micro-batch, which passed `check_replay`; None: they may choose."""
    given_TC = batch.routed_experts_TC
    if given_TC is None:
        return None
    return Routing(given_TC.view(given_TC.shape[0], -1, model.hf_config.num_experts_per_tok))


def check_replay(config: NemotronHConfig, batch: Batch) -> None:
    """Refuse recorded experts that this model cannot have used; for batches on the host, where it stops no device."""
    given_TC = batch.routed_experts_TC
    if given_TC is None:
        return
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
    given_RK = given_TC.view(-1, chosen)
    complete_R = (given_RK != NO_CHOICE).all(-1)  # the others are left to the router
    for apart in range(1, chosen):  # many times faster than a sort of each row
        if bool(((given_RK[:, apart:] == given_RK[:, :-apart]).any(-1) & complete_R).any()):
            raise UserError(
                f"routing_replay: a token has the same expert twice in a layer, the model takes {chosen} different "
                "ones; the recorded experts are damaged, or of another model"
            )


@torch.no_grad()
def routed(model: NemotronH, batch: Batch) -> list[bytes]:
    """The experts that the model chooses for the tokens of each sequence, uint8 [tokens, MoE layers, top-k]."""
    if model.hf_config.n_routed_experts > NO_CHOICE:
        raise UserError(f"routing_replay: expert numbers are bytes, the model has {model.hf_config.n_routed_experts}")
    routing = Routing()
    row = row_of(model, batch, routing)
    model.hidden(row)  # no logits are read
    sizes = torch.diff(batch.cu_seqlens).tolist()
    return [part.contiguous().cpu().numpy().tobytes() for part in routing.chosen().split(sizes)]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the policy's device, but for `cu_seqlens` and `group_S`, which the host reads; the same on CPU."""
    if device.type == "cpu":
        return batch
    batch = dataclasses.replace(batch, trained_N=batch.loss_mask_T.nonzero()[:, 0])
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    stay = ("cu_seqlens", "group_S")
    moved = {name: value.to(device) for name, value in fields.items() if value is not None and name not in stay}
    return dataclasses.replace(batch, **moved)
