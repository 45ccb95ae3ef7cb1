"""Math's fallback: what algebra finds unequal goes to the equivalence judge, in both orders, and nothing else does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest

from nemo_cascade import domains
from nemo_cascade.domains import Services
from nemo_cascade.domains.math import UNDECIDED, Math
from nemo_cascade.reward import math_equal
from nemo_cascade.reward.judge import Judge
from nemo_cascade.reward.math_equal import MathGrader
from nemo_cascade.types import Invalid, Message, Outcome, Scored, Transcript, UserError
from tests.unit.reward.judging import JudgeServer

ROW = {"prompt": "How many?\nAnswer in a box.", "question": "How many?", "expected_answer": "42 apples"}
SUM = {**ROW, "expected_answer": "5050"}


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(workers=1) as shared:
        yield shared


def scored(grader: MathGrader, row: dict[str, str], boxed: str, judge: Judge | None, on: bool = True) -> Outcome:
    domain = domains.load("math", Services(math=grader, equivalence_judge=judge), {"judge": on})
    task = domain.parse_row(row, "f:1")
    return domain.score(task, Transcript((Message("assistant", f"So \\boxed{{{boxed}}}"),)))


def test_words_are_the_judges_and_it_is_asked_in_both_orders(grader: MathGrader) -> None:
    asked: list[str] = []

    def reply(messages: list[dict[str, str]]) -> str:
        asked.append(messages[0]["content"])
        return "CORRECT" if r"\text{forty-two apples}" in messages[0]["content"] else "INCORRECT"

    with JudgeServer(reply) as server, Judge(server.url, "chat", timeout_s=20) as judge:
        right = scored(grader, ROW, r"\text{forty-two apples}", judge)
        assert right == Scored(1.0, {"judge_attempts": 1.0, "judge": 1.0}, "not equal; the judge: CORRECT")
        assert scored(grader, ROW, r"\text{forty-two apples}", judge) == right
        assert len(asked) == 2  # the second time it remembers
        wrong = scored(grader, ROW, r"\text{forty apples}", judge)
        assert wrong == Scored(0.0, {"judge_attempts": 1.0, "judge": 1.0}, "not equal; the judge: INCORRECT")
        assert len(asked) == 3  # one order is enough to refuse
        off = scored(grader, ROW, r"\text{forty-two apples}", judge, on=False)
        assert (off.reward, len(asked)) == (0.0, 3)
    assert all("Question:\nHow many?\nAnswer in a box.\n" in prompt for prompt in asked)
    first, second = (prompt.index("42 apples") < prompt.index("forty-two") for prompt in asked[:2])
    assert (first, second) == (True, False)
    assert "fficial" not in asked[0]  # nothing says which of the two is which


@pytest.mark.parametrize(
    ("row", "boxed", "reward", "reason"),
    [
        (ROW, "42 apples", 1.0, "same text"),
        (SUM, "5051", 0.0, "integers compared"),
        (SUM, "10100/2", 1.0, "equal by algebra"),
        (SUM, r"\sum_{k=1}^{100} k", 0.0, "a limit, integral, sum or product that is not worked out"),
        (SUM, "9^{9^{9^{9}}}", 0.0, "answer too large to compare: a number of more than 10000 digits"),
        (SUM, "it is what the question asks for, " * 9, 0.0, "answer too long to compare"),
        ({**ROW, "expected_answer": r"\int_0^1 x dx"}, r"\sum_{k=1}^{9} k", 0.0, "not equal"),
        (SUM, "", 0.0, "empty answer"),
    ],
)
def test_what_is_decided_is_never_asked(
    grader: MathGrader, row: dict[str, str], boxed: str, reward: float, reason: str
) -> None:
    with JudgeServer(lambda _: "CORRECT") as server, Judge(server.url, "chat", timeout_s=20) as judge:
        assert scored(grader, row, boxed, judge) == Scored(reward, reason=reason)
        assert server.calls == 0


@pytest.mark.parametrize(
    ("reply", "status", "why"),
    [
        (lambda _: "they look alike", 200, "neither CORRECT nor INCORRECT"),
        (lambda _: "down", 503, "HTTP 503"),
        (lambda _: "no", 400, "HTTP 400"),
    ],
)
def test_a_judge_without_a_verdict_makes_the_answer_invalid(
    grader: MathGrader, reply: Callable[[object], str], status: int, why: str
) -> None:
    with JudgeServer(reply, status=status) as server, Judge(server.url, "chat", timeout_s=20, retries=0) as judge:
        outcome = scored(grader, ROW, "forty-two", judge)
        assert isinstance(outcome, Invalid) and why in outcome.reason


def test_without_a_judge_the_answer_is_invalid_and_says_why(grader: MathGrader) -> None:
    outcome = scored(grader, ROW, "forty-two", None)
    assert outcome == Invalid(
        "option judge of domain math needs a judge; set equivalence_judge.url or .serve in the cascade file"
    )
    with pytest.raises(UserError, match=r"data\.options\.math\.judge: 'yes' is not true or false"):
        Math(None, {"judge": "yes"})


def test_the_graders_reasons_are_those_that_the_domain_knows() -> None:
    source = inspect.getsource(math_equal)
    assert all(f'"{reason}' in source for reason in UNDECIDED)
