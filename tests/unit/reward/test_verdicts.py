"""What a judge has decided is asked once: which questions are equal, what is kept, who waits."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest

from nemo_cascade.reward import verdicts
from nemo_cascade.reward.genrm import (
    Answer,
    GenRMOptions,
    Verdict,
    compare,
    comparison_messages,
    grade_group,
)
from nemo_cascade.reward.judge import (
    Judge,
    grade_equivalence,
)
from nemo_cascade.reward.verdicts import Verdicts, question_key
from nemo_cascade.types import Invalid, Scored
from tests.unit.reward.judging import JudgeServer

ASK = [{"role": "user", "content": "hello"}]


def test_who_waits_for_an_equal_question_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, release = threading.Event(), threading.Event()

    def stuck() -> Verdict:
        asked.set()
        release.wait(60)
        return Verdict(4, 2, 1)

    monkeypatch.setattr(verdicts, "GRACE_S", 0.2)
    kept = Verdicts()
    first = threading.Thread(target=kept.once, args=("key", stuck, 60.0))
    first.start()
    assert asked.wait(30)
    assert kept.once("key", stuck, 0.1) == Invalid("waited 0.3 s for the judge's answer to an equal question")
    release.set()
    first.join()
    assert kept.once("key", stuck, 0.1) == Verdict(4, 2, 1)


def test_a_verdict_is_kept_an_invalid_one_and_the_oldest_are_not() -> None:
    kept = Verdicts(most=2)
    given = iter([Invalid("down"), *(Verdict(score, 3, 3) for score in (1, 2, 3, 4, 5))])

    def ask() -> Verdict | Invalid:
        return next(given)

    assert kept.once("a", ask, 1.0) == Invalid("down")
    assert [kept.once("a", ask, 1.0) for _ in range(3)] == [Verdict(1, 3, 3)] * 3
    assert [kept.once(key, ask, 1.0) for key in "bc"] == [Verdict(2, 3, 3), Verdict(3, 3, 3)]
    assert len(kept) == 2
    assert kept.once("a", ask, 1.0) == Verdict(4, 3, 3)  # it had to go for c
    with pytest.raises(ZeroDivisionError):
        kept.once("d", lambda: 1 // 0, 1.0)  # type: ignore[arg-type, return-value]
    assert kept.once("d", ask, 1.0) == Verdict(5, 3, 3)


def test_a_key_is_all_that_decides_a_verdict() -> None:
    """Another model, message, order, role or sampling parameter is another question; equal ones are asked once."""
    asked: list[object] = []

    def reply(messages: list[dict[str, str]]) -> str:
        asked.append(messages)
        return json.dumps({"score_1": 1 + len(asked) % 5, "score_2": 1, "ranking": 1})

    base = GenRMOptions(attempts=1)
    with JudgeServer(reply) as server, Judge(server.url, "a", timeout_s=10) as judge:
        others = ({"temperature": 0.0}, {"max_tokens": 8}, {"top_p": 1.0}, {"native_roles": False})
        for options in (base, *(dataclasses.replace(base, **other) for other in others)):
            again = [
                compare(judge, comparison_messages(ASK, first, second, options.native_roles), options)
                for first, second in (("x", "y"), ("y", "x"), ("x", "y"))
            ]
            assert again[0] == again[2] != again[1]
        assert len(asked) == server.calls == 10
    assert question_key("a", {"messages": ["x"]}) != question_key("b", {"messages": ["x"]})


def test_equal_answers_of_a_group_are_compared_once_with_any_endpoint() -> None:
    """Temperature 0.6, a judge that throws dice: three x and two y meet in ten pairs, three of them different."""
    dice = iter(range(1, 100))
    with (
        JudgeServer(lambda _: f'{{"score_1": {1 + next(dice) % 5}, "score_2": 3, "ranking": 2}}') as server,
        Judge(server.url, "hosted", timeout_s=10) as judge,
    ):
        answers = [Answer(text) for text in "xxxyy"]
        first = grade_group(judge, ASK, answers)
        assert server.calls == 3  # xx, xy, yy
        assert grade_group(judge, ASK, answers) == first  # as the scorer, which asks again
        assert server.calls == 3


def test_an_equivalence_is_asked_once() -> None:
    with JudgeServer(lambda _: "CORRECT") as server, Judge(server.url, "hosted", timeout_s=10) as judge:
        found = [grade_equivalence(judge, "q", "a", text) for text in "xxyx"]
        assert found == [Scored(1.0, {"judge_attempts": 1.0}, "CORRECT")] * 4
        assert server.calls == 2
