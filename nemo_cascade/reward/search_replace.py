"""Edits that a model writes: SEARCH/REPLACE blocks and unified diffs, applied to files in memory.

Exact or not at all: a block must match whole lines, once. Nothing is guessed, for a reward that forgives is a reward
that teaches carelessness. Lines end at a line feed and nowhere else, as git has it: a form feed or a U+2028 is part of
its line. A carriage return before the line feed is how a file ends its lines, not what a model writes in them: lines
are also found without it, and what takes their place ends as the file's lines do.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Indel
from unidiff import PatchedFile, PatchSet
from unidiff.errors import UnidiffParseError

SEARCH, DIVIDER, REPLACE, PATH = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE", "### "
MAX_EDITS = 200


class BadEdit(ValueError):
    """An edit that cannot be read or does not fit the files; the message says why in a few words."""


@dataclass(frozen=True)
class Edit:
    """Replace the lines `search` of `path` by the lines `replace`. An empty `search` creates the file."""

    path: str
    search: tuple[str, ...]
    replace: tuple[str, ...]


def solution_part(text: str) -> str:
    """What stands between the last `<solution>` and its end; the whole text when there is none."""
    start = text.rfind("<solution>")
    return text if start < 0 else text[start + len("<solution>") :].partition("</solution>")[0]


def parse_edits(text: str) -> list[Edit]:
    """The SEARCH/REPLACE blocks of an answer without reasoning, fenced or not; BadEdit when there is none or one is
    broken.

    A `### path` line names the file of the blocks that follow it.
    """
    edits: list[Edit] = []
    path, section = "", ""
    search: list[str] = []
    replace: list[str] = []
    for line in map(_bare, solution_part(text).split("\n")):
        marker = line.rstrip()
        if section == "" and marker == SEARCH:
            if not path:
                raise BadEdit("a SEARCH block before any '### path' line")
            section, search, replace = SEARCH, [], []
        elif section == "" and line.startswith(PATH):
            path = marker.removeprefix(PATH).strip()
        elif section == SEARCH and marker == DIVIDER:
            section = DIVIDER
        elif section == DIVIDER and marker == REPLACE:
            edits.append(Edit(path, tuple(search), tuple(replace)))
            section = ""
        elif section and marker == SEARCH:
            raise BadEdit("a SEARCH block inside another")
        elif section:
            (search if section == SEARCH else replace).append(line)
    if section:
        raise BadEdit("the last block has no end")
    if not edits:
        raise BadEdit("no SEARCH/REPLACE block")
    if len(edits) > MAX_EDITS:
        raise BadEdit(f"more than {MAX_EDITS} blocks")
    return edits


def render_edits(edits: Sequence[Edit]) -> str:
    """Edits in the nano form, without fences: the inverse of `parse_edits`."""
    lines: list[str] = []
    path = ""
    for edit in edits:
        lines += [f"{PATH}{edit.path}"] if edit.path != path else []
        path = edit.path
        lines += [SEARCH, *edit.search, DIVIDER, *edit.replace, REPLACE]
    return "\n".join(lines)


def apply_edits(files: Mapping[str, str], edits: Sequence[Edit]) -> dict[str, str]:
    """All files after the edits, in order; BadEdit when one does not match exactly once. The given files stay as
    they are.
    """
    patched = dict(files)
    for edit in edits:
        _check_path(edit.path)
        if edit.path not in patched or not edit.search:
            if edit.search or patched.get(edit.path):
                raise BadEdit(
                    f"{edit.path}: no such file" if edit.search else f"{edit.path}: empty SEARCH in a file that exists"
                )
            patched[edit.path] = "".join(f"{line}\n" for line in edit.replace)
            continue
        lines = patched[edit.path].split("\n")
        at = _only_place(lines, edit.search, edit.path)
        patched[edit.path] = "\n".join(_replaced(lines, at, edit.search, edit.replace))
    return patched


def _check_path(path: str) -> None:
    parts = path.split("/")
    plain = path.isprintable() and not {"", ".", ".."} & set(parts)  # one name per file; no null bytes or surrogates
    if not plain or ".git" in map(str.lower, parts):
        raise BadEdit(f"path {path[:100]!r} is outside the repository's files")


def _bare(line: str) -> str:
    return line.removesuffix("\r")


def _places(lines: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where these lines stand, the first two places, in time linear in their number: a flood of equal lines fits nearly
    everywhere.
    """
    text, piece = (f"\n{chr(10).join(part)}\n" for part in (lines, wanted))
    at = text.find(piece)
    again = text.find(piece, at + 1) if at >= 0 else -1
    return [text.count("\n", 0, place) for place in (at, again) if place >= 0]


def _only_place(lines: Sequence[str], wanted: Sequence[str], path: str) -> int:
    places = _places(lines, wanted) or _places([*map(_bare, lines)], [*map(_bare, wanted)])
    if len(places) != 1:
        raise BadEdit(f"{path}: the SEARCH lines occur {'2 times or more' if places else '0 times'}, not once")
    return places[0]


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many lines at the start are the same."""
    differ = (at for at, (line, its) in enumerate(zip(one, other, strict=False)) if line != its)
    return next(differ, min(len(one), len(other)))


def _replaced(lines: list[str], at: int, before: Sequence[str], after: Sequence[str]) -> list[str]:
    """All lines with `after` in the place of `before`, ended as the file ends its lines. Those at the start and the end
    of both stay as they are, for a file may end its lines in two ways.
    """
    old, new = [*map(_bare, before)], [*map(_bare, after)]
    head = _common(old, new)
    tail = _common(old[head:][::-1], new[head:][::-1])
    start, end = at + head, at + len(old) - tail
    ended = lines[:-1]  # the last has no line feed behind it
    returns = 2 * sum(line.endswith("\r") for line in ended) > len(ended)
    written = [line + "\r" * returns for line in new[head : len(new) - tail]]
    found = [*lines[:start], *written, *lines[end:]]
    if returns and end == len(lines) and found:
        found[-1] = _bare(found[-1])
    return found


def parse_diff(text: str) -> PatchSet:
    """A unified diff, in a code fence or bare; BadEdit when it has no hunk or wrong line counts."""
    lines = solution_part(text).strip("\n").split("\n")
    if len(lines) > 1 and all(line.endswith("\r") for line in lines[:-1]):  # of the answer; git's headers have none
        lines = [*map(_bare, lines)]
    lines = [line for line in lines if not line.startswith("```")]
    try:
        patch = PatchSet("\n".join(lines) + "\n")
    except (UnidiffParseError, ValueError) as error:  # ValueError: a line number of thousands of digits
        raise BadEdit(f"not a unified diff: {str(error)[:200]}") from error
    if not any(len(file) for file in patch):
        raise BadEdit("a diff without hunks")
    return patch


def apply_diff(files: Mapping[str, str], patch: PatchSet) -> dict[str, str]:
    """All files after a unified diff. A hunk goes where it says, else to the only place its lines occur; BadEdit
    otherwise.
    """
    patched = dict(files)
    for file in patch:
        _check_path(file.path)
        if file.is_added_file:
            if file.path in patched:
                raise BadEdit(f"{file.path}: the diff creates a file that exists")
            patched[file.path] = "".join(line.value for hunk in file for line in hunk if line.is_added)
            continue
        source = file.source_file.removeprefix("a/")
        if source not in patched:
            raise BadEdit(f"{source}: no such file")
        content = _apply_hunks(patched[source], file)
        if source != file.path or file.is_removed_file:
            del patched[source]
        if not file.is_removed_file:
            patched[file.path] = content
    return patched


def _apply_hunks(content: str, file: PatchedFile) -> str:
    lines = content.split("\n")
    shift = 0
    for hunk in file:
        before = [line.value.rstrip("\n") for line in hunk if line.is_context or line.is_removed]
        after = [line.value.rstrip("\n") for line in hunk if line.is_context or line.is_added]
        at = hunk.source_start - 1 + shift if before else hunk.source_start + shift
        size = len(before)
        if lines[at : at + size] != before:
            bare = [*map(_bare, before)]
            if _places(lines, before) or [*map(_bare, lines[at : at + size])] != bare:
                at = _only_place(lines, before, file.path)
        if before and lines[at : at + size] == before:
            lines[at : at + size] = after  # the diff knows how these lines end
        else:
            lines = _replaced(lines, at, before, after)
        shift += len(after) - len(before)
    return "\n".join(lines)


def unified_diff(base: Mapping[str, str], patched: Mapping[str, str]) -> str:
    """The difference of two sets of files as `git apply` reads it; files in order of their names."""
    parts: list[str] = []
    for path in sorted({*base, *patched}):
        old, new = base.get(path), patched.get(path)
        if old == new:
            continue
        parts.append(f"diff --git a/{path} b/{path}\n")
        parts += ["new file mode 100644\n"] if old is None else []
        parts += ["deleted file mode 100644\n"] if new is None else []
        names = ("/dev/null" if old is None else f"a/{path}", "/dev/null" if new is None else f"b/{path}")
        for line in difflib.unified_diff(_kept(old), _kept(new), *names):
            parts.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(parts)


def _kept(content: str | None) -> list[str]:
    parts = (content or "").split("\n")
    return [f"{part}\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def changed_lines(base: Mapping[str, str], patched: Mapping[str, str]) -> str:
    """The removed and added lines, with their signs and files: what two patches are compared by."""
    lines = unified_diff(base, patched).split("\n")
    return "\n".join(line for line in lines if line.startswith(("+", "-")))


def similarity(base: Mapping[str, str], patched: Mapping[str, str], gold: Mapping[str, str]) -> float:
    """Normalised Indel similarity of the changed lines of two patches, in 0..1; 1 only for the same patch, 0 for no
    change.
    """
    given, wanted = changed_lines(base, patched), changed_lines(base, gold)
    return Indel.normalized_similarity(given, wanted) if given else 0.0
