"""Calls that never come back: others go on, whoever waits is told, and the process can end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from nemo_cascade.rollout.workers import CallLost, Workers

ROOT = Path(__file__).resolve().parents[3]
ENDLESS = """
from nemo_cascade.domains import SingleTurn
from nemo_cascade.rollout.scoring import Scorer
from nemo_cascade.types import Invalid, Message, Rollout, Scored, Task, Transcript

class Endless(SingleTurn):
    name = "endless"

    def score(self, task, transcript):
        while task.id == "loop":
            pass
        return Scored(1.0)

def rollout(name):
    transcript = Transcript((Message("assistant", "x"),))
    from nemo_cascade.rollout.conversation import UNSCORED
    return Rollout(Task(name, "endless", (Message("user", "?"),)), 0, (1,), (1,), (0.0,), (0,), transcript, UNSCORED)

scorer = Scorer({"endless": Endless()}, workers=1, deadline_s=2.0)
for group, name in enumerate(["loop", "fine"]):
    scorer.add(group, rollout(name), 1)
assert scorer.result(0)[0].outcome == Invalid("no verdict from domain endless after 2 s")
assert scorer.result(1)[0].outcome == Scored(1.0)
scorer.close()
"""


def test_values_and_errors_come_back_in_any_order() -> None:
    workers = Workers(2, "test")
    calls = [workers.submit(partial(divmod, 7, number)) for number in (2, 0, 3)]
    assert workers.result(calls[2], 30.0) == (2, 1)
    assert workers.result(calls[0], 30.0) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        workers.result(calls[1], 30.0)
    workers.close()


def test_the_deadline_of_a_call_starts_when_the_call_does() -> None:
    """Twelve calls of 0.25 s on one thread, each within 2 s, though the last one ends after 3 s."""
    workers = Workers(1, "test")
    calls = [workers.submit(partial(time.sleep, 0.25)) for _ in range(12)]
    assert [workers.result(call, 2.0) for call in calls] == [None] * 12
    workers.close()


def test_a_thread_that_hangs_is_replaced() -> None:
    never = threading.Event()
    workers = Workers(1, "test")
    stuck, fine = workers.submit(never.wait), workers.submit(partial(divmod, 7, 2))
    with pytest.raises(CallLost):
        workers.result(stuck, 0.2)
    assert workers.result(fine, 30.0) == (3, 1)
    never.set()
    workers.close()


def test_calls_to_what_is_gone_are_not_waited_for_one_by_one() -> None:
    """Forty calls that hang, two threads: two deadlines, not twenty."""
    never = threading.Event()
    workers = Workers(2, "test")
    calls = [workers.submit(never.wait) for _ in range(40)]
    started = time.monotonic()
    for call in calls:
        with pytest.raises(CallLost):
            workers.result(call, 0.5)
    assert time.monotonic() - started < 8.0
    assert sum(call.began is not None for call in calls) <= 6
    never.set()
    workers.close()


def test_an_endless_loop_in_a_reward_does_not_hold_up_the_end_of_the_process() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ENDLESS], env=env, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
