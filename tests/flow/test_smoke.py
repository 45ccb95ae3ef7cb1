"""The shipped nano cascade, every stage file as it is, two steps each: `make smoke`.

It shows that the machinery runs from the first stage to the report and claims nothing about what training does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.cascade.manifest import read_manifest
from nemo_cascade.config.load import load_cascade
from nemo_cascade.config.paths import PACKAGED
from tests.flow.real_cascade import ROOT, environment

pytestmark = pytest.mark.slow
SMALL = (
    "name=smoke", "stages.*.num_steps=2", "stages.*.prompts_per_step=4", "stages.*.group_size=4",
    "stages.mopd.prompts_per_step=18", "stages.mopd.group_size=1", "stages.sft.tokens_per_step=8192",
    "evaluation.select=4", "evaluation.report=4", "evaluation.other_mode=2",
    "stages.if_rl.gates=[{domain: instruction_following, min_gain: -1.0, on_fail: stop}]",
)  # fmt: skip
MARK = "NEMO_CASCADE_SMOKE"


def run(output: Path) -> list[str]:
    """`nemo-cascade run nano` with what makes it small; its lines are shown as they come (`pytest -s`)."""
    command = [sys.executable, "-m", "nemo_cascade.cli", "run", "nano", *SMALL, f"output={output}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**{MARK: str(output)}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        lines.append(line.rstrip("\n"))
    assert process.wait(timeout=60) == 0, lines[-1]
    return lines


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, list[str]]:
    """The cascade's folder and what the first run said."""
    for name, folder in PACKAGED.items():
        if not (folder / "config.json").is_file():
            pytest.skip(f"hf:{name} is not trained yet: make nano-base nano-judge")
    output = tmp_path_factory.mktemp("smoke")
    lines = run(output)
    return output / "smoke", lines


def rows(folder: StageFolder) -> list[dict]:
    """The recorded rollouts of the first step, of both ranks."""
    files = sorted((folder.path / "rollouts").glob("step_000000*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def test_every_stage_ran_and_a_second_run_does_nothing(smoke):
    folder, lines = smoke
    names = [Path(name).stem for name in load_cascade("nano").cascade.stages]
    folders = read_manifest(folder).folders
    assert sorted(folders) == sorted(names)
    assert len(names) == 10
    results = {name: stage.result() for name, stage in folders.items()}
    assert all(result is not None and result.num_steps == 2 for result in results.values())
    assert len([line for line in lines if ": finished in " in line]) == 10
    for name, stage in folders.items():
        metrics = [json.loads(line) for line in stage.metrics.read_text().splitlines()]
        assert [row["step"] for row in metrics] == [0, 1], name
        assert all(value is not None and math.isfinite(value) for row in metrics for value in row.values()), name
    assert lines[-1] == f"report: {folder}/report.html"
    text = (folder / "report.html").read_text()
    assert [name for name in names if name not in text] == []
    again = run(folder.parent)
    assert sum(": done (" in line for line in again) == 10
    assert not any(": finished in " in line for line in again)


def test_the_services_took_part(smoke):
    """Judge, sandbox, environment, teachers and gate left their traces in the folders."""
    stages = read_manifest(smoke[0]).folders
    judged = [row["outcome"] for row in rows(stages["rlhf_teacher"])]
    assert len(judged) == 4 * 4
    assert all("base" in outcome["parts"] for outcome in judged if "invalid" not in outcome)
    assert sum("invalid" in outcome for outcome in judged) <= 3
    agentic = rows(stages["swe_agentic_rl"])
    assert any(message["role"] == "tool" for row in agentic for message in row["messages"])
    assert any("reward" in row["outcome"] for row in agentic)
    assert {row["task"]["domain"] for row in rows(stages["code_rl"])} == {"code"}
    mopd = load_cascade("nano").stages["mopd"]
    teachers = json.loads(stages["mopd"].teachers.read_text())
    assert set(teachers) == set(mopd.data.domains)
    assert {choice["stage"] for choice in teachers.values()} <= {"sft", "rlhf_teacher", "if_rl", "multi_domain_rl"}
    (gate,) = json.loads(stages["if_rl"].gates.read_text())
    assert (gate["passed"], gate["n"]) == (True, 4)


def test_nothing_is_left_running(smoke):
    mark = f"{MARK}={smoke[0].parent}".encode()
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                left += [entry.name] if mark in (entry / "environ").read_bytes() else []
            except OSError:
                continue
    assert left == []
