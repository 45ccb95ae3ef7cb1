"""One stage as a process of its own: started, listened to, and ended with everything it started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.cascade.bar import Follower, StageBar
from nemo_cascade.cascade.lock import end_group, hand_over
from nemo_cascade.config.paths import PACKAGE, conf_dir, explain_os_error

POLL_SECONDS = 0.1
SILENT_S = 600.0
"""A stage that writes neither log nor metrics for this long is spoken of, and again after each further time."""
STARTED_BY = "NEMO_CASCADE_STARTED_BY"
"""The id of the process that started a stage or a rank; who finds it gone ends too."""
LAST_LINES = 200
REASON = "error: "
ERROR_LINE = re.compile(r"^(?:\[[^\]]*\]:?\s*)?(?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b|error:).*")
ENDED_BY = {signal.SIGKILL: "killed (out of memory, or by hand)", signal.SIGTERM: "asked to end"}


def environment(threads: int) -> dict[str, str]:
    """The environment of a stage's process: this package importable, one compute thread per core it was given.

    On a card mamba-ssm's kernels try many variants at their first call, a minute and more; Triton then keeps on disk
    what it found for those that allow it, which is most but not all of the backward ones.
    """
    checkout = [str(PACKAGE.parent)] if conf_dir().parent == PACKAGE.parent else []
    path = [*checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TORCHDYNAMO_DISABLE": "1",
        "TRITON_CACHE_AUTOTUNING": os.environ.get("TRITON_CACHE_AUTOTUNING", "1"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }


def run_process(module: str, folder: StageFolder, threads: int, bar: StageBar) -> int:
    """Run `python -m MODULE FOLDER` to its end; returns its exit code (negative: the signal that ended it).

    Its output goes to the stage's log, which cannot block it, and from there to `bar`. An interrupt ends the whole
    group. There is no deadline: what a stage waits for has its own (a rank for the others, a sampler, an environment,
    a verdict), and evaluating a large model may be silent for an hour. A silent stage is named, and goes on.
    """
    try:
        log = folder.log.open("ab")
    except OSError as error:
        raise explain_os_error(error, folder.log) from error
    with log, interruptible():
        said = Follower(folder.log, log.tell())
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment(threads), STARTED_BY: str(os.getpid())},
            start_new_session=True,
        )
        try:
            hand_over(folder.lock, process.pid)
            silence = Silence((folder.log, folder.metrics))
            with bar:
                while process.poll() is None:
                    _forward(said, bar)
                    if silence.spoken_of():
                        bar.say(
                            f"{folder.path.name}: waiting for process {process.pid}, which has been silent for "
                            f"{silence.seconds():.0f} s; Ctrl-C ends it, and the same command goes on from its newest "
                            f"checkpoint; its log is {folder.log}"
                        )
                    time.sleep(POLL_SECONDS)
                _forward(said, bar)
        finally:
            end_group(process.pid)
            process.wait()
    return process.returncode


class Silence:
    """For how long none of the files has grown."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.sizes = self._sizes()
        self.since = self.spoken = time.monotonic()

    def seconds(self) -> float:
        """Since the last change that was seen."""
        return time.monotonic() - self.since

    def spoken_of(self) -> bool:
        """Look; true when the silence has lasted SILENT_S, and SILENT_S more since the last time this was true."""
        now, sizes = time.monotonic(), self._sizes()
        if sizes != self.sizes:
            self.sizes, self.since, self.spoken = sizes, now, now
        if now - self.spoken < SILENT_S:
            return False
        self.spoken = now
        return True

    def _sizes(self) -> list[int]:
        return [path.stat().st_size if path.exists() else 0 for path in self.files]


def _forward(said: Follower, bar: StageBar) -> None:
    for line in said.new_lines():
        bar.hear(line)
    bar.look()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a closed terminal or a scheduler's SIGTERM end the run as Ctrl-C does, stage processes included."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {sign: signal.signal(sign, interrupt) for sign in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def last_error(path: Path, returncode: int, start: int = 0) -> str:
    """What went wrong, in one line, from what the log says after byte `start`, where this attempt began.

    A stage's own `error:` line wins over tracebacks: when one rank stops with a reason, the others only complain that
    it is gone. Else the last line that looks like an error, else the last line at all.
    """
    with path.open("rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines()[-LAST_LINES:] if line.strip()]
    reasons = [line.removeprefix(REASON) for line in lines if line.startswith(REASON)]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    said = (reasons[:1] or errors[-1:] or lines[-1:] or ["it wrote nothing"])[0]
    if returncode < 0:
        sign = signal.Signals(-returncode)
        how = ENDED_BY.get(sign, f"ended by {sign.name}")
        return f"{how}; last line: {said}"
    return said
