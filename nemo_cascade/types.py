"""The typed records that cross every arrow of the pipeline. No torch at run time, no dict bags.

Shape suffixes used throughout the package: `_P` prompts, `_G` rollouts of one prompt, `_T` tokens, `_B` packed rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "select", "report"]
Finish = Literal["stop", "length"]

NO_CHOICE = 255
"""In a record of experts: none is known (padding, a token that the Sampler never read), so the router chooses. Expert
numbers are bytes below it: at most 255 experts.
"""


class UserError(ValueError):
    """A mistake in the user's input: one line that names the file, the key and the remedy. The CLI prints it and
    exits 2.
    """


@dataclass(frozen=True)
class ToolCall:
    """One function call of an assistant turn."""

    name: str
    arguments: Mapping[str, Json]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `reasoning` is the text inside <think>, `content` what the user sees."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A function offered to the model; `parameters` is its JSON schema."""

    name: str
    description: str
    parameters: Mapping[str, Json]


@dataclass(frozen=True)
class Task:
    """One row: the prompt, the tools, and what its verifier needs.

    `id` is unique within a domain and stable between runs. `truth` holds the verifier's fields under the names of the
    released NeMo-Gym rows (`expected_answer`, `instruction_id_list`, `schema_str`, ...); only the task's own domain
    reads it.
    """

    id: str
    domain: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    thinking: bool = False
    truth: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A verdict. `reward` enters the baseline; `parts` are shown beside it; `reason` says in a few words why."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Invalid:
    """No verdict: the infrastructure failed (judge down, wall clock expired). Leaves the baseline, the std and the
    loss.
    """

    reason: str


Outcome = Scored | Invalid


@dataclass(frozen=True)
class Transcript:
    """What happened after the prompt: assistant turns and the environment's answers, in order.

    `truncated`: the last assistant turn hit the token limit (or the turn limit was reached with a call pending).
    """

    messages: tuple[Message, ...]
    truncated: bool = False

    @property
    def final(self) -> Message:
        """The last assistant turn; an empty one when the model never spoke."""
        for message in reversed(self.messages):
            if message.role == "assistant":
                return message
        return Message("assistant")


@dataclass(frozen=True)
class Case:
    """A gold (reward 1) or anti-gold (reward 0) case by which a domain proves its reward."""

    task: Task
    transcript: Transcript
    reward: float
    because: str
    hack: bool = False  # a known reward hack; `audit` lists these apart


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    `logprobs` names the distribution that a completion's log-probabilities belong to: `kept`, the one that sampled, or
    `raw`, the model's own (temperature 1, every token). `routed_experts` asks for the experts that each token used.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    logprobs: str = "kept"
    routed_experts: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt for a Sampler. `seed` fixes the random stream of this request whatever else is in the batch."""

    token_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """A Sampler's answer. `logprobs` are of the distribution that sampled: logits / temperature on the kept set (or the
    model's own where the parameters say `raw`).

    `routed_experts`, where the parameters ask for them: of the tokens of prompt and answer. The last one was drawn but
    never read, so its experts are `NO_CHOICE`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    version: int
    routed_experts: bytes = b""  # uint8 [prompt and answer tokens, MoE layers, top-k]


@dataclass(frozen=True)
class Rollout:
    """One sampled answer to one task: every token of the conversation, in the order the model saw them.

    `loss_mask[t]` is 1 on sampled tokens; `logprobs[t]` is 0.0 and `versions[t]` -1 elsewhere. All four have equal
    length. `routed_experts` are those that the Sampler used for each token, empty when it was not asked.
    """

    task: Task
    sample: int  # index within its group
    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    transcript: Transcript
    outcome: Outcome
    sampling_seconds: float = 0.0
    reward_seconds: float = 0.0
    routed_experts: bytes = b""  # uint8 [tokens, MoE layers, top-k]

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.loss_mask), len(self.logprobs), len(self.versions)}
        if len(lengths) != 1:
            name = f"{self.task.id}#{self.sample}"
            raise ValueError(f"rollout {name}: per-token fields differ in length: {sorted(lengths)}")
        if self.routed_experts and len(self.routed_experts) % len(self.token_ids):
            name = f"{self.task.id}#{self.sample}"
            raise ValueError(f"rollout {name}: {len(self.routed_experts)} experts for {len(self.token_ids)} tokens")

    @property
    def num_sampled(self) -> int:
        """Sampled tokens, |o_i| of equation 1."""
        return sum(self.loss_mask)

    @property
    def reward(self) -> float:
        """The reward; only valid rollouts have one."""
        if isinstance(self.outcome, Invalid):
            raise ValueError(f"rollout {self.task.id}#{self.sample} is invalid: {self.outcome.reason}")
        return self.outcome.reward

    def with_outcome(self, outcome: Outcome) -> Rollout:
        """The same tokens with another verdict (overlong penalty, group scoring)."""
        return dataclasses.replace(self, outcome=outcome)


@dataclass(frozen=True)
class Group:
    """The rollouts of one task. `in_loss[i]` is False where overlong filtering takes rollout i out of the loss."""

    task: Task
    rollouts: tuple[Rollout, ...]
    in_loss: tuple[bool, ...]


@dataclass(frozen=True)
class Sequence:
    """One tokenised sequence ready for packing; the Learner never sees text.

    Per-token fields have the length of `token_ids` and belong to the token itself, not to its predecessor:
    `advantages[t]` weighs log p(token t | tokens before t). Index 0 can never be trained (nothing predicts it).
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    advantages: tuple[float, ...] = ()
    sampler_logprobs: tuple[float, ...] = ()
    reference_logprobs: tuple[float, ...] = ()
    teacher_logprobs: tuple[float, ...] = ()
    group: int = 0  # index of the prompt inside the step, for group-wise denominators
    domain: int = 0  # MOPD: index of the domain in the names that the objective was given
    teacher: str = ""  # MOPD: the stage that scores this sequence
    # uint8 [tokens, MoE layers, top-k]: what the update must use, NO_CHOICE where it may choose; empty: it may anywhere
    routed_experts: bytes = b""


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch, `_T` over all its tokens. Sequence s is tokens[cu_seqlens[s]:cu_seqlens[s + 1]].

    `targets_T[t]` is the token after t inside its sequence and `loss_mask_T[t]` says whether that target is trained;
    the last position of a sequence has loss_mask 0. `advantages_T`, `sampler_logprobs_T` and `teacher_logprobs_T` are
    aligned with `targets_T`.
    """

    tokens_T: torch.Tensor  # int64
    targets_T: torch.Tensor  # int64
    loss_mask_T: torch.Tensor  # float32, 0 or 1
    cu_seqlens: torch.Tensor  # int32 [S + 1], on the host also where the others are on a card
    sequence_T: torch.Tensor  # int64: local index of the sequence each position belongs to
    group_S: torch.Tensor  # int64: group index of each sequence; on the host, as cu_seqlens
    advantages_T: torch.Tensor | None = None
    sampler_logprobs_T: torch.Tensor | None = None
    reference_logprobs_T: torch.Tensor | None = None
    teacher_logprobs_T: torch.Tensor | None = None
    teacher_logprobs_TV: torch.Tensor | None = None  # only for the exact reverse KL: the whole vocabulary
    top_tokens_TK: torch.Tensor | None = None  # int64, only for the top-k reverse KL: the student's likeliest tokens
    teacher_logprobs_TK: torch.Tensor | None = None  # and what the teacher says about these
    domain_S: torch.Tensor | None = None  # int64: `Sequence.domain` of each sequence
    routed_experts_TC: torch.Tensor | None = None  # uint8 [T, MoE layers * top-k], of the position itself
    trained_N: torch.Tensor | None = None  # int64: where loss_mask_T is 1, known before the batch went to a card


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval over `n` tasks."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class TaskScore:
    """One task's score by one checkpoint, kept so that comparisons can be paired over tasks."""

    task_id: str
    score: float
    valid: bool = True


@dataclass(frozen=True)
class StageResult:
    """What a finished stage leaves for its children: the content of `record.json`."""

    stage: str
    kind: str
    key: str
    checkpoint: str  # Hugging Face folder, relative to the stage folder
    sha256: str
    num_steps: int
    seconds: float
