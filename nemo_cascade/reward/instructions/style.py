"""`change_case:*`, `punctuation:*`, `language:*`: case, forbidden signs, and the language of the answer."""

from __future__ import annotations

import functools
import importlib.util

from nemo_cascade.reward.instructions.text import Arguments, Unsupported, compares, string, tokens

MOST_CHARS = 20_000
ENGLISH_SHARE = 0.9
FEWEST_WORDS = 15  # for a language to be told; of 535 English prompts, 533 are recognised by their first 15 words


def _looks_english(text: str) -> bool:
    """At least 90 % of the letters are plain Latin ones and, from 15 words on, py3langid takes the text for English.

    IFEval asks a statistical language detector here, which is unreliable on all-capital and on short text, so capitals
    are lowered first and short text passes by its letters alone.
    """
    letters = [char for char in text if char.isalpha()]
    if not letters or sum(char.isascii() for char in letters) < ENGLISH_SHARE * len(letters):
        return False
    return len(text.split()) < FEWEST_WORDS or _language(text.lower()) == "en"


def english_capital(arguments: Arguments, prompt: str, text: str) -> bool:
    """English, and no lower-case letter."""
    return text.isupper() and _looks_english(text)


def english_lowercase(arguments: Arguments, prompt: str, text: str) -> bool:
    """English, and no capital letter."""
    return text.islower() and _looks_english(text)


def capital_word_frequency(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least, or less than, so many words in capitals; a hyphenated word counts once."""
    return compares(sum(token.isupper() for token in tokens(text)), arguments, "capital_frequency", "capital_relation")


def no_comma(arguments: Arguments, prompt: str, text: str) -> bool:
    """No comma anywhere."""
    return "," not in text


def punctuation_dot(arguments: Arguments, prompt: str, text: str) -> bool:
    """No full stop anywhere."""
    return "." not in text


def punctuation_exclamation(arguments: Arguments, prompt: str, text: str) -> bool:
    """No exclamation mark anywhere."""
    return "!" not in text


@functools.cache
def _identifier() -> object:
    if importlib.util.find_spec("py3langid") is None:
        raise Unsupported("telling languages needs py3langid, which is not installed; run `pip install py3langid`")
    import py3langid

    return py3langid


def response_language(arguments: Arguments, prompt: str, text: str) -> bool:
    """The answer is in the language with this ISO 639-1 code, by py3langid's offline model."""
    wanted = string(arguments, "language").strip().lower()
    return bool(text.strip()) and _language(text) == wanted.partition("-")[0]


def _language(text: str) -> str:
    """The ISO 639-1 code of the language of a text's first characters."""
    return _identifier().classify(text[:MOST_CHARS])[0]  # type: ignore[attr-defined]


CHECKS = {
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "change_case:capital_word_frequency": capital_word_frequency,
    "punctuation:no_comma": no_comma,
    "punctuation:punctuation_dot": punctuation_dot,
    "punctuation:punctuation_exclamation": punctuation_exclamation,
    "language:response_language": response_language,
}
