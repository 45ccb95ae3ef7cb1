"""Released rows load as they are, and our verdicts are those that NeMo-Gym recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade import domains
from nemo_cascade.data.rows import read_jsonl
from nemo_cascade.domains import Services
from nemo_cascade.reward.math_equal import MathGrader
from nemo_cascade.types import Json, Message, Scored, Task, ToolCall, Transcript, UserError
from tests.released import released_data

FILES = {
    "instruction_following": "instruction_following",
    "mcqa": "mcqa",
    "math_with_judge": "math",
    "structured_outputs": "structured_output",
    "equivalence_llm_judge": "long_context",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    return released_data()


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    shared = Services(math=MathGrader(cpu_seconds=60, wall_seconds=300))
    yield shared
    shared.close()


def rows(path: Path) -> list[tuple[str, dict[str, Json]]]:
    return list(read_jsonl(path))


def answer(row: dict[str, Json]) -> Message:
    messages = [item for item in row["response"]["output"] if item["type"] == "message"]
    return Message("assistant", "".join(part["text"] for message in messages for part in message["content"]))


@pytest.mark.parametrize("name", FILES)
def test_rows_load_as_they_are(folder: Path, name: str) -> None:
    domain = domains.load(FILES[name])
    tasks = [domain.parse_row(row, where) for where, row in rows(folder / "gym" / f"{name}.example.jsonl")]
    assert len({task.id for task in tasks}) == len(tasks) >= 5
    assert all(task.messages[-1].content for task in tasks)


@pytest.mark.parametrize("name", ["instruction_following", "mcqa", "math_with_judge"])
def test_verdicts_are_those_recorded(folder: Path, services: Services, name: str) -> None:
    domain = domains.load(FILES[name], services)
    for where, rollout in rows(folder / "gym" / f"{name}.example_rollouts.jsonl"):
        row = (
            rollout
            if name != "mcqa"
            else {**beside(folder, name, rollout), "expected_answer": rollout["expected_answer"]}
        )
        outcome = domain.score(domain.parse_row(row, where), Transcript((answer(rollout),)))
        recorded = rollout.get("library_reward", rollout["reward"])
        assert isinstance(outcome, Scored)
        assert outcome.reward == recorded, f"{where}: {outcome.reason}"


def beside(folder: Path, name: str, row: dict[str, Json]) -> dict[str, Json]:
    """The released row with the same prompt: recorded multiple-choice answers lack the options."""
    prompt = row["responses_create_params"]["input"][0]["content"]
    return next(
        other
        for _, other in rows(folder / "gym" / f"{name}.example.jsonl")
        if other["responses_create_params"]["input"][0]["content"] == prompt
    )


def test_gsm8k_rows_and_their_own_solutions(folder: Path, services: Services) -> None:
    domain = domains.load("math", services)
    for where, row in rows(folder / "gsm8k_test_400.jsonl")[:100]:
        task = domain.parse_row(row, where)
        final = row["answer"].rpartition("####")[2].strip()
        right = domain.score(task, Transcript((Message("assistant", f"So \\boxed{{{final}}}."),)))
        wrong = domain.score(task, Transcript((Message("assistant", f"\\boxed{{{final}1}}"),)))
        assert (right.reward, wrong.reward) == (1.0, 0.0), where


def test_ifeval_prompts_load(folder: Path) -> None:
    domain = domains.load("instruction_following")
    tasks = [domain.parse_row(row, where) for where, row in rows(folder / "ifeval_input.jsonl")]
    assert len(tasks) == 541


def test_a_structured_row_wants_its_tool(folder: Path) -> None:
    domain = domains.load("structured_output")
    where, row = rows(folder / "gym" / "structured_outputs.example.jsonl")[0]
    task = domain.parse_row(row, where)
    assert len(task.tools) == 16
    value = {key: None for key in json.loads(row["schema_str"])["properties"]}
    for arguments, reward in (
        ({"extraction": value}, 0.0),
        ({"extraction": _filled(json.loads(row["schema_str"]))}, 1.0),
        (value, 0.0),
    ):
        call = Message("assistant", "", "", (ToolCall(row["tool_name"], arguments),))
        assert domain.score(task, Transcript((call,))).reward == reward
    assert (
        domain.score(
            task, Transcript((Message("assistant", json.dumps(_filled(json.loads(row["schema_str"])))),))
        ).reward
        == 0.0
    )


def _filled(schema: dict[str, Json]) -> Json:
    """Any value that fits a schema of plain types."""
    kind = schema["type"] if isinstance(schema["type"], str) else schema["type"][0]
    if kind == "object":
        return {key: _filled(field) for key, field in schema["properties"].items()}
    return {"string": "x", "integer": 1, "number": 1.5, "boolean": True, "array": [], "null": None}[kind]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("instruction_following", {"prompt": "x"}, "f:3: field 'instruction_id_list' is missing"),
        ("instruction_following", {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, ""),
        (
            "instruction_following",
            {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]},
            "one entry per id",
        ),
        (
            "instruction_following",
            {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "grading_mode": "soft"},
            "'grading_mode' is 'soft'",
        ),
        (
            "instruction_following",
            {"prompt": "x", "instruction_id_list": ["no:such"]},
            "'instruction_id_list': instruction id 'no:such'",
        ),
        ("mcqa", {"prompt": "x", "options": "A"}, "field 'options' is text but not JSON"),
        ("mcqa", {"prompt": "x", "options": [{"A": "1"}], "expected_answer": "C"}, "is 'C'; the options are A"),
        ("structured_output", {"prompt": "x"}, "field 'schema_str' is missing"),
        ("structured_output", {"prompt": "x", "schema_str": "{"}, "field 'schema_str' is text but not JSON"),
        ("long_context", {"prompt": "x"}, "field 'expected_answer' is missing"),
        ("math", {"prompt": "x"}, "field 'expected_answer' is missing"),
    ],
)
def test_broken_rows_name_the_field(name: str, row: dict[str, Json], message: str) -> None:
    domain = domains.load(name)
    if not message:
        assert domain.parse_row(row, "f:3").truth["kwargs"] == [{}]
        return
    with pytest.raises(UserError, match=message):
        domain.parse_row(row, "f:3")


def test_nulls_in_kwargs_are_dropped_and_text_is_read() -> None:
    domain = domains.load("instruction_following")
    row = {
        "prompt": "x",
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": '[{"n": 3, "m": null}, "{\\"k\\": 1}"]',
    }
    task: Task = domain.parse_row(row, "f:1")
    assert task.truth["kwargs"] == [{"n": 3}, {"k": 1}]
