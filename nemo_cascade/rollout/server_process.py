"""Starting the server as a process of its own, with a deadline, and ending it for sure."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from nemo_cascade.config.paths import PACKAGE
from nemo_cascade.types import UserError

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 5.0


@dataclass
class ServerHandle:
    """A running server: its address, and `close`. The server also ends by itself when this process does."""

    url: str
    process: subprocess.Popen[str]
    log: IO[str]

    def __enter__(self) -> ServerHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ask it to stop, then make it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def start_server(
    folder: str | Path, port: int = 0, deadline_s: float = START_DEADLINE_S, thinking: bool = True, max_batch: int = 128
) -> ServerHandle:
    """Serve a Hugging Face folder in another process; returns when it answers. Port 0: a free one.

    `thinking` is the mode of chats that name none. UserError when it does not come up, with the server's own last line.
    """
    command = [sys.executable, "-m", "nemo_cascade.rollout.server", "--model", str(folder), "--port", str(port)]
    command += ["--max-batch", str(max_batch), *([] if thinking else ["--no-thinking"])]
    log = tempfile.TemporaryFile("w+")
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    path = os.pathsep.join([str(PACKAGE.parent), *inherited])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    )
    handle = ServerHandle("", process, log)
    line = _first_line(process, deadline_s)
    if not line:
        process.kill()
        log.seek(0)
        said = [text.strip() for text in log.read().splitlines() if text.strip()]
        handle.close()
        reason = said[-1] if said else "it said nothing"
        what = "ended" if line == "" else f"did not come up within {deadline_s:.0f} s"
        raise UserError(f"server for {folder}: {what}: {reason}")
    handle.url = json.loads(line)["url"]
    return handle


def _first_line(process: subprocess.Popen[str], deadline_s: float) -> str | None:
    """The line with the address; "" when the process ends first, None when the deadline passes first."""
    assert process.stdout is not None
    until = time.monotonic() + deadline_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            if selector.select(timeout=min(left, 0.5)):
                return process.stdout.readline().strip()
    return None
