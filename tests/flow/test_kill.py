"""`kill -9` at any moment costs time and nothing else: the same command goes on and ends with the same bits.

The runner dies first, alone or with the whole group of its stage; ranks, judge server and sandboxes must follow by
themselves.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flow.real_cascade import ROOT, STAGES, Cascade, environment
from tests.waiting import there, wait_until

pytestmark = pytest.mark.slow
SEED = 20260319  # of the moments
MARK = "NEMO_CASCADE_TEST_RUN"
TRIES = 5  # for a kill that came too late


def descendants(root: int) -> dict[int, int]:
    """Process id -> start time of everything below `root`, by the kernel's table: sandboxes clear their environment."""
    table: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            table[int(entry.name)] = (int(fields[1]), int(fields[19]))
    found: dict[int, int] = {}
    waiting = [root]
    while waiting:
        parent = waiting.pop()
        for pid, (above, started) in table.items():
            if above == parent and pid not in found:
                found[pid] = started
                waiting.append(pid)
    return found


def lives(pid: int, started: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[19]) == started and fields[0] not in ("Z", "X")


def marked(mark: str) -> list[int]:
    """Processes that inherited the run's mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found += [int(entry.name)] if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes() else []
            except OSError:
                continue
    return found


class Victim:
    """A cascade killed while the stage `name` is at a chosen place; the stages before that one are done already."""

    def __init__(self, folder: Path, finished: Cascade, name: str) -> None:
        self.cascade, self.name = Cascade(folder), name
        for before in list(STAGES)[: list(STAGES).index(name)]:
            shutil.copytree(finished.stage(before).path, self.cascade.folder / finished.stage(before).path.name)
        self.stage = self.cascade.folder / finished.stage(name).path.name
        self.mark = str(folder)

    def kill_when(
        self,
        true: Callable[[], bool],
        what: str,
        delay: float = 0.0,
        stage_too: bool = False,
        still: Callable[[], bool] | None = None,
        least: int = 3,
        words: tuple[str, ...] = (),
    ) -> None:
        """Start the run, wait for the moment, kill, and see that nothing survives; `least` processes must be there.

        On a busy machine the moment may be over before the signal arrives: where `still` is false of what the dead run
        left (without `still`: where it had recorded the stage), the folder is put back and the kill comes sooner.
        """
        before = self.stage.with_name(f"{self.stage.name}.before")
        if self.stage.exists():
            shutil.copytree(self.stage, before)
        for attempt in range(TRIES):
            in_time = self._kill(true, what, delay / 4**attempt, stage_too, least, words)
            if in_time and not self.written("record.json")() and (still is None or still()):
                shutil.rmtree(before, ignore_errors=True)
                return
            shutil.rmtree(self.stage)
            if before.exists():
                shutil.copytree(before, self.stage)
        pytest.fail(f"{TRIES} runs were past {what} before they were killed")

    def _kill(
        self, true: Callable[[], bool], what: str, delay: float, stage_too: bool, least: int, words: tuple[str, ...]
    ) -> bool:
        """One run; False where it was over before the signals were sent."""
        runner = subprocess.Popen(
            self.cascade.command("--until", self.name, *words), cwd=ROOT, env=environment(**{MARK: self.mark}),
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        below: dict[int, int] = {}
        looked = 0.0

        def reached() -> bool:
            nonlocal looked
            if not self.holder(runner.pid):
                return False
            if len(below) < least and time.monotonic() > looked + 0.1:  # before the moment, which may be short
                below.update(descendants(runner.pid))
                looked = time.monotonic()
            return len(below) >= least and true()  # the stage and its two ranks

        wait_until(lambda: runner.poll() is not None or reached(), what)
        if delay:
            time.sleep(delay)
            below.update(descendants(runner.pid))
        holder = self.holder(runner.pid)
        if runner.poll() is not None:
            assert runner.returncode == 0, f"the run failed before {what}"
        else:
            os.killpg(runner.pid, signal.SIGKILL)
            if stage_too and holder:
                with contextlib.suppress(ProcessLookupError):  # it has followed its runner already
                    os.killpg(holder, signal.SIGKILL)
        over = runner.wait() == 0
        survivors = lambda: [pid for pid, born in below.items() if lives(pid, born)] + marked(self.mark)  # noqa: E731
        wait_until(lambda: not survivors(), "the end of every process of the killed run", 0.05)
        return bool(holder) and not over

    def kill_while_saving(self, words: tuple[str, ...] = ()) -> None:
        """Kill stage and runner while the second checkpoint is half written."""
        half = self.written("checkpoints/.step_000002.partial/*")
        self.kill_when(half, "the second checkpoint", stage_too=True, still=half, words=words)

    def kill_while_measured(self, delay: float) -> None:
        """Kill the runner in the evaluation after the export."""
        self.kill_when(self.written("hf/config.json"), "the export", delay)

    def finish(self) -> list[str]:
        """Run the same command again; returns what it said."""
        done = self.cascade.run("--until", self.name)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    def holder(self, runner: int) -> int:
        """The stage's process, once the lock names it and not this runner any more; 0 before that and after its end."""
        lock = self.stage / "lock.json"
        try:
            content = json.loads(lock.read_text() or "{}")
        except FileNotFoundError:
            return 0
        return content["pid"] if content and content["runner_pid"] == runner != content["pid"] else 0

    def written(self, pattern: str) -> Callable[[], bool]:
        return lambda: there(self.stage, pattern)

    def lines(self, count: int) -> Callable[[], bool]:
        path = self.stage / "metrics.jsonl"
        return lambda: path.exists() and len(path.read_text().splitlines()) >= count


@pytest.fixture
def victim(tmp_path: Path, uninterrupted: Cascade) -> Victim:
    return Victim(tmp_path, uninterrupted, "rl")


@pytest.mark.parametrize("stage_too", [False, True])
def test_killed_while_sampling(victim, uninterrupted, stage_too):
    delay = random.Random(f"{SEED}/{stage_too}").uniform(0.1, 0.6)
    victim.kill_when(victim.written("checkpoints/step_000001/*"), "the first checkpoint", delay, stage_too)
    assert any("on from step" in line for line in victim.finish())
    assert victim.cascade.outcome("rl") == uninterrupted.outcome("rl")


def test_killed_while_saving_a_checkpoint(victim, uninterrupted):
    victim.kill_while_saving()
    said = victim.finish()
    assert any("on from step 1" in line for line in said), said
    assert victim.cascade.outcome("rl") == uninterrupted.outcome("rl")
    assert not list(victim.stage.glob("checkpoints/.*"))


def test_killed_while_saving_in_the_background(victim, uninterrupted):
    """Training goes on in the first run; the second, which saves in the foreground, ends with the same bits."""
    victim.kill_while_saving(words=("hardware.async_save=true",))
    said = victim.finish()
    assert any("on from step 1" in line for line in said), said
    assert victim.cascade.outcome("rl") == uninterrupted.outcome("rl")
    assert not list(victim.stage.glob("checkpoints/.*"))


def test_killed_while_evaluating(victim, uninterrupted):
    victim.kill_while_measured(random.Random(SEED).uniform(0.0, 0.3))
    assert any("on from step 3" in line for line in victim.finish())
    assert victim.cascade.outcome("rl") == uninterrupted.outcome("rl")


@pytest.mark.parametrize("delay", [0.02, 0.5])
def test_killed_while_starting(victim, uninterrupted, delay):
    """Before the stage, or its ranks, could ask the kernel to die with their parent."""
    victim.kill_when(lambda: True, "the stage's process", delay, least=1)
    victim.finish()
    assert victim.cascade.outcome("rl") == uninterrupted.outcome("rl")


def test_killed_again_and_again(victim, uninterrupted):
    draw = random.Random(SEED + 1)
    for step in (1, 2):
        victim.kill_when(victim.lines(step), f"step {step}", draw.uniform(0.0, 0.5), draw.random() < 0.5)
    victim.finish()
    assert victim.cascade.outcome("rl") == uninterrupted.outcome("rl")
    assert victim.cascade.run("--until", "rl").stdout.count(": done (") == 2


@pytest.mark.parametrize("name", ["sft", "mopd"])
def test_the_other_kinds_of_stage_are_killed_while_they_save_and_while_they_are_measured(
    tmp_path, uninterrupted, name
):
    """Two steps each: killed in the second checkpoint with its runner, then after the export without it."""
    victim = Victim(tmp_path, uninterrupted, name)
    victim.kill_while_saving()
    assert not victim.written("record.json")()
    victim.kill_while_measured(random.Random(f"{SEED}/{name}").uniform(0.0, 0.3))
    assert any("on from step 2" in line for line in victim.finish())
    assert victim.cascade.outcome(name) == uninterrupted.outcome(name)
    assert not list(victim.stage.glob("checkpoints/.*"))
