"""How a conversion goes: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nemo_cascade.observe.progress import PLAIN_EVERY_S, clock


class TransferLine:
    """Phase, tensors, GB/s and time left of a transfer whose tensors and bytes are known."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.bar: Progress | None = None

    def begin(self, what: str, tensors: int, size: int) -> None:
        """A phase of so many tensors and bytes starts."""
        self.close()
        self.what, self.tensors, self.size = what, tensors, size
        self.done = self.sent = 0
        self.started = self.last_line = time.monotonic()
        if self.stream.isatty():
            columns = (
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, console=Console(file=self.stream), transient=False)
            self.bar.start()
            self.task = self.bar.add_task(what, total=max(size, 1), text="")

    def advance(self, size: int) -> None:
        """One more tensor of `size` bytes is through."""
        self.done += 1
        self.sent += size
        now = time.monotonic()
        last = self.done == self.tensors
        if self.bar is not None:
            self.bar.update(self.task, completed=self.sent, text=self.describe(now - self.started))
            if last:
                self.close()
        elif last or now - self.last_line >= PLAIN_EVERY_S:
            self.last_line = now
            self.stream.write(f"{self.what:<10} {self.describe(now - self.started)}\n")
            self.stream.flush()

    def describe(self, seconds: float) -> str:
        """The text beside the bar after so many seconds; the speed is the mean over the phase."""
        text = f"{self.done:,}/{self.tensors:,} tensors  {amount(self.sent)} of {amount(self.size)}"
        if seconds <= 0 or not self.sent:
            return text
        speed = self.sent / seconds
        return f"{text}  {speed / 1e9:.2f} GB/s  {clock((self.size - self.sent) / speed)} left"

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def amount(size: int) -> str:
    """Bytes as a person reads them: 2.3 MB, 63.2 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
