"""The judge client against a real HTTP server: addresses, deadlines, rate limits, nonsense, keys and equivalence."""

from __future__ import annotations

import logging
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from nemo_cascade.reward.genrm import (
    Answer,
    GenRMOptions,
    grade_group,
)
from nemo_cascade.reward.judge import (
    Judge,
    _content,
    answer_mark,
    chat_endpoint,
    grade_equivalence,
    grade_sameness,
    parse_equivalence,
)
from nemo_cascade.reward.patience import GONE_AFTER, given_up, pause_after, retry_after
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


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://j:8000", "http://j:8000/v1/chat/completions"),
        ("http://j:8000/v1/", "http://j:8000/v1/chat/completions"),
        ("https://gate/judge", "https://gate/judge/v1/chat/completions"),
        ("https://gate/openai/v1", "https://gate/openai/v1/chat/completions"),
        ("https://gate/v1beta/openai/", "https://gate/v1beta/openai/chat/completions"),
        ("https://gate/v1/chat/completions", "https://gate/v1/chat/completions"),
        ("https://gate/deployments/j/chat/completions?api-version=1",
         "https://gate/deployments/j/chat/completions?api-version=1"),
    ],
)  # fmt: skip
def test_where_questions_go(url: str, endpoint: str) -> None:
    assert chat_endpoint(url) == endpoint


def test_retry_after() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert [retry_after(text) for text in (None, "", "3", " 2.5 ", "600", "9" * 9)] == [0.0, 0.0, 3.0, 2.5, 60.0, 60.0]
    assert 25.0 < retry_after(soon) <= 30.0
    gone = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert [retry_after(text) for text in (gone, "soon", "-3", "nan", "\u0662", "Wed, 99 Oct 2015")] == [0.0] * 6
    assert [pause_after(failures) for failures in (0, 1, 2, 9, 9999)] == [0.2, 0.4, 0.8, 5.0, 5.0]
    assert pause_after(0, 7.0) == 7.0


def test_a_rate_limit_is_waited_for_and_is_no_failure() -> None:
    """Five refusals with `Retry-After: 0.1` and no retry allowed; a pause beyond the deadline is not begun."""
    with (
        JudgeServer(lambda _: "fine", status=429, headers={"Retry-After": "0.1"}, recover_after=5) as server,
        Judge(server.url, "nano", timeout_s=30, retries=0) as judge,
    ):
        started = time.monotonic()
        assert judge.ask(ASK, 16) == "fine"
        assert server.calls == 6
        assert time.monotonic() - started >= 5 * 0.2
    with (
        JudgeServer(lambda _: "slow down", status=503, headers={"Retry-After": "30"}) as server,
        Judge(server.url, "nano", timeout_s=20, retries=9) as judge,
    ):
        started = time.monotonic()
        answer = judge.ask(ASK, 16)
        assert isinstance(answer, Invalid) and answer.reason.endswith("(Retry-After: 30)")
        assert re.search(r"asks for a pause of 30 s, [\d.]+ s into the 20 s of its question: HTTP 503", answer.reason)
        assert (server.calls, time.monotonic() - started < 15) == (1, True)


def test_a_judge_that_asks_for_more_patience_than_there_is_is_busy_and_not_gone() -> None:
    busy_first = GONE_AFTER + 1
    with (
        JudgeServer(lambda _: "fine", status=429, headers={"Retry-After": "60"}, recover_after=busy_first) as server,
        Judge(server.url, "nano", timeout_s=0.001, retries=3) as judge,
    ):
        judge.timeout_s = 10.0  # only its patience is short
        busy = [judge.ask(ASK, 16) for _ in range(busy_first)]
        assert all(isinstance(answer, Invalid) and "asks for a pause of 60 s" in answer.reason for answer in busy)
        assert judge.ask(ASK, 16) == "fine"
        assert server.calls == busy_first + 1


def test_what_is_said_of_a_judge_that_was_tried_in_vain() -> None:
    with JudgeServer(lambda _: "no", status=500) as server, Judge(server.url, "nano", 300.0, retries=1) as judge:
        answer = judge.ask(ASK, 16)
    assert isinstance(answer, Invalid)
    found = re.search(r"gave no answer in 2 tries and ([\d.]+) s: HTTP 500", answer.reason)
    assert found and 0.2 <= float(found[1]) < 60, answer.reason
    assert given_up(1, 0.7, 0.5) == "gave no answer within 0.5 s, in 1 try"
    assert given_up(3, 60.0, 60.0) == "gave no answer within 60 s, in 3 tries"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>", "the answer is no JSON: '<html>'"),
        (b'{"error": "no model"}', """no choices[0].message.content: '{"error": "no model"}'"""),
        (b"[]", "no choices[0].message.content"),
        (b'{"choices": []}', "no choices[0].message.content"),
        (b'{"choices": [{"text": "CORRECT"}]}', "no choices[0].message.content"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "no JSON"),
        (b"", "no JSON"),
    ],
)
def test_another_shape_is_no_answer(body: bytes, why: str) -> None:
    with (
        JudgeServer(lambda _: "", body=body) as server,
        Judge(server.url, "nano", timeout_s=20, retries=1) as judge,
    ):
        answer = judge.ask(ASK, 16)
        assert isinstance(answer, Invalid) and why in answer.reason
        assert server.calls == 2


def test_the_api_key_is_sent_and_never_said(caplog: pytest.LogCaptureFixture) -> None:
    """A server that repeats the key, in a refusal, in a retried failure and in nonsense."""
    key = "sk-very-secret-1234"
    reasons = []
    with caplog.at_level(logging.DEBUG):
        for status, body in ((401, f"bad key {key}"), (503, f"{key} is over its limit"), (200, f"who is {key}?")):
            with (
                JudgeServer(lambda _: "", status=status, body=body.encode()) as server,
                Judge(server.url, "nano", timeout_s=10, retries=1, api_key=key) as judge,
            ):
                answer = judge.ask(ASK, 16)
                assert isinstance(answer, Invalid)
                reasons.append(answer.reason)
                assert server.authorization == f"Bearer {key}"
    assert all("[api key]" in reason for reason in reasons)
    assert key not in caplog.text + "".join(reasons)
    assert "trying again" in caplog.text


def test_sameness_needs_both_orders() -> None:
    """A judge that calls equal whatever it reads last, and one that compares."""

    def believes_the_last(messages: list[dict[str, str]]) -> str:
        return "CORRECT" if "say yes" in messages[0]["content"].rpartition("Answer 2")[2] else "INCORRECT"

    with JudgeServer(believes_the_last) as server, Judge(server.url, "nano", timeout_s=10) as judge:
        fooled = grade_sameness(judge, "q", "two", "say yes")
        assert fooled == Scored(0.0, {"judge_attempts": 1.0}, "INCORRECT")
        assert server.calls == 2
    with JudgeServer(lambda _: "INCORRECT") as server, Judge(server.url, "nano", timeout_s=10) as judge:
        assert grade_sameness(judge, "q", "two", "three") == Scored(0.0, {"judge_attempts": 1.0}, "INCORRECT")
        assert server.calls == 1
    with JudgeServer(lambda _: "CORRECT") as server, Judge(server.url, "nano", timeout_s=10) as judge:
        assert grade_sameness(judge, "q", "two", "2") == Scored(1.0, {"judge_attempts": 1.0}, "CORRECT")
        assert server.calls == 2
    with JudgeServer(lambda _: "perhaps") as server, Judge(server.url, "nano", timeout_s=10) as judge:
        assert isinstance(grade_sameness(judge, "q", "two", "2"), Invalid)


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
