"""The body of a stage's job: its guard, its exit codes, and what it tells the ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.cascade.plan import make_plan
from nemo_cascade.cascade.runner import Options, Run
from nemo_cascade.config.load import load_cascade
from nemo_cascade.recipes.experiment import unfinished
from nemo_cascade.recipes.stage import DONE, FAILED, MISTAKE, NOT_YET, SlurmTask, first_host, main
from tests.flow.small_cascade import write_cascade

FLOW = Path(__file__).resolve().parents[2] / "flow"
STANDIN = "standin_stage"


@pytest.fixture
def cascade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYTHONPATH", str(FLOW))
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    return str(write_cascade(tmp_path))


def test_a_stage_refuses_until_its_inputs_are_done(cascade: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([cascade, "if_rl", STANDIN]) == NOT_YET
    assert "its input sft is not done" in capfd.readouterr().err
    assert main([cascade, "sft", STANDIN]) == DONE
    assert main([cascade, "if_rl", STANDIN]) == DONE
    assert main([cascade, "if_rl", STANDIN]) == DONE  # done before: nothing runs, nothing fails
    assert "if_rl: done" in capfd.readouterr().out


def test_a_failed_stage_and_a_mistake(
    cascade: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STANDIN_FAIL", "sft")
    assert main([cascade, "sft", STANDIN]) == 1
    assert "the learner diverged" in capfd.readouterr().err
    assert main([cascade, "stf", STANDIN]) == MISTAKE
    assert "did you mean 'sft'?" in capfd.readouterr().err


def test_a_gate_that_says_stop_holds_back_what_is_below(cascade: str, capfd: pytest.CaptureFixture[str]) -> None:
    small = ("stages=[sft, if_rl, math_rl]", "evaluation.report=8", "stages.if_rl.optimizer.lr=0.01")
    gate = "stages.if_rl.gates=[{domain: math, min_gain: 0.5, on_fail: %s}]"
    stop, warn = (*small, gate % "stop"), (*small, gate % "warn")
    assert main([cascade, "sft", STANDIN, *stop]) == DONE
    assert main([cascade, "if_rl", STANDIN, *stop]) == FAILED  # it is trained, and its gate stops the cascade
    assert "gate math: FAILED (stop)" in capfd.readouterr().err
    assert main([cascade, "math_rl", STANDIN, *stop]) == NOT_YET
    assert "math_rl: stage if_rl: gate math: FAILED (stop)" in capfd.readouterr().err
    assert left(cascade, *stop) == ["if_rl", "math_rl"]  # submitting again does not take if_rl for settled
    assert left(cascade, *warn) == ["math_rl"]
    assert main([cascade, "math_rl", STANDIN, *warn]) == DONE  # the gate is decided as the config has it now
    assert main([cascade, "math_rl", STANDIN, *stop]) == NOT_YET  # our own runner stops there too
    assert left(cascade, *warn) == []
    assert left(cascade, *warn, "evaluation.report=9") == ["sft", "if_rl", "math_rl"]  # to be measured again
    assert left(cascade, *warn, "stages.if_rl.evaluation.steps=[2]") == ["if_rl"]


def left(cascade: str, *overrides: str) -> list[str]:
    return unfinished(Run(make_plan(load_cascade(cascade, overrides)), Options(), [].append))


def test_slurm_tasks_become_ranks() -> None:
    env = {
        "SLURM_NTASKS": "16",
        "SLURM_JOB_ID": "4711",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NODELIST": "gpu[07-08]",
    }
    task = SlurmTask.read(env)
    assert task == SlurmTask(9, 1, 16, "4711-0", "gpu07")
    assert task.variables() == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24711",
    }
    assert SlurmTask.read({}).world == 1
    assert [first_host(text) for text in ("a[3,5]", "a,b", "solo", "x1,y[2-4]")] == ["a3", "a", "solo", "x1"]


def test_a_second_task_waits_for_the_first(cascade: str, tmp_path: Path) -> None:
    """Two tasks of one job, started in the wrong order: the second trains only after the first prepared the folder."""
    path = os.pathsep.join([str(FLOW.parents[1]), str(FLOW)])
    shared = {**os.environ, "PYTHONPATH": path, "SLURM_JOB_ID": "7", "SLURM_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    command = [sys.executable, "-m", "nemo_cascade.recipes.stage", cascade, "sft", "tests.unit.recipes.rank_standin"]
    # The second time there is something to measure again, and that needs every rank too.
    for number, override in enumerate([[], ["evaluation.report=9"]]):
        tasks = []
        for rank in ("1", "0"):
            env = {**shared, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_RESTART_COUNT": str(number)}
            tasks.append(subprocess.Popen([*command, *override], env=env, stdout=subprocess.PIPE, text=True))
        outputs = [task.communicate(timeout=200)[0] for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], outputs
        (folder,) = (tmp_path / "runs" / "small").glob("sft-*")
        there = sorted(folder.glob("rank-*"))
        assert [path.name for path in there] == ["rank-0-of-2-at-localhost", "rank-1-of-2-at-localhost"]
        for path in there:
            path.unlink()
