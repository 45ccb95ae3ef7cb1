"""What a training loop writes while it runs: one JSON line per step, timers, rollouts, trackers, the progress line.

A killed run may have written steps that its last checkpoint does not know; `remaining` takes those lines back, so
that the files of a resumed run are those of a run that was never killed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from nemo_cascade.config.paths import explain_os_error, write_atomic
from nemo_cascade.config.schema import TrackersConfig
from nemo_cascade.observe.first_step import FirstStep
from nemo_cascade.observe.metrics import combine
from nemo_cascade.observe.progress import ProgressLine
from nemo_cascade.observe.rollouts import drop_rollouts, write_rollouts
from nemo_cascade.observe.summary import summarise
from nemo_cascade.observe.trackers import Tracker, open_trackers
from nemo_cascade.types import Group

LOG = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.json"


class Collected(Protocol):
    """What a step collected, as far as the record needs it; `rollout.collect.Collected` is one."""

    @property
    def groups(self) -> Sequence[Group]:
        """This rank's groups."""

    @property
    def tokens(self) -> int:
        """Tokens sampled, those of dropped groups included."""

    def metrics(self) -> dict[str, float]:
        """Counts that the groups do not tell: groups dropped by reason, refills."""

    @property
    def sampling_seconds(self) -> float:
        """Time inside the Sampler."""

    @property
    def reward_seconds(self) -> float:
        """Time spent waiting for verdicts."""


def alone(metrics: dict[str, float]) -> list[dict[str, float]]:
    """The gather of a world of one rank."""
    return [metrics]


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the Learner's ranks.

    `replica` is the data-parallel replica whose rollouts this rank keeps, None where another rank of the replica
    keeps them.
    `gather` brings the metrics of every rank together; every rank calls it at every step.
    """

    rank: int = 0
    replica: int | None = 0
    gather: Callable[[dict[str, float]], list[dict[str, float]]] = alone


class RunRecord:
    """The record of one stage. Every rank holds one; rank 0 writes, the others only the rollouts of their replica.

    `folder` is the stage folder. `task_counts` is asked at every step for what the task stream counted (prompts that
    were dropped), `service_counts` for what judges counted since the last step. Timers are exclusive: time spent in an
    inner timer is not counted in the outer one, so the parts of a step never add up to more than its wall clock.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        num_steps: int,
        trackers: TrackersConfig | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.folder = folder
        self.stage = stage
        self.num_steps = num_steps
        self.config = trackers or TrackersConfig()
        self.ranks = ranks or Ranks()
        self.writes = self.ranks.rank == 0
        self.progress = ProgressLine(stage, num_steps)
        self.trackers: list[Tracker] = []
        self.file: TextIO | None = None
        self.seconds: dict[str, float] = {}
        self.inner: list[float] = []  # one entry per open timer: seconds spent in timers inside it
        self.task_counts: Callable[[], Mapping[str, float]] = dict
        self.service_counts: Callable[[], Mapping[str, float]] = dict
        self.rollouts_every = 1
        self.first_step: FirstStep | None = None  # checked once per process, so also after a resume
        self.checksum = ""
        self.step_started = time.perf_counter()

    def remaining(self, start: int = 0) -> Iterator[int]:
        """The steps that are still to do: `start` to `num_steps` - 1. Forgets what was written for them before."""
        self._open(start)
        try:
            yield from range(start, self.num_steps)
        finally:
            self.close()

    def refitted(self, checksum: str) -> None:
        """The checksum of the weights that the Sampler now holds."""
        self.checksum = checksum

    def step(self, step: int, metrics: Mapping[str, float], collected: Collected | None = None) -> dict[str, float]:
        """Write a finished step: its metrics, the summary of what was collected, its timers; returns the whole line.

        `metrics` hold for the whole run already (the Learner sums over ranks) and win over a summary of the same
        name; the summary of `collected` is combined over ranks here. Numbers that are not finite become null.
        """
        line: dict[str, float] = {"step": step}
        if collected is not None:
            line |= combine(self.ranks.gather(self._describe(collected)))
            # Where the collector was given no timer, its own clock tells the same.
            self.seconds.setdefault("sampling", collected.sampling_seconds)
            self.seconds.setdefault("reward", collected.reward_seconds)
            # `tokens` are those sampled; the Learner's count has the prompts in it.
            metrics = {"packed_tokens" if name == "tokens" else name: value for name, value in metrics.items()}
        line |= metrics
        now = time.perf_counter()
        total = now - self.step_started
        line |= {f"seconds/{name}": spent for name, spent in self.seconds.items()}
        line["seconds/total"] = total
        if "tokens" in line and total > 0:
            line["tokens_per_second"] = line["tokens"] / total
        self.seconds = {}
        self.step_started = now
        if self.writes:
            self._write(step, line, total)
        self._first(line)
        return line

    def _first(self, line: Mapping[str, float]) -> None:
        """Say and check what the first step of this process measured; every rank holds the same numbers."""
        first, self.first_step = self.first_step, None
        if first is None:
            return
        if self.writes:
            LOG.info("%s: first step: %s", self.stage, first.sentence(line, self.checksum))
        first.check(self.stage, line)

    def _describe(self, collected: Collected) -> dict[str, float]:
        if self.ranks.replica is None:
            return {}
        line = summarise(collected.groups) | {"tokens": float(collected.tokens)}
        return line | collected.metrics() | dict(self.task_counts()) | dict(self.service_counts())

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the time inside to the span `name` of the current step (`observe.metrics.SPANS` or any other)."""
        started = time.perf_counter()
        self.inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            own = elapsed - self.inner.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + own
            if self.inner:
                self.inner[-1] += elapsed

    def rollouts(
        self, step: int, groups_P: Sequence[Group], advantages_P_G: Sequence[Sequence[float | None]] = ()
    ) -> None:
        """Keep the rollouts of every `rollouts_every`-th step and of the last, complete enough to train on again."""
        kept = step % self.rollouts_every == 0 or step == self.num_steps - 1
        if kept and self.ranks.replica is not None:
            write_rollouts(self.folder, step, groups_P, advantages_P_G, self.ranks.replica)

    def close(self) -> None:
        """Write the time spent outside steps, end the trackers. Called by `remaining`; a second call does nothing."""
        self.progress.stop()
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.writes and self.seconds:
            add_timing(self.folder, self.seconds)
            self.seconds = {}

    def _open(self, start: int) -> None:
        self.step_started = time.perf_counter()
        if self.ranks.replica is not None:
            drop_rollouts(self.folder, start, self.ranks.replica)
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_steps_before(self.folder / METRICS_FILE, start)
        if start == 0:
            (self.folder / TIMING_FILE).unlink(missing_ok=True)
        self.trackers = open_trackers(self.folder, self.stage, start, self.config)
        self.file = (self.folder / METRICS_FILE).open("a")
        self.progress.start(start)

    def _write(self, step: int, line: Mapping[str, float], seconds: float) -> None:
        if self.file is None:
            raise ValueError(f"{self.stage}: step {step} was recorded outside `for step in record.remaining(start)`")
        finite = {name: value for name, value in line.items() if math.isfinite(value)}
        try:
            self.file.write(json.dumps({name: finite.get(name) for name in line}) + "\n")
            self.file.flush()
        except OSError as error:
            raise explain_os_error(error, self.folder / METRICS_FILE) from error
        scalars = {name: value for name, value in finite.items() if name != "step"}
        for tracker in self.trackers:
            tracker.log(step, scalars)
        self.progress.update(step, seconds, scalars)


def add_timing(folder: Path, seconds: Mapping[str, float]) -> None:
    """Add time spent outside steps to the stage's timing.json."""
    path = folder / TIMING_FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    summed = {name: known.get(name, 0.0) + spent for name, spent in seconds.items()}
    write_atomic(path, json.dumps(known | summed) + "\n")


@contextmanager
def timed(folder: Path, name: str) -> Iterator[None]:
    """Time something that a stage does after its loop, such as `evaluation`. For one rank only."""
    started = time.perf_counter()
    try:
        yield
    finally:
        add_timing(folder, {name: time.perf_counter() - started})


def keep_steps_before(path: Path, start: int) -> None:
    """Drop the lines of steps at or after `start`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) < start]
    write_atomic(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf


def read_metrics(folder: Path) -> list[dict[str, float | None]]:
    """The lines of a stage's metrics.jsonl, whole ones only; an empty list before the first step."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < math.inf]
