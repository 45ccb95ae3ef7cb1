"""Start the Learner's ranks on this machine, and make sure that none outlives what started it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nemo_cascade.cascade.lock import born
from nemo_cascade.cascade.process import STARTED_BY
from nemo_cascade.config.schema import HardwareConfig
from nemo_cascade.types import UserError

PR_SET_PDEATHSIG = 1
RENDEZVOUS = "NEMO_CASCADE_RENDEZVOUS"


def die_with_parent() -> None:
    """Ask the kernel to end this process with its parent, so that a killed run leaves no rank behind (Linux only).

    A parent that died before the kernel was asked is found by its id, which it passed down as STARTED_BY.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = os.environ.get(STARTED_BY)
        if parent is not None and born(int(parent)) == 0:
            sys.exit(128 + signal.SIGKILL)


def start_ranks(folder: Path, hardware: HardwareConfig) -> int:
    """Start one process per rank on this machine and wait; the first failure ends them all.

    Ranks meet in a file and not at a port: nothing can be in use, and two cascades can run side by side.
    """
    if hardware.nodes > 1:
        raise UserError(
            f"hardware {hardware.name}: {hardware.nodes} nodes; start them with torchrun or Slurm (RANK is not set)"
        )
    for left_behind in folder.glob(".rendezvous-*"):  # by a run that was killed
        left_behind.unlink(missing_ok=True)
    rendezvous = folder / f".rendezvous-{os.getpid()}"
    world = hardware.ranks_per_node
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "nemo_cascade.launch", str(folder)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                RENDEZVOUS: str(rendezvous), STARTED_BY: str(os.getpid()),
                "OMP_NUM_THREADS": str(hardware.threads_per_rank),
            },
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        return wait_for(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        rendezvous.unlink(missing_ok=True)


def wait_for(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The first non-zero exit status, or 0 when all ranks are done.

    A rank that hangs is ended by the others: their next exchange with it has a deadline, and the first failure ends
    all.
    """
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed if failed > 0 else 128 - failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
