"""Judges that are down, hang, limit their rate or lie, from a stage's config over real HTTP to the step's batch.

A stage aborts when more than its share is Invalid; below that share nothing else is lost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_cascade import launch
from nemo_cascade.cascade import checks, fingerprint, judges
from nemo_cascade.cascade.plan import Plan, make_plan
from nemo_cascade.config.load import load_cascade
from nemo_cascade.config.schema import EvaluationConfig, StageRun
from nemo_cascade.config.stage_run import read_stage_run, write_stage_run
from nemo_cascade.learner.ranks import Place
from nemo_cascade.reward.judge import Judge
from nemo_cascade.rollout.collect import Collected, Collector
from nemo_cascade.types import Invalid, Scored, Task, UserError
from tests.unit.reward.judging import JudgeServer
from tests.unit.rollout.standins import ScriptedSampler, nano_chat

RL = (
    "kind: grpo\ninit: base\nnum_steps: 1\nprompts_per_step: 2\ngroup_size: 4\nrecord_every: 1\n"
    "data: {domains: {preference: 1}}\nfilters: {dynamic: false, max_invalid_share: 0.3}\n"
    "sampling: {max_new_tokens: 48, max_prompt_tokens: 160, max_total_tokens: 256}\noptimizer: {lr: 1.0e-3}\n"
)
VERDICT = '{"score_1": 4, "score_2": 2, "ranking": 2}'
ANSWERS = ("Hello.", "Hello you.", "Bye.", "Good day.")


def plan(folder: Path, judge: str, rl: str = RL, evaluation: str = "select: 0, report: 0") -> Plan:
    """One stage of preference groups with a `judge` block of flow YAML."""
    (folder / "rl.yaml").write_text(rl)
    (folder / "one.yaml").write_text(
        f"name: one\nmodel: nano\nbase: random\nhardware: cpu1\nstages: [rl]\nevaluation: {{{evaluation}}}\n{judge}\n"
    )
    return make_plan(load_cascade(str(folder / "one.yaml")))


@contextmanager
def collector(found: Plan) -> Iterator[tuple[Collector, launch.StageDomains]]:
    """The collector of the stage as launch builds it, with a sampler that says the answers in turn."""
    config, chat = found.stages["rl"], nano_chat()
    with launch.build_domains(StageRun(stage="rl", config=config), Place(0, 0, 1, True)) as built:
        sampler = ScriptedSampler(chat, lambda prompt, seed: f"</think>{ANSWERS[seed % len(ANSWERS)]}")
        play = Collector(built.trained, sampler, chat, config.sampling, config.filters, 2)
        try:
            yield play, built
        finally:
            play.close()


def collect(found: Plan) -> tuple[Collected, dict[str, float]]:
    """One step, and what the services counted in it."""
    with collector(found) as (play, built):
        tasks = built.trained["preference"].tasks("train", 2, seed=0)

        def take(count: int, attempt: int) -> list[Task]:
            return [] if attempt else tasks

        return play.collect(take, 2, 4, seed=3, step=0), dict(built.take_counts())


def block(url: str, **more: object) -> str:
    keys = {"url": f"'{url}/v1'", "timeout_s": 0.6, "retries": 1, **more}
    return "judge: {" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}"


BAD: dict[str, tuple[dict[str, object], str]] = {
    "hangs": ({"delay": 3.0}, "gave no answer within 0.6 s"),
    "limits its rate": ({"status": 429, "headers": {"Retry-After": "30"}}, "HTTP 429: .*Retry-After: 30"),
    "is overloaded": ({"status": 503}, "HTTP 503"),
    "answers rubbish": ({"body": b"<html>busy</html>"}, "the answer is no JSON: '<html>busy</html>'"),
    "answers in another shape": ({"body": b'{"choices": [{"text": "4"}]}'}, r"no choices\[0\]\.message\.content"),
    "talks rubbish": ({}, "answers hold no scores; is it a judge"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_judge_aborts_the_step_in_time(tmp_path: Path, kind: str) -> None:
    server_options, why = BAD[kind]
    with JudgeServer(lambda _: "let me see", **server_options) as server:  # type: ignore[arg-type]
        started = time.monotonic()
        with pytest.raises(UserError, match=f"filters.max_invalid_share: 8 of 8 rollouts are invalid.*{why}"):
            collect(plan(tmp_path, block(server.url)))
        assert time.monotonic() - started < 30
        assert server.calls > 0


def test_a_judge_that_is_down_aborts_the_step_in_time(tmp_path: Path) -> None:
    with JudgeServer(lambda _: "") as server:
        url = server.url
    started = time.monotonic()
    with pytest.raises(UserError, match=r"8 of 8 rollouts are invalid.*(refused|gone)"):
        collect(plan(tmp_path, block(url)))
    assert time.monotonic() - started < 30


def test_a_judge_that_recovers_loses_nothing(tmp_path: Path) -> None:
    """The first six calls are refused with a pause; every match is decided in the end."""
    limited = {"status": 429, "headers": {"Retry-After": "0.1"}, "recover_after": 6}
    with JudgeServer(lambda _: VERDICT, **limited) as server:  # type: ignore[arg-type]
        step, counts = collect(plan(tmp_path, block(server.url, timeout_s=20, retries=0)))
    outcomes = [rollout.outcome for group in step.groups for rollout in group.rollouts]
    assert [type(outcome) for outcome in outcomes] == [Scored] * 8
    assert counts == {"judge_matches": 12.0, "judge_matches_dropped": 0.0, "judge_matches_unreadable": 0.0}


def test_a_judge_that_fails_on_some_answers_loses_only_these(tmp_path: Path) -> None:
    """No scores for whatever is compared with `Bye.`: these answers are Invalid, the others keep two of three."""
    with JudgeServer(lambda messages: "what?" if "Bye." in str(messages) else VERDICT) as server:
        step, counts = collect(plan(tmp_path, block(server.url, timeout_s=20)))
    rollouts = [rollout for group in step.groups for rollout in group.rollouts]
    lost = [rollout.transcript.final.content == "Bye." for rollout in rollouts]
    assert [isinstance(rollout.outcome, Invalid) for rollout in rollouts] == lost
    assert 0 < sum(lost) <= 2
    assert counts["judge_matches_dropped"] == counts["judge_matches_unreadable"] > 0
    assert step.invalid == sum(lost)
    kept = [rollout.outcome.parts["dropped"] for rollout in rollouts if isinstance(rollout.outcome, Scored)]
    assert sum(kept) > 0


def test_the_key_travels_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """It reaches the server, and no file, key, log line or error holds it."""
    secret = "sk-Very-Secret"
    monkeypatch.setenv("JUDGE_KEY", f" {secret}\n")
    with JudgeServer(lambda _: f"who is {secret}?", status=401) as server, caplog.at_level("DEBUG"):
        found = plan(tmp_path, block(server.url, api_key_env="JUDGE_KEY"))
        assert fingerprint.keys(found) == fingerprint.keys(plan(tmp_path, block(server.url)))
        with pytest.raises(UserError) as caught:
            collect(found)
        assert server.authorization == f"Bearer {secret}"
    assert "HTTP 401" in str(caught.value) and "who is [api key]?" in str(caught.value)
    run = StageRun(cascade="one", stage="rl", key="0", seed=0, kind="grpo", tokenizer="t", config=found.stages["rl"])
    written = write_stage_run(run, tmp_path).read_text()
    assert read_stage_run(tmp_path).config.judge.api_key_env == "JUDGE_KEY"
    assert "api_key_env: JUDGE_KEY" in written
    everything = [written, str(caught.value), caplog.text, str(found.stages["rl"]), json.dumps(fingerprint.keys(found))]
    assert not any("Secret" in text for text in everything)


def test_a_key_that_is_missing_or_misplaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    found = plan(tmp_path, block("http://j:1", api_key_env="JUDGE_KEY"))
    missing = "key 'judge.api_key_env': the environment variable that it names is not set; export it"
    assert missing in list(checks.missing_programs(found.stages.values()))
    with pytest.raises(UserError, match=r"judge\.api_key_env: environment variable JUDGE_KEY is not set"):
        collect(found)
    for key in ("sk-Very-Secret", "hf_Secret", "key of mine"):
        with pytest.raises(UserError) as caught:
            plan(tmp_path, block("http://j:1", api_key_env=f"'{key}'"))
        assert "is no name of an environment variable in capitals" in str(caught.value)
        assert key not in str(caught.value)
    for url, why in (
        ("http://me:hidden@j:1/v1", "holds a user name or password"),
        ("http://me:hid/hidden@j:1/v1", "holds a user name or password"),
        ("me:hidden@j/v1", "holds a user name or password"),
        ("http://j/v1?api_key=hidden", "holds a key in its query"),
        ("http://j/v1?api-version=1&api%5Fkey=hidden", "holds a key in its query"),
        ("http://j/v1?access_token=hidden", "holds a key in its query"),
        ("http://j/v1#sig=hidden", "holds a key in its query"),
        ("http://me:hidden/v1", "must start with http:// or https:// and name a host"),
        ("hidden/v1", "must start with http:// or https:// and name a host"),
    ):
        with pytest.raises(UserError, match=f"judge.url: {why}") as caught:
            plan(tmp_path, f"judge: {{url: '{url}'}}")
        with pytest.raises(UserError, match=f"judge url: {why}") as asked:
            Judge(url, "m")
        assert "hidden" not in str(caught.value) + str(asked.value)
    assert plan(tmp_path, "judge: {url: 'https://j/deployments/m?api-version=2024-02-15&region=eu'}").stages["rl"]
    monkeypatch.setenv("JUDGE_KEY", "two words")
    assert missing not in list(checks.missing_programs(found.stages.values()))
    with pytest.raises(UserError, match="holds a space") as caught:
        collect(found)
    assert "two words" not in str(caught.value)


def test_a_stage_of_plain_chat_messages(tmp_path: Path) -> None:
    """`native_roles: false`, temperature and length from the config to the wire."""
    asked: list[list[dict[str, str]]] = []

    def reply(messages: list[dict[str, str]]) -> str:
        asked.append(messages)
        return VERDICT

    with JudgeServer(reply) as server:
        collect(plan(tmp_path, block(server.url, timeout_s=20, native_roles="false", temperature=0.3, max_tokens=99)))
        assert (server.body["temperature"], server.body["max_tokens"], server.body["model"]) == (0.3, 99, "judge")
    assert {tuple(message["role"] for message in messages) for messages in asked} == {("user",)}


def test_math_with_a_judge_is_checked_before_anything_samples(tmp_path: Path) -> None:
    math = RL.replace("{preference: 1}}", "{math: 1}, options: {math: {judge: true}}}")
    with pytest.raises(UserError) as caught:
        plan(tmp_path, "", math)
    assert str(caught.value) == (
        f"{tmp_path}/rl.yaml: key 'equivalence_judge' is missing; data.options.math.judge asks a judge where algebra "
        "finds answers unequal: set equivalence_judge.serve (a checkpoint, hf:PATH) or equivalence_judge.url here or "
        "in the cascade file"
    )
    measured = "select: 0, report: 2, domains: [math], options: {math: {judge: true}}"
    with pytest.raises(UserError, match=r"evaluation\.options\.math\.judge asks a judge"):
        plan(tmp_path, "", RL.replace("preference", "math"), measured)
    found = plan(tmp_path, "equivalence_judge: {url: 'http://j:1'}", math)
    config = found.stages["rl"]
    config.equivalence_judge = None  # a stage folder that no check has seen
    with pytest.raises(UserError, match=r"stage rl: key 'equivalence_judge' is missing"), collector(found):
        pass


def test_eval_needs_the_judge_of_its_cascade(tmp_path: Path) -> None:
    cascade = plan(tmp_path, "equivalence_judge: {url: 'http://j:1'}", RL.replace("preference", "math")).loaded.cascade
    rows = EvaluationConfig(domains=["long_context"], files={"long_context": ["rows.jsonl"]})
    assert judges.for_evaluation(rows, cascade)["judge"] is cascade.equivalence_judge
    assert judges.for_evaluation(EvaluationConfig(domains=["math"]), cascade) == {}
    cascade.equivalence_judge = None
    with pytest.raises(UserError, match=r"cascade one: key 'equivalence_judge' is missing; rows of evaluation\.files"):
        judges.for_evaluation(rows, cascade)
