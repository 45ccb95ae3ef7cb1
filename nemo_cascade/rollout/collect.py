"""Prompts x group -> Groups: plays conversations against a Sampler in rounds and scores them while others are decoded.

A round samples the next turn of every active conversation in one batch; then the environments answer. What starts in
which round follows from tokens and rewards alone, never from timing, so a step is reproducible. Groups that teach
nothing are replaced by new tasks in the very next round (dynamic filtering); each reason for dropping one is counted.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from nemo_cascade.config.schema import FiltersConfig, SamplingConfig
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.domains import SingleTurn
from nemo_cascade.protocols import Domain, Episode, Sampler
from nemo_cascade.rollout.conversation import Conversation
from nemo_cascade.rollout.filters import check_invalid_share, make_group, why_dropped
from nemo_cascade.rollout.scoring import Scorer
from nemo_cascade.rollout.workers import Call, CallLost, Workers
from nemo_cascade.types import Group, Invalid, Message, Rollout, SamplingParams, Task, UserError

T = TypeVar("T")
Reply = tuple[Message, ...] | None
TakeTasks = Callable[[int, int], Sequence[Task]]
"""(count, attempt) -> tasks: attempt 0 for the step itself, 1, 2, ... for refills; fewer or none when the data run
out.
"""

Timer = Callable[[str], AbstractContextManager[None]]
"""Times the spans `sampling` and `reward`; `RunRecord.timer` is one."""


ENVIRONMENT_DEADLINE_S = 600.0  # for an environment to begin, or to answer one turn


def _untimed(span: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Collected:
    """What a step collected. `dropped` counts groups by reason (`filters.why_dropped`): those that were replaced, and
    without dynamic filtering those that stay in the batch with nothing in the loss. `tokens` and `rollouts` include
    those of dropped groups.

    `sampling_seconds` is time inside the Sampler, `reward_seconds` the time spent waiting for verdicts after it.
    """

    groups: tuple[Group, ...]
    dropped: Mapping[str, int]
    tokens: int
    rollouts: int
    invalid: int
    refills: int
    sampling_seconds: float
    reward_seconds: float

    def metrics(self) -> dict[str, float]:
        """Numbers of the step that its groups alone do not tell; this rank's, to be summed over ranks."""
        line = {"groups_dropped": float(sum(self.dropped.values())), "refills": float(self.refills)}
        return line | {f"groups_dropped/{reason}": float(count) for reason, count in self.dropped.items()}


@dataclass
class _Counts:
    dropped: Counter[str] = field(default_factory=Counter)
    invalid: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    rollouts: int = 0
    refills: int = 0
    sampling_seconds: float = 0.0
    reward_seconds: float = 0.0


class Collector:
    """Turns tasks into scored groups. One per process; `close` ends its threads."""

    def __init__(
        self,
        domains: Mapping[str, Domain],
        sampler: Sampler,
        chat: ChatTokenizer,
        sampling: SamplingConfig,
        filters: FiltersConfig | None = None,
        reward_workers: int = 4,
    ) -> None:
        self.domains = domains
        self.sampler = sampler
        self.chat = chat
        self.sampling = sampling
        self.filters = filters if filters is not None else FiltersConfig()
        self.scorer = Scorer(domains, reward_workers)
        self.timer: Timer = _untimed
        self.routed_experts = False  # whether rollouts carry the experts that the sampler used
        self.environments = Workers(reward_workers, "environment")
        self.environment_deadline_s = ENVIRONMENT_DEADLINE_S

    def close(self) -> None:
        """End the threads; one whose environment hangs is left behind."""
        self.scorer.close()
        self.environments.close()

    def collect(self, take: TakeTasks, prompts: int, group_size: int, seed: int, step: int) -> Collected:
        """One step's groups: `prompts` of them, in the order in which their tasks started.

        With `filters.dynamic` groups without differing rewards are replaced until the batch is full, at most
        `filters.max_refills` further calls of `take`; without it every group stays and only too long prompts are
        replaced.
        """
        run = _Run(self, take, prompts, group_size, Draws(seed, step))
        try:
            while run.start_missing():
                run.play_round()
                if self.filters.dynamic:
                    run.judge()
            run.judge()
        finally:
            run.close()
        counts = run.counts
        return Collected(
            groups=tuple(group for _, group in sorted(run.kept.items())),
            dropped=dict(counts.dropped),
            tokens=counts.tokens,
            rollouts=counts.rollouts,
            invalid=counts.invalid.total(),
            refills=counts.refills,
            sampling_seconds=counts.sampling_seconds,
            reward_seconds=counts.reward_seconds,
        )

    def evaluate_tasks(self, tasks: Sequence[Task], samples_per_task: int, seed: int) -> list[Rollout]:
        """Scored rollouts of every task, sample by sample, nothing filtered or replaced: what a benchmark averages."""
        for task in tasks:
            length = len(self.chat.prompt_ids(task))
            limit = min(self.sampling.max_prompt_tokens, self.sampling.max_total_tokens - 1)
            if length > limit:
                raise UserError(
                    f"sampling.max_prompt_tokens: the prompt of task {task.id} has {length} tokens, {limit} are "
                    "allowed; raise it (and max_total_tokens) or drop the task"
                )
        draws = Draws(seed, EVALUATION)
        run = _Run(self, lambda count, attempt: () if attempt else tasks, len(tasks), samples_per_task, draws)
        try:
            while run.start_missing():
                run.play_round()
            run.judge(plain=True)
        finally:
            run.close()
        return [rollout for _, group in sorted(run.kept.items()) for rollout in group.rollouts]


EVALUATION = -1  # stands for the step in the seeds of an evaluation


@dataclass(frozen=True)
class Draws:
    """What all request seeds of a step have in common."""

    seed: int
    step: int


class _Run:
    """The state of one `collect`: which tasks wait, play, are being scored, or are done."""

    def __init__(self, collector: Collector, take: TakeTasks, prompts: int, group_size: int, draws: Draws) -> None:
        self.collector = collector
        self.take = take
        self.target, self.group_size, self.draws = prompts, group_size, draws
        self.waiting: deque[Task] = deque(take(prompts, 0))
        self.started = 0
        self.streams: Counter[str] = Counter()
        self.active: list[Conversation] = []
        self.beginning: list[tuple[Conversation, Call[Episode]]] = []
        self.unjudged: list[int] = []
        self.kept: dict[int, Group] = {}
        self.counts = _Counts()
        sampling = collector.sampling
        self.params = SamplingParams(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_ids=tuple(collector.chat.stop_ids),
            logprobs=sampling.logprobs,
            routed_experts=collector.routed_experts,
        )

    def start_missing(self) -> bool:
        """Start as many tasks as the batch still lacks; False when it lacks none."""
        playing = {conversation.group for conversation in self.active} | set(self.unjudged)
        missing = self.target - len(self.kept) - len(playing)
        while missing > 0:
            if not self.waiting:
                self._refill()
            missing -= self._start(self.waiting.popleft())
        for conversation, call in self.beginning:
            with self._environment_of(conversation, "begin"):
                conversation.episode = self._from_environment(call)
        self.beginning = []
        return bool(self.active)

    def _start(self, task: Task) -> int:
        """Begin the rollouts of a task; 0 when its prompt is too long."""
        if task.domain not in self.collector.domains:
            raise UserError(f"task {task.id}: no domain {task.domain!r} is loaded; add it to data.domains")
        prompt = self.collector.chat.prompt_ids(task)
        sampling = self.collector.sampling
        if len(prompt) > sampling.max_prompt_tokens or len(prompt) >= sampling.max_total_tokens:
            self.counts.dropped["prompt_too_long"] += 1
            return 0
        domain = self.collector.domains[task.domain]
        turns = domain.turns(task) if isinstance(domain, SingleTurn) else domain.max_turns
        group, self.started = self.started, self.started + 1
        for sample in range(self.group_size):
            stream = self.streams[task.id]
            self.streams[task.id] += 1
            conversation = Conversation(task, group, sample, stream, None, turns, list(prompt))
            self.active.append(conversation)
            if domain.max_turns == 1:
                conversation.episode = domain.begin(task)  # holds nothing and waits for nothing
            else:
                self.beginning.append((conversation, self.collector.environments.submit(partial(domain.begin, task))))
        return 1

    def _refill(self) -> None:
        """Ask for more tasks, within the allowed number of refills."""
        filters = self.collector.filters
        more = self.take(self.target, self.counts.refills + 1) if self.counts.refills < filters.max_refills else ()
        if not more:
            dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.dropped.items())) or "none"
            raise UserError(
                f"filters.max_refills: after {self.counts.refills} refills only {len(self.kept)} of {self.target} "
                f"groups are usable (dropped: {dropped}); raise filters.max_refills or group_size, or give easier or "
                "harder tasks"
            )
        self.counts.refills += 1
        self.waiting.extend(more)

    def play_round(self) -> None:
        """Sample one turn of every active conversation, let environments answer, hand finished rollouts to the
        scorer.
        """
        collector, sampling = self.collector, self.collector.sampling
        playing = [conversation for conversation in self.active if not conversation.finished]
        requests = [
            conversation.request(self.draws.seed, self.draws.step, sampling.max_new_tokens, sampling.max_total_tokens)
            for conversation in playing
        ]
        asked: list[tuple[Conversation, Call[Reply]]] = []
        began = time.perf_counter()
        with collector.timer("sampling"):
            for index, completion in collector.sampler.sample(requests, self.params) if requests else ():
                conversation = playing[index]
                conversation.seconds += time.perf_counter() - began
                conversation.hear(completion, collector.chat)
                self.counts.tokens += len(completion.token_ids)
                if conversation.max_turns == 1 and not conversation.lost:
                    self._answer(conversation)
                elif not conversation.finished:  # in a thread, so that a slow one does not hold up decoding
                    asked.append((conversation, collector.environments.submit(conversation.ask)))
            for conversation, call in asked:
                with self._environment_of(conversation, f"answer turn {conversation.turns}"):
                    reply = self._from_environment(call)
                    conversation.take(reply, collector.chat, sampling.max_total_tokens)
        self.counts.sampling_seconds += time.perf_counter() - began
        for conversation, request in zip(playing, requests, strict=True):
            sent = tuple(conversation.token_ids[: len(request.token_ids)])
            assert sent == request.token_ids, f"{conversation.task.id}: a turn rewrote its prompt"
        self._hand_over()

    def _hand_over(self) -> None:
        """Give finished conversations of several turns to the scorer (those of one turn went there at once)."""
        played = self.active
        for conversation in played:
            if conversation.finished and (conversation.max_turns > 1 or conversation.lost):
                self._finish(conversation)
        self.active = [conversation for conversation in played if not conversation.finished]
        playing = {conversation.group for conversation in self.active}
        self.unjudged += sorted({conversation.group for conversation in played} - playing)

    @contextmanager
    def _environment_of(self, conversation: Conversation, what: str) -> Iterator[None]:
        """Lose the rollout when its environment does not do `what` within the deadline."""
        try:
            yield
        except CallLost:
            task, deadline_s = conversation.task, self.collector.environment_deadline_s
            conversation.lose(
                f"the environment of domain {task.domain} did not {what} within {deadline_s:g} s (task {task.id})"
            )

    def _from_environment(self, call: Call[T]) -> T:
        return self.collector.environments.result(call, self.collector.environment_deadline_s)

    def _answer(self, conversation: Conversation) -> None:
        if not conversation.finished:
            conversation.take(conversation.ask(), self.collector.chat, self.collector.sampling.max_total_tokens)
        assert conversation.finished, f"{conversation.task.id}: a domain of one turn answered the model"
        self._finish(conversation)

    def _finish(self, conversation: Conversation) -> None:
        episode = conversation.episode
        if episode is not None and conversation.lost:
            self.collector.environments.submit(episode.close)  # nobody waits for an environment that hangs
        elif episode is not None:
            episode.close()
        self.collector.scorer.add(conversation.group, conversation.rollout(), self.group_size)

    def close(self) -> None:
        """Free the environments of conversations that an error cut short."""
        for conversation in self.active:
            if not conversation.finished and conversation.episode is not None:
                conversation.episode.close()

    def judge(self, plain: bool = False) -> None:
        """Take the verdicts of complete groups and keep or drop each. `plain`: keep all of them as they are."""
        began = time.perf_counter()
        with self.collector.timer("reward"):
            scored = [(group, self.collector.scorer.result(group)) for group in self.unjudged]
        self.counts.reward_seconds += time.perf_counter() - began
        self.unjudged = []
        filters = self.collector.filters
        for index, rollouts_G in scored:
            self.counts.rollouts += len(rollouts_G)
            self.counts.invalid.update(item.outcome.reason for item in rollouts_G if isinstance(item.outcome, Invalid))
            if plain:
                self.kept[index] = make_group(rollouts_G, "neither", None)
                continue
            group = make_group(rollouts_G, filters.overlong, filters.mask_groups_below_max)
            reason = why_dropped(group, filters.mask_groups_below_max)
            if filters.dynamic or not any(group.in_loss):
                self.counts.dropped.update([reason] if reason else [])
            if not (filters.dynamic and reason):
                self.kept[index] = group
        if not plain and self.counts.rollouts >= self.target * self.group_size:
            check_invalid_share(self.counts.invalid, self.counts.rollouts, filters.max_invalid_share)
