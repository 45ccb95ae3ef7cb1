"""Structured output: is the whole answer one document of its kind that satisfies the schema, made strict?

Strict as in the released environment: every property required, no additional ones. Values are checked against the
schema, not against the text it was taken from. Nothing around the document is accepted, not even a code fence: the
recorded rewards give 0 to fenced answers. JSON is read here, the other kinds in `documents`.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping

import jsonschema_rs

from nemo_cascade.reward.documents import PARSERS, fitted, parse_document
from nemo_cascade.types import Json, Scored, UserError

MAX_CHARS = 1_000_000
KINDS = ("json", *PARSERS)
"""What `schema_type` may name."""


class NotStrictJson(ValueError):
    """Text that Python's parser would accept and the JSON standard does not."""


def parse_json(text: str) -> Json:
    """JSON by the standard: NaN, infinities and duplicate keys are errors. Raises ValueError."""
    if len(text) > MAX_CHARS:
        raise NotStrictJson(f"longer than {MAX_CHARS} characters")
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise NotStrictJson("nested too deeply") from error


def _no_constant(name: str) -> Json:
    raise NotStrictJson(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise NotStrictJson(f"duplicate key {twice[:60]!r}")
    return found


def strictify(schema: Json) -> Json:
    """The schema with every object closed and all its properties required, at every depth."""
    if isinstance(schema, list):
        return [strictify(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict_part(name, part) for name, part in schema.items()}
    properties = strict.get("properties")
    if isinstance(properties, dict):
        strict["required"] = list(properties)
        strict["additionalProperties"] = False
    return strict


def _strict_part(name: str, part: Json) -> Json:
    if name in ("properties", "$defs", "definitions") and isinstance(
        part, dict
    ):  # names here are the user's, not keywords
        return {inner: strictify(value) for inner, value in part.items()}
    return part if name in ("enum", "const", "required", "default", "examples") else strictify(part)


@functools.lru_cache(maxsize=2048)
def _validator(schema_text: str) -> tuple[Json, jsonschema_rs.Validator]:
    try:
        schema = json.loads(schema_text)
    except ValueError as error:
        raise UserError(f"schema_str is not JSON ({error}); fix or drop the row") from error
    if not isinstance(schema, dict):
        raise UserError(f"schema_str must hold an object, got {type(schema).__name__}; fix or drop the row")
    strict = strictify(schema)
    return strict, _compile(strict)


def _compile(schema: Json) -> jsonschema_rs.Validator:
    try:
        return jsonschema_rs.validator_for(schema, validate_formats=False, offline=True)
    except (ValueError, jsonschema_rs.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the schema cannot be used ({reason}); remote references are never fetched; fix or drop the row"
        ) from error


def check_schema(schema_text: str) -> None:
    """UserError when a row's schema is unusable: for use when rows are read."""
    _validator(schema_text)


def complies(schema: Mapping[str, Json], value: Json) -> bool:
    """Whether a value satisfies a schema as it stands (tool arguments); compiled anew each time."""
    return _compile(dict(schema)).is_valid(value)


def grade(schema_text: str, text: str, kind: str = "json") -> Scored:
    """Reward 1 when `text`, the answer without reasoning, is a document of this kind (one of `KINDS`) and satisfies the
    strict schema; else 0.
    """
    strict, validator = _validator(schema_text)
    try:
        if kind == "json":
            value = parse_json(text.strip())
        else:
            value = fitted(kind, parse_document(kind, text.strip()), strict)
    except ValueError as error:
        return Scored(0.0, {kind: 0.0, "schema": 0.0}, f"not {kind.upper()}: {error}"[:200])
    try:
        validator.validate(value)  # ends with the first error; iter_errors writes all of them before it gives one
    except jsonschema_rs.ValidationError as error:
        place = "/".join(str(step) for step in error.instance_path) or "top level"
        return Scored(0.0, {kind: 1.0, "schema": 0.0}, f"{place}: {error.message}"[:200])
    except (ValueError, OverflowError) as error:  # surrogates, nesting beyond the validator
        return Scored(0.0, {kind: 1.0, "schema": 0.0}, f"cannot be checked: {error}"[:200])
    return Scored(1.0, {kind: 1.0, "schema": 1.0}, "complies")
