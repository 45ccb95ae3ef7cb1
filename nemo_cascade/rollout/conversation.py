"""One rollout while it is played: token in, token out.

Sampled ids are never decoded and encoded again. A turn appends the sampled ids, then the ids of the environment's
answer, so the next prompt begins with exactly the tokens that were sampled from; the Learner sees the same ids in the
same order.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.protocols import Episode
from nemo_cascade.types import Completion, Invalid, Message, Outcome, Request, Rollout, Task, Transcript

UNSCORED = Invalid("not scored")


def request_seed(run_seed: int, step: int, task_id: str, sample: int, turn: int) -> int:
    """63 bits that name one turn of one rollout: the same in every run with this seed, whatever else is sampled."""
    name = f"{run_seed}/{step}/{task_id}/{sample}/{turn}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


@dataclass
class Conversation:
    """The growing ids, the transcript so far and the environment of one rollout.

    `group` is its task's place in the order of starting, `stream` the number that keeps two rollouts of one step apart
    in `request_seed` (they differ even when a task occurs twice in a step). `episode` is None until the environment has
    begun.
    """

    task: Task
    group: int
    sample: int
    stream: int
    episode: Episode | None
    max_turns: int
    token_ids: list[int]
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    routed_experts: bytes = b""
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    truncated: bool = False
    finished: bool = False
    outcome: Outcome = UNSCORED
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._append_given(len(self.token_ids))

    def request(self, run_seed: int, step: int, max_new_tokens: int, max_total_tokens: int) -> Request:
        """The next turn's request; the caller has checked that there is room for a token."""
        budget = min(max_new_tokens, max_total_tokens - len(self.token_ids))
        seed = request_seed(run_seed, step, self.task.id, self.stream, self.turns)
        return Request(tuple(self.token_ids), seed, budget)

    def hear(self, completion: Completion, chat: ChatTokenizer) -> None:
        """Take a sampled turn. A turn that hit the token limit ends the rollout: it is not a message the environment
        may answer. Log-probabilities that are no numbers are a failure of the Sampler: Invalid, with zeros for them.
        """
        broken = math.isnan(sum(completion.logprobs))
        self.token_ids += completion.token_ids
        self.loss_mask += [1] * len(completion.token_ids)
        self.logprobs += [0.0] * len(completion.token_ids) if broken else completion.logprobs
        self.versions += [completion.version] * len(completion.token_ids)
        self._note_experts(completion.routed_experts)
        self.turns += 1
        self.messages.append(chat.parse_assistant(completion.token_ids, self.task.thinking, self.task.tools))
        if completion.finish == "length":
            self.truncated = self.finished = True
        if broken:
            self.lose(f"the sampler gave NaN as a log-probability (task {self.task.id}, turn {self.turns})")

    def ask(self) -> tuple[Message, ...] | None:
        """The environment's answer to the last turn. Changes nothing here, so it may come late, or never."""
        assert self.episode is not None, f"{self.task.id}#{self.sample}: its environment has not begun"
        return self.episode.reply(self.messages[-1])

    def lose(self, reason: str) -> None:
        """Environment or Sampler failed us: the rollout ends without a verdict, never with reward 0."""
        self.finished, self.outcome = True, Invalid(reason)

    @property
    def lost(self) -> bool:
        """The rollout ended without a verdict while it was played."""
        return self.outcome is not UNSCORED

    def take(self, reply: tuple[Message, ...] | None, chat: ChatTokenizer, max_total_tokens: int) -> None:
        """Append the environment's answer; ends the rollout when it is silent, or turns or tokens have run out."""
        if reply is None:
            self.finished = True
            return
        if self.turns == self.max_turns:
            self.truncated = self.finished = True
            return
        ids = chat.reply_ids(reply, self.task.thinking)
        if self.token_ids[-1] != chat.im_end_id:  # it ended with the end-of-text token; the template wants its own mark
            ids = [chat.im_end_id, *ids]
        if len(self.token_ids) + len(ids) >= max_total_tokens:
            self.truncated = self.finished = True
            return
        self.messages += reply
        self.token_ids += ids
        self._append_given(len(ids))

    def rollout(self) -> Rollout:
        """The finished rollout, not yet scored; Invalid when it was lost."""
        assert self.finished, f"{self.task.id}#{self.sample} is still being played"
        return Rollout(
            task=self.task,
            sample=self.sample,
            token_ids=tuple(self.token_ids),
            loss_mask=tuple(self.loss_mask),
            logprobs=tuple(self.logprobs),
            versions=tuple(self.versions),
            transcript=Transcript(tuple(self.messages), self.truncated),
            outcome=self.outcome,
            sampling_seconds=self.seconds,
            routed_experts=self.routed_experts,
        )

    def _note_experts(self, experts: bytes) -> None:
        """Append the experts of the tokens since the last turn. A turn reads the whole conversation again, but a token
        keeps the experts by which it was sampled; the last one of a turn has its first ones in the next.
        """
        if not experts:
            return
        per_token, rest = divmod(len(experts), len(self.token_ids))
        assert not rest, f"{self.task.id}#{self.sample}: {len(experts)} experts for {len(self.token_ids)} tokens"
        known = max(0, len(self.routed_experts) - per_token)
        self.routed_experts = self.routed_experts[:known] + experts[known:]

    def _append_given(self, count: int) -> None:
        """Bookkeeping of tokens that nobody sampled."""
        self.loss_mask += [0] * count
        self.logprobs += [0.0] * count
        self.versions += [-1] * count
