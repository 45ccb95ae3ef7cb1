"""Where the seconds of a step go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds of named parts of a step: on a CPU wall-clock time, on a card the time between two events.

    The host does not wait for the card at the end of a part: it may be far ahead by then, and that is what keeps the
    card busy.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Time the block and add it to `part`."""
        if not torch.cuda.is_available():
            begin = time.perf_counter()
            yield
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._events.append((part, before, after))

    def metrics(self) -> dict[str, float]:
        """`seconds/training/<part>` of every part: what the record's `seconds/training` is made of.

        Waits for the card to end the last.
        """
        for part, before, after in self._events:
            after.synchronize()
            self.seconds[part] = self.seconds.get(part, 0.0) + before.elapsed_time(after) / 1000.0
        self._events = []
        return {f"seconds/training/{part}": seconds for part, seconds in self.seconds.items()}
