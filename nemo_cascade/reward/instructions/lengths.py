"""`length_constraints:*`, `letters:*`, `paragraphs:*`: how much of something the answer has."""

from __future__ import annotations

import re

from nemo_cascade.reward.instructions.text import (
    Arguments,
    compares,
    divided_paragraphs,
    integer,
    sentences,
    spaced_paragraphs,
    string,
    words,
)

_QUOTES = "'\""
_FIRST_WORD = re.compile(r"[^.,?!'\"]*")


def number_words(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least, or less than, so many words."""
    return compares(len(words(text)), arguments, "num_words", "relation")


def number_sentences(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least, or less than, so many sentences."""
    return compares(len(sentences(text)), arguments, "num_sentences", "relation")


def number_paragraphs(arguments: Arguments, prompt: str, text: str) -> bool:
    """Exactly so many paragraphs between `***`."""
    paragraphs = divided_paragraphs(text)
    return paragraphs is not None and len(paragraphs) == integer(arguments, "num_paragraphs")


def nth_paragraph_first_word(arguments: Arguments, prompt: str, text: str) -> bool:
    """Exactly so many paragraphs between blank lines, and the n-th one starts with the given word."""
    paragraphs = text.split("\n\n")
    index = integer(arguments, "nth_paragraph")
    full = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if (
        full != integer(arguments, "num_paragraphs")
        or not 0 < index <= len(paragraphs)
        or not paragraphs[index - 1].strip()
    ):
        return False
    first = paragraphs[index - 1].split()[0].lstrip(_QUOTES)
    match = _FIRST_WORD.match(first)
    return match is not None and match.group().lower() == string(arguments, "first_word").strip().lower()


def letter_counting(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least, or less than, N letters of the Latin alphabet."""
    return compares(len(re.findall(r"[a-zA-Z]", text)), arguments, "N", "relation")


def two_divided(arguments: Arguments, prompt: str, text: str) -> bool:
    """Two paragraphs between `***`."""
    paragraphs = divided_paragraphs(text)
    return paragraphs is not None and len(paragraphs) == 2


def two_spaced(arguments: Arguments, prompt: str, text: str) -> bool:
    """Two paragraphs between two line breaks."""
    paragraphs = spaced_paragraphs(text)
    return paragraphs is not None and len(paragraphs) == 2


CHECKS = {
    "length_constraints:number_words": number_words,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "letters:letter_counting": letter_counting,
    "paragraphs:paragraphs": two_divided,
    "paragraphs:paragraphs2": two_spaced,
}
