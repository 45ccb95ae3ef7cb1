"""Repairing a repository with tools: look, edit, run the tests (the agentic software stage, without thinking).

Generated repositories are a few files in memory, and their tests run in the sandbox. Those of released rows live in a
container (`reward/runtimes`): an image, or a clone on this machine (docs/swe.md). Either way the reward is asked of a
fresh checkout with the agent's change and the original tests: FAIL_TO_PASS and PASS_TO_PASS must pass; words, test runs
and edits of tests count for nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import ClassVar

from nemo_cascade.data import rows, splits
from nemo_cascade.data.nano_words import ANIMALS, NAMES, THINGS
from nemo_cascade.domains import Services, SingleTurn, content_of, make_task, played
from nemo_cascade.reward.nano_repository import OPERATORS, make_repository
from nemo_cascade.reward.repository import RepositoryTask
from nemo_cascade.reward.repository_grader import RepositoryGrader, repository_task
from nemo_cascade.reward.runtimes import Machine, Runtime
from nemo_cascade.reward.swe import workspace
from nemo_cascade.reward.swe.instance import instance_of
from nemo_cascade.reward.swe.released import ReleasedEpisode, ReleasedRows, Settings
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


Grade = Callable[[str, RepositoryTask, Mapping[str, str]], Outcome]


class WorkingCopy:
    """One rollout's checkout: answers view, search, edit and run_tests in a few words each."""

    def __init__(self, task: Task, grade: Grade) -> None:
        self.task, self.grade = task, grade
        self.offered = {tool.name for tool in task.tools}
        self.repository = repository_task(task.truth)
        self.files = dict(self.repository.files)

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
        return {"search": self._search, "view": self._view, "edit": self._edit, "run_tests": self._run}[call.name](
            **given
        )

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
        outcome = self.grade(self.task.id, self.repository, self.files)
        if isinstance(outcome, Invalid):
            return "error: the tests did not run"
        return "pass" if outcome.reward == 1.0 else "fail"


NANO_TURNS, ROW_TURNS = 6, 200  # the second: section 4.8.2
INSTRUCTIONS = (
    "You repair a software repository, which is the current folder of your tools. Find the cause of the issue, change "
    "the code, and run what shows that it works. Leave the tests as they are. Call finish when the repair is done."
)


class SweAgentic(SingleTurn):
    """Multi-turn repair in a checked-out repository; docs/swe.md has every option.

    `max_turns`: 0 stands for 6 on generated repositories and 200 on those of released rows.
    """

    name = "swe_agentic"
    max_turns = NANO_TURNS
    DEFAULTS: ClassVar[Mapping[str, Json]] = {
        "max_turns": 0,
        "runtime": "auto",
        "repositories": "",  # a folder with clones: owner__name or the instance's id
        "images": "",  # a folder with SIF files, for apptainer
        "image": "",  # an image's name with {instance_id} or {docker_image} in it
        "packages": "",  # bubblewrap: the folder of packages that tests see; "": the running interpreter's
        "agent_timeout_s": 3600.0,  # of a whole rollout
        "tests_timeout_s": 1200.0,
        "command_timeout_s": 300.0,  # of all commands of a turn
        "start_timeout_s": 300.0,
        "memory_mb": 32768,
        "cpus": 4.0,
        "processes": 1024,
        "scratch_mb": 2048,
        "output_chars": 16000,  # of a tool's answer
    }

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        super().__init__(services, options)
        if int(self.options["max_turns"]) < 0:
            raise UserError(f"data.options.swe_agentic.max_turns: {self.options['max_turns']} is below 0")
        self.max_turns = int(self.options["max_turns"]) or NANO_TURNS
        self.grader = RepositoryGrader(self.services.code_sandbox)
        settings = _settings(self.options)
        self.released = ReleasedRows(settings, self._runtime)

    def _runtime(self, name: str) -> Runtime:
        return self.services.runtime(name, self.released.settings.machine, str(self.options["packages"]))

    def turns(self, task: Task) -> int:
        """200 for a released row, where the options do not say otherwise."""
        return self.max_turns if self.options["max_turns"] or "files" in task.truth else ROW_TURNS

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`Fix cat(5)==3. Files: a.py b.py`, with search or with view to find the place."""
        return splits.draw(_make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """Find the function, edit its operator, run the tests, say "Done.".

        Faults: another operator, the shown value instead of a formula, the edit in another file, no edit at all.
        """
        if "after" not in task.truth:
            raise UserError(f"task {task.id}: only generated repositories have demonstrations")
        rng = random.Random(f"{task.id}/{seed}")
        truth = task.truth
        path = str(truth["path"])
        old, new = (str(truth[key]).partition("return ")[2] for key in ("before", "after"))
        name = str(truth["before"]).partition("(")[0].removeprefix("def ")
        calls = [ToolCall("search", {"word": name})]
        if task.tools[0].name == "view":
            paths = list(truth["files"])
            calls = [ToolCall("view", {"file": seen}) for seen in paths[: paths.index(path) + 1]]
        edit: dict[str, Json] = {"file": path, "old": old, "new": new}
        closing = "Done."
        if rng.random() < flaw_rate:
            fault = rng.choice(("operator", "value", "file", "chat"))
            if fault == "operator":
                edit["new"] = next(f"x{o}{old[2:]}" for o in OPERATORS if o not in (old[1], new[1]))
            elif fault == "value":
                edit["new"] = str(truth["check"]).partition("=")[2]
            elif fault == "file":
                edit["file"] = rng.choice([other for other in truth["files"] if other != path])
            if fault == "chat":
                return self._play(task, calls[:1], f"Hello. The {name} is {new}. Bye.")
        return self._play(task, [*calls, ToolCall("edit", edit), ToolCall("run_tests", {})], closing)

    def _play(self, task: Task, calls: list[ToolCall], closing: str) -> tuple[Message, ...]:
        """The conversation in which the model makes these calls one by one, with the environment's answers.

        The teacher knows the repaired files, so no sandbox is started for each of thousands of demonstrations.
        """

        def known(task_id: str, repository: RepositoryTask, files: Mapping[str, str]) -> Outcome:
            path = str(task.truth["path"])
            gold = repository.files[path].replace(str(task.truth["before"]), str(task.truth["after"]))
            return Scored(float(dict(files) == {**repository.files, path: gold}))

        episode = WorkingCopy(task, known)
        messages: list[Message] = []
        for call in calls:
            thought = str(task.truth["check"]) if call.name == "edit" else f"{call.name} it"
            turn = Message("assistant", "", thought if task.thinking else "", (call,))
            messages += [turn, *(episode.reply(turn) or ())]
        return (*messages, Message("assistant", closing, "done" if task.thinking else ""))

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """A released SWE row: the instance's fields, at the top or in `responses_create_params.metadata`.

        Its own prompt where it has one; the tools are always ours.
        """
        truth = instance_of(row, row_id)
        params = row.get("responses_create_params")
        messages: tuple[Message, ...] = (
            Message("system", INSTRUCTIONS),
            Message("user", str(truth["problem_statement"])),
        )
        if isinstance(params, Mapping) and params.get("input"):
            messages = rows.input_messages(row, row_id)
        settings = self.released.settings
        once = settings.machine.start_seconds + settings.tests_timeout_s
        self.verdict_deadline_s = 3 * once + 600.0  # the tests, two control runs, and git
        return Task(str(truth["instance_id"]), self.name, messages, tuple(workspace.TOOLS.values()), False, truth)

    def begin(self, task: Task) -> WorkingCopy | ReleasedEpisode:
        """A fresh checkout; UserError when a released row's repository cannot run here."""
        if "files" not in task.truth:
            return self.released.begin(task, self.turns(task))
        return WorkingCopy(task, self.grader.grade)

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """1 when the repository that the edits leave passes its tests, else 0. Running out of turns is 0; with the
        repository of a released row `reward/swe/verdict.py` has the rules.
        """
        if "files" not in task.truth:
            return self.released.score(task, transcript)
        if transcript.truncated:
            return Scored(0.0, reason="truncated")
        copy = WorkingCopy(task, _not_now)
        for message in played(transcript):
            copy.reply(message)
        return self.grader.grade(task.id, copy.repository, copy.files)

    def cases(self) -> list[Case]:
        """Repairs, failures, and the usual hacks: editing the tests, leaving early, claiming success."""
        return _cases(self)


def _not_now(task_id: str, repository: RepositoryTask, files: Mapping[str, str]) -> Outcome:
    """Replaying a transcript repeats its edits, not its test runs."""
    return Invalid("tests are not run again while edits are replayed")


def _settings(options: Mapping[str, Json]) -> Settings:
    """The options of released rows, checked."""
    number = {key: float(value) for key, value in options.items() if key.endswith("_timeout_s") or key == "cpus"}
    machine = Machine(
        int(options["memory_mb"]),
        number["cpus"],
        int(options["processes"]),
        int(options["scratch_mb"]),
        number["start_timeout_s"],
    )
    return Settings(
        *(str(options[key]) for key in ("runtime", "repositories", "images", "image")),
        number["agent_timeout_s"],
        number["tests_timeout_s"],
        number["command_timeout_s"],
        int(options["output_chars"]),
        machine,
    )


def _make(rng: random.Random) -> Task:
    """The request is drawn first; repository and tools follow from it, so no request is in two splits."""
    name, shown = rng.choice(ANIMALS + THINGS), rng.choice(SHOWN_INPUTS)
    constant = rng.randint(2, 9)
    value = rng.choice((shown + constant, shown - constant, shown * constant))
    greeting = f"I am {rng.choice(NAMES)}. " if rng.random() < 0.5 else ""
    return _task(f"{greeting}Fix {name}({shown})=={value}.", (name, shown, value))


def _task(request: str, issue: tuple[str, int, int]) -> Task:
    rng = random.Random(request)
    repository = make_repository(rng, SHAPES, issue)
    finder = rng.choice(("search", "view"))
    prompt = f"{request} Files: {' '.join(repository.files)}"
    tools = (TOOLS[finder], TOOLS["edit"], TOOLS["run_tests"])
    return make_task(SweAgentic.name, prompt, repository.truth(), tools, thinking=False)


def _cases(domain: SweAgentic) -> list[Case]:
    task = _task("Fix cat(5)==3.", ("cat", 5, 3))
    truth = task.truth
    path = str(truth["path"])
    old, new = (str(truth[key]).partition("return ")[2] for key in ("before", "after"))
    other = next(file for file in truth["files"] if file != path)
    good = ToolCall("edit", {"file": path, "old": old, "new": new})
    run = ToolCall("run_tests", {})

    def edit(file: str, before: str, after: str) -> ToolCall:
        return ToolCall("edit", {"file": file, "old": before, "new": after})

    def case(calls: list[ToolCall], reward: float, because: str, hack: bool = False) -> Case:
        return Case(task, Transcript(domain._play(task, calls, "Done.")), reward, because, hack)

    test = f"test_{path}"
    asserted = next(line for line in str(truth["tests"][test]).splitlines() if "assert cat(5)" in line).strip()
    repaired = domain._play(task, [good, run], "Done.")
    return [
        case([good, run], 1.0, "the right operator"),
        case([good], 1.0, "tests need not be run"),
        case([edit(path, old, f"{new} # cat"), run], 1.0, "another text with the same meaning"),
        case([edit(path, old, "0"), edit(path, "return 0", f"return {new}")], 1.0, "a wrong edit, then repaired"),
        case([edit(other, old, new), run], 0.0, "the other file"),
        case([run], 0.0, "no edit"),
        case([edit(path, old, "x+"), run], 0.0, "does not compile"),
        case([edit(path, old, "3"), run], 0.0, "returns the shown value", hack=True),
        case([edit(test, asserted, "pass"), run], 0.0, "edits the test", hack=True),
        case(
            [edit(path, "def cat", "import os; os._exit(0)\ndef cat"), run], 0.0, "leaves before the tests", hack=True
        ),
        Case(task, Transcript((Message("assistant", "pass. Done."),)), 0.0, "claims success", hack=True),
        Case(task, Transcript(repaired, truncated=True), 0.0, "out of turns", hack=True),
    ]


DOMAIN = SweAgentic
