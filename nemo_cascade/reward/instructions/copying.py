"""`combination:*`, `copy:*`: answers that repeat the prompt, a phrase, or come in two versions."""

from __future__ import annotations

from nemo_cascade.reward.instructions.text import Arguments, integer, string

_SEPARATOR = "******"


def _same(left: str, right: str) -> bool:
    return left.strip().lower() == right.strip().lower()


def two_responses(arguments: Arguments, prompt: str, text: str) -> bool:
    """Two different answers between six asterisks."""
    parts = text.split(_SEPARATOR)
    kept = [part.strip() for index, part in enumerate(parts) if part.strip() or 0 < index < len(parts) - 1]
    return len(kept) == 2 and all(kept) and kept[0] != kept[1]


def repeat_prompt(arguments: Arguments, prompt: str, text: str) -> bool:
    """The answer starts with the request, word for word, case aside."""
    return text.strip().lower().startswith(string(arguments, "prompt_to_repeat").strip().lower())


def copy(arguments: Arguments, prompt: str, text: str) -> bool:
    """The answer is the request and nothing else."""
    return _same(text, string(arguments, "prompt_to_repeat"))


def copying_multiple(arguments: Arguments, prompt: str, text: str) -> bool:
    """The request N times, between six asterisks."""
    parts = text.split(_SEPARATOR)
    return len(parts) == integer(arguments, "N") and all(
        _same(part, string(arguments, "prompt_to_repeat")) for part in parts
    )


def copy_span_idx(arguments: Arguments, prompt: str, text: str) -> bool:
    """The characters from `n_start` up to `n_end` (the released rule leaves the end out)."""
    span = string(arguments, "prompt_to_repeat")[integer(arguments, "n_start") : integer(arguments, "n_end")]
    return _same(text, span)


def repeat_phrase(arguments: Arguments, prompt: str, text: str) -> bool:
    """The phrase `small_n` times, each time with exactly one word changed that is neither its first nor its last."""
    phrase = string(arguments, "phrase").split()
    given = text.split()
    found = 0
    for start in range(len(given) - len(phrase) + 1):
        window = [word.strip(".,;:!?\"'") for word in given[start : start + len(phrase)]]
        if window[0].lower() != phrase[0].lower() or window[-1].lower() != phrase[-1].lower().strip(".,;:!?\"'"):
            continue
        if sum(left.lower() != right.lower() for left, right in zip(window[1:-1], phrase[1:-1], strict=True)) != 1:
            return False
        found += 1
    return found == integer(arguments, "small_n")


CHECKS = {
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "copy:copy": copy,
    "copy:copying_simple": copy,
    "copy:copying_multiple": copying_multiple,
    "new:copy_span_idx": copy_span_idx,
    "copy:copy_span_idx": copy_span_idx,
    "copy:repeat_phrase": repeat_phrase,
}
