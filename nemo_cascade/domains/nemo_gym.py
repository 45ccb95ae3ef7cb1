"""Any environment of NeMo-Gym: its server answers the tools and gives the reward, over HTTP (docs/nemo_gym.md).

Rows are NeMo-Gym's own; a row travels to the server as it is. `servers` maps how an `agent_ref.name` begins to a
server, so that one stage mixes environments; `url` is the server of all other rows. Without either, the domain is its
nano form: a domain of ours (`serves`) behind our own server in this process, real HTTP in between.

`score` stays a pure function of task and transcript although environments hold state: a finished rollout's session is
used once; any later verdict opens a fresh session and replays the rollout's calls in it.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import ClassVar

from nemo_cascade import domains
from nemo_cascade.config.bounds import web_address
from nemo_cascade.data import rows, splits
from nemo_cascade.data.gym_wire import row_of, task_of
from nemo_cascade.domains import Services, SingleTurn, content_of, make_task
from nemo_cascade.protocols import Domain
from nemo_cascade.reward.gym.client import GymClient, Lost, Session
from nemo_cascade.reward.gym.service import GymHttpServer, GymService
from nemo_cascade.types import (
    Case,
    Invalid,
    Json,
    Message,
    Outcome,
    Scored,
    Split,
    Task,
    Transcript,
    UserError,
)

SESSIONS_KEPT = 4096  # of rollouts that ended and were not scored yet
HERE = "here"  # stands for the server in this process


class GymEpisode:
    """One rollout's session: every tool call of a turn goes to the server, in order."""

    def __init__(self, domain: NemoGym, task: Task) -> None:
        self.domain, self.task = domain, task
        self.offered = {tool.name for tool in task.tools}
        self.said: list[Message] = []
        self.session: Session | None = None
        self.lost = ""
        if task.tools:
            self.session = Session(domain.client(task), _row(task))
            try:
                self.session.open()
            except Lost as error:
                self.lost = str(error)

    def reply(self, message: Message) -> tuple[Message, ...] | None:
        """One tool message per call; None ends the rollout: the turn called nothing, or the server is lost."""
        self.said.append(message)
        answers: list[Message] = []
        for call in message.tool_calls:
            answer = self._answer(call.name, call.arguments)
            if answer is not None:
                answers.append(Message("tool", answer))
        if self.lost or not answers:
            self.domain.ended(self.task, tuple(self.said), self.session, self.lost)
            return None
        self.said += answers
        return tuple(answers)

    def close(self) -> None:
        """The server forgets the session with its verdict, or after a while."""

    def _answer(self, name: str, arguments: Mapping[str, Json]) -> str | None:
        """A tool's answer; None once the server is lost. Only tools of the prompt reach it: `verify` is none."""
        if name not in self.offered:
            return f"error: no tool {name}"
        if self.session is None or self.lost:
            return None
        try:
            return self.session.call(name, arguments)
        except Lost as error:
            self.lost = str(error)
            return None


class NemoGym(SingleTurn):
    """Rows of any NeMo-Gym environment, scored by its resources server."""

    name = "nemo_gym"
    DEFAULTS: ClassVar[Mapping[str, Json]] = {
        "url": "",
        "servers": {},  # how an agent_ref.name begins -> url
        "rows": "",  # a file whose rows stand for generated tasks, in three disjoint splits
        "max_turns": 8,
        "timeout_s": 300.0,  # of a call with all its retries
        "retries": 4,
        "serves": "tool_use",  # without url and servers: which domain of ours the nano form asks
    }

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        super().__init__(services, options)
        servers = self.options["servers"]
        if not isinstance(servers, Mapping) or not all(isinstance(url, str) for url in servers.values()):
            raise UserError("data.options.nemo_gym.servers: must map beginnings of agent_ref.name to addresses")
        self.servers: dict[str, str] = {str(name): str(url) for name, url in servers.items()}
        addresses = {"url": str(self.options["url"]), **{f"servers.{name}": url for name, url in self.servers.items()}}
        for key, url in addresses.items():
            if url:
                web_address(f"data.options.nemo_gym.{key}", url)
        self.nano = not self.options["url"] and not self.servers
        if self.options["serves"] not in domains.available():
            known = ", ".join(domains.available())
            raise UserError(f"data.options.nemo_gym.serves: no domain {self.options['serves']!r}; known: {known}")
        self.max_turns = int(self.options["max_turns"])
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._clients: dict[str, GymClient] = {}
        self._ended: OrderedDict[str, list[Session | str]] = OrderedDict()
        self._inner: Domain | None = None
        self._server: GymHttpServer | None = None
        self._rows: list[Task] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"services": self.services, "options": self.options, "servers": self.servers, "nano": self.nano,
                "max_turns": self.max_turns}  # fmt: skip

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()

    def close(self) -> None:
        """Stop the server of the nano form and close all connections."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            if self._server is not None:
                self._server.stop()
            self._start()

    @property
    def inner(self) -> Domain:
        """The domain of ours behind the nano form."""
        with self._lock:
            if self._inner is None:
                self._inner = domains.load(str(self.options["serves"]), self.services)
            return self._inner

    def client(self, task: Task) -> GymClient:
        """The connection to the server of a task's row."""
        place = self._place(_row(task), task.id)
        with self._lock:
            if place not in self._clients:
                url = self._here() if place == HERE else place
                self._clients[place] = GymClient(url, float(self.options["timeout_s"]), int(self.options["retries"]))
            return self._clients[place]

    def _here(self) -> str:
        """The address of the nano form's server, started with the first question."""
        if self._server is None:
            self._server = GymHttpServer("127.0.0.1", 0, GymService(self.inner))
            self._server.start()
        return self._server.url

    def _place(self, row: Mapping[str, Json], row_id: str) -> str:
        if self.nano:
            return HERE
        agent = row.get("agent_ref")
        name = str(agent.get("name", "")) if isinstance(agent, Mapping) else ""
        found = [prefix for prefix in sorted(self.servers, key=len, reverse=True) if name.startswith(prefix)]
        place = self.servers[found[0]] if found else str(self.options["url"])
        if not place:
            raise UserError(
                f"{row_id}: field 'agent_ref.name' is {name!r}; no server is named for it: set "
                "data.options.nemo_gym.url or add it to data.options.nemo_gym.servers"
            )
        return place

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Nano: tasks of the domain behind it. Else rows of the file in option `rows`, each in one split for ever."""
        if self.options["rows"]:
            return self._file_tasks(split, count, seed)
        if not self.nano:
            raise UserError(
                "domain nemo_gym: a NeMo-Gym server has no generated tasks; name rows in data.files.nemo_gym, or a "
                "file in data.options.nemo_gym.rows"
            )
        return splits.draw(self._make, content_of, split, count, seed)

    def _make(self, rng: random.Random) -> Task:
        return self.wrapped(self.inner.tasks("train", 1, rng.getrandbits(48))[0])

    def _file_tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        with self._lock:
            if self._rows is None:
                self._rows = [self.parse_row(row, where) for where, row in rows.read_jsonl(str(self.options["rows"]))]
        found = [task for task in self._rows if splits.split_of(content_of(task)) == split]
        if len(found) < count:
            raise UserError(
                f"data.options.nemo_gym.rows: {len(found)} of {len(self._rows)} rows fall into split {split}, {count} "
                "are wanted; ask for fewer or add rows"
            )
        return random.Random(f"{split}/{seed}").sample(found, count)

    def wrapped(self, task: Task) -> Task:
        """A task of the domain behind the nano form, as the row that its server reads."""
        return make_task(self.name, task.messages, {"row": row_of(task)}, task.tools, task.thinking)

    def _unwrapped(self, task: Task) -> Task:
        inner = task_of(_row(task), self.inner.name, task.id)
        if not self.nano or inner is None:
            raise UserError(f"task {task.id}: only generated nemo_gym tasks have demonstrations")
        return Task(inner.id, inner.domain, inner.messages, inner.tools, task.thinking, inner.truth)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """The demonstration of the domain behind the nano form."""
        return self.inner.demonstrate(self._unwrapped(task), seed, flaw_rate)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """`responses_create_params` with its messages and tools; all other fields are the server's."""
        self._place(row, row_id)
        messages, tools = rows.input_messages(row, row_id), rows.input_tools(row, row_id)
        rows.field(row, "responses_create_params", dict, row_id)
        ours = task_of(row, self.name, row_id)  # rows that we wrote say in which mode they are meant
        return make_task(self.name, messages, {"row": dict(row)}, tools, ours is None or ours.thinking)

    def begin(self, task: Task) -> GymEpisode:
        """A session of its own on the server, if the row has tools."""
        return GymEpisode(self, task)

    def ended(self, task: Task, said: tuple[Message, ...], session: Session | None, lost: str) -> None:
        """An episode is over: its session, or why the server was lost, waits for the verdict."""
        if session is None:
            return
        with self._lock:
            self._ended.setdefault(_key(task, said), []).append(lost or session)
            while len(self._ended) > SESSIONS_KEPT:
                self._ended.popitem(last=False)

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """The server's verdict; 0 without asking for a truncated rollout, Invalid when the server does not answer."""
        if transcript.truncated:
            return Scored(0.0, reason="truncated")
        with self._lock:
            held = self._ended.get(_key(task, transcript.messages), [])
            session = held.pop() if held else None
        if isinstance(session, str):
            return Invalid(session)
        if session is None:
            try:
                session = Session(self.client(task), _row(task), _calls(task, transcript))
            except UserError as error:
                return Invalid(str(error))
        return session.verify(transcript)

    def cases(self) -> list[Case]:
        """Those of the domain behind the nano form; nobody knows those of a server."""
        if not self.nano:
            return []
        return [
            Case(self.wrapped(case.task), case.transcript, case.reward, case.because, case.hack)
            for case in self.inner.cases()
        ]


def _row(task: Task) -> dict[str, Json]:
    row = task.truth["row"]
    assert isinstance(row, dict)
    return row


def _key(task: Task, messages: tuple[Message, ...]) -> str:
    return hashlib.sha256(repr((task.id, messages)).encode()).hexdigest()


def _calls(task: Task, transcript: Transcript) -> list[tuple[str, Json, str]]:
    """The calls of a transcript that reached the server, with the answers that the model read."""
    offered = {tool.name for tool in task.tools}
    found: list[tuple[str, Json, str]] = []
    pending: list[tuple[str, Json]] = []
    for message in transcript.messages:
        if message.role == "assistant":
            pending = [(call.name, dict(call.arguments)) for call in message.tool_calls]
        elif message.role == "tool" and pending:
            name, arguments = pending.pop(0)
            if name in offered:
                found.append((name, arguments, message.content))
    return found


DOMAIN = NemoGym
