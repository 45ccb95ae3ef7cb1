"""Words, sentences and paragraphs by regular expression: the same on every machine, with nothing to download."""

from __future__ import annotations

import functools
import re
import string as string_module

from nemo_cascade.types import Json, UserError

Arguments = dict[str, Json]

_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
_BOUNDARY = re.compile(r"(?<![.!?])[.!?]++[\"')\]]*+(?=\s|$)")  # without going back: dots without end are one look
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof sr jr st vs etc inc ltd co corp dept est fig no vol al "
    "e.g i.e a.m p.m u.s u.k u.n ph.d cf approx".split()
)
_NO_PUNCTUATION = str.maketrans("", "", string_module.punctuation)
_DIVIDER = re.compile(r"\s?\*\*\*\s?")
LONGEST_LOOK = 60  # characters before a dot that tell what it is
RELATIONS = ("less than", "at least")


class Unsupported(UserError):
    """An instruction id or argument that no checker here understands. Never counted as followed."""


def words(text: str) -> list[str]:
    """Runs of word characters, as IFEval counts words."""
    return _WORD.findall(text)


def tokens(text: str) -> list[str]:
    """Words with their inner hyphens and apostrophes, without punctuation."""
    return _TOKEN.findall(text)


def bare_words(text: str) -> list[str]:
    """Words between white space, in lower case and without any punctuation, as IFBench splits them."""
    return text.lower().translate(_NO_PUNCTUATION).split()


def stripped(word: str) -> str:
    """A word or line without the punctuation and spaces around it."""
    return word.strip(string_module.punctuation + " ")


def whole_word(keyword: str, text: str) -> int:
    """How often a keyword stands in the text as a word of its own, whatever the case."""
    return len(re.findall(rf"\b{re.escape(keyword.strip())}\b", text, re.IGNORECASE))


def sentences(text: str) -> list[str]:
    """Stretches that end in '.', '!' or '?' before white space; abbreviations, initials and list numbers end none."""
    return list(_sentences(text))


@functools.lru_cache(maxsize=8)  # the checks of one answer ask for the same sentences
def _sentences(text: str) -> tuple[str, ...]:
    found, start = [], 0
    for match in _BOUNDARY.finditer(text):
        if match.group()[0] == "." and _is_inner_dot(text[max(start, match.start() - LONGEST_LOOK) : match.start()]):
            continue
        found.append(text[start : match.end()].strip())
        start = match.end()
    rest = text[start:].strip()
    return (*found, rest) if rest else tuple(found)


def _is_inner_dot(before: str) -> bool:
    last = re.split(r"[\s(\[\"']", before)[-1]
    if last.lower() in _ABBREVIATIONS or re.fullmatch(r"[A-Z]", last):
        return last != "I"
    return last.isdigit() and before[: -len(last)].rpartition("\n")[2].strip() == ""


def divided_paragraphs(text: str) -> list[str] | None:
    """Paragraphs between markdown dividers `***`; None when an inner one is blank."""
    return _without_blank_ends(_DIVIDER.split(text))


def spaced_paragraphs(text: str) -> list[str] | None:
    """Paragraphs between two line breaks; None when an inner one is blank."""
    return _without_blank_ends(text.split("\n\n"))


def _without_blank_ends(parts: list[str]) -> list[str] | None:
    kept = [part for index, part in enumerate(parts) if part.strip() or 0 < index < len(parts) - 1]
    return kept if all(part.strip() for part in kept) else None


def string(arguments: Arguments, name: str) -> str:
    """A required text argument; a list of one text counts too, as released rows have it."""
    value = arguments.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise Unsupported(f"argument {name!r} must be a text, got {value!r}")
    return value


def strings(arguments: Arguments, name: str) -> list[str]:
    """A required list of texts; a single text counts as a list of one."""
    value = arguments.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Unsupported(f"argument {name!r} must be a list of texts, got {value!r}")
    return [str(text) for text in texts]


def integer(arguments: Arguments, name: str) -> int:
    """A required whole number; 3.0 and "3" count as 3, as released rows have them."""
    value = arguments.get(name)
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise Unsupported(f"argument {name!r} must be a whole number, got {str(value)[:40]!r}")


def compares(count: int, arguments: Arguments, bound: str, relation: str) -> bool:
    """`count` against argument `bound` under argument `relation`."""
    limit, word = integer(arguments, bound), arguments.get(relation)
    if word == "less than":
        return count < limit
    if word == "at least":
        return count >= limit
    raise Unsupported(f"argument {relation!r} must be one of {RELATIONS}, got {word!r}")
