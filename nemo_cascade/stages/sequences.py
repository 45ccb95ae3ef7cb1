"""From groups of rollouts to the token sequences that the Learner packs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from nemo_cascade.protocols import Learner
from nemo_cascade.types import Group, Invalid, UserError
from nemo_cascade.types import Sequence as TokenSequence


def as_sequences(
    groups_P: Sequence[Group],
    advantages_P_G: Sequence[Sequence[float | None]] | None = None,
    teachers: Mapping[str, str] | None = None,
) -> list[TokenSequence]:
    """Every rollout that is in the loss, with its advantage on each sampled token.

    Invalid rollouts and those that overlong filtering took out are left out here; they have already had their part (or
    none) in the baseline. MOPD has no advantages: `teachers` maps a domain to the folder that scores its tokens; the
    domains count in the order of `domains`. Answers of no token are left out too: there is nothing to train.
    """
    sequences = []
    places = {domain: place for place, domain in enumerate(domains(teachers or {}))}
    for index, group in enumerate(groups_P):
        for sample, (rollout, kept) in enumerate(zip(group.rollouts, group.in_loss, strict=True)):
            advantage = 0.0 if advantages_P_G is None else advantages_P_G[index][sample]
            if not kept or advantage is None or isinstance(rollout.outcome, Invalid) or rollout.num_sampled == 0:
                continue
            if math.isnan(sum(rollout.logprobs)):
                raise UserError(
                    f"task {rollout.task.id}, rollout {rollout.sample}: the sampler's log-probabilities are no numbers "
                    "(NaN), so there is no importance ratio; look at the sampler that made these rollouts"
                )
            sequences.append(
                TokenSequence(
                    token_ids=rollout.token_ids,
                    loss_mask=rollout.loss_mask,
                    advantages=tuple(advantage * mask for mask in rollout.loss_mask),
                    sampler_logprobs=rollout.logprobs,
                    group=index,
                    domain=places.get(group.task.domain, 0),
                    teacher=teachers[group.task.domain] if teachers else "",
                    routed_experts=rollout.routed_experts,
                )
            )
    return sequences


def domains(teachers: Mapping[str, str]) -> list[str]:
    """The names that `Sequence.domain` counts: those that have a teacher, in alphabetical order."""
    return sorted(teachers)


def with_reference(sequences: Sequence[TokenSequence], learner: Learner, reference: str | None) -> list[TokenSequence]:
    """The same sequences with the reference's log-probabilities; the reference borrows the policy's parameters."""
    if reference is None:
        return list(sequences)
    with learner.using(reference):
        logprobs = learner.logprobs(sequences)
    return [
        dataclasses.replace(sequence, reference_logprobs=tuple(values))
        for sequence, values in zip(sequences, logprobs, strict=True)
    ]


def with_routing(sequences: Sequence[TokenSequence], learner: Learner, replay: str) -> list[TokenSequence]:
    """The same sequences with the experts that the update must use (`loss.routing_replay`).

    `sampler`: those that the rollout brought; `learner`: what the policy chooses in a pass without gradient, just
    before the update; `none`: the update chooses.
    """
    if replay == "sampler":
        if bare := sum(not sequence.routed_experts for sequence in sequences):
            raise UserError(
                f"routing_replay: sampler: {bare} of {len(sequences)} rollouts do not say which experts the sampler "
                "used; set it to learner, or sample them again"
            )
        return list(sequences)
    experts = [b""] * len(sequences) if replay == "none" else learner.routing(sequences)
    return [dataclasses.replace(sequence, routed_experts=own) for sequence, own in zip(sequences, experts, strict=True)]


def with_teachers(sequences: Sequence[TokenSequence], folders: Iterable[str], learner: Learner) -> list[TokenSequence]:
    """The same sequences with log p_teacher of every token; the sequences of one teacher are scored in one visit.

    Every rank visits every folder in the same order, also with no sequence of its own, because the ranks act together.
    """
    scored = list(sequences)
    for folder in sorted(set(folders)):
        mine = [index for index, sequence in enumerate(sequences) if sequence.teacher == folder]
        with learner.using(folder):
            logprobs = learner.logprobs([sequences[index] for index in mine])
        for index, values in zip(mine, logprobs, strict=True):
            scored[index] = dataclasses.replace(sequences[index], teacher_logprobs=tuple(values))
    return scored
