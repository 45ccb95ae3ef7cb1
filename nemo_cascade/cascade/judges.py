"""Which judges a stage asks. What `check` demands, what a key holds and what launch starts are read here, once."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_cascade.config.schema import CascadeConfig, EvaluationConfig, RolloutStage, StageBase
from nemo_cascade.config.schema_data import JudgeAddress
from nemo_cascade.types import UserError

PREFERENCE, EQUIVALENCE, REPAIR = KEYS = ("judge", "equivalence_judge", "repair_judge")
"""Keys of a stage file: who compares a group's answers, who compares an answer with the expected one, and who says
whether a patch resolves its issue.
"""


@dataclass(frozen=True)
class Asked:
    """A judge that a stage asks: the key of its config, and why. Not `required`: a domain of the user's may ask it."""

    key: str
    why: str
    required: bool = True


def asked_in_training(stage: StageBase) -> list[Asked]:
    """The judges behind the rewards: of preference groups (one answer alone gets the rubric) and of graded rows."""
    if not isinstance(stage, RolloutStage) or stage.mode == "train_only":
        return []
    found = _outside(stage.data.domains)
    if stage.group_size > 1 and "preference" in stage.data.domains:
        found.append(Asked(PREFERENCE, "groups of domain 'preference' are compared by a judge"))
    if _graded("long_context", stage.data.files, stage.data.options):
        found.append(_equivalence("data"))
    if "math" in stage.data.domains and _falls_back(stage.data.options):
        found.append(_fallback("data"))
    if "swe_agentless" in stage.data.domains:
        found += _repairs("data", bool(stage.data.files.get("swe_agentless")), stage.data.options)
    return found


def asked_in_evaluation(evaluation: EvaluationConfig | None) -> list[Asked]:
    """The judges behind the scores. Rows from files are report tasks only."""
    if evaluation is None or evaluation.select + evaluation.report == 0:
        return []
    found = _outside(evaluation.domains)
    measured = evaluation.report > 0 and "long_context" in evaluation.domains
    if measured and _graded("long_context", evaluation.files, evaluation.options):
        found.append(_equivalence("evaluation"))
    if "math" in evaluation.domains and _falls_back(evaluation.options):
        found.append(_fallback("evaluation"))
    if "swe_agentless" in evaluation.domains:
        rows = evaluation.report > 0 and bool(evaluation.files.get("swe_agentless"))
        found += _repairs("evaluation", rows, evaluation.options)
    return found


def _outside(domains: Iterable[str]) -> list[Asked]:
    """Nobody knows what a domain of the user's own asks, so it gets every judge that is configured."""
    own = [domain for domain in domains if ":" in domain]
    return [Asked(key, f"{own[0]} may ask it", required=False) for key in KEYS] if own else []


def _graded(domain: str, files: Mapping[str, Collection[str]], options: Mapping[str, Mapping[str, Any]]) -> bool:
    return bool(files.get(domain)) and options.get(domain, {}).get("grading", "judge") == "judge"


def _falls_back(options: Mapping[str, Mapping[str, Any]]) -> bool:
    return bool(options.get("math", {}).get("judge", False))


def _fallback(section: str) -> Asked:
    return Asked(EQUIVALENCE, f"{section}.options.math.judge asks a judge where algebra finds answers unequal")


def _equivalence(section: str) -> Asked:
    return Asked(
        EQUIVALENCE,
        f"rows of {section}.files.long_context are graded by a judge ({section}.options.long_context.grading: exact "
        "compares texts instead)",
    )


def _repairs(section: str, rows: bool, options: Mapping[str, Mapping[str, Any]]) -> list[Asked]:
    """The judge of patches: of all with `reward: judge`, of rows without their image with `without_image: judge`."""
    own = options.get("swe_agentless", {})
    reward = own.get("reward", "execution")
    if reward == "judge":
        return [Asked(REPAIR, f"{section}.options.swe_agentless.reward is judge: a model judges patches")]
    if rows and reward == "execution" and own.get("without_image") == "judge":
        why = f"{section}.options.swe_agentless.without_image is judge: a model judges patches that cannot run here"
        return [Asked(REPAIR, why)]
    return []


def configured(stage: StageBase, asked: Iterable[Asked]) -> dict[str, JudgeAddress]:
    """Key -> config of the judges that are asked and that the stage or its cascade names."""
    found = {item.key: getattr(stage, item.key) for item in asked}
    return {key: judge for key, judge in found.items() if judge is not None and judge.named}


def check_judges(stage: StageBase, origin: str) -> None:
    """Refuse a stage that needs a judge and names none."""
    named = {key: getattr(stage, key) for key in KEYS}
    refuse_unnamed((*asked_in_training(stage), *asked_in_evaluation(stage.evaluation)), named, origin)


def refuse_unnamed(asked: Iterable[Asked], judges: Mapping[str, JudgeAddress | None], origin: str) -> None:
    """UserError when a judge is asked that `judges` (key -> config) does not name."""
    for item in asked:
        judge = judges.get(item.key)
        if item.required and (judge is None or not judge.named):
            raise UserError(
                f"{origin}: key {item.key!r} is missing; {item.why}: set {item.key}.serve (a checkpoint, hf:PATH) or "
                f"{item.key}.url here or in the cascade file"
            )


def for_evaluation(evaluation: EvaluationConfig, cascade: CascadeConfig) -> dict[str, JudgeAddress]:
    """The judges of the cascade that a single checkpoint's answers ask, as arguments of `evaluate_folder`; UserError
    where one is needed and none is named.
    """
    found: dict[str, JudgeAddress] = {}
    for name, key in (("judge", EQUIVALENCE), ("repair_judge", REPAIR)):
        asked = [item for item in asked_in_evaluation(evaluation) if item.key == key]
        refuse_unnamed(asked, {key: getattr(cascade, key)}, f"cascade {cascade.name}")
        if asked and getattr(cascade, key) is not None:
            found[name] = getattr(cascade, key)
    return found


def without_their_keys(stage: StageBase) -> list[str]:
    """`KEY.api_key_env` of the judges that the stage asks and whose environment variable is not set here."""
    asked = (*asked_in_training(stage), *asked_in_evaluation(stage.evaluation))
    names = {key: judge.api_key_env for key, judge in configured(stage, asked).items()}
    return [f"{key}.api_key_env" for key, name in names.items() if name is not None and not os.environ.get(name)]
