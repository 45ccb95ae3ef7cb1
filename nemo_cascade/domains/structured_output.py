"""Structured output: the whole answer is one document that fits the strict schema (section 5.3; reward 1 or 0).

JSON, YAML, XML, TOML or CSV as `schema_type` says, or the arguments of the one call of the row's tool.

Nano: pick named fields out of a sentence. The released reward checks no values; the nano schemas pin them with `const`,
so that a well-formed invention earns nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

from nemo_cascade.data import rows, splits
from nemo_cascade.data.nano_words import CITIES, COLORS, NAMES
from nemo_cascade.domains import SingleTurn, content_of, make_task, unanswered
from nemo_cascade.reward import schema
from nemo_cascade.types import Case, Json, Message, Outcome, Scored, Split, Task, Transcript, UserError

KEYS = ("name", "age", "city", "color")
RESPONSE_MODES = ("text", "tool_call")


def _make(rng: random.Random) -> Task:
    """A person in a sentence and two of the four keys, in any order."""
    person: dict[str, Json] = {
        "name": rng.choice(NAMES),
        "age": rng.randint(11, 89),
        "city": rng.choice(CITIES),
        "color": rng.choice(COLORS),
    }
    return _task(person, rng.sample(KEYS, 2))


def _task(person: Mapping[str, Json], keys: list[str]) -> Task:
    prompt = (
        f"{person['name']} is {person['age']}, from {person['city']}, likes {person['color']}. JSON: {', '.join(keys)}"
    )
    properties: dict[str, Json] = {key: {"const": person[key]} for key in keys}
    wanted: dict[str, Json] = {"type": "object", "properties": properties, "required": list(keys)}
    return make_task(StructuredOutput.name, prompt, {"schema_str": json.dumps(wanted), "schema_type": "json"})


class StructuredOutput(SingleTurn):
    """Schema-constrained answers in the released data, and their nano form."""

    name = "structured_output"

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Prompts such as `Lee is 64, from Lima, likes green. JSON: city, age`."""
        return splits.draw(_make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """The object alone. Faults: a key left out, a key too many, chat around it, a bare value."""
        rng = random.Random(f"{task.id}/{seed}")
        properties = json.loads(str(task.truth["schema_str"])).get("properties", {})
        if not properties or not all(isinstance(field, dict) and "const" in field for field in properties.values()):
            raise UserError(f"task {task.id}: only generated structured_output tasks have demonstrations")
        value = {key: field["const"] for key, field in properties.items()}
        reasoning = f"Keys {' '.join(value)}." if task.thinking else ""
        content = json.dumps(value)
        if rng.random() < flaw_rate:
            first, second = value
            fewer = json.dumps({first: value[first]})
            more = json.dumps({**value, rng.choice([key for key in KEYS if key not in value]): rng.choice(COLORS)})
            content = rng.choice((fewer, more, f"Hello. {content} Bye.", f"{value[first]}, {value[second]}"))
        return (Message("assistant", content, reasoning),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """`schema_str` (JSON text) and `schema_type`; rows that want the object as a tool call keep `tool_name`."""
        given = rows.verifier_field(row, "schema_str")
        text = (
            json.dumps(given)
            if isinstance(given, dict)
            else rows.field({"schema_str": given}, "schema_str", str, row_id)
        )
        if not isinstance(rows.loose_json(text, "schema_str", row_id), dict):
            raise UserError(f"{row_id}: field 'schema_str' must hold a JSON object")
        try:
            schema.check_schema(text)
        except UserError as error:
            raise UserError(f"{row_id}: field 'schema_str': {error}") from error
        kind = str(rows.verifier_field(row, "schema_type") or "json").lower()
        if kind not in schema.KINDS:
            raise UserError(f"{row_id}: field 'schema_type' is {kind!r}; known: {', '.join(schema.KINDS)}")
        mode = rows.verifier_field(row, "response_mode") or "text"
        if mode not in RESPONSE_MODES:
            raise UserError(f"{row_id}: field 'response_mode' is {mode!r}; known: {', '.join(RESPONSE_MODES)}")
        truth: dict[str, Json] = {"schema_str": text, "schema_type": kind}
        if mode == "tool_call":
            named = {key: rows.verifier_field(row, key) for key in ("tool_name", "tool_payload_key")}
            truth["tool_name"] = rows.field(named, "tool_name", str, row_id)
            if named["tool_payload_key"] is not None:
                rows.field(named, "tool_payload_key", str, row_id)
            truth["tool_payload_key"] = named["tool_payload_key"]
        return make_task(self.name, rows.input_messages(row, row_id), truth, rows.input_tools(row, row_id))

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """1 when the final content (or the one call of the row's tool) is valid against the strict schema."""
        if "tool_name" in task.truth:
            text = _payload(task, transcript)
            if text is None:
                return Scored(0.0, reason=f"not exactly one call of {task.truth['tool_name']}")
            return schema.grade(str(task.truth["schema_str"]), text)
        failed = unanswered(transcript)
        if failed is not None:
            return failed
        kind = str(task.truth.get("schema_type") or "json")
        return schema.grade(str(task.truth["schema_str"]), transcript.final.content, kind)

    def cases(self) -> list[Case]:
        """One person, answered rightly, wrongly and by cheating."""
        task = _task({"name": "Lee", "age": 64, "city": "Lima", "color": "green"}, ["age", "city"])

        def case(content: str, reward: float, because: str, hack: bool = False, reasoning: str = "") -> Case:
            return Case(task, Transcript((Message("assistant", content, reasoning),)), reward, because, hack)

        return [
            case('{"age": 64, "city": "Lima"}', 1.0, "both keys with their values"),
            case('{\n "city": "Lima",\n "age": 64\n}', 1.0, "order and white space are free"),
            case('{"age": 64}', 0.0, "a key is missing"),
            case('{"age": "64", "city": "Lima"}', 0.0, "a number written as text"),
            case('{"age": 64, "city": "Lima", "color": "green"}', 0.0, "a key that the schema lacks"),
            case("64, Lima", 0.0, "no JSON"),
            case('Hello. {"age": 64, "city": "Lima"} Bye.', 0.0, "text around the JSON", hack=True),
            case('{"age": 1, "age": 64, "city": "Lima"}', 0.0, "a duplicate key", hack=True),
            case('{"age": NaN, "city": "Lima"}', 0.0, "NaN is no JSON", hack=True),
            case("{}", 0.0, "an empty object", hack=True),
            case("", 0.0, "the answer only inside the reasoning", hack=True, reasoning='{"age": 64, "city": "Lima"}'),
            Case(
                task,
                Transcript((Message("assistant", '{"age": 64, "city": "Lima"}'),), truncated=True),
                0.0,
                "truncated",
            ),
        ]


def _payload(task: Task, transcript: Transcript) -> str | None:
    """The JSON text that the one call of the row's tool carries; None when there is no such call."""
    calls = transcript.final.tool_calls
    if transcript.truncated or len(calls) != 1 or calls[0].name != task.truth["tool_name"]:
        return None
    key = task.truth.get("tool_payload_key")
    if key is None:
        return json.dumps(dict(calls[0].arguments))
    return json.dumps(calls[0].arguments[key]) if set(calls[0].arguments) == {key} else None


DOMAIN = StructuredOutput
