"""The sandbox of this package as a Runtime: a container's files live in memory, in one bubblewrap sandbox.

It starts from files, not from images. What `reward/sandbox.py` covers holds here: no network, a user of its own,
nothing of the host but /usr and the interpreter; beside these, the folder of Python packages that tests need,
read-only.
"""

from __future__ import annotations

import base64
import importlib.util
import signal
import sys
import sysconfig
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from nemo_cascade.reward.runtimes import GRACE_S, ContainerEnded, ContainerLost, Machine, Place, Ran
from nemo_cascade.reward.sandbox import Limits, RunResult, Sandbox, Session
from nemo_cascade.types import UserError

WORK = "/tmp/work"


class BubblewrapRuntime:
    """Containers in bubblewrap sandboxes.

    `packages`: a folder of Python packages with pytest in it (a virtual environment's site-packages); "" takes the
    running interpreter's.
    """

    name = "bubblewrap"

    def __init__(self, machine: Machine, packages: str = "") -> None:
        self.machine, self._packages = machine, packages
        self._running: set[BubblewrapContainer] = set()

    @cached_property
    def packages(self) -> Path:
        """The folder of packages that tests see; UserError when it has no pytest."""
        found = importlib.util.find_spec("pytest")
        default = Path(found.origin).parents[1] if found and found.origin else Path(sysconfig.get_path("purelib"))
        folder = Path(self._packages).absolute() if self._packages else default
        if not (folder / "pytest").is_dir():
            raise UserError(
                f"option packages: {folder} has no pytest, which runs the tests of a repository; run "
                f"`{sys.executable} -m pip install pytest`, or name a folder that has it"
            )
        return folder

    @cached_property
    def _sandbox(self) -> Sandbox:
        return Sandbox(spare=0, scratch_mb=self.machine.scratch_mb, read_only=(self.packages,))

    def check(self) -> None:
        """UserError when bubblewrap, the right to use it, or pytest is missing."""
        Sandbox.check()
        _ = self.packages

    def start(self, place: Place) -> BubblewrapContainer:
        """A sandbox whose work folder holds the place's files."""
        if place.files is None:
            raise UserError(
                f"option runtime: bubblewrap starts from a folder, not from image {place.image!r}; name docker, podman "
                "or apptainer, or the repository's folder in option repositories"
            )
        self.check()
        try:
            session = self._sandbox.open(place.files)
        except ValueError as error:
            raise ContainerLost(f"bubblewrap: {error}") from error
        if not session.alive:
            raise ContainerLost("bubblewrap: the sandbox did not start or did not take its files")
        container = BubblewrapContainer(session, self)
        self._running.add(container)
        return container

    def forget(self, container: BubblewrapContainer) -> None:
        """A container has been stopped."""
        self._running.discard(container)

    def close(self) -> None:
        """Stop every container that still runs."""
        for container in list(self._running):
            container.stop()
        if "_sandbox" in self.__dict__:
            self._sandbox.close()


class BubblewrapContainer:
    """One sandbox session. Processes that a command leaves behind end with it."""

    def __init__(self, session: Session, runtime: BubblewrapRuntime) -> None:
        self._session, self._runtime, self._machine = session, runtime, runtime.machine
        self._environment = [
            "env", f"PYTHONPATH={runtime.packages}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", "GIT_CONFIG_NOSYSTEM=1"
        ]  # fmt: skip

    def run(self, argv: Sequence[str], seconds: float, stdin: bytes = b"", most_bytes: int = 1 << 20) -> Ran:
        """Run a command. Its time is also out when it has used `seconds` of CPU time on every processor it may use."""
        machine = self._machine
        limits = Limits(
            cpu_seconds=max(1.0, seconds * machine.cpus),
            wall_seconds=seconds,
            memory_mb=machine.memory_mb,
            processes=machine.processes,
            output_bytes=most_bytes,
            file_mb=machine.scratch_mb,
        )
        if not self._session.alive:
            raise ContainerLost("the sandbox has ended")
        result = self._session.run([*self._environment, *argv], stdin.decode("utf-8", "surrogateescape"), limits)
        if not self._session.alive:
            if result.status == "wall_time":
                raise ContainerLost(f"bubblewrap: {result.stderr}")
            raise ContainerEnded("a command ended its sandbox")
        return _ran(result)

    def read(self, path: str, most_bytes: int = 16 << 20) -> bytes:
        """A file, in base 64 through standard output."""
        ran = self.run(["base64", "--wrap=0", "--", path], GRACE_S, b"", most_bytes * 4 // 3 + 4)
        if ran.code != 0:
            raise ValueError(ran.complaint(f"cannot be read, or has more than {most_bytes} bytes"))
        return base64.b64decode(ran.stdout)

    def write(self, path: str, content: bytes) -> None:
        """A file, in base 64 through standard input."""
        script = 'mkdir -p -- "$(dirname -- "$1")" && base64 --decode > "$1"'
        ran = self.run(["sh", "-c", script, "sh", path], GRACE_S, base64.b64encode(content))
        if ran.code != 0:
            raise ValueError(ran.complaint("cannot be written"))

    def out_of_memory(self) -> bool:
        """Never: memory is bounded for each process, and a command that needs more fails by itself."""
        return False

    def stop(self) -> None:
        """End the sandbox."""
        self._session.close()
        self._runtime.forget(self)


def _ran(result: RunResult) -> Ran:
    late = result.status in ("wall_time", "cpu_time")
    code = None if late else -signal.SIGKILL if result.status == "output" else result.exit_code
    outputs = [text.encode("utf-8", "surrogateescape") for text in (result.stdout, result.stderr)]
    return Ran(code, outputs[0], outputs[1], result.status == "memory")
