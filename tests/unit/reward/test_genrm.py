"""Pairwise comparisons: verdicts read, matches played over HTTP, and the aggregation against numbers by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest

from nemo_cascade.reward.genrm import (
    NEUTRAL,
    Answer,
    GenRMOptions,
    Verdict,
    base_scores,
    comparison_messages,
    grade_group,
    length_weights,
    pairs,
    parse_verdict,
    with_length_terms,
)
from nemo_cascade.reward.judge import Judge
from nemo_cascade.types import Invalid, Scored, UserError
from tests.unit.reward.judging import JudgeServer

ASK = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"score_1": 4, "score_2": 2, "ranking": 2}', Verdict(4, 2, 2)),
        ('text {"score_1": 1, "score_2": 2} then {"score_1": 5, "score_2": "3", "ranking": 1}', Verdict(5, 3, 1)),
        ('{"rubric": [1], "overall": {"score_1": 3, "score_2": 3, "ranking": 5}}', Verdict(3, 3, 5)),
        (
            '```json\n{"score_1": 2, "score_2": 4, "ranking": 5}\n``` {"score_1": 5, "score_2": 1, "ranking": 1}',
            Verdict(5, 1, 1),  # whatever was quoted before, fenced or not
        ),
        ('{"score_1": 4, "score_2": 2}', Verdict(4, 2, 3.5)),
        ('{"score_1": 400, "score_2": 2, "ranking": 2}', None),
        ('{"score_1": NaN, "score_2": 2, "ranking": 2}', None),
        ('{"score_1": 1' + "0" * 400 + ', "score_2": 2, "ranking": 2}', None),
        ('{"score_1": "nan", "score_2": 2, "ranking": 2}', None),
        ('{"score": 4}', None),
        ("4 to 2", None),
        ("{" * 5000, None),
    ],
)
def test_parse_verdict(text: str, verdict: Verdict | None) -> None:
    assert parse_verdict(text) == verdict


def test_pairs() -> None:
    assert len(pairs(16, "all_pairs")) == 120
    assert pairs(3, "all_pairs") == [(0, 1), (0, 2), (1, 2)]
    assert pairs(3, "circular") == [(0, 1), (1, 2), (2, 0)]
    with pytest.raises(ValueError, match="at least 2"):
        pairs(1, "circular")
    with pytest.raises(UserError, match="unknown"):
        pairs(3, "random")  # type: ignore[arg-type]


def test_base_scores_and_tie_break() -> None:
    verdicts: list[Verdict | Invalid] = [Verdict(4, 2, 2), Verdict(3, 3, 5), Verdict(1, 5, 6)]
    # answer 0: 4 and 3 + (3.5 - 5) = 1.5 -> 2.75; answer 1: 2 and 1 -> 1.5; answer 2: 3 + 1.5 = 4.5 and 5 -> 4.75
    assert base_scores(pairs(3, "all_pairs"), verdicts, 3) == [2.75, 1.5, 4.75]
    verdicts[0] = Invalid("down")
    assert base_scores(pairs(3, "all_pairs"), verdicts, 3) == [1.5, 1.0, 4.75]
    assert base_scores([(0, 1)], [Invalid("down")], 2) == [None, None]
    assert base_scores([(0, 1)], [NEUTRAL], 2) == [3.0, 3.0]


def test_length_weights() -> None:
    assert length_weights([10, 10]) == [0.0, 0.0]
    assert length_weights([0, 50, 100]) == [0.5, 0.0, -0.5]
    assert length_weights([10, 20, 20, 20]) == [0.75, -0.25, -0.25, -0.25]


def test_length_terms_and_bonus_by_hand() -> None:
    answers = [Answer("a" * 10, "r" * 30), Answer("a" * 20, "r" * 20), Answer(" " + "a" * 30, "r" * 10)]
    # n = 3: int(0.6) - 1 < 0, so the threshold is the best score, 4.0. Shortest reasoning is answer 2 (1.0 < 4.0: no
    # bonus), shortest answer is answer 0 (4.0: +0.5). Weights: reasoning (-.5, 0, .5), answer (.5, 0, -.5): they
    # cancel at equal coefficients.
    assert with_length_terms([4.0, 2.0, 1.0], answers, GenRMOptions()) == [4.5, 2.0, 1.0]
    only_answer = GenRMOptions(
        reasoning_bonus=0, answer_bonus=0, reasoning_length_coefficient=0, answer_length_coefficient=0.5
    )
    assert with_length_terms([4.0, 2.0, 1.0], answers, only_answer) == [4.25, 2.0, 0.75]
    # n = 10: int(2.0) - 1 = 1, the second best score is the threshold.
    ten = [Answer("a" * (10 - index)) for index in range(10)]
    flat = GenRMOptions(reasoning_length_coefficient=0, answer_length_coefficient=0)
    scores = [1.0] * 8 + [5.0, 4.0]
    assert with_length_terms(scores, ten, flat)[9] == 4.5
    scores = [5.0, 4.5] + [1.0] * 7 + [4.0]
    assert with_length_terms(scores, ten, flat) == scores


def test_an_empty_part_earns_no_bonus() -> None:
    answers = [Answer(""), Answer("aaaa")]
    options = GenRMOptions(reasoning_length_coefficient=0, answer_length_coefficient=0)
    assert with_length_terms([3.0, 3.0], answers, options) == [3.0, 3.5]


def test_messages_of_both_kinds() -> None:
    native = comparison_messages(ASK, "one", " ", native_roles=True, principle="be kind")
    assert [message["role"] for message in native] == ["user", "principle", "response_1", "response_2"]
    assert native[-1]["content"] == "None"
    (plain,) = comparison_messages(ASK, "one", "two", native_roles=False)
    assert "user: hello" in plain["content"]
    assert plain["content"].index("\none\n") < plain["content"].index("\ntwo\n")


def _length_judge(messages: list[dict[str, str]]) -> str:
    first, second = (len(message["content"]) for message in messages[-2:])
    scores = (4, 2, 2) if first > second else (2, 4, 5) if first < second else (3, 3, 3.5)
    return json.dumps(dict(zip(("score_1", "score_2", "ranking"), scores, strict=True)))


def test_a_group_is_graded_over_http() -> None:
    options = GenRMOptions(
        reasoning_bonus=0, answer_bonus=0, reasoning_length_coefficient=0, answer_length_coefficient=0
    )
    answers = [Answer("x"), Answer("xxx"), Answer("xx")]
    with JudgeServer(_length_judge) as server, Judge(server.url, "nano", timeout_s=10) as judge:
        outcomes = grade_group(judge, ASK, answers, options)
        assert server.calls == 3
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Scored)] == [2.0, 4.0, 3.0]


FLAT = GenRMOptions(reasoning_length_coefficient=0, answer_length_coefficient=0, answer_bonus=0)


def _puzzled(*words: str) -> Callable[[list[dict[str, str]]], str]:
    """Scores 2 to 5 for the second of each pair; no idea where both texts are among `words`."""

    def reply(messages: list[dict[str, str]]) -> str:
        both = [message["content"] for message in messages[-2:]]
        return "no idea" if set(both) <= set(words) else '{"score_1": 2, "score_2": 5, "ranking": 6}'

    return reply


def test_an_unreadable_match_is_asked_again_then_dropped_and_counted() -> None:
    """Pairs wx wy wz xy xz yz; yz cannot be read. Means: w 2, x (5+2+2)/3, y (5+5)/2, z (5+5)/2."""
    with JudgeServer(_puzzled("y", "z")) as server, Judge(server.url, "nano", timeout_s=10) as judge:
        outcomes = grade_group(judge, ASK, [Answer(text) for text in "wxyz"], FLAT)
        assert server.calls == 5 + 4  # the first and three more
    assert outcomes == [
        Scored(2.0, {"base": 2.0, "matches": 3.0, "dropped": 0.0}, "mean of 3 comparisons"),
        Scored(3.0, {"base": 3.0, "matches": 3.0, "dropped": 0.0}, "mean of 3 comparisons"),
        Scored(5.0, {"base": 5.0, "matches": 2.0, "dropped": 1.0}, "mean of 2 comparisons"),
        Scored(5.0, {"base": 5.0, "matches": 2.0, "dropped": 1.0}, "mean of 2 comparisons"),
    ]


def test_too_few_matches_are_no_reward() -> None:
    """Of w's pairs only wz can be read: w keeps 1 of 3 where 2 are needed; x, y and z keep 2 or 3."""

    def reply(messages: list[dict[str, str]]) -> str:
        both = {message["content"] for message in messages[-2:]}
        return "no idea" if "w" in both and "z" not in both else '{"score_1": 2, "score_2": 5, "ranking": 6}'

    with JudgeServer(reply) as server, Judge(server.url, "nano", timeout_s=10) as judge:
        outcomes = grade_group(judge, ASK, [Answer(text) for text in "wxyz"], FLAT)
        assert outcomes[0] == Invalid(
            "2 of 3 matches were dropped, 2 must be decided: the judge's answer held no scores in 4 attempts"
        )
        assert [outcome.reward for outcome in outcomes[1:] if isinstance(outcome, Scored)] == [2.0, 3.5, 5.0]
        calls = server.calls
        kept = grade_group(judge, ASK, [Answer(text) for text in "wxyz"], dataclasses.replace(FLAT, min_match_share=0))
        assert kept[0] == Scored(2.0, {"base": 2.0, "matches": 1.0, "dropped": 2.0}, "mean of 1 comparisons")
        assert server.calls == calls + 2 * 4  # what was read is not asked again, what was not is


def test_unreadable_as_neutral() -> None:
    """NeMo-Gym's rule: 3.0, 3.0, 3.5. The pair yz counts three for both."""
    options = dataclasses.replace(FLAT, on_unreadable="neutral", attempts=1)
    with JudgeServer(_puzzled("y", "z")) as server, Judge(server.url, "nano", timeout_s=10) as judge:
        outcomes = grade_group(judge, ASK, [Answer(text) for text in "wxyz"], options)
    assert outcomes[3] == Scored(13 / 3, {"base": 13 / 3, "matches": 3.0, "dropped": 0.0}, "mean of 3 comparisons")


def test_a_model_without_the_roles_is_told_how_to_go_on() -> None:
    with JudgeServer(lambda _: "unknown role", status=400) as server, Judge(server.url, "chat", timeout_s=10) as judge:
        native = grade_group(judge, ASK, [Answer("x"), Answer("y")])
        plain = grade_group(judge, ASK, [Answer("x"), Answer("y")], GenRMOptions(native_roles=False))
    assert native[0].reason.endswith("needs judge.native_roles: false")
    assert "native_roles" not in plain[0].reason and "HTTP 400" in plain[0].reason


def test_a_judge_that_only_talks_rubbish_invalidates_the_group() -> None:
    with JudgeServer(lambda _: "no idea") as server, Judge(server.url, "nano", timeout_s=10) as judge:
        outcomes = grade_group(judge, ASK, [Answer("x"), Answer("y")], GenRMOptions())
        assert server.calls == 4
    assert outcomes == [Invalid("the judge's 1 answers hold no scores; is it a judge?")] * 2


def test_a_judge_that_is_down_invalidates_the_group() -> None:
    with Judge("http://127.0.0.1:9", "nano", timeout_s=0.5, retries=0) as judge:
        outcomes = grade_group(judge, ASK, [Answer("x"), Answer("y")], GenRMOptions())
    assert all(isinstance(outcome, Invalid) and "gave no answer" in outcome.reason for outcome in outcomes)


def test_swapping_cancels_a_position_bias() -> None:
    options = GenRMOptions(swap=True, reasoning_length_coefficient=0, answer_length_coefficient=0, answer_bonus=0)
    verdict = json.dumps({"score_1": 5, "score_2": 1, "ranking": 1})
    with JudgeServer(lambda _: verdict) as server, Judge(server.url, "nano", timeout_s=10) as judge:
        outcomes = grade_group(judge, ASK, [Answer("x"), Answer("y")], options)
        assert server.calls == 2
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Scored)] == [3.0, 3.0]
