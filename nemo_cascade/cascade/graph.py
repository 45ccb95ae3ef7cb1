"""Which stage starts from which, and in what order they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_cascade.config.load import Loaded
from nemo_cascade.config.paths import hf_folder
from nemo_cascade.config.schema import MopdConfig, StageBase
from nemo_cascade.config.strict import nearest, show
from nemo_cascade.types import UserError


@dataclass(frozen=True)
class Source:
    """Where weights come from: a stage (its end, or its weights at `step`), a Hugging Face folder, or a random draw."""

    kind: str  # stage | hf | random
    stage: str = ""
    step: int | None = None
    folder: Path | None = None

    @property
    def checkpoint(self) -> str:
        """The row of the ledger these weights have: `if_rl`, `if_rl@40`, or `` for weights that no stage made."""
        return f"{self.stage}@{self.step}" if self.step is not None else self.stage


@dataclass(frozen=True)
class Teaching:
    """Who may teach a stage: the candidates, and the domains whose teacher is named beforehand."""

    candidates: tuple[Source, ...] = ()
    pins: Mapping[str, Source] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Source, ...]:
        """Candidates and pinned teachers, each once."""
        return tuple(dict.fromkeys((*self.candidates, *self.pins.values())))


@dataclass(frozen=True)
class Graph:
    """The edges of a cascade. `order` is topological; among free stages the order of the cascade file holds."""

    order: tuple[str, ...]
    sources: Mapping[str, Source]
    teaching: Mapping[str, Teaching]

    def parents(self, name: str) -> list[str]:
        """Stages that must be done before `name` starts: its init and its teacher candidates."""
        edges = (self.sources[name], *self.teaching[name].all)
        return list(dict.fromkeys(edge.stage for edge in edges if edge.kind == "stage"))

    def ancestors(self, name: str) -> set[str]:
        """Everything `name` waits for, directly or not."""
        found: set[str] = set()
        waiting = self.parents(name)
        while waiting:
            parent = waiting.pop()
            if parent not in found:
                found.add(parent)
                waiting += self.parents(parent)
        return found

    def descendants(self, name: str) -> set[str]:
        """Everything that waits for `name`, directly or not."""
        return {other for other in self.order if name in self.ancestors(other)}

    def kept_steps(self, name: str, below: str | None = None) -> list[int]:
        """Steps of `name` that another stage (only `below` when given) starts or learns from."""
        stages = self.order if below is None else (below,)
        edges = [edge for stage in stages for edge in (self.sources[stage], *self.teaching[stage].all)]
        return sorted({edge.step for edge in edges if edge.stage == name and edge.step is not None})


def build_graph(loaded: Loaded) -> Graph:
    """Read every `init`, `candidates` and `pin`; refuse unknown names, impossible steps and cycles."""
    sources, teaching = {}, {}
    for name, stage in loaded.stages.items():
        origin = show(loaded.files[name])
        sources[name] = read_source(stage.init, loaded, f"{origin}: key 'init'")
        teaching[name] = _teaching(stage, loaded, origin)
    edges = {
        name: [edge.stage for edge in (sources[name], *teaching[name].all) if edge.kind == "stage"] for name in sources
    }
    return Graph(tuple(_order(edges, loaded.path)), sources, teaching)


def read_source(text: str, loaded: Loaded, where: str) -> Source:
    """`if_rl`, `if_rl@40`, `hf:PATH`, `base` or `random` as a Source."""
    if text == "base":
        if loaded.cascade.base == "base":
            raise UserError(f"{show(loaded.path)}: key 'base': write hf:nano, hf:PATH or random")
        return read_source(loaded.cascade.base, loaded, f"{show(loaded.path)}: key 'base'")
    if text == "random":
        return Source("random")
    if text.startswith("hf:"):
        if not text.removeprefix("hf:"):
            raise UserError(f"{where}: {text!r} names no folder; write hf:nano or hf:PATH")
        return Source("hf", folder=hf_folder(text))
    name, at, step = text.partition("@")
    if name not in loaded.stages:
        known = [*loaded.stages, "base", "random", "hf:PATH"]
        raise UserError(f"{where}: no stage {name!r} in this cascade{nearest(name, known)}")
    if not at:
        return Source("stage", name)
    return _at_step(name, step, loaded.stages[name], f"{where}: {text!r}")


def _at_step(name: str, step: str, stage: StageBase, where: str) -> Source:
    if not step.isdecimal() or not 1 <= int(step) <= stage.num_steps:
        raise UserError(f"{where}: the step must be a number from 1 to {stage.num_steps}, the num_steps of {name}")
    return Source("stage", name, None if int(step) == stage.num_steps else int(step))


def _teaching(stage: StageBase, loaded: Loaded, origin: str) -> Teaching:
    if not isinstance(stage, MopdConfig):
        return Teaching()
    config = stage.teachers
    if not config.candidates and not config.pin:
        raise UserError(f"{origin}: key 'teachers.candidates' is empty; list the stages that may teach")
    candidates = [_teacher(text, loaded, f"{origin}: key 'teachers.candidates'") for text in config.candidates]
    pins = {
        domain: _teacher(text, loaded, f"{origin}: key 'teachers.pin.{domain}'") for domain, text in config.pin.items()
    }
    return Teaching(tuple(dict.fromkeys(candidates)), pins)


def _teacher(text: str, loaded: Loaded, where: str) -> Source:
    source = read_source(text, loaded, where)
    if source.kind != "stage":
        raise UserError(f"{where}: {text!r} is not a stage of this cascade, and only stages have scores in the ledger")
    return source


def _order(edges: Mapping[str, Sequence[str]], path: Path) -> list[str]:
    order: list[str] = []
    while len(order) < len(edges):
        free = [name for name in edges if name not in order and all(parent in order for parent in edges[name])]
        if not free:
            cycle = _cycle(edges, set(edges) - set(order))
            raise UserError(
                f"{show(path)}: stages wait for each other: {' -> '.join(cycle)}; change one 'init' or teacher"
            )
        order.append(free[0])
    return order


def _cycle(edges: Mapping[str, Sequence[str]], blocked: set[str]) -> list[str]:
    """One cycle among stages that can never start, first stage repeated at the end."""
    walk = [next(name for name in edges if name in blocked)]
    while True:
        following = next(parent for parent in edges[walk[-1]] if parent in blocked)
        if following in walk:
            return [*walk[walk.index(following) :], following]
        walk.append(following)
