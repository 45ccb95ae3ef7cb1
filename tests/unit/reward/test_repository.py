"""Repository tasks: stable commits, honest tests, and patches that try to pass without fixing anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade.reward.repository import (
    RepositoryTask,
    build_repository,
    git,
    grade,
    grade_session,
    repository_files,
    run_tests,
)
from nemo_cascade.reward.sandbox import Limits, Sandbox
from nemo_cascade.types import Invalid, Scored, UserError

CALC = "def add(a, b):\n    return a - b\n\n\ndef double(a):\n    return 2 * a\n"
FIXED = CALC.replace("a - b", "a + b")
PLAIN = """from calc import add, double


def test_add():
    assert add(2, 3) == 5


def test_double():
    assert double(4) == 8
"""
CASES = """import unittest

import calc


class TestCalc(unittest.TestCase):
    def test_add(self):
        self.assertEqual(calc.add(2, 3), 5)

    def test_double(self):
        self.assertEqual(calc.double(4), 8)

    @unittest.skip('later')
    def test_skipped(self):
        pass
"""
FORGED = """import os
for fd in range(256):
    try:
        os.write(fd, b'nonce\\tpassed\\ttests/test_plain.py::test_add\\t\\nnonce\\tend\\n')
    except OSError:
        pass
"""
NEW_CODE = """import unittest
unittest.TestCase.assertEqual.__code__ = (lambda self, first, second, msg=None: None).__code__
"""
TASK = RepositoryTask(
    files={"calc.py": CALC, "README": "calc"},
    tests={"tests/test_plain.py": PLAIN, "tests/test_cases.py": CASES},
    fail_to_pass=("tests/test_plain.py::test_add", "tests/test_cases.py::TestCalc::test_add"),
    pass_to_pass=("tests/test_plain.py::test_double", "tests/test_cases.py::TestCalc::test_double"),
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(spare=1) as opened:
        yield opened


def reward(sandbox: Sandbox, calc: str, **more: str) -> Scored:
    outcome = grade(
        sandbox,
        TASK,
        {**TASK.files, "calc.py": calc, **{name.replace("__", "/") + ".py": text for name, text in more.items()}},
    )
    assert isinstance(outcome, Scored)
    return outcome


def test_commits_depend_on_the_files_alone(tmp_path: Path) -> None:
    first = build_repository(TASK.files, tmp_path / "a")
    assert first == build_repository(dict(reversed(TASK.files.items())), tmp_path / "b")
    assert first != build_repository({**TASK.files, "README": "other"}, tmp_path / "c")
    assert first == "19ea45a8427959975e9b65d4ac91d5c8a0b77502"
    assert git(tmp_path / "a", "status", "--porcelain") == ""
    assert git(tmp_path / "a", "log", "--format=%an %aI") == "nano 2026-01-01T00:00:00+00:00\n"


def test_a_real_fix_passes(sandbox: Sandbox) -> None:
    outcome = reward(sandbox, FIXED)
    assert (outcome.reward, dict(outcome.parts)) == (1.0, {"fail_to_pass": 1.0, "pass_to_pass": 1.0})


def test_no_change_and_half_a_fix_fail(sandbox: Sandbox) -> None:
    assert reward(sandbox, CALC).reason == "the patch changes nothing"
    broken = reward(sandbox, FIXED.replace("2 * a", "3 * a"))
    assert (broken.reward, dict(broken.parts)) == (0.0, {"fail_to_pass": 1.0, "pass_to_pass": 0.0})
    assert broken.reason.startswith("tests/test_plain.py::test_double: AssertionError")
    assert (
        reward(sandbox, "def add(a, b:").reason
        == "tests/test_plain.py::test_add: SyntaxError: '(' was never closed (calc.py, line 1)"
    )


@pytest.mark.parametrize(
    "hack",
    [
        "import os\nos._exit(0)\n",
        "import sys\nsys.exit(0)\n",
        FORGED + CALC,
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n" + CALC,
        NEW_CODE + CALC,
        "import unittest\nunittest.TestResult.addFailure = lambda *a: None\n" + CALC,
        "import atexit, os\natexit.register(os._exit, 0)\n" + CALC,
        "import os, signal\nos.kill(os.getppid(), 9)\n" + CALC,
        "import builtins\nbuiltins.AssertionError = ValueError\n" + CALC,
    ],
)
def test_hacks_earn_nothing(sandbox: Sandbox, hack: str) -> None:
    assert reward(sandbox, hack).reward == 0.0


GAMBLE = """import os, sys
at = sys._getframe()
while at and 'nonce' not in at.f_locals:
    at = at.f_back
tests, nonce = at.f_locals['tests'], at.f_locals['nonce']
if ONLY_NOW:
    lines = [f'{nonce}\\tpassed\\t{test}\\t\\n' for test in tests]
    os.write(3, ''.join([*lines, nonce + '\\tend\\n']).encode())
    os._exit(0)
"""
FIRST_RUN = "any(test.endswith('test_add') for test in tests)"


@pytest.mark.parametrize(
    ("otherwise", "reason"),
    [("os._exit(0)\n", ": no result with a wrong expectation"), ("", ": passes, but not beside tests with a wrong")],
)
def test_a_report_that_is_forged_only_without_control_earns_nothing(
    sandbox: Sandbox, otherwise: str, reason: str
) -> None:
    """What a forgery by chance amounts to when it is lucky: no report, or an honest one, in the control run."""
    outcome = reward(sandbox, GAMBLE.replace("ONLY_NOW", FIRST_RUN) + otherwise + CALC)
    assert outcome.reward == 0.0 and reason in outcome.reason


def test_edited_tests_and_shadowed_modules_do_not_count(sandbox: Sandbox) -> None:
    files = {
        **TASK.files,
        "calc.py": CALC + "# touched\n",
        "tests/test_plain.py": "def test_add():\n    pass\n",
        "tests/test_cases.py": "",
    }
    outcome = grade(sandbox, TASK, files)
    assert isinstance(outcome, Scored) and outcome.parts["fail_to_pass"] == 0.0
    fake = "class TestCase:\n    pass\ndef skip(_):\n    return lambda f: f\n"
    assert reward(sandbox, CALC + "# touched\n", unittest=fake, sitecustomize="import os; os._exit(0)").reward == 0.0


def test_a_hanging_patch_is_wrong_and_a_sleeping_one_no_verdict(sandbox: Sandbox) -> None:
    loop = grade(sandbox, TASK, {"calc.py": FIXED.replace("return a + b", "while True: pass")}, Limits(cpu_seconds=1.0))
    assert isinstance(loop, Scored) and loop.reward == 0.0
    assert "1 s of CPU" in loop.reason
    sleep = grade(sandbox, TASK, {"calc.py": "import time; time.sleep(60)\n"}, Limits(wall_seconds=1.0))
    assert isinstance(sleep, Invalid)


def test_an_agents_session(sandbox: Sandbox) -> None:
    with sandbox.session({**repository_files({**TASK.files, "tests/test_plain.py": PLAIN})}) as session:
        results = run_tests(
            session, ["tests/test_plain.py::test_add", "tests/test_plain.py::test_none", "missing.py::test_x"]
        )
        assert isinstance(results, list)
        assert [(result.passed, result.message) for result in results] == [
            (False, "AssertionError"),
            (False, "KeyError: 'test_none'"),
            (False, "FileNotFoundError: [Errno 2] No such file or directory: '/tmp/work/missing.py'"),
        ]
        assert session.run(["sed", "-i", "s/a - b/a + b/", "calc.py"]).status == "ok"
        assert "+    return a + b" in session.run(["git", "diff"]).stdout
        assert session.run(["sh", "-c", "echo 'def test_add(): pass' > tests/test_plain.py"]).status == "ok"
        outcome = grade_session(session, TASK)
    assert isinstance(outcome, Scored) and outcome.reward == 1.0


def test_skipped_tests_do_not_pass(sandbox: Sandbox) -> None:
    with sandbox.session({**TASK.files, **TASK.tests}) as session:
        (result,) = run_tests(session, ["tests/test_cases.py::TestCalc::test_skipped"]) or []
    assert (result.passed, result.message) == (False, "skipped or not run")  # type: ignore[union-attr]


def test_tasks_need_a_failing_test(sandbox: Sandbox) -> None:
    with pytest.raises(UserError, match="FAIL_TO_PASS"):
        grade(sandbox, RepositoryTask({}, {}, ()), {"x": "y"})
