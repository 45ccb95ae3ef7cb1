"""The judge client against a real HTTP server, and the pairwise aggregation against numbers worked out by hand."""

from __future__ import annotations

import json
import re
import threading
import time

import pytest

from nemo_cascade.reward import preference_judge
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
from nemo_cascade.reward.judge import (
    GONE_AFTER,
    Judge,
    _content,
    answer_mark,
    grade_equivalence,
    parse_equivalence,
)
from nemo_cascade.types import Invalid, Scored, UserError
from tests.unit.reward.judging import JudgeServer

ASK = [{"role": "user", "content": "hello"}]


def test_answer_without_its_thinking() -> None:
    with JudgeServer(lambda messages: f"<think>\nhm\n</think>\n{messages[-1]['content']}!") as server:
        for url in (server.url, server.url + "/v1", server.url + "/"):
            with Judge(url, "nano", timeout_s=10) as judge:
                assert judge.ask(ASK, 16) == "hello!"


def test_failures_are_retried() -> None:
    with (
        JudgeServer(lambda _: "fine", fail_first=2) as server,
        Judge(server.url, "nano", timeout_s=10, retries=3) as judge,
    ):
        assert judge.ask(ASK, 16) == "fine"
        assert server.calls == 3


def test_a_hanging_judge_is_invalid_within_the_deadline() -> None:
    with JudgeServer(lambda _: "late", delay=60) as server, Judge(server.url, "nano", timeout_s=0.5) as judge:
        started = time.monotonic()
        answer = judge.ask(ASK, 16)
        assert isinstance(answer, Invalid)
        assert "gave no answer within 0.5 s" in answer.reason
        assert time.monotonic() - started < 30


def test_a_judge_that_is_gone_is_not_asked_for_every_pair_again() -> None:
    """28 pairs, asked three times as the scorer does: 84 questions, of which two waves of threads reach the judge."""
    alive = threading.Event()

    def reply(messages: list[dict[str, str]]) -> str:
        alive.wait(60)
        return '{"score_1": 4, "score_2": 2, "ranking": 1}'

    answers = [Answer(f"answer {index}") for index in range(8)]
    options = GenRMOptions(attempts=1, workers=16)
    with JudgeServer(reply) as server, Judge(server.url, "nano", timeout_s=2.0, retries=0) as judge:
        for _ in range(3):
            outcomes = grade_group(judge, ASK, answers, options)
            assert all(isinstance(outcome, Invalid) for outcome in outcomes)
        assert 16 <= server.calls <= 40
        reasons = [outcome.reason for outcome in outcomes]
        gone = re.compile(r".* is gone: it answered none of its last \d+ questions in [\d.]+ s; .* again after 2 s")
        assert any(gone.fullmatch(reason) for reason in reasons), reasons
        alive.set()
        deadline = time.monotonic() + 60
        while isinstance(judge.ask(ASK, 16), Invalid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(isinstance(outcome, Scored) for outcome in grade_group(judge, ASK, answers, options))  # it came back


def test_a_judge_that_fails_now_and_then_is_not_gone() -> None:
    with (
        JudgeServer(lambda _: "fine", fail_first=GONE_AFTER - 1) as server,
        Judge(server.url, "nano", timeout_s=0.001, retries=0) as judge,
    ):
        judge.timeout_s = 10.0  # only its patience is short
        failed = [judge.ask(ASK, 16) for _ in range(GONE_AFTER - 1)]
        assert all(isinstance(answer, Invalid) and "HTTP 503" in answer.reason for answer in failed)
        assert judge.ask(ASK, 16) == "fine"


def test_who_waits_for_an_equal_question_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        timeout_s = 0.1

        def __init__(self) -> None:
            self.asked, self.release = threading.Event(), threading.Event()

        def ask(self, *question: object) -> str:
            self.asked.set()
            self.release.wait(60)
            return "late"

    monkeypatch.setattr(preference_judge, "GRACE_S", 0.2)
    stuck = Stuck()
    remembering = preference_judge._Remembering(stuck)  # type: ignore[arg-type]
    first = threading.Thread(target=remembering.ask, args=(ASK, 16))
    first.start()
    assert stuck.asked.wait(30)
    assert remembering.ask(ASK, 16) == Invalid("waited 0.3 s for the judge's answer to an equal question of the group")
    stuck.release.set()
    first.join()
    assert remembering.ask(ASK, 16) == "late"


def test_a_dribbling_judge_is_invalid_within_the_deadline() -> None:
    with (
        JudgeServer(lambda _: "x" * 1000, dribble=True) as server,
        Judge(server.url, "nano", timeout_s=0.6, retries=0) as judge,
    ):
        started = time.monotonic()
        assert isinstance(judge.ask(ASK, 16), Invalid)
        assert time.monotonic() - started < 30  # the whole answer takes 50 s


def test_client_errors_are_not_repeated() -> None:
    with JudgeServer(lambda _: "no", status=404) as server, Judge(server.url, "nano", timeout_s=10) as judge:
        answer = judge.ask(ASK, 16)
        assert isinstance(answer, Invalid)
        assert "HTTP 404" in answer.reason
        assert server.calls == 1


def test_a_url_without_scheme_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="must start with http"):
        Judge("localhost:8000", "nano")


def test_no_judge_at_all_is_invalid() -> None:
    with Judge("http://127.0.0.1:9", "nano", timeout_s=1.0, retries=1) as judge:
        assert isinstance(judge.ask(ASK, 16), Invalid)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("CORRECT", True),
        ("INCORRECT", False),
        ("Not CORRECT: INCORRECT.", False),
        ("It says CORRECT.\n**INCORRECT**\n", False),
        ("It says CORRECT, which", None),
        ("correct", None),
        ("yes", None),
    ],
)
def test_equivalence_words(text: str, verdict: bool | None) -> None:
    assert parse_equivalence(text) is verdict


def test_a_reply_cut_at_its_limit_is_no_verdict() -> None:
    assert _content('{"choices": [{"message": {"content": "It says CORRECT"}, "finish_reason": "length"}]}') == ""
    assert _content('{"choices": [{"message": {"content": "CORRECT"}, "finish_reason": "stop"}]}') == "CORRECT"


def test_no_answer_holds_its_own_mark() -> None:
    marks = {answer_mark("q", "a", text) for text in ("x", "y", answer_mark("q", "a", "x"))}
    assert len(marks) == 3
    assert answer_mark("q", "a", "x") in marks


def test_equivalence_grades() -> None:
    def reply(messages: list[dict[str, str]]) -> str:
        return "CORRECT" if "]\nthe sun\n[" in messages[0]["content"] else "INCORRECT"

    with JudgeServer(reply) as server, Judge(server.url, "nano", timeout_s=10) as judge:
        right = grade_equivalence(judge, "What heats water?", "the sun", "the sun")
        wrong = grade_equivalence(judge, "What heats water?", "the sun", "the moon")
    assert isinstance(right, Scored) and right.reward == 1.0
    assert isinstance(wrong, Scored) and wrong.reward == 0.0
    with JudgeServer(lambda _: "perhaps") as server, Judge(server.url, "nano", timeout_s=10) as judge:
        assert isinstance(grade_equivalence(judge, "q", "a", "b"), Invalid)
        assert server.calls == 3


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


def test_rubbish_is_asked_again_then_neutral_and_counted() -> None:
    options = GenRMOptions(reasoning_length_coefficient=0, answer_length_coefficient=0, answer_bonus=0)

    def puzzled_by_z(messages: list[dict[str, str]]) -> str:
        return "no idea" if "z" in str(messages) else '{"score_1": 2, "score_2": 5, "ranking": 6}'

    with JudgeServer(puzzled_by_z) as server, Judge(server.url, "nano", timeout_s=10) as judge:
        outcomes = grade_group(judge, ASK, [Answer("x"), Answer("y"), Answer("z")], options)
        assert server.calls == 1 + 2 * 3
    assert outcomes[2] == Scored(3.0, {"base": 3.0, "matches": 2.0, "unreadable": 1.0}, "mean of 2 comparisons")
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Scored)] == [2.5, 4.0, 3.0]


def test_a_judge_that_only_talks_rubbish_invalidates_the_group() -> None:
    with JudgeServer(lambda _: "no idea") as server, Judge(server.url, "nano", timeout_s=10) as judge:
        outcomes = grade_group(judge, ASK, [Answer("x"), Answer("y")], GenRMOptions())
        assert server.calls == 3
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
