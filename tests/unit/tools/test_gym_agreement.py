"""The comparison with NeMo-Gym's recorded rewards: what fails it, and that it holds on the real recordings."""

from __future__ import annotations

import json

import pytest

from nemo_cascade.types import UserError
from tests.released import released_data
from tools.gym_agreement import EXPLANATIONS, PAGE, Line, compare, page, problems, schema_in

SAME = Line("mcqa", 0, 1.0, 1.0, "chose E")
OTHER = Line("mcqa", 1, 0.0, 1.0, "chose A")
JUDGED = Line("equivalence_llm_judge", 4, 1.0, 0.0, "wanted 'darwin'")
UNGRADED = Line("swerl_gen", 0, 1.0, None, "no image")


def test_a_difference_needs_an_explanation_and_an_explanation_a_difference() -> None:
    lines = [SAME, OTHER, UNGRADED]
    assert problems(lines, {}) == ["mcqa[1]: NeMo-Gym 0, ours 1 (chose A); no explanation"]
    assert problems(lines, {("mcqa", 1): "measured"}) == []
    stale = {("mcqa", 0): "old", ("mcqa", 1): "measured", ("code_gen", 3): "its file is not here"}
    assert problems(lines, stale) == ["mcqa[0]: explained, but the verdicts agree"]


def test_the_page_counts_only_what_can_be_compared() -> None:
    text = page([SAME, OTHER, JUDGED, UNGRADED], {("mcqa", 1): "a | in a cell"})
    assert "1 of 2 recorded rewards that need neither a judge nor a container image are ours, too (50 %)." in text
    assert "Of 1 that a judge gave, 0 are what equal texts give. 1 recordings have nothing to compare." in text
    assert "| mcqa | 1 | 0 | 1 | no | chose A | a \\| in a cell |" in text
    assert "| swerl_gen | 0 | 1 | - | - | no image |  |" in text
    assert "- `swerl_gen`: the repositories" in text


def test_schemas_are_read_out_of_the_prompt() -> None:
    def rollout(*texts: str) -> dict[str, object]:
        return {"responses_create_params": {"input": [{"role": "user", "content": text} for text in texts]}}

    properties = {"name": {"type": "string"}, "age": {"type": "integer"}}
    found = schema_in(rollout('Not {this}. An example: {"a": 1}', f"Schema: {json.dumps(properties)}\nRules: {{}}"))
    assert found == {"type": "object", "properties": properties}
    whole = {"type": "object", "properties": properties, "required": ["name"]}
    assert schema_in(rollout(f"Schema: {json.dumps(whole)}")) == whole
    with pytest.raises(UserError, match="no JSON object in the prompt"):
        schema_in(rollout("Schema: none"))


def test_every_recorded_reward_is_ours_or_explained() -> None:
    lines = compare(released_data())
    assert problems(lines, EXPLANATIONS) == []
    assert len([line for line in lines if line.compared]) == 38
    assert [(line.name, line.index) for line in lines if not line.agrees] == [("equivalence_llm_judge", 4)]
    assert PAGE.read_text(encoding="utf-8") == page(lines, EXPLANATIONS), "run python -m tools.gym_agreement --write"
