"""The report as data: one record per thing that the page shows. The names are those that the page's script reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_cascade.types import Interval


@dataclass(frozen=True)
class Cell:
    """One number of the heat map; `gain` is paired against `against`, the checkpoint the stage started from."""

    checkpoint: str
    domain: str
    mode: str
    value: float
    low: float
    high: float
    n: int
    against: str = ""
    gain: Interval | None = None


@dataclass(frozen=True)
class GateRow:
    """One gate's verdict, in the report's words."""

    domain: str
    rule: str
    on_fail: str
    passed: bool
    verdict: str
    gain: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Candidate:
    """A teacher candidate's select score."""

    name: str
    value: float


@dataclass(frozen=True)
class TeacherRow:
    """Who teaches a domain, and why."""

    stage: str
    domain: str
    teacher: str
    why: str
    candidates: list[Candidate]


@dataclass(frozen=True)
class RecoveryRow:
    """A domain before and after distillation. `value`: the recovered share of the teacher's lead, None without one."""

    domain: str
    teacher: str
    best: float
    before: float
    after: float
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class StageView:
    """One stage. `parent` is the stage whose weights it started from, empty for the base model."""

    name: str
    kind: str
    status: str  # done | running | failed | pending
    parent: str
    reference: str  # the ledger's name of the checkpoint it started from
    folder: str
    sha256: str
    num_steps: int
    steps_done: int
    seconds: float
    domains: list[str]
    gates: list[GateRow]
    spans: dict[str, float]
    curves: dict[str, list[tuple[float, float]]]
    config: str
    rollouts: list[dict[str, object]] = field(default_factory=list)


@dataclass(frozen=True)
class ReportData:
    """The whole report as data; the page draws it."""

    name: str
    subtitle: str
    headline: list[Tile]
    stages: list[StageView]
    domains: list[str]
    checkpoints: list[str]
    cells: list[Cell]
    recovery: list[RecoveryRow]
    recovery_says: str
    teachers: list[TeacherRow]
