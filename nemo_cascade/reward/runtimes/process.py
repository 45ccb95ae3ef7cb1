"""A command on this machine with a deadline and bounded outputs; container engines' command lines run through it."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

CHUNK = 1 << 16
LOOK_S = 0.02  # how often the end of the command is looked for


@dataclass(frozen=True)
class Captured:
    """`code` is None when the deadline ended the command."""

    code: int | None
    stdout: bytes
    stderr: bytes

    @property
    def complaint(self) -> str:
        """What it said on standard error, in one line."""
        return " ".join(self.stderr.decode("utf-8", "replace").split())[-300:]


def capture(argv: Sequence[str], seconds: float, stdin: bytes = b"", most_bytes: int = 1 << 20) -> Captured:
    """Run a command until it ends or its time is over, then kill its process group. Output beyond `most_bytes` is read
    and dropped; what its children hold open is not waited for.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True)
    assert process.stdin and process.stdout and process.stderr
    talk = _Talk((process.stdin, process.stdout, process.stderr), stdin, most_bytes)
    deadline = time.monotonic() + seconds
    try:
        while not (ended := has_ended(process)) and time.monotonic() < deadline:
            talk.go_on(LOOK_S)
        while ended and talk.go_on(0.0):
            pass
    finally:
        end_group(process)
        talk.close()
    return Captured(process.returncode if ended else None, bytes(talk.heard[0]), bytes(talk.heard[1]))


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended; it is not collected yet, so that its process group keeps its number."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the group that a process leads, then collect the process; a second call does nothing."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Talk:
    """Feeds standard input and collects both outputs, never waiting for more than it is told to."""

    def __init__(self, streams: tuple[IO[bytes], IO[bytes], IO[bytes]], stdin: bytes, most_bytes: int) -> None:
        self.source, *self.readers = streams
        self.streams, self.left, self.most_bytes = streams, memoryview(stdin), most_bytes
        self.heard = (bytearray(), bytearray())
        self.selector = selectors.DefaultSelector()
        for stream in streams:
            os.set_blocking(stream.fileno(), False)
            self.selector.register(stream, selectors.EVENT_WRITE if stream is self.source else selectors.EVENT_READ)

    def go_on(self, seconds: float) -> bool:
        """One round; whether an output had something to say."""
        if not self.selector.get_map():
            time.sleep(seconds)
            return False
        told = False
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.source:
                self._feed()
            else:
                told |= self._hear(self.readers.index(key.fileobj))
        return told

    def _feed(self) -> None:
        try:
            self.left = self.left[self.source.write(self.left[:CHUNK]) or 0 :] if self.left else self.left
        except BrokenPipeError:
            self.left = self.left[:0]
        if not self.left:
            self.selector.unregister(self.source)
            self.source.close()

    def _hear(self, index: int) -> bool:
        chunk = self.readers[index].read(CHUNK)
        if chunk == b"":
            self.selector.unregister(self.readers[index])
        if not chunk:
            return False
        self.heard[index].extend(chunk[: max(0, self.most_bytes - len(self.heard[index]))])
        return True

    def close(self) -> None:
        self.selector.close()
        for stream in self.streams:
            stream.close()
