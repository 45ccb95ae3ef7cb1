"""Every numbered example runs from any folder and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.config.paths import hf_folder

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("0*.py"))
pytestmark = pytest.mark.slow


def output_of(name: str, folder: Path) -> str:
    """What the example prints, run elsewhere as a user runs it; a failure shows all of it."""
    if not (hf_folder("hf:nano") / "config.json").is_file():
        pytest.skip("nemo_cascade/models/nano/base is not in this checkout: make nano-base trains it")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    (script,) = (path for path in EXAMPLES if path.name.startswith(name))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers of the one line that fits."""
    (found,) = re.findall(pattern, text)
    return [float(value) for value in (found if isinstance(found, tuple) else (found,))]


def test_there_is_a_test_for_each() -> None:
    assert [path.name[:2] for path in EXAMPLES] == ["01", "02", "03", "04"]


def test_one_grpo_step_moves_the_weights(tmp_path: Path) -> None:
    text = output_of("01", tmp_path)
    before, after = re.findall(r"^refit, version [01]: ([0-9a-f]{16})$", text, re.MULTILINE)
    assert before != after
    assert "as the model sees it: '<|im_start|>system\\n<|im_end|>\\n<|im_start|>user\\n" in text
    assert len(re.findall(r"^  reward [01]  '.*'  \(.+\)$", text, re.MULTILINE)) == 3
    advantages = [float(part) for part in re.findall(r"advantages of the first group: \[(.*)\]", text)[0].split(", ")]
    assert len(advantages) == 8 and abs(sum(advantages)) < 0.05
    assert numbers(r"ratio: ([\d.]+)", text) == [pytest.approx(1.0, abs=1e-4)]
    assert numbers(r"gap_abs: ([\d.]+)", text)[0] < 1e-4
    assert numbers(r"grad_norm: ([\d.]+)", text)[0] > 0.0
    assert numbers(r"trained_tokens: ([\d.]+)", text)[0] > 32


def test_a_domain_of_ones_own_is_learned(tmp_path: Path) -> None:
    text = output_of("02", tmp_path)
    assert re.findall(r"^reward (\d) for ", text, re.MULTILINE) == ["1", "0", "0"]
    assert "[1/2] sft: finished in" in text and "[2/2] reverse_rl: finished in" in text
    first, last = numbers(r"first five steps ([\d.]+), of the last five ([\d.]+)", text)
    assert last > first + 0.05


def test_a_cascade_runs_once_and_reports(tmp_path: Path) -> None:
    ran, again = output_of("03", tmp_path).split("the same again:\n")
    assert "[1/2] sft: finished in" in ran and "[2/2] if_rl: finished in" in ran
    assert re.findall(r"^\[(\d)/2\] \w+: done \([0-9a-f]{8}\)$", again, re.MULTILINE) == ["1", "2"]
    assert "finished" not in again
    assert numbers(r"report.html: (\d+) KiB", again)[0] > 20


def test_lightning_trains_the_shipped_model(tmp_path: Path) -> None:
    text = output_of("04", tmp_path)
    assert re.findall(r"^(\w+): ", text, re.MULTILINE)[:2] == ["nano", "nano_judge"]
    losses = [float(value) for value in re.findall(r"^step \d+: loss ([\d.]+)", text, re.MULTILINE)]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    assert numbers(r"sft.nemo: (\d+) KiB", text)[0] > 1000
    assert "restored 73 tensors, embeddings in torch.bfloat16" in text
