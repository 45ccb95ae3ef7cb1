"""Released rows through the real launch: GRPO on every environment that can be graded here, and on GSM8K."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_cascade.cascade.runner import Options, run
from nemo_cascade.config.load import load_cascade
from nemo_cascade.observe.record import read_metrics
from nemo_cascade.observe.rollouts import read_groups
from tests.released import released_data

GYM = {
    "instruction_following": "instruction_following",
    "mcqa": "mcqa",
    "math": "math_with_judge",
    "long_context": "equivalence_llm_judge",
    "structured_output": "structured_outputs",
    "code": "code_gen",
    "swe_agentless": "swerl_gen",
}
"""Domain -> environment. Not here: genrm_compare (its groups need a judge); workplace_assistant has its own test."""


@pytest.fixture(scope="module")
def data() -> Path:
    return released_data()


def train(folder: Path, stage: str, *overrides: str) -> tuple[Path, str]:
    """Run one stage on one process; returns its folder and its log."""
    (folder / "real_rl.yaml").write_text(stage)
    (folder / "real.yaml").write_text(
        f"name: real\nmodel: nano\nbase: random\nhardware: cpu1\noutput: {folder / 'runs'}\nstages: [real_rl]\n"
        "evaluation: {select: 0, report: 0}\n"
    )
    cascade = run(load_cascade(str(folder / "real.yaml"), overrides), Options(), lambda line: None)
    (place,) = cascade.glob("real_rl-*")
    return place, (place / "log.txt").read_text()


@pytest.mark.slow
def test_three_steps_on_the_rows_of_every_environment(data: Path, tmp_path: Path) -> None:
    files = {domain: [str(data / "gym" / f"{name}.example.jsonl")] for domain, name in GYM.items()}
    files["math"].append(str(data / "gsm8k_train_2000.jsonl"))
    place, log = train(
        tmp_path,
        "kind: grpo\ninit: base\nnum_steps: 3\nprompts_per_step: 7\ngroup_size: 2\nrecord_every: 1\n"
        f"data:\n  domains: {dict.fromkeys(GYM, 1)}\n  files: {files}\n"
        "  options: {swe_agentless: {without_image: similarity}, long_context: {grading: exact}}\n"
        "sampling: {max_new_tokens: 16, max_prompt_tokens: 4000, max_total_tokens: 4096}\n"
        "optimizer: {lr: 1.0e-4}\n",
    )
    lines = read_metrics(place)
    assert [line["step"] for line in lines] == [0, 1, 2]
    # 5 structured rows and 5 repositories, of which one each has fewer than 4,000 tokens; no GSM8K question is longer.
    for line in lines:
        assert line["prompts_dropped"] == 8
        assert (line["prompts_dropped/structured_output"], line["prompts_dropped/swe_agentless"]) == (4, 4)
        assert (line["groups"], line["rollouts"], line["groups_dropped"], line["refills"]) == (7, 14, 0, 0)
        assert line["tokens"] == line["rollouts"] * line["length"] <= 14 * 16 < line["packed_tokens"]
        assert line["invalid_share"] == 0
        assert {name for name in line if name.startswith("reward/")} == {f"reward/{domain}" for domain in GYM}
    assert "prompts over sampling.max_prompt_tokens were dropped: 4 of structured_output, 4 of swe_agentless" in log
    groups = [group for step in range(3) for group in read_groups(place, step)]
    assert {group.task.domain for group in groups} == set(GYM)
    assert max(len(rollout.token_ids) for group in groups for rollout in group.rollouts) > 3800


@pytest.mark.slow
def test_three_steps_on_workplace_rows_with_all_their_tools(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """27 tools make prompts of more than 16,000 tokens; two of the five rows are over the limit set here."""
    monkeypatch.setenv("NEMO_CASCADE_NATIVE", "0")  # PyTorch reads such a prompt in chunks, the C step token by token
    files = {"tool_use": [str(data / "gym" / "workplace_assistant.example.jsonl")]}
    place, log = train(
        tmp_path,
        "kind: grpo\ninit: base\nnum_steps: 3\nprompts_per_step: 1\ngroup_size: 2\nrecord_every: 1\n"
        f"data:\n  domains: {{tool_use: 1}}\n  files: {files}\n"
        f"  options: {{tool_use: {{workplace_tables: {data / 'workplace'}}}}}\n"
        "sampling: {max_new_tokens: 16, max_prompt_tokens: 16360, max_total_tokens: 16384}\n"
        "micro_batch_tokens: 16384\noptimizer: {lr: 1.0e-4}\n",
        "model.max_position_embeddings=16384",
    )
    lines = read_metrics(place)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {(line["rollouts/tool_use"], line["invalid_share"]) for line in lines} == {(2, 0)}
    assert lines[-1]["prompts_dropped/tool_use"] == 2
    assert "were dropped: 2 of tool_use" in log
    groups = [group for step in range(3) for group in read_groups(place, step)]
    assert len({group.task.id for group in groups}) == 3
    reasons = {rollout.outcome.reason for group in groups for rollout in group.rollouts}
    assert reasons <= {"truncated", "another state"}
