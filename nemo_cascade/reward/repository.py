"""Small git repositories as tasks: built the same on every machine, patched, and judged by their tests inside the
sandbox.

What a patch cannot do: edit the tests (they are restored from the base), end the process early (missing results
fail), print or write forged results (they carry a nonce), shadow the standard library (it comes first on the path)
or replace unittest's methods (they are compared afterwards). Not covered: tests and patched code share an
interpreter, so code that searches the interpreter's frames, or returns an object equal to everything, can cheat a
test that lets it. `grade_files` finds such code with tests that must fail (`control_tests.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import secrets
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade.reward import repository_runner
from nemo_cascade.reward.control_tests import apart, mixed
from nemo_cascade.reward.sandbox import DEFAULT_LIMITS, File, Files, Limits, Sandbox, Session, read_tree
from nemo_cascade.types import Invalid, Outcome, Scored, UserError

AUTHOR = {
    "GIT_AUTHOR_NAME": "nano",
    "GIT_AUTHOR_EMAIL": "nano@example.com",
    "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "nano",
    "GIT_COMMITTER_EMAIL": "nano@example.com",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "HOME": os.devnull,
}
GIT_SECONDS = 60.0


@dataclass(frozen=True)
class RepositoryTask:
    """A repository with a fault and the tests that show it.

    Test ids are `path::function` or `path::Class::method`. `tests` maps paths of test files, visible or hidden, to
    their content; they replace whatever a patch left at those paths.
    """

    files: Mapping[str, str]
    tests: Mapping[str, str]
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...] = ()
    python_path: tuple[str, ...] = (".",)


@dataclass(frozen=True)
class TestResult:
    """One test: `message` is the last line of its failure, for an agent to read. Not `reported`: there is no result."""

    __test__ = False
    id: str
    passed: bool
    message: str = ""
    reported: bool = True


def git(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    """Run git in a folder without the user's configuration; UserError when git is missing, ValueError when it
    refuses or does not end in time.
    """
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "commit.gpgsign=false", *arguments]
    environment = {"PATH": os.environ.get("PATH", os.defpath), **AUTHOR}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            input=stdin,
            capture_output=True,
            text=True,
            env=environment,
            timeout=GIT_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise UserError("git is not installed, and repository tasks need it; run `apt-get install -y git`") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"git {arguments[0]}: no end within {GIT_SECONDS:g} s") from error
    if done.returncode != 0:
        raise ValueError(f"git {arguments[0]}: {' '.join(done.stderr.split())[:300]}")
    return done.stdout


def build_repository(files: Mapping[str, str], folder: Path) -> str:
    """Write files into an empty folder and commit them; returns the commit, which depends on the files alone."""
    for path, file in repository_files(files).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
        target.chmod(file.mode)
    return git(folder, "rev-parse", "HEAD").strip()


def repository_files(files: Mapping[str, str]) -> dict[str, File]:
    """The files with their `.git` folder, ready for a sandbox session; the git work is done once per content."""
    return dict(_template(json.dumps(dict(files), sort_keys=True)))


@functools.lru_cache(maxsize=256)
def _template(content: str) -> dict[str, File]:
    with tempfile.TemporaryDirectory(prefix="nemo-cascade-repository-") as name:
        folder = Path(name)
        for path, text in json.loads(content).items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="")
            target.chmod(0o644)
        git(folder, "init", "--quiet", "--template=", "--initial-branch=main")
        git(folder, "add", "--all", "--force")
        git(folder, "commit", "--quiet", "--message=base", "--allow-empty")
        return read_tree(folder)


def content_key(files: Mapping[str, str]) -> str:
    """A short name for a set of files, equal for equal content."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _runner() -> bytes:
    return Path(repository_runner.__file__).read_bytes()


def run_tests(
    session: Session, tests: Sequence[str], limits: Limits = DEFAULT_LIMITS, python_path: Sequence[str] = (".",)
) -> list[TestResult] | Invalid:
    """Run tests in a session's work folder; a test without a result has failed. Invalid on the wall clock only."""
    nonce = secrets.token_hex(16)
    request = "\n".join([nonce, ":".join(python_path), *tests]) + "\n"
    result, reported = session.request(b"run", b"source", [_runner()], request, limits)
    if result.status == "wall_time":
        return Invalid(f"repository: the tests did not end within {limits.wall_seconds:g} s of wall time")
    results = _read_report(reported.decode("utf-8", "replace"), nonce) if result.status == "ok" else {}
    why = {"ok": "no result", "cpu_time": f"more than {limits.cpu_seconds:g} s of CPU"}.get(
        result.status, result.status
    )
    return [results.get(test, TestResult(test, False, why, reported=False)) for test in tests]


def _read_report(text: str, nonce: str) -> dict[str, TestResult]:
    """Results by id; nothing at all when any line lacks the nonce, for then something else wrote to the channel."""
    results: dict[str, TestResult] = {}
    lines = text.splitlines()
    if not lines or lines[-1] != f"{nonce}\tend":
        return {}
    for line in lines[:-1]:
        fields = line.split("\t", 3)
        if len(fields) != 4 or fields[0] != nonce or fields[2] in results:
            return {}
        results[fields[2]] = TestResult(fields[2], fields[1] == "passed", fields[3])
    return results


def patched_files(task: RepositoryTask, files: Mapping[str, str]) -> dict[str, str]:
    """A patch's files with the task's tests restored over them."""
    return {**files, **task.tests}


def grade(sandbox: Sandbox, task: RepositoryTask, files: Mapping[str, str], limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Reward 1 when all FAIL_TO_PASS and PASS_TO_PASS tests pass on the patched files, else 0.

    `parts`: the share of either list that passes (1 for an empty list).
    """
    if not task.fail_to_pass:
        raise UserError("a repository task needs at least one FAIL_TO_PASS test; drop the row")
    if patched_files(task, files) == patched_files(task, task.files):
        return Scored(0.0, {"fail_to_pass": 0.0, "pass_to_pass": 1.0}, "the patch changes nothing")
    return grade_files(sandbox, task, patched_files(task, files), limits)


def grade_files(sandbox: Sandbox, task: RepositoryTask, files: Files, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """`grade_session` on a sandbox with these files; what passes must fail `control_tests`, each in a new sandbox."""
    with sandbox.session(files) as session:
        outcome = grade_session(session, task, limits)
    if isinstance(outcome, Invalid) or outcome.reward == 0.0:
        return outcome
    asked = (*task.fail_to_pass, *task.pass_to_pass)
    for control in (
        mixed(task.tests, asked),
        apart(task.tests, task.fail_to_pass, task.pass_to_pass, list(task.files.values())),
    ):
        if not control.wrong:
            continue
        ids = sorted([*control.wrong, *control.right])
        more = max(1.0, len(ids) / len(asked))
        enough = dataclasses.replace(limits, cpu_seconds=limits.cpu_seconds * more)
        with sandbox.session({**files, **control.files}) as session:
            results = run_tests(session, ids, enough, task.python_path)
        if isinstance(results, Invalid):
            return results
        passed = {result.id: result.passed for result in results if result.reported}
        betrayed = control.betrayed(passed.get)
        if betrayed:
            return Scored(0.0, {"fail_to_pass": 0.0, "pass_to_pass": 0.0}, betrayed[:200])
    return outcome


def grade_session(session: Session, task: RepositoryTask, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Like `grade`, for the work folder an agent leaves behind: restores the tests, then runs them."""
    wanted = (*task.fail_to_pass, *task.pass_to_pass)
    try:
        session.write(task.tests)
    except EOFError:
        return Scored(0.0, {"fail_to_pass": 0.0, "pass_to_pass": 0.0}, "the agent ended its own sandbox")
    results = run_tests(session, wanted, limits, task.python_path)
    if isinstance(results, Invalid):
        return results
    split = len(task.fail_to_pass)
    shares = [
        sum(result.passed for result in part) / len(part) if part else 1.0
        for part in (results[:split], results[split:])
    ]
    failed = [result for result in results if not result.passed]
    reason = "all tests pass" if not failed else f"{failed[0].id}: {failed[0].message}"[:200]
    return Scored(float(not failed), {"fail_to_pass": shares[0], "pass_to_pass": shares[1]}, reason)
