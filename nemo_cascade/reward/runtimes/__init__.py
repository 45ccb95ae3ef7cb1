"""Where the commands of a software agent run: one small interface, four ways behind it.

A Runtime starts a Container from an image or from files; commands run in its work folder one after the other, each with
a time limit, none with a network. `stop` ends everything that was started, and so does the end of this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_cascade.reward.sandbox import File
from nemo_cascade.types import UserError

WORK = "/testbed"  # where the images of SWE-Gym, R2E-Gym and SWE-bench keep the repository
GRACE_S = 15.0  # beyond a command's own limit, before the host ends it
HIDE_S = 120.0  # for git on a large repository
ENGINES = ("docker", "podman", "apptainer")
NAMES = ("bubblewrap", *ENGINES)
INSTALL = {
    "docker": "see https://docs.docker.com/engine/install",
    "podman": "run `apt-get install -y podman`",
    "apptainer": "see https://apptainer.org/docs/admin/latest/installation.html",
}


class ContainerLost(Exception):
    """A container did not start or is gone: a failure of ours, never of the answer."""


class ContainerEnded(ContainerLost):
    """A command has ended its own container: the answer's doing, not ours."""


@dataclass(frozen=True)
class Machine:
    """What one container may use, and how long it may take to start (an image may have to be pulled)."""

    memory_mb: int = 32768
    cpus: float = 4.0
    processes: int = 1024
    scratch_mb: int = 2048  # bubblewrap: its work folder and /tmp, in memory
    start_seconds: float = 300.0


@dataclass(frozen=True)
class Place:
    """What a container starts from: an image, files for the work folder, or an image with these files put there.

    `hidden`: absolute paths of the image that commands must not find. `hide`: a shell script that takes from the work
    folder what they must not find there; it runs as the image's user once the files are there, and where it fails there
    is no container. Bubblewrap, which has nothing of an image, ignores both.
    """

    image: str = ""
    files: Mapping[str, File] | None = None
    hidden: tuple[str, ...] = ()
    hide: str = ""


@dataclass(frozen=True)
class Ran:
    """What became of a command. `code` is None when its time ran out; outputs are cut at the asked number of bytes."""

    code: int | None
    stdout: bytes
    stderr: bytes
    out_of_memory: bool = False

    def complaint(self, otherwise: str) -> str:
        """The last words of a command that failed."""
        return " ".join(self.stderr.decode("utf-8", "replace").split())[-200:] or otherwise


class Container(Protocol):
    """A started container; one thread at a time. Files travel through the standard streams of commands."""

    def run(self, argv: Sequence[str], seconds: float, stdin: bytes = b"", most_bytes: int = 1 << 20) -> Ran:
        """Run a command in the work folder; ContainerLost when there is no container any more, ContainerEnded when this
        command is known to have ended it.
        """

    def read(self, path: str, most_bytes: int = 16 << 20) -> bytes:
        """A file, absolute or relative to the work folder; ValueError says why it cannot be read."""
        ran = self.run(["cat", "--", path], GRACE_S, b"", most_bytes + 1)
        if ran.code != 0 or len(ran.stdout) > most_bytes:
            raise ValueError(ran.complaint(f"cannot be read, or has more than {most_bytes} bytes"))
        return ran.stdout

    def write(self, path: str, content: bytes) -> None:
        """Create or replace a file and the folders above it; ValueError says why it cannot be written."""
        script = 'mkdir -p -- "$(dirname -- "$1")" && cat > "$1"'
        ran = self.run(["sh", "-c", script, "sh", path], GRACE_S, content)
        if ran.code != 0:
            raise ValueError(ran.complaint("cannot be written"))

    def out_of_memory(self) -> bool:
        """Whether the container as a whole has hit its memory limit."""

    def stop(self) -> None:
        """End the container and everything in it; a second call does nothing."""


class Runtime(Protocol):
    """One way of running containers; safe to share between threads."""

    name: str

    def check(self) -> None:
        """UserError with the remedy when this runtime cannot be used here."""

    def start(self, place: Place) -> Container:
        """A fresh container; UserError when the runtime is not there, ContainerLost when this one does not start."""

    def close(self) -> None:
        """Stop every container that is still running."""


def load(name: str, machine: Machine, packages: str = "") -> Runtime:
    """The runtime of that name. `packages`: the folder of Python packages that bubblewrap shows to tests."""
    from nemo_cascade.reward.runtimes.apptainer import ApptainerRuntime
    from nemo_cascade.reward.runtimes.bubblewrap import BubblewrapRuntime
    from nemo_cascade.reward.runtimes.docker import DockerRuntime

    if name == "bubblewrap":
        return BubblewrapRuntime(machine, packages)
    return ApptainerRuntime(machine) if name == "apptainer" else DockerRuntime(machine, name)


class Choice:
    """Which runtime a row gets: the named one; for `auto` bubblewrap where the row has a clone, else the first engine.

    The engine is looked for once: a probe takes up to 20 s.
    """

    def __init__(self, named: str, machine: Machine) -> None:
        self._named, self._machine = named, machine
        self._engine = ""

    def of(self, has_clone: bool) -> str:
        """The runtime's name; UserError when there must be an engine and none works."""
        if self._named != "auto":
            return self._named
        if has_clone:
            return "bubblewrap"
        self._engine = self._engine or first_engine(self._machine)
        return self._engine


def first_engine(machine: Machine) -> str:
    """The first container engine that works here; UserError says what to install when none does."""
    complaints = []
    for name in ENGINES:
        try:
            load(name, machine).check()
            return name
        except UserError as error:
            complaints.append(str(error))
    raise UserError(f"no container engine works here, and this row names an image: {'; '.join(complaints)}")
