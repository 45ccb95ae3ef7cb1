"""Untrusted code runs here and nowhere else: a bubblewrap sandbox per submission, with a small fork server inside.

Why a fork server: starting an interpreter costs more than starting a sandbox, so one sandbox serves all tests of one
submission and each test costs a fork. Why one sandbox per submission: two submissions never meet, so none can kill,
read or imitate another.

Covered: no network; only /usr and the interpreter are visible, read-only (no /etc, no home, no host files, no /proc
for programs); empty environment; a uid of its own, no capabilities, no new privileges, no namespaces of its own making
and no tracing (`system_calls.py`); limits on CPU time, address space per process, number of processes, file size,
scratch space and output, and no memory outside address spaces and scratch space but small buffers; a wall clock. What
decides a reward is CPU time and memory, which a busy machine does not change; the wall clock only guards against hangs,
and its status `wall_time` means "no verdict": callers return Invalid and may try again. Expected outputs and values
never enter the sandbox: programs are run and compared outside, so neither `os._exit(0)` nor a forged result line can
pass a test. Test programs run in a process that the candidate, forked before it, can neither read nor speak for
(`call_beside`). What a test left in a writable folder is gone before the next.

Not covered: holes in the kernel itself (the filter of system calls is a short list), side channels, the sum of memory
over the allowed processes (address space is bounded per process), load on the machine within the limits. Tests of a
repository share their process with the code they test; `control_tests.py` finds the cheats, not the sandbox. Without
bubblewrap nothing runs: there is no flag to go without. docs/sandbox.md has it as a table, and the proof.
"""

from __future__ import annotations

import json
import logging
import marshal
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_cascade.reward import bubblewrap
from nemo_cascade.reward.fork_server import SYMLINK_MODE
from nemo_cascade.types import Json

log = logging.getLogger(__name__)
Status = Literal["ok", "nonzero", "cpu_time", "memory", "output", "wall_time", "crashed"]
Files = Mapping[str, "str | bytes | File"]
STATUSES: dict[bytes, Status] = {
    b"ok": "ok", b"nonzero": "nonzero", b"cpu_time": "cpu_time", b"memory": "memory",
    b"output": "output", b"wall_time": "wall_time", b"crashed": "crashed",
}  # fmt: skip
START_SECONDS = 30.0
START_ATTEMPTS = 3
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of one process. CPU seconds decide verdicts; wall seconds only say when to stop waiting."""

    cpu_seconds: float = 2.0
    wall_seconds: float = 30.0
    memory_mb: int = 512  # address space of each process
    processes: int = 16
    output_bytes: int = 65536  # standard output; standard error is cut silently at 16 KiB
    file_mb: int = 16  # largest file

    def fields(self) -> list[bytes]:
        """As the fork server reads them."""
        sizes = (self.memory_mb * MEBIBYTE, self.processes, self.output_bytes, self.file_mb * MEBIBYTE)
        return [repr(value).encode() for value in (self.cpu_seconds, self.wall_seconds, *sizes)]


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class RunResult:
    """What became of one process. `wall_time` is no verdict: the caller returns Invalid."""

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    cpu_seconds: float


@dataclass(frozen=True)
class CallResult:
    """What a function returned: `value` when status is ok, else `error` in a few words."""

    status: Status
    value: Json = None
    error: str = ""


@dataclass(frozen=True)
class File:
    """A file with its mode (0o755 for a script, 0o120000 for a symbolic link whose content is the target)."""

    content: bytes
    mode: int = 0o644


CRASHED = RunResult("crashed", None, "", "the sandbox ended with the program", 0.0)


class Session:
    """One open sandbox with a work folder that lives across commands; not for two threads at once.

    When no sandbox could be started (an overloaded machine), every command ends with `wall_time`: no verdict.
    """

    def __init__(self, server: bubblewrap.Server | str) -> None:
        self._server = server if isinstance(server, bubblewrap.Server) else None
        self._problem = server if isinstance(server, str) else ""

    def write(self, files: Files) -> None:
        """Put files into the work folder, replacing what is there.

        ValueError for a path that leaves it, or that the file system or UTF-8 cannot hold.
        """
        fields = [b"write"]
        for path, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            file = data if isinstance(data, File) else File(data)
            fields += [os.fsencode(checked_path(path)), oct(file.mode)[2:].encode(), file.content]
        if self._server is not None and len(fields) > 1:
            answer = self._server.ask(fields, START_SECONDS)
            if answer[:1] == [b"refused"]:
                raise ValueError(f"the files cannot be written: {answer[1].decode('utf-8', 'replace')}")

    def read(self, most_bytes: int = 16 * MEBIBYTE) -> dict[str, File]:
        """All files of the work folder; ValueError when they exceed `most_bytes`, EOFError without a sandbox."""
        if self._server is None:
            raise EOFError(self._problem)
        fields = self._server.ask([b"read", str(most_bytes).encode()], START_SECONDS)
        if fields == [b"too large"]:
            raise ValueError(f"the work folder holds more than {most_bytes} bytes")
        rows = range(0, len(fields), 3)
        return {os.fsdecode(fields[at]): File(fields[at + 2], int(fields[at + 1], 8)) for at in rows}

    def run(self, argv: Sequence[str], stdin: str = "", limits: Limits = DEFAULT_LIMITS) -> RunResult:
        """Run a command in the work folder; what it leaves there the next command finds, its processes are ended."""
        result, _ = self.request(b"run", b"argv", [os.fsencode(part) for part in argv], stdin, limits)
        return result

    def request(
        self, operation: bytes, kind: bytes, payload: list[bytes], stdin: str, limits: Limits
    ) -> tuple[RunResult, bytes]:
        """One process of the fork server: its result and what it wrote to the result descriptor."""
        if self._server is None:
            return RunResult("wall_time", None, "", self._problem, 0.0), b""
        given = stdin.encode("utf-8", "surrogateescape")
        if len(given) > self._server.most_given:
            return RunResult("wall_time", None, "", f"standard input of {len(given)} bytes is too large", 0.0), b""
        fields = [operation, kind, *limits.fields(), given, *payload]
        try:
            answer = self._server.ask(fields, limits.wall_seconds + START_SECONDS)
            status, code, cpu, stdout, stderr, value = answer
            texts = [output.decode("utf-8", "replace") for output in (stdout, stderr)]
            return RunResult(STATUSES[status], int(code), texts[0], texts[1], float(cpu)), value
        except (EOFError, BrokenPipeError, ValueError, KeyError):  # the program killed or corrupted its server
            self.close()
            return CRASHED, b""
        except TimeoutError:
            self.close()
            return RunResult("wall_time", None, "", "the sandbox did not answer", 0.0), b""

    @property
    def alive(self) -> bool:
        """False once a program has killed its own sandbox."""
        return self._server is not None and not self._server.closed

    def close(self) -> None:
        """End the sandbox and everything in it."""
        if self._server is not None:
            self._server.kill()


class Sandbox:
    """Runs untrusted code; safe to share between threads. `spare` sandboxes wait started, to hide their start-up
    time.
    """

    def __init__(self, spare: int = 2, scratch_mb: int = 256, read_only: Sequence[Path] = ()) -> None:
        self._spare, self._scratch_mb, self._read_only = spare, scratch_mb, tuple(read_only)
        self._lock = threading.Lock()
        self._waiting: deque[Future[bubblewrap.Server]] = deque()
        self._launcher: ThreadPoolExecutor | None = None

    @staticmethod
    def check() -> None:
        """UserError with the remedy when bubblewrap is missing or the kernel refuses namespaces."""
        bubblewrap.launch_mode()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the waiting sandboxes. The object may be used again; it then starts new ones."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
            launcher, self._launcher = self._launcher, None
        for future in waiting:
            future.result().kill()
        if launcher is not None:
            launcher.shutdown()

    def _take(self) -> bubblewrap.Server | str:
        """A started sandbox, or in words why several would not start; orders replacements.

        All sandboxes are started by one long-lived thread: the kernel ends a `--die-with-parent` process with the
        thread that started it, not with the process.
        """
        problem = ""
        for _ in range(START_ATTEMPTS):
            with self._lock:
                if self._launcher is None:
                    self.check()
                    self._launcher = ThreadPoolExecutor(1, thread_name_prefix="sandbox-launcher")
                while len(self._waiting) < self._spare + 1:
                    self._waiting.append(self._launcher.submit(bubblewrap.Server, self._scratch_mb, self._read_only))
                future = self._waiting.popleft()
            server = future.result()
            try:
                server.wait_ready(START_SECONDS)
                return server
            except (EOFError, TimeoutError) as error:
                problem = f"the sandbox did not start: {server.complaint() or error}"
                server.kill()
                log.warning("%s; trying again", problem)
        return problem

    @contextmanager
    def session(self, files: Files | None = None) -> Iterator[Session]:
        """A sandbox with a work folder for several commands (an agent's episode, a repository's tests)."""
        session = self.open(files)
        try:
            yield session
        finally:
            session.close()

    def open(self, files: Files | None = None) -> Session:
        """Like `session`, for owners who call `close` themselves."""
        session = Session(self._take())
        try:
            session.write(files or {})
        except ValueError:
            session.close()
            raise
        except (EOFError, BrokenPipeError, TimeoutError) as error:
            session.close()
            return Session(f"the sandbox did not take its files: {error}")
        return session

    def run(
        self, argv: Sequence[str], files: Files | None = None, stdin: str = "", limits: Limits = DEFAULT_LIMITS
    ) -> RunResult:
        """Run one command in a fresh sandbox whose work folder holds `files`."""
        with self.session(files) as session:
            return session.run(argv, stdin, limits)

    def run_programs(
        self,
        source: str,
        stdins: Sequence[str],
        limits: Limits = DEFAULT_LIMITS,
        stop: Callable[[int, RunResult], bool] | None = None,
    ) -> list[RunResult]:
        """Run a Python program on each standard input, in order, each time in a new process with an empty folder.

        Ends early when `stop(index, result)` says so (the first failing test decides a binary reward) or on
        `wall_time`, so the list may be shorter than `stdins`. Standard library only; string hashing is fixed, so set
        order is too.
        """
        results: list[RunResult] = []
        for result, _ in self._each(b"source", source, [([], stdin) for stdin in stdins], limits):
            results.append(result)
            if result.status == "wall_time" or (stop is not None and stop(len(results) - 1, result)):
                break
        return results

    def call_function(
        self,
        source: str,
        function: str,
        arguments: Sequence[Sequence[Json]],
        limits: Limits = DEFAULT_LIMITS,
        stop: Callable[[int, CallResult], bool] | None = None,
    ) -> list[CallResult]:
        """Call `function` (or `Class.method`) of `source` on each argument list, each time in a new process.

        Values come back as JSON and the caller compares them with expected values the sandbox has never seen. Sets
        come back sorted, other iterables as lists. A program that exits, prints or writes to the result channel by
        itself has to know the right value all the same.
        """
        results: list[CallResult] = []
        payloads = [([function.encode(), marshal.dumps(list(values), 4)], "") for values in arguments]
        for result, value in self._each(b"call", source, payloads, limits):
            results.append(_call_result(result, value))
            if result.status == "wall_time" or (stop is not None and stop(len(results) - 1, results[-1])):
                break
        return results

    def call_beside(
        self, tests: str, function: str, candidate: str, limits: Limits = DEFAULT_LIMITS
    ) -> CallResult:
        """Call `function()` of `tests` while `candidate` runs in a process beside it (`assertions.py` has both ends).

        The candidate starts first, so that the tests never are where it could read them: not on disk, not on its
        stack, not in its memory. Its CPU time counts, too.
        """
        with self.session() as session:
            session.request(b"companion", b"source", [candidate.encode("utf-8", "surrogatepass")], "", limits)
            payload = [tests.encode("utf-8", "surrogatepass"), function.encode(), marshal.dumps([], 4)]
            return _call_result(*session.request(b"fresh", b"call", payload, "", limits))

    def _each(
        self, kind: bytes, source: str, payloads: Sequence[tuple[list[bytes], str]], limits: Limits
    ) -> Iterator[tuple[RunResult, bytes]]:
        """One process per payload, in one sandbox unless the program destroys it."""
        code = source.encode("utf-8", "surrogatepass")
        session = self.open() if payloads else None
        try:
            for payload, stdin in payloads:
                if session is None or not session.alive:
                    session = self.open()
                yield session.request(b"fresh", kind, [code, *payload], stdin, limits)
        finally:
            if session is not None:
                session.close()

    def run_in_repo(
        self, repo: Path, commands: Sequence[Sequence[str]], limits: Limits = DEFAULT_LIMITS
    ) -> list[RunResult]:
        """Copy a folder into a sandbox and run commands in it, one after the other; the folder itself stays as it
        is.
        """
        with self.session(read_tree(repo)) as session:
            return [session.run(command, "", limits) for command in commands]


def _call_result(result: RunResult, value: bytes) -> CallResult:
    if result.status != "ok":
        return CallResult(result.status, None, result.stderr.rstrip().rpartition("\n")[2][:200])
    try:
        return CallResult("ok", json.loads(value))
    except (ValueError, RecursionError):
        return CallResult("crashed", None, "the program ended before the function returned")


def checked_path(path: str) -> str:
    """A path that stays inside the work folder; ValueError otherwise."""
    if not path or path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"path {path!r} leaves the work folder; use a relative path without '..'")
    return path


def read_tree(folder: Path) -> dict[str, File]:
    """Every file and link under a folder, `.git` included, with its mode."""
    files: dict[str, File] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        name = path.relative_to(folder).as_posix()
        if stat.S_ISLNK(mode):
            files[name] = File(os.fsencode(os.readlink(path)), SYMLINK_MODE)
        elif stat.S_ISREG(mode):
            files[name] = File(path.read_bytes(), stat.S_IMODE(mode))
    return files
