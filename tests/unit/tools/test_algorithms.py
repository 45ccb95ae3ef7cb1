"""MOPD against GRPO: when a run is back, the ratios, and the whole measurement at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_cascade.cascade.teachers import Choice
from tools.bench.algorithms import figure, main, summary, table
from tools.bench.recovery_runs import Curve, Measured, Point, checkpoints
from tools.stage_costs import Cost


def curve(kind: str, shares: list[float], per_step: int = 64) -> Curve:
    """Evaluated after every second step; each step has `per_step` rollouts of 20 sampled tokens."""
    points = []
    for index, share in enumerate(shares, start=1):
        steps = 2 * index
        cost = Cost(steps, per_step * steps, 20 * per_step * steps, 50 * per_step * steps)
        points.append(Point(cost, {"math": share * 0.8}, share))
    return Curve(kind, 4e-4, points)


def measured(mopd: list[float], grpo: list[float], seed: int = 1) -> Measured:
    teachers = {"math": Choice("sft", None, "best")}
    curves = {"mopd": curve("mopd", mopd), "grpo": curve("grpo", grpo, per_step=32)}
    return Measured(seed, {"math": 0.2}, teachers, {"math": 0.8}, Cost(sampled=1000, trained=2000), curves)


def test_a_run_is_back_when_the_next_evaluation_confirms_it() -> None:
    lucky = curve("mopd", [0.5, 0.92, 0.8, 0.9, 0.95, 0.7])
    assert lucky.back is not None and lucky.back.cost.steps == 8
    last = curve("mopd", [0.5, 0.92, 0.8, 0.9])
    assert last.back is not None and last.back.cost.steps == 8
    never = curve("grpo", [0.5, 0.95, 0.85])
    assert never.back is None and never.reached.steps == 6


def test_the_ratios_and_their_medians() -> None:
    seeds = [
        measured([0.5, 0.9, 0.9], [0.1] * 7 + [0.95, 0.95], seed=1),  # 4 steps against 16, twice the rollouts a step
        measured([0.9, 0.9], [0.3, 0.95, 0.95], seed=2),  # 2 against 4
        measured([0.9, 0.9], [0.3] * 10, seed=3),  # 2 against more than 20
    ]
    found = json.loads(json.dumps(summary(seeds, seeds[:1])))
    assert found["mopd_steps_vs_grpo"] == {"per_seed": [0.25, 0.5, 0.1], "median": 0.25}
    assert found["mopd_samples_vs_grpo"] == {"per_seed": [0.5, 1.0, 0.2], "median": 0.5}
    assert found["never_back"] == ["grpo with seed 3"]
    assert found["tuned"] == [
        {"kind": "mopd", "rate": 4e-4, "back_after": 4}, {"kind": "grpo", "rate": 4e-4, "back_after": 16},
    ]  # fmt: skip
    assert found["seeds"][0]["mopd"]["curve"][0] == {
        "step": 2, "rollouts": 128, "sampled": 2560, "tokens": 8960, "scores": {"math": 0.4}, "share": 0.5
    }  # fmt: skip
    text = table(seeds, seeds[:1])
    assert (
        "| 1 | 20.0, 80.0 (sft) | 4 | 256 | 5,120 | 17,920 | 16 | 512 | 10,240 | 35,840 | 3,000 | 0.25 | 0.50 |" in text
    )
    assert "| over 20 | over 640 | over 12,800 | over 44,800 | 3,000 | under 0.10 | under 0.20 |" in text
    assert "Medians over 3 seed(s): steps 0.25, rollouts 0.50." in text
    assert "| mopd | 4 |" in text and "| grpo | 16 |" in text
    assert figure(seeds).count("<polyline") == 3 * 3 * 2


def test_seeds_that_chose_the_rates_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--seeds", "11", "12", "--tune-seed", "12"])
    assert "--tune-seed 12 is one of --seeds" in capsys.readouterr().err


def test_both_algorithms_are_evaluated_at_the_same_steps() -> None:
    assert checkpoints(60, "report") == [*range(2, 41, 2), 44, 48, 52, 56]
    assert checkpoints(180, "report")[: len(checkpoints(60, "report"))] == checkpoints(60, "report")
    assert checkpoints(130, "select") == [*range(4, 101, 4), 110, 120]
    assert checkpoints(2, "report") == []


@pytest.mark.slow
def test_the_measurement_at_the_smallest_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage by the real runner; a second call reads what is there."""
    words = ["--seeds", "2", "--tune-seed", "1", "--rates", "4e-4", "--scale", "0.02", "--hardware", "cpu1"]
    command = [
        *words,
        "--regression",
        "cascade",
        "--out",
        str(tmp_path),
        "--json",
        "--figure",
        str(tmp_path / "curves.svg"),
    ]
    assert main(command) == 0
    first = capsys.readouterr()
    found = json.loads(first.out)
    assert len(found["mopd_steps_vs_grpo"]["per_seed"]) == 1
    (seed,) = found["seeds"]
    assert set(seed["start"]) == {"math", "preference"} == set(seed["taught"])
    assert [point["rollouts"] for point in seed["mopd"]["curve"]] == [128]
    assert [point["rollouts"] for point in seed["grpo"]["curve"]] == [128, 256]
    assert 128 * 5 < seed["grpo"]["curve"][0]["sampled"] < 128 * 48
    assert first.err.count(": finished in ") == 12  # on each seed 4 stages up to the start, and 2
    assert (tmp_path / "curves.svg").read_text().count("<polyline") == 6
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert ": finished in " not in again.err
