"""Does a patch resolve an instance? Asked of the instance's own tests, in a fresh container.

The patch is applied to the base without what it may not touch (`patch.py`), the row's tests are put in place, pytest
runs their files, and each test's status is compared with what the row expects: FAIL_TO_PASS and PASS_TO_PASS must all
pass (SWE-Gym, SWE-bench), or every status must be the recorded one (R2E-Gym).

Code under test shares the process with its tests and could forge their report. So what resolves runs twice more, each
time in another container, against tests with a wrong expectation (`control_tests.py`): those must fail and the others
pass.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nemo_cascade.reward.control_tests import paired
from nemo_cascade.reward.runtimes import Container, ContainerEnded, ContainerLost, Ran
from nemo_cascade.reward.swe import pytest_runner
from nemo_cascade.reward.swe.instance import R2E_TESTS
from nemo_cascade.reward.swe.patch import APPLY, model_patch_command, touched
from nemo_cascade.types import Json, UserError

REPORT_BYTES = 16 << 20
GIT_S = 120.0
NOT_FOUND = (126, 127)  # a shell's and an engine's status for a command that is not there
EVERY_TEST = "--maxfail=0"  # in a control run, where the first failures are no reason to stop
PROBE = "import sys; sys.path = [path for path in sys.path if path]; import pytest"
UNHIDE = (
    f"[ -d {R2E_TESTS} ] || for place in /root/{R2E_TESTS} /{R2E_TESTS}; do "
    f'[ -d "$place" ] && cp -r "$place" {R2E_TESTS} && break; done; [ -d {R2E_TESTS} ]'
)


@dataclass(frozen=True)
class Graded:
    """What the tests said. `parts`: the share of either list that passes (1 for an empty one)."""

    resolved: bool
    reason: str
    parts: Mapping[str, float] = field(default_factory=dict)
    timed_out: bool = False
    out_of_memory: bool = False


class BadInstance(Exception):
    """The row cannot be graded: its own tests are not there. No fault of the answer."""


def grade_patch(start: Callable[[], Container], instance: Mapping[str, Json], patch: bytes, seconds: float) -> Graded:
    """Grade one patch; each of the three runs of tests may take `seconds`.

    `start` gives a fresh container with the base commit in its work folder; `instance` is the truth that
    `instance.instance_of` reads. Raises ContainerLost and BadInstance where there is no verdict.
    """
    try:
        return _graded(start, instance, patch, seconds)
    except UserError:
        raise
    except ValueError as error:  # a name or a text that no file and no command can hold
        raise BadInstance(f"the row cannot be graded: {error}") from error


def _graded(start: Callable[[], Container], instance: Mapping[str, Json], patch: bytes, seconds: float) -> Graded:
    if not instance.get("FAIL_TO_PASS") and not instance.get("expected"):
        raise BadInstance("the row names no FAIL_TO_PASS and no expected_output_json; join it with its data set")
    if not patch.strip():
        return Graded(False, "nothing changed", {"fail_to_pass": 0.0, "pass_to_pass": 1.0})
    with _attempt(start) as attempt:
        refused = attempt.prepare(instance, patch)
        if refused:
            return Graded(False, refused, {"fail_to_pass": 0.0, "pass_to_pass": 0.0})
        tests = attempt.texts_of_tests(instance)
        statuses = attempt.statuses(list(tests), seconds)
    if isinstance(statuses, Graded):
        return statuses
    graded = judged(instance, statuses)
    if not graded.resolved:
        return graded
    trusted = _passed(instance.get("FAIL_TO_PASS") or [*statuses], statuses)
    for control in paired(tests, trusted, _passed(instance.get("PASS_TO_PASS") or [], statuses)):
        with _attempt(start) as attempt:
            attempt.prepare(instance, patch)
            for path, text in control.files.items():
                attempt.container.write(path, text.encode())
            files = dict.fromkeys([*control.files, *(test.partition("::")[0] for test in control.right)])
            again = attempt.statuses([EVERY_TEST, *files], seconds)
        if isinstance(again, Graded):
            return again
        if not again:
            return Graded(False, "no report of the tests with a wrong expectation", graded.parts)
        betrayed = control.betrayed_by(trusted, again, _Statuses(again).of)
        if betrayed:
            return Graded(False, betrayed[:200], graded.parts)
    return graded


@contextmanager
def _attempt(start: Callable[[], Container]) -> Iterator[Attempt]:
    """A container for the time of a `with`."""
    container = start()
    try:
        yield Attempt(container)
    finally:
        container.stop()


class Attempt:
    """One container on its way from the base commit to a report."""

    def __init__(self, container: Container) -> None:
        self.container = container

    def prepare(self, instance: Mapping[str, Json], patch: bytes) -> str:
        """Put tests and patch in place; in words why the patch is refused, "" when it is not."""
        test_patch = str(instance.get("test_patch", "")).encode()
        if test_patch.strip() and self._git(APPLY, test_patch).code != 0:
            raise BadInstance("the row's test_patch does not apply to its base commit")
        sources = [str(path) for path in instance.get("source_files") or []]
        command = model_patch_command([*touched(test_patch), *_test_files(instance)], sources)
        counted = self._git([*command, "--numstat"], patch)
        if counted.code != 0:
            raise ContainerLost(f"git cannot read the patch: {_complaint(counted)}")
        if not counted.stdout.strip():
            return "nothing but tests and their settings changed"
        done = self._git(command, patch)
        if done.code != 0:
            return f"the patch does not apply: {_complaint(done)}"
        hidden = instance.get("hidden_tests")
        for path, text in (hidden if isinstance(hidden, dict) else {}).items():
            self.container.write(path, str(text).encode())
        if instance.get("expected") and not hidden and self.container.run(["sh", "-c", UNHIDE], 60.0).code != 0:
            raise BadInstance("R2E-Gym's tests are neither in the row nor in its image")
        return ""

    def _git(self, command: Sequence[str], stdin: bytes = b"") -> Ran:
        ran = self.container.run(command, GIT_S, stdin)
        if ran.code is None:
            raise ContainerLost(f"git did not end within {GIT_S:g} s")
        if ran.code in NOT_FOUND:
            raise ContainerLost(f"git does not run: {_complaint(ran)}")
        return ran

    def texts_of_tests(self, instance: Mapping[str, Json]) -> dict[str, str]:
        """The test files that are run, with their texts; BadInstance for one that is not there."""
        texts: dict[str, str] = {}
        for path in _test_files(instance) or self._hidden_files():
            try:
                texts[path] = self.container.read(path).decode("utf-8", "replace")
            except ValueError as error:
                raise BadInstance(f"test file {path} is not in the repository: {error}") from error
        return texts

    def _hidden_files(self) -> list[str]:
        listed = self.container.run(["find", R2E_TESTS, "-name", "test*.py", "-type", "f"], 60.0)
        return sorted(path for path in listed.stdout.decode("utf-8", "replace").split("\n") if path)

    def statuses(self, files: Sequence[str], seconds: float) -> dict[str, str] | Graded:
        """Each test's status by its id; a Graded without verdict when time or memory ran out."""
        nonce = secrets.token_hex(16)
        request = "\n".join([nonce, *files]).encode("utf-8", "replace")
        try:
            ran = self.container.run(["python", "-c", _runner()], seconds, request, REPORT_BYTES)
        except ContainerEnded:
            return {}
        if ran.code is None:
            return Graded(False, f"the tests did not end within {seconds:g} s", timed_out=True)
        if self.container.out_of_memory():  # `ran` may say so for no more than a command's last words
            return Graded(False, "the tests ran out of memory", out_of_memory=True)
        report = read_report(ran.stdout.decode("utf-8", "replace"), nonce)
        if not report and self.container.run(["python", "-c", PROBE], 60.0).code != 0:
            raise BadInstance("there is no python with pytest in the container")
        return report


def _complaint(ran: Ran) -> str:
    return " ".join(ran.stderr.decode("utf-8", "replace").split())[-150:]


def read_report(text: str, nonce: str) -> dict[str, str]:
    """Statuses by test id; nothing at all when the report is not whole or any line lacks the nonce, for then something
    else wrote to it.
    """
    lines = text.split("\n")
    if lines[-2:] != [f"{nonce}\tend", ""]:
        return {}
    statuses: dict[str, str] = {}
    for line in lines[:-2]:
        fields = line.split("\t", 2)
        if len(fields) != 3 or fields[0] != nonce:
            return {}
        statuses[fields[2]] = fields[1]
    return statuses


def judged(instance: Mapping[str, Json], statuses: Mapping[str, str]) -> Graded:
    """The statuses of a run against what the row expects.

    An expected failure is a pass to SWE-bench. To a FAIL_TO_PASS test it is none here: any code under test can call
    pytest.xfail().
    """
    expected = instance.get("expected")
    if isinstance(expected, dict) and not instance.get("FAIL_TO_PASS"):
        return _as_recorded(expected, statuses)
    shares, failed, found = [], "", _Statuses(statuses)
    for key in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        wanted = [str(test) for test in instance.get(key) or []]
        passing = ("PASSED",) if key == "FAIL_TO_PASS" else ("PASSED", "XFAIL")
        wrong = [test for test in wanted if found.of(test) not in passing]
        shares.append(1.0 - len(wrong) / len(wanted) if wanted else 1.0)
        failed = failed or next((f"{test}: {found.of(test)}" for test in wrong), "")
    parts = {"fail_to_pass": shares[0], "pass_to_pass": shares[1]}
    return Graded(not failed, failed[:200] or "all tests pass", parts)


def _as_recorded(expected: Mapping[str, Json], statuses: Mapping[str, str]) -> Graded:
    """R2E-Gym: as many tests as recorded, each with the recorded status. Names are the id without its file."""
    found = {".".join(test.split("::")[1:]): status for test, status in statuses.items()}
    found = {name: status for name, status in found.items() if status in ("PASSED", "FAILED", "ERROR")}
    wanted = {_plain(name): str(status) for name, status in expected.items()}
    wrong = [name for name, status in wanted.items() if name and found.get(name) != status]
    parts = {"as_recorded": 1.0 - len(wrong) / max(1, len(wanted))}
    if wrong:
        return Graded(False, f"{wrong[0]}: {found.get(wrong[0], 'no result')}, not {wanted[wrong[0]]}"[:200], parts)
    if len(found) != len(wanted):
        return Graded(False, f"{len(found)} tests have results, {len(wanted)} are recorded", parts)
    return Graded(True, "all tests as recorded", parts)


def _plain(name: str) -> str:
    """A recorded name without terminal colours and without the failure's message."""
    return re.sub(r"\x1b\[[0-9;]*m", "", name).split(" - ")[0]


class _Statuses:
    """Statuses by test id. SWE-bench's logs cut ids at their first blank; such an id stands for all that begin with
    it. Looked up in constant time: code under test may add as many results as it likes.
    """

    def __init__(self, statuses: Mapping[str, str]) -> None:
        self._whole, self._cut = statuses, dict[str, str]()
        for name, status in statuses.items():
            cut = name.split(" ")[0]
            if self._cut.get(cut, "PASSED") in ("PASSED", "XFAIL"):  # the first that does not pass, else the first
                self._cut[cut] = status if status not in ("PASSED", "XFAIL") else self._cut.get(cut, status)

    def of(self, test: str) -> str:
        """A test's status, "no result" without one."""
        return self._whole[test] if test in self._whole else self._cut.get(test, "no result")


def _passed(tests: Sequence[Json], statuses: Mapping[str, str]) -> list[str]:
    """The tests of a list that passed."""
    found = _Statuses(statuses)
    return [str(test) for test in tests if found.of(str(test)) == "PASSED"]


def _test_files(instance: Mapping[str, Json]) -> list[str]:
    """The files of FAIL_TO_PASS and PASS_TO_PASS, or R2E-Gym's from the row; [] where only the image has them."""
    ids = [str(test) for key in ("FAIL_TO_PASS", "PASS_TO_PASS") for test in instance.get(key) or []]
    hidden = instance.get("hidden_tests")
    if not instance.get("FAIL_TO_PASS") and isinstance(hidden, dict):
        return [path for path in hidden if not path.endswith("__init__.py")]
    odd = next((test for test in ids if "::" not in test or test.startswith("-")), None)
    if odd is not None:
        raise BadInstance(f"{odd!r} is no test id of pytest (file::test)")
    return list(dict.fromkeys(test.partition("::")[0] for test in ids))


@functools.cache
def _runner() -> str:
    return Path(pytest_runner.__file__).read_text(encoding="utf-8")
