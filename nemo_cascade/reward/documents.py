"""YAML, XML, TOML and CSV answers as the JSON value that a schema can judge; whatever is no plain value is an error.

As in the released environment: XML becomes an object whose one key is the root element (repeated elements are lists,
empty ones null, attributes `@name`), CSV a list of rows, and texts of these two are read as the numbers and booleans
that the schema wants at their place. Stricter than it, because answers are hostile: duplicate keys, NaN, anchors and
aliases of YAML, and DTDs of XML are errors, nothing is ever fetched or expanded, and a CSV needs a row (there, any line
of prose is a table without rows, which fits every list). Dates that YAML and TOML read as dates are no JSON, so an
answer must quote them where the schema wants text (the released environment gives 0 there, too).
"""

from __future__ import annotations

import csv
import functools
import io
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any
from xml.parsers import expat

from nemo_cascade.types import Json

MAX_CHARS = 200_000
MAX_DEPTH = 100
MAX_NUMBER = 400  # characters
_KEY = r"""(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?:^[ \t\[]*+|[{{,][ \t]*+){_KEY}(?:[ \t]*+\.[ \t]*+{_KEY}){{{MAX_DEPTH}}}", re.MULTILINE)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)


class Unreadable(ValueError):
    """The text is not a document of its kind, or holds what JSON cannot."""


def parse_document(kind: str, text: str) -> Json:
    """The value of a `yaml`, `xml`, `toml` or `csv` text. Raises Unreadable."""
    if len(text) > MAX_CHARS:
        raise Unreadable(f"longer than {MAX_CHARS} characters")
    try:
        value = PARSERS[kind](text)
        return value if kind == "csv" else _plain(value, 0)  # a table holds texts and nulls
    except RecursionError as error:
        raise Unreadable("nested too deeply") from error


def fitted(kind: str, value: Json, schema: Json) -> Json:
    """The value with its texts read as the schema's types, for the kinds that know only text; else as it is.

    A text that is no number stays a text, so that the schema can say what is wrong with it.
    """
    if kind == "xml":
        return _fit_element(value, schema)
    if kind == "csv" and isinstance(value, list):
        items = schema.get("items", schema) if isinstance(schema, dict) else {}
        columns = items.get("properties", {}) if isinstance(items, dict) else {}
        tables = [row for row in value if isinstance(row, dict)]
        types = {name: _type_of(columns, name, "string") for name in (tables[0] if tables else ())}
        if all(kind == "string" for kind in types.values()):
            return tables  # type: ignore[return-value]
        return [{name: _fit_text(text, types[name]) for name, text in row.items()} for row in tables]
    return value


def _plain(value: Any, depth: int) -> Json:
    """The value itself when it is JSON through and through."""
    if depth > MAX_DEPTH:
        raise Unreadable("nested too deeply")
    if isinstance(value, dict):
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            raise Unreadable(f"the key {odd!r} is no text")
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise Unreadable(f"{value} is not JSON")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise Unreadable(f"a {type(value).__name__} is not JSON; quote it")


@functools.cache
def _yaml_loader() -> Any:
    """PyYAML's safe loader, which builds plain values only, made strict. Imported late: it takes 30 ms."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe, and without what two readers may read differently."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise Unreadable("aliases are not allowed")
            if getattr(self.peek_event(), "anchor", None) is not None:
                raise Unreadable("anchors are not allowed")
            if self.depth > MAX_DEPTH:
                raise Unreadable("nested too deeply")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    raise Unreadable(f"the key {str(key)[:60]!r} is no text")
                if key in seen:
                    raise Unreadable(f"duplicate key {str(key)[:60]!r}")
                seen.add(key)
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            if len(node.value) > MAX_NUMBER and node.tag.endswith((":int", ":float")):
                raise Unreadable(f"a number of {len(node.value)} characters")
            return super().construct_scalar(node)

    return Loader


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, _yaml_loader())
    except Unreadable:
        raise
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise Unreadable(" ".join(str(error).split())[:200]) from error


def _toml(text: str) -> Any:
    if _LONG_KEY.search(text):  # tomllib's time grows with the square of a key's parts
        raise Unreadable("nested too deeply")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unreadable(str(error)) from error


def _csv(text: str) -> Any:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [row for row in lines if row]
    except csv.Error as error:
        raise Unreadable(f"line {lines.line_num}: {error}") from error
    if not rows:
        raise Unreadable("no header")
    header, *body = rows
    if not body:
        raise Unreadable("no rows")
    if len(set(header)) != len(header):
        raise Unreadable(f"duplicate column {Counter(header).most_common(1)[0][0][:60]!r}")
    if len(header) * len(body) > MAX_CHARS:  # short rows under a long header: a table far larger than its text
        raise Unreadable(f"{len(body)} rows of {len(header)} cells")
    for number, row in enumerate(body, start=1):
        if len(row) > len(header):
            raise Unreadable(f"row {number} has {len(row)} cells, the header {len(header)}")
    return [dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=True)) for row in body]


class _Element:
    """An element while its children come in."""

    def __init__(self, name: str, attributes: Mapping[str, str]) -> None:
        self.name = name
        self.children: dict[str, Any] = {f"@{key}": value for key, value in attributes.items()}
        self.text: list[str] = []

    def add(self, name: str, value: Any) -> None:
        """A child; the second one of a name makes a list."""
        if name not in self.children:
            self.children[name] = value
        elif isinstance(self.children[name], list):
            self.children[name].append(value)
        else:
            self.children[name] = [self.children[name], value]

    def value(self) -> Any:
        """Text, children, both (`#text`), or null for an empty element."""
        text = "".join(self.text).strip()
        if not self.children:
            return text or None
        return {**self.children, "#text": text} if text else self.children


def _xml(text: str) -> Any:
    top = _Element("", {})
    stack = [top]

    def refuse(*_: object) -> None:
        raise Unreadable("a DOCTYPE is not allowed")

    def opened(name: str, attributes: dict[str, str]) -> None:
        if len(stack) > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        stack.append(_Element(name, attributes))

    def closed(name: str) -> None:
        done = stack.pop()
        stack[-1].add(name, done.value())

    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse  # entities can only be declared there
    parser.StartElementHandler = opened
    parser.EndElementHandler = closed
    parser.CharacterDataHandler = lambda data: stack[-1].text.append(data)
    try:
        parser.Parse(text.encode("utf-8", "surrogatepass"), True)
    except expat.ExpatError as error:
        raise Unreadable(str(error)) from error
    return top.children


PARSERS: dict[str, Callable[[str], Any]] = {"yaml": _yaml, "xml": _xml, "toml": _toml, "csv": _csv}


def _type_of(properties: Json, name: str, default: str) -> Json:
    field = properties.get(name) if isinstance(properties, dict) else None
    return field.get("type", default) if isinstance(field, dict) else default


def _fit_element(value: Json, schema: Json) -> Json:
    """XML has no lists and no types: the schema says where one element is a list of one, and what a text stands for."""
    if not isinstance(schema, dict) or "type" not in schema:
        return value
    kind = schema["type"]
    if isinstance(kind, list):
        shape = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else ""
        kind = shape if shape in kind else kind
    if kind == "object" and isinstance(value, dict):
        properties = schema.get("properties")
        inner = properties if isinstance(properties, dict) else {}
        return {name: _fit_element(item, inner.get(name)) for name, item in value.items()}
    if kind == "array":
        if isinstance(value, dict) and len(value) == 1:  # <skills><skill>a</skill><skill>b</skill></skills>
            value = next(iter(value.values()))
        items = value if isinstance(value, list) else [value] if value is not None else []
        return [_fit_element(item, schema.get("items")) for item in items]
    if value is None:
        return "" if kind == "string" else None
    return _fit_text(value, kind)


def _fit_text(value: Json, kind: Json) -> Json:
    """A text as a value of the wanted type; of several types, the first that it fits."""
    if isinstance(kind, list):
        if value in (None, "") and "null" in kind:
            return None
        fits = (_fit_text(value, one) for one in kind if one not in ("null", "string"))
        return next((fit for fit in fits if not isinstance(fit, str)), value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if kind == "integer" and _INTEGER.fullmatch(text) and len(text) <= MAX_NUMBER:
        return int(text)
    if kind == "number":
        return _float(text, value)
    if kind == "boolean" and text.lower() in ("true", "1", "false", "0"):
        return text.lower() in ("true", "1")
    return value


def _float(text: str, value: str) -> Json:
    try:
        number = float(text)
    except ValueError:
        return value
    return number if math.isfinite(number) and text.isascii() and "_" not in text else value
