"""Apptainer as a Runtime: each command is an `apptainer exec` of its own, over a copy of the image's repository.

An exec has its own process namespace, so nothing that a command starts outlives it; what it changes in the work folder
stays, because that folder is a copy on this machine, bound over the image's. Changes elsewhere in the image are lost
with the command. Commands run as the user who runs this package, never as root of the host.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_cascade.reward.runtimes import GRACE_S, HIDE_S, WORK, Container, ContainerLost, Machine, Place, Ran
from nemo_cascade.reward.runtimes.docker import ENVIRONMENT, KILLED, probe, tar_of
from nemo_cascade.reward.runtimes.process import Captured, capture
from nemo_cascade.types import UserError

COPY = "/mnt"  # where the copy is bound while it is made


class ApptainerRuntime:
    """Containers of `apptainer`: images are SIF files, or names that apptainer can pull (docker://...)."""

    name = "apptainer"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._running: dict[str, ApptainerContainer] = {}
        self._checked = False

    def check(self) -> None:
        """UserError when apptainer is not installed."""
        if not self._checked:
            probe(self.name, ["--version"], "choose another runtime")
            self._checked = True

    def command(
        self,
        image: str,
        folder: Path,
        place: str,
        argv: Sequence[str],
        bounded: bool = True,
        covers: Sequence[str] = (),
    ) -> list[str]:
        """The command line of one command, with a folder of this machine at `place` and `covers` over other folders.

        Not `bounded`: without control groups, which many clusters keep from users; limits of each process stand in.
        """
        machine = self.machine
        limits = ["--memory", f"{machine.memory_mb}M", "--cpus", f"{machine.cpus:g}"]
        limits += ["--pids-limit", str(machine.processes)]
        alone = ["--containall", "--cleanenv", "--no-home", "--writable-tmpfs", "--net", "--network", "none"]
        settings = [part for name, value in ENVIRONMENT.items() for part in ("--env", f"{name}={value}")]
        bind = ["--bind", f"{folder}:{place}", *covers, "--pwd", place]
        script = f'ulimit -v {machine.memory_mb << 10}; exec "$@"'
        inside = list(argv) if bounded else ["sh", "-c", script, "sh", *argv]
        return [self.name, "exec", *alone, *(limits if bounded else []), *settings, *bind, image, *inside]

    def start(self, place: Place) -> ApptainerContainer:
        """A copy of the image's work folder, ready for commands."""
        self.check()
        if not place.image:
            raise UserError("option runtime: apptainer starts from an image, and the row has none")
        if place.image.startswith("-") or not place.image.isprintable():
            raise ContainerLost(f"apptainer: {place.image!r} is no image")
        container = ApptainerContainer(self, _image(place.image))
        self._running[str(container.folder)] = container
        try:
            container.begin(place)
        except (ContainerLost, ValueError) as error:
            container.stop()
            raise ContainerLost(f"apptainer: {error}") from error
        return container

    def forget(self, folder: Path) -> None:
        """A container has been stopped."""
        self._running.pop(str(folder), None)

    def close(self) -> None:
        """Remove every copy that is left."""
        for container in list(self._running.values()):
            container.stop()


class ApptainerContainer(Container):
    """An image and the folder that stands for its repository."""

    def __init__(self, runtime: ApptainerRuntime, image: str) -> None:
        self.runtime, self.image = runtime, image
        self.folder = Path(tempfile.mkdtemp(prefix="nemo-cascade-swe-"))
        self._bounded = True
        self._covered: tuple[str, ...] = ()
        self._nothing = Path(tempfile.mkdtemp(prefix="nemo-cascade-nothing-"))
        self._killed = False
        self._stopped = False

    def begin(self, place: Place) -> None:
        """Copy the repository out of the image, find the folders to hide, unpack files over the copy, clear it."""
        copy = ["cp", "-a", f"{WORK}/.", f"{COPY}/"]
        done = self._exec(copy, self.runtime.machine.start_seconds, at=COPY)
        if done.code not in (0, None):
            self._bounded = False
            done = self._exec(copy, self.runtime.machine.start_seconds, at=COPY)
        if done.code != 0:
            raise ContainerLost(f"image {self.image} did not start: {done.complaint or 'its time ran out'}")
        if place.hidden:
            look = 'for path; do [ -d "$path" ] && printf "%s\\n" "$path"; done; true'
            found = self._exec(["sh", "-c", look, "sh", *place.hidden], GRACE_S)
            if found.code != 0:
                raise ContainerLost(f"{', '.join(place.hidden)} cannot be looked for: {found.complaint}")
            self._covered = tuple(found.stdout.decode().split())
        if place.files is not None:
            ran = self.run(["tar", "--extract"], self.runtime.machine.start_seconds, tar_of(place.files))
            if ran.code != 0:
                raise ContainerLost(ran.complaint("the files cannot be unpacked"))
        if place.hide:
            ran = self.run(["sh", "-c", place.hide], HIDE_S)
            if ran.code != 0:
                raise ContainerLost(f"the work folder cannot be cleared: {ran.complaint('its time ran out')}")

    def _exec(
        self, argv: Sequence[str], seconds: float, stdin: bytes = b"", most_bytes: int = 1 << 20, at: str = WORK
    ) -> Captured:
        inside = ["timeout", "-k", "1", f"{seconds:g}", *argv]
        covers = [part for path in self._covered for part in ("--bind", f"{self._nothing}:{path}:ro")]
        command = self.runtime.command(self.image, self.folder, at, inside, self._bounded, covers)
        return capture(command, seconds + GRACE_S, stdin, most_bytes)

    def run(self, argv: Sequence[str], seconds: float, stdin: bytes = b"", most_bytes: int = 1 << 20) -> Ran:
        """Run a command; a kill that its time does not explain is the memory limit's."""
        if self._stopped:
            raise ContainerLost("the container has been stopped")
        began = time.monotonic()
        done = self._exec(argv, seconds, stdin, most_bytes)
        late = done.code is None or (done.code in (124, KILLED) and time.monotonic() - began >= seconds)
        killed = done.code == KILLED and not late
        self._killed |= killed
        return Ran(None if late else done.code, done.stdout, done.stderr, killed)

    def out_of_memory(self) -> bool:
        """Whether a command was killed before its time."""
        return self._killed

    def stop(self) -> None:
        """Remove the copy, whatever modes its folders were given."""
        if not self._stopped:
            self._stopped = True
            self._nothing.rmdir()
            for folder, _, _ in os.walk(self.folder):
                os.chmod(folder, 0o700)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.runtime.forget(self.folder)


def _image(name: str) -> str:
    """A path or an address as it is; a bare image name as apptainer pulls it."""
    return name if name.endswith(".sif") or "://" in name or name.startswith(("/", "./")) else f"docker://{name}"
