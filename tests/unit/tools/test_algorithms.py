"""MOPD against GRPO: when a run is back, the ratios, and the whole measurement at the smallest size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nemo_cascade.cascade.teachers import Choice
from tools.bench.algorithms import Comparison, command_of, figure, main, parse, summary, table
from tools.bench.recovery_runs import Curve, Measured, Point, Ratio, Try, checkpoints, median, ranked
from tools.stage_costs import Cost

MOPD, GRPO = Try("mopd_sampled", 4e-4, 0), Try("grpo_8", 2e-4, 0)


def curve(tried: Try, shares: list[float], per_step: int = 64) -> Curve:
    """Evaluated after every second step; each step has `per_step` rollouts of 20 sampled tokens."""
    points = []
    for index, share in enumerate(shares, start=1):
        steps = 2 * index
        cost = Cost(steps, per_step * steps, 20 * per_step * steps, 50 * per_step * steps)
        points.append(Point(cost, {"math": share * 0.8}, share))
    return Curve(tried, points)


def measured(mopd: list[float], grpo: list[float], seed: int = 1) -> Measured:
    teachers = {"math": Choice("sft", None, "best")}
    curves = [curve(MOPD, mopd), curve(GRPO, grpo, per_step=32)]
    return Measured(seed, {"math": 0.2}, teachers, {"math": 0.8}, Cost(sampled=1000, trained=2000), curves)


def test_a_run_is_back_when_the_next_evaluation_confirms_it() -> None:
    lucky = curve(MOPD, [0.5, 0.92, 0.8, 0.9, 0.95, 0.7])
    assert lucky.back is not None and lucky.back.cost.steps == 8
    last = curve(MOPD, [0.5, 0.92, 0.8, 0.9])
    assert last.back is not None and last.back.cost.steps == 8
    never = curve(GRPO, [0.5, 0.95, 0.85])
    assert never.back is None and never.reached.steps == 6


def test_the_ratios_and_their_medians() -> None:
    seeds = [
        measured([0.5, 0.9, 0.9], [0.1] * 7 + [0.95, 0.95], seed=1),  # 4 steps against 16, twice the rollouts a step
        measured([0.9, 0.9], [0.3, 0.95, 0.95], seed=2),  # 2 against 4
        measured([0.9, 0.9], [0.3] * 10, seed=3),  # 2 against more than 20
    ]
    made = Comparison(seeds, seeds[:1], [MOPD, GRPO])
    found = json.loads(json.dumps(summary(made)))
    under = [{"at_least": 0.0, "at_most": 0.1}, {"at_least": 0.0, "at_most": 0.2}]
    assert found["mopd_steps_vs_grpo"] == {"per_seed": [0.25, 0.5, under[0]], "median": 0.25}
    assert found["mopd_samples_vs_grpo"] == {"per_seed": [0.5, 1.0, under[1]], "median": 0.5}
    assert found["variants"]["mopd_sampled"]["mopd_steps_vs_grpo"] == found["mopd_steps_vs_grpo"]
    assert found["never_back"] == ["grpo_8 with seed 3"]
    assert found["tuned"] == [
        {"seed": 1, "kind": "mopd", "way": "mopd_sampled", "rate": 4e-4, "warmup": 0, "back_after": 4},
        {"seed": 1, "kind": "grpo", "way": "grpo_8", "rate": 2e-4, "warmup": 0, "back_after": 16},
    ]
    assert found["seeds"][0]["curves"]["mopd_sampled"]["curve"][0] == {
        "step": 2, "rollouts": 128, "sampled": 2560, "tokens": 8960, "scores": {"math": 0.4}, "share": 0.5
    }  # fmt: skip
    text = table(made)
    assert "| 1 | 20.0, 80.0 (sft) | 3,000 |" in text
    assert "| 1 | mopd_sampled | 4 | 256 | 5,120 | 17,920 | 0.25 | 0.50 |" in text
    assert "| 1 | grpo_8 | 16 | 512 | 10,240 | 35,840 |  |  |" in text
    assert "| 3 | mopd_sampled | 2 | 128 | 2,560 | 8,960 | under 0.10 | under 0.20 |" in text
    assert "| 3 | grpo_8 | over 20 | over 640 | over 12,800 | over 44,800 |  |  |" in text
    assert "| mopd_sampled | 0.0004 | 0 | 0.25 | 0.50 |" in text
    assert "| grpo_8 | 0.0002 | 0 | 16, at the end 0.95 |" in text
    assert figure(seeds).count("<polyline") == 3 * 3 * 2


def test_a_median_over_bounds_is_a_bound() -> None:
    known, over, under = Ratio(0.5, 0.5), Ratio(0.3, math.inf), Ratio(0.0, 0.4)
    assert str(median([known, known, over])) == "0.50"
    assert str(median([known, over, over])) == "over 0.30"
    assert str(median([known, under, under])) == "under 0.40"
    assert str(median([known, over, under])) == "0.30 to 0.50"
    assert str(median([under, over, Ratio(0.0, math.inf)])) == "unknown"
    seeds = [measured([0.5] * 3, [0.95, 0.95], seed=1), measured([0.5] * 3, [0.5, 0.95], seed=2)]
    found = json.loads(json.dumps(summary(Comparison(seeds, [], [MOPD, GRPO]))))
    assert found["mopd_steps_vs_grpo"]["median"] == {"at_least": 2.25, "at_most": None}


def test_tuning_prefers_settings_that_come_back_on_every_seed() -> None:
    fast, safe, slow = (Try("mopd_sampled", rate, 0) for rate in (8e-4, 4e-4, 2e-4))
    curves = [
        curve(fast, [0.95, 0.95]), curve(fast, [0.95, 0.5, 0.5, 0.5]),
        curve(safe, [0.5, 0.95, 0.95]), curve(safe, [0.5, 0.5, 0.95]),
        curve(slow, [0.5, 0.5, 0.95]), curve(slow, [0.5, 0.5, 0.95]),
        curve(GRPO, [0.95, 0.95]),
    ]  # fmt: skip
    assert ranked(curves) == [safe, slow, fast]  # GRPO's setting was dropped after the first seed


def test_seeds_that_chose_the_rates_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--seeds", "11", "12", "--tune-seeds", "10", "12"])
    assert "--tune-seeds 12 is one of --seeds" in capsys.readouterr().err


def test_both_sides_try_as_many_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--distill", "sampled", "full_vocab", "--groups", "8"])
    assert "as many variants" in capsys.readouterr().err


def test_the_page_names_the_command_that_printed_it() -> None:
    given = parse(["--regression", "cascade", "--rates", "4e-4", "--hardware", "cpu1", "--write"])
    expected = "--regression cascade --seeds 11 12 13 --rates 0.0004 --hardware cpu1 --write"
    assert command_of(given) == f"python -m tools.bench.algorithms {expected}"


def test_the_evaluated_steps() -> None:
    assert checkpoints(60) == [*range(1, 13), *range(14, 41, 2), 44, 48, 52, 56]
    assert checkpoints(180)[: len(checkpoints(60))] == checkpoints(60)
    assert checkpoints(130)[-3:] == [100, 110, 120]
    assert checkpoints(1) == []


@pytest.mark.slow
def test_the_measurement_at_the_smallest_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage by the real runner; a second call reads what is there."""
    words = "--regression cascade --seeds 2 --tune-seeds 1 --distill full_vocab --groups 8 --rates 4e-4 --scale 0.02"
    files = ["--out", str(tmp_path), "--figure", str(tmp_path / "curves.svg")]
    command = [*words.split(), "--hardware", "cpu1", "--json", *files]
    assert main(command) == 0
    first = capsys.readouterr()
    found = json.loads(first.out)
    assert len(found["mopd_steps_vs_grpo"]["per_seed"]) == 1
    (seed,) = found["seeds"]
    assert set(seed["start"]) == {"math", "preference"} == set(seed["taught"])
    curves = seed["curves"]
    assert [point["rollouts"] for point in curves["mopd_full_vocab"]["curve"]] == [64, 128]
    assert [point["rollouts"] for point in curves["grpo_8"]["curve"]] == [64, 128]
    assert 128 * 5 < curves["grpo_8"]["curve"][1]["sampled"] < 128 * 48
    assert first.err.count(": finished in ") == 12  # on each seed 4 stages up to the start, and 2
    assert (tmp_path / "curves.svg").read_text().count("<polyline") == 6
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert ": finished in " not in again.err
