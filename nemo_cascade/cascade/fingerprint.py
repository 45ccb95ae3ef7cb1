"""Content keys: what a stage's outcome depends on, as one hash. Equal key, equal work; that is what resume rests on.

In the key: the stage's own config, seed, model shape, weights' precision, the contents (not the paths) of data files,
the Python files of outside domains, the judges that its verifiers ask, and the keys of its init and teacher
candidates. A changed learning rate changes that stage and what is below it, nothing above or beside.

Not in the key: where and how fast it runs (ranks, layout, samplers, reward workers, output, trackers), at which steps
weights are saved or kept, and the report's evaluation, which can be measured again on finished weights. The code's
identity is SCHEMA below and the package's version, not a hash of the sources: a comment must not retrain a cascade; who
changes an outcome raises SCHEMA.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_cascade import __version__
from nemo_cascade.cascade import judges
from nemo_cascade.cascade.checks import data_files, outside_file
from nemo_cascade.cascade.graph import Source
from nemo_cascade.cascade.plan import Plan
from nemo_cascade.config.paths import hf_folder, tokenizer_folder
from nemo_cascade.config.schema import EvaluationConfig, HardwareConfig, MopdConfig, RolloutStage, StageBase
from nemo_cascade.models.dtypes import profile_of
from nemo_cascade.models.hf_folder import content_sha256
from nemo_cascade.types import UserError

SCHEMA = 1
"""Raised by whoever changes what a stage computes from the same config."""
VOLATILE = (
    *("save_every", "keep_steps", "evaluation", "gates", "init", "rollouts"),
    *("judge", "equivalence_judge", "repair_judge"),
)
"""Fields of a stage that are hashed in another way or not at all."""
NOT_THE_JUDGE = ("serve", "url", "timeout_s", "retries", "api_key_env")
"""Keys of a judge that say where it is and how long to wait; the others, and a served checkpoint, are its identity."""


def keys(plan: Plan) -> dict[str, str]:
    """Stage name -> content key (sha256), in the order of the plan."""
    found: dict[str, str] = {}
    for name in plan.graph.order:
        found[name] = digest(ingredients(plan, name, found))
    return found


def ingredients(plan: Plan, name: str, parents: Mapping[str, str]) -> dict[str, Any]:
    """What enters the key of one stage; `parents` holds the keys of the stages before it."""
    stage = plan.stages[name]
    config = {key: value for key, value in dataclasses.asdict(stage).items() if key not in VOLATILE}
    del config["data"]["files"], config["data"]["conversations"]
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "name": name,
        "seed": plan.loaded.cascade.seed,
        "config": config,
        "model": dataclasses.asdict(plan.model),
        "precision": _precision(plan.loaded.hardware),
        "data": [(key, file_sha256(path)) for key, path in data_files(stage) if key.startswith("data.")],
        "code": {domain: _domain_code(domain) for domain in stage.data.domains if ":" in domain},
        "tokenizer": file_sha256(tokenizer_of(plan, name) / "tokenizer.json"),
        "init": _source_identity(plan, plan.graph.sources[name], parents, f"{name}: init"),
    }
    if isinstance(stage, RolloutStage):
        content["rollouts"] = folder_sha256(Path(stage.rollouts)) if stage.rollouts else None
        content.update(_judge_identities(stage, judges.asked_in_training(stage)))
    if isinstance(stage, MopdConfig):
        content["teachers"] = [_teacher_identity(plan, source, parents) for source in plan.graph.teaching[name].all]
    return content


def _precision(hardware: HardwareConfig) -> str:
    """The profile, and what of the model it leaves out where it is FP8."""
    if profile_of(hardware.precision).recipe is None:
        return hardware.precision
    return f"{hardware.precision} {hardware.fp8_bf16_layers}"


def tokenizer_of(plan: Plan, name: str) -> Path:
    """The tokenizer's folder: that of the Hugging Face folder at the root of the stage's weights, else the nano
    tokenizer where it fits.
    """
    source = plan.graph.sources[name]
    while source.kind == "stage":
        source = plan.graph.sources[source.stage]
    return tokenizer_folder(source.folder, plan.model.vocab_size)


def _source_identity(plan: Plan, source: Source, parents: Mapping[str, str], where: str) -> Any:
    """Weights by what made them. A parent that may be rolled back decides by its gates too, so these count."""
    if source.kind == "random":
        return "random"
    if source.folder is not None:
        if not source.folder.is_dir():
            raise UserError(f"{where}: {source.folder} is no folder, so what the stage starts from has no identity")
        return content_sha256(source.folder)
    parent = plan.stages[source.stage]
    identity: dict[str, Any] = {"stage": parents[source.stage], "step": source.step}
    if any(gate.on_fail == "rollback" for gate in parent.gates):
        identity["gates"] = [dataclasses.asdict(gate) for gate in parent.gates]
        identity["select"] = _select_identity(parent)
    return identity


def _teacher_identity(plan: Plan, source: Source, parents: Mapping[str, str]) -> dict[str, Any]:
    return {"stage": parents[source.stage], "step": source.step, "select": _select_identity(plan.stages[source.stage])}


def _select_identity(stage: StageBase) -> dict[str, Any]:
    """The part of an evaluation that decides: teacher choice and rollback read `select` scores only."""
    evaluation = stage.evaluation
    assert isinstance(evaluation, EvaluationConfig)
    return {
        key: value
        for key, value in dataclasses.asdict(evaluation).items()
        if key not in ("report", "other_mode", "files", "steps")
    }


def _judge_identities(stage: StageBase, asked: Iterable[judges.Asked]) -> dict[str, Any]:
    """Key of each judge that these verifiers ask -> what decides its verdicts."""
    found: dict[str, Any] = {}
    for key, judge in judges.configured(stage, asked).items():
        found[key] = {name: value for name, value in dataclasses.asdict(judge).items() if name not in NOT_THE_JUDGE}
        found[key]["weights"] = content_sha256(hf_folder(judge.serve)) if judge.serve else None
    return found


def _domain_code(name: str) -> str:
    path = outside_file(name)
    if path is None:
        raise UserError(f"domain {name!r}: its file cannot be found, so its identity is unknown")
    return file_sha256(path)


def evaluation_key(stage: StageBase) -> str:
    """What a stage's evaluation files were made from; differs when finished weights must be measured again."""
    assert stage.evaluation is not None
    files = [(key, file_sha256(path)) for key, path in data_files(stage) if key.startswith("evaluation.")]
    # A step that is measured too changes nothing about the files that are there.
    settings = {**dataclasses.asdict(stage.evaluation), "files": [], "steps": []}
    content = {"evaluation": settings, "files": files}
    return digest({**content, **_judge_identities(stage, judges.asked_in_evaluation(stage.evaluation))})


def digest(content: object) -> str:
    """sha256 of the canonical JSON of plain containers."""
    check_stable(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def check_stable(content: object, where: str = "key") -> None:
    """Refuse what does not hash alike in two processes: objects, sets, NaN, keys that are not text."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if not isinstance(key, str):
                raise UserError(f"{where}: the key {key!r} is not text, so the stage has no stable identity")
            check_stable(value, f"{where}.{key}")
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes):
        for index, value in enumerate(content):
            check_stable(value, f"{where}[{index}]")
    elif isinstance(content, float) and not math.isfinite(content):
        raise UserError(f"{where}: {content} is not a finite number, so the stage has no stable identity")
    elif content is not None and not isinstance(content, str | int | float):
        raise UserError(
            f"{where}: a value of type {type(content).__name__} has no stable identity; use text, numbers and lists"
        )


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), so the stages that use it have no identity"
        ) from error


def folder_sha256(folder: Path) -> str:
    """sha256 over (name, content) of every file below a folder; names are relative, so the folder may move."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _passing(path.relative_to(folder)))
    if not files:
        raise UserError(f"{folder}: the folder is empty")
    return digest([(path.relative_to(folder).as_posix(), file_sha256(path)) for path in files])


def _passing(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
