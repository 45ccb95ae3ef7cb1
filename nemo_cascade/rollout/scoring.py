"""Rewards while other rollouts are still being decoded: a thread pool over the domains' scoring.

Threads only wait here: domains run whatever can hang or burn the processor (user code, symbolic algebra, a judge) in
processes or behind timeouts of their own. A verdict that does not come within the deadline is Invalid, never reward 0,
and holds up neither the step nor the end of the process.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from nemo_cascade.domains import SingleTurn
from nemo_cascade.protocols import Domain
from nemo_cascade.rollout.conversation import UNSCORED
from nemo_cascade.rollout.workers import Call, CallLost, Workers
from nemo_cascade.types import Invalid, Outcome, Rollout

INVALID_RETRIES = 2  # an Invalid verdict (wall clock, judge down) is asked for again this often
DEADLINE_S = 600.0  # for one verdict, retries included, from the moment it is asked for


@dataclass
class _Pending:
    rollouts: list[Rollout]
    call: Call[list[Rollout]]


class Scorer:
    """Scores rollouts of groups. Give it rollouts as they finish; ask for a group when all of it was given."""

    def __init__(self, domains: Mapping[str, Domain], workers: int, deadline_s: float = DEADLINE_S) -> None:
        self.domains = domains
        self.deadline_s = deadline_s
        self._workers = Workers(workers, "reward")
        self._waiting: dict[int, list[Rollout]] = {}
        self._lost: dict[int, list[Rollout]] = {}
        self._pending: dict[int, list[_Pending]] = {}

    def close(self) -> None:
        """End the threads; one that hangs is left behind."""
        self._workers.close()

    def add(self, group: int, rollout: Rollout, group_size: int) -> None:
        """One more finished rollout. Rewards that look at the whole group start when it is complete, others at once.

        One that was lost while it was played stays Invalid, and the others are compared without it.
        """
        domain = self.domains[rollout.task.domain]
        pending = self._pending.setdefault(group, [])
        if type(domain).score_group is SingleTurn.score_group:
            if rollout.outcome is not UNSCORED:
                self._lost.setdefault(group, []).append(rollout)
            else:
                pending.append(self._start(domain, [rollout], False))
            return
        members = self._waiting.setdefault(group, [])
        members.append(rollout)
        if len(members) == group_size:
            members = sorted(self._waiting.pop(group), key=lambda item: item.sample)
            whole = [member for member in members if member.outcome is UNSCORED]
            self._lost[group] = [member for member in members if member.outcome is not UNSCORED]
            if whole:
                pending.append(self._start(domain, whole, True))

    def result(self, group: int) -> list[Rollout]:
        """The scored rollouts of a group in the order of their samples; waits at most the deadline."""
        assert group not in self._waiting, f"group {group} was asked for before it was complete"
        scored = [rollout for pending in self._pending.pop(group) for rollout in self._wait(pending)]
        scored += self._lost.pop(group, [])
        return sorted(scored, key=lambda rollout: rollout.sample)

    def _start(self, domain: Domain, rollouts: list[Rollout], as_group: bool) -> _Pending:
        return _Pending(rollouts, self._workers.submit(partial(_score, domain, rollouts, as_group)))

    def _wait(self, pending: _Pending) -> list[Rollout]:
        """The verdicts, or Invalid after the deadline: one for all, because who waits gives every overdue call up."""
        asked = [domain.verdict_deadline_s for domain in self.domains.values() if isinstance(domain, SingleTurn)]
        deadline_s = max([self.deadline_s, *asked])
        try:
            return self._workers.result(pending.call, deadline_s)
        except CallLost:
            verdict = Invalid(f"no verdict from domain {pending.rollouts[0].task.domain} after {deadline_s:g} s")
            return [rollout.with_outcome(verdict) for rollout in pending.rollouts]


def _score(domain: Domain, rollouts: list[Rollout], as_group: bool) -> list[Rollout]:
    """Ask for the verdicts, again while any is Invalid, and keep the attempt with the fewest Invalid ones."""
    started = time.perf_counter()
    best: list[Outcome] = []
    for _ in range(1 + INVALID_RETRIES):
        outcomes = _verdicts(domain, rollouts, as_group)
        if not best or _invalid(outcomes) < _invalid(best):
            best = outcomes
        if not _invalid(best):
            break
    each = (time.perf_counter() - started) / len(rollouts)
    return [
        dataclasses.replace(rollout, outcome=outcome, reward_seconds=each)
        for rollout, outcome in zip(rollouts, best, strict=True)
    ]


def _verdicts(domain: Domain, rollouts: Sequence[Rollout], as_group: bool) -> list[Outcome]:
    task = rollouts[0].task
    if as_group:
        return domain.score_group(task, [rollout.transcript for rollout in rollouts])
    return [domain.score(task, rollout.transcript) for rollout in rollouts]


def _invalid(outcomes: Sequence[Outcome]) -> int:
    return sum(isinstance(outcome, Invalid) for outcome in outcomes)
