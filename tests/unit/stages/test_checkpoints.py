"""A stage's checkpoints on disk, written by the real writer in this thread and in another."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from nemo_cascade.learner import checkpoint
from nemo_cascade.learner.training_state import TrainingState
from nemo_cascade.stages.checkpoints import Checkpoints
from tests.waiting import there, wait_until

pytestmark = pytest.mark.usefixtures("ranks")


class Counter:
    """A policy of one tensor; each step adds 1 to every element."""

    def __init__(self, asynchronous: bool, size: int = 10) -> None:
        self.weight = torch.zeros(size)
        self.writer = checkpoint.CheckpointWriter(asynchronous)
        self.finish_saving = self.writer.finish

    def state(self) -> TrainingState:
        state = TrainingState()
        state.add("weight", ShardedTensor.from_rank_offsets("weight", self.weight), self.weight)
        return state

    def save(self, folder: str, step: int) -> None:
        self.writer.save(Path(folder), self.state(), {"step": step, "model": {}})

    def load(self, folder: str) -> int:
        return checkpoint.load(Path(folder), self.state(), {})["step"]

    def export(self, folder: str) -> str:
        raise AssertionError("no step is kept")


def checkpoints(folder: Path, num_steps: int) -> Checkpoints:
    return Checkpoints(folder, folder / "weights", 2, frozenset(), num_steps, first_rank=True)


def complete(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_complete_checkpoint_is_always_there_and_the_last_one_stays(tmp_path: Path, asynchronous: bool):
    learner, stage = Counter(asynchronous), checkpoints(tmp_path, 7)
    for step in range(1, 8):
        learner.weight += 1.0
        stage.after(step, learner)
        if step == 2:
            learner.finish_saving()
        if step > 2:
            newest = complete(tmp_path)[-1]
            saved = step if step == 7 else step - step % 2
            assert newest in {f"step_{saved:06d}", f"step_{saved - 2:06d}" if asynchronous and step < 7 else ""}
    assert complete(tmp_path) == ["step_000007"]
    again = Counter(asynchronous)
    assert checkpoints(tmp_path, 7).resume(again) == 7
    assert again.weight.eq(7.0).all()


FOREVER = """
import itertools, sys
from pathlib import Path
from nemo_cascade.learner import parallel
from tests.unit.stages.test_checkpoints import Counter, checkpoints
parallel.start()
learner, stage = Counter(True, 4_000_000), checkpoints(Path(sys.argv[1]), 0)
for step in itertools.count(stage.resume(learner) + 1):
    learner.weight += 1.0
    stage.after(step, learner)
"""


def writing_again(run: subprocess.Popen[bytes], folder: Path, resumed: int) -> bool:
    """A checkpoint after the one it went on from is complete, and another is being written."""
    assert run.poll() is None
    newest = max((int(name.removeprefix("step_")) for name in complete(folder)), default=0)
    return newest > resumed and there(folder, ".step_*.partial/*.distcp")


TRIES = 24  # on a busy machine many a write is over by the time of the kill


@pytest.mark.slow
def test_kill_9_while_a_checkpoint_is_written_in_the_background(tmp_path: Path):
    """Whatever the moment, the newest checkpoint is whole and of one step; three times in the middle of a write."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    caught, resumed = 0, 0
    for _ in range(TRIES):
        run = subprocess.Popen([sys.executable, "-W", "ignore", "-c", FOREVER, str(tmp_path)], env=environment)
        try:
            wait_until(partial(writing_again, run, tmp_path, resumed), "a second write", 0.001)
        finally:
            run.kill()
            run.wait()
        caught += bool(list(tmp_path.glob(".step_*.partial")))
        learner = Counter(False, 4_000_000)
        before, resumed = resumed, checkpoints(tmp_path, 0).resume(learner)
        assert resumed > before and learner.weight.eq(float(resumed)).all()
        assert not list(tmp_path.glob(".step_*"))
        if caught == 3:
            return
    raise AssertionError(f"only {caught} of {TRIES} kills came in the middle of a write")
