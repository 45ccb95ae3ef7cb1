"""The scripts that `swerl_gen` rows carry, run in a container that holds their repository at its base commit.

A patch (mode `eval`): applied to the base but for tests and their settings; `setup_script` puts the row's tests in
place, `test_script` runs pytest with `-rA`, and its summary must call every FAIL_TO_PASS and PASS_TO_PASS test passed.
A script that shows the fault (mode `repro-gen`): after `regression_script`, the tests of the base commit, it must end
with status 2 on the base and with 0 on the base with the known repair.

Tests share their process with the code they test, which can forge the summary. So a patch that passes runs twice more,
each time in another container, against tests with a wrong expectation (`control_tests.py`): those must fail, the others
pass. Not covered: code that knows which expectation is wrong, tests that are no Python functions, and scripts of mode
`repro-gen` that recognise the repair instead of its effect.
"""

from __future__ import annotations

import base64
import re
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from nemo_cascade.reward.control_tests import paired
from nemo_cascade.reward.runtimes import Container, ContainerEnded, Ran
from nemo_cascade.reward.search_replace import solution_part, unified_diff
from nemo_cascade.reward.swe.patch import APPLY, model_patch_command, sources_of, touched
from nemo_cascade.types import Invalid, Json, Outcome, Scored

OUTPUT_BYTES = 16 << 20
GIT_SECONDS = 60.0
REPRODUCTION = "reproduce_bug_1.py"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_HEADER = re.compile(r"^=+ short test summary info =+$", re.MULTILINE)
_LINE = re.compile(r"^(PASSED|FAILED|ERROR|XFAIL|XPASS) (.+)$", re.MULTILINE)
_STOPS = re.compile(r"(\bpytest\b[^\n]*?) (?:-x|--exitfirst|--maxfail[= ][0-9]+)(?=\s|$)")
_WORST = ("PASSED", "XFAIL", "XPASS", "FAILED", "ERROR")

RUN = 'f=$(mktemp); cat > "$f"; bash "$f" </dev/null; code=$?; rm -f "$f"; exit $code'
"""Runs the script on standard input, and what it starts without one. One command, for there are runtimes where only the
repository outlives a command.
"""

Start = Callable[[], Container]
"""A fresh container with the repository at its base commit."""


class _Failed(Exception):
    """Why there is no summary. `ours`: the row or the machine is at fault, or time ran out; else the patch is."""

    def __init__(self, reason: str, ours: bool) -> None:
        super().__init__(reason)
        self.reason, self.ours = reason, ours


def grade_repair(
    start: Start, truth: Mapping[str, Json], files: Mapping[str, str], patched: Mapping[str, str], seconds: float
) -> Outcome:
    """The reward of a patch: 1 when all tests of the row pass, else 0; Invalid where the tests could not be asked.

    `files` and `patched` are the shown files before and after the answer. Each of at most three runs of the tests may
    take `seconds`.
    """
    wanted = {key: [str(test) for test in truth[key]] for key in ("FAIL_TO_PASS", "PASS_TO_PASS")}
    if not wanted["FAIL_TO_PASS"] or not truth.get("setup_script") or not truth.get("test_script"):
        return Invalid(f"{truth['instance_id']}: the row has no FAIL_TO_PASS, setup_script or test_script; drop it")
    if dict(files) == dict(patched):
        return _zero("the patch changes nothing")
    diff = unified_diff(files, patched).encode("utf-8", "surrogateescape")
    try:
        statuses, texts = _tested(start, truth, diff, seconds, {})
        outcome = judged(wanted, statuses)
        if outcome.reward == 0.0:
            return outcome
        found = _Statuses(statuses)
        passed = [test for test in wanted["PASS_TO_PASS"] if found.of(test) == "PASSED"]
        for control in paired(texts, wanted["FAIL_TO_PASS"], passed):
            again, _ = _tested(start, truth, diff, seconds, control.files)
            betrayed = control.betrayed_by(wanted["FAIL_TO_PASS"], again, _Statuses(again).of)
            if betrayed:
                return _zero(betrayed)
    except _Failed as failed:
        return Invalid(f"{truth['instance_id']}: {failed.reason}") if failed.ours else _zero(failed.reason)
    return outcome


def grade_reproduction(start: Start, truth: Mapping[str, Json], content: str, seconds: float) -> Outcome:
    """The reward of a script: 1 when it ends with status 2 before and 0 after the known repair, else 0."""
    script = last_fence(solution_part(content))
    if script is None:
        return Scored(0.0, {}, "no script in a code fence")
    if not truth.get("regression_script"):
        return Invalid(f"{truth['instance_id']}: the row has no regression_script; drop it")
    codes: list[int] = []
    for gold in (b"", str(truth["patch"]).encode()):
        try:
            with _running(start, APPLY, gold) as container:
                container.write(REPRODUCTION, script.encode("utf-8", "replace"))
                asked = f"{truth['regression_script']}\ntimeout -s KILL {seconds:g} python {REPRODUCTION}\n"
                ran = _run(container, asked, 2.0 * seconds)
        except _Failed as failed:
            return Invalid(f"{truth['instance_id']}: {failed.reason}")
        except ContainerEnded as ended:
            return Scored(0.0, {}, str(ended))
        if ran.code is None:
            return Invalid(f"{truth['instance_id']}: regression_script did not end within {seconds:g} s")
        codes.append(ran.code)
    parts = {"before": float(codes[0]), "after": float(codes[1])}
    return Scored(float(codes == [2, 0]), parts, f"status {codes[0]} before the repair and {codes[1]} after")


def last_fence(text: str) -> str | None:
    """The content of the last code fence that has an end; None without one."""
    found, inside = None, None
    for line in text.split("\n"):
        if inside is None and line.startswith("```"):
            inside = []
        elif inside is not None and line.rstrip() == "```":
            found, inside = "".join(f"{kept}\n" for kept in inside), None
        elif inside is not None:
            inside.append(line)
    return found


def judged(wanted: Mapping[str, Sequence[str]], statuses: Mapping[str, str]) -> Scored:
    """A summary against what the row expects. An expected failure passes among PASS_TO_PASS, as in SWE-bench; among
    FAIL_TO_PASS it does not, because the code under test can call pytest.xfail().
    """
    parts, failed, found = {}, "", _Statuses(statuses)
    for key, passing in (("FAIL_TO_PASS", ("PASSED",)), ("PASS_TO_PASS", ("PASSED", "XFAIL"))):
        wrong = [test for test in wanted[key] if found.of(test) not in passing]
        parts[key.lower()] = 1.0 - len(wrong) / len(wanted[key]) if wanted[key] else 1.0
        failed = failed or next((f"{test}: {found.of(test) or 'no result'}" for test in wrong), "")
    return Scored(float(not failed), parts, failed[:200] or "all tests pass")


def read_summary(log: str) -> dict[str, str]:
    """Test id -> status from the last summary of a `pytest -rA` log; the worst one for an id that comes twice."""
    headers = list(_HEADER.finditer(log := _ANSI.sub("", log)))
    statuses: dict[str, str] = {}
    for status, rest in _LINE.findall(log[headers[-1].end() :]) if headers else []:
        test = rest.partition(" - ")[0].strip()
        statuses[test] = max(status, statuses.get(test, status), key=_WORST.index)
    return statuses


class _Statuses:
    """Statuses by test id, "" for a test without one. Rows cut ids at their first blank; such an id stands for all that
    begin so. Looked up in constant time: code under test may print as many lines as it likes.
    """

    def __init__(self, statuses: Mapping[str, str]) -> None:
        self._whole, self._cut = statuses, dict[str, str]()
        for name, status in statuses.items():
            cut = name.partition(" ")[0]
            self._cut[cut] = max(status, self._cut.get(cut, status), key=_WORST.index)

    def of(self, test: str) -> str:
        """A test's status. A summary's reason begins with ` - `, but so may parameters go on."""
        names = (test, test.partition(" - ")[0])
        return next((self._whole[name] for name in names if name in self._whole), self._cut.get(test, ""))


def _zero(reason: str) -> Scored:
    return Scored(0.0, {"fail_to_pass": 0.0, "pass_to_pass": 0.0}, reason[:200])


def _tested(
    start: Start, truth: Mapping[str, Json], diff: bytes, seconds: float, changed: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """(the statuses of the row's tests with a patch and with these test files, the texts of the test files)."""
    paths = list(dict.fromkeys(str(test).partition("::")[0] for test in truth["FAIL_TO_PASS"]))
    mark = secrets.token_hex(16)
    tests = [*touched(_bytes(truth, "test_patch")), *paths]
    with _running(start, model_patch_command(tests, sources_of(_bytes(truth, "patch"))), diff) as container:
        try:
            ran = _run(container, _script(truth, paths, changed, mark), seconds)
        except ContainerEnded as ended:
            raise _Failed(str(ended), ours=False) from ended
        out_of_memory = container.out_of_memory()  # `ran` may say so for no more than a command's last words
    if ran.code is None:
        raise _Failed(f"the tests did not end within {seconds:g} s", ours=True)
    if out_of_memory:
        raise _Failed("the tests ran out of memory", ours=True)
    before, _, log = ran.stdout.decode("utf-8", "replace").partition(f"{mark} tests\n")
    texts = before.split("\n")[:-1]
    if len(texts) != len(paths):
        if _sets_up(start, truth, seconds):
            raise _Failed("setup_script fails with this patch only", ours=False)
        raise _Failed("setup_script fails without a patch, too", ours=True)
    found = {path: base64.b64decode(text).decode("utf-8", "replace") for path, text in zip(paths, texts, strict=True)}
    return read_summary(log), found


def _script(truth: Mapping[str, Json], paths: Sequence[str], changed: Mapping[str, str], mark: str) -> str:
    """The row's setup, then on standard output a line with each test file, a mark, and the log of the row's tests.

    The texts are taken before any test runs, so that code under test cannot change what the control run is made of.
    """
    lines = [_part("setup", str(truth["setup_script"]), mark), 'bash "$f.setup" </dev/null >&2 || exit 1']
    lines += [f"(base64 --wrap=0 {shlex.quote(path)} 2>/dev/null || true) && echo" for path in paths]
    for path, text in changed.items():
        whole = text if text.endswith("\n") else f"{text}\n"
        lines.append(f"cat > {shlex.quote(path)} <<'{mark}'\n{whole}{mark}")
    test = str(truth["test_script"])
    if changed:  # the first failures are no reason to stop
        lines.append('export PYTEST_ADDOPTS="${PYTEST_ADDOPTS:-} --maxfail=0"')
        test = _STOPS.sub(r"\1", test)
    return "\n".join([*lines, _part("test", test, mark), f"echo '{mark} tests'", 'bash "$f.test"'])


def _part(name: str, script: str, mark: str) -> str:
    return f"f=${{f:-$(mktemp)}}; cat > \"$f.{name}\" <<'{mark}'\n{script}\n{mark}"


def _bytes(truth: Mapping[str, Json], key: str) -> bytes:
    return str(truth.get(key, "")).encode("utf-8", "replace")


def _sets_up(start: Start, truth: Mapping[str, Json], seconds: float) -> bool:
    """Whether setup_script works without a patch: then it was the patch that broke it."""
    with _running(start, [], b"") as container:
        return _run(container, str(truth["setup_script"]), seconds).code == 0


@contextmanager
def _running(start: Start, command: Sequence[str], diff: bytes) -> Iterator[Container]:
    """A fresh container with a patch applied, but for what the command leaves out."""
    container = start()
    try:
        if diff:
            counted = container.run([*command, "--numstat"], GIT_SECONDS, diff)
            if counted.code != 0:
                raise _Failed(f"git cannot read the patch: {_complaint(counted)}", ours=True)
            if not counted.stdout.strip():
                raise _Failed("nothing but tests and their settings changed", ours=False)
            done = container.run(command, GIT_SECONDS, diff)
            if done.code != 0:
                raise _Failed(f"the shown files are not those of the image: {_complaint(done)}", ours=True)
        yield container
    finally:
        container.stop()


def _complaint(ran: Ran) -> str:
    if ran.code is None:
        return f"it did not end within {GIT_SECONDS:g} s"
    return " ".join(ran.stderr.decode("utf-8", "replace").split())[-150:]


def _run(container: Container, script: str, seconds: float) -> Ran:
    return container.run(["bash", "-c", RUN], seconds, script.encode("utf-8", "replace"), OUTPUT_BYTES)
