"""Sequences into packed micro-batches, and per-token results back into the order they came in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_cascade.types import Batch
from nemo_cascade.types import Sequence as TokenSequence


@dataclass(frozen=True)
class Packed:
    """The micro-batches of one step. `order[b][s]` is the input index of sequence s of micro-batch b."""

    batches: tuple[Batch, ...]
    order: tuple[tuple[int, ...], ...]

    def unpack(self, values_B_T: Sequence[torch.Tensor]) -> list[list[float]]:
        """Values aligned with `targets_T`, one tensor [T] per micro-batch, as lists aligned with the inputs' tokens.

        The value of a target belongs to the token itself, so it moves by one: index 0 of every list is 0.0.
        """
        results: list[list[float]] = [[] for members in self.order for _ in members]
        for batch, members, values_T in zip(self.batches, self.order, values_B_T, strict=True):
            values, bounds = values_T.tolist(), batch.cu_seqlens.tolist()
            for position, index in enumerate(members):
                results[index] = [0.0, *values[bounds[position] : bounds[position + 1] - 1]]
        return results


def pack(sequences: Sequence[TokenSequence], micro_batch_tokens: int) -> Packed:
    """First-fit decreasing: the longest sequence first, into the first micro-batch with room for it.

    Deterministic: equal lengths keep their order. A sequence longer than `micro_batch_tokens` gets a micro-batch of its
    own. Nothing is cut, padded or dropped.
    """
    bins = first_fit_decreasing([len(sequence.token_ids) for sequence in sequences], micro_batch_tokens)
    batches = tuple(to_batch([sequences[index] for index in members]) for members in bins)
    return Packed(batches, tuple(tuple(members) for members in bins))


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped into bins of at most `capacity` (unless one alone is longer)."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        chosen = next((bin_ for bin_, room in enumerate(free) if room >= length), None)
        if chosen is None:
            bins.append([index])
            free.append(capacity - length)
        else:
            bins[chosen].append(index)
            free[chosen] -= length
    return bins


def to_batch(sequences: Sequence[TokenSequence]) -> Batch:
    """One packed micro-batch, every per-token field moved from the token to the position that predicts it."""
    lengths = [len(sequence.token_ids) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        raise ValueError("an empty sequence cannot be packed")
    lengths_S = torch.tensor(lengths)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths_S.cumsum(0)
    return Batch(
        tokens_T=torch.tensor([token for sequence in sequences for token in sequence.token_ids]),
        targets_T=shifted(sequences, lambda sequence: sequence.token_ids, 0, torch.int64),
        loss_mask_T=shifted(sequences, lambda sequence: sequence.loss_mask, 0, torch.float32),
        cu_seqlens=cu_seqlens,
        sequence_T=torch.repeat_interleave(torch.arange(len(lengths)), lengths_S),
        group_S=torch.tensor([sequence.group for sequence in sequences]),
        domain_S=torch.tensor([sequence.domain for sequence in sequences]),
        advantages_T=optional(sequences, "advantages", lambda sequence: sequence.advantages),
        sampler_logprobs_T=optional(sequences, "sampler_logprobs", lambda sequence: sequence.sampler_logprobs),
        reference_logprobs_T=optional(sequences, "reference_logprobs", lambda sequence: sequence.reference_logprobs),
        teacher_logprobs_T=optional(sequences, "teacher_logprobs", lambda sequence: sequence.teacher_logprobs),
        routed_experts_TC=routed_experts(sequences),
    )


def routed_experts(sequences: Sequence[TokenSequence]) -> torch.Tensor | None:
    """The experts of every position, uint8 [T, MoE layers * top-k]; None when no sequence names any.

    Not moved like the other fields: an expert belongs to the position that reads the token.
    """
    if not any(sequence.routed_experts for sequence in sequences):
        return None
    parts = []
    for sequence in sequences:
        tokens = len(sequence.token_ids)
        if not sequence.routed_experts or len(sequence.routed_experts) % tokens:
            raise ValueError(f"routed_experts: {len(sequence.routed_experts)} bytes for {tokens} tokens")
        parts.append(torch.frombuffer(bytearray(sequence.routed_experts), dtype=torch.uint8).view(tokens, -1))
    return torch.cat(parts)


def inputs_in_order(values_B_S: Sequence[Sequence[Any]], order: Sequence[Sequence[int]]) -> list[Any]:
    """One value per sequence of each micro-batch, in the order of the inputs; micro-batches beyond `order` left out."""
    placed = {
        index: value
        for values_S, members in zip(values_B_S, order, strict=False)
        for index, value in zip(members, values_S, strict=True)
    }
    return [placed[index] for index in range(len(placed))]


PerToken = Callable[[TokenSequence], Sequence[float]]


def shifted(sequences: Sequence[TokenSequence], field: PerToken, last: float, dtype: torch.dtype) -> torch.Tensor:
    """A per-token field [T] moved one position to the left inside each sequence; `last` fills the last position."""
    values: list[float] = []
    for sequence in sequences:
        own = field(sequence)
        if len(own) != len(sequence.token_ids):
            raise ValueError(f"a per-token field has {len(own)} values for {len(sequence.token_ids)} tokens")
        values.extend(own[1:])
        values.append(last)
    return torch.tensor(values, dtype=dtype)


def optional(sequences: Sequence[TokenSequence], name: str, field: PerToken) -> torch.Tensor | None:
    """A field [T] that every sequence has, or None when none has it."""
    present = [len(field(sequence)) > 0 for sequence in sequences]
    if not any(present):
        return None
    if not all(present):
        raise ValueError(f"{name}: given for {sum(present)} of {len(present)} sequences, all or none must have it")
    return shifted(sequences, field, 0.0, torch.float32)
