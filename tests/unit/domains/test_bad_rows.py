"""Rows with missing, null, misspelt or mistyped fields: a Task or one line that names the row, never another error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_cascade import domains
from nemo_cascade.data.rows import read_jsonl
from nemo_cascade.types import Json, Message, Task, Transcript, UserError
from tests.released import released_data

PROMPT: dict[str, Any] = {
    "input": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ],
    "tools": [{"type": "function", "name": "add", "description": "adds", "parameters": {"type": "object"}}],
    "metadata": {"x": "y"},
}
ROWS: dict[str, dict[str, Any]] = {
    "instruction_following": {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [None, {"num_words": 3, "relation": "at least"}],
        "grading_mode": "binary",
    },
    "mcqa": {
        "options": [{"A": "one"}, {"B": "two"}],
        "expected_answer": "A",
        "template_metadata": {"output_regex": "Answer: (.)"},
        "grading_mode": "lenient_boxed",
    },
    "structured_output": {
        "schema_str": '{"type": "object", "properties": {"a": {"type": "string"}}}',
        "schema_type": "json",
        "response_mode": "tool_call",
        "tool_name": "add",
        "tool_payload_key": "extraction",
    },
    "tool_use": {"ground_truth": [{"name": "email_delete_email", "arguments": '{"email_id": "1"}'}]},
    "math": {"question": "1+1?", "expected_answer": "2"},
    "code": {
        "verifier_metadata": {"unit_tests": {"inputs": ["1", "2"], "outputs": ["1", "2"], "fn_name": None}},
        "hash_id": "h",
        "language": "python",
    },
    "long_context": {"question": "Who?", "expected_answer": "Ann"},
    "preference": {"principle": "short"},
    "swe_agentless": {
        "instance": {
            "instance_id": "i",
            "repo": "r",
            "base_commit": "c",
            "problem_statement": "p",
            "patch": "q",
            "FAIL_TO_PASS": ["a"],
            "PASS_TO_PASS": ["b"],
        },
        "metadata": {"a": "b"},
    },
    "swe_agentic": {
        "instance_id": "i",
        "repo": "r",
        "base_commit": "c",
        "problem_statement": "p",
        "FAIL_TO_PASS": '["a"]',
        "PASS_TO_PASS": ["b"],
    },
    "nemo_gym": {"anything": 1},
}
WRONG: tuple[Any, ...] = (
    None,
    7,
    1.5,
    True,
    "",
    "text",
    "{",
    [],
    [None],
    [7],
    [[]],
    {},
    {"x": None},
    "\ud800",
    "9" * 5000,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a row, the row itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((*path, key), *places(item, (*path, key)))]


def changed(row: dict[str, Any], path: tuple[Any, ...], how: str, value: Any = None) -> dict[str, Any]:
    copied = copy.deepcopy(row)
    holder = copied
    for step in path[:-1]:
        holder = holder[step]
    old = holder.pop(path[-1]) if how != "replace" else None
    if how == "replace":
        holder[path[-1]] = value
    elif how == "misspell" and isinstance(holder, dict):
        holder[f"{path[-1]}s"] = old
    return copied


def variants(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for path in places(row):
        found += [changed(row, path, "remove"), changed(row, path, "misspell")]
        found += [changed(row, path, "replace", value) for value in WRONG]
    return found


@pytest.mark.parametrize("name", domains.known())
def test_any_broken_row_is_a_task_or_one_line(name: str) -> None:
    domain = domains.load(name)
    row: dict[str, Json] = {"responses_create_params": PROMPT, **ROWS[name]}
    assert isinstance(domain.parse_row(row, "rows.jsonl:7"), Task)
    refused = 0
    for broken in variants(row):
        try:
            task = domain.parse_row(broken, "rows.jsonl:7")
        except UserError as error:
            refused += 1
            assert str(error).startswith("rows.jsonl:7"), f"{error} for {broken}"
            assert "\n" not in str(error), error
        else:
            assert isinstance(task.id, str) and task.messages, broken
    assert refused > 10


@pytest.mark.parametrize("name", ["instruction_following", "mcqa", "structured_output", "long_context", "tool_use"])
def test_what_loads_scores(name: str) -> None:
    """A row that was let through gets a verdict for any answer; no error waits for the middle of a run."""
    options: dict[str, Json] = {"grading": "exact"} if name == "long_context" else {}
    domain = domains.load(name, None, options)
    row: dict[str, Json] = {"responses_create_params": PROMPT, **ROWS[name]}
    for broken in variants(row):
        try:
            task = domain.parse_row(broken, "rows.jsonl:7")
        except UserError:
            continue
        for answer in ("\\boxed{A}", '{"a": "b"}'):
            domain.score(task, Transcript((Message("assistant", answer),)))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("code", {"unit_tests": {"fn_name": "f", "inputs": ["x y"], "outputs": ["1"]}}, r"inputs\[0\] is not JSON"),
        ("code", {"unit_tests": {"fn_name": "f", "inputs": ["1"], "outputs": ["hello"]}}, r"outputs\[0\] is not JSON"),
        ("swe_agentless", {"metadata": {"relevant_file_contents": ["a"]}}, "must map paths to texts"),
        ("swe_agentless", {"metadata": {"relevant_file_contents": {"a.py": 7}}}, "must map paths to texts"),
    ],
)
def test_what_a_verdict_reads_is_read_with_the_row(name: str, fields: dict[str, Json], message: str) -> None:
    row: dict[str, Json] = {"responses_create_params": PROMPT, **ROWS[name]}
    row.pop("verifier_metadata", None)
    with pytest.raises(UserError, match=f"rows.jsonl:7.*{message}"):
        domains.load(name).parse_row({**row, **fields}, "rows.jsonl:7")


def test_real_rows_broken_at_every_place() -> None:
    """The same with the released rows, in each place above the prompt's text."""
    for path in sorted((released_data() / "gym").glob("*.example.jsonl")):
        row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        name = domains.for_row({**row, "agent_ref": {"name": path.name.removesuffix(".example.jsonl")}})
        domain = domains.load(name)
        for place in [
            place for place in places(row) if len(place) < 4 and place[:2] != ("responses_create_params", "tools")
        ]:
            for value in (None, 7, "", [], {}):
                try:
                    domain.parse_row(changed(row, place, "replace", value), "rows.jsonl:7")
                except UserError as error:
                    assert str(error).startswith("rows.jsonl:7"), error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": \xff}', r":2: not UTF-8: invalid start byte at byte 6"),
        (b'{"a": ' + b"9" * 5000 + b"}", r":2: JSON that cannot be read"),
        (b"[" * 100_000, r":2: JSON that cannot be read"),
        (b'{"a": 1', r":2: not JSON"),
        (b"3", r":2: a row must be a JSON object, this is int"),
    ],
)
def test_files_that_are_no_rows(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + content + b"\n")
    with pytest.raises(UserError, match=message):
        list(read_jsonl(path))
