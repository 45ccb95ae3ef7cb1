"""What travels to a NeMo-Gym server: a Task as a row, a Transcript as the Responses object that `/verify` reads.

The inverse of `data/rows.py` and `data/responses.py`: writing a Task or a Transcript and reading it back gives the same
one, so that a verdict does not depend on whether it was asked for over HTTP. Two assistant turns in a row, which no
environment of ours leaves, would come back as one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from nemo_cascade.data import rows
from nemo_cascade.types import Json, Message, Task, Transcript, UserError

OURS = "nemo_cascade"
"""Key below `verifier_metadata` where a row of ours keeps what no released field holds: id, mode and truth."""


def row_of(task: Task) -> dict[str, Json]:
    """A Task as a NeMo-Gym row, for servers of ours: `task_of` reads it back."""
    tools: list[Json] = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": dict(tool.parameters),
            "strict": False,
        }
        for tool in task.tools
    ]
    ours: dict[str, Json] = {"id": task.id, "thinking": task.thinking, "truth": dict(task.truth)}
    return {
        "responses_create_params": {"input": input_items(task.messages), "tools": tools, "parallel_tool_calls": True},
        "agent_ref": {"type": "responses_api_agents", "name": f"{task.domain}_simple_agent"},
        "verifier_metadata": {OURS: ours},
    }


def task_of(row: Mapping[str, Json], domain: str, row_id: str) -> Task | None:
    """The Task that `row_of` wrote; None for a row from elsewhere, UserError for one of ours that is broken."""
    metadata = row.get("verifier_metadata")
    ours = metadata.get(OURS) if isinstance(metadata, Mapping) else None
    if ours is None:
        return None
    where = f"{row_id} verifier_metadata.{OURS}"
    if not isinstance(ours, Mapping):
        raise UserError(f"{where}: must be an object, this is {type(ours).__name__}")
    return Task(
        rows.field(ours, "id", str, where),
        domain,
        rows.input_messages(row, row_id),
        rows.input_tools(row, row_id),
        rows.field(ours, "thinking", bool, where),
        rows.field(ours, "truth", dict, where),
    )


def input_items(messages: Sequence[Message]) -> list[Json]:
    """A prompt as Responses input: messages, with calls and their outputs as items of their own."""
    items: list[Json] = []
    for message, item in _items(messages):
        if item.get("type") == "message":
            items.append({"role": message.role, "content": message.content})
        elif item.get("type") != "reasoning":
            items.append(item)
    return items


def response_of(transcript: Transcript, model: str = "policy") -> dict[str, Json]:
    """A finished rollout as the Responses object of the agent that played it."""
    output: list[Json] = []
    for message, item in _items(transcript.messages):
        if item.get("type") == "message" and message.role == "user":
            output.append({"type": "message", "role": "user", "content": message.content})
        else:
            output.append(item)
    name = hashlib.sha256(json.dumps(output, sort_keys=True).encode()).hexdigest()[:24]
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": 0.0,
        "model": model,
        "status": "incomplete" if transcript.truncated else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if transcript.truncated else None,
        "error": None,
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


def _items(messages: Sequence[Message]) -> Iterator[tuple[Message, dict[str, Json]]]:
    """(message, Responses item) in order; the tool turns after a turn with calls answer these calls in their order."""
    calls, pending = 0, []
    for number, message in enumerate(messages):
        if message.role == "tool":
            call_id = pending.pop(0) if pending else f"call_{calls}"
            yield message, {"type": "function_call_output", "call_id": call_id, "output": message.content}
            continue
        if message.role == "assistant" and message.reasoning:
            summary: list[Json] = [{"type": "summary_text", "text": message.reasoning}]
            yield message, {"type": "reasoning", "id": f"rs_{number}", "summary": summary}
        if message.role != "assistant" or message.content or not (message.tool_calls or message.reasoning):
            text: dict[str, Json] = {"type": "output_text", "text": message.content, "annotations": []}
            yield (
                message,
                {
                    "type": "message",
                    "id": f"msg_{number}",
                    "role": message.role,
                    "status": "completed",
                    "content": [text],
                },
            )
        pending = []
        for call in message.tool_calls:
            pending.append(f"call_{calls}")
            calls += 1
            arguments = json.dumps(dict(call.arguments))
            yield (
                message,
                {"type": "function_call", "call_id": pending[-1], "name": call.name, "arguments": arguments},
            )
