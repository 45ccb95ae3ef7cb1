"""YAML into dataclasses without forgiveness: an unknown key, a wrong type or a missing value is one line with its
remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_cascade.types import UserError

Config = TypeVar("Config")
Raw = dict[str, Any]


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, else the list of what is known."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.55)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def show(path: Path) -> str:
    """A path as the user would type it: relative to the working folder where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read_yaml(path: Path) -> Raw:
    """A YAML mapping as plain containers; numbers such as 1e-4 are floats, as OmegaConf reads them."""
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{show(path)}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{show(path)}: not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"{show(path)}: {_yaml_reason(error)}") from error
    except (OSError, OmegaConfBaseException) as error:
        raise UserError(f"{show(path)}: {first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{show(path)}: a mapping of keys to values is needed")
    return plain(loaded, show(path))


def plain(config: DictConfig, origin: str) -> Raw:
    """Plain containers with interpolations resolved, so that what is hashed is what runs."""
    try:
        content = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {first_line(error)}") from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def first_line(error: Exception) -> str:
    """What an exception says, without the lines that OmegaConf appends."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return first_line(error)


def build(cls: type[Config], raw: Mapping[str, Any], origin: str) -> Config:
    """A dataclass from plain containers: keys, types and mandatory values are checked, in this order."""
    check_keys(cls, raw, origin)
    try:
        config = OmegaConf.merge(_structured(cls), dict(raw))
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: key {error.full_key!r}: {_reason(first_line(error))}") from error
    assert isinstance(config, DictConfig)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{origin}: key {missing[0]!r} is missing; give it a value")
    try:
        made = OmegaConf.to_object(config)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    assert isinstance(made, cls)
    return made


@lru_cache
def _structured(cls: type) -> DictConfig:
    return OmegaConf.structured(cls)


def _reason(message: str) -> str:
    """OmegaConf's sentence in the words of a YAML author."""
    for ours, theirs in (
        ("an integer", "Integer"),
        ("a number", "Float"),
        ("true or false", "Boolean"),
        ("a text", "String"),
    ):
        if message.endswith(f"could not be converted to {theirs}"):
            value = message.removeprefix("Value ").rsplit(" of type ", 1)[0]
            return f"{value} is not {ours}"
    return message


def check_keys(cls: type, raw: Mapping[str, Any], origin: str, prefix: str = "") -> None:
    """Refuse keys that the dataclass does not have, at every depth, before any value is looked at."""
    hints = field_types(cls)
    for key, value in raw.items():
        if key not in hints:
            raise UserError(f"{origin}: key {prefix + str(key)!r} unknown{_suggest(cls, str(key), prefix)}")
        inner = dataclass_inside(hints[key])
        if inner is None:
            continue
        listed = get_origin(hints[key]) is list
        if value is not None and not isinstance(value, list if listed else Mapping):
            wanted = "a list" if listed else "a mapping of keys to values"
            raise UserError(f"{origin}: key {prefix + str(key)!r}: {value!r} is not {wanted}")
        if isinstance(value, Mapping):
            check_keys(inner, value, origin, f"{prefix}{key}.")
        for index, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, Mapping):
                check_keys(inner, item, origin, f"{prefix}{key}[{index}].")


def _suggest(cls: type, key: str, prefix: str) -> str:
    """A sibling that looks alike, else the place where a key of exactly this name lives, else every sibling."""
    hints = field_types(cls)
    close = difflib.get_close_matches(key, list(hints), n=1, cutoff=0.6)
    if close:
        return f"; did you mean {prefix + close[0]!r}?"
    deeper = [path for path in leaf_paths(cls) if path.rsplit(".", 1)[-1] == key]
    if deeper:
        return f"; did you mean {prefix + deeper[0]!r}?"
    return f"; known: {', '.join(hints)}"


@lru_cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved type of a config dataclass."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def dataclass_inside(hint: Any) -> type | None:
    """The dataclass of `X`, `Optional[X]` or `list[X]`, None for anything else."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    if get_origin(hint) in (Union, types.UnionType, list):
        for argument in get_args(hint):
            found = dataclass_inside(argument)
            if found is not None:
                return found
    return None


def leaf_paths(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a dataclass (`optimizer.lr`); lists of dataclasses are not entered."""
    for name, hint in field_types(cls).items():
        inner = dataclass_inside(hint)
        if inner is not None and get_origin(hint) is not list:
            yield from leaf_paths(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b.c=VALUE` as its path and its value read as YAML (1e-4 a number, [1, 2] a list)."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or "" in key.strip().split("."):
        raise UserError(f"override {text!r}: write it as key=value, for example stages.if_rl.optimizer.lr=1e-4")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {text!r}: the value is not YAML ({first_line(error)})") from error
    assert isinstance(parsed, dict)
    return key.strip().split("."), parsed["value"]


def put(raw: Raw, path: list[str], value: Any) -> Raw:
    """A copy of `raw` with the value at `path` replaced (mappings too: an override says what it means)."""
    head, *rest = path
    if not rest:
        return {**raw, head: value}
    below = raw.get(head)
    return {**raw, head: put(below if isinstance(below, dict) else {}, rest, value)}
