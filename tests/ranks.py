"""Several ranks of one script, each a process of its own: what tests of parallel layouts start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_S = 570.0
"""For all ranks together: below pytest's limit for a test, so that a failure shows what they printed."""
GRACE_S = 20.0
"""For the other ranks once one has failed: they notice, and say what they were waiting for."""


@contextmanager
def running(script: str | Path, *arguments: str, ranks: int = 2, deadline_s: float = DEADLINE_S) -> Iterator[None]:
    """The ranks of `script` beside what the body does; at its end all of them have ended well.

    Each is called with `arguments` and finds its number in RANK, theirs in WORLD_SIZE. They meet by a file that the
    script names, so that no port is taken. When one fails, the error shows what every rank printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / str(rank) for rank in range(ranks)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, file in enumerate(printed):
                processes.append(_start(script, arguments, rank, ranks, file))
            yield
            codes = _ended(processes, deadline_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said = "".join(f"\n--- rank {rank}\n{file.read_text()[-3000:]}" for rank, file in enumerate(printed))
        assert codes == [0] * ranks, f"exit codes {codes} (None: still running){said}"


def run(script: str | Path, *arguments: str, ranks: int = 2, deadline_s: float = DEADLINE_S) -> None:
    """Start the ranks of `script` and see that all end well."""
    with running(script, *arguments, ranks=ranks, deadline_s=deadline_s):
        pass


def _start(
    script: str | Path, arguments: tuple[str, ...], rank: int, ranks: int, printed: Path
) -> subprocess.Popen[bytes]:
    """One rank; what it prints goes to a file, since a full pipe that nobody reads yet would stop it and the others."""
    environment = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    with printed.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _ended(processes: list[subprocess.Popen[bytes]], deadline_s: float) -> list[int | None]:
    """Exit codes once all have ended, the deadline has passed, or one has failed and the others had time to notice."""
    deadline, failed = time.monotonic() + deadline_s, False
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or time.monotonic() > deadline:
            return codes
        if any(codes) and not failed:
            deadline, failed = min(deadline, time.monotonic() + GRACE_S), True
        time.sleep(0.02)
