"""The catalogue: every parser of text that a model, a judge, a server or a sandboxed program writes.

A parser may refuse a text with the exceptions that its caller turns into an answer (`refuses`), and must be done within
its limit of CPU time. What is read is the real thing: the domains' own functions, over real tasks. Programs and algebra
run in processes that can be killed; what comes back from them is here, they themselves are not.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPMessage
from types import SimpleNamespace

from nemo_cascade.config.paths import NANO_TOKENIZER
from nemo_cascade.data.chat import ChatTokenizer, parse_text
from nemo_cascade.data.gym_wire import response_of
from nemo_cascade.data.responses import split_thinking, transcript_of
from nemo_cascade.data.rows import too_deep
from nemo_cascade.domains import code, long_context, structured_output, swe_agentic, swe_agentless, tool_use, unanswered
from nemo_cascade.reward import (
    assertions,
    instructions,
    judge,
    mcqa,
    repository,
    repository_grader,
    sandbox,
    schema,
    wire,
)
from nemo_cascade.reward.genrm import parse_verdict
from nemo_cascade.reward.gym.client import outcome_of
from nemo_cascade.reward.gym.service import DOMAIN_ERRORS, GymService, Handler
from nemo_cascade.reward.math_equal import extract_boxed, is_runaway, normalized
from nemo_cascade.reward.search_replace import BadEdit, similarity, solution_part
from nemo_cascade.rollout import openai_api
from nemo_cascade.types import Json, Message, Task, Tool, ToolCall, Transcript, UserError
from tools.fuzz import grammars
from tools.fuzz.grammars import Grammar

Read = Callable[[str], object]


@dataclass(frozen=True)
class Parser:
    """One parser: what it reads for whom, how its texts look, what it may raise, how long a text may take.

    `modules`: whose code it runs, by names below `nemo_cascade`. `seconds` of CPU, for a text of at most 2^17
    characters.
    """

    name: str
    read: Read
    grammar: Grammar
    domains: tuple[str, ...]
    modules: tuple[str, ...]
    refuses: tuple[type[Exception], ...] = ()
    seconds: float = 1.0


CATALOGUE: dict[str, Parser] = {}


def _parser(
    name: str,
    grammar: Grammar,
    domains: str,
    modules: str,
    refuses: tuple[type[Exception], ...] = (),
    seconds: float = 1.0,
) -> Callable[[Read], Read]:
    """Puts a function into the catalogue; `domains` and `modules` are names between blanks."""

    def put(read: Read) -> Read:
        CATALOGUE[name] = Parser(name, read, grammar, tuple(domains.split()), tuple(modules.split()), refuses, seconds)
        return read

    return put


# --- answers that are graded by their text ----------------------------------------------------------------------------


@_parser("boxes", grammars.MATHEMATICS, "math mcqa long_context", "reward.math_equal")
def _boxes(text: str) -> object:
    return extract_boxed(text)


@_parser("mathematics", grammars.MATHEMATICS, "math", "reward.math_equal")
def _mathematics(text: str) -> object:
    return is_runaway(normalized(text)), is_runaway(text)


@_parser("letters", grammars.LETTERS, "mcqa", "reward.mcqa")
def _letters(text: str) -> object:
    options = {"A": "one", "B": "two"}
    found = [mcqa.extract_letter(text, options, mode) for mode in mcqa.MODES]
    return [*found, mcqa.extract_letter(text, options, output_regex=r"answer\s*:\s*\(?([A-B])\)?")]


@_parser("thinking", grammars.THOUGHTS, "long_context math mcqa preference", "data.responses domains.long_context")
def _thinking(text: str) -> object:
    _, said = split_thinking(judge._THINKING.sub("", text))
    refused = unanswered(Transcript((Message("assistant", said),)))
    return refused, solution_part(said), long_context._boxed(said), long_context._names(said)


SCHEMA = json.dumps({
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "b": {"type": "array", "items": {"type": ["number", "null"]}},
        "c": {"type": "object", "properties": {"d": {"type": "boolean"}, "e": {"type": ["integer", "null", "string"]}}},
    },
})  # fmt: skip
ROOTED = json.dumps({"type": "object", "properties": {"r": json.loads(SCHEMA)}})
ROWS = json.dumps({
    "type": "array",
    "items": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": ["number", "boolean"]}}},
})  # fmt: skip


def _document(kind: str, grammar: Grammar, schema_text: str, seconds: float) -> None:
    modules = "reward.schema" if kind == "json" else "reward.documents"

    @_parser(kind, grammar, "structured_output", modules, seconds=seconds)
    def read(text: str) -> object:
        return schema.grade(schema_text, text, kind)


for _kind, _grammar, _schema, _seconds in (
    ("json", grammars.JSON, SCHEMA, 1.0), ("xml", grammars.XML, ROOTED, 1.0), ("toml", grammars.TOML, SCHEMA, 1.0),
    ("csv", grammars.CSV, ROWS, 1.0), ("yaml", grammars.YAML, SCHEMA, 4.0),  # PyYAML reads 130 kB a second
):  # fmt: skip
    _document(_kind, _grammar, _schema, _seconds)


@_parser("structured calls", grammars.CALLS, "structured_output", "domains.structured_output data.chat")
def _structured_calls(text: str) -> object:
    truth: dict[str, Json] = {"schema_str": SCHEMA, "tool_name": "find", "tool_payload_key": None}
    task = Task("t", "structured_output", (), (), True, truth)
    return structured_output.StructuredOutput().score(task, Transcript((parse_text(text, True, TYPED),)))


@_parser("programs", grammars.PROGRAMS, "code", "domains.code")
def _programs(text: str) -> object:
    source = code.extract_code(text)
    return code._broken(source, "python"), code._broken(source, "cpp")


FILES = {"a.py": "x = 1\ny = 2\ndef cat(x): return x+2\n", "b/c.py": "z = 3", "empty.py": ""}


def _patched(text: str) -> object:
    patched = swe_agentless._patched(FILES, text)
    repository.content_key(patched)
    broken = [path for path, content in patched.items() if not repository_grader._compiles(content)]
    return broken, similarity(FILES, patched, {**FILES, "a.py": "x = 2\ny = 2\ndef cat(x): return x-2\n"})


_MODULES = "reward.search_replace domains.swe_agentless reward.repository_grader"
_parser("edits", grammars.EDITS, "swe_agentless", _MODULES, (BadEdit,))(_patched)
_parser("diffs", grammars.DIFFS, "swe_agentless", _MODULES, (BadEdit,))(_patched)

ARGUMENTS: dict[str, Json] = {
    **dict.fromkeys(
        ("N", "n", "m", "small_n", "n_start", "n_sent", "n_words", "num_bullets", "num_sentences", "num_words",
         "frequency", "capital_frequency", "let_frequency", "num_paragraphs", "num_placeholders", "num_highlights",
         "num_sections", "min_words", "nth_paragraph", "percentage"), 2,
    ),
    **{"n_end": 9, "max_words": 40, "relation": "at least", "capital_relation": "less than"},
    **{"let_relation": "at least"},
    **dict.fromkeys(("keyword", "keyword1", "word", "first_word", "letter"), "frog"),
    **{"keyword2": "cat", "keywords": ["frog", "star"], "forbidden_words": ["hat"], "last_word": "end", "letter": "e"},
    **{"prompt_to_repeat": "Say frog twice.", "phrase": "the frog sat on it", "sep": "-", "options": "yes/no/maybe"},
    **{"section_spliter": "SECTION", "postscript_marker": "P.S.", "end_phrase": "Bye.", "language": "en"},
    **{"reference_text": "The frog sat on the old wall and sang a song."},
}  # fmt: skip
"""Every argument that any instruction asks for, so that each check can be made of every text."""


@_parser(
    "instructions", grammars.WRITING, "instruction_following", "reward.instructions domains.instruction_following",
    seconds=5.0,
)  # fmt: skip
def _instructions(text: str) -> object:
    """All checks of one text. The limit is that of all of them together."""
    return [instructions.check(name, ARGUMENTS, "Say frog twice.", text) for name in instructions.CHECKS]


@_parser("loose instructions", grammars.WRITING, "instruction_following", "reward.instructions")
def _loose(text: str) -> object:
    ids = ("startend:end_checker", "detectable_format:json_format")
    return instructions.grade(ids, [ARGUMENTS] * len(ids), "", text, "fraction", loose=True)


# --- tool calls -------------------------------------------------------------------------------------------------------

_FIELDS: dict[str, Json] = {
    **{"name": {"type": "string"}, "count": {"type": "integer"}, "rows": {"type": "array"}},
    **{"id": {}, "a": {"type": "object"}},
}
TYPED = (Tool("find", "", {"type": "object", "properties": _FIELDS}), Tool("move", "", {"type": "object"}))


@functools.cache
def _tokenizer() -> ChatTokenizer:
    return ChatTokenizer(NANO_TOKENIZER)


@functools.cache
def _gold(name: str) -> Task:
    """The task of a domain's first gold case."""
    known = {"tool_use": tool_use.ToolUse, "swe_agentic": swe_agentic.SweAgentic}
    return known[name]().cases()[0].task


@_parser("turns", grammars.CALLS, "tool_use swe_agentic nemo_gym", "data.chat data.template", seconds=3.0)
def _turns(text: str) -> object:
    """A sampled turn, the environment's answer to it, and the tokens that the model reads next."""
    found = []
    for thinking in (True, False):
        message = parse_text(text, thinking, TYPED)
        replies = tool_use.ToolUse().begin(_gold("tool_use")).reply(message) or ()
        found.append(_tokenizer().reply_ids(replies, thinking) + _tokenizer().completion_ids(message, thinking))
    return found


@_parser("encoded text", grammars.TEXT, "nemo_gym preference", "data.chat", seconds=3.0)
def _encoded(text: str) -> object:
    return _tokenizer().encode_text(text)


def _calls(text: str) -> Iterable[tuple[str, Mapping[str, Json]]]:
    """(name, arguments) of each call in a JSON list; a parsed turn holds just that, whatever the model wrote."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if value is None or too_deep(value):
        value = [[text[:20], {"name": text, "id": text[20:40], "query": text, "field": text}]]
    for item in value if isinstance(value, list) else [value]:
        name, given = item if isinstance(item, list) and len(item) == 2 else ("find", item)
        arguments = given if isinstance(given, dict) else {"name": given}
        yield name[:100] if isinstance(name, str) else "find", arguments


@_parser("diary calls", grammars.TOOL_CALLS, "tool_use", "domains.tool_use")
def _diary_calls(text: str) -> object:
    episode = tool_use.ToolUse().begin(_gold("tool_use"))
    answers = [tool_use.run_call(episode.backend, tuple(tool_use.TOOLS), ToolCall(*call)) for call in _calls(text)]
    return answers, episode.backend.state()


@_parser("office calls", grammars.OFFICE_CALLS, "tool_use", "reward.workplace reward.workplace_tables")
def _office_calls(text: str) -> object:
    office = tool_use.Workplace(tool_use.workplace_office.FOLDER)
    return [office.call(*call) for call in _calls(text)], office.state()


@_parser("repository calls", grammars.REPOSITORY_CALLS, "swe_agentic", "domains.swe_agentic")
def _repository_calls(text: str) -> object:
    copy = swe_agentic.WorkingCopy(_gold("swe_agentic"), swe_agentic._not_now)
    copy.offered = set(swe_agentic.TOOLS)
    return [copy.call(ToolCall(*call)) for call in _calls(text)]


# --- judges, servers, sandboxes ---------------------------------------------------------------------------------------


@_parser("comparisons", grammars.VERDICTS, "preference", "reward.genrm reward.preference_judge")
def _comparisons(text: str) -> object:
    return parse_verdict(judge._THINKING.sub("", text))


@_parser("equivalence", grammars.VERDICTS, "long_context", "reward.judge")
def _equivalence(text: str) -> object:
    return judge.parse_equivalence(text)


@_parser("judge's replies", grammars.CHOICES, "preference long_context", "reward.judge", (ValueError,))
def _judge_reply(text: str) -> object:
    return judge._content(text)


@_parser("gym verdicts", grammars.OUTCOMES, "nemo_gym", "reward.gym.client", (ValueError,))
def _gym_verdict(text: str) -> object:
    return outcome_of(text)


@_parser("responses", grammars.RESPONSES, "nemo_gym", "data.responses", (UserError,))
def _responses(text: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    value = value if isinstance(value, dict) else {"output": value}
    if too_deep(value):
        return None
    transcript = transcript_of(value, "response")
    return response_of(transcript), tool_use.ToolUse().score(_gold("tool_use"), transcript)


class _Asked(Handler):
    """A gym server's handler without a socket: the path and the cookie are given, the answer is returned."""

    def __init__(self, path: str, service: GymService) -> None:
        self.path, self.headers = path, HTTPMessage()
        self.server = SimpleNamespace(service=service, stopped=False)  # type: ignore[assignment]


@_parser(
    "gym requests", grammars.GYM_BODIES, "nemo_gym tool_use", "reward.gym.service data.gym_wire", DOMAIN_ERRORS
)  # fmt: skip
def _gym_requests(text: str) -> object:
    """What `do_POST` reads, rows and their truth included; a UserError is its answer 422, a domain's error its 500."""
    content, service = as_bytes(text), GymService(tool_use.ToolUse())
    path = next((path for path in ("verify", "aggregate_metrics", "seed_session") if _WANTS[path] in text), "find")
    return _Asked(f"/{path}", service)._answer(content)


_WANTS = {"verify": '"response"', "aggregate_metrics": '"verify_responses"', "seed_session": "responses_create_params"}


@_parser("chat requests", grammars.API_BODIES, "preference nemo_gym", "rollout.openai_api", (UserError,), seconds=3.0)
def _api_requests(text: str) -> object:
    body = openai_api.body_of(as_bytes(text))
    chat = _tokenizer()
    if "messages" not in body:
        prompts = openai_api.prompts_of(body, chat)
    else:
        prompts = [chat.messages_ids(openai_api.messages_of(body), openai_api.tools_of(body), True)]
    return openai_api.asked(body, prompts, chat.stop_ids)


@_parser("test reports", grammars.REPORTS, "swe_agentless swe_agentic", "reward.repository")
def _reports(text: str) -> object:
    return repository._read_report(text, "nonce")


@_parser("frames", grammars.FRAMES, "code swe_agentless swe_agentic", "reward.wire reward.bubblewrap", (ValueError,))
def _frames(text: str) -> object:
    return wire.decode(as_bytes(text))


@_parser("function results", grammars.JSON, "code", "reward.sandbox")
def _results(text: str) -> object:
    return sandbox._call_result(sandbox.RunResult("ok", 0, "", text, 0.1), as_bytes(text))


@_parser(
    "candidate's values", grammars.PLAIN, "code", "reward.assertions",
    (ValueError, TypeError, KeyError, OverflowError, AttributeError, RecursionError),
)  # fmt: skip
def _plain(text: str) -> object:
    """In the test's own process inside the sandbox, where any exception fails the test."""
    return assertions.plain(json.loads(text))


def as_bytes(text: str) -> bytes:
    """The bytes that a text was decoded from, where there are such."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


NOT_PARSERS = {
    "reward.compiled": "runs compilers in the sandbox",
    "reward.control_tests": "reads a row's tests",
    "reward.fork_server": "inside the sandbox; reads the host's frames",
    "reward.git_objects": "writes",
    "reward.gym": "a package",
    "reward.math_worker": "a process that is killed when it takes too long",
    "reward.nano_repository": "generates",
    "reward.repository_runner": "inside the sandbox",
    "reward.system_calls": "writes",
    "reward.workplace_office": "generates",
    "domains.math": "its answers are read by reward.math_equal",
    "domains.mcqa": "its answers are read by reward.mcqa",
    "domains.nemo_gym": "its answers are read by reward.gym.client",
    "domains.preference": "its answers are read by reward.genrm",
}
"""Modules below `domains` and `reward` without a parser of their own, and why."""
