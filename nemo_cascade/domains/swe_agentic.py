"""Repairing a repository with tools: look, edit, run the tests (the agentic software stage, without thinking).

The working copy is a git checkout that the tools change; what runs code runs in the sandbox. The reward replays the edits on
a fresh checkout, puts the original tests back and asks whether FAIL_TO_PASS and PASS_TO_PASS pass: words, test runs and
edits of tests count for nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

from nemo_cascade.data import rows, splits
from nemo_cascade.data.nano_words import ANIMALS, NAMES, THINGS
from nemo_cascade.domains import Services, SingleTurn, content_of, make_task
from nemo_cascade.reward.nano_repository import OPERATORS, Grader, make_repository
from nemo_cascade.types import (
    Case,
    Invalid,
    Json,
    Message,
    Outcome,
    Scored,
    Split,
    Task,
    Tool,
    ToolCall,
    Transcript,
    UserError,
)

SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2))
SHOWN_INPUTS = range(3, 13)


def _tool(name: str, description: str, *parameters: str) -> Tool:
    properties: dict[str, Json] = {key: {"type": "string"} for key in parameters}
    return Tool(name, description, {"type": "object", "properties": properties})


TOOLS = {
    "search": _tool("search", "lines with a word", "word"),
    "view": _tool("view", "a file", "file"),
    "edit": _tool("edit", "new for old", "file", "old", "new"),
    "run_tests": _tool("run_tests", "pass or fail"),
}


class WorkingCopy:
    """One rollout's checkout: answers view, search, edit and run_tests in a few words each."""

    def __init__(self, task: Task, grader: Grader | None) -> None:
        self.task, self.grader = task, grader
        self.offered = {tool.name for tool in task.tools}
        self.files: dict[str, str] = {**task.truth["files"], **task.truth["tests"]}

    def reply(self, message: Message) -> tuple[Message, ...] | None:
        """One tool message per call, in order; None when the turn called nothing, which ends the rollout."""
        if not message.tool_calls:
            return None
        return tuple(Message("tool", self.call(call)) for call in message.tool_calls)

    def close(self) -> None:
        """The checkout is memory; nothing is left behind."""

    def call(self, call: ToolCall) -> str:
        """The answer to one call; wrong calls are answered with an error and change nothing."""
        if call.name not in self.offered:
            return f"error: no tool {call.name}"
        given = {key: str(value) for key, value in call.arguments.items()}
        wanted = TOOLS[call.name].parameters["properties"]
        if sorted(given) != sorted(wanted):
            return f"error: {call.name} needs {' '.join(wanted)}".rstrip()
        if "file" in given and given["file"] not in self.files:
            return f"error: no file {given['file']}"
        return {"search": self._search, "view": self._view, "edit": self._edit, "run_tests": self._run}[call.name](**given)

    def _search(self, word: str) -> str:
        sources = [(path, line) for path in self.task.truth["files"] for line in self.files[path].splitlines()]
        return "\n".join(f"{path}: {line}" for path, line in sources if word and word in line)[:400] or "nothing"

    def _view(self, file: str) -> str:
        return self.files[file].strip()

    def _edit(self, file: str, old: str, new: str) -> str:
        count = self.files[file].count(old) if old else 0
        if count != 1:
            return "error: old is not there" if count == 0 else f"error: old is there {count} times"
        self.files[file] = self.files[file].replace(old, new)
        return "ok"

    def _run(self) -> str:
        if self.grader is None:
            return "ok"
        outcome = self.grader.grade(self.task, self.files)
        if isinstance(outcome, Invalid):
            return "error: the tests did not run"
        return "pass" if outcome.reward == 1.0 else "fail"


class SweAgentic(SingleTurn):
    """Multi-turn repair in a checked-out repository."""

    name = "swe_agentic"
    max_turns = 6
    DEFAULTS: ClassVar[Mapping[str, Json]] = {"max_turns": 6}

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        super().__init__(services, options)
        self.max_turns = int(self.options["max_turns"])
        self.grader = Grader(self.services)

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`Fix cat(5)==3. Files: a.py b.py`, with search or with view to find the place."""
        return splits.draw(_make, content_of, split, count, seed)
