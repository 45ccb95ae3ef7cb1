"""Teachers chosen from the ledger: the strongest checkpoint per domain, with the scores it was chosen for (section
4.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_cascade.cascade.artifacts import StageFolder, read_json
from nemo_cascade.cascade.graph import Source, Teaching
from nemo_cascade.cascade.ledger import Ledger
from nemo_cascade.types import Interval, UserError


@dataclass(frozen=True)
class Choice:
    """One domain's teacher. `scores` holds every candidate's `select` mean with its interval; `reason` says why this
    one.
    """

    stage: str
    step: int | None
    reason: str
    scores: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def checkpoint(self) -> str:
        """The ledger's name of the teacher."""
        return self.stage if self.step is None else f"{self.stage}@{self.step}"

    def folder(self, folders: Mapping[str, StageFolder]) -> Path:
        """The teacher's Hugging Face folder."""
        return folders[self.stage].weights(self.step)


def choose(
    name: str, domains: Iterable[str], teaching: Teaching, order: Sequence[str], ledger: Ledger
) -> dict[str, Choice]:
    """The candidate with the best `select` mean for each domain; of equals the one whose stage ran first (`order`).

    A pinned domain takes its pin, whatever the scores say.
    """
    candidates = sorted(teaching.candidates, key=lambda source: (order.index(source.stage), source.step or math.inf))
    choices = {}
    for domain in domains:
        measured = {source: ledger.score(source.checkpoint, domain, "select") for source in teaching.all}
        scores = {source.checkpoint: score for source, score in measured.items() if score is not None}
        if domain in teaching.pins:
            pin = teaching.pins[domain]
            choices[domain] = Choice(pin.stage, pin.step, "pinned in teachers.pin", scores)
            continue
        running = [source for source in candidates if source.checkpoint in scores]
        if not running:
            raise UserError(
                f"{name}: no candidate has a select score of {domain!r}; add it to evaluation.domains of "
                f"{', '.join(source.stage for source in candidates)} or pin a teacher"
            )
        best = max(running, key=lambda source: scores[source.checkpoint].value)  # max keeps the first of equals
        choices[domain] = Choice(best.stage, best.step, _reason(best, running, scores), scores)
    return choices


def _reason(best: Source, running: list[Source], scores: Mapping[str, Interval]) -> str:
    top = scores[best.checkpoint]
    others = [source.checkpoint for source in running if source is not best]
    if not others:
        return f"the only candidate, select {top.value:.3f} over {top.n} tasks"
    second = max(others, key=lambda checkpoint: scores[checkpoint].value)
    if scores[second].value == top.value:
        return f"select {top.value:.3f} over {top.n} tasks, level with {second}; the earlier stage teaches"
    return f"select {top.value:.3f} over {top.n} tasks, next {second} with {scores[second].value:.3f}"


def to_json(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """The content of teachers.json."""
    return {domain: {**asdict(choice), "checkpoint": choice.checkpoint} for domain, choice in choices.items()}


def read_teachers(folder: StageFolder) -> dict[str, Choice]:
    """The teachers a stage was started with; empty for stages without any."""
    choices = {}
    for domain, row in (read_json(folder.teachers) or {}).items():
        scores = {checkpoint: Interval(**interval) for checkpoint, interval in row["scores"].items()}
        choices[domain] = Choice(row["stage"], row["step"], row["reason"], scores)
    return choices
