"""Released long-context rows through the real launch: an OpenAI-compatible judge gives rewards and scores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.observe.record import read_metrics
from nemo_cascade.observe.rollouts import read_groups
from nemo_cascade.types import Scored
from tests.flow.real_cascade import ROOT, Cascade, environment
from tests.unit.reward.judging import JudgeServer

ROWS = [
    {"prompt": f"Ann has {number}. What has {name}?", "expected_answer": "as nobody would write it"}
    for number, name in ((54, "Ann"), (37, "Ann"))
]


@pytest.mark.slow
def test_rows_are_rewarded_and_measured_by_the_judge(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with JudgeServer(lambda messages: "CORRECT") as server:
        head = (
            f"name: real\nmodel: nano\nbase: hf:nano\nhardware: cpu\nstages: [rl]\n"
            f"equivalence_judge: {{url: '{server.url}/v1', timeout_s: 30}}\n"
            f"evaluation: {{select: 0, report: 2, domains: [long_context], files: {{long_context: [{rows}]}}}}\n"
        )
        stage = (
            "kind: grpo\ninit: base\nnum_steps: 1\nprompts_per_step: 2\ngroup_size: 4\nrecord_every: 1\n"
            f"data: {{domains: {{long_context: 1}}, files: {{long_context: [{rows}]}}}}\n"
            "sampling: {max_new_tokens: 48, max_prompt_tokens: 160, max_total_tokens: 320}\noptimizer: {lr: 1.0e-4}\n"
        )
        cascade = Cascade(tmp_path, head, {"rl": stage})
        done = cascade.run()
        assert done.returncode == 0, done.stdout + done.stderr
        calls = server.calls
    folder = cascade.stage("rl")
    outcomes = [rollout.outcome for group in read_groups(folder.path, 0) for rollout in group.rollouts]
    granted = [outcome for outcome in outcomes if outcome.reason == "CORRECT"]
    assert len(outcomes) == 8 and granted
    assert all(outcome.reward == 1.0 for outcome in granted)
    assert {outcome.reason for outcome in outcomes} <= {"CORRECT", "truncated", "empty answer"}
    scores = [json.loads(line)["score"] for line in folder.evaluation("final").read_text().splitlines()]
    initial = [json.loads(line)["score"] for line in folder.evaluation("init").read_text().splitlines()]
    assert len(scores) == 2 and sum(scores) + sum(initial) > 0
    assert 0 < calls <= len(granted) + sum(scores) + sum(initial)  # equal answers are asked about once


@pytest.mark.slow
def test_eval_asks_the_judge_of_its_cascade(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "sft.yaml").write_text(
        "kind: sft\ninit: base\nnum_steps: 1\ntokens_per_step: 1024\ndata: {domains: {math: 1}}\n"
        "optimizer: {lr: 1.0e-3}\n"
    )
    with JudgeServer(lambda messages: "CORRECT") as server:
        (tmp_path / "cascade.yaml").write_text(
            "name: judged\nmodel: nano\nbase: hf:nano\nstages: [sft]\n"
            f"equivalence_judge: {{url: '{server.url}/v1', timeout_s: 30}}\n"
            f"evaluation: {{domains: [long_context], files: {{long_context: [{rows}]}}, max_new_tokens: 48}}\n"
        )
        words = ["eval", "hf:nano", "--cascade", str(tmp_path / "cascade.yaml"), "--tasks", "2", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "nemo_cascade.cli", *words],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (row,) = json.loads(done.stdout)
        assert (row["domain"], row["n"]) == ("long_context", 2)
        assert 2 * row["score"] == server.calls > 0


@pytest.mark.slow
def test_a_hosted_judge_is_paid_with_a_key_that_no_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain chat messages, a key by name, the comparison asked first unreadable: counted in the step's metrics."""
    secret = "sk-Very-Secret"
    monkeypatch.setenv("JUDGE_KEY", secret)
    asked: list[str] = []

    def reply(messages: list[dict[str, str]]) -> str:
        asked.append(messages[0]["content"])
        return "let me see" if messages[0]["content"] == asked[0] else '{"score_1": 4, "score_2": 2, "ranking": 2}'

    with JudgeServer(reply) as server:
        head = (
            f"name: real\nmodel: nano\nbase: hf:nano\nhardware: cpu\nstages: [rl]\n"
            f"judge: {{url: '{server.url}', native_roles: false, api_key_env: JUDGE_KEY, timeout_s: 30}}\n"
            "evaluation: {select: 0, report: 0}\n"
        )
        stage = (
            "kind: grpo\ninit: base\nnum_steps: 1\nprompts_per_step: 2\ngroup_size: 6\nrecord_every: 1\n"
            "data: {domains: {preference: 1}}\nfilters: {max_invalid_share: 1.0}\n"
            "sampling: {max_new_tokens: 48, max_prompt_tokens: 160, max_total_tokens: 320}\noptimizer: {lr: 1.0e-4}\n"
        )
        cascade = Cascade(tmp_path, head, {"rl": stage})
        done = cascade.run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.authorization == f"Bearer {secret}"
        assert server.body["max_tokens"] == 32  # generated tasks: the short verdict
    (line,) = [json.loads(text) for text in cascade.stage("rl").metrics.read_text().splitlines()]
    assert line["judge_matches"] == 30
    assert 0 < line["judge_matches_dropped"] == line["judge_matches_unreadable"] < line["judge_matches"]
    groups = read_groups(cascade.stage("rl").path, 0)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert len(rollouts) == 12 and sum(isinstance(rollout.outcome, Scored) for rollout in rollouts) >= 6
    assert len(asked) < line["judge_matches"]  # equal comparisons are asked once
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert secret not in done.stdout + done.stderr


@pytest.mark.slow
def test_patches_are_rewarded_by_the_judge_and_hopeless_groups_masked(tmp_path: Path) -> None:
    """The judge grants repairs of `cow` and refuses those of `bird`, whose groups leave the loss."""
    rows = tmp_path / "rows.jsonl"
    lines = []
    for name, value, constant in (("cow", 4, 6), ("cow", 3, 7), ("bird", 5, 5), ("bird", 2, 8)):
        line = f"def {name}(x): return x*{constant}"
        gold = f"--- a/a.py\n+++ b/a.py\n@@ -1,1 +1,2 @@\n-{line}\n+def {name}(x):\n+    return x - {constant}\n"
        lines.append({
            "prompt": f"Fix {name}(10)=={value}.\n### a.py\n{line}", "instance_id": f"{name}-{value}", "patch": gold,
            "problem_statement": f"{name}(10)=={value}", "relevant_file_contents": {"a.py": f"{line}\n"},
        })  # fmt: skip
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def reply(messages: list[dict[str, str]]) -> str:
        return f"<judgement>{'YES' if 'cow(10)' in messages[0]['content'] else 'NO'}</judgement>"

    with JudgeServer(reply) as server:
        head = (
            f"name: real\nmodel: nano\nbase: hf:nano\nhardware: cpu\nstages: [rl]\n"
            f"repair_judge: {{url: '{server.url}/v1', timeout_s: 30}}\nevaluation: {{select: 0, report: 0}}\n"
        )
        stage = (
            "kind: grpo\ninit: base\nnum_steps: 1\nprompts_per_step: 4\ngroup_size: 4\nrecord_every: 1\n"
            f"data: {{domains: {{swe_agentless: 1}}, files: {{swe_agentless: [{rows}]}}, "
            "options: {swe_agentless: {reward: judge}}}\nfilters: {mask_groups_below_max: 0.5}\n"
            "sampling: {max_new_tokens: 48, max_prompt_tokens: 160, max_total_tokens: 320}\noptimizer: {lr: 1.0e-4}\n"
        )
        cascade = Cascade(tmp_path, head, {"rl": stage})
        done = cascade.run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.calls > 0
    folder = cascade.stage("rl").path
    groups = read_groups(folder, 0)
    assert {group.task.truth["instance_id"] for group in groups} == {line["instance_id"] for line in lines}
    judged = {"cow": 0, "bird": 0}
    for group in groups:
        name = str(group.task.truth["instance_id"]).partition("-")[0]
        for rollout in group.rollouts:
            if rollout.outcome.reason.startswith("the judge says"):
                judged[name] += 1
                assert rollout.outcome.reward == float(name == "cow")
        assert any(group.in_loss) == any(rollout.reward > 0.5 for rollout in group.rollouts)
    assert min(judged.values()) > 0
    (step,) = read_metrics(folder)
    assert step["invalid_share"] == 0.0
    assert step["reward"] == judged["cow"] / 16
    assert step["groups_dropped/all_wrong"] + step.get("groups_dropped/below_max", 0.0) >= 2
