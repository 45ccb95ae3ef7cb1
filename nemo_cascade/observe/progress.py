"""The progress line: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY_S = 5.0
WINDOW = 10  # steps over which speed and time left are averaged
PLAIN_LINE = re.compile(r"\S.{19,} +\d+/\d+  .*\bleft")


def is_plain_line(line: str) -> bool:
    """Whether a line of a log is one of those that stand for the bar."""
    return PLAIN_LINE.fullmatch(line) is not None


class ProgressLine:
    """Stage, step, reward (or loss), tokens per second and time left."""

    def __init__(self, stage: str, num_steps: int, stream: TextIO | None = None) -> None:
        self.stage = stage
        self.num_steps = num_steps
        self.stream = stream or sys.stderr
        self.recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # (seconds, tokens) of a step
        self.last_line = float("-inf")
        self.bar: Progress | None = None

    def start(self, step: int) -> None:
        """Show the bar where there is a terminal."""
        if not self.stream.isatty():
            return
        columns = (TextColumn("{task.description:<20}"), BarColumn(bar_width=None), TextColumn("{task.fields[text]}"))
        self.bar = Progress(*columns, console=Console(file=self.stream), expand=True, transient=False)
        self.bar.start()
        self.task = self.bar.add_task(
            self.stage, total=self.num_steps, completed=step, text=f"{step:>4}/{self.num_steps}  starting"
        )

    def update(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Show that `step` (counted from 0) is done."""
        self.recent.append((seconds, metrics.get("tokens", 0.0)))
        text = self.describe(step + 1, metrics)
        if self.bar is not None:
            self.bar.update(self.task, completed=step + 1, text=text)
            return
        now = time.monotonic()
        if now - self.last_line >= PLAIN_EVERY_S or step + 1 == self.num_steps:
            self.last_line = now
            self.stream.write(f"{self.stage:<20} {text}\n")
            self.stream.flush()

    def describe(self, done: int, metrics: Mapping[str, float]) -> str:
        """The text beside the bar after `done` steps."""
        seconds = sum(took for took, _ in self.recent)
        tokens = sum(count for _, count in self.recent)
        parts = [f"{done:>4}/{self.num_steps}"]
        parts += [f"{name} {metrics[name]:.3f}" for name in ("reward", "loss") if name in metrics][:1]
        if seconds > 0 and tokens > 0:
            parts.append(f"{tokens / seconds:,.0f} tok/s")
        parts.append(f"{clock(seconds / len(self.recent) * (self.num_steps - done))} left")
        return "  ".join(parts)

    def stop(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 9s, 2m05s, 3h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
