"""docs/algorithms.md has a row for every choice of the schema, and says which is the default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from nemo_cascade.config.schema import (
    AdvantageConfig,
    DistillConfig,
    FiltersConfig,
    JudgeConfig,
    LossConfig,
    OptimizerConfig,
    SamplingConfig,
    SftConfig,
)
from nemo_cascade.config.schema_data import JudgeAddress
from nemo_cascade.types import UserError

DOC = Path(__file__).parents[3] / "docs" / "algorithms.md"
ADDRESS = {field.name for field in dataclasses.fields(JudgeAddress)}
PARTS: list[tuple[str, type, set[str]]] = [  # section, its class, and the keys that are documented where None stands
    ("advantage", AdvantageConfig, set()),
    ("loss", LossConfig, set()),
    ("distill", DistillConfig, set()),
    ("filters", FiltersConfig, set()),
    ("judge", JudgeConfig, ADDRESS),
]
CHOSEN = [
    *[(section, cls, field) for section, cls, without in PARTS for field in dataclasses.fields(cls)
      if field.name not in without],
    *[("optimizer", OptimizerConfig, field) for field in dataclasses.fields(OptimizerConfig)
      if field.name in ("schedule", "warmup_steps", "clip_grad", "max_skipped_steps")],
    *[("sampling", SamplingConfig, field) for field in dataclasses.fields(SamplingConfig) if field.name == "logprobs"],
    *[("", SftConfig, field) for field in dataclasses.fields(SftConfig) if field.name == "reduction"],
]  # fmt: skip


def rows() -> dict[str, str]:
    """The option of each table row -> its default cell."""
    cells = [re.split(r"(?<!\\)\|", line) for line in DOC.read_text().splitlines() if line.startswith("| `")]
    assert {len(parts) for parts in cells} == {7}, "a table row has five cells"
    options = [parts[1].strip().strip("`") for parts in cells]
    assert len(options) == len(set(options))
    return {option: parts[3].strip() for option, parts in zip(options, cells, strict=True)}


def choices(cls: type, name: str) -> list[str]:
    """What a string option may be, as its own refusal lists it."""
    with pytest.raises(UserError) as caught:
        cls(**{name: "?"})
    return str(caught.value).partition("is not one of ")[2].split(", ")


def key_of(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


@pytest.mark.parametrize(("section", "cls", "field"), CHOSEN, ids=lambda value: getattr(value, "name", ""))
def test_every_choice_has_a_row_with_its_default(section: str, cls: type, field: dataclasses.Field) -> None:
    documented, key = rows(), key_of(section, field.name)
    if isinstance(field.default, str):
        names = choices(cls, field.name)
        assert len(names) > 1
        assert {name: documented.get(f"{key}: {name}") for name in names} == {
            name: "yes" if name == field.default else "" for name in names
        }
        return
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    assert documented[key] == {"None": "null", "True": "true", "False": "false"}.get(str(default), str(default))


def test_no_row_is_about_an_option_that_is_gone() -> None:
    known = {key_of(section, field.name) for section, _, field in CHOSEN}
    assert {option.partition(":")[0] for option in rows()} == known
