"""One process per stage folder. A lock whose process is gone is taken over; one that is alive is respected.

The runner takes the lock and hands it to the stage's process, so that a killed runner leaves a lock that names the
process which still trains. The next run ends such an orphan and goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_cascade.cascade.artifacts import read_json, write_json
from nemo_cascade.config.paths import explain_os_error
from nemo_cascade.types import UserError

TERM_SECONDS = 10.0


@dataclass(frozen=True)
class Holder:
    """Who runs a stage: process id and the moment it started (ids are used again), on which machine, started by
    whom.
    """

    pid: int
    born: int  # clock ticks after boot, 0 where /proc is absent
    host: str
    runner_pid: int
    runner_born: int

    def alive(self) -> bool:
        """The process exists; one on another machine is taken to be alive."""
        return self.host != socket.gethostname() or _lives(self.pid, self.born)

    def orphan(self) -> bool:
        """The process runs here and the runner that started it is gone."""
        here = self.host == socket.gethostname()
        return here and self.pid != self.runner_pid and self.alive() and not _lives(self.runner_pid, self.runner_born)


def born(pid: int) -> int:
    """Start time of a process in clock ticks after boot; 0 when it is gone, a zombie, or the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


def _lives(pid: int, started: int) -> bool:
    if Path("/proc/self/stat").exists():
        return started != 0 and born(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def holder(path: Path) -> Holder | None:
    """Who holds the lock file, None when nobody alive does."""
    content = read_json(path)
    if not isinstance(content, dict):
        return None
    found = Holder(**content)
    return found if found.alive() else None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a stage folder; a lock that the starting process handed over counts as one's own."""
    handed_over = _take(path)
    try:
        yield
    finally:
        if not handed_over:
            path.unlink(missing_ok=True)


def _take(path: Path) -> bool:
    me, parent = os.getpid(), os.getppid()
    for _ in range(3):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            found = _wait_for_content(path)
            if found is not None and found.pid in (me, parent):
                return True
            if found is not None and found.orphan():
                end_orphan(found)
            elif found is not None:
                raise UserError(
                    f"{path.parent}: already running as process {found.pid} on {found.host}; wait for it, "
                    f"or stop it and delete {path.name}"
                ) from None
            path.unlink(missing_ok=True)
            continue
        except OSError as error:
            raise explain_os_error(error, path) from error
        write_json(path, asdict(Holder(me, born(me), socket.gethostname(), me, born(me))))
        return False
    raise UserError(f"{path.parent}: another process keeps starting this stage; run one cascade at a time")


def _wait_for_content(path: Path) -> Holder | None:
    """The holder, after the moment in which a lock exists and has no content yet."""
    for _ in range(10):
        try:
            if path.stat().st_size > 0:
                return holder(path)
        except FileNotFoundError:
            return None
        time.sleep(0.05)
    return None


def hand_over(path: Path, pid: int) -> None:
    """Name the stage's process as holder, this process as its runner."""
    me = os.getpid()
    write_json(path, asdict(Holder(pid, born(pid), socket.gethostname(), me, born(me))))


def end_orphan(found: Holder) -> None:
    """Stop the process group of a stage whose runner died; its checkpoints are complete or absent, so nothing is
    lost.
    """
    end_group(found.pid)


def end_group(pid: int) -> None:
    """Ask the process group of `pid` to end, then make it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, sign)
        except (ProcessLookupError, PermissionError):
            return
        deadline = time.monotonic() + TERM_SECONDS
        while time.monotonic() < deadline:
            if not group_lives(pid):
                return
            time.sleep(0.05)


def group_lives(group: int) -> bool:
    """Whether a process of the group still runs; zombies do not count where /proc tells them apart."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    if not Path("/proc/self/stat").exists():
        return True
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and _in_group(entry / "stat", group):
            return True
    return False


def _in_group(stat: Path, group: int) -> bool:
    try:
        fields = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[2]) == group and fields[0] not in ("Z", "X")
