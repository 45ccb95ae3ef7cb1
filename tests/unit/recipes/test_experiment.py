"""Cascades through NeMo-Run: a real local experiment, and the scripts that Slurm would get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.config.schema import HardwareConfig
from nemo_cascade.recipes.executors import ExecutorConfig, build_executor, load_executor
from nemo_cascade.types import UserError
from tests.flow.small_cascade import write_cascade

ROOT = Path(__file__).resolve().parents[3]
SUBMIT = """
import sys
from nemo_cascade.recipes.experiment import Recipe, submit
if __name__ == "__main__":
    cascade, executor, *flags = sys.argv[1:]
    overrides = ("stages=[sft, if_rl]", "evaluation.select=8", "evaluation.report=8")
    sys.exit(submit(Recipe(cascade, executor, overrides, dry_run="--dry-run" in flags, module="standin_stage")))
"""


def submit(folder: Path, executor: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Submit from a process of its own: NeMo-Run reads its home at import and keeps threads."""
    script = folder / "submit.py"
    script.write_text(SUBMIT)
    (folder / "executor.yaml").write_text(executor)
    cascade = str(folder / "small.yaml")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "flow")])
    full = {**os.environ, "PYTHONPATH": path, "NEMORUN_HOME": str(folder / "home"), **env}
    command = [sys.executable, str(script), cascade, str(folder / "executor.yaml"), *flags]
    return subprocess.run(command, env=full, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def states(folder: Path) -> dict[str, bool]:
    manifest = json.loads((folder / "runs" / "small" / "cascade.json").read_text())
    return {
        row["name"]: (folder / "runs" / "small" / row["folder"] / "record.json").exists() for row in manifest["stages"]
    }


@pytest.mark.slow
def test_local_experiment_goes_on_where_it_failed(tmp_path: Path) -> None:
    write_cascade(tmp_path)
    failed = submit(tmp_path, "kind: local\n", STANDIN_FAIL="sft")
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "not done: sft, if_rl" in failed.stderr
    assert states(tmp_path) == {"sft": False, "if_rl": False}  # NeMo-Run started if_rl all the same; it refused
    again = submit(tmp_path, "kind: local\n")
    assert again.returncode == 0, again.stdout + again.stderr
    assert states(tmp_path) == {"sft": True, "if_rl": True}
    third = submit(tmp_path, "kind: local\n")
    assert third.returncode == 0 and "all 2 stages are done" in third.stdout


@pytest.mark.slow
def test_slurm_scripts_of_a_chain(tmp_path: Path) -> None:
    write_cascade(tmp_path)
    executor = "kind: slurm\naccount: research\npython: /env/bin/python\njobs: 2\nsbatch: {comment: nightly}\n"
    done = submit(tmp_path, f"{executor}folder: {tmp_path}\n", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = {path.name: path.read_text() for path in (tmp_path / "home").rglob("*_sbatch.sh")}
    assert sorted(scripts) == ["if_rl_2_sbatch.sh", "if_rl_sbatch.sh", "sft_2_sbatch.sh", "sft_sbatch.sh"]
    text = scripts["if_rl_sbatch.sh"]
    assert "#SBATCH --account=research" in text and "#SBATCH --kill-on-invalid-dep=yes" in text
    assert "#SBATCH --comment=nightly" in text and "#SBATCH --nodes=1" in text and "container" not in text
    bodies = "".join(path.read_text() for path in (tmp_path / "home").rglob("scripts/*.sh"))
    assert "exec /env/bin/python -m nemo_cascade.recipes.stage" in bodies and "'stages=[sft, if_rl]'" in bodies


def test_shipped_executors_are_read_strictly(tmp_path: Path) -> None:
    assert load_executor("local").kind == "local"
    slurm = load_executor("slurm")
    assert (slurm.kind, slurm.jobs, slurm.interpreter) == ("slurm", 4, "python3")
    assert load_executor("docker").container_image == "nemo_cascade:latest"
    wrong = tmp_path / "mine.yaml"
    wrong.write_text("kind: slurm\nacount: research\n")
    with pytest.raises(UserError, match="did you mean 'account'"):
        load_executor(str(wrong))
    wrong.write_text("kind: slurm\n")
    with pytest.raises(UserError, match="account is missing"):
        load_executor(str(wrong))


def test_ranks_are_tasks_on_several_nodes_only() -> None:
    pytest.importorskip("nemo_run", reason="nemo_run is not installed")
    config = ExecutorConfig(kind="slurm", account="research", gpus_per_node=8)
    many = build_executor(config, HardwareConfig(nodes=4, ranks_per_node=8), "nano")
    assert (many.nodes, many.ntasks_per_node, many.dependency_type) == (4, 8, "afterok")
    single = build_executor(config, HardwareConfig(nodes=1, ranks_per_node=8), "nano")
    assert (single.nodes, single.ntasks_per_node) == (1, 1)
    with pytest.raises(UserError, match="use an executor of kind slurm"):
        build_executor(ExecutorConfig(), HardwareConfig(nodes=2), "nano")
    with pytest.raises(UserError, match="NeMo-Run rewrites paths"):
        build_executor(ExecutorConfig(kind="slurm", account="a", folder="/x/nemo_run"), HardwareConfig(), "nano")


def test_recipes_import_without_torch_and_nemo_run() -> None:
    code = (
        "import sys, nemo_cascade.recipes.nano, nemo_cascade.recipes.nemotron_cascade_2, nemo_cascade.recipes.stage; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'nemo_run', 'megatron')))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
