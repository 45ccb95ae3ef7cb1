"""Docker and Podman as Runtimes, through their command lines, which agree on everything used here.

A container's first process reads a pipe that this process holds: when this process ends, however it ends, the pipe
closes and the container with it. Network off, memory, CPUs and processes limited, all capabilities dropped, no new
privileges; commands run as a user without rights wherever the image lets that user write to the work folder.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import select
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence

from nemo_cascade.reward.fork_server import SYMLINK_MODE
from nemo_cascade.reward.runtimes import GRACE_S, HIDE_S, INSTALL, WORK, Container, ContainerLost, Machine, Place, Ran
from nemo_cascade.reward.runtimes.process import Captured, capture, end_group
from nemo_cascade.reward.sandbox import File
from nemo_cascade.types import UserError

PROBES = {
    "docker": (["version", "--format", "{{.Server.Version}}"], "start its daemon"),
    "podman": (["info"], "see `podman info`"),
}
IMAGE_NAME = re.compile(r"\w[\w./:@-]*", re.ASCII)
READY = b"ready\n"
NOBODY = "65534:65534"
KILLED = 137  # 128 + SIGKILL: what an engine reports for a process that the kernel ended
PROBE_S = 20.0
PATH = (
    "/opt/miniconda3/envs/testbed/bin:/testbed/.venv/bin:"
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/miniconda3/bin"
)
ENVIRONMENT = {
    "PATH": PATH,  # SWE-Gym keeps its packages in the conda environment, R2E-Gym in .venv
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "CONDA_DEFAULT_ENV": "testbed",
    "GIT_CONFIG_COUNT": "1",  # the repository may belong to another user than the one who runs commands
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
}


def probe(program: str, arguments: Sequence[str], remedy: str) -> None:
    """UserError when a program is not installed or does not answer."""
    if shutil.which(program) is None:
        raise UserError(f"{program} is not installed; {INSTALL[program]}")
    answer = capture([program, *arguments], PROBE_S)
    if answer.code != 0:
        why = answer.complaint or f"no answer within {PROBE_S:g} s"
        raise UserError(f"{program} is installed and does not work ({why}); {remedy}")


class DockerRuntime:
    """Containers of `docker` or `podman`."""

    def __init__(self, machine: Machine, name: str = "docker") -> None:
        self.machine, self.name = machine, name
        self._running: dict[str, DockerContainer] = {}
        self._checked = False

    def check(self) -> None:
        """UserError when the engine is missing or its daemon does not answer."""
        if not self._checked:
            asked, remedy = PROBES[self.name]
            probe(self.name, asked, f"{remedy}, or choose another runtime")
            self._checked = True

    def command(self, container: str, image: str) -> list[str]:
        """The command line that starts a container and stays attached to it."""
        machine = self.machine
        return [
            self.name, "run", "--interactive", "--rm", "--init", "--name", container, "--label", "nemo-cascade=swe",
            "--network", "none",
            "--memory", f"{machine.memory_mb}m", "--memory-swap", f"{machine.memory_mb}m",
            "--cpus", f"{machine.cpus:g}", "--pids-limit", str(machine.processes),
            "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
            "--workdir", WORK, "--entrypoint", "sh", self.full_name(image), "-c", "echo ready; exec cat >/dev/null",
        ]  # fmt: skip

    def full_name(self, image: str) -> str:
        """The image's name with its registry, which podman wants and docker adds by itself."""
        registry, slash, _ = image.partition("/")
        bare = slash and registry != "localhost" and not set(".:") & set(registry)
        return f"docker.io/{image}" if self.name == "podman" and bare else image

    def start(self, place: Place) -> DockerContainer:
        """A fresh container of the place's image, pulled where it is not here yet."""
        self.check()
        if not place.image:
            raise UserError(f"option runtime: {self.name} starts from an image, and the row has none")
        if not IMAGE_NAME.fullmatch(place.image):
            raise ContainerLost(f"{self.name}: {place.image!r} is no image name")
        container = DockerContainer(self, f"nemo-cascade-{os.getpid()}-{secrets.token_hex(6)}", place.image)
        self._running[container.name] = container
        try:
            container.begin(place)
        except (ContainerLost, ValueError) as error:
            container.stop()
            raise ContainerLost(f"{self.name}: {error}") from error
        return container

    def forget(self, name: str) -> None:
        """A container has been stopped."""
        self._running.pop(name, None)

    def close(self) -> None:
        """Stop every container that still runs."""
        for container in list(self._running.values()):
            container.stop()


class DockerContainer(Container):
    """One container and the client that is attached to it."""

    def __init__(self, runtime: DockerRuntime, name: str, image: str) -> None:
        self.runtime, self.name, self.image = runtime, name, image
        self._user: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._stopped = False
        self._complaints = tempfile.TemporaryFile()
        pipe = subprocess.PIPE
        argv = runtime.command(name, image)
        self._client = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=self._complaints, bufsize=0, start_new_session=True
        )

    def begin(self, place: Place) -> None:
        """Wait until it runs, remove what is hidden, find the user for commands, put files into the work folder.

        The work folder is cleared as the image's user, who may remove what others may not.
        """
        self._wait_ready()
        if place.hidden:
            removed = self._exec(["rm", "-rf", "--", *place.hidden], GRACE_S)
            if removed.code != 0:
                raise ContainerLost(f"{', '.join(place.hidden)} cannot be hidden: {removed.complaint}")
        as_nobody = ("--user", NOBODY)
        if self._exec(["test", "-w", "."], GRACE_S, user=as_nobody).code == 0:
            self._user = as_nobody
        if place.files is not None:
            unpack = ["tar", "--extract", "--no-same-owner"]
            ran = self.run(unpack, self.runtime.machine.start_seconds, tar_of(place.files))
            if ran.code != 0:
                raise ContainerLost(f"the files cannot be unpacked: {ran.stderr.decode('utf-8', 'replace')[-200:]}")
        if place.hide:
            hidden = self._exec(["sh", "-c", place.hide], HIDE_S, user=())
            if hidden.code != 0:
                raise ContainerLost(f"the work folder cannot be cleared: {hidden.complaint or 'its time ran out'}")

    def _wait_ready(self) -> None:
        assert self._client.stdout is not None
        deadline, heard = time.monotonic() + self.runtime.machine.start_seconds, b""
        while READY not in heard:
            left = deadline - time.monotonic()
            if left <= 0:
                seconds = self.runtime.machine.start_seconds
                raise ContainerLost(f"image {self.image} did not start within {seconds:g} s")
            if select.select([self._client.stdout], [], [], min(left, 1.0))[0]:
                chunk = os.read(self._client.stdout.fileno(), 4096)
                if not chunk:
                    raise ContainerLost(f"image {self.image} did not start: {self._complaint()}")
                heard += chunk

    def _complaint(self) -> str:
        self._complaints.seek(0)
        return " ".join(self._complaints.read().decode("utf-8", "replace").split())[-300:]

    def _exec(
        self, argv: Sequence[str], seconds: float, stdin: bytes = b"", most_bytes: int = 1 << 20,
        user: tuple[str, ...] | None = None,
    ) -> Captured:  # fmt: skip
        """A command in the container: `timeout` ends it inside, and the host its client a little later."""
        settings = [part for name, value in ENVIRONMENT.items() for part in ("--env", f"{name}={value}")]
        inside = ["timeout", "-k", "1", f"{seconds:g}", *argv]
        user = self._user if user is None else user
        command = [self.runtime.name, "exec", "--interactive", *user, "--workdir", WORK, *settings, self.name, *inside]
        return capture(command, seconds + GRACE_S, stdin, most_bytes)

    def run(self, argv: Sequence[str], seconds: float, stdin: bytes = b"", most_bytes: int = 1 << 20) -> Ran:
        """Run a command; one that outlives its limit inside, too, costs the container."""
        if self._stopped or self._client.poll() is not None:
            raise ContainerLost(f"container {self.name} has ended")
        began = time.monotonic()
        done = self._exec(argv, seconds, stdin, most_bytes)
        if done.code is None:
            self.stop()
            return Ran(None, done.stdout, done.stderr)
        late = done.code in (124, KILLED) and time.monotonic() - began >= seconds
        out_of_memory = done.code == KILLED and not late and self.out_of_memory()
        return Ran(None if late else done.code, done.stdout, done.stderr, out_of_memory)

    def out_of_memory(self) -> bool:
        """What the engine says; of a container that is gone already, whether its first process was killed."""
        if self._stopped:
            return False
        if self._client.poll() is not None:
            return self._client.returncode == KILLED
        answer = capture([self.runtime.name, "inspect", "--format", "{{.State.OOMKilled}}", self.name], PROBE_S)
        return answer.stdout.strip() == b"true"

    def stop(self) -> None:
        """Close its pipe, remove it by force, then end the client."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            assert self._client.stdin and self._client.stdout
            self._client.stdin.close()
            capture([self.runtime.name, "rm", "--force", self.name], 60.0)
            for stream in (self._client.stdout, self._complaints):
                stream.close()
            end_group(self._client)
        self.runtime.forget(self.name)


def tar_of(files: Mapping[str, File]) -> bytes:
    """Files as an archive for a container's `tar --extract`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, file in files.items():
            entry = tarfile.TarInfo(path)
            entry.mode = file.mode & 0o777
            if file.mode == SYMLINK_MODE:
                entry.type, entry.linkname = tarfile.SYMTYPE, os.fsdecode(file.content)
                archive.addfile(entry)
            else:
                entry.size = len(file.content)
                archive.addfile(entry, io.BytesIO(file.content))
    return buffer.getvalue()
