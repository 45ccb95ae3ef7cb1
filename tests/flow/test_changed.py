"""What a changed number re-runs, and what NeMo-Run makes of the same cascade: with the real launch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.cascade.artifacts import StageFolder
from tests.flow.real_cascade import ROOT, STAGES, Cascade, environment

pytestmark = pytest.mark.slow
RECIPE = """
import sys
from nemo_cascade.recipes.experiment import main
if __name__ == "__main__":  # NeMo-Run imports this file again
    sys.exit(main({cascade!r}, "local"))
"""


def test_a_changed_learning_rate_reruns_its_stage_and_those_below_and_nothing_above(tmp_path, uninterrupted):
    cascade = Cascade(tmp_path)
    for name in STAGES:
        shutil.copytree(uninterrupted.stage(name).path, cascade.folder / uninterrupted.stage(name).path.name)
    untouched = tmp_path / "untouched"
    untouched.touch()
    done = cascade.run("stages.rl.optimizer.lr=9.0e-4")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert [line for line in said if line.startswith("[1/3]")] == [f"[1/3] sft: done ({key(cascade.stage('sft'))})"]
    assert "[2/3] rl: grpo from sft, 3 steps" in said
    assert "[3/3] mopd: mopd from rl, 2 steps" in said
    assert not newer_files(cascade.stage("sft").path, untouched)
    before = {name: uninterrupted.outcome(name) for name in STAGES}
    after = {name: cascade.outcome(name) for name in STAGES}
    assert after["sft"] == before["sft"]
    assert after["rl"].sha256 != before["rl"].sha256
    assert after["mopd"].sha256 != before["mopd"].sha256
    assert cascade.stage("rl").path.name != uninterrupted.stage("rl").path.name
    again = cascade.run()  # the first variant is still there
    assert again.stdout.count(": done (") == 3
    assert {name: cascade.outcome(name) for name in STAGES} == before


def key(folder: StageFolder) -> str:
    return folder.path.name.rpartition("-")[2]


def newer_files(folder: Path, than: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.stat().st_mtime_ns > than.stat().st_mtime_ns]


def through_nemo_run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """From a process of its own: NeMo-Run reads its home at import and keeps threads."""
    variables = environment(NEMORUN_HOME=str(folder / "home"))
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=580
    )


def test_nemo_run_computes_the_same_bits_as_our_own_runner(tmp_path, uninterrupted):
    cascade = Cascade(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(cascade=str(cascade.path)))
    done = through_nemo_run(tmp_path, str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in STAGES:
        assert cascade.outcome(name) == uninterrupted.outcome(name), name
    again = through_nemo_run(tmp_path, str(recipe))
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "real: all 3 stages are done")


def test_the_nano_recipe_runs_a_stage_of_the_shipped_cascade(tmp_path):
    small = ["stages=[nano/sft]", "stages.sft.num_steps=1", "evaluation.select=2", "evaluation.report=2"]
    small += ["evaluation.other_mode=0", "evaluation.domains=[mcqa, code]", f"output={tmp_path / 'runs'}"]
    done = through_nemo_run(tmp_path, "-m", "nemo_cascade.recipes.nano", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs" / "nano").glob("sft-*")
    result = StageFolder(folder).result()
    assert result is not None and (result.kind, result.num_steps) == ("sft", 1)
    rows = StageFolder(folder).evaluation("final").read_text().splitlines()
    assert len(rows) == 8
    assert os.listdir(tmp_path / "home" / "experiments" / "nano")
