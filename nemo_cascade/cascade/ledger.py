"""The table checkpoint x domain: what every checkpoint scored, task by task, so that comparisons can be paired.

Rows come from the evaluation files of finished stages. `select` rows decide (gates, teachers), `report` rows are only
shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.cascade.artifacts import STEP, StageFolder, read_lines
from nemo_cascade.evaluation.intervals import Recovery, Triple, bootstrap_mean, paired_difference, recovery
from nemo_cascade.types import Interval, UserError

Cell = tuple[str, str, str]  # domain, split, mode
FIELDS = ("domain", "split", "mode", "task_id", "score", "valid")
FINAL, INIT = "final", "init"


def checkpoint_name(stage: str, label: str) -> str:
    """The ledger's name of an evaluation file: `if_rl`, `if_rl@40`, `sft:init`."""
    if label == FINAL:
        return stage
    match = STEP.fullmatch(label)
    return f"{stage}@{int(match[1])}" if match else f"{stage}:{label}"


@dataclass(frozen=True)
class Ledger:
    """checkpoint -> (domain, split, mode) -> task id -> score. Invalid verdicts are left out of scores and counted
    apart.
    """

    scores: Mapping[str, Mapping[Cell, Mapping[str, float]]]
    invalid: Mapping[str, Mapping[Cell, int]]

    def modes(self, domain: str) -> list[str]:
        """Modes in which a domain was evaluated, its own (the one it trains in) first.

        Select tasks are drawn in the domain's own mode only, so they name it; without them the mode with most report
        tasks does.
        """
        weight: dict[str, tuple[int, int]] = {}
        for cells in self.scores.values():
            for (name, split, mode), tasks in cells.items():
                if name == domain:
                    selected, reported = weight.get(mode, (0, 0))
                    weight[mode] = (
                        (selected + len(tasks), reported) if split == "select" else (selected, reported + len(tasks))
                    )
        return sorted(weight, key=lambda mode: weight[mode], reverse=True)

    def domains(self, checkpoint: str) -> list[str]:
        """Domains that a checkpoint was evaluated on, in the order of its file."""
        return list(dict.fromkeys(domain for domain, _, _ in self.scores.get(checkpoint, {})))

    def tasks(self, checkpoint: str, domain: str, split: str, mode: str | None = None) -> Mapping[str, float]:
        """Task id -> score, in the domain's own mode unless `mode` says otherwise; empty when never evaluated."""
        if mode is None:
            modes = self.modes(domain)
            if not modes:
                return {}
            mode = modes[0]
        return self.scores.get(checkpoint, {}).get((domain, split, mode), {})

    def score(self, checkpoint: str, domain: str, split: str = "report", mode: str | None = None) -> Interval | None:
        """Mean score with its interval."""
        tasks = self.tasks(checkpoint, domain, split, mode)
        return bootstrap_mean(list(tasks.values())) if tasks else None

    def gain(
        self, checkpoint: str, reference: str, domain: str, split: str = "report", mode: str | None = None
    ) -> Interval | None:
        """Mean difference over the tasks that both checkpoints answered, paired."""
        after, before = self.tasks(checkpoint, domain, split, mode), self.tasks(reference, domain, split, mode)
        shared = [task for task in after if task in before]
        if not shared:
            return None
        return paired_difference([after[task] for task in shared], [before[task] for task in shared])

    def triple(self, student: str, teacher: str, distilled: str, domain: str, split: str = "report") -> Triple | None:
        """The three checkpoints of a distillation on the tasks that all of them answered."""
        parts = [self.tasks(checkpoint, domain, split) for checkpoint in (student, teacher, distilled)]
        shared = [task for task in parts[0] if task in parts[1] and task in parts[2]]
        if not shared:
            return None
        student_N, teacher_N, distilled_N = ([part[task] for task in shared] for part in parts)
        return Triple(student_N, teacher_N, distilled_N)

    def recovery(self, student: str, teachers: Mapping[str, str], distilled: str) -> Recovery | None:
        """What `distilled` won back of each domain teacher's lead over `student`; None when nothing can be compared."""
        triples = {domain: self.triple(student, teacher, distilled, domain) for domain, teacher in teachers.items()}
        known = {domain: triple for domain, triple in triples.items() if triple is not None}
        return recovery([known]) if known else None


def read_ledger(folders: Mapping[str, StageFolder]) -> Ledger:
    """The evaluation files of the given stages (stage name -> its folder); stages without one add nothing."""
    scores: dict[str, dict[Cell, dict[str, float]]] = {}
    invalid: dict[str, dict[Cell, int]] = {}
    for stage, folder in folders.items():
        for path in sorted(folder.evaluation(FINAL).parent.glob("*.jsonl")):
            checkpoint = checkpoint_name(stage, path.stem)
            scores[checkpoint], invalid[checkpoint] = read_evaluation(path)
    return Ledger(scores, invalid)


def read_evaluation(path: Path) -> tuple[dict[Cell, dict[str, float]], dict[Cell, int]]:
    """(scores per cell, number of invalid tasks per cell) of one evaluation file. A task sampled several times is
    averaged.
    """
    answers: dict[Cell, dict[str, list[float]]] = {}
    invalid: dict[Cell, int] = {}
    for row in read_lines(path):
        missing = [field for field in FIELDS if field not in row]
        if missing:
            raise UserError(f"{path}: a line lacks {missing[0]!r}; delete the file and the evaluation is run again")
        cell = (row["domain"], row["split"], row["mode"])
        if row["valid"]:
            answers.setdefault(cell, {}).setdefault(row["task_id"], []).append(float(row["score"]))
        else:
            invalid[cell] = invalid.get(cell, 0) + 1
    means = {
        cell: {task: sum(several) / len(several) for task, several in tasks.items()} for cell, tasks in answers.items()
    }
    return means, invalid
