"""Where the seconds of a step go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the wall-clock seconds of named parts of a step. On a GPU it waits for the kernels of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Time the block and add it to `part`."""
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        """`seconds/training/<part>` of every part: what the record's `seconds/training` is made of."""
        return {f"seconds/training/{part}": seconds for part, seconds in self.seconds.items()}
