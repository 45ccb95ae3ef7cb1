"""`startend:*`, `first_word:*`, `last_word:*`: how the answer or its sentences begin and end."""

from __future__ import annotations

import re

from nemo_cascade.reward.instructions.text import Arguments, sentences, string


def end_checker(arguments: Arguments, prompt: str, text: str) -> bool:
    """The answer ends with the phrase, case aside; a closing quotation mark may follow."""
    return text.strip().strip('"').lower().endswith(string(arguments, "end_phrase").strip().lower())


def quotation(arguments: Arguments, prompt: str, text: str) -> bool:
    """The whole answer stands in double quotation marks."""
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def _first(text: str) -> str:
    parts = text.split()
    return parts[0].lower() if parts else ""


def _last(text: str) -> str:
    parts = text.split()
    return re.sub(r"[^\w\s]", "", parts[-1]).lower() if parts else ""


def first_word_answer(arguments: Arguments, prompt: str, text: str) -> bool:
    """The first word of the answer, with nothing attached to it."""
    return _first(text) == string(arguments, "first_word").strip().lower()


def first_word_sent(arguments: Arguments, prompt: str, text: str) -> bool:
    """The first word of every sentence."""
    word, found = string(arguments, "first_word").strip().lower(), sentences(text)
    return bool(found) and all(_first(sentence) == word for sentence in found)


def last_word_answer(arguments: Arguments, prompt: str, text: str) -> bool:
    """The last word of the answer, punctuation aside."""
    return _last(text) == string(arguments, "last_word").strip().lower()


def last_word_sent(arguments: Arguments, prompt: str, text: str) -> bool:
    """The last word of every sentence, punctuation aside."""
    word, found = string(arguments, "last_word").strip().lower(), sentences(text)
    return bool(found) and all(_last(sentence) == word for sentence in found)


CHECKS = {
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "first_word:first_word_answer": first_word_answer,
    "first_word:first_word_sent": first_word_sent,
    "last_word:last_word_answer": last_word_answer,
    "last_word:last_word_sent": last_word_sent,
}
