"""The skills of the cascade, one file each, and how a name in a stage file becomes a Domain.

A domain's module has a constant `DOMAIN`: the class that `load` builds with (services, options).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from nemo_cascade.data.rows import AGENTS, agent_domain
from nemo_cascade.data.splits import content_id, task_content
from nemo_cascade.protocols import Domain
from nemo_cascade.types import Json, Message, Outcome, Scored, Task, Tool, Transcript, UserError

if TYPE_CHECKING:
    from nemo_cascade.reward.judge import Judge
    from nemo_cascade.reward.math_equal import MathGrader
    from nemo_cascade.reward.runtimes import Machine, Runtime
    from nemo_cascade.reward.sandbox import Sandbox


class PreferenceJudge(Protocol):
    """Rewards of all answers to one prompt, by pairwise comparison."""

    def grade(
        self, messages: Sequence[Message], finals: Sequence[Message], principle: str, short: bool
    ) -> list[Outcome]:
        """One outcome per final answer; `short` asks for the nano judge's short prompt."""

    def take_counts(self) -> dict[str, float]:
        """Metrics of the comparisons since the last call."""


@dataclass
class Services:
    """What domains share and launch owns: processes and clients that outlive one task.

    `math` and `sandbox` are created on first use when launch passed none, so that `load("math")` works in a notebook.
    The judges have no default: a domain that needs one says so in one line.
    """

    math: MathGrader | None = None
    sandbox: Sandbox | None = None
    preference_judge: PreferenceJudge | None = None
    equivalence_judge: Judge | None = None
    repair_judge: Judge | None = None
    runtimes: dict[tuple[str, Machine, str], Runtime] = field(default_factory=dict)

    def math_grader(self) -> MathGrader:
        """The process pool that decides whether two expressions are equal."""
        if self.math is None:
            from nemo_cascade.reward.math_equal import MathGrader

            self.math = MathGrader()
        return self.math

    def code_sandbox(self) -> Sandbox:
        """Where code of the model runs."""
        if self.sandbox is None:
            from nemo_cascade.reward.sandbox import Sandbox

            self.sandbox = Sandbox()
        return self.sandbox

    def take_counts(self) -> dict[str, float]:
        """What the services counted since the last call, as metrics of a step; {} without a preference judge."""
        return self.preference_judge.take_counts() if self.preference_judge is not None else {}

    def runtime(self, name: str, machine: Machine, packages: str = "") -> Runtime:
        """Where commands of software agents run, one for all who ask for the same."""
        from nemo_cascade.reward import runtimes

        key = (name, machine, packages)
        return self.runtimes.get(key) or self.runtimes.setdefault(key, runtimes.load(*key))

    def close(self) -> None:
        """Stop what was started."""
        for service in (self.math, self.sandbox, *self.runtimes.values()):
            if service is not None:
                service.close()
        self.math = self.sandbox = None
        self.runtimes.clear()


class NoReply:
    """The episode of a single-turn task: the environment never answers."""

    def reply(self, message: Message) -> tuple[Message, ...] | None:
        """The rollout ends with the first assistant turn."""
        return None

    def close(self) -> None:
        """Nothing is held."""


class SingleTurn(ABC):
    """Base of domains whose rollout is one assistant turn, scored on its own.

    A subclass sets `name`, writes `tasks`, `demonstrate`, `parse_row`, `score` and `cases`, and lists its options with
    their defaults in `DEFAULTS`. A multi-turn domain overrides `max_turns` and `begin`.
    """

    name: ClassVar[str] = ""
    max_turns: int = 1
    verdict_deadline_s: float = 0.0  # where one verdict may take longer than the usual deadline, retries included
    DEFAULTS: ClassVar[Mapping[str, Json]] = {}

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        self.services = services if services is not None else Services()
        self.options: dict[str, Json] = dict(self.DEFAULTS)
        for key, value in (options or {}).items():
            if key not in self.DEFAULTS:
                known = ", ".join(self.DEFAULTS) or "none"
                raise UserError(
                    f"data.options.{self.name}.{key}: no such option{_nearest(key, self.DEFAULTS)}; known: {known}"
                )
            if not _alike(value, self.DEFAULTS[key]):
                wanted = OPTION_TYPES[type(self.DEFAULTS[key])]
                raise UserError(f"data.options.{self.name}.{key}: {value!r} is not {wanted}")
            self.options[key] = value

    def turns(self, task: Task) -> int:
        """Assistant turns of this task's rollouts, at most `max_turns` unless a domain says otherwise."""
        return self.max_turns

    def begin(self, task: Task) -> NoReply:
        """An environment that says nothing."""
        return NoReply()

    @abstractmethod
    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """The reward of one transcript."""

    def score_group(self, task: Task, transcripts_G: Sequence[Transcript]) -> list[Outcome]:
        """`score` of each transcript."""
        return [self.score(task, transcript) for transcript in transcripts_G]


OPTION_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _alike(value: Json, default: Json) -> bool:
    """Whether an option is of its default's type; a whole number may stand for a number, true and false for none."""
    if type(default) not in OPTION_TYPES or type(value) is type(default):
        return True
    return type(default) is float and type(value) is int


def make_task(
    domain: str,
    prompt: str | Sequence[Message],
    truth: Mapping[str, Json],
    tools: tuple[Tool, ...] = (),
    thinking: bool = True,
) -> Task:
    """A generated task whose id is the hash of prompt and truth."""
    messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    return Task(content_id(domain, task_content(messages, truth)), domain, messages, tools, thinking, dict(truth))


def content_of(task: Task) -> str:
    """What `splits.draw` hashes of a task."""
    return task_content(task.messages, task.truth)


def unanswered(transcript: Transcript) -> Scored | None:
    """Reward 0 with its reason for a truncated or empty answer, or one that thinks; None when there is one to grade.

    The thinking before an answer is not in its content. Marks of thinking in there are a second thought, perhaps an
    unfinished one, and nothing in a thought is graded.
    """
    content = transcript.final.content
    if transcript.truncated:
        return Scored(0.0, reason="truncated")
    if not content.strip():
        return Scored(0.0, reason="empty answer")
    if "<think>" in content or "</think>" in content:
        return Scored(0.0, reason="thinking in the answer")
    return None


def played(transcript: Transcript) -> Iterator[Message]:
    """The assistant turns that an environment would have answered: a turn without calls ends the episode, and calls
    after it were never made, unless a user has spoken since.
    """
    ended = False
    for message in transcript.messages:
        if message.role == "assistant" and not ended:
            yield message
            ended = not message.tool_calls
        elif message.role == "user":
            ended = False


BRIDGES = ("nemo_gym",)
"""Built-in domains that are no skill of their own but the way to somebody else's."""


def available() -> list[str]:
    """Names of the built-in skills, sorted."""
    return [name for name in known() if name not in BRIDGES]


def known() -> list[str]:
    """Names that a stage file may use without a path: the skills and the bridges, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str, services: Services | None = None, options: Mapping[str, Json] | None = None) -> Domain:
    """The Domain a stage file names.

    `math` is a built-in one; `package.module:Class` and `path/to/file.py:Class` are your own.
    """
    if ":" in name:
        return _outside(name)(services, options)
    if name not in known():
        raise UserError(f"domain {name!r}: no such domain{_nearest(name, known())}; known: {', '.join(known())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return module.DOMAIN(services, options)


def _outside(name: str) -> type[SingleTurn]:
    """The class behind `package.module:Class` or `path/to/file.py:Class`."""
    place, _, class_name = name.rpartition(":")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise UserError(f"domain {name!r}: no file {place}")
        spec = importlib.util.spec_from_file_location(f"nemo_cascade_domain_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError(f"domain {name!r}: {place} cannot be imported as Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # so that its classes can be pickled to a reward process
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UserError(f"domain {name!r}: {error}; is its package installed?") from error
    if class_name not in vars(module):
        raise UserError(f"domain {name!r}: {place} has no class {class_name}{_nearest(class_name, vars(module))}")
    return vars(module)[class_name]


def _nearest(word: str, known: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


FIELDS = (
    ("instruction_id_list", "instruction_following"),
    ("schema_str", "structured_output"),
    ("options", "mcqa"),
    ("ground_truth", "tool_use"),
    ("relevant_file_contents", "swe_agentless"),
    ("repository_files", "swe_agentless"),
    ("FAIL_TO_PASS", "swe_agentic"),
    ("instance", "swe_agentless"),
    ("question", "math"),
)
"""A verifier field that only one kind of released row has, for rows without `agent_ref`. Null counts as absent."""


def for_row(row: Mapping[str, Json]) -> str:
    """The domain of a released NeMo-Gym row, from its `agent_ref`, else from the verifier field it carries."""
    owner = agent_domain(row)
    if owner is not None:
        return owner
    agent = row.get("agent_ref")
    if isinstance(agent, Mapping):
        name = str(agent.get("name", ""))
        raise UserError(f"agent_ref.name {name!r}: no domain grades this agent; known: {', '.join(AGENTS)}")
    for key, domain in FIELDS:
        if row.get(key) not in (None, "", []):
            return domain
    metadata = row.get("verifier_metadata")
    if isinstance(metadata, Mapping) and "unit_tests" in metadata:
        return "code"
    raise UserError(
        "agent_ref: missing, and no verifier field tells the domain; add agent_ref or name the domain in data.files"
    )
