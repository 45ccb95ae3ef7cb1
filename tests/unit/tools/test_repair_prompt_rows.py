"""Prompts that are written down are those that a stage would make, and read back as the same tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_cascade.data.tasks import FileTasks
from nemo_cascade.domains.swe_agentless import SweAgentless
from nemo_cascade.types import Message, Transcript
from tests.unit.domains.test_swe_agentless import REPOSITORY
from tools.repair_prompt_rows import main


def test_written_prompts_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    tests = {"FAIL_TO_PASS": ["tests/test_dates.py::test_zone"], "repo": "o/dates", "base_commit": "c"}
    rows.write_text(json.dumps({**REPOSITORY, **tests, "dataset_name": "SWE-Gym/SWE-Gym"}) + "\n")
    assert main([str(rows), str(out), "--shown-files", "2", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "2 prompts of 1 rows\n"
    making = SweAgentless(None, {"reward": "similarity", "prompts": "both", "shown_files": 2, "prompt_seed": 3})
    made = FileTasks(making, [str(rows)]).tasks
    reading = SweAgentless(None, {"without_image": "similarity"})
    read = FileTasks(reading, [str(out)]).tasks
    assert len(read) == len({task.id for task in read}) == 2
    assert [task.messages for task in read] == [task.messages for task in made]
    for task, twin in zip(read, made, strict=True):
        assert {key: task.truth[key] for key in tests} == tests
        assert dict(task.truth["shown_files"]) == dict(twin.truth["shown_files"])
        said = Transcript((Message("assistant", str(task.truth["patch"])),))
        assert reading.score(task, said) == making.score(twin, said)
        assert reading.score(task, said).reward == 1.0


def test_a_row_without_a_repository_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({**REPOSITORY, "repository_files": {}}) + "\n")
    assert main([str(rows), str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err.startswith(f"{rows}:1: field 'repository_files' is missing")
