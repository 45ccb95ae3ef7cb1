"""The reward benchmark measures what it says: rewards are checked while they are timed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nemo_cascade.cascade.attacks.answers import MATH
from nemo_cascade.reward.math_equal import MathGrader
from nemo_cascade.types import Scored
from tools.bench import rewards


def test_a_batch_gets_the_rewards_it_must_in_any_order() -> None:
    wanted = {index: rewards.submission(index)[2] for index in (0, 1, 2, 3, 4, 255)}
    assert wanted == {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0, 4: 0.0, 255: 0.0}
    first, seconds = rewards.score_all(list(wanted))
    again, _ = rewards.score_all(list(reversed(wanted)))
    assert first == again
    assert {index: outcome.reward for index, outcome in first.items()} == wanted
    assert seconds > 0


def test_each_way_of_running_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "SUBMISSIONS_A_ROUND", 1)
    monkeypatch.setattr(rewards, "OTHERS_A_ROUND", 2)
    assert rewards.ours() > 0
    assert rewards.a_process_each(()) > 0
    assert rewards.a_process_each(rewards.bubblewrap_prefix()) > 0
    monkeypatch.setattr(rewards, "SOURCE", "print(0)")
    with pytest.raises(SystemExit, match="other answers"):
        rewards.ours()
    with pytest.raises(SystemExit, match="another answer"):
        rewards.a_process_each(())


def test_another_outcome_in_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(({0: Scored(1.0), 1: Scored(0.0)}, {1: Scored(0.0), 0: Scored(1.0, reason="other")}))
    monkeypatch.setattr(rewards, "score_all", lambda indices: (next(runs), 1.0))
    with pytest.raises(SystemExit, match="another order changed 1 outcomes"):
        rewards.batch(2)


def test_every_answer_of_the_battery_is_measured_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def count(grader: object, hostile: Sequence[str]) -> tuple[float, float]:
        seen.extend(hostile)
        return (2.0, 0.5) if hostile else (1.0, 0.0)

    monkeypatch.setattr(rewards, "math_seconds", count)
    found = rewards.math_totals(2)
    assert sorted(seen) == sorted([*MATH.values(), *MATH.values()])
    assert found["with_pathological"] == 2 * found["plain"] == 2 * found["rounds"]
    assert found["slowest"] == 0.5
    monkeypatch.undo()
    monkeypatch.setattr(rewards, "MATH_CHECKS", 8)
    with MathGrader(workers=1) as grader:
        assert min(rewards.math_seconds(grader, [])) == 0.0
        monkeypatch.setattr(rewards, "HOSTILE_SHARE", 4)
        seconds, slowest = rewards.math_seconds(grader, ["\\boxed{9^{9^{9}}}", "\\boxed{x}"])
        assert 0 < slowest <= seconds
        with pytest.raises(SystemExit, match="must get 0"):
            rewards.math_seconds(grader, ["\\boxed{\\frac{3}{4}}"])
