"""Processes that an attack left behind: found by their ancestor, which no process can deny."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from nemo_cascade.reward import bubblewrap

SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 10.0  # for the kernel to end a namespace on a busy machine


def adopt_orphans(adopt: bool) -> None:
    """From now on a process whose parent ended becomes a child of this one, and not of the machine's first process."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def family() -> dict[int, str]:
    """Living descendants of this process and what they are called."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            head, _, tail = (place / "stat").read_text(errors="replace").rpartition(")")
        except OSError:  # it has just ended
            continue
        state, parent = tail.split()[:2]
        children.setdefault(int(parent), []).append(int(place.name))
        if state != "Z":
            names[int(place.name)] = head.partition("(")[2]
    found: dict[int, str] = {}
    pending = list(children.get(os.getpid(), []))
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        found |= {pid: names[pid]} if pid in names else {}
    return found


def _of_servers() -> set[int]:
    """The processes of sandboxes that wait started: bubblewrap, its init, the fork server."""
    return {pid for pid in family() if bubblewrap.RUNNING & set(_ancestry(pid))}


def _ancestry(pid: int) -> list[int]:
    """A process and its ancestors."""
    found = []
    while pid > 1:
        found.append(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


class Watch:
    """What runs now is not the attack's; what becomes an orphan until `left` is adopted."""

    def __init__(self) -> None:
        adopt_orphans(True)
        self.before = set(family())

    def left(self) -> list[str]:
        """`name (pid)` of what the attack left running; sandboxes that wait started for the next one are not meant."""
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            found = family()
            left = {pid: name for pid, name in found.items() if pid not in self.before}
            if left:
                waiting = _of_servers()
                left = {pid: name for pid, name in left.items() if pid not in waiting}
            if not left or time.monotonic() > deadline:
                adopt_orphans(False)
                return [f"{name} ({pid})" for pid, name in sorted(left.items())]
            time.sleep(0.02)
