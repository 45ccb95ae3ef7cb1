"""Threads for calls that may never come back: environments and rewards of the user's own.

A thread cannot be killed. One whose call is overdue is left behind: another takes its place, and as a daemon it does
not hold up the end of the process, which `concurrent.futures` would.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
LOOK_S = 1.0  # how often a waiting caller looks for calls that are overdue


class CallLost(Exception):
    """A call did not come back within its deadline; its thread is left behind."""


class Call(Generic[T]):
    """One call: waiting, running since `began`, or finished with a value or an exception."""

    def __init__(self, run: Callable[[], T]) -> None:
        self.run = run
        self.finished = threading.Event()
        self.began: float | None = None
        self.given_up = False
        self.value: T | None = None
        self.error: BaseException | None = None

    def overdue(self, deadline_s: float) -> bool:
        """It runs, and has done so for longer than the deadline."""
        return self.began is not None and not self.finished.is_set() and time.monotonic() - self.began > deadline_s


class Workers:
    """`count` threads that run calls in the order they were submitted. Deadlines count from the moment a call begins.

    When twice `count` calls in a row were given up and none came back between them, whatever the calls talk to is gone:
    those still waiting are given up as well, instead of one deadline after the other.
    """

    def __init__(self, count: int, name: str) -> None:
        self.count, self.name = max(1, count), name
        self.lost_in_a_row = 0
        self._waiting: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._running: set[Call] = set()
        self._lock = threading.Lock()
        self._started = 0

    def submit(self, run: Callable[[], T]) -> Call[T]:
        """Let a thread make the call; `result` brings what it returned."""
        if self._started < self.count:
            self._start_thread()
        call = Call(run)
        self._waiting.put(call)
        return call

    def result(self, call: Call[T], deadline_s: float) -> T:
        """What the call returned or raised; CallLost when it was given up."""
        while not call.finished.is_set():
            self._leave_overdue(deadline_s)
            if call.given_up:
                raise CallLost(f"given up after {deadline_s:g} s")
            call.finished.wait(min(LOOK_S, max(deadline_s / 4, 0.001)))
        if call.error is not None:
            raise call.error
        return call.value  # type: ignore[return-value]  # None only where T allows it

    def close(self) -> None:
        """Let idle threads end; those that hang are left behind."""
        for _ in range(self._started):
            self._waiting.put(None)

    def _leave_overdue(self, deadline_s: float) -> None:
        """Give every overdue call up and replace its thread; with too many in a row, those that wait too."""
        with self._lock:
            late = [call for call in self._running if call.overdue(deadline_s)]
            self.lost_in_a_row += len(late)
            if late and self.lost_in_a_row >= 2 * self.count:
                late += self._emptied()
            for call in late:
                call.given_up = True
            hung = self._running.intersection(late)
            self._running -= hung
        for _ in hung:
            self._start_thread()

    def _emptied(self) -> list[Call]:
        """The calls that no thread has taken, taken from the queue."""
        calls: list[Call] = []
        while True:
            try:
                call = self._waiting.get_nowait()
            except queue.Empty:
                return calls
            if call is not None:
                calls.append(call)

    def _start_thread(self) -> None:
        self._started += 1
        threading.Thread(target=self._work, name=f"{self.name}-{self._started}", daemon=True).start()

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            with self._lock:
                call.began = time.monotonic()
                self._running.add(call)
            try:
                call.value = call.run()
            except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
                call.error = error
            with self._lock:
                if call.given_up:  # another thread has its place by now
                    return
                self._running.discard(call)
                self.lost_in_a_row = 0
                call.finished.set()
