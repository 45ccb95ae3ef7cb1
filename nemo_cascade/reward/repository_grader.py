"""Verdicts on changed repositories, as cheap as they can honestly be.

Most answers of a group agree, many do not compile or change nothing: only a new set of files that could pass starts a
sandbox, and what passes a second one for its control run. A session holds the git checkout of the base commit with the
changed files over it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from nemo_cascade.reward.git_objects import git_folder
from nemo_cascade.reward.repository import RepositoryTask, content_key, grade_files, patched_files
from nemo_cascade.reward.sandbox import Limits, Sandbox
from nemo_cascade.types import Invalid, Json, Outcome, Scored

LIMITS = Limits(cpu_seconds=5.0, wall_seconds=60.0)
MAX_SOURCE_CHARS = 4 << 20  # the largest Python file that is compiled here
REMEMBERED = 4096  # verdicts; a verdict is a few hundred bytes


def repository_task(truth: Mapping[str, Json]) -> RepositoryTask:
    """The repository in a task's truth: `files`, `tests`, FAIL_TO_PASS and PASS_TO_PASS."""
    return RepositoryTask(
        {**truth["files"], **truth["tests"]},
        truth["tests"],
        tuple(truth["FAIL_TO_PASS"]),
        tuple(truth["PASS_TO_PASS"]),
    )


class RepositoryGrader:
    """Grades sets of files and remembers the verdicts; safe to share between threads."""

    def __init__(self, sandbox: Callable[[], Sandbox]) -> None:
        self._sandbox = sandbox
        self._verdicts: OrderedDict[tuple[str, str], Outcome] = OrderedDict()

    def grade(self, task_id: str, task: RepositoryTask, files: Mapping[str, str]) -> Outcome:
        """1 when all FAIL_TO_PASS and PASS_TO_PASS tests pass on `files` with the task's tests restored, else 0."""
        changed = patched_files(task, files)
        if changed == patched_files(task, task.files):
            return Scored(0.0, {"fail_to_pass": 0.0, "pass_to_pass": 1.0}, "nothing but tests changed")
        broken = next((path for path, text in changed.items() if path.endswith(".py") and not _compiles(text)), "")
        if broken:
            return Scored(0.0, {"fail_to_pass": 0.0, "pass_to_pass": 0.0}, f"{broken} does not compile")
        key = (task_id, content_key(changed))
        known = self._verdicts.get(key)
        if known is not None:
            return known
        outcome = self._run(task, changed)
        if isinstance(outcome, Invalid):
            return outcome
        self._verdicts[key] = outcome
        if len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)
        return outcome


    def _run(self, task: RepositoryTask, changed: Mapping[str, str]) -> Outcome:
        _, base = git_folder(task.files)
        try:
            return grade_files(self._sandbox(), task, {**base, **changed}, LIMITS)
        except ValueError as error:  # a path or a text that no file system holds
            return Scored(0.0, {"fail_to_pass": 0.0, "pass_to_pass": 0.0}, str(error)[:200])


def _compiles(text: str) -> bool:
    if len(text) > MAX_SOURCE_CHARS:
        return False
    try:
        compile(text, "patched.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return True
