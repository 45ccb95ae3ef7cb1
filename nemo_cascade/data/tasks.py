"""The tasks of a stage: generated ones, released rows, and a mixture of both that any step can be asked for.

Nothing is remembered between steps: step k gets the same tasks in a fresh run and after a resume.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from nemo_cascade.config.schema import DataConfig
from nemo_cascade.data.mixture import check_weights, slots
from nemo_cascade.data.rows import AGENTS, agent_domain, read_jsonl
from nemo_cascade.protocols import Domain
from nemo_cascade.types import Json, Split, Task, UserError


class PromptLimit:
    """Drops tasks whose prompt is longer than `max_tokens`, or shorter than its domain's entry of `least`.

    `dropped` counts the long ones by domain and `too_short` the short ones, each task once.
    """

    def __init__(
        self, prompt_ids: Callable[[Task], Sequence[int]], max_tokens: int, least: Mapping[str, int] = {}
    ) -> None:
        self._prompt_ids = prompt_ids
        self._max_tokens = max_tokens
        self._least = dict(least)
        self._seen: set[str] = set()
        self.dropped: Counter[str] = Counter()
        self.too_short: Counter[str] = Counter()

    def keeps(self, task: Task) -> bool:
        """Whether the prompt fits."""
        return self.side(task) == 0

    def side(self, task: Task) -> int:
        """1 for a prompt that is too long, -1 for one that is too short, 0 for one that fits."""
        length = len(self._prompt_ids(task))
        side = (length > self._max_tokens) - (length < self._least.get(task.domain, 0))
        if side and task.id not in self._seen:
            self._seen.add(task.id)
            (self.dropped if side > 0 else self.too_short)[task.domain] += 1
        return side

    def metrics(self) -> dict[str, float]:
        """The counts so far for metrics.jsonl: all that were too long, and by domain where there are any."""
        line = {"prompts_dropped": float(self.dropped.total())}
        for name, counter in (("prompts_dropped", self.dropped), ("prompts_too_short", self.too_short)):
            line |= {f"{name}/{domain}": float(count) for domain, count in sorted(counter.items())}
        return line

    def said(self) -> list[str]:
        """What was dropped, in a line for either bound."""
        bounds = (("over sampling.max_prompt_tokens", self.dropped), ("under min_prompt_tokens", self.too_short))
        return [
            f"prompts {bound} were dropped: "
            + ", ".join(f"{number} of {domain}" for domain, number in sorted(counter.items()))
            for bound, counter in bounds
            if counter
        ]


def least_tokens(domains: Mapping[str, Domain]) -> dict[str, int]:
    """Domain -> fewest tokens of its prompts, where it has an option `min_prompt_tokens`."""
    options = {domain.name: getattr(domain, "options", {}) for domain in domains.values()}
    return {name: int(own["min_prompt_tokens"]) for name, own in options.items() if own.get("min_prompt_tokens")}


class TaskSource(Protocol):
    """Tasks of one domain in an order that a position and a seed fix."""

    def take(self, position: int, count: int, seed: int, without: Collection[str]) -> list[Task]:
        """Up to `count` distinct tasks with no id of `without`."""


class GeneratedTasks:
    """A domain's own generator: endless, so `position` is not needed."""

    def __init__(self, domain: Domain, split: Split = "train", limit: PromptLimit | None = None) -> None:
        self._domain = domain
        self._split: Split = split
        self._limit = limit

    def take(self, position: int, count: int, seed: int, without: Collection[str]) -> list[Task]:
        """Fresh draws; UserError when no draw fits the prompt limit."""
        tasks: list[Task] = []
        seen = set(without)
        for attempt in range(8):
            for task in self._domain.tasks(self._split, count, seed + attempt):
                if task.id not in seen and (self._limit is None or self._limit.keeps(task)):
                    seen.add(task.id)
                    tasks.append(task)
            if len(tasks) >= count:
                return tasks[:count]
        if tasks:
            return tasks
        raise UserError(
            f"domain {self._domain.name}: none of its generated prompts fits sampling.max_prompt_tokens; raise it"
        )


class FileTasks:
    """Released rows, each epoch in another order; duplicates are read once.

    Some released files mix domains: a row whose `agent_ref` names another one is left to that domain. `skipped` counts
    those rows by domain, `too_long` and `too_short` the prompts out of their bounds.
    """

    def __init__(self, domain: Domain, paths: Sequence[str], limit: PromptLimit | None = None) -> None:
        self._name = domain.name
        self.skipped: Counter[str] = Counter()
        self.too_long = self.too_short = 0
        found: dict[str, Task] = {}
        for path in paths:
            for where, row in read_jsonl(path):
                owner = agent_domain(row)
                if owner is not None and owner != domain.name and domain.name in AGENTS.values():
                    self.skipped[owner] += 1
                    continue
                for task in _tasks_of(domain, row, where):
                    side = 0 if limit is None else limit.side(task)
                    self.too_long += side > 0
                    self.too_short += side < 0
                    if side == 0:
                        found.setdefault(task.id, task)
        if not found:
            raise UserError(f"data.files.{domain.name}: {self._why_empty(paths)}")
        self.tasks = list(found.values())

    def _why_empty(self, paths: Sequence[str]) -> str:
        """Where the rows went, and what would bring some back."""
        gone = [f"{count} are {domain} rows by their agent_ref" for domain, count in sorted(self.skipped.items())]
        if self.too_long:
            gone.append(f"{self.too_long} prompts are over sampling.max_prompt_tokens; raise it")
        if self.too_short:
            option = f"data.options.{self._name}.min_prompt_tokens"
            gone.append(f"{self.too_short} prompts are under {option}; lower it")
        return f"no row of {', '.join(paths)} is left: {'; '.join(gone) or 'there are none'}"

    def take(self, position: int, count: int, seed: int, without: Collection[str]) -> list[Task]:
        """The next rows at `position` of the endless shuffled order; fewer when the file has no others."""
        tasks: list[Task] = []
        seen = set(without)
        size = len(self.tasks)
        for at in range(position, position + 2 * size):
            if len(tasks) == count:
                break
            task = self.tasks[self._order(at // size)[at % size]]
            if task.id not in seen:
                seen.add(task.id)
                tasks.append(task)
        return tasks

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.tasks)))
        random.Random(f"{self._name}/epoch {epoch}").shuffle(order)
        return order


def _tasks_of(domain: Domain, row: Mapping[str, Json], where: str) -> list[Task]:
    """The tasks of a row: more than one for a domain whose `parse_rows` makes several prompts of it."""
    several = getattr(domain, "parse_rows", None)
    return several(row, where) if several is not None else [domain.parse_row(row, where)]


class TaskStream:
    """An endless mixture of task sources, addressed by step.

    `weights` are shares of the prompts. Rank r of `world` gets every world-th prompt of the step. Inside a step no task
    comes twice on a rank, refills included: what attempts 0..n-1 of the step gave is kept until another step is asked
    for.
    """

    def __init__(
        self, sources: Mapping[str, TaskSource], weights: Mapping[str, float], seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self._sources = dict(sources)
        self._shares = check_weights("data.domains", weights)
        missing = sorted(set(self._shares) - set(self._sources))
        if missing:
            raise UserError(f"data.domains: no tasks for {', '.join(missing)}")
        self._seed, self._rank, self._world = seed, rank, world
        self._step = -1
        self._given: set[str] = set()

    def take(self, step: int, count: int, attempt: int = 0) -> list[Task]:
        """This rank's `count` tasks of a step. `attempt` > 0 refills: others, fewer when a file has no more rows."""
        if step != self._step or attempt == 0:
            self._step, self._given = step, set()
        total = count * self._world
        scope = f"{self._seed}/{step}/{attempt}" + (f"/{self._rank}" if attempt else "")
        rng = random.Random(scope)
        order = slots(self._shares, total, rng)
        queues: dict[str, list[Task]] = {}
        for name, wanted in sorted(Counter(order).items()):
            position = int(step * total * self._shares[name]) + attempt * wanted
            queues[name] = self._sources[name].take(position, wanted, rng.getrandbits(48), self._given)
            if attempt == 0 and len(queues[name]) < wanted:
                raise UserError(
                    f"data.files.{name}: only {len(queues[name])} rows for {wanted} prompts of a step; add rows"
                )
        tasks = [queues[name].pop(0) for name in order if queues[name]]
        self._given.update(task.id for task in tasks)
        return tasks[self._rank :: self._world]

    def refill(self, step: int, attempt: int, count: int) -> list[Task]:
        """`take` in the order of arguments that a refill loop counts in."""
        return self.take(step, count, attempt)


def task_stream(
    data: DataConfig,
    domains: Mapping[str, Domain],
    seed: int,
    limit: PromptLimit | None = None,
    rank: int = 0,
    world: int = 1,
) -> TaskStream:
    """The stream a stage file describes: rows where `data.files` names the domain, its generator elsewhere."""
    sources: dict[str, TaskSource] = {}
    for name in data.domains:
        paths = data.files.get(name)
        sources[name] = FileTasks(domains[name], paths, limit) if paths else GeneratedTasks(domains[name], limit=limit)
    unused = sorted(set(data.files) - set(data.domains))
    if unused:
        raise UserError(f"data.files.{unused[0]}: the domain has no weight in data.domains; add it there")
    return TaskStream(sources, data.domains, seed, rank, world)
