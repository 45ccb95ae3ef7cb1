"""A cascade is run, killed, changed and run again: what is done stays, what changed runs, nothing is lost.

The stages are real processes (`standin_stage`): they checkpoint, die by SIGKILL, resume, export and evaluate.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.cascade import process
from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.cascade.lock import group_lives
from nemo_cascade.cascade.manifest import read_manifest
from nemo_cascade.cascade.runner import Options, StageFailed, run
from nemo_cascade.cascade.status import status
from nemo_cascade.config.load import load_cascade
from nemo_cascade.types import UserError
from tests.flow.small_cascade import write_cascade
from tests.waiting import there, wait_until

STANDIN = "tests.flow.standin_stage"
ROOT = Path(__file__).resolve().parents[2]


class Cascade:
    """A cascade file, what was said while it ran, and which stages were started."""

    def __init__(self, folder: Path) -> None:
        self.path = write_cascade(folder)
        self.folder = folder / "runs" / "small"
        self.said: list[str] = []

    def run(self, *overrides: str, **options: object) -> list[str]:
        """Run; returns the stages that were started."""
        self.said = []
        run(load_cascade(str(self.path), overrides), Options(module=STANDIN, **options), self.said.append)
        return self.started()

    def started(self) -> list[str]:
        return [line.split()[1].rstrip(":") for line in self.said if " steps" in line and line.startswith("[")]

    def stage(self, name: str) -> StageFolder:
        return read_manifest(self.folder).folders[name]

    def steps(self, name: str) -> list[int]:
        return [json.loads(line)["step"] for line in self.stage(name).metrics.read_text().splitlines()]

    def digest(self) -> dict[str, str]:
        return {row["name"]: row["sha256"] for row in status(self.folder)["stages"]}


@pytest.fixture
def cascade(tmp_path: Path) -> Cascade:
    return Cascade(tmp_path)


def test_run_resume_and_change(cascade):
    everything = ["sft", "if_rl", "math_rl", "side", "mopd"]
    assert cascade.run() == everything
    first = cascade.digest()
    assert cascade.run() == []
    assert cascade.run("stages.math_rl.optimizer.lr=0.07") == ["math_rl", "mopd"]
    assert cascade.digest()["if_rl"] == first["if_rl"]
    assert cascade.digest()["math_rl"] != first["math_rl"]
    assert cascade.run() == []  # the first variant is still there
    assert cascade.digest() == first
    choices = json.loads(cascade.stage("mopd").teachers.read_text())
    assert {domain: choice["checkpoint"] for domain, choice in choices.items()} == {
        "instruction_following": "if_rl", "math": "math_rl", "code": "side",
    }  # fmt: skip
    assert choices["code"]["scores"]["side"]["value"] > choices["code"]["scores"]["sft"]["value"]


def test_a_killed_stage_goes_on_from_its_checkpoint(cascade, tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_KILL", "if_rl:5")
    with pytest.raises(StageFailed, match=r"stage if_rl failed \(exit code -9\): killed"):
        cascade.run(until="if_rl")
    assert not cascade.stage("if_rl").record.exists()
    assert cascade.stage("if_rl").newest_checkpoint() == 4
    monkeypatch.delenv("STANDIN_KILL")
    assert cascade.run(until="if_rl") == ["if_rl"]
    assert any("on from step 4" in line for line in cascade.said)
    assert cascade.steps("if_rl") == [0, 1, 2, 3, 4, 4, 5]  # step 4 was not in the checkpoint
    (tmp_path / "whole").mkdir()
    whole = Cascade(tmp_path / "whole")
    whole.run(until="if_rl")
    assert whole.digest()["if_rl"] == cascade.digest()["if_rl"]


def test_a_failing_stage_says_why_and_stops_the_run(cascade, monkeypatch):
    monkeypatch.setenv("STANDIN_FAIL", "if_rl")
    with pytest.raises(StageFailed) as caught:
        cascade.run()
    assert "stage if_rl failed (exit code 1): RuntimeError: the learner diverged at step 2" in str(caught.value)
    assert [row["status"] for row in status(cascade.folder)["stages"]] == [
        "done",
        "failed",
        "pending",
        "pending",
        "pending",
    ]
    monkeypatch.delenv("STANDIN_FAIL")
    assert cascade.run(until="if_rl") == ["if_rl"]
    assert not cascade.stage("if_rl").failed.exists()


def test_a_runner_killed_with_its_stage_running_is_taken_over(cascade, tmp_path):
    command = [
        sys.executable,
        "-m",
        "nemo_cascade.cli",
        "run",
        str(cascade.path),
        "--module",
        STANDIN,
        "--until",
        "sft",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STANDIN_PACE": "2"}
    runner = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: there(cascade.folder, "sft-*/checkpoints/step_*"), "the first checkpoint")
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    orphan = json.loads(next(cascade.folder.glob("sft-*/lock.json")).read_text())["pid"]
    assert status(cascade.folder)["stages"][0]["status"] == "running"
    assert cascade.run(until="sft") == ["sft"]
    assert not group_lives_safely(orphan)
    assert cascade.steps("sft")[-1] == 3
    assert status(cascade.folder)["stages"][0]["status"] == "done"


def group_lives_safely(group: int) -> bool:
    try:
        return group_lives(group)
    except PermissionError:
        return True


def test_an_interrupt_ends_the_stage(cascade):
    command = [sys.executable, "-m", "nemo_cascade.cli", "run", str(cascade.path), "--module", STANDIN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STANDIN_PACE": "5"}
    runner = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    child = 0

    def handed_over() -> bool:
        nonlocal child
        locks = [lock.read_text() for lock in cascade.folder.glob("sft-*/lock.json")]
        child = json.loads(locks[0])["pid"] if locks and locks[0] else 0
        return child not in (0, runner.pid)

    wait_until(handed_over, "the stage's process")
    runner.send_signal(signal.SIGTERM)
    _, said = runner.communicate(timeout=200)
    assert (runner.returncode, said) == (130, "interrupted; the same command goes on from the last checkpoint\n")
    assert not Path(f"/proc/{child}").exists()
    assert not list(cascade.folder.glob("sft-*/lock.json"))


def test_a_silent_stage_is_spoken_of_and_goes_on(cascade, monkeypatch):
    monkeypatch.setattr(process, "SILENT_S", 0.5)
    monkeypatch.setenv("STANDIN_PACE", "2")
    cascade.run("stages.sft.num_steps=1", until="sft")
    pattern = r"sft-\w{8}: waiting for process \d+, which has been silent for [1-9]\d* s; Ctrl-C ends it, .*/log\.txt"
    assert any(re.fullmatch(pattern, line) for line in cascade.said), cascade.said
    assert cascade.said[-1].startswith("[1/1] sft: finished in")


def test_parts_of_a_cascade(cascade):
    assert cascade.run(until="side") == ["sft", "side"]
    with pytest.raises(UserError, match="--from math_rl: if_rl is not done yet"):
        cascade.run(start="math_rl")
    with pytest.raises(UserError, match="--until sidee: no such stage; did you mean 'side'?"):
        cascade.run(until="sidee")
    assert cascade.run(dry_run=True) == []
    assert cascade.said[0] == "sft: done"
    assert cascade.said[1].startswith("if_rl: would run 6 steps in ")
    assert cascade.run(start="if_rl", until="math_rl") == ["if_rl", "math_rl"]
    assert cascade.run(start="side") == ["mopd"]


def test_a_changed_evaluation_measures_again_and_does_not_train(cascade):
    cascade.run(until="if_rl")
    steps, digest = cascade.steps("if_rl"), cascade.digest()["if_rl"]
    assert cascade.run("evaluation.report=30", until="if_rl") == ["sft", "if_rl"]
    assert cascade.steps("if_rl") == steps
    assert cascade.digest()["if_rl"] == digest
    row = status(cascade.folder)["stages"][1]
    assert row["scores"]["math"]["n"] == 29  # the stand-in makes one task invalid
    assert cascade.run("evaluation.report=30", until="if_rl") == []


def test_a_stage_starts_from_the_middle_of_another(cascade):
    cascade.run("stages.side.init=if_rl@3", until="side")
    run_config = cascade.stage("side").config.read_text()
    assert f"init_folder: {cascade.stage('if_rl').weights(3).resolve()}" in run_config
    row = status(cascade.folder)["stages"][-2]
    assert row["name"] == "side"
    assert row["gains"]["code"]["difference"] > 0.2  # against if_rl@3, which was evaluated for it


def test_weights_of_a_step_that_was_not_kept(cascade):
    """A stage from the middle of a finished one: that one trains again for these weights, and nothing below it does."""
    assert cascade.run() == ["sft", "if_rl", "math_rl", "side", "mopd"]
    first, final = cascade.digest(), cascade.stage("if_rl").evaluation("final").read_text()
    middle = "stages.side.init=if_rl@3"
    cascade.run(middle, dry_run=True)
    assert cascade.said[:3] == [
        "sft: done", "if_rl: would train its 6 steps again: the weights of step 3 were not kept", "math_rl: done",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--from side: if_rl did not keep the weights of step 3; run without --from"):
        cascade.run(middle, start="side")
    assert cascade.run(middle) == ["if_rl", "side", "mopd"]
    assert "[2/5] if_rl: the weights of step 3 are needed and were not kept: it trains again" in cascade.said
    assert cascade.steps("if_rl")[-6:] == [0, 1, 2, 3, 4, 5]  # from nothing, to the end
    assert cascade.digest()["if_rl"] == first["if_rl"]
    assert cascade.stage("if_rl").evaluation("final").read_text() == final
    assert cascade.run(middle) == []
    assert cascade.run() == []  # `side` and `mopd` as they were are still there
    assert cascade.digest() == first
    shutil.rmtree(cascade.stage("if_rl").path / "weights")  # to free space: nobody needs them any more
    assert cascade.run(middle) == []
    assert cascade.run(middle, "stages.side.optimizer.lr=0.2") == ["if_rl", "side", "mopd"]


def test_a_step_to_measure_that_was_kept_is_only_measured(cascade):
    cascade.run("stages.if_rl.keep_steps=[2]", until="if_rl")
    steps = cascade.steps("if_rl")
    assert cascade.run(until="if_rl") == []
    assert cascade.run("stages.if_rl.evaluation.steps=[2]", until="if_rl") == ["if_rl"]
    assert cascade.steps("if_rl") == steps
    assert [line for line in cascade.said if "measures" in line] == ["if_rl measures step_000002"]  # `final` stays
    assert cascade.run("stages.if_rl.evaluation.steps=[2]", until="if_rl") == []


def test_a_gate_can_stop_the_cascade_or_send_children_back(cascade):
    gate = "stages.math_rl.gates=[{domain: instruction_following, min_gain: 0.0, on_fail: %s}]"
    with pytest.raises(StageFailed, match=r"gate instruction_following: FAILED \(stop\)"):
        cascade.run(gate % "stop", "stages.math_rl.num_steps=40", until="mopd")
    assert cascade.stage("math_rl").record.is_file()
    cascade.run(gate % "rollback", "stages.math_rl.num_steps=40")
    assert f"init_folder: {cascade.stage('if_rl').hf.resolve()}" in cascade.stage("mopd").config.read_text()
    state = status(cascade.folder)
    assert [(row["stage"], row["passed"], row["action"]) for row in state["gates"]] == [("math_rl", False, "rollback")]


def test_a_deleted_checkpoint_of_a_parent_is_named(cascade):
    cascade.run(until="sft")
    (cascade.stage("sft").hf / "config.json").unlink()
    with pytest.raises(UserError, match="the weights of sft are gone; delete .* and run again"):
        cascade.run(until="side")


def test_status_numbers(cascade):
    cascade.run()
    state = status(cascade.folder)
    assert set(state) == {"cascade", "seconds", "stages", "gates"}
    rows = {row["name"]: row for row in state["stages"]}
    names = "name kind init domains status seconds checkpoint sha256 scores gains teachers recovery"
    assert list(rows["mopd"]) == names.split()
    assert rows["mopd"]["teachers"] == {"math": "math_rl", "code": "side", "instruction_following": "if_rl"}
    assert rows["if_rl"]["gains"]["instruction_following"]["ci_low"] > 0.2
    assert rows["math_rl"]["gains"]["instruction_following"]["difference"] < 0
    assert rows["sft"]["gains"]["math"]["difference"] > 0  # against the random weights it started from
    recovered = rows["mopd"]["recovery"]
    assert "math" not in recovered["domains"]  # the student is its own best teacher there
    assert 0.7 < recovered["overall"]["value"] <= 1.0
    code = recovered["domains"]["code"]
    share = (rows["mopd"]["scores"]["code"]["score"] - rows["math_rl"]["scores"]["code"]["score"]) / (
        rows["side"]["scores"]["code"]["score"] - rows["math_rl"]["scores"]["code"]["score"]
    )
    assert code == pytest.approx(share)
