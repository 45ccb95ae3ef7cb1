"""Math answers: extraction, equality, and answers made to hang the grader."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade.cascade.attacks.answers import MATH
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


TOWERS = (
    *("9^{9^{9^{9}}}", "(123456789)!", "9^9^9", "1" * 500, "2^{100000}", "10!!", "99^{9999}", r"\sin(99^{9999})"),
    *("(x+1)^{999}", "(x+y)^{99}", "10^{10^{10}}", "9" + "\u2079" * 6, "1E99999999", r"{10^9 \choose 10^8}"),
    *("7^{99 999 999}", "(99999999)_{9}", r"\binom{1/2}{10^{20}}", "x^{10^{300}}^{10^{300}}(x+y)^{99}"),
    *(r"\sum_{k=1}^{9} k", r"\intx^xdx", r"\frac{x^{9999}-1}{x-1}", "(n+50)!"),
)


@pytest.mark.parametrize("answer", TOWERS)
def test_towers_are_refused_before_any_algebra(answer: str) -> None:
    assert is_runaway(answer)
    grader = MathGrader()
    outcome = grader.grade("3", f"\\boxed{{{answer}}}")
    assert isinstance(outcome, Scored)
    assert outcome.reward == 0.0
    assert list(grader._slots.queue) == [None, None], "no worker was started"


@pytest.mark.parametrize(
    "answer",
    [
        *("x^2+y^2", "2^{10}", "(x+1)^2(x-1)^3", "10!", r"\frac{x^2}{y^3}", "e^{x}+e^{-x}", r"\sqrt[3]{2}^2"),
        *("2^{100}", "10^{50}", "1000!", "2024^{2023}-1", "(x+1)^5", "2^{2^{10}}", "e^{x^2}", "x^{2024}-1"),
        *(r"\binom{2024}{1012}", r"\frac{2023!}{2^{1011}1011!}", "(x-1)(x-2)(x-3)(x-4)(x-5)(x-6)(x-7)(x-8)"),
        *(r"\frac{-b\pm\sqrt{b^2-4ac}}{2a}", r"\frac{(2n)!}{n!(n+1)!}", r"\frac{x^{n+1}-1}{x-1}", "6.02e23"),
        *(r"1+\frac{1}{2+\frac{1}{3+\frac{1}{4+\frac{1}{5}}}}", r"\sqrt{2+\sqrt{2+\sqrt{2+\sqrt{2}}}}", "60^\\circ"),
        *(r"\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}", r"\sin^2\theta+\cos^4\theta", r"\frac{1}{1+\sqrt{2}+\sqrt{3}}"),
        *(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"(-\infty,2)\cup(3,\infty)", r"\{1,2,3,5,7,11,13,17,19,23,29\}"),
    ],
)
def test_ordinary_answers_are_compared(answer: str) -> None:
    assert not is_runaway(answer)


def test_values_at_a_point_tell_expressions_apart_before_they_are_simplified() -> None:
    """Only where math-verify could not call them equal: never for texts, symbols, sets, relations and percentages."""
    from nemo_cascade.reward.math_worker import _parse, differ

    def apart(wanted: str, given: str) -> bool:
        return differ(_parse(wanted)[0], _parse(given)[0])

    for wanted, given in (("42", "(x+1)^{99}"), ("x^2", "x^3"), (r"\sin(5)", r"\sqrt2"), ("2^{99}", "2^{99}-7^{50}")):
        assert apart(wanted, given), given
    for wanted, given in (
        *(("x+1", r"\frac{x^2+x}{x}"), ("0.333333", r"\frac{1}{3}"), ("10^{50}", "10^{50}+1"), ("9", r"9\%")),
        *(("1", "(10^{500}+1)-10^{500}"), ("x", "y"), ("1", r"\int_0^1 2 dx"), ("f(x)", "f(x)+1"), (r"\{1,2\}", "3")),
        *(("x=5", "6"), ("x<1", "x<2"), (r"\infty", "5"), (r"\begin{pmatrix}1\end{pmatrix}", "2")),
    ):
        assert not apart(wanted, given), given


def test_an_expected_tower_is_compared_as_text() -> None:
    """Nobody works it out: not for the answer that spells it alike, and not for another one."""
    grader = MathGrader()
    for answer, reward in (
        ("9^{9^{9^{9}}}", 1.0),
        (r"\left( 9^{9^{9^9}} \right)", 0.0),
        (r" 9 ^ { 9^{9^9} }", 1.0),
        ("9**{9^{9^9}}", 1.0),
        ("9^{9^{9^{8}}}", 0.0),
        ("42", 0.0),
        (r"\frac{1}{2}", 0.0),
    ):
        outcome = grader.equal("9^{9^{9^{9}}}", answer)
        assert isinstance(outcome, Scored)
        assert outcome.reward == reward, f"{answer}: {outcome.reason}"
    assert grader.equal(r"2\cdot 9^{99999}-1", r"2\times9^{99999}-1").reward == 1.0
    assert list(grader._slots.queue) == [None, None], "no worker was started"


def test_large_numbers_are_compared_up_to_their_bound(grader: MathGrader) -> None:
    for expected, answer, reward in (
        ("2024^{2023}-1", "-1+2024^{2023}", 1.0),
        ("2024^{2023}-1", "1-2024^{2023}", 0.0),
        ("1000!", r"1000 \cdot 999!", 1.0),
        ("x^{2024}-1", "(x^{1012}-1)(x^{1012}+1)", 1.0),
        (r"\frac{(1+\sqrt5)^{60}-(1-\sqrt5)^{60}}{2^{60}\sqrt5}", "1548008755920", 1.0),
        (r"\frac{(1+\sqrt5)^{60}-(1-\sqrt5)^{60}}{2^{60}\sqrt5}", "1548008755921", 0.0),
        ("(x+1)^{2023}", "(1+x)^{2023}", 1.0),
        ("(x+1)^{2023}", "(2+x)^{2023}", 0.0),
        ("1" * 5000, "1" * 4999 + "2", 0.0),
        ("1" * 5000, "0" + "1" * 5000, 1.0),
        ("0", "-0", 1.0),
        ("-7", "+7", 0.0),
    ):
        outcome = grader.equal(expected, answer)
        assert isinstance(outcome, Scored)
        assert outcome.reward == reward, f"{expected[:20]} {answer[:20]}: {outcome.reason}"


def test_the_bound_on_digits_holds_above_and_below_a_fraction_bar_each(grader: MathGrader) -> None:
    """Together they may have twice as many: that costs no more than one integer of the length."""
    for expected, answer, reward in (
        (r"1-\frac{1}{2024!}", r"\frac{2024!-1}{2024!}", 1.0),
        (r"1-\frac{1}{2024!}", r"\frac{2024!-2}{2024!}-1", 0.0),
        (r"\binom{2024}{1012}", r"\frac{2024!}{1012!\cdot 1012!}", 1.0),
        (r"\binom{2024}{1012}", r"\frac{2024!}{1012!\cdot 1011!}", 0.0),
    ):
        outcome = grader.equal(expected, answer)
        assert isinstance(outcome, Scored)
        assert outcome.reward == reward, f"{answer}: {outcome.reason}"
    worker = grader._slots.queue[0]
    large = r"\frac{7^{11800}}{3^{20900}}"  # 9,973 digits above and 9,972 below
    for answer in (large, rf"\sin({large})", rf"\log({large})", rf"{large}x+\sin(x)", rf"\lfloor{large}\rfloor"):
        outcome = grader.equal("42", answer)
        assert isinstance(outcome, Scored)
        assert outcome.reason == "not equal", answer
    assert grader._slots.queue[0] is worker, "within the allowance"
    for answer in (r"\frac{7^{12000}}{3}", r"\frac{7}{3^{21000}}", r"\frac{1}{9^{9^{9}}}", rf"{large}\cdot{large}"):
        assert is_runaway(answer), answer


def test_no_attack_of_the_battery_uses_up_a_worker(grader: MathGrader) -> None:
    """What the guard lets through is compared within the allowance: one answer costs nobody a new worker."""
    assert grader.equal("1/2", "0.5").reward == 1.0
    worker = grader._slots.queue[0]
    for name, text in MATH.items():
        outcome = grader.grade("42", text)
        assert isinstance(outcome, Scored), name
        assert outcome.reward == 0.0, name
    assert grader._slots.queue[0] is worker


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
