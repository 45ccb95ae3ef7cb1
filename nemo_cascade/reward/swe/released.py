"""Rollouts on the repositories of released rows: a container for each, the agent's patch, and one verdict for it.

A verdict is asked for task and transcript, while what it is about, the patch, lies in a container. So an episode that
ends leaves its patch and how it ended under the key of its transcript, and later verdicts find them there; one that
finds nothing (a stored rollout) runs the transcript's calls again in a fresh container. A verdict is remembered.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from nemo_cascade.reward.runtimes import (
    ENGINES,
    NAMES,
    Choice,
    Container,
    ContainerEnded,
    ContainerLost,
    Machine,
    Place,
    Runtime,
)
from nemo_cascade.reward.swe.checkout import checkout, folder_of
from nemo_cascade.reward.swe.grading import BadInstance, Graded, grade_patch
from nemo_cascade.reward.swe.instance import image_of, sif_of
from nemo_cascade.reward.swe.patch import HIDDEN, HIDE, changes, head
from nemo_cascade.reward.swe.verdict import Ending, verdict
from nemo_cascade.reward.swe.workspace import Workspace
from nemo_cascade.types import Invalid, Message, Outcome, Task, ToolCall, Transcript, UserError

log = logging.getLogger(__name__)
REMEMBERED = 8192  # rollouts whose patch or verdict is kept
REMEMBERED_BYTES = 2 << 30  # of their patches that have no verdict yet
SETUP_S = 120.0  # for git on a large repository


@dataclass(frozen=True)
class Settings:
    """The options of rows with a repository; times in seconds."""

    runtime: str = "auto"
    repositories: str = ""
    images: str = ""
    image: str = ""
    agent_timeout_s: float = 3600.0
    tests_timeout_s: float = 1200.0
    command_timeout_s: float = 300.0
    output_chars: int = 16000
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        if self.runtime not in ("auto", *NAMES):
            raise UserError(
                f"data.options.swe_agentic.runtime: {self.runtime!r} is not one of auto, {', '.join(NAMES)}"
            )
        for key in ("agent_timeout_s", "tests_timeout_s", "command_timeout_s", "output_chars"):
            if getattr(self, key) <= 0:
                raise UserError(f"data.options.swe_agentic.{key}: {getattr(self, key)} is not above 0")
        for key in ("memory_mb", "cpus", "processes", "scratch_mb", "start_seconds"):
            if getattr(self.machine, key) <= 0:
                name = "start_timeout_s" if key == "start_seconds" else key
                raise UserError(f"data.options.swe_agentic.{name}: {getattr(self.machine, key)} is not above 0")


@dataclass
class Ended:
    """What a rollout left: its patch, or in words why there is none; how it ended; what the tests said, once they were
    asked (`judging` is held meanwhile). The patch is dropped then: it may have 16 MiB.
    """

    patch: bytes = b""
    timed_out: bool = False
    out_of_memory: bool = False
    lost: str = ""
    reason: str = ""
    complete: threading.Event = field(default_factory=threading.Event)
    judging: threading.Lock = field(default_factory=threading.Lock)
    graded: Graded | None = None


class ReleasedRows:
    """Containers and verdicts of rows with a repository; safe to share between threads."""

    def __init__(self, settings: Settings, runtime: Callable[[str], Runtime]) -> None:
        self.settings = settings
        self._runtime = runtime
        self._choice = Choice(settings.runtime, settings.machine)
        self._ended: OrderedDict[str, Ended] = OrderedDict()
        self._remembering = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Another process's copy remembers nothing: containers end where they began."""
        return {**vars(self), "_ended": OrderedDict(), "_remembering": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._remembering = threading.Lock()

    def start(self, task: Task, for_agent: bool = False) -> Container:
        """A container with the repository at its base commit, for an agent without what it must not find.

        UserError when nothing here can run it, ContainerLost when it is the row that cannot be run.
        """
        truth, settings = task.truth, self.settings
        folder = folder_of(truth, settings.repositories)
        files = checkout(folder, str(truth["base_commit"])) if folder is not None else None
        name = self._choice.of(files is not None)
        if name == "bubblewrap" and files is None:
            raise UserError(
                f"{task.id}: this row's repository lives in a container image, which bubblewrap cannot start; set "
                f"data.options.swe_agentic.runtime to one of {', '.join(ENGINES)}, or data.options.swe_agentic."
                "repositories to a folder with a clone of it"
            )
        image = image_of(truth, settings.image)
        if name == "apptainer":
            image = sif_of(truth, settings.images) or image
        if name != "bubblewrap" and not image:
            raise ContainerLost(
                "the row names no image (docker_image): join it with R2E-Gym-Subset, or set data.options.swe_agentic."
                "image"
            )
        return self._runtime(name).start(Place(image, files, HIDDEN, HIDE) if for_agent else Place(image, files))

    def begin(self, task: Task, max_turns: int) -> ReleasedEpisode:
        """A fresh container for one rollout."""
        return ReleasedEpisode(self, task, max_turns)

    def remember(self, key: str, ended: Ended) -> None:
        """Keep what a rollout left for its verdict. The oldest are forgotten, and played again when asked for."""
        with self._remembering:
            self._ended[key] = ended
            size = sum(len(each.patch) for each in self._ended.values())
            while len(self._ended) > 1 and (len(self._ended) > REMEMBERED or size > REMEMBERED_BYTES):
                size -= len(self._ended.popitem(last=False)[1].patch)

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """The verdict of `verdict.py`; Invalid, too, where there is none because something of ours failed."""
        try:
            ended = self._found(task, transcript)
            if not ended.complete.wait(SETUP_S * 3):
                return Invalid("the rollout's container did not give its patch away")
            if ended.lost:
                return Invalid(ended.lost)
            return self._outcome(task, transcript, ended)
        except (ContainerLost, BadInstance, UserError) as error:
            return Invalid(f"{task.id}: {error}")

    def _found(self, task: Task, transcript: Transcript) -> Ended:
        """What the rollout with this transcript left. The last turn of a truncated one may never have been asked."""
        for unasked in (0, 1) if transcript.truncated else (0,):
            found = self._ended.get(transcript_key(task, transcript.messages, unasked))
            if found is not None:
                return found
        calls = [call for message in transcript.messages if message.role == "assistant" for call in message.tool_calls]
        if calls:
            return self._replayed(task, transcript)
        nothing = Ended()
        nothing.complete.set()
        return nothing

    def _replayed(self, task: Task, transcript: Transcript) -> Ended:
        """The patch of a stored rollout: its calls once more, in a fresh container."""
        turns = [message for message in transcript.messages if message.role == "assistant"]
        episode = ReleasedEpisode(self, task, len(turns) + 1)
        for turn in turns:
            if episode.reply(turn) is None:
                break
        episode.close()
        episode.ended.complete.wait(SETUP_S * 3)
        self.remember(transcript_key(task, transcript.messages, 0), episode.ended)
        return episode.ended

    def _graded(self, task: Task, ended: Ended) -> Graded:
        if ended.timed_out or ended.out_of_memory or ended.reason:
            return Graded(False, ended.reason)
        return grade_patch(lambda: self.start(task), task.truth, ended.patch, self.settings.tests_timeout_s)

    def _outcome(self, task: Task, transcript: Transcript, ended: Ended) -> Outcome:
        with ended.judging:
            if ended.graded is None:
                ended.graded = self._graded(task, ended)
                ended.patch = b""
        graded = ended.graded
        reason = graded.reason
        if transcript.truncated and not graded.resolved:
            reason = f"truncated; {reason}"
        return verdict(
            Ending(
                graded.resolved,
                transcript.truncated,
                ended.timed_out,
                ended.out_of_memory,
                graded.timed_out,
                graded.out_of_memory,
                graded.parts,
                reason,
            )
        )


class ReleasedEpisode:
    """One rollout's container. Its clock starts with it and covers sampling, tools and waiting for either."""

    def __init__(self, owner: ReleasedRows, task: Task, max_turns: int) -> None:
        self.owner, self.task, self.max_turns = owner, task, max_turns
        self.deadline = time.monotonic() + owner.settings.agent_timeout_s
        self.said: list[Message] = []
        self.turns = 0
        self.ended = Ended()
        self._ending = threading.Lock()
        self._container: Container | None = None
        self._gone = False
        try:
            self._container = owner.start(task, for_agent=True)
            self.base = head(self._container, SETUP_S)
        except ContainerLost as error:
            self.ended.lost = f"{task.id}: {error}"

    def reply(self, message: Message) -> tuple[Message, ...] | None:
        """One tool message per call; None ends the rollout: no call, `finish`, no time or no container left."""
        self.said.append(message)
        self.turns += 1
        if self.ended.lost or self._late():
            return None
        settings = self.owner.settings
        turn_ends = time.monotonic() + settings.command_timeout_s  # for all calls of a turn together
        answers: list[Message] = []
        for call in message.tool_calls:
            if call.name == "finish":
                break
            left = min(turn_ends, self.deadline) - time.monotonic()
            answers.append(Message("tool", self._answer(call, left)))
            if self._gone:
                break
        finished = self._gone or len(answers) < len(message.tool_calls) or not answers
        if finished or self._late() or self.turns == self.max_turns:
            self._end()
        self.said += answers
        return None if finished or self.ended.timed_out else tuple(answers)

    def _answer(self, call: ToolCall, seconds: float) -> str:
        if seconds <= 0:
            return "error: the time for this turn is over"
        assert self._container is not None
        settings = self.owner.settings
        try:
            return Workspace(self._container, settings.command_timeout_s, settings.output_chars).call(call, seconds)
        except ContainerEnded as error:
            self.ended.reason = str(error)
        except ContainerLost as error:
            if self._container.out_of_memory():
                self.ended.out_of_memory = True
            else:
                self.ended.lost = f"{self.task.id}: {error}"
        self._gone = True
        return "error: the container is gone"

    def _late(self) -> bool:
        if time.monotonic() >= self.deadline:
            self.ended.timed_out = True
        return self.ended.timed_out

    def close(self) -> None:
        """Register the rollout for its verdict; taking its patch and stopping its container goes on in a thread."""
        self.owner.remember(transcript_key(self.task, tuple(self.said), 0), self.ended)
        if not self.ended.complete.is_set():
            threading.Thread(target=self._end, name="swe-container-end", daemon=True).start()

    def _end(self) -> None:
        """Take the patch, then stop the container: once, whoever comes first."""
        with self._ending:
            if self.ended.complete.is_set():
                return
            try:
                self._take_patch()
            finally:
                if self._container is not None:
                    self._container.stop()
                self.ended.complete.set()

    def _take_patch(self) -> None:
        ended = self.ended
        if self._container is None or ended.lost or self._late() or self._gone:
            return
        try:
            ended.out_of_memory = self._container.out_of_memory()
            patch = changes(self._container, self.base, SETUP_S)
        except ContainerLost as error:
            ended.lost = f"{self.task.id}: {error}"
            return
        if isinstance(patch, bytes):
            ended.patch = patch
        else:
            ended.reason = patch


def transcript_key(task: Task, messages: tuple[Message, ...], unasked: int) -> str:
    """What names a rollout: its task and all it said and heard up to its last asked turn. `unasked` last turns of the
    assistant are left out, and what was answered to the last one is, too.
    """
    places = [index for index, message in enumerate(messages) if message.role == "assistant"]
    places = places[: len(places) - unasked] if unasked else places
    heard = messages[: places[-1] + 1] if places else ()
    return hashlib.sha256(repr((task.id, heard)).encode("utf-8", "replace")).hexdigest()
