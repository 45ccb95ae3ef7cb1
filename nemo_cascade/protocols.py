"""The seams of the system. The loops in `stages/` see only these; `launch` picks what stands behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nemo_cascade.types import (
    Batch,
    Case,
    Completion,
    Json,
    Message,
    Outcome,
    Request,
    SamplingParams,
    Split,
    Task,
    Transcript,
)
from nemo_cascade.types import Sequence as TokenSequence

if TYPE_CHECKING:
    import torch


class Episode(Protocol):
    """The environment's side of one rollout. Single-turn domains use `SingleTurn` of `domains/__init__.py`.

    One that does not begin or answer within a deadline loses its rollout (Invalid); `close` may then come while `reply`
    still runs, and is what can end it.
    """

    def reply(self, message: Message) -> tuple[Message, ...] | None:
        """Answer an assistant turn with tool or user turns, or None when the rollout is finished."""

    def close(self) -> None:
        """Free what the episode holds (a working folder, a session)."""


class Domain(Protocol):
    """One skill: its prompts, the environment's turns, the reward, and the cases that prove the reward."""

    name: str
    max_turns: int  # assistant turns per rollout

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`count` generated nano tasks. The sets of the three splits are disjoint for every seed."""

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """A teacher's conversation for SFT: assistant turns with the environment's answers between them.

        `flaw_rate` is the share of demonstrations with a realistic fault that `score` rejects: real SFT data are
        imperfect, and the faults are the headroom that RL closes.
        """

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """A released NeMo-Gym row as a Task; UserError names the broken field."""

    def begin(self, task: Task) -> Episode:
        """A fresh environment for one rollout."""

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """The reward: a pure function of task and transcript, at every call the same."""

    def score_group(self, task: Task, transcripts_G: Sequence[Transcript]) -> list[Outcome]:
        """Rewards that depend on the whole group (pairwise judge); by default `score` of each."""

    def cases(self) -> list[Case]:
        """Gold and anti-gold cases, reward hacks among them."""


class Sampler(Protocol):
    """Turns prompts into completions."""

    version: int

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion) as each one finishes. Same requests, same weights: same
        completions. UserError where the parameters ask for experts and it cannot report them.
        """

    def load_weights(self, named: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Take Hugging Face named weights; all of them or, on an error, none."""

    def close(self) -> None:
        """Stop and free the engine."""


LossFn = Callable[["torch.Tensor", Batch, Mapping[str, float]], tuple["torch.Tensor", Mapping[str, "torch.Tensor"]]]
"""(log-probabilities [T] of batch.targets_T, or [T, V] of the whole vocabulary when `needs_logits`; batch;
denominators) -> (loss, metrics). Loss and metrics are already divided by the denominators, so that adding them over
micro-batches and ranks gives the value of the step; a metric whose name ends in `_max` is combined by its maximum."""


class Learner(Protocol):
    """Holds the trainable policy. Every rank calls every method."""

    def update(self, sequences: Sequence[TokenSequence], objective: Objective) -> dict[str, float]:
        """One optimizer step on this rank's sequences; denominators are summed over the data-parallel ranks."""

    def logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """Per-token log-probabilities (temperature and kept set as configured); index 0 is 0.0."""

    def routing(self, sequences: Sequence[TokenSequence]) -> list[bytes]:
        """The experts that the policy chooses for each token, as `Sequence.routed_experts` holds them."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face named tensors of the policy, one at a time."""

    def using(self, folder: str) -> AbstractContextManager[None]:
        """Inside the context the parameters are those of a Hugging Face folder (teacher, reference); after it,
        bit-exact the policy's.
        """

    def save(self, folder: str, step: int) -> None:
        """A complete training checkpoint at `folder`, or nothing. It may appear later, while training goes on."""

    def finish_saving(self) -> None:
        """Wait until the last `save` is complete; raises what went wrong with it."""

    def load(self, folder: str) -> int:
        """Restore a training checkpoint; returns its step."""

    def export(self, folder: str) -> str:
        """Write a Hugging Face folder; returns its content sha256."""


@dataclass(frozen=True)
class Objective:
    """A loss with the denominators it needs.

    `denominators` maps a batch of sequences of this rank to local sums; the Learner adds them over ranks and hands
    the totals to `loss`. A key that begins with `local:` is not added: it counts something that lives on this rank
    only, such as one group. `check` sees the metrics of the whole step before the optimizer moves anything, and
    raises UserError to abort the run.
    """

    name: str
    loss: LossFn
    denominators: Callable[[Sequence[TokenSequence]], dict[str, float]]
    needs_logits: bool = False
    needs_teacher_vocabulary: bool = False  # fill Batch.teacher_logprobs_TV from the folder in Sequence.teacher
    top_k: int = 0  # above 0: instead of the whole vocabulary, the student's top k at each position (Batch, `_TK`)
    check: Callable[[Mapping[str, float]], None] | None = None


class Refit(Protocol):
    """Brings the Learner's weights to the Sampler."""

    def refit(self, learner: Learner, sampler: Sampler, version: int) -> str:
        """Copy the weights, set the version; returns a checksum both sides agree on."""
