"""Structured output: strict JSON, strict schema, nothing fetched."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from nemo_cascade.reward.schema import check_schema, complies, grade, parse_json, strictify
from nemo_cascade.types import Json, UserError
from tests.released import released_data

SCHEMA: dict[str, Json] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
        "properties": {"type": "object", "properties": {"deep": {"type": "null"}}},
    },
    "required": ["name"],
}
TEXT = json.dumps(SCHEMA)


def test_strictify_closes_every_object() -> None:
    strict = strictify(SCHEMA)
    assert isinstance(strict, dict)
    assert strict["required"] == ["name", "tags", "properties"]
    assert strict["additionalProperties"] is False
    properties = strict["properties"]
    assert isinstance(properties, dict)
    assert properties["tags"] == {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"n": {"type": "integer"}},
            "required": ["n"],
            "additionalProperties": False,
        },
    }
    assert properties["properties"]["required"] == ["deep"]  # type: ignore[index,call-overload]
    assert SCHEMA["required"] == ["name"], "the given schema stays as it is"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"name": "Lee", "tags": [{"n": 1}], "properties": {"deep": null}}', 1.0),
        (' {"name": "Lee", "tags": [], "properties": {"deep": null}}\n', 1.0),
        ('{"name": "Lee", "tags": []}', 0.0),
        ('{"name": "Lee", "tags": [], "properties": {"deep": null}, "more": 1}', 0.0),
        ('{"name": 3, "tags": [], "properties": {"deep": null}}', 0.0),
        ('{"name": "Lee", "tags": [{"n": 1.5}], "properties": {"deep": null}}', 0.0),
        ('```json\n{"name": "Lee", "tags": [], "properties": {"deep": null}}\n```', 0.0),
        ('Here: {"name": "Lee", "tags": [], "properties": {"deep": null}}', 0.0),
        ('{"name": "Lee", "name": "Wu", "tags": [], "properties": {"deep": null}}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_grades(text: str, reward: float) -> None:
    assert grade(TEXT, text).reward == reward


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "-Infinity", '{"a": 1, "a": 1}', "{'a': 1}", "[1,]", "01"])
def test_what_is_not_json(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_reasons_name_the_place() -> None:
    wrong = grade(TEXT, '{"name": "Lee", "tags": [{"n": "x"}], "properties": {"deep": null}}')
    assert wrong.reason.startswith("tags/0/n: ")
    assert wrong.parts == {"json": 1.0, "schema": 0.0}


def test_remote_references_are_never_fetched() -> None:
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match="never fetched"):
            check_schema(json.dumps({"$ref": f"http://127.0.0.1:{server.server_port}/x.json"}))
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []


def test_broken_schemas_are_the_rows_fault() -> None:
    for text in ("{", "3", '{"type": "nonsense"}'):
        with pytest.raises(UserError, match="fix or drop the row"):
            check_schema(text)


def test_local_references_work() -> None:
    schema = {"$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}}}, "$ref": "#/$defs/point"}
    assert grade(json.dumps(schema), '{"x": 1}').reward == 1.0
    assert grade(json.dumps(schema), "{}").reward == 0.0


def test_tool_arguments_are_checked_as_they_stand() -> None:
    assert complies({"type": "object", "properties": {"a": {"type": "string"}}}, {})
    assert not complies({"type": "object", "required": ["a"]}, {})


def test_recorded_rewards() -> None:
    folder = released_data()
    rows = [json.loads(line) for line in (folder / "gym/structured_outputs.example_rollouts.jsonl").open()]
    texts = [row["response"]["output"][-1]["content"][0]["text"] for row in rows]
    assert [grade('{"type": "object"}', text).reward for text in texts] == [row["reward"] for row in rows]
    for line in (folder / "gym/structured_outputs.example.jsonl").open():
        check_schema(json.loads(line)["schema_str"])
