"""Did the answer follow its instructions? The 25 checks of IFEval, the open-instruct training constraints and 57 of the
58 checks of IFBench, under their public ids.

Offline and deterministic: words and sentences by regular expression, no download, no language model but py3langid to
tell languages, and syllapy's word list to count syllables. An id or argument that is not understood raises
`Unsupported`; it never counts as followed (a checker that passes what it does not know is a reward leak). A rule on
every sentence, bullet or line asks for at least one of them, or an answer without any would follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from nemo_cascade.reward.instructions import (
    bench_counts,
    bench_custom,
    bench_formats,
    bench_words,
    copying,
    edges,
    formats,
    keywords,
    lengths,
    style,
)
from nemo_cascade.reward.instructions.text import Arguments, Unsupported
from nemo_cascade.types import Invalid, Json, Outcome, Scored

__all__ = ["CHECKS", "Unsupported", "check", "grade", "require_supported"]

Check = Callable[[Arguments, str, str], bool]
CHECKS: dict[str, Check] = {
    **keywords.CHECKS,
    **lengths.CHECKS,
    **formats.CHECKS,
    **edges.CHECKS,
    **copying.CHECKS,
    **style.CHECKS,
    **bench_counts.CHECKS,
    **bench_words.CHECKS,
    **bench_formats.CHECKS,
    **bench_custom.CHECKS,
}


def check(instruction_id: str, kwargs: Mapping[str, Json] | None, prompt: str, text: str) -> bool:
    """Whether `text` follows one instruction; arguments that are null are dropped, an empty answer follows nothing.

    Raises Unsupported for an unknown id, a missing or a malformed argument.
    """
    require_supported([instruction_id])
    arguments = {name: value for name, value in (kwargs or {}).items() if value is not None}
    try:
        followed = CHECKS[instruction_id](arguments, prompt, text)
    except Unsupported as error:
        raise Unsupported(f"{instruction_id}: {error}") from error
    return followed and bool(text.strip())


def loosened(text: str) -> list[str]:
    """IFEval's loose readings of an answer: without its first line, its last line, its asterisks, and all of these.

    A preamble ("Sure, here it is:"), a closing line and markdown emphasis are then forgiven.
    """
    lines = text.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    plain = ["\n".join(part).strip() for part in cut]
    return list(dict.fromkeys([text, *plain, *(part.replace("*", "") for part in plain)]))


def require_supported(instruction_ids: Sequence[str]) -> None:
    """Unsupported, naming the id, unless all of them have a checker: for use when rows are read, not when they are
    scored.
    """
    for instruction_id in instruction_ids:
        if instruction_id not in CHECKS:
            raise Unsupported(
                f"instruction id {instruction_id!r} has no checker; drop the row or add one to reward/instructions"
            )


def grade(
    ids: Sequence[str],
    kwargs: Sequence[Mapping[str, Json] | None],
    prompt: str,
    text: str,
    mode: Literal["binary", "fraction"] = "binary",
    loose: bool = False,
) -> Outcome:
    """Reward of one answer: 1 if it follows all instructions (`binary`), or the share it follows (`fraction`).

    `text` is the final answer without reasoning. `parts` holds each verdict under its id. `loose`: an instruction
    counts as followed when any of the `loosened` readings follows it.
    """
    readings = loosened(text) if loose else [text]
    if not ids or len(ids) != len(kwargs):
        return Invalid(f"instructions: {len(ids)} ids and {len(kwargs)} argument sets")
    parts: dict[str, float] = {}
    followed = []
    for index, (instruction_id, arguments) in enumerate(zip(ids, kwargs, strict=True)):
        try:
            followed.append(any(check(instruction_id, arguments, prompt, reading) for reading in readings))
        except Unsupported as error:
            return Invalid(str(error))
        name = instruction_id if instruction_id not in parts else f"{instruction_id}#{index}"
        parts[name] = float(followed[-1])
    share = sum(followed) / len(followed)
    missed = [name for name, value in parts.items() if not value]
    reason = "all followed" if not missed else "missed " + ", ".join(missed)
    return Scored(share if mode == "fraction" else float(all(followed)), parts, reason)
