"""Multiple choice: which letter did the answer give, under the released environment's grading modes?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from nemo_cascade.reward.math_equal import extract_boxed
from nemo_cascade.types import Json, Scored, UserError

Mode = Literal["strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon"]
MODES: tuple[Mode, ...] = ("strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon")
MAX_PATTERN_CHARS = 300
SEARCHED_CHARS = 4000
_SINGLE_LETTER = re.compile(r"[^A-Za-z]*([A-Z])[^A-Za-z]*")
_TEXT_WRAP = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^}]*)\}")
_ANSWER_COLON = re.compile(r"answer\s*:\s*(.+)", re.IGNORECASE)
_NESTED_REPEAT = re.compile(r"\((?:[^()\\]|\\.)*(?:[+*]|\{\d+,\d*\})(?:[^()\\]|\\.)*\)(?:[+*]|\{\d+,\d*\})")


def option_texts(options: Sequence[Mapping[str, str]] | Mapping[str, str]) -> dict[str, str]:
    """`[{"A": text}, {"B": text}]`, or one mapping, as letter -> text; UserError when a key is no letter."""
    pairs = (
        list(options.items())
        if isinstance(options, Mapping)
        else [pair for option in options for pair in option.items()]
    )
    found = {letter.strip().upper(): text for letter, text in pairs}
    if not found or not all(len(letter) == 1 and letter.isalpha() for letter in found):
        raise UserError(f"options must map single letters to texts, got keys {sorted(found)}; fix or drop the row")
    return found


def checked_regex(pattern: str) -> re.Pattern[str]:
    """A row's `output_regex`, compiled; UserError when it is overlong, broken or may backtrack without end."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise UserError(
            f"output_regex has {len(pattern)} characters, at most {MAX_PATTERN_CHARS} are allowed; fix or drop the row"
        )
    if _NESTED_REPEAT.search(pattern):
        raise UserError(f"output_regex {pattern!r} repeats a repetition, which can take forever; fix or drop the row")
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"output_regex {pattern!r} does not compile ({error}); fix or drop the row") from error


def extract_letter(
    text: str, options: Mapping[str, str], mode: Mode = "strict_single_letter_boxed", output_regex: str | None = None
) -> str | None:
    """The chosen letter, or None when the answer names none, several, or one that is no option.

    With `output_regex` its last match decides (group 1 if it has groups), searched in the last 4,000 characters.
    Otherwise the last `\\boxed{}` or, in `lenient_answer_colon`, the last "Answer:" line.
    """
    if output_regex is not None:
        matches = list(checked_regex(output_regex).finditer(text[-SEARCHED_CHARS:]))
        if not matches:
            return None
        return _letter((matches[-1].group(1) if matches[-1].re.groups else matches[-1].group()) or "", options)
    if mode == "lenient_answer_colon":
        lines = _ANSWER_COLON.findall(text)
        candidate = _unwrapped(lines[-1]).strip() if lines else ""
        return _letter(candidate, options) or _by_text(candidate, options, exact=True)
    boxed = extract_boxed(text)
    if boxed is None:
        return None
    candidate = _unwrapped(boxed)
    match = _SINGLE_LETTER.fullmatch(candidate)
    if match is not None:
        return _letter(match.group(1), options)
    return _by_text(candidate, options, exact=False) if mode == "lenient_boxed" else None


def _letter(candidate: str, options: Mapping[str, str]) -> str | None:
    letter = candidate.strip().strip("()[].:*$ ").upper()
    return letter if letter in options else None


def _unwrapped(text: str) -> str:
    """The text out of its \\text{} and the like; empty for one too long to name an option."""
    previous = None
    text = text if len(text) <= SEARCHED_CHARS else ""
    while previous != text:
        previous, text = text, _TEXT_WRAP.sub(lambda wrapped: wrapped.group(1).strip(), text)
    return text


def _by_text(candidate: str, options: Mapping[str, str], exact: bool) -> str | None:
    """The one option whose text the candidate is, or holds; None when several do."""
    given = _plain(candidate)
    wanted = {letter: _plain(text) for letter, text in options.items()}
    found = [letter for letter, text in wanted.items() if text and (text == given if exact else text in given)]
    return found[0] if len(found) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def grade(
    expected: str,
    text: str,
    options: Mapping[str, str],
    mode: Mode = "strict_single_letter_boxed",
    output_regex: str | None = None,
) -> Scored:
    """Reward 1 when the chosen letter is the expected one; `text` is the answer without reasoning."""
    if mode not in MODES:
        raise UserError(f"grading_mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    letter = extract_letter(text, options, mode, output_regex)
    if letter is None:
        return Scored(0.0, {"answered": 0.0}, "no single option named")
    return Scored(float(letter == expected.strip().upper()), {"answered": 1.0}, f"chose {letter}")


def truth_options(value: Json) -> dict[str, str]:
    """`options` as a row's JSON holds them."""
    given = [value] if isinstance(value, dict) else value
    if isinstance(given, list) and all(isinstance(option, dict) for option in given):
        pairs = [(str(letter), text) for option in given for letter, text in option.items()]
        odd = next((text for _, text in pairs if isinstance(text, bool) or not isinstance(text, (str, int, float))), "")
        if odd != "":
            raise UserError(f"options must be texts, got {type(odd).__name__}; fix or drop the row")
        if len({letter.strip().upper() for letter, _ in pairs}) != len(pairs):
            raise UserError("options name a letter twice; fix or drop the row")
        return option_texts([{letter: str(text)} for letter, text in pairs])
    raise UserError(f"options must be a list of {{letter: text}}, got {type(value).__name__}; fix or drop the row")
