"""Whose fault it is that there is no report: containers that fail as no container here can be made to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from nemo_cascade.reward import row_scripts
from nemo_cascade.reward.runtimes import ContainerEnded, ContainerLost, Ran
from nemo_cascade.reward.swe import grading
from nemo_cascade.types import Invalid, Json, Outcome, Scored

TRUTH: dict[str, Json] = {
    "instance_id": "i",
    "FAIL_TO_PASS": ["t.py::test_a"],
    "PASS_TO_PASS": [],
    "setup_script": "true",
    "test_script": "true",
}
NO_GIT = Ran(127, b"", b"git: not found")
LATE = Ran(None, b"", b"")
COUNTED = Ran(0, b"1\t1\ta.py\n", b"")
DIFF = b"diff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-x\n+y\n"


class Failing:
    """A container whose commands end as it is told."""

    def __init__(self, answer: Callable[[Sequence[str]], Ran], full: bool = False) -> None:
        self.answer, self.full = answer, full

    def run(self, argv: Sequence[str], seconds: float, stdin: bytes = b"", most_bytes: int = 1 << 20) -> Ran:
        return self.answer(argv)

    def read(self, path: str, most_bytes: int = 16 << 20) -> bytes:
        return b"def test_a():\n    assert f() == 1\n"

    def write(self, path: str, content: bytes) -> None:
        pass

    def out_of_memory(self) -> bool:
        return self.full

    def stop(self) -> None:
        pass


def after_git(then: Ran | Exception) -> Callable[[Sequence[str]], Ran]:
    """git works; what comes then ends like this."""

    def answer(argv: Sequence[str]) -> Ran:
        if argv[0] == "git":
            return COUNTED
        if isinstance(then, Exception):
            raise then
        return then

    return answer


def scripts(answer: Callable[[Sequence[str]], Ran], full: bool = False) -> Outcome:
    return row_scripts.grade_repair(lambda: Failing(answer, full), TRUTH, {"a.py": "x\n"}, {"a.py": "y\n"}, 10.0)


def graded(answer: Callable[[Sequence[str]], Ran], full: bool = False) -> grading.Graded:
    return grading.grade_patch(lambda: Failing(answer, full), TRUTH, DIFF, 10.0)


@pytest.mark.parametrize(("ran", "said"), [(NO_GIT, "git: not found"), (LATE, "it did not end within 60 s")])
def test_git_that_fails_is_no_fault_of_the_answer(ran: Ran, said: str) -> None:
    assert scripts(lambda argv: ran) == Invalid(f"i: git cannot read the patch: {said}")
    with pytest.raises(ContainerLost, match=said if ran is NO_GIT else "git did not end within 120 s"):
        graded(lambda argv: ran)
    with pytest.raises(ContainerLost, match="git cannot read the patch: fatal"):
        graded(lambda argv: Ran(128, b"", b"fatal"))


def test_a_container_that_the_answer_ends_is_its_own_fault() -> None:
    outcome = scripts(after_git(ContainerEnded("a command ended its sandbox")))
    assert isinstance(outcome, Scored) and (outcome.reward, outcome.reason) == (0.0, "a command ended its sandbox")
    with pytest.raises(ContainerLost):
        scripts(after_git(ContainerLost("the engine is gone")))
    script = row_scripts.grade_reproduction(
        lambda: Failing(after_git(ContainerEnded("a command ended its sandbox"))),
        {**TRUTH, "regression_script": "true", "patch": ""},
        "```\nimport os\n```",
        10.0,
    )
    assert script == Scored(0.0, {}, "a command ended its sandbox")


def test_memory_is_ours_when_the_container_says_so() -> None:
    """Not when the command alone does: its last words are its own."""
    killed = Ran(137, b"", b"MemoryError", out_of_memory=True)
    assert scripts(after_git(killed), full=True) == Invalid("i: the tests ran out of memory")
    assert graded(after_git(killed), full=True) == grading.Graded(
        False, "the tests ran out of memory", out_of_memory=True
    )
    claimed = graded(lambda argv: killed if "-c" in argv and "report_fd" in argv[-1] else COUNTED)
    assert (claimed.resolved, claimed.out_of_memory, claimed.reason) == (False, False, "t.py::test_a: no result")
