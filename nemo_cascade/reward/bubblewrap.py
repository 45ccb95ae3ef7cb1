"""Starts bubblewrap with the fork server inside, and talks to it with deadlines.

Two ways, found by trying: as root without a user namespace, each sandbox then drops to a random uid of its own (the
kernel ignores process limits for root); as a normal user, or as root of a container without that right, inside a
user namespace.
"""

from __future__ import annotations

import functools
import logging
import os
import py_compile
import secrets
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nemo_cascade.reward import fork_server, system_calls, wire
from nemo_cascade.types import UserError

log = logging.getLogger(__name__)
Mode = Literal["root", "user"]
INSTALL = "apt-get install -y bubblewrap"
MAX_ANSWER = 64 << 20
NO_USER = -1
SHARED_MB = 64  # /dev/shm, where semaphores and shared arrays of honest programs are


def _readable_parents(path: Path) -> list[str]:
    """bubblewrap copies the modes of parents it must create, and /root is closed to the sandbox's uid: create them
    open.
    """
    arguments: list[str] = []
    for parent in reversed(path.parents):
        if parent != Path("/"):
            arguments += ["--perms", "0755", "--dir", str(parent)]
    return arguments


@functools.cache
def _system_binds() -> tuple[str, ...]:
    """/usr and the running interpreter, read-only; /lib and friends as the links or folders they are."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("/lib", "/lib64", "/lib32", "/bin", "/sbin"):
        if os.path.islink(name):
            arguments += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            arguments += ["--ro-bind", name, name]
    prefix = Path(sys.base_prefix).resolve()
    if not prefix.is_relative_to("/usr"):
        arguments += [*_readable_parents(prefix), "--ro-bind", str(prefix), str(prefix)]
    python = str(_python())
    arguments += ["--perms", "0755", "--dir", "/run", "--perms", "0755", "--dir", "/run/bin"]
    for link in ("python", "python3"):
        arguments += ["--symlink", python, f"/run/bin/{link}"]
    return tuple(arguments)


def _python() -> Path:
    """The interpreter itself, not a virtual environment's link to it."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return Path(sys.base_prefix).resolve() / "bin" / name


@functools.cache
def _server_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="nemo-cascade-sandbox-")  # goes when the process ends


def _compiled_server() -> Path:
    """A folder with the fork server as bytecode: compiling it in each sandbox would cost as much as the fork it saves.

    What it imports of the package lies beside it under its own name. Written again if it has gone: a forked child that
    exits normally takes the temporary folder along.
    """
    folder = Path(_server_folder().name, "server")
    for module, name in ((fork_server, "fork_server.pyc"), (wire, f"{wire.__name__.replace('.', '/')}.pyc")):
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            py_compile.compile(str(Path(module.__file__)), cfile=str(target), doraise=True)
            target.chmod(0o644)
    for path in (folder, *folder.rglob("*/")):
        path.chmod(0o755)
    return folder


def sandbox_uid() -> int:
    """A uid that nobody else has, so that process limits count this sandbox alone."""
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, count = max(ranges, key=lambda row: row[2])
    low, high = first + count // 2, min(first + count, 1 << 31) - 2
    return min(low, 1 << 30) + secrets.randbelow(max(1, high - min(low, 1 << 30)))


def given_mb(scratch_mb: int) -> int:
    """The largest standard input."""
    return max(SHARED_MB, scratch_mb)


def command(mode: Mode, scratch_mb: int, read_only: Sequence[Path]) -> list[str]:
    """The bubblewrap command line of one sandbox."""
    server = _compiled_server()
    arguments = ["bwrap", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if mode == "root":
        arguments += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        arguments += ["--unshare-all", "--unshare-user"]
    arguments += [*_system_binds(), "--ro-bind", str(server), "/run/server"]
    for path in read_only:
        arguments += [*_readable_parents(path), "--ro-bind", str(path), str(path)]
    arguments += ["--dev", "/dev"]
    sizes = {"/tmp": scratch_mb, "/dev/shm": min(SHARED_MB, scratch_mb), fork_server.GIVEN: given_mb(scratch_mb)}
    for folder, megabytes in sizes.items():
        arguments += ["--perms", "1777", "--size", str(megabytes << 20), "--tmpfs", folder]
    arguments += ["--remount-ro", "/dev"]  # which has no size, and belongs to a normal user
    for name, value in (("PATH", "/run/bin:/usr/bin:/bin"), ("HOME", "/tmp"), ("LANG", "C.UTF-8")):
        arguments += ["--setenv", name, value]
    arguments += ["--setenv", "PYTHONHASHSEED", "0", "--setenv", "PYTHONDONTWRITEBYTECODE", "1"]
    arguments += ["--remount-ro", "/", "--chdir", "/tmp", str(_python()), "-s", "-S", "/run/server/fork_server.pyc"]
    return [*arguments, str(sandbox_uid() if mode == "root" else NO_USER)]


@functools.cache
def launch_mode() -> Mode:
    """The first way that works here; UserError with the remedy when none does."""
    if shutil.which("bwrap") is None:
        raise UserError(f"bubblewrap (bwrap) is not installed, and untrusted code runs only inside it; run `{INSTALL}`")
    if not system_calls.filter_program():
        log.warning(
            "no filter of system calls is known for %s: sandboxed programs may make namespaces, and hold memory "
            "outside their limits; docs/sandbox.md has what remains",
            os.uname().machine,
        )
    modes: tuple[Mode, ...] = ("root", "user") if os.getuid() == 0 else ("user",)
    complaints = []
    for mode in modes:
        server = Server(16, (), mode)
        try:
            server.wait_ready(30.0)
            return mode
        except (EOFError, TimeoutError) as error:
            complaints.append(server.complaint() or str(error))
        finally:
            server.kill()
    if any("seccomp" in complaint.lower() for complaint in complaints):
        raise UserError(
            f"the kernel refuses the sandbox's filter of system calls here ({'; '.join(complaints)}); "
            "run on a kernel with CONFIG_SECCOMP_FILTER, and not under an emulator of one (qemu-user, gVisor)"
        )
    raise UserError(
        f"bubblewrap cannot create namespaces here ({'; '.join(complaints)}); "
        "set `sysctl kernel.unprivileged_userns_clone=1` on the host, "
        "or start the container with `--security-opt seccomp=unconfined --cap-add SYS_ADMIN`"
    )


def _filter_file() -> int | None:
    """A descriptor from which one bubblewrap reads the filter of system calls; None on a machine without one."""
    program = system_calls.filter_program()
    if not program:
        return None
    fd = os.memfd_create("seccomp")
    os.write(fd, program)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


RUNNING: set[int] = set()
"""bubblewrap processes of this process that nobody has ended."""


class Server:
    """A running sandbox. One thread at a time; every wait has a deadline."""

    def __init__(self, scratch_mb: int, read_only: Sequence[Path], mode: Mode | None = None) -> None:
        argv = command(mode or launch_mode(), scratch_mb, read_only)
        pipe, filtered = subprocess.PIPE, _filter_file()
        if filtered is not None:
            argv[1:1] = ["--seccomp", str(filtered)]
        self._process = subprocess.Popen(
            argv,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            bufsize=0,
            env={"PATH": os.defpath},
            pass_fds=() if filtered is None else (filtered,),
        )
        if filtered is not None:
            os.close(filtered)
        RUNNING.add(self._process.pid)
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out, self._err = self._process.stdin, self._process.stdout, self._process.stderr
        for stream in (self._in, self._out, self._err):
            os.set_blocking(stream.fileno(), False)
        self.closed = False
        self.most_given = given_mb(scratch_mb) << 20  # bytes of standard input

    def wait_ready(self, seconds: float) -> None:
        """Block until the fork server has dropped its privileges and made its work folder."""
        if self._receive(time.monotonic() + seconds) != [b"ready"]:
            raise EOFError("the fork server said something else than ready")

    def ask(self, fields: list[bytes], seconds: float) -> list[bytes]:
        """One request and its answer; EOFError when the sandbox died, TimeoutError after `seconds`."""
        if self.closed:
            raise EOFError("the sandbox is closed")
        deadline = time.monotonic() + seconds
        view = memoryview(wire.encode(fields))
        while view:
            self._wait(self._in.fileno(), select.POLLOUT, deadline)
            written = self._in.write(view)
            view = view[written or 0 :]
        return self._receive(deadline)

    def _receive(self, deadline: float) -> list[bytes]:
        (size,) = struct.unpack("!I", self._read(4, deadline))
        if size > MAX_ANSWER:
            raise ValueError(f"the sandbox announced an answer of {size} bytes")
        return wire.decode(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._out.fileno(), select.POLLIN, deadline)
            chunk = self._out.read(min(size - len(data), 1 << 20))
            if chunk == b"":
                raise EOFError("the sandbox ended")
            data += chunk or b""
        return bytes(data)

    @staticmethod
    def _wait(fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("waited for the sandbox in vain")

    def complaint(self) -> str:
        """What bubblewrap said before it ended, in one line."""
        text = self._err.read() if not self._err.closed else b""
        return " ".join((text or b"").decode("utf-8", "replace").split())[:300]

    def kill(self) -> None:
        """End the sandbox: its init dies with bubblewrap and takes the whole pid namespace along."""
        self.closed = True
        RUNNING.discard(self._process.pid)
        self._process.kill()
        self._process.wait()
        for stream in (self._in, self._out, self._err):
            stream.close()
