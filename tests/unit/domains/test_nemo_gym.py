"""NeMo-Gym both ways: our domains give the same verdicts over HTTP, and no server's failure becomes a reward."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade import domains
from nemo_cascade.data.gym_wire import response_of, row_of, task_of
from nemo_cascade.data.responses import transcript_of
from nemo_cascade.domains.nemo_gym import NemoGym
from nemo_cascade.protocols import Domain, Episode
from nemo_cascade.reward import patience
from nemo_cascade.reward.gym.client import outcome_of
from nemo_cascade.reward.gym.service import serving
from nemo_cascade.types import Invalid, Json, Message, Scored, ToolCall, Transcript, UserError
from tests.unit.domains.gym_servers import Answer, Scripted, scripted

TOOL: Json = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}
ROW: dict[str, Json] = {"responses_create_params": {"input": [{"role": "user", "content": "Add."}], "tools": [TOOL]}}
ADD = Message("assistant", tool_calls=(ToolCall("add", {"n": 2}),))
DONE = Message("assistant", "Done.")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture(scope="module")
def services() -> Iterator[domains.Services]:
    shared = domains.Services()
    yield shared
    shared.close()


def gym(server: Scripted | str, **options: Json) -> NemoGym:
    url = server if isinstance(server, str) else server.url
    return NemoGym(None, {"url": url, "timeout_s": 30.0, **options})


def play(episode: Episode, turns: tuple[Message, ...]) -> Transcript:
    """The conversation of these assistant turns with the environment's own answers."""
    said: list[Message] = []
    for turn in turns:
        said.append(turn)
        reply = episode.reply(turn)
        if reply is None:
            break
        said += reply
    return Transcript(tuple(said))


@pytest.mark.parametrize("name", ["tool_use", "mcqa", "structured_output", "instruction_following", "math"])
def test_every_case_scores_the_same_over_http(name: str, services: domains.Services) -> None:
    direct = domains.load(name, services)
    with serving(direct) as url:
        remote = gym(url)
        for case in direct.cases():
            task = remote.parse_row(row_of(case.task), "row")
            here, there = direct.score(case.task, case.transcript), remote.score(task, case.transcript)
            assert isinstance(here, Scored) and isinstance(there, Scored)
            assert there.reward == here.reward == case.reward, case.because
            if not case.transcript.truncated:  # a truncated rollout is not even sent
                assert there == here
        remote.close()


def test_a_rollout_is_played_over_http_as_it_is_played_here() -> None:
    direct = domains.load("tool_use")
    with serving(direct) as url:
        remote = gym(url)
        for task in direct.tasks("train", 12, seed=3):
            for flaw_rate in (0.0, 1.0):
                turns = tuple(m for m in direct.demonstrate(task, 0, flaw_rate) if m.role == "assistant")
                twin = remote.parse_row(row_of(task), "row")
                here, there = play(direct.begin(task), turns), play(remote.begin(twin), turns)
                assert there == here
                live, replayed = remote.score(twin, there), remote.score(twin, there)
                assert live == replayed == direct.score(task, here)
        remote.close()


def test_sessions_do_not_see_each_other() -> None:
    remote = NemoGym()
    case = next(case for case in remote.cases() if case.because == "booked twice")
    book = next(message for message in case.transcript.messages if message.tool_calls)
    first, second = remote.begin(case.task), remote.begin(case.task)
    for episode in (first, second):
        played = play(episode, (book, DONE))
        assert remote.score(case.task, played) == Scored(1.0, {"tool_errors": 0.0}, "same state")
    remote.close()


def test_a_released_row_travels_as_it_is() -> None:
    row: dict[str, Json] = {
        "responses_create_params": {"input": "Which? A: one B: two"},
        "options": [{"A": "one"}, {"B": "two"}],
        "expected_answer": "B",
        "grading_mode": "strict_single_letter_boxed",
    }
    with serving(domains.load("mcqa")) as url:
        remote = gym(url)
        task = remote.parse_row(row, "row")
        assert task.messages == (Message("user", "Which? A: one B: two"),)
        for text, reward in (("\\boxed{B}", 1.0), ("\\boxed{A}", 0.0)):
            outcome = remote.score(task, Transcript((Message("assistant", text, "hm"),)))
            assert isinstance(outcome, Scored) and outcome.reward == reward
        broken = remote.parse_row({**row, "expected_answer": "C"}, "row")
        outcome = remote.score(broken, Transcript((DONE,)))
        assert isinstance(outcome, Invalid) and "HTTP 422" in outcome.reason and "expected_answer" in outcome.reason
        remote.close()


def test_writing_and_reading_back_changes_nothing() -> None:
    for name in ("tool_use", "swe_agentic", "preference", "mcqa"):
        domain: Domain = domains.load(name)
        for case in domain.cases():
            assert transcript_of(response_of(case.transcript), "x") == case.transcript
            row = json.loads(json.dumps(row_of(case.task)))
            assert task_of(row, name, "x") == case.task
    calls = Message("assistant", "Both.", "think", (ToolCall("a", {"x": [1]}), ToolCall("b", {})))
    long = Transcript((calls, Message("tool", "1"), Message("tool", "2"), Message("user", "Go on."), DONE))
    assert transcript_of(response_of(long), "x") == long
    with pytest.raises(UserError, match=r"verifier_metadata.nemo_cascade: field 'truth' is missing"):
        broken: dict[str, Json] = {
            **row_of(case.task),
            "verifier_metadata": {"nemo_cascade": {"id": "1", "thinking": True}},
        }
        task_of(broken, "mcqa", "f:1")


def counting(path: str, body: Json, cookie: str) -> Answer:
    """A server that adds up, statelessly: what `add` answers depends on its arguments alone."""
    if path == "/seed_session":
        return 200, {}, {"Set-Cookie": "sid=1; Path=/"}
    return (200, {"sum": body["n"] + 1}) if path == "/add" else (200, {"reward": 1})


def test_tools_reach_the_server_and_the_model_reads_the_body_word_for_word() -> None:
    with scripted(counting) as server:
        remote = gym(server)
        task = remote.parse_row(ROW, "row")
        calls = (ToolCall("add", {"n": 2}), ToolCall("verify", {}), ToolCall("../x", {}))
        played = play(remote.begin(task), (Message("assistant", tool_calls=calls), DONE))
        assert [m.content for m in played.messages if m.role == "tool"] == [
            '{"sum": 3}', "error: no tool verify", "error: no tool ../x",
        ]  # fmt: skip
        assert remote.score(task, played) == Scored(1.0)
        assert server.paths() == ["/seed_session", "/add", "/verify"]
        assert [cookie for _, _, cookie in server.seen] == ["", "sid=1", "sid=1"]
        sent = server.seen[-1][1]
        assert sent["responses_create_params"] == ROW["responses_create_params"]
        assert [item["type"] for item in sent["response"]["output"]].count("function_call_output") == 3


def test_a_tool_that_fails_is_something_the_model_reads() -> None:
    def behave(path: str, body: Json, cookie: str) -> Answer:
        return (500, "boom") if path == "/add" else counting(path, body, cookie)

    with scripted(behave) as server:
        remote = gym(server)
        task = remote.parse_row(ROW, "row")
        assert play(remote.begin(task), (ADD, DONE)).messages[1] == Message("tool", "boom")


@pytest.mark.parametrize(
    ("first", "count"),
    [((503, "busy"), 3), ((429, "slow down", {"Retry-After": "1"}), 3), ((0, ""), 4), ((500, "x"), 4)],
)
def test_a_server_in_trouble_is_asked_again(first: Answer, count: int) -> None:
    """After a refusal the same session goes on; after a failure in the middle a fresh one is seeded."""
    failed = []

    def behave(path: str, body: Json, cookie: str) -> Answer:
        if path == "/verify" and not failed:
            failed.append(time.monotonic())
            return first
        return counting(path, body, cookie)

    with scripted(behave) as server:
        remote = gym(server)
        task = remote.parse_row(ROW, "row")
        assert remote.score(task, Transcript((DONE,))) == Scored(1.0)
        assert len(server.seen) == count
        if first[0] == 429:
            assert time.monotonic() - failed[0] >= 1.0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, "<html>"), "no verdict"),
        ((200, {}), "reward None"),
        ((200, {"reward": "1.0"}), "reward '1.0'"),
        ((200, {"reward": True}), "reward True"),
        ((200, '{"reward": NaN}'), "reward nan"),
        ((200, '{"reward": 1e999}'), "reward inf"),
        ((200, [1.0]), "is no object"),
        ((200, "[" * 100_000), "nested too deeply"),
        ((200, {"reward": 1.0, "mask_sample": True, "failure_reason": "the judge is down"}), "the judge is down"),
        ((422, {"detail": "field required"}), "HTTP 422: .*field required"),
        ((401, "who are you"), "HTTP 401"),
        ((502, "bad gateway"), "HTTP 502"),
    ],
)
def test_a_lying_server_earns_nobody_a_reward(answer: Answer, reason: str) -> None:
    with scripted(lambda path, body, cookie: answer if path == "/verify" else (200, {})) as server:
        remote = gym(server, retries=1)
        outcome = remote.score(remote.parse_row(ROW, "row"), Transcript((DONE,)))
        assert isinstance(outcome, Invalid)
        assert re.search(reason, outcome.reason), outcome.reason


def test_a_server_that_is_down_makes_the_rollout_invalid() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        remote = gym(f"http://127.0.0.1:{free.getsockname()[1]}", retries=1)
        task = remote.parse_row(ROW, "row")
        began = time.monotonic()
        episode = remote.begin(task)
        assert episode.reply(DONE) is None
        outcome = remote.score(task, Transcript((DONE,)))
        assert isinstance(outcome, Invalid) and "/seed_session failed" in outcome.reason
        assert time.monotonic() - began < 20  # refused, not waited for


def test_a_server_that_hangs_is_left_at_the_deadline() -> None:
    left = threading.Event()

    def behave(path: str, body: Json, cookie: str) -> Answer:
        if path == "/add":
            left.wait(60)
        return counting(path, body, cookie)

    with scripted(behave) as server:
        remote = gym(server, timeout_s=1.5)
        task = remote.parse_row(ROW, "row")
        began = time.monotonic()
        played = play(remote.begin(task), (ADD, DONE))
        outcome = remote.score(task, played)
        assert played.messages == (ADD,), "the rollout ends where the server was lost"
        assert isinstance(outcome, Invalid) and "tool add failed within 1.5 s" in outcome.reason
        assert time.monotonic() - began < 30
        left.set()


def test_a_lost_session_is_replayed_and_a_changed_answer_is_not_believed() -> None:
    drift = 0

    def behave(path: str, body: Json, cookie: str) -> Answer:
        return (200, {"sum": body["n"] + drift}) if path == "/add" else counting(path, body, cookie)

    with scripted(behave) as server:
        remote = gym(server)
        task = remote.parse_row(ROW, "row")
        played = play(remote.begin(task), (ADD, DONE))
        assert remote.score(task, played) == Scored(1.0)
        assert remote.score(task, played) == Scored(1.0)  # its session is used up: seed, replay, verify
        assert server.paths() == ["/seed_session", "/add", "/verify"] * 2
        drift = 5
        outcome = remote.score(task, played)
        assert isinstance(outcome, Invalid) and "a fresh session answered add" in outcome.reason


def test_servers_by_agent_and_rows_from_a_file(tmp_path: Path) -> None:
    remote = NemoGym(None, {"servers": {"mcqa": "http://a", "mcqa_hard": "http://b"}})
    row: dict[str, Json] = {**ROW, "agent_ref": {"name": "mcqa_hard_simple_agent"}}
    assert remote.client(remote.parse_row(row, "row")).url == "http://b"
    with pytest.raises(UserError, match=r"f:2: field 'agent_ref.name' is 'other'; no server is named for it"):
        remote.parse_row({**ROW, "agent_ref": {"name": "other"}}, "f:2")
    with pytest.raises(UserError, match="has no generated tasks"):
        remote.tasks("train", 1, 0)
    assert remote.cases() == []
    direct = domains.load("mcqa")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row_of(task)) + "\n" for task in direct.tasks("train", 60, 0)))
    filed = NemoGym(None, {"url": "http://a", "rows": str(path)})
    drawn = {split: {t.id for t in filed.tasks(split, 3, 1)} for split in ("train", "select", "report")}
    assert len(set().union(*drawn.values())) == 9
    with pytest.raises(UserError, match=r"of 60 rows fall into split report, 60 are wanted"):
        filed.tasks("report", 60, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:1"}, "nemo_gym.url: must start with http"),
        ({"servers": {"a": "b"}}, "nemo_gym.servers.a: must start with http"),
        ({"url": "http://me:hidden@h"}, "nemo_gym.url: holds a user name or password(?!.*hidden)"),
        ({"servers": ["a"]}, "servers: must map"),
        ({"serves": "mcq"}, "serves: no domain 'mcq'"),
        ({"urls": "x"}, "did you mean 'url'"),
    ],
)
def test_options_are_checked(options: dict[str, Json], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NemoGym(None, options)


def test_parts_and_reasons_come_back() -> None:
    verdict = outcome_of('{"reward": 0.5, "reason": "half", "reward_components": {"a": 1, "b": null, "c": true}}')
    assert verdict == Scored(0.5, {"a": 1.0}, "half")
    assert math.isfinite(outcome_of('{"reward": 3}').reward)  # type: ignore[union-attr]


def test_the_command_serves_a_domain_and_writes_its_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemo_cascade.cli", "serve-domain", "mcqa"]
    path = tmp_path / "rows.jsonl"
    subprocess.run([*command, "--write-rows", str(path), "--count", "3"], check=True, timeout=120)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["agent_ref"]["name"] for row in rows] == ["mcqa_simple_agent"] * 3
    served = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert served.stdout is not None
        remote = gym(json.loads(served.stdout.readline())["url"])
        for row in rows:
            task = remote.parse_row(row, "row")
            truth = row["verifier_metadata"]["nemo_cascade"]["truth"]
            answer = Message("assistant", f"\\boxed{{{truth['expected_answer']}}}")
            assert remote.score(task, Transcript((answer,))) == Scored(
                1.0, {"answered": 1.0}, f"chose {truth['expected_answer']}"
            )
    finally:
        served.terminate()
        served.wait(20)
