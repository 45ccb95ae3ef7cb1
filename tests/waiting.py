"""Waiting for what other processes do, on a machine of any speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 300.0


def wait_until(true: Callable[[], object], what: str, pause: float = 0.002, deadline_s: float = DEADLINE_S) -> None:
    """Look every `pause` seconds until `true()`; fails with `what` when that takes too long."""
    deadline = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(pause)


def there(folder: Path, pattern: str) -> bool:
    """Whether a file of this pattern exists now; a folder that gets another name while one looks is none."""
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:
        return False
