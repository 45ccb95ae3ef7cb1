"""From a cascade's name and the overrides of the command line to checked dataclasses.

Everything a run depends on is read here, once, before anything starts: a mistake costs a second and not a night.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cascade.config.paths import conf_dir
from nemo_cascade.config.schema import STAGE_KINDS, CascadeConfig, HardwareConfig, StageBase
from nemo_cascade.config.strict import (
    Config,
    Raw,
    build,
    check_keys,
    leaf_paths,
    nearest,
    parse_override,
    put,
    read_yaml,
    show,
)
from nemo_cascade.types import UserError


@dataclass(frozen=True)
class Loaded:
    """A cascade with all its files read: what plan, fingerprint and runner work on.

    `stages` keeps the order of the cascade file; every stage has `evaluation` and the judges filled in. `files` says
    where each stage was read from; `path` is the cascade's own file. `model` holds the fields of the model file,
    unchecked here.
    """

    cascade: CascadeConfig
    stages: dict[str, StageBase]
    files: dict[str, Path]
    hardware: HardwareConfig
    model: dict[str, Any]
    path: Path
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the cascade's stage folders lie: `output`/`name`."""
        return Path(self.cascade.output) / self.cascade.name


@dataclass(frozen=True)
class Override:
    """One `key=value` of the command line, already routed to the file it changes."""

    text: str
    path: list[str]
    value: Any


def load_cascade(path_or_name: str, overrides: Sequence[str] = ()) -> Loaded:
    """Read `conf/cascade/NAME.yaml` or a path, with dotted overrides, strictly.

    `seed=3` and `evaluation.report=64` change the cascade, `hardware=cpu` picks a file and `hardware.ranks_per_node=1`
    changes it, `model.hidden_size=64` changes the model, `stages.if_rl.num_steps=5` one stage and
    `stages.*.num_steps=5` all of them.
    """
    path = find(path_or_name, "cascade", Path.cwd())
    routed = [route(text) for text in overrides]
    raw, cascade = _built(CascadeConfig, read_yaml(path), _of(routed, "cascade"), show(path))
    stage_files = _stage_files(cascade, path)
    shared = ("evaluation", "judge", "equivalence_judge", "repair_judge")
    defaults = {key: raw[key] for key in shared if raw.get(key) is not None}
    stages = {
        name: _read_stage(file, defaults, [item for target, item in routed if target in (f"stages.{name}", "stages.*")])
        for name, file in stage_files.items()
    }
    _refuse_unused(routed, stages)
    hardware_path = find(cascade.hardware, "hardware", path.parent)
    _, hardware = _built(HardwareConfig, read_yaml(hardware_path), _of(routed, "hardware"), show(hardware_path))
    model = read_yaml(find(cascade.model, "model", path.parent))
    for item in _of(routed, "model"):
        model = put(model, item.path, item.value)
    return Loaded(cascade, stages, stage_files, hardware, model, path, tuple(overrides))


def find(name: str, kind: str, near: Path) -> Path:
    """The file behind a name: a path (as given, or relative to `near`), else conf/KIND/NAME.yaml."""
    given = Path(name).expanduser()
    if given.suffix in (".yaml", ".yml"):
        for candidate in (near / given, given):
            if candidate.is_file():
                return candidate
        raise UserError(f"{name}: no such {kind} file")
    beside = near / f"{name}.yaml"
    if kind == "stage" and beside.is_file():
        return beside
    folder = conf_dir() / kind
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
        raise UserError(f"{kind} {name!r}: no file {show(path)}{nearest(name, known)}")
    return path


def route(text: str) -> tuple[str, Override]:
    """Which file an override changes (`cascade`, `hardware`, `model`, `stages.NAME`, `stages.*`) and the key inside
    it.
    """
    path, value = parse_override(text)
    head = path[0]
    if head == "stages" and len(path) == 2:
        raise UserError(f"override {text!r}: name a key of the stage, for example stages.{path[1]}.num_steps=10")
    if head == "stages" and len(path) > 2:
        return f"stages.{path[1]}", Override(text, path[2:], value)
    if head in ("hardware", "model") and len(path) > 1:
        return head, Override(text, path[1:], value)
    return "cascade", Override(text, path, value)


def _of(routed: list[tuple[str, Override]], target: str) -> list[Override]:
    return [item for where, item in routed if where == target]


def _built(cls: type[Config], raw: Raw, overrides: Sequence[Override], origin: str) -> tuple[Raw, Config]:
    """The file's content with the overrides in it, plain and typed; a mistake is told under the name of who made it."""
    check_keys(cls, raw, origin)
    changed = raw
    for item in overrides:
        check_keys(cls, put({}, item.path, item.value), f"override {item.text!r}")
        changed = put(changed, item.path, item.value)
    try:
        return changed, build(cls, changed, origin)
    except UserError as error:
        culprit = _culprit(cls, raw, overrides)
        if culprit is None:
            raise
        raise UserError(str(error).replace(origin, f"override {culprit.text!r}", 1)) from error


def _culprit(cls: type, raw: Raw, overrides: Sequence[Override]) -> Override | None:
    """The first override that breaks a file which was right without it."""
    for index in range(len(overrides) + 1):
        content = raw
        for item in overrides[:index]:
            content = put(content, item.path, item.value)
        try:
            build(cls, content, "")
        except UserError:
            return overrides[index - 1] if index else None
    return None


def _stage_files(cascade: CascadeConfig, path: Path) -> dict[str, Path]:
    if not cascade.stages:
        raise UserError(f"{show(path)}: key 'stages' is empty; list at least one stage, for example nano/sft")
    files: dict[str, Path] = {}
    for entry in cascade.stages:
        name = Path(entry).stem
        if name in files:
            raise UserError(
                f"{show(path)}: key 'stages' holds two stages named {name!r}; a stage's name is the file's name"
            )
        try:
            files[name] = find(entry, "stage", path.parent)
        except UserError as error:
            raise UserError(f"{show(path)}: key 'stages': {error}") from error
    return files


def _read_stage(file: Path, defaults: Raw, overrides: list[Override]) -> StageBase:
    """One stage file as the class its `kind` names; its `evaluation` and judges lie over the cascade's."""
    origin = show(file)
    raw = read_yaml(file)
    chosen = [item.value for item in overrides if item.path == ["kind"]]
    kind = chosen[-1] if chosen else raw.get("kind")
    if kind is None:
        raise UserError(f"{origin}: key 'kind' is missing; known: {', '.join(STAGE_KINDS)}")
    if kind not in STAGE_KINDS:
        raise UserError(f"{origin}: key 'kind': {kind!r} is no kind of stage{nearest(str(kind), STAGE_KINDS)}")
    cls = STAGE_KINDS[kind]
    check_keys(cls, raw, origin)
    for key, value in defaults.items():
        own = raw.get(key)
        raw[key] = {**value, **own} if isinstance(own, Mapping) else value
    fitting = [item for item in overrides if not _for_another_kind(item, cls)]
    return _built(cls, raw, fitting, origin)[1]


def _for_another_kind(item: Override, cls: type) -> bool:
    """True for `stages.*.group_size=4` at an SFT stage: the key exists, only not in this kind of stage."""
    head = item.path[0]
    return (
        item.text.startswith("stages.*.")
        and head not in _top_keys(cls)
        and any(head in _top_keys(kind) for kind in STAGE_KINDS.values())
    )


def _top_keys(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _refuse_unused(routed: list[tuple[str, Override]], stages: Mapping[str, StageBase]) -> None:
    for target, item in routed:
        name = target.removeprefix("stages.")
        if target.startswith("stages.") and name != "*" and name not in stages:
            raise UserError(f"override {item.text!r}: the cascade has no stage {name!r}{nearest(name, stages)}")


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Dotted key -> leaf value of a config dataclass, for comparisons and for reading aloud."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping) and value:
        found: dict[str, object] = {}
        for key, inner in value.items():
            found.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
        return found
    return {prefix: value}


def diff(left: Loaded, right: Loaded) -> list[str]:
    """What differs between two cascades, one `key: left -> right` a line."""
    sides = []
    for loaded in (left, right):
        parts = {"cascade": loaded.cascade, "hardware": loaded.hardware, "model": loaded.model}
        parts.update({f"stages.{name}": stage for name, stage in loaded.stages.items()})
        sides.append({key: value for prefix, part in parts.items() for key, value in flatten(part, prefix).items()})
    before, after = sides
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = (side[key] if key in side else "absent" for side in (before, after))
        if old != new:
            lines.append(f"{key}: {old} -> {new}")
    return lines


def known_keys(kind: str) -> list[str]:
    """Every dotted key of one kind of stage, for help and completion."""
    return list(leaf_paths(STAGE_KINDS[kind]))
