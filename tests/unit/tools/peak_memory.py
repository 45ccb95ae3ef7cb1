"""Peak resident memory as tests judge it: the least of a few measurements.

What a phase holds it holds each time. What comes on top differs from time to time: pages of libraries that come in
late or come back after the machine needed their place, blocks that the allocator keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SLACK = 24_000_000  # what Python and the allocator take on the way: buffers, headers, modules
TRIES = 3
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Blocks of a megabyte go back to the system when they are freed; by itself glibc begins to keep them."""


def rows_of(bench: str, *words: str) -> dict[str, Any]:
    """What a benchmark of memory prints with --json."""
    command = [sys.executable, "-W", "ignore", "-m", bench, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, timeout=500, check=True
    )
    return json.loads(done.stdout)


def least_above(rows: dict[str, Any], bounds: Mapping[str, float], bench: str, *words: str) -> dict[str, float]:
    """`above` of each row that has a bound: as in `rows`, or less where that is over its bound and a new try is not."""
    above = {name: rows[name]["above"] for name in bounds}
    for _ in range(TRIES - 1):
        if all(above[name] < bound for name, bound in bounds.items()):
            break
        again = rows_of(bench, *words)
        above = {name: min(value, again[name]["above"]) for name, value in above.items()}
    return above
