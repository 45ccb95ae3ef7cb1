"""The bar of the running stage on the runner's own terminal.

A stage writes to its log and never to a terminal, so that nothing it says is lost; what moves on the screen is drawn
here, from the metrics that the stage writes. Without a terminal the stage's own plain lines are passed on instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from nemo_cascade.observe.progress import ProgressLine, is_plain_line


class Follower:
    """The whole lines of a growing file; one that was replaced (a resumed stage rewrites its metrics) is read anew."""

    def __init__(self, path: Path, position: int = 0) -> None:
        self.path, self.position = path, position
        self.inode: int | None = None

    def new_lines(self) -> list[str]:
        """The whole lines written since the last call."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if self.inode not in (None, inode):
                    self.position = 0
                self.inode = inode
                file.seek(self.position)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self.position += len(whole) + len(newline)
        return whole.decode("utf-8", errors="replace").splitlines() if newline else []


class StageBar:
    """What the runner shows of one stage: its log's lines, and a bar below them where `terminal` is one.

    A context manager. `hear` takes a line of the log, `look` draws the steps that are new in `metrics`.
    """

    def __init__(
        self, stage: str, num_steps: int, metrics: Path, say: Callable[[str], None], terminal: TextIO | None
    ) -> None:
        self.say = say
        self.steps = Follower(metrics)
        on_terminal = terminal is not None and terminal.isatty()
        self.progress = ProgressLine(stage, num_steps, terminal) if on_terminal else None

    def __enter__(self) -> StageBar:
        if self.progress is not None:
            self.progress.start(0)
            self.look()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.look()
            self.progress.stop()

    def hear(self, line: str) -> None:
        """Pass a line on; the stage's own progress lines only where no bar stands for them."""
        if self.progress is None or not is_plain_line(line):
            self.say(line)

    def look(self) -> None:
        """Draw what happened since the last look."""
        if self.progress is None:
            return
        for line in self.steps.new_lines():
            row = json.loads(line)
            numbers = {name: value for name, value in row.items() if value is not None}
            self.progress.update(int(row["step"]), numbers.get("seconds/total", 0.0), numbers)
