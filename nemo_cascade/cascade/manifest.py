"""`cascade.json` of a run: which stages there are, under which keys, in which folders. Written when a run starts.

Report and status read a cascade's folder by it alone, so a run can be looked at where its config files are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cascade.cascade.artifacts import StageFolder, read_json, stage_folder, write_json
from nemo_cascade.cascade.graph import Source
from nemo_cascade.cascade.plan import Plan
from nemo_cascade.types import UserError

MANIFEST = "cascade.json"


@dataclass(frozen=True)
class Entry:
    """One stage of the cascade: what its file says, and where its work lies. `key` is empty when it cannot be known
    yet.
    """

    name: str
    kind: str
    init: str
    key: str
    folder: str  # name inside the cascade's folder
    domains: tuple[str, ...]
    num_steps: int
    source_kind: str
    source_stage: str
    source_step: int | None

    @property
    def source(self) -> Source:
        """Where the stage starts if nothing is rolled back."""
        return Source(self.source_kind, self.source_stage, self.source_step)


@dataclass(frozen=True)
class Manifest:
    """A cascade as it was last run; `path` is its folder and is not part of the file."""

    cascade: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    stages: tuple[Entry, ...]
    path: Path

    @property
    def folders(self) -> dict[str, StageFolder]:
        """Stage name -> folder, in the order they run."""
        return {entry.name: StageFolder(self.path / entry.folder) for entry in self.stages}

    @property
    def sources(self) -> dict[str, Source]:
        """Stage name -> where it starts."""
        return {entry.name: entry.source for entry in self.stages}


def from_plan(plan: Plan, keys: Mapping[str, str]) -> Manifest:
    """The manifest of a plan; without keys (inputs missing) no stage can be told done."""
    loaded = plan.loaded
    entries = []
    for name in plan.graph.order:
        stage, source = plan.stages[name], plan.graph.sources[name]
        key = keys.get(name, "")
        folder = stage_folder(loaded.folder, name, key).path.name if key else f"{name}-unknown"
        domains = tuple(stage.data.domains)
        entries.append(
            Entry(
                name,
                stage.kind,
                stage.init,
                key,
                folder,
                domains,
                stage.num_steps,
                source.kind,
                source.stage,
                source.step,
            )
        )
    cascade = loaded.cascade
    return Manifest(cascade.name, cascade.seed, str(loaded.path), loaded.overrides, tuple(entries), loaded.folder)


def write_manifest(manifest: Manifest) -> None:
    """Write cascade.json into the cascade's folder."""
    content = dataclasses.asdict(manifest)
    del content["path"]
    write_json(manifest.path / MANIFEST, content)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cascade's folder."""
    content: dict[str, Any] | None = read_json(folder / MANIFEST)
    if content is None:
        raise UserError(
            f"{folder}: no {MANIFEST} here; run it first: nemo-cascade run CASCADE, or give the folder of a cascade "
            "that was run, for example runs/nano"
        )
    try:
        stages = tuple(Entry(**{**row, "domains": tuple(row["domains"])}) for row in content.pop("stages"))
        return Manifest(**{**content, "overrides": tuple(content["overrides"])}, stages=stages, path=folder)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: written by another version ({error}); run the cascade again") from error
