"""One score per task for a checkpoint: every domain's `select` and `report` tasks, thinking and instruct modes apart.

The tasks are the same for every checkpoint, cascade and seed, so that any two checkpoints can be compared task by task.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_cascade.config.paths import write_atomic
from nemo_cascade.config.schema import EvaluationConfig, FiltersConfig, SamplingConfig
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.tasks import FileTasks
from nemo_cascade.protocols import Domain, Sampler
from nemo_cascade.rollout.collect import Collector
from nemo_cascade.types import Invalid, Json, Rollout, Split, Task

BENCHMARK_SEED = 0  # of tasks and draws: a benchmark is fixed, it does not follow the run's seed
MODES = {True: "thinking", False: "instruct"}

Row = dict[str, Json]


class Benchmark:
    """Evaluates the weights that a sampler holds. A context manager: it owns the threads that score.

    `select` tasks decide (gates, teachers); `report` tasks are only shown, in the domain's own mode, and the first
    `other_mode` of them in the other mode too.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        domains: Mapping[str, Domain],
        sampler: Sampler,
        chat: ChatTokenizer,
        workers: int,
    ) -> None:
        self.config = config
        # Rows carry the name in the config, which gates and teachers ask for; an outside domain has another of its own.
        self.tasks = [
            (name, split, task)
            for name in config.domains
            for split, task in benchmark_tasks(domains[name], config, config.files.get(name))
        ]
        sampling = SamplingConfig(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
            max_prompt_tokens=1 << 30, max_total_tokens=1 << 30,
        )  # fmt: skip
        self.collector = Collector(domains, sampler, chat, sampling, FiltersConfig(), workers)

    def __enter__(self) -> Benchmark:
        return self

    def __exit__(self, *exception: object) -> None:
        self.collector.close()

    def run(self, replica: int = 0, replicas: int = 1) -> list[Row]:
        """Rows of this replica's share of the tasks, each task sampled once."""
        mine = self.tasks[replica::replicas]
        rollouts = self.collector.evaluate_tasks([task for _, _, task in mine], 1, BENCHMARK_SEED)
        return [row_of(name, split, rollout) for (name, split, _), rollout in zip(mine, rollouts, strict=True)]

    @staticmethod
    def write(path: Path, rows: Sequence[Row]) -> None:
        """The evaluation file of one checkpoint, complete or absent."""
        ordered = sorted(
            rows, key=lambda row: (str(row["domain"]), str(row["split"]), str(row["mode"]), str(row["task_id"]))
        )
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in ordered))


def benchmark_tasks(
    domain: Domain, config: EvaluationConfig, paths: Sequence[str] | None
) -> list[tuple[Split, Task]]:
    """A domain's fixed tasks: generated ones, or the rows of its `evaluation.files`.

    A task in the other mode has an id of its own, because the id seeds its draws: they must not depend on whether its
    twin is answered by the same rank.
    """
    if paths:
        rows = FileTasks(domain, paths).tasks
        return [("report", task) for task in rows[: config.report]]
    chosen: list[tuple[Split, Task]] = []
    counts: tuple[tuple[Split, int], ...] = (("select", config.select), ("report", config.report))
    for split, count in counts:
        chosen += [(split, task) for task in domain.tasks(split, count, BENCHMARK_SEED)] if count else []
    reported = [task for split, task in chosen if split == "report"][: config.other_mode]
    return chosen + [
        ("report", dataclasses.replace(task, id=f"{task.id}/other", thinking=not task.thinking)) for task in reported
    ]


def row_of(name: str, split: Split, rollout: Rollout) -> Row:
    """One line of an evaluation file."""
    invalid = isinstance(rollout.outcome, Invalid)
    return {
        "domain": name, "split": split, "mode": MODES[rollout.task.thinking], "task_id": rollout.task.id,
        "score": 0.0 if invalid else rollout.reward, "valid": not invalid, "tokens": rollout.num_sampled,
    }  # fmt: skip
