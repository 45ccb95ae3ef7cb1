"""`kill -9` at any moment costs time and nothing else: the same command goes on and ends with the same bits.

The runner dies first, alone or with the whole group of its stage; ranks, judge server and sandboxes must follow by
themselves.
"""

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

pytestmark = pytest.mark.slow
SEED = 20260319  # of the moments
MARK = "NEMO_CASCADE_TEST_RUN"
DEADLINE_S = 300


def wait_until(true: Callable[[], bool], what: str, pause: float = 0.002) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(pause)


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
        self.mark = folder.name

    def kill_when(
        self,
        true: Callable[[], bool],
        what: str,
        delay: float,
        stage_too: bool,
        least: int = 3,
        words: tuple[str, ...] = (),
    ) -> None:
        """Start the run, wait for the moment, kill, and see that nothing survives; `least` processes must be there."""
        runner = subprocess.Popen(
            self.cascade.command("--until", self.name, *words), cwd=ROOT, env=environment(**{MARK: self.mark}),
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_until(lambda: true() or runner.poll() is not None, what)
        assert runner.poll() is None, f"the run was over before {what}"
        time.sleep(delay)
        assert runner.poll() is None, f"the run was over {delay:.2f} s after {what}"
        below = descendants(runner.pid)
        holder = json.loads((self.stage / "lock.json").read_text())["pid"]
        os.killpg(runner.pid, signal.SIGKILL)
        if stage_too:
            os.killpg(holder, signal.SIGKILL)
        runner.wait()
        assert len(below) >= least, below  # the stage and its two ranks
        survivors = lambda: [pid for pid, born in below.items() if lives(pid, born)] + marked(self.mark)  # noqa: E731
        wait_until(lambda: not survivors(), "the end of every process of the killed run", 0.05)

    def kill_while_measured(self, delay: float) -> None:
        """Kill the runner in the evaluation after the export. It is short, and on a busy machine it may be over before
        the signal arrives: then the stage begins anew and is killed earlier in it.
        """
        for wait in (delay, delay / 4, 0.0, 0.0):
            self.kill_when(self.written("hf/config.json"), "the export", wait, False)
            if not self.written("record.json")():
                return
            shutil.rmtree(self.stage)
        pytest.fail("the stage was recorded before every kill")

    def finish(self) -> list[str]:
        """Run the same command again; returns what it said."""
        done = self.cascade.run("--until", self.name)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    def handed_over(self) -> bool:
        """The lock names the stage's process and not its runner's any more."""
        lock = self.stage / "lock.json"
        content = json.loads(lock.read_text() or "{}") if lock.exists() else {}
        return bool(content) and content["pid"] != content["runner_pid"]

    def written(self, pattern: str) -> Callable[[], bool]:
        return lambda: any(self.stage.glob(pattern))

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
    victim.kill_when(victim.written("checkpoints/.step_000002.partial/*"), "the second checkpoint", 0.0, True)
    said = victim.finish()
    assert any("on from step 1" in line for line in said), said
    assert victim.cascade.outcome("rl") == uninterrupted.outcome("rl")
    assert not list(victim.stage.glob("checkpoints/.*"))


def test_killed_while_saving_in_the_background(victim, uninterrupted):
    """Training goes on in the first run; the second, which saves in the foreground, ends with the same bits."""
    saving = victim.written("checkpoints/.step_000002.partial/*")
    victim.kill_when(saving, "the second checkpoint", 0.0, True, words=("hardware.async_save=true",))
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
    victim.kill_when(victim.handed_over, "the stage's process", delay, False, least=1)
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
    victim.kill_when(victim.written("checkpoints/.step_000002.partial/*"), "the second checkpoint", 0.0, True)
    assert not victim.written("record.json")()
    victim.kill_while_measured(random.Random(f"{SEED}/{name}").uniform(0.0, 0.3))
    assert any("on from step 2" in line for line in victim.finish())
    assert victim.cascade.outcome(name) == uninterrupted.outcome(name)
    assert not list(victim.stage.glob("checkpoints/.*"))
