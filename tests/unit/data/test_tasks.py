"""Task streams: any step on its own, no task twice inside it, broken rows named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_cascade import domains
from nemo_cascade.config.schema import DataConfig
from nemo_cascade.data.tasks import FileTasks, PromptLimit, task_stream
from nemo_cascade.types import UserError

MATH, LONG = domains.load("math"), domains.load("long_context")
BOTH = {"math": MATH, "long_context": LONG}
DATA = DataConfig(domains={"math": 3.0, "long_context": 1.0})


def gsm8k(path: Path, count: int) -> str:
    rows = [{"question": f"What is {index} + 1?", "answer": f"It is\n#### {index + 1:,}"} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_step_needs_no_history() -> None:
    stream = task_stream(DATA, BOTH, seed=7)
    walked = [stream.take(step, 8) for step in range(4)]
    assert task_stream(DATA, BOTH, seed=7).take(3, 8) == walked[3]
    assert walked[2] != walked[3]
    assert task_stream(DATA, BOTH, seed=8).take(3, 8) != walked[3]
    assert [sum(task.domain == "math" for task in tasks) for tasks in walked] == [6, 6, 6, 6]


def test_refills_bring_other_tasks() -> None:
    stream = task_stream(DATA, BOTH, seed=7)
    seen = [task.id for task in stream.take(0, 8)]
    for attempt in (1, 2, 3):
        seen += [task.id for task in stream.refill(0, attempt, 8)]
    assert len(set(seen)) == 32
    again = task_stream(DATA, BOTH, seed=7)
    assert [task.id for attempt in range(4) for task in again.take(0, 8, attempt)] == seen


def test_ranks_share_a_step_without_overlap() -> None:
    parts = [task_stream(DATA, BOTH, 7, rank=rank, world=2).take(1, 4) for rank in range(2)]
    whole = task_stream(DATA, BOTH, 7).take(1, 8)
    assert [parts[index % 2][index // 2] for index in range(8)] == whole


def test_files_walk_through_all_rows(tmp_path: Path) -> None:
    path = gsm8k(tmp_path / "rows.jsonl", 24)
    stream = task_stream(DataConfig(domains={"math": 1.0}, files={"math": [path]}), {"math": MATH}, seed=1)
    epoch = [task.id for step in range(6) for task in stream.take(step, 4)]
    assert len(set(epoch)) == 24
    assert [task.id for task in stream.take(6, 4)] != epoch[:4]
    assert stream.take(2, 4)[0].truth["expected_answer"].isdigit()


def test_a_file_gives_what_it_has_to_refills(tmp_path: Path) -> None:
    path = gsm8k(tmp_path / "rows.jsonl", 6)
    stream = task_stream(DataConfig(domains={"math": 1.0}, files={"math": [path]}), {"math": MATH}, seed=1)
    first = {task.id for task in stream.take(0, 4)}
    second = {task.id for task in stream.refill(0, 1, 4)}
    assert len(second) == 2
    assert not first & second
    assert stream.refill(0, 2, 4) == []
    with pytest.raises(UserError, match="data.files.math: only 6 rows for 7 prompts"):
        stream.take(1, 7)


def test_broken_rows_name_file_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text, message in (
        ('{"question": "x", "answer": "#### 3"}\n\n{"question": "y", "answer": "3"}\n', "rows.jsonl:3: field 'answer'"),
        ('{"question": "x"\n', "rows.jsonl:1: not JSON"),
        ("[1]\n", "rows.jsonl:1: a row must be a JSON object"),
        ('{"expected_answer": "3"}\n', "rows.jsonl:1: field 'responses_create_params' is missing"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            FileTasks(MATH, [str(path)])
    with pytest.raises(UserError, match="no such file"):
        FileTasks(MATH, [str(tmp_path / "none.jsonl")])


def test_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    limit = PromptLimit(lambda task: task.messages[0].content.split(), 13)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"question": "short", "answer": "#### 1"})
        + "\n"
        + json.dumps({"question": "long " * 30, "answer": "#### 2"})
        + "\n"
    )
    source = FileTasks(MATH, [str(path)], limit)
    assert [task.truth["expected_answer"] for task in source.tasks] == ["1"]
    assert limit.dropped == {"math": 1}
    assert limit.metrics() == {"prompts_dropped": 1.0, "prompts_dropped/math": 1.0}
    with pytest.raises(UserError, match="is left: 2 prompts are over sampling.max_prompt_tokens; raise it"):
        FileTasks(MATH, [str(path)], PromptLimit(lambda task: [0] * 9, 8))
    nothing = task_stream(DataConfig(domains={"math": 1.0}), {"math": MATH}, 1, PromptLimit(lambda task: [0] * 9, 8))
    with pytest.raises(UserError, match="none of its generated prompts fits"):
        nothing.take(0, 2)


def test_a_mixed_file_gives_each_domain_its_own_rows(tmp_path: Path) -> None:
    """multi-domain-RL.jsonl holds rows of several agents; each domain reads the same file."""
    prompt = {"responses_create_params": {"input": [{"role": "user", "content": "x"}]}}
    rows = [
        {**prompt, "agent_ref": {"name": "mcqa_simple_agent"}, "options": [{"A": "1"}], "expected_answer": "A"},
        {**prompt, "agent_ref": {"name": "workplace_assistant_simple_agent"}, "ground_truth": []},
        {**prompt, "agent_ref": {"name": "structured_outputs_simple_agent"}, "schema_str": "{}"},
        {**prompt, "options": [{"A": "1"}, {"B": "2"}], "expected_answer": "B"},  # no agent: the file's own domain
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = FileTasks(domains.load("mcqa"), [str(path)])
    assert [task.truth["expected_answer"] for task in choices.tasks] == ["A", "B"]
    assert choices.skipped == {"tool_use": 1, "structured_output": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    for name in ("mcqa", "tool_use", "structured_output"):
        source = FileTasks(domains.load(name), [str(path)])
        assert [task.domain for task in source.tasks] == [name]
        assert source.skipped.total() == 2
    with pytest.raises(UserError, match="is left: 1 are mcqa rows by their agent_ref; 1 are structured_output rows"):
        FileTasks(MATH, [str(path)])


def test_an_outside_domain_and_an_unknown_agent_keep_their_rows(tmp_path: Path) -> None:
    """Whoever writes a domain, or names an agent nobody knows, has said with the file whose rows these are."""
    row = {"question": "1+1?", "answer": "#### 2", "agent_ref": {"name": "mcqa_simple_agent"}}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")

    class Mine(type(MATH)):
        name = "mine"

    assert len(FileTasks(Mine(), [str(path)]).tasks) == 1
    path.write_text(json.dumps({**row, "agent_ref": {"name": "chess_agent"}}) + "\n")
    assert len(FileTasks(MATH, [str(path)]).tasks) == 1


def test_files_without_a_weight() -> None:
    with pytest.raises(UserError, match="data.files.mcqa: the domain has no weight"):
        task_stream(DataConfig(domains={"math": 1.0}, files={"mcqa": ["x"]}), BOTH, 1)
