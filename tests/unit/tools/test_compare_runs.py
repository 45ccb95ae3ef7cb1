"""Two runs side by side, on folders written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_cascade.cascade.manifest import read_manifest
from tests.unit.tools.test_cascade_seeds import GOOD, cascade
from tools.compare_runs import Run, first_difference, main, page
from tools.stage_costs import Cost, cost_of

STEP = {"loss": 0.25, "rollouts": 8.0, "groups": 4.0, "groups_dropped": 1.0, "tokens": 100.0, "packed_tokens": 180.0}


def write_metrics(folder: Path, name: str, lines: list[dict[str, float]]) -> None:
    path = read_manifest(folder).folders[name].metrics
    path.write_text("".join(json.dumps({"step": index} | line) + "\n" for index, line in enumerate(lines)))


def test_what_a_stage_cost(tmp_path: Path) -> None:
    folder = cascade(tmp_path / "a", 1, GOOD)
    write_metrics(folder, "sft", [{"loss": 1.0, "tokens": 640.0, "seconds/total": 0.5}] * 3)
    write_metrics(folder, "if_rl", [STEP | {"seconds/total": 0.25}] * 2)
    folders = read_manifest(folder).folders
    assert cost_of(folders["sft"]) == Cost(3, 0, 0, 1920, 1.5)
    assert cost_of(folders["if_rl"]) == Cost(2, 20, 200, 360, 0.5)  # a dropped group of two was sampled, too
    assert cost_of(folders["if_rl"], 1).tokens == 280
    assert cost_of(folders["mopd"]) == Cost()


def test_the_first_metric_that_differs_is_named() -> None:
    line = {"step": 0, "loss": 0.25, "reward": 0.5}
    other = {"step": 1, "loss": 0.5, "reward": 0.75}
    assert first_difference([line], [dict(line)]) == ""
    assert first_difference([line, other], [line, other | {"loss": 0.125}]) == "step 1: loss 0.5 and 0.125"
    assert first_difference([line], [other | {"step": 0}]) == "step 0: loss 0.25 and 0.5 (1 more differ)"
    assert first_difference([line], [line | {"entropy": 2.0}]) == "step 0: entropy absent and 2.0"
    assert first_difference([line, other], [line]) == "equal over 1 steps, then only A goes on"
    assert first_difference([], [line]) == "equal over 0 steps, then only B goes on"


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    better = GOOD | {"if_rl": {"if": 36, "math": 8}}
    a, b = cascade(tmp_path / "a", 1, GOOD), cascade(tmp_path / "b", 2, better)
    for folder, loss in ((a, 0.25), (b, 0.5)):
        write_metrics(folder, "if_rl", [STEP, STEP | {"loss": loss, "seconds/total": loss}])
    text = page(Run.read(a), Run.read(b))
    assert "| if_rl | other | 2, 2 | 20, 20 | 200, 200 | 360, 360 | 0, 0 | step 1: loss 0.25 and 0.5 |" in text
    assert "| if_rl | if | 75.0 | 90.0 | +15.0 | +5.0 to +27.5 | yes |" in text
    assert "| if_rl | math | 20.0 | 20.0 | +0.0 | +0.0 to +0.0 | no |" in text
    assert "| sft | same |" in page(Run.read(a), Run.read(a))
    assert main([str(a), str(b)]) == 0
    assert capsys.readouterr().out == text
    assert main([str(a), str(tmp_path / "none")]) == 2
    assert "no cascade.json here" in capsys.readouterr().err


def test_stages_of_one_run_alone_are_named(tmp_path: Path) -> None:
    a, b = cascade(tmp_path / "a", 1, GOOD), cascade(tmp_path / "b", 1, GOOD)
    manifest = json.loads((b / "cascade.json").read_text())
    manifest["stages"] = manifest["stages"][:2]
    (b / "cascade.json").write_text(json.dumps(manifest))
    assert page(Run.read(a), Run.read(b)).endswith("\nOnly in A: math_rl, mopd.\n")
