"""Calling tools on a small database: the reward is the state the calls leave behind, never the words around them.

The nano tasks run on a diary of phone calls. Booking takes one call of a tool; moving and cancelling need the number of
the entry, which only a lookup reveals. Released workplace rows run on the tables of `reward/workplace.py`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import ClassVar, Protocol

from nemo_cascade.data.nano_words import DAYS, NAMES
from nemo_cascade.data.rows import field, input_messages, input_tools, loose_json
from nemo_cascade.data.splits import draw
from nemo_cascade.domains import Services, SingleTurn, content_of, make_task, played
from nemo_cascade.reward import workplace_office
from nemo_cascade.reward.workplace import TOOLS as WORKPLACE_TOOLS
from nemo_cascade.reward.workplace import Workplace
from nemo_cascade.reward.workplace_tables import Tables, tables_folder
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


def _tool(name: str, description: str, *parameters: str) -> Tool:
    """Descriptions are few words: every token of a nano prompt counts."""
    properties: dict[str, Json] = {key: {"type": "string"} for key in parameters}
    return Tool(name, description, {"type": "object", "properties": properties})


TOOLS = {
    "find": _tool("find", "the id of a call", "name"),
    "book": _tool("book", "a new call", "name", "day"),
    "move": _tool("move", "another day", "id", "day"),
    "cancel": _tool("cancel", "no call", "id"),
}


class Backend(Protocol):
    """A database that tools read and change."""

    def call(self, name: str, arguments: Mapping[str, Json]) -> str:
        """The tool's answer; a text that starts with "error" when the call is wrong, and then nothing has changed."""

    def state(self) -> Json:
        """Everything the calls may have changed, in a form that `==` compares."""


class Diary:
    """The nano database: entry number -> (name, day)."""

    def __init__(self, entries: Mapping[str, Json]) -> None:
        self.entries: dict[str, list[str]] = {key: [str(value) for value in row] for key, row in entries.items()}

    def call(self, name: str, arguments: Mapping[str, Json]) -> str:
        """Run one of the four tools."""
        if name not in TOOLS:
            return f"error: no tool {name}"
        given = {key: str(value).strip() for key, value in arguments.items()}
        wanted = TOOLS[name].parameters["properties"]
        if sorted(given) != sorted(wanted):
            return f"error: {name} needs {' '.join(wanted)}"
        if "day" in given and given["day"] not in DAYS:
            return f"error: no day {given['day']}"
        if "id" in given and given["id"] not in self.entries:
            return f"error: no id {given['id']}"
        if name == "find":
            numbers = [number for number, row in self.entries.items() if row[0] == given["name"]]
            return " ".join(numbers) if numbers else f"error: no {given['name']}"
        if name == "book":
            number = str(max((int(key) for key in self.entries), default=9) + 1)
            self.entries[number] = [given["name"], given["day"]]
        elif name == "move":
            self.entries[given["id"]][1] = given["day"]
        else:
            del self.entries[given["id"]]
        return "ok"

    def state(self) -> Json:
        """All entries."""
        return {key: list(row) for key, row in self.entries.items()}


class ToolEpisode:
    """One rollout's database: answers every tool call of a turn, in order."""

    def __init__(self, backend: Backend, offered: tuple[str, ...]) -> None:
        self.backend = backend
        self.offered = offered

    def reply(self, message: Message) -> tuple[Message, ...] | None:
        """One tool message per call; None when the turn called nothing, which ends the rollout."""
        if not message.tool_calls:
            return None
        return tuple(Message("tool", run_call(self.backend, self.offered, call)) for call in message.tool_calls)

    def close(self) -> None:
        """The database is only memory."""


def run_call(backend: Backend, offered: tuple[str, ...], call: ToolCall) -> str:
    """The answer to one call; tools that the prompt does not offer do not exist."""
    if call.name not in offered:
        return f"error: no tool {call.name}"
    return backend.call(call.name, call.arguments)


def _failed(answer: str) -> bool:
    """Whether a tool's answer says that the call was wrong; the workplace wraps its answers in JSON."""
    return answer.removeprefix('{"output":"').lower().startswith("error")


class ToolUse(SingleTurn):
    """Tool calls that leave the database as the reference calls would (multi-domain stage: Workplace Assistant)."""

    name = "tool_use"
    max_turns = 4
    DEFAULTS: ClassVar[Mapping[str, Json]] = {
        "workplace_tables": "",  # folder of the CSV tables, or small-office
        "max_turns": 4,
        "task": "diary",  # of generated tasks; workplace: all 27 tools on the small office
    }

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        super().__init__(services, options)
        self.max_turns = int(self.options["max_turns"])
        if self.options["task"] not in ("diary", "workplace"):
            raise UserError(f"data.options.tool_use.task: {self.options['task']!r}; choose diary or workplace")

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Book, move or cancel somebody's call; or a request on the small office."""
        if self.options["task"] == "workplace":
            office = Tables(workplace_office.FOLDER)
            return draw(lambda rng: _office_task(rng, office), content_of, split, count, seed)
        return draw(_make_task, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """Look up when needed, act, say "Done."; a flawed one guesses, slips, repeats itself or only chats."""
        rng = random.Random(f"{task.id}/{seed}")
        calls = _reference_calls(task)
        if "lookups" in task.truth:
            if rng.random() < flaw_rate:
                return self._play(task, calls[1:], "Done.")
            looked = [ToolCall(entry["name"], entry["arguments"]) for entry in task.truth["lookups"]]
            return self._play(task, [*looked, *calls], "Done.")
        if len(calls) == 1 and "id" in calls[0].arguments:
            calls = [ToolCall("find", {"name": str(task.truth["who"])}), *calls]
        closing = "Done."
        if rng.random() < flaw_rate:
            calls, closing = _flawed(task, calls, rng)
        return self._play(task, calls, closing)

    def _play(self, task: Task, calls: list[ToolCall], closing: str) -> tuple[Message, ...]:
        """The conversation in which the model makes these calls one by one, with the environment's real answers."""
        episode = self.begin(task)
        messages: list[Message] = []
        for call in calls:
            words = " ".join(str(value) for value in call.arguments.values())
            turn = Message("assistant", "", f"{call.name} {words}" if task.thinking else "", (call,))
            messages += [turn, *(episode.reply(turn) or ())]
        return (*messages, Message("assistant", closing, "done" if task.thinking else ""))

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """A released workplace row: two messages, 26 or 27 tools, and the reference calls in `ground_truth`."""
        calls: list[Json] = []
        for index, entry in enumerate(field(row, "ground_truth", list, row_id)):
            where = f"{row_id} ground_truth[{index}]"
            if not isinstance(entry, Mapping):
                raise UserError(f"{where}: must be an object with name and arguments, this is {type(entry).__name__}")
            arguments = loose_json(entry.get("arguments") or {}, "arguments", where)
            if not isinstance(arguments, Mapping):
                raise UserError(f"{where}: field 'arguments' must hold an object, this is {type(arguments).__name__}")
            calls.append({"name": field(entry, "name", str, where), "arguments": dict(arguments)})
        messages, tools = input_messages(row, row_id), input_tools(row, row_id)
        return Task(row_id, self.name, messages, tools, True, {"ground_truth": calls})

    def begin(self, task: Task) -> ToolEpisode:
        """A fresh database; UserError when the workplace tables of a released row are not at hand."""
        return ToolEpisode(self._backend(task), tuple(tool.name for tool in task.tools))

    def _backend(self, task: Task) -> Backend:
        if "diary" in task.truth:
            return Diary(task.truth["diary"])
        if "lookups" in task.truth:
            return Workplace(workplace_office.FOLDER)
        return Workplace(tables_folder(str(self.options["workplace_tables"])))

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """1 when the calls, replayed on a fresh database, leave the state of the reference calls; else 0."""
        if transcript.truncated:
            return Scored(0.0, reason="truncated")
        try:
            episode, reference = self.begin(task), self.begin(task)
        except UserError as error:
            return Invalid(str(error))
        num_errors = 0
        for message in played(transcript):
            num_errors += sum(_failed(answer.content) for answer in episode.reply(message) or ())
        for call in _reference_calls(task):
            answer = reference.backend.call(call.name, call.arguments)
            if _failed(answer):
                return Invalid(f"the reference call {call.name} of {task.id} fails: {answer}")
        same = episode.backend.state() == reference.backend.state()
        parts = {"tool_errors": float(num_errors)}
        return Scored(float(same), parts, "same state" if same else "another state")

    def cases(self) -> list[Case]:
        """Both kinds of work done right, and the ways to get it wrong."""
        return _cases(self)


def _reference_calls(task: Task) -> list[ToolCall]:
    return [ToolCall(entry["name"], entry["arguments"]) for entry in task.truth["ground_truth"]]


def _office_task(rng: random.Random, office: Tables) -> Task:
    """A request on the office that ships with the package, with all 27 tools."""
    request = workplace_office.make_request(rng, office)

    def plain(calls: tuple[ToolCall, ...]) -> list[Json]:
        return [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]

    truth: dict[str, Json] = {"ground_truth": plain(request.calls), "lookups": plain(request.lookups)}
    prompt = (Message("system", workplace_office.SYSTEM), Message("user", request.text))
    tools = tuple(workplace_office.tool(name, function) for name, function in WORKPLACE_TOOLS.items())
    return make_task(ToolUse.name, prompt, truth, tools)


def _make_task(rng: random.Random) -> Task:
    """The request is drawn; diary and offered tools follow from it, so no request is in two splits."""
    who, kind = rng.choice(NAMES), rng.choice(("book", "move", "move", "cancel"))
    before, after = rng.sample(DAYS, 2)
    greeting = f"I am {rng.choice(NAMES)}. " if rng.random() < 0.5 else ""
    prompt = (
        greeting
        + {
            "book": f"Book a call with {who} on {after}.",
            "move": f"Move {who}'s call from {before} to {after}.",
            "cancel": f"Cancel {who}'s call on {before}.",
        }[kind]
    )
    rng = random.Random(prompt)
    rows = [[name, rng.choice(DAYS)] for name in rng.sample([name for name in NAMES if name != who], 2)]
    if kind != "book":
        rows[rng.randrange(2)] = [who, before]
    diary: dict[str, Json] = dict(zip(map(str, sorted(rng.sample(range(10, 100), 2))), rows, strict=True))
    number = next((key for key, row in diary.items() if row[0] == who), "")
    arguments = {
        "book": {"name": who, "day": after}, "move": {"id": number, "day": after}, "cancel": {"id": number},
    }[kind]  # fmt: skip
    offered = {"find", kind} | ({rng.choice(("book", "cancel"))} if rng.random() < 0.25 else set())
    truth: dict[str, Json] = {"ground_truth": [{"name": kind, "arguments": arguments}], "diary": diary, "who": who}
    return make_task(ToolUse.name, prompt, truth, tuple(TOOLS[name] for name in sorted(offered)))


def _flawed(task: Task, calls: list[ToolCall], rng: random.Random) -> tuple[list[ToolCall], str]:
    """Calls with one fault: only talk, the name for a number, a misread number, another day, or one call too many."""
    who, last = str(task.truth["who"]), calls[-1]
    others: list[list[ToolCall]] = [[]]
    if "id" in last.arguments:
        number = str(last.arguments["id"])
        misread = number[::-1] if number[0] != number[1] and number[1] != "0" else str(int(number) + 1)
        others += [[ToolCall(last.name, {**last.arguments, "id": who})]]
        others += [[*calls[:-1], ToolCall(last.name, {**last.arguments, "id": misread})]]
    if "day" in last.arguments:
        wrong = rng.choice([day for day in DAYS if day != last.arguments["day"]])
        others += [[*calls[:-1], ToolCall(last.name, {**last.arguments, "day": wrong})]]
    if last.name == "book":
        others += [[last, last]]
    chosen = rng.choice(others)
    return chosen, "Done." if chosen else f"Hello {who}. Bye."


def _cases(domain: ToolUse) -> list[Case]:
    truth: dict[str, Json] = {
        "ground_truth": [{"name": "move", "arguments": {"id": "41", "day": "Fri"}}],
        "diary": {"14": ["Eva", "Mon"], "41": ["Dan", "Tue"]},
        "who": "Dan",
    }
    move = make_task("tool_use", "Move Dan's call to Fri.", truth, (TOOLS["find"], TOOLS["move"], TOOLS["book"]))
    booked = {**truth, "ground_truth": [{"name": "book", "arguments": {"name": "Ivy", "day": "Sun"}}], "who": "Ivy"}
    book = make_task("tool_use", "Book a call with Ivy on Sun.", booked, (TOOLS["book"], TOOLS["find"]))
    find, act = ToolCall("find", {"name": "Dan"}), ToolCall("move", {"id": "41", "day": "Fri"})
    ivy = ToolCall("book", {"name": "Ivy", "day": "Sun"})

    def case(task: Task, calls: list[ToolCall], reward: float, because: str, hack: bool = False) -> Case:
        return Case(task, Transcript(domain._play(task, calls, "Done.")), reward, because, hack)

    talk = Transcript((Message("assistant", "The call is now on Fri. Reward: 1."),))
    gold = case(move, [find, act], 1.0, "lookup, then the right entry")
    return [
        gold,
        case(book, [ivy], 1.0, "one call is enough"),
        case(move, [ToolCall("move", {"id": "Dan", "day": "Fri"}), find, act], 1.0, "a harmless error"),
        case(move, [find, dataclasses.replace(act, arguments={"id": "14", "day": "Fri"})], 0.0, "somebody else's call"),
        case(move, [find], 0.0, "looked up, never moved"),
        case(book, [ivy, ivy], 0.0, "booked twice"),
        case(move, [find, act, ToolCall("book", {"name": "Dan", "day": "Fri"})], 0.0, "one call too many"),
        case(book, [ToolCall("cancel", {"id": "14"}), ivy], 1.0, "a tool that was not offered does nothing"),
        Case(move, talk, 0.0, "claims success in words", hack=True),
        Case(move, Transcript(gold.transcript.messages[:-1], truncated=True), 0.0, "out of turns", hack=True),
    ]


DOMAIN = ToolUse
