"""Tables by domain (files, options, shares): every name is one that the stage uses, every option one that it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nemo_cascade import domains
from nemo_cascade.config.load import Loaded
from nemo_cascade.config.schema import EvaluationConfig, StageBase
from nemo_cascade.config.strict import nearest, show
from nemo_cascade.types import UserError


def check_training_tables(stage: StageBase, origin: str) -> None:
    """`data.files`, `data.options` and `data.flaw_rates` speak of domains in the mixture."""
    data = stage.data
    for key, table in (("files", data.files), ("options", data.options), ("flaw_rates", data.flaw_rates)):
        check_names(table, data.domains, f"{origin}: key 'data.{key}", "data.domains")
    check_options(data.options, f"{origin}: key 'data.options")


def check_evaluation_tables(loaded: Loaded) -> None:
    """`evaluation.files` and `evaluation.options` speak of domains that there are.

    A run or a stage that measures fewer domains keeps the cascade's tables (`evaluation.domains=[math]` on the command
    line), so any domain counts that some stage measures or that comes with the package.
    """
    measured = [domain for stage in loaded.stages.values() for domain in _evaluation(stage).domains]
    anywhere = list(dict.fromkeys([*loaded.cascade.evaluation.domains, *measured, *domains.known()]))
    _check_evaluation(loaded.cascade.evaluation, anywhere, show(loaded.path))
    for name, stage in loaded.stages.items():
        _check_evaluation(_evaluation(stage), anywhere, show(loaded.files[name]))


def _evaluation(stage: StageBase) -> EvaluationConfig:
    assert stage.evaluation is not None, "load_cascade fills it in"
    return stage.evaluation


def _check_evaluation(evaluation: EvaluationConfig, measured: Collection[str], origin: str) -> None:
    for key, table in (("files", evaluation.files), ("options", evaluation.options)):
        check_names(table, measured, f"{origin}: key 'evaluation.{key}", "evaluation.domains")
    check_options(evaluation.options, f"{origin}: key 'evaluation.options")


def check_names(table: Mapping[str, object], known: Collection[str], where: str, key: str) -> None:
    """Refuse an entry for a domain that `key` does not list. `where` ends inside the quoted key."""
    for domain in table:
        if domain not in known:
            raise UserError(f"{where}.{domain}': not in {key}{nearest(domain, known)}")


def check_options(options: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Build each built-in domain with its options, as launch will. A domain of the user's own is not imported here."""
    for domain, given in options.items():
        if ":" in domain:
            continue
        try:
            domains.load(domain, None, given)
        except UserError as error:
            # A domain speaks of `data.options.math.KEY: why`; the options may be those of the evaluation.
            option, _, why = str(error).removeprefix(f"data.options.{domain}.").partition(": ")
            raise UserError(f"{where}.{domain}.{option}': {why}") from error
