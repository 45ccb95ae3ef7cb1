"""YAML, XML, TOML and CSV answers: what they mean under a schema, and what hostile ones cannot do."""

from __future__ import annotations

import json
import time

import pytest

from nemo_cascade import domains
from nemo_cascade.reward.documents import MAX_CHARS, Unreadable, parse_document
from nemo_cascade.reward.schema import KINDS, grade
from nemo_cascade.types import Json, Message, Scored, Transcript, UserError

PERSON: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "height": {"type": "number"},
        "member": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "note": {"type": ["string", "null"]},
    },
}
ROOTED: Json = {"type": "object", "properties": {"person": PERSON}}
TABLE: Json = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": ["integer", "null"]},
            "member": {"type": "boolean"},
        },
    },
}
XML = (
    "<?xml version='1.0' encoding='ISO-8859-1'?><person><name>Zo\u00eb</name><age>64</age><height>1.5</height>"
    "<member>true</member><tags><tag>a</tag><tag>b</tag></tags><note/></person>"
)
YAML = "name: Zo\u00eb\nage: 64\nheight: 1.5\nmember: true\ntags: [a, b]\nnote: null\n"
TOML = 'name = "Zo\u00eb"\nage = 64\nheight = 1.5\nmember = true\ntags = ["a", "b"]\nnote = ""\n'


@pytest.mark.parametrize(
    ("kind", "schema", "text", "reward"),
    [
        ("yaml", PERSON, YAML, 1.0),
        ("yaml", PERSON, f"---\n{YAML}", 1.0),
        ("yaml", PERSON, f"```yaml\n{YAML}```", 0.0),
        ("yaml", PERSON, f"Here it is:\n\n{YAML}", 0.0),
        ("yaml", PERSON, YAML + "age: 65\n", 0.0),  # a duplicate key
        ("yaml", PERSON, YAML + "more: 1\n", 0.0),
        ("yaml", PERSON, YAML.replace("64", ".nan"), 0.0),
        ("yaml", PERSON, YAML.replace("Zo\u00eb", "2024-06-10"), 0.0),  # YAML reads a date, which is no text
        ("yaml", PERSON, YAML.replace("Zo\u00eb", "'2024-06-10'"), 1.0),
        ("yaml", PERSON, f"{YAML}---\n{YAML}", 0.0),  # two documents
        ("toml", PERSON, TOML, 1.0),
        ("toml", PERSON, TOML + "age = 65\n", 0.0),
        ("toml", PERSON, TOML.replace("64", "nan"), 0.0),
        ("toml", PERSON, TOML.replace('"Zo\u00eb"', "2024-06-10"), 0.0),
        ("toml", PERSON, YAML, 0.0),
        ("xml", ROOTED, XML, 1.0),
        ("xml", ROOTED, XML.replace("<tag>b</tag>", ""), 1.0),  # a list of one
        ("xml", ROOTED, XML.replace("<tag>a</tag><tag>b</tag>", ""), 1.0),  # an empty list
        ("xml", ROOTED, XML.replace("64", "old"), 0.0),
        ("xml", ROOTED, XML.replace("64", "\uff16\uff14"), 0.0),
        ("xml", ROOTED, XML.replace("64", ""), 0.0),  # an empty element is no number
        ("xml", ROOTED, XML.replace("1.5", "nan"), 0.0),
        ("xml", ROOTED, XML.replace("<name>", "<name id='1'>"), 0.0),  # an attribute makes it an object
        ("xml", ROOTED, XML.replace("<age>64</age>", "<age>64</age><age>65</age>"), 0.0),
        ("xml", ROOTED, XML.replace("person>", "human>"), 0.0),
        ("xml", ROOTED, XML.removesuffix("</person>"), 0.0),
        ("csv", TABLE, "name,age,member\nZo\u00eb,64,true\n\"Wu, Lee\",,0\n", 1.0),
        ("csv", TABLE, "name,age,member\r\nZo\u00eb,64,TRUE\r\n", 1.0),
        ("csv", TABLE, "name,age\nZo\u00eb,64\n", 0.0),
        ("csv", TABLE, "name,age,member\nZo\u00eb,old,true\n", 0.0),
        ("csv", TABLE, "name,age,member\nZo\u00eb,64,true,more\n", 0.0),
        ("csv", TABLE, "name,age,member\nZo\u00eb,64\n", 0.0),
        ("csv", TABLE, "name,name,member\nZo\u00eb,64,true\n", 0.0),
        ("csv", TABLE, "I cannot do that.", 0.0),  # any line is a header; a table needs a row
        ("csv", TABLE, "", 0.0),
        ("json", PERSON, YAML, 0.0),
        ("json", PERSON, '{"name": "\\ud800"}', 0.0),
    ],
)  # fmt: skip
def test_grades(kind: str, schema: Json, text: str, reward: float) -> None:
    outcome = grade(json.dumps(schema), text, kind)
    assert outcome.reward == reward, outcome.reason


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
LAUGHS = "<!DOCTYPE l [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>]><l>&b;</l>"
FETCH = "<!DOCTYPE l SYSTEM 'file:///etc/passwd'><l/>"


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("yaml", BOMB, "anchors are not allowed"),
        ("yaml", "a: *b", "aliases are not allowed"),
        ("yaml", "!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("yaml", "? [a]\n: 1", "is no text"),
        ("yaml", "1: a", "the key 1 is no text"),
        ("yaml", "a: !!binary aGk=", "a bytes is not JSON"),
        ("yaml", "a: !!set {b}", "a set is not JSON"),
        ("yaml", "a: 2024-13-45", "month must be"),
        ("yaml", "a: !!bool x", "x"),
        ("yaml", "[" * 5000, "too deeply"),
        ("yaml", "a: 1" + ":59" * 5000, "a number of"),
        ("xml", LAUGHS, "DOCTYPE"),
        ("xml", FETCH, "DOCTYPE"),
        ("xml", "<a>" * 5000, "too deeply"),
        ("xml", "<a>&b;</a>", "undefined entity"),
        ("xml", "<a/><b/>", "junk after"),
        ("xml", "<a>\x00</a>", "invalid token"),
        ("xml", "<a>\ud800</a>", "invalid token"),
        ("toml", "a = " + "[" * 5000, "too deeply"),
        ("toml", "a = inf", "inf is not JSON"),
        ("csv", 'a,b\n"x,1\n', "line 2"),
        ("csv", "a\n" + "x" * 150_000, "field larger"),
    ],
)
def test_hostile_documents_are_refused(kind: str, text: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        parse_document(kind, text)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    "unit", ["- a\n", "a: b\n", "<a>b</a>", 'a = "b"\n', "a,b\n", "[", "{a: ", '"', "'", "- - ", "1:", "\u00e9"]
)
def test_the_longest_text_takes_no_longer_than_seconds(kind: str, unit: str) -> None:
    text = (unit * MAX_CHARS)[: MAX_CHARS // 20]
    began = time.process_time()
    outcome = grade('{"type": "object"}', text, kind)
    assert outcome.reward == 0.0
    assert time.process_time() - began < 5.0
    assert "longer than" in grade("{}", "x" * (MAX_CHARS + 1), kind).reason


def row(**fields: Json) -> dict[str, Json]:
    return {"prompt": "x", "schema_str": json.dumps(PERSON), **fields}


def test_a_row_names_its_kind() -> None:
    domain = domains.load("structured_output")
    for kind, text in (("YAML", YAML), ("toml", TOML)):
        task = domain.parse_row(row(schema_type=kind), "f:1")
        right = domain.score(task, Transcript((Message("assistant", text),)))
        wrong = domain.score(task, Transcript((Message("assistant", json.dumps({"name": "Zo\u00eb"})),)))
        assert isinstance(right, Scored) and isinstance(wrong, Scored)
        assert (right.reward, wrong.reward) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_type": "ini"}, "f:1: field 'schema_type' is 'ini'; known: json, yaml, xml, toml, csv"),
        ({"response_mode": "voice"}, "f:1: field 'response_mode' is 'voice'; known: text, tool_call"),
        ({"response_mode": "tool_call"}, "f:1: field 'tool_name' is missing"),
        ({"response_mode": "tool_call", "tool_name": 3}, "f:1: field 'tool_name' must be text, this is int"),
        ({"response_mode": "tool_call", "tool_name": "a", "tool_payload_key": 1}, "'tool_payload_key' must be text"),
    ],
)
def test_broken_rows_name_the_field(fields: dict[str, Json], message: str) -> None:
    with pytest.raises(UserError, match=message):
        domains.load("structured_output").parse_row(row(**fields), "f:1")
