"""Runs inside the sandbox: forks one limited process per request and reports what became of it.

This file is compiled and bound into bubblewrap with `wire.py` alone, so it imports nothing else of the package and only
modules that start in a millisecond (no json, no signal, no subprocess). It speaks frames on its stdin and stdout: a
frame is a list of byte fields. Untrusted code runs in forked children whose descriptors 0-2 are a nameless file and two
pipes; every other descriptor is closed before the code starts. The server itself is not dumpable, and its children are
not, so none can be traced or read by another; they can only be killed, which the host sees as end of file and counts
against the submission.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import os
import resource
import select
import struct
import sys
import time

from nemo_cascade.reward.wire import decode, encode, read_exact, to_json, write_all

WORK = "/tmp/work"
GIVEN = "/run/given"  # where standard inputs are
SCRATCH = {WORK: [], "/tmp": ["work"], "/dev/shm": [], GIVEN: []}  # where a program can write, and what stays there
SYMLINK_MODE = 0o120000
MAX_FRAME = 1 << 30
STDERR_BYTES = 16384
RESULT_BYTES = 1 << 20
RESULT_FD = 3
PR_SET_DUMPABLE = 4
SIGKILL = 9
CPU_CLOCK = 2  # CPUCLOCK_SCHED: the kernel's exact CPU time of a whole process


def _become(uid: int) -> None:
    """Give up root for good, and shut the door on tracing by children of the same uid."""
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # the kernel clears "dumpable" here
    else:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


KINDS = (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE)
HARD: dict[int, int] = {}  # the limits that this sandbox was started under: children can only go below


def _set_limits(limits: list[bytes]) -> None:
    cpu, _, memory, processes, _, file_bytes = (float(limit) for limit in limits)
    backstop = 2 - int(-cpu // 1)  # whole ticks, counted up to 5 % early: for the children that _watch does not see
    allowed = int(processes) + 3  # this server and, for a normal user, bubblewrap count too
    for kind, value in zip(KINDS, (backstop, int(memory), allowed, int(file_bytes)), strict=True):
        hard = HARD[kind]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _call(module: dict[str, object], name: str, arguments: bytes) -> bytes:
    """`name` called with the marshalled list `arguments`; `Class.method` is called on a fresh instance."""
    import marshal

    head, _, method = name.partition(".")
    function = module[head]
    if method:
        function = getattr(function(), method)  # type: ignore[operator]
    return to_json(function(*marshal.loads(arguments))).encode()  # type: ignore[operator]


_compiled: dict[bytes, object] = {}


def _prepare(kind: bytes, payload: list[bytes]) -> None:
    """Compile a source once for all its tests; what cannot be compiled a child compiles, to report why."""
    if kind == b"argv" or payload[0] in _compiled:
        return
    _compiled.clear()
    try:
        _compiled[payload[0]] = compile(payload[0].decode("utf-8"), "solution.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return


def _execute(kind: bytes, payload: list[bytes]) -> int:
    """What the child does; returns its exit status."""
    if kind == b"argv":
        try:
            os.closerange(RESULT_FD, 256)
            argv = [part.decode("utf-8", "surrogateescape") for part in payload]
            os.execvp(argv[0], argv)
        except OSError as error:
            os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
            return 127
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.argv = ["solution.py"]
    name = "__main__" if kind == b"source" else "solution"
    module = type(sys)(name)
    sys.modules[name] = module
    code = _compiled.get(payload[0]) or compile(payload[0].decode("utf-8"), "solution.py", "exec")
    exec(code, module.__dict__)  # noqa: S102 - running it is this program's purpose
    if kind == b"call":
        write_all(RESULT_FD, _call(module.__dict__, payload[1].decode(), payload[2]))
    return 0


def _finish() -> None:
    """What the interpreter does at a normal end, without the cost of tearing it down."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    if not sys.stdout.closed:
        sys.stdout.flush()


def _child(kind: bytes, payload: list[bytes], fds: tuple[int, ...], limits: list[bytes]) -> None:
    """The forked process: never returns, whatever the untrusted code raises."""
    status = 1
    try:
        for target, fd in enumerate(fds):  # sources lie above 10
            os.dup2(fd, target)
        os.closerange(len(fds), 256)
        _set_limits(limits)
        gc.enable()
        done = _execute(kind, payload)
        _finish()
        status = done
    except SystemExit as leaving:
        _finish()
        status = _exit_status(leaving.code)
    finally:
        if sys.exc_info()[0] is not None:
            sys.__excepthook__(*sys.exc_info())
        os._exit(status & 0xFF)


def _exit_status(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    os.write(2, str(code).encode("utf-8", "backslashreplace") + b"\n")
    return 1


def _reserve() -> tuple[int, int]:
    """The request and answer descriptors, moved above 10; those below are filled, so that later ones lie above, too."""
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 11) for fd in (0, 1)]
    nowhere = os.open("/dev/null", os.O_RDWR)
    for fd in range(11):
        if fd != nowhere:
            os.dup2(nowhere, fd)
    return moved[0], moved[1]


class Companion:
    """A process that answers the calls of the next one: fork it first, and it never had the other's code in memory.

    It reads calls on descriptor 0 and writes answers on 3; the next process reads answers on 0 and writes calls on 4.
    """

    waiting: Companion | None = None

    def __init__(self, kind: bytes, limits: list[bytes], payload: list[bytes]) -> None:
        calls, answers, nowhere = os.pipe(), os.pipe(), os.open("/dev/null", os.O_WRONLY)
        self.ends = answers[0], calls[1]
        self.pid = os.fork()
        if self.pid == 0:
            _child(kind, payload, (calls[0], nowhere, nowhere, answers[1]), limits)
        for fd in (calls[0], answers[1], nowhere):
            os.close(fd)


def run(kind: bytes, limits: list[bytes], stdin: bytes, payload: list[bytes]) -> list[bytes]:
    """One limited process from start to end: [status, exit code, cpu seconds, stdout, stderr, result]."""
    companion, Companion.waiting = Companion.waiting, None
    _prepare(kind, payload)
    given = companion.ends if companion else (_given(stdin),)
    pipes = [os.pipe(), os.pipe(), os.pipe()]
    pid = os.fork()
    if pid == 0:
        _child(kind, payload, (given[0], pipes[0][1], pipes[1][1], pipes[2][1], *given[1:]), limits)
    for fd in (*given, *(write for _, write in pipes)):
        os.close(fd)
    pids = (pid, companion.pid) if companion else (pid,)
    capture = [int(float(limits[4])), STDERR_BYTES, RESULT_BYTES]
    outputs, cut = _watch(pids, [read for read, _ in pipes], capture, (float(limits[0]), float(limits[1])))
    _, wait_status, usage = os.wait4(pid, 0)
    cpu = usage.ru_utime + usage.ru_stime + sum(_cpu_used(other) for other in pids[1:])
    _kill_everyone()
    code = os.waitstatus_to_exitcode(wait_status)
    status = cut or _status(code, cpu, float(limits[0]), outputs[1])
    return [status, str(code).encode(), repr(cpu).encode(), *outputs]


def _nameless(content: bytes) -> int:
    fd = os.open(GIVEN, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, content)
    except OSError:
        os.close(fd)
        raise
    return fd


def _given(stdin: bytes) -> int:
    """Standard input: a file, whose size programs may ask for, on a disk of fixed size. What fills that makes room."""
    try:
        given = _nameless(stdin)
    except OSError:
        _clear(GIVEN)
        given = _nameless(stdin)
    os.lseek(given, 0, os.SEEK_SET)
    return given


def _status(code: int, cpu: float, cpu_limit: float, stderr: bytes) -> bytes:
    if cpu >= cpu_limit:
        return b"cpu_time"
    if code == 0:
        return b"ok"
    last = stderr.rstrip().rpartition(b"\n")[2]
    if last.startswith(b"MemoryError"):
        return b"memory"
    return b"crashed" if code < 0 else b"nonzero"


def _cpu_used(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | CPU_CLOCK)


def _watch(
    pids: tuple[int, ...], reads: list[int], capture: list[int], seconds: tuple[float, float]
) -> tuple[list[bytes], bytes]:
    """Collect the three outputs until the first process ends; kill it when stdout overflows, the CPU time of all is
    used up or the clock runs out.

    Standard error beyond its bound is read and dropped: a talkative warning is no offence.
    """
    cpu_limit, deadline = seconds[0], time.monotonic() + seconds[1]
    buffers = [bytearray() for _ in reads]
    ended = os.pidfd_open(pids[0])
    poll = select.poll()
    for fd in (*reads, ended):
        poll.register(fd, select.POLLIN)
    cut, alive = b"", True
    while alive and not cut:
        cpu_left, wall_left = cpu_limit - sum(map(_cpu_used, pids)), deadline - time.monotonic()
        if cpu_left <= 0 or wall_left <= 0:
            cut = b"cpu_time" if cpu_left <= 0 else b"wall_time"
            break
        for fd, _ in poll.poll(max(1.0, min(cpu_left, wall_left) * 1000)):
            if fd == ended:
                alive = False
            elif not _take(fd, buffers[reads.index(fd)], capture[reads.index(fd)]):
                poll.unregister(fd)
        if len(buffers[0]) > capture[0]:
            cut = b"output"
    os.kill(pids[0], SIGKILL)
    os.close(ended)
    for index, fd in enumerate(reads):  # what a dead process left in its pipes; never wait for its orphans
        os.set_blocking(fd, False)
        while len(buffers[index]) <= capture[index] and _take(fd, buffers[index], capture[index]):
            pass
        os.close(fd)
    if not cut and len(buffers[0]) > capture[0]:
        cut = b"output"
    return [bytes(buffer[:most]) for buffer, most in zip(buffers, capture, strict=True)], cut


def _take(fd: int, buffer: bytearray, most: int) -> bool:
    try:
        chunk = os.read(fd, 65536)
    except BlockingIOError:
        return False
    buffer += chunk[: most + 1 - len(buffer)] if len(buffer) <= most else b""
    return bool(chunk)


def _kill_everyone() -> None:
    """End whatever the process left running; the kernel spares the caller and the namespace's init."""
    try:
        os.kill(-1, SIGKILL)
    except ProcessLookupError:
        return
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def _write_files(fields: list[bytes]) -> list[bytes]:
    """[b"ok"], or why a file cannot be written: a name too long, a file where a folder must be, a full disk."""
    try:
        _write_each(fields)
    except (OSError, RecursionError) as error:
        return [b"refused", str(error).encode("utf-8", "backslashreplace")]
    return [b"ok"]


def _write_each(fields: list[bytes]) -> None:
    for at in range(0, len(fields), 3):
        path = os.path.join(WORK, fields[at].decode("utf-8", "surrogateescape"))
        mode = int(fields[at + 1], 8)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.lexists(path):
            os.unlink(path)
        if mode == SYMLINK_MODE:
            os.symlink(fields[at + 2], os.fsencode(path))
            continue
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode & 0o777)
        write_all(fd, fields[at + 2])
        os.close(fd)


def _read_files(most: int) -> list[bytes]:
    """Every regular file and link under the work folder as (path, mode, content) until `most` bytes are reached."""
    found: list[bytes] = []
    for folder, folders, names in os.walk(WORK):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            relative = os.fsencode(os.path.relpath(path, WORK))
            mode = os.lstat(path).st_mode
            if mode & 0o170000 == SYMLINK_MODE:
                found += [relative, b"120000", os.fsencode(os.readlink(path))]
            elif mode & 0o170000 == 0o100000:
                most -= os.lstat(path).st_size
                if most < 0:
                    return [b"too large"]
                os.chmod(path, mode | 0o400)
                with open(path, "rb") as file:
                    found += [relative, oct(mode & 0o777)[2:].encode(), file.read()]
    return found


def _clear(folder: str) -> None:
    """Empty a folder, whatever modes were given to what is in it; the work folder itself stays."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            os.chmod(entry.path, 0o700)
            _clear(entry.path)
            if entry.path != WORK:
                os.rmdir(entry.path)
        else:
            os.unlink(entry.path)


def _answer(fields: list[bytes]) -> list[bytes]:
    operation = fields[0]
    if operation in (b"run", b"fresh"):
        answer = run(fields[1], fields[2:8], fields[8], fields[9:])
        if operation == b"fresh":  # the next request finds nothing of this one
            os.chmod(WORK, 0o700)
            for folder, kept in SCRATCH.items():
                if os.listdir(folder) != kept:
                    _clear(folder)
        return answer
    if operation == b"write":
        return _write_files(fields[1:])
    if operation == b"companion":
        Companion.waiting = Companion(fields[1], fields[2:8], fields[9:])
        return [b"ok", b"0", b"0.0", b"", b"", b""]
    return _read_files(int(fields[1]))


def main() -> None:
    """Serve until the host closes the pipe."""
    del sys.path[0]  # this folder, which programs do not need
    _become(int(sys.argv[1]))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = 256 if files == resource.RLIM_INFINITY else min(256, files)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    HARD.update((kind, resource.getrlimit(kind)[1]) for kind in KINDS)
    os.mkdir(WORK)
    os.chdir(WORK)
    gc.disable()  # no collection here touches the pages that children share
    gc.freeze()
    requests, answers = _reserve()  # and the children's outputs, opened once for all of them
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    write_all(answers, encode([b"ready"]))
    try:
        while True:
            (size,) = struct.unpack("!I", read_exact(requests, 4))
            if size > MAX_FRAME:
                return
            write_all(answers, encode(_answer(decode(read_exact(requests, size)))))
    except EOFError:
        return


if __name__ == "__main__":
    main()
