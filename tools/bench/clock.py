"""How the benchmarks take time: sides in turn, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Seconds = Mapping[str, Sequence[float]]
"""Name of a side, or of a part of it -> its seconds in every round."""


def now(device: torch.device) -> float:
    """Seconds so far: of this process's processor time on a CPU (one thread computes, and a busy machine disturbs it
    less than the wall clock), of the wall clock on a GPU once its kernels are done.
    """
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turn(sides: Sequence[Callable[[], Mapping[str, float]]], repeats: int, warmup: int) -> dict[str, list[float]]:
    """What the sides say about themselves, `repeats` rounds after `warmup`; they take turns inside a round."""
    seconds: dict[str, list[float]] = {}
    for number in range(warmup + repeats):
        for side in sides:
            told = side()
            if number >= warmup:
                for name, value in told.items():
                    seconds.setdefault(name, []).append(value)
    return seconds


def median_ratio(seconds: Seconds, over: str, under: str) -> float:
    """The median of the first over the median of the second."""
    return statistics.median(seconds[over]) / statistics.median(seconds[under])
