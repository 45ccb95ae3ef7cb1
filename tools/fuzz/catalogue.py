"""What a parser of the catalogue is, and how a function is put into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.fuzz.grammars import Grammar

Read = Callable[[str], object]


@dataclass(frozen=True)
class Parser:
    """One parser: what it reads for whom, how its texts look, what it may raise, how long a text may take.

    `modules`: whose code it runs, by names below `nemo_cascade`. `seconds` of CPU, for a text of at most 2^17
    characters.
    """

    name: str
    read: Read
    grammar: Grammar
    domains: tuple[str, ...]
    modules: tuple[str, ...]
    refuses: tuple[type[Exception], ...] = ()
    seconds: float = 1.0


CATALOGUE: dict[str, Parser] = {}


def parser(
    name: str,
    grammar: Grammar,
    domains: str,
    modules: str,
    refuses: tuple[type[Exception], ...] = (),
    seconds: float = 1.0,
) -> Callable[[Read], Read]:
    """Puts a function into the catalogue; `domains` and `modules` are names between blanks."""

    def put(read: Read) -> Read:
        CATALOGUE[name] = Parser(name, read, grammar, tuple(domains.split()), tuple(modules.split()), refuses, seconds)
        return read

    return put


def as_bytes(text: str) -> bytes:
    """The bytes that a text was decoded from, where there are such."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
