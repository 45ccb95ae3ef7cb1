"""Released NeMo-Gym rows: their fields, read with errors that name the row and the field.

A row's prompt is an OpenAI Responses payload (`responses_create_params`); everything beside it belongs to the verifier.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from nemo_cascade.types import Json, Message, Tool, ToolCall, UserError

T = TypeVar("T")
KINDS = {str: "text", list: "a list", dict: "an object", int: "an integer", bool: "true or false", float: "a number"}
MAX_NESTING = 100  # of lists and objects: Python writes and compares nested values by recursion
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

AGENTS = {
    "instruction_following": "instruction_following",
    "mcqa": "mcqa",
    "workplace_assistant": "tool_use",
    "single_step_tool_use": "tool_use",
    "structured_outputs": "structured_output",
    "math_with_judge": "math",
    "library_judge_math": "math",
    "equivalence_llm_judge": "long_context",
    "genrm": "preference",
    "code_gen": "code",
    "comp_coding": "code",
    "swerl_gen": "swe_agentless",
    "swerl_llm_judge": "swe_agentless",
    "swe_agents": "swe_agentic",
    "swe": "swe_agentic",
}
"""How the `agent_ref.name` of a released row begins -> our domain. Longer names are tried first."""


def agent_domain(row: Mapping[str, Json]) -> str | None:
    """The domain that grades the agent in a row's `agent_ref`; None without one, or for an agent nobody here knows."""
    agent = row.get("agent_ref")
    name = str(agent.get("name", "")) if isinstance(agent, Mapping) else ""
    return next((AGENTS[prefix] for prefix in sorted(AGENTS, key=len, reverse=True) if name.startswith(prefix)), None)


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Json]]]:
    """(`file:line`, row) of each non-empty line; UserError names the line that is no JSON object."""
    place = Path(path)
    if not place.is_file():
        raise UserError(f"{path}: no such file")
    with place.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
                raise UserError(f"{where}: JSON that cannot be read: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: a row must be a JSON object, this is {type(row).__name__}")
            yield where, row


def field(row: Mapping[str, Json], key: str, kind: type[T], row_id: str) -> T:
    """A field that the verifier cannot do without."""
    value = row.get(key)
    if value is None:
        raise UserError(f"{row_id}: field {key!r} is missing")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(
            f"{row_id}: field {key!r} must be {KINDS.get(kind, kind.__name__)}, this is {type(value).__name__}"
        )
    return value


def verifier_field(row: Mapping[str, Json], key: str) -> Json:
    """A verifier field at the top of the row (older data) or below `verifier_metadata` (newer); None when absent."""
    metadata = row.get("verifier_metadata")
    if row.get(key) is None and isinstance(metadata, Mapping):
        return metadata.get(key)
    return row.get(key)


def too_deep(value: Json) -> bool:
    """Whether lists and objects lie deeper in each other than `MAX_NESTING`. What is, can be parsed and not written."""
    level = [value]
    for _ in range(MAX_NESTING):
        containers = [item for item in level if isinstance(item, (list, dict))]
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return True


def loose_json(value: Json, key: str, row_id: str) -> Json:
    """A field that some rows carry as JSON text and others as the value itself."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        if too_deep(found):
            raise UserError(f"{row_id}: field {key!r} is nested deeper than {MAX_NESTING} levels")
        return found
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{row_id}: field {key!r} is text but not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{row_id}: field {key!r} is JSON that cannot be read: {error}") from error


def input_messages(row: Mapping[str, Json], row_id: str) -> tuple[Message, ...]:
    """The prompt: `responses_create_params.input` (messages, or the text of one user turn), else `prompt`."""
    params = row.get("responses_create_params")
    if params is None and isinstance(row.get("prompt"), str):
        return (Message("user", field(row, "prompt", str, row_id)),)
    given = field(row, "responses_create_params", dict, row_id)
    if isinstance(given.get("input"), str) and given["input"]:
        return (Message("user", given["input"]),)
    items = field(given, "input", list, f"{row_id} responses_create_params")
    if not items:
        raise UserError(f"{row_id}: field 'responses_create_params.input' is empty")
    return tuple(_message(item, f"{row_id} input[{index}]") for index, item in enumerate(items))


def _message(item: Json, where: str) -> Message:
    if not isinstance(item, dict):
        raise UserError(f"{where}: a message must be an object, this is {type(item).__name__}")
    if item.get("type") == "function_call":
        arguments = loose_json(item.get("arguments") or {}, "arguments", where)
        if not isinstance(arguments, dict):
            raise UserError(f"{where}: field 'arguments' must be an object, this is {type(arguments).__name__}")
        return Message("assistant", tool_calls=(ToolCall(field(item, "name", str, where), arguments),))
    if item.get("type") == "function_call_output":
        return Message("tool", content_text(item.get("output"), where))
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: field 'role' is {role!r}; known: {', '.join(ROLES)}")
    return Message(ROLES[role], content_text(item.get("content"), where))


def content_text(content: Json, where: str) -> str:
    """Text, or the text parts of a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        odd = next((part for part in content if not isinstance(part, dict)), None)
        if odd is not None or None in content:
            raise UserError(f"{where}: field 'content' holds a part that is no object but {type(odd).__name__}")
        return "".join(field(part, "text", str, where) for part in content)
    raise UserError(f"{where}: field 'content' must be text or a list of text parts, this is {type(content).__name__}")


def input_tools(row: Mapping[str, Json], row_id: str) -> tuple[Tool, ...]:
    """The tools of the prompt, in the Responses form or nested below `function`."""
    params = row.get("responses_create_params")
    entries = params.get("tools") or [] if isinstance(params, dict) else []
    if not isinstance(entries, list):
        raise UserError(f"{row_id}: field 'tools' must be a list, this is {type(entries).__name__}")
    tools = []
    for index, entry in enumerate(entries):
        where = f"{row_id} tools[{index}]"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: a tool must be an object, this is {type(entry).__name__}")
        body = entry.get("function") if isinstance(entry.get("function"), dict) else entry
        optional = {"description": body.get("description") or "", "parameters": body.get("parameters") or {}}
        described = field(optional, "description", str, where)
        tools.append(Tool(field(body, "name", str, where), described, field(optional, "parameters", dict, where)))
    return tuple(tools)
