"""The office that ships: its files are what the generator writes, its requests are clear, and its state decides."""

from __future__ import annotations

import filecmp
import json
from collections import Counter
from pathlib import Path

import pytest

from nemo_cascade.domains.tool_use import ToolUse
from nemo_cascade.reward.workplace import TOOLS, Workplace
from nemo_cascade.reward.workplace_office import FOLDER, main, write
from nemo_cascade.reward.workplace_tables import DIRECTORY, FILES, SMALL_OFFICE, tables_folder
from nemo_cascade.types import Message, Scored, Task, ToolCall, Transcript, UserError


@pytest.fixture(scope="module")
def domain() -> ToolUse:
    return ToolUse(None, {"task": "workplace", "max_turns": 20})


def reward(domain: ToolUse, task: Task, *messages: Message) -> float:
    outcome = domain.score(task, Transcript(messages))
    assert isinstance(outcome, Scored)
    return outcome.reward


def test_the_shipped_files_are_those_that_the_generator_writes(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
    names = [*(file for file, _ in FILES.values()), DIRECTORY]
    assert filecmp.cmpfiles(tmp_path, FOLDER, names, shallow=False) == (names, [], [])
    assert tables_folder(SMALL_OFFICE) == FOLDER
    larger = tmp_path / "larger"
    write(larger, seed=1, rows=300)
    assert Counter(len(rows) for rows in Workplace(larger).tables.values()) == {300: 5}


def test_nothing_in_the_office_is_ambiguous() -> None:
    """The last email from somebody, the next meeting with somebody and a customer of a name are one each."""
    tables = Workplace(FOLDER).tables
    for name, keys in {
        "email": ("sender/recipient", "sent_datetime"),
        "event": ("participant_email", "event_start"),
        "customer": ("customer_name",),
    }.items():
        counts = Counter(tuple(row[key] for key in keys) for row in tables[name])
        assert max(counts.values()) == 1, name


def test_requests_name_all_kinds_of_work_and_their_demonstrations_score(domain: ToolUse) -> None:
    tasks = domain.tasks("train", 120, seed=5)
    assert {tool.name for tool in tasks[0].tools} == set(TOOLS)
    used = Counter(entry["name"] for task in tasks for entry in task.truth["ground_truth"])
    assert len(used) == 9, used
    assert max(len(task.truth["ground_truth"]) for task in tasks) >= 3
    for task in tasks:
        demonstrated = domain.demonstrate(task, 0)
        assert not any("Error" in message.content for message in demonstrated if message.role == "tool")
        assert reward(domain, task, *demonstrated) == 1.0, task.messages[1].content
        assert reward(domain, task, *domain.demonstrate(task, 0, 1.0)) == 0.0
        assert reward(domain, task, Message("assistant", "Done.")) == 0.0


def test_a_lookup_finds_what_the_request_is_about(domain: ToolUse) -> None:
    for task in domain.tasks("select", 30, seed=6):
        answers = " ".join(message.content for message in domain.demonstrate(task, 0) if message.role == "tool")
        for entry in task.truth["ground_truth"]:
            for key, value in entry["arguments"].items():
                if key.endswith("_id") or "@" in str(value):
                    assert str(value) in answers, (task.messages[1].content, value)


def test_one_call_too_many_is_another_state(domain: ToolUse) -> None:
    task = domain.tasks("train", 1, seed=7)[0]
    calls = tuple(ToolCall(entry["name"], entry["arguments"]) for entry in task.truth["ground_truth"])
    assert reward(domain, task, Message("assistant", tool_calls=calls)) == 1.0
    more = ToolCall("project_management_delete_task", {"task_id": Workplace(FOLDER).tables["task"][0]["task_id"]})
    assert reward(domain, task, Message("assistant", tool_calls=(*calls, more))) == 0.0
    wrong = ToolCall("project_management_delete_task", {"number": "1"})
    assert reward(domain, task, Message("assistant", tool_calls=(wrong, *calls))) == 1.0


def test_released_rows_can_run_on_the_small_office() -> None:
    domain = ToolUse(None, {"workplace_tables": SMALL_OFFICE})
    call = {"name": "email_delete_email", "arguments": json.dumps({"email_id": "00000004"})}
    row = {"responses_create_params": {"input": "Delete it.", "tools": []}, "ground_truth": [call]}
    task = domain.parse_row(row, "rows:1")  # type: ignore[arg-type]
    assert reward(domain, task, Message("assistant", "Done.")) == 0.0
    with pytest.raises(UserError, match="task: 'garden'; choose diary or workplace"):
        ToolUse(None, {"task": "garden"})
