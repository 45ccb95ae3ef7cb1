"""Tool calls of a model, and the answers to them as it reads them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping

from nemo_cascade.config.paths import NANO_TOKENIZER
from nemo_cascade.data.chat import ChatTokenizer, parse_text
from nemo_cascade.data.rows import too_deep
from nemo_cascade.domains import structured_output, swe_agentic, tool_use
from nemo_cascade.types import Json, Task, Tool, ToolCall, Transcript
from tools.fuzz import grammars
from tools.fuzz.answers import SCHEMA
from tools.fuzz.catalogue import parser

_FIELDS: dict[str, Json] = {
    **{"name": {"type": "string"}, "count": {"type": "integer"}, "rows": {"type": "array"}},
    **{"id": {}, "a": {"type": "object"}},
}
TYPED = (Tool("find", "", {"type": "object", "properties": _FIELDS}), Tool("move", "", {"type": "object"}))


@parser("structured calls", grammars.CALLS, "structured_output", "domains.structured_output data.chat")
def _structured_calls(text: str) -> object:
    truth: dict[str, Json] = {"schema_str": SCHEMA, "tool_name": "find", "tool_payload_key": None}
    task = Task("t", "structured_output", (), (), True, truth)
    return structured_output.StructuredOutput().score(task, Transcript((parse_text(text, True, TYPED),)))


@functools.cache
def tokenizer() -> ChatTokenizer:
    """The nano tokenizer."""
    return ChatTokenizer(NANO_TOKENIZER)


@functools.cache
def gold(name: str) -> Task:
    """The task of a domain's first gold case."""
    known = {"tool_use": tool_use.ToolUse, "swe_agentic": swe_agentic.SweAgentic}
    return known[name]().cases()[0].task


@parser("turns", grammars.CALLS, "tool_use swe_agentic nemo_gym", "data.chat data.template", seconds=3.0)
def _turns(text: str) -> object:
    """A sampled turn, the environment's answer to it, and the tokens that the model reads next."""
    found = []
    for thinking in (True, False):
        message = parse_text(text, thinking, TYPED)
        replies = tool_use.ToolUse().begin(gold("tool_use")).reply(message) or ()
        found.append(tokenizer().reply_ids(replies, thinking) + tokenizer().completion_ids(message, thinking))
    return found


@parser("encoded text", grammars.TEXT, "nemo_gym preference", "data.chat", seconds=3.0)
def _encoded(text: str) -> object:
    return tokenizer().encode_text(text)


def calls_of(text: str) -> Iterable[tuple[str, Mapping[str, Json]]]:
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


@parser("diary calls", grammars.TOOL_CALLS, "tool_use", "domains.tool_use")
def _diary_calls(text: str) -> object:
    episode = tool_use.ToolUse().begin(gold("tool_use"))
    answers = [tool_use.run_call(episode.backend, tuple(tool_use.TOOLS), ToolCall(*call)) for call in calls_of(text)]
    return answers, episode.backend.state()


@parser("office calls", grammars.OFFICE_CALLS, "tool_use", "reward.workplace reward.workplace_tables")
def _office_calls(text: str) -> object:
    office = tool_use.Workplace(tool_use.workplace_office.FOLDER)
    return [office.call(*call) for call in calls_of(text)], office.state()


@parser("repository calls", grammars.REPOSITORY_CALLS, "swe_agentic", "domains.swe_agentic")
def _repository_calls(text: str) -> object:
    copy = swe_agentic.WorkingCopy(gold("swe_agentic"), swe_agentic._not_now)
    copy.offered = set(swe_agentic.TOOLS)
    return [copy.call(ToolCall(*call)) for call in calls_of(text)]
