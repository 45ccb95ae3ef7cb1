"""Preference: the rubric that evaluation shows, and the pairs that teach the judge."""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from nemo_cascade.config.schema import JudgeConfig
from nemo_cascade.data.nano_words import COLORS, FACTS
from nemo_cascade.domains import Services
from nemo_cascade.domains.preference import Preference, compare_answers, rubric, write_answer
from nemo_cascade.reward.genrm import parse_verdict
from nemo_cascade.reward.judge import Judge
from nemo_cascade.reward.preference_judge import PreferenceJudge
from nemo_cascade.types import Invalid, Message, Transcript


@pytest.fixture(scope="module")
def domain():
    return Preference()


def test_every_case(domain):
    for case in domain.cases():
        assert domain.score(case.task, case.transcript).reward == case.reward, case.because


def test_flawless_and_flawed_demonstrations(domain):
    tasks = domain.tasks("train", 150, seed=1)
    assert all(domain.score(t, Transcript(domain.demonstrate(t, 0))).reward == 1.0 for t in tasks)
    assert not any(domain.score(t, Transcript(domain.demonstrate(t, 0, 1.0))).reward for t in tasks)


def test_the_rubric_sees_each_flaw_alone():
    wishes = {"greeting": "greeting", "closing": "closing", "fact": "fact", "long": "short", "name": "greeting"}
    for style, wish in wishes.items():
        for noun in FACTS:
            parts = rubric("Ivy", noun, write_answer("Ivy", noun, style, random.Random(noun)))
            assert [key for key, value in parts.items() if not value] == [wish], (style, noun)


def test_naming_every_color_is_not_the_fact():
    assert rubric("Ivy", "fish", f"Hello Ivy. The fish is {FACTS['fish']}. {' '.join(COLORS)} Bye.")["fact"] == 0.0


def test_a_released_row_is_scored_in_groups_only(domain):
    row = {"responses_create_params": {"input": [{"role": "user", "content": "Hi"}]}, "principle": "Be kind."}
    task = domain.parse_row(row, "rows:1")
    assert task.truth == {"principle": "Be kind."}
    assert isinstance(domain.score(task, Transcript((Message("assistant", "Hi"),))), Invalid)


def test_the_judge_is_taught_the_rubric_in_both_orders(domain):
    conversations = domain.judge_conversations("train", 600, seed=0)
    verdicts = [json.loads(answer.content) for _, (answer,) in conversations]
    for (task, _), verdict in zip(conversations, verdicts, strict=True):
        assert [m.role for m in task.messages] == ["user", "response_1", "response_2"]
        assert parse_verdict(json.dumps(verdict)) is not None
        higher = verdict["score_1"] - verdict["score_2"]
        assert (verdict["ranking"] < 3.5) == (higher > 0) or higher == 0
    first = sum(v["score_1"] > v["score_2"] for v in verdicts)
    second = sum(v["score_1"] < v["score_2"] for v in verdicts)
    assert abs(first - second) < 70  # three standard errors of a fair coin over about 500 decided pairs
    assert 100 < sum(abs(v["score_1"] - v["score_2"]) == 1 for v in verdicts)  # near ties are frequent
    assert any(task.messages[1].content == "None" for task, _ in conversations)
    assert {task.thinking for task, _ in conversations} == {True, False}
    held_out = {task.messages[0].content for task, _ in domain.judge_conversations("report", 200, seed=0)}
    assert not held_out & {task.messages[0].content for task, _ in conversations}


def test_equal_scores_are_parted_by_length_only():
    good, short = "Hello Ivy. The fish is X. Bye.", "The fish"
    assert compare_answers("Ivy", "fish", good, good)["ranking"] == 3.5
    name, other = "Hello Bob.", "Hello Gus, dear Gus."
    fact = f"The fish is {FACTS['fish']}. Bye."
    assert compare_answers("Ivy", "fish", f"{name} {fact}", f"{other} {fact}")["ranking"] == 3
    assert compare_answers("Ivy", "fish", f"{other} {fact}", f"{name} {fact}")["ranking"] == 4
    assert compare_answers("Ivy", "fish", short, f"Hello Ivy. {fact}")["ranking"] == 6


class RubricServer(BaseHTTPRequestHandler):
    """A judge that really answers over HTTP, from the rubric."""

    asked: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        answers = [("" if m["content"] == "None" else m["content"]) for m in body["messages"][-2:]]
        verdict = json.dumps(compare_answers("Ivy", "fish", *answers))
        reply = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        """Silence."""


@pytest.fixture
def judge():
    RubricServer.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), RubricServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with Judge(f"http://127.0.0.1:{server.server_port}", "judge", timeout_s=10) as client:
        yield client
    server.shutdown()
    thread.join()
    server.server_close()


def group(*texts):
    return [Transcript((Message("assistant", text, "Ivy fish"),)) for text in texts]


def test_a_group_is_rewarded_by_the_judge_and_equal_questions_are_asked_once(judge):
    fact = f"The fish is {FACTS['fish']}."
    good, flawed = f"Hello Ivy. {fact} Bye.", f"{fact} Bye."
    config = JudgeConfig(url="http://x", length_weight=0.0, conciseness_bonus=0.0)
    domain = Preference(Services(preference_judge=PreferenceJudge(judge, config)))
    task = next(case.task for case in domain.cases())
    outcomes = domain.score_group(task, group(good, flawed, "", good))
    # good: 5 against good and the ranking 3.5 leaves the tie; flawed 4; empty 1 against everybody
    assert [outcome.reward for outcome in outcomes] == [5.0, 4.0, 1.0, 5.0]
    assert len(RubricServer.asked) == 6  # all pairs of four: no two are equal questions here
    domain.score_group(task, group(good, good, good, flawed))
    assert len(RubricServer.asked) == 6  # good-good and good-flawed, which were asked before
    domain.score_group(task, group(flawed, flawed, good, good))
    assert len(RubricServer.asked) == 7  # flawed-flawed is new, flawed-good is not
    assert domain.services.take_counts() == {
        "judge_matches": 18.0, "judge_matches_dropped": 0.0, "judge_matches_unreadable": 0.0,
    }  # fmt: skip
    assert domain.services.take_counts() == {}
    assert RubricServer.asked[0]["temperature"] == 0.0
    assert [m["role"] for m in RubricServer.asked[0]["messages"]] == ["user", "response_1", "response_2"]


def test_swapped_pairs_double_the_questions(judge):
    fact = f"The fish is {FACTS['fish']}."
    texts = (f"Hello Ivy. {fact} Bye.", f"{fact} Bye.", "fish")
    task = next(case.task for case in Preference().cases())
    domain = Preference(Services(preference_judge=PreferenceJudge(judge, JudgeConfig(url="http://x", swap=True))))
    outcomes = domain.score_group(task, group(*texts))
    assert len(RubricServer.asked) == 6
    assert [outcome.parts["matches"] for outcome in outcomes] == [4.0, 4.0, 4.0]


def test_one_answer_gets_the_rubric_and_a_group_needs_a_judge(domain):
    case = domain.cases()[0]
    assert domain.score_group(case.task, [case.transcript])[0].reward == 1.0
    missing = Invalid("groups need a judge; set judge.serve or judge.url in the cascade file")
    assert domain.score_group(case.task, [case.transcript] * 2) == [missing, missing]
