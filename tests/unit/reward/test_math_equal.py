"""Math answers: extraction, equality, and answers made to hang the grader."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade.reward.math_equal import MathGrader, extract_boxed, is_runaway, normalized
from nemo_cascade.types import Invalid, Scored


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(workers=1, cpu_seconds=1.0) as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{37}", "37"),
        (r"first \boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{3} and an unclosed \boxed{4", "3"),
        (r"\boxed {5}", "5"),
        ("the answer is 7", None),
        (r"\boxed 7", None),
    ],
)
def test_last_balanced_box(text: str, answer: str | None) -> None:
    assert extract_boxed(text) == answer


def test_normalization_keeps_meaning() -> None:
    assert normalized(r"\( 1{,}000 \)") == "1000"
    assert normalized("$12,345,678.$") == "12345678"
    assert normalized("(1,2)") == "(1,2)"
    assert normalized("(1,234)") == "(1234)"
    assert normalized(r"\text{the sun}") == "thesun"


@pytest.mark.parametrize(
    ("expected", "answer", "reward"),
    [
        ("37", "37", 1.0),
        ("37", "38", 0.0),
        ("37", "037", 1.0),
        ("1/2", "0.5", 1.0),
        (r"\frac{1}{2}", r"\dfrac12", 1.0),
        (r"\sqrt{8}", r"2\sqrt{2}", 1.0),
        (r"\{1, 2\}", r"\{2, 1\}", 1.0),
        (r"x^2+2x+1", "(x+1)^2", 1.0),
        (r"\(\frac{333}{1997}\)", r"\frac{83}{499}", 0.0),
        ("3", r"3 \text{ or } 4", 0.0),
        ("5", "", 0.0),
    ],
)
def test_equality(grader: MathGrader, expected: str, answer: str, reward: float) -> None:
    outcome = grader.grade(expected, f"So the answer is \\boxed{{{answer}}}.")
    assert isinstance(outcome, Scored)
    assert outcome.reward == reward, outcome.reason


def test_no_box_no_reward(grader: MathGrader) -> None:
    assert grader.grade("37", "37") == Scored(0.0, reason="no boxed answer")


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "(123456789)!", "9^9^9", "1" * 500, "2^{100000}", "5!!"])
def test_towers_are_refused_before_any_algebra(answer: str) -> None:
    assert is_runaway(answer)
    outcome = MathGrader().grade("3", f"\\boxed{{{answer}}}")
    assert isinstance(outcome, Scored)
    assert outcome.reward == 0.0


@pytest.mark.parametrize(
    "answer", ["x^2+y^2", "2^{10}", "(x+1)^2(x-1)^3", "10!", r"\frac{x^2}{y^3}", "e^{x}+e^{-x}", r"\sqrt[3]{2}^2"]
)
def test_ordinary_powers_are_compared(answer: str) -> None:
    assert not is_runaway(answer)


def test_a_runaway_comparison_is_wrong_not_invalid_and_the_next_one_works(grader: MathGrader) -> None:
    started = time.monotonic()
    outcome = grader.equal("x", r"\int_0^1 \sin(\sin(\sin(\sin(x))))\cos(x^5)\tan(x^3) dx")
    assert isinstance(outcome, Scored)
    assert outcome.reward == 0.0
    assert time.monotonic() - started < 20
    after = grader.equal("1/2", "0.50")
    assert isinstance(after, Scored)
    assert after.reward == 1.0


def test_cpu_allowance_ends_a_c_level_loop(grader: MathGrader) -> None:
    worker = grader._start()
    try:
        with pytest.raises(EOFError):
            worker.ask("1", "9^{9^{9^{9}}}", 20.0)
        assert worker.ended_by_cpu()
    finally:
        worker.kill()


def test_wall_clock_expiry_is_invalid() -> None:
    with MathGrader(workers=1, cpu_seconds=30.0, wall_seconds=0.3) as slow:
        outcome = slow._ask("1", "9^{9^{9^{9}}}")
    assert isinstance(outcome, Invalid)
    assert "wall time" in outcome.reason


def test_threads_share_the_workers(grader: MathGrader) -> None:
    rewards: list[float] = [0.0] * 8

    def work(index: int) -> None:
        outcome = grader.equal(f"{index}/7", f"\\frac{{{2 * index}}}{{14}}")
        assert isinstance(outcome, Scored)
        rewards[index] = outcome.reward

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == [1.0] * 8


def test_recorded_rewards() -> None:
    folder = os.environ.get("NEMO_CASCADE_DATA")
    if not folder:
        pytest.skip("NEMO_CASCADE_DATA is not set")
    rows = [json.loads(line) for line in (Path(folder) / "gym/math_with_judge.example_rollouts.jsonl").open()]
    with MathGrader(workers=1, cpu_seconds=10.0) as grader:
        outcomes = [
            grader.grade(row["expected_answer"], row["response"]["output"][-1]["content"][0]["text"]) for row in rows
        ]
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Scored)] == [
        row["library_reward"] for row in rows
    ]
