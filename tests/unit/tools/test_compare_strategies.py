"""The strategies side by side: the table on results written by hand, and all five trained at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_cascade.cascade.artifacts import StageFolder
from nemo_cascade.types import UserError
from tools.compare_strategies import Row, main, select_mean, table
from tools.stage_costs import Cost
from tools.strategy_runs import STRATEGIES, Result, kept_steps, nearest_step

TASKS = 50


def result(strategy: str, seed: int, math: int, mcqa: int, sampled: int = 1000) -> Result:
    """`math` and `mcqa` of fifty tasks are solved, the first ones."""
    scores = {
        name: {f"{name}-{index}": float(index < count) for index in range(TASKS)}
        for name, count in (("math", math), ("mcqa", mcqa))
    }
    return Result(strategy, seed, 1.0, scores, scores, Cost(10, 80, sampled, 3000))


def test_the_table() -> None:
    rows = [
        Row("cascade", [result("cascade", 1, 40, 30), result("cascade", 2, 40, 40)]),
        Row("mixed", [result("mixed", 1, 30, 30, 1400), result("mixed", 2, 30, 40, 1000)]),
    ]
    assert rows[0].mean().value == pytest.approx(0.75)
    change = rows[1].against(rows[0])
    assert change.value == pytest.approx(-0.1)
    assert change.low < -0.1 < change.high < 0.0
    assert change.n == 4 * TASKS
    text = table(
        rows, {"cascade": 1.0, "mixed": 0.5}, {"cascade": {0.5: 0.7, 1.0: 0.75}, "mixed": {0.5: 0.66, 1.0: 0.6}}
    )
    assert "| strategy | mean | against cascade | math | mcqa | tokens after SFT |" in text
    assert "| 80.0 | 70.0 | 4,000 | 100% | 1,000 | 80 | 10 | x 1 |" in text
    assert "| 60.0 | 70.0 | 4,200 | 105% | 1,200 | 80 | 10 | x 0.5 |" in text
    assert "| mixed | 66.0 | 60.0 |" in text
    assert "Seeds 1, 2;" in text
    same = table([rows[0], Row("average", rows[0].results)], {"cascade": 1.0, "average": 1.0}, {})
    assert "+0.0 (+0.0 to +0.0, does not show)" in same
    assert select_mean(rows[0].results[0]) == pytest.approx(0.7)


def test_the_kept_step_nearest_to_the_budget(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    lines = [
        {"step": index, "rollouts": 8.0, "groups": 2.0, "tokens": 40.0, "packed_tokens": 60.0} for index in range(10)
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [nearest_step(folder, tokens, [2, 4, 6, 8, 10]) for tokens in (0, 290, 310, 5000)] == [2, 2, 4, 10]
    with pytest.raises(UserError, match="no line of step 12"):
        nearest_step(folder, 100, [2, 12])
    assert kept_steps(10) == list(range(1, 10))
    assert len(kept_steps(400)) == 39 and kept_steps(400)[:2] == [10, 20]


@pytest.mark.slow
def test_all_strategies_at_the_smallest_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps a stage by the real runner; a second call trains and measures nothing again."""
    command = ["--seeds", "3", "--factors", "1", "--scale", "0.006", "--hardware", "cpu1", "--out", str(tmp_path)]
    assert main(command) == 0
    first = capsys.readouterr()
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["strategy"] for row in rows] == list(STRATEGIES)
    assert all(len(row["report"]) == 10 for row in rows)
    tokens = {row["strategy"]: row["tokens"] for row in rows}
    assert tokens["average"] < tokens["experts_mopd"] <= 1.1 * tokens["cascade"]
    assert [line for line in first.out.splitlines() if line.startswith("| sft_on_rollouts |")]
    assert first.err.count("] sft: finished in ") == 1  # all strategies share it
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert ": finished in " not in again.err
