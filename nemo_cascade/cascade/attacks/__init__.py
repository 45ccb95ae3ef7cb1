"""The battery of attacks on rewards: what gains reward without the skill, outlives its deadline or harms others.

`battery` collects what applies to a domain: its own known hacks, answers that every domain must refuse, and the tables
of this package by kind. `assault` runs one attack with an honest submission beside it and says what gave way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nemo_cascade.cascade.attacks.survivors import Watch
from nemo_cascade.protocols import Domain
from nemo_cascade.types import Case, Invalid, Json, Outcome, Task, Transcript

HONEST_REWARD = 1e-9  # how far an honest submission's reward may be from what it must be
OWN_SECONDS = 10.0
"""CPU time that one verdict may take in the process that asks for it: sandboxes and workers count their own."""
WALL_SECONDS = 180.0
FIRST_PAUSE_SECONDS = 0.1  # between honest submissions beside a hungry attack; each is twice the one before


@dataclass(frozen=True)
class Attack:
    """One attempt. `most` is the largest reward it may earn (None: any, it only has to end in time); `score` and
    `honest` each give a verdict by themselves, on instances that remember nothing.
    """

    name: str
    score: Callable[[], Outcome]
    honest: Callable[[], Outcome]
    honest_reward: float = 1.0
    most: float | None = 0.0
    slow: bool = False  # waits for a clock or uses up an allowance: seconds, whatever the machine
    hungry: bool = False  # takes what neighbours need: honest submissions are scored beside it until it has ended
    sandboxed: bool = False  # runs programs: nothing of them may be left when it has ended


@dataclass(frozen=True)
class Held:
    """What became of an attack; `breach` is empty when it gained nothing, harmed nobody and left nothing behind.

    `beside`: the honest submissions that got their verdict while the attack ran.
    """

    attack: str
    breach: str
    outcome: str
    seconds: float
    beside: int = 0


@dataclass
class _Attempt:
    """One verdict in a thread of its own. A context manager in it keeps whatever is raised: all of it is a breach."""

    score: Callable[[], Outcome]
    outcome: Outcome | None = None
    problem: str = ""
    own_seconds: float = 0.0
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        started = time.thread_time()
        with self:
            self.outcome = self.score()
        self.own_seconds = time.thread_time() - started

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: object) -> bool:
        if problem is not None:
            self.problem = f"{type(problem).__name__} escaped: {problem}"[:300]
        return True


def assault(attack: Attack) -> Held:
    """Run an attack and, at the same time, honest submissions; all must end as they should."""
    watch = Watch() if attack.sandboxed else None
    started = time.monotonic()
    attempt = _Attempt(attack.score)
    neighbours = _Neighbours(attack, attempt.thread)
    honest = _Attempt(neighbours.score)
    for running in (attempt, honest):
        running.thread.join(max(0.0, started + WALL_SECONDS - time.monotonic()))
    seconds = time.monotonic() - started
    breach = _breach(attack, attempt) or _harm(attack, honest) or (_remains(watch) if watch else "")
    return Held(attack.name, breach, _words(attempt.outcome), seconds, neighbours.beside)


@dataclass
class _Neighbours:
    """Honest submissions beside an attack: one, or beside a hungry one another and another until it has ended."""

    attack: Attack
    running: threading.Thread
    beside: int = 0

    def score(self) -> Outcome:
        """The first verdict that is not as it must be, else the last."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            outcome = self.attack.honest()
            alive = self.running.is_alive()
            self.beside += alive
            if _unlike(self.attack, outcome) or not (self.attack.hungry and alive):
                return outcome
            self.running.join(pause)
            pause *= 2


def _remains(watch: Watch) -> str:
    left = watch.left()
    return f"processes remain: {', '.join(left[:5])}" if left else ""


def _breach(attack: Attack, attempt: _Attempt) -> str:
    if attempt.thread.is_alive():
        return f"no verdict within {WALL_SECONDS:g} s"
    if attempt.outcome is None:
        return attempt.problem
    if attempt.own_seconds > OWN_SECONDS:
        return f"the verdict took {attempt.own_seconds:.1f} s of CPU"
    if isinstance(attempt.outcome, Invalid) or attack.most is None:
        return ""
    return f"earned {_words(attempt.outcome)}" if attempt.outcome.reward > attack.most else ""


def _harm(attack: Attack, honest: _Attempt) -> str:
    outcome = honest.outcome
    if outcome is None:
        return f"an honest submission beside it got no verdict: {honest.problem or 'too late'}"
    if _unlike(attack, outcome):
        return f"an honest submission beside it got {_words(outcome)}"
    return ""


def _unlike(attack: Attack, outcome: Outcome) -> bool:
    """Whether an honest submission got another reward than it must."""
    return isinstance(outcome, Invalid) or abs(outcome.reward - attack.honest_reward) > HONEST_REWARD


def _words(outcome: Outcome | None) -> str:
    if outcome is None:
        return "no verdict"
    if isinstance(outcome, Invalid):
        return f"invalid ({outcome.reason})"
    return f"{outcome.reward:g} ({outcome.reason})"


@dataclass(frozen=True)
class Target:
    """A domain under attack. `fresh` builds it anew, so that no remembered verdict stands for a real one."""

    name: str
    fresh: Callable[[Mapping[str, Json]], Domain]

    def attack(self, name: str, case: Case, transcript: Transcript, **more: object) -> Attack:
        """`transcript` in the place of a gold case's, scored beside it. More: fields of Attack, and `options`."""
        options = more.pop("options", {})
        score = self.scorer(case.task, transcript, options)
        return Attack(name, score, self.scorer(case.task, case.transcript, options), case.reward, **more)

    def scorer(self, task: Task, transcript: Transcript, options: Mapping[str, Json] = {}) -> Callable[[], Outcome]:
        """The verdict on one transcript by an instance of its own."""
        return lambda: self.fresh(options).score(task, transcript)
