"""OpenAI Responses objects: what a served model answered, read as the Transcript that domains score.

Recorded NeMo-Gym rollouts carry one below `response`. Its `output` is a flat list of items; the turns have to be found
again: reasoning, text and calls belong to one assistant turn until the environment (a call's output, a user) speaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_cascade.data import rows
from nemo_cascade.types import Json, Message, ToolCall, Transcript, UserError

TRUNCATED = ("max_output_tokens", "max_tokens", "length")


@dataclass
class _Turn:
    """An assistant turn while its items come in."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> Message | None:
        """The turn so far; None when no item belongs to it."""
        if not (self.texts or self.reasoning or self.calls):
            return None
        thought, said = split_thinking("".join(self.texts))
        reasoning = "\n".join([*self.reasoning, *([thought] if thought else [])])
        return Message("assistant", said, reasoning, tuple(self.calls))


def split_thinking(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a text whose server left the thinking in it.

    The answer begins after the last `</think>`; a `<think>` that opens the text and never closes leaves no answer, so
    that nothing in an unfinished thought is graded.
    """
    before, closed, after = text.rpartition("</think>")
    if closed:
        return before.replace("<think>", "", 1).strip(), after.lstrip("\n")
    opened = text.lstrip()
    return (opened.removeprefix("<think>").strip(), "") if opened.startswith("<think>") else ("", text)


def transcript_of(response: Mapping[str, Json], where: str) -> Transcript:
    """The turns of a Responses object; UserError names the item that cannot be read.

    `truncated` is what the server said (`incomplete_details`, or status `incomplete`). Encrypted reasoning has no text
    and leaves none; thinking that the server left in the text is taken out of it. Text after text in one turn is joined
    as it stands.
    """
    messages: list[Message] = []
    turn = _Turn()
    for index, item in enumerate(rows.field(response, "output", list, where)):
        place = f"{where} output[{index}]"
        if not isinstance(item, dict):
            raise UserError(f"{place}: an item must be an object, this is {type(item).__name__}")
        said = _add(turn, item, place)
        if said is not None:
            messages += [message for message in (turn.message(), said) if message is not None]
            turn = _Turn()
    last = turn.message()
    return Transcript((*messages, *([last] if last is not None else [])), _truncated(response))


def _add(turn: _Turn, item: Mapping[str, Json], place: str) -> Message | None:
    """Put an item of the model into its turn; an item of the environment comes back as a message and ends the turn."""
    kind = item.get("type", "message")
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        turn.reasoning += [text for text in [rows.content_text(parts, place)] if text]
    elif kind == "function_call":
        arguments = rows.loose_json(item.get("arguments") or {}, "arguments", place)
        if not isinstance(arguments, dict):
            raise UserError(f"{place}: field 'arguments' must hold an object, this is {type(arguments).__name__}")
        turn.calls.append(ToolCall(rows.field(item, "name", str, place), arguments))
    elif kind == "function_call_output":
        return Message("tool", rows.content_text(item.get("output"), place))
    elif kind == "message" and item.get("role") == "user":
        return Message("user", rows.content_text(item.get("content"), place))
    elif kind == "message" and item.get("role") == "assistant":
        turn.texts.append(_spoken(item.get("content"), place))
    else:
        raise UserError(
            f"{place}: item of type {kind!r} and role {item.get('role')!r}; known: reasoning, function_call, "
            "function_call_output, and message by assistant or user"
        )
    return None


def _spoken(content: Json, place: str) -> str:
    """Text of a message; a refusal is what the model said, too."""
    if isinstance(content, list):
        content = [
            {"text": part.get("refusal")} if isinstance(part, dict) and part.get("type") == "refusal" else part
            for part in content
        ]
    return rows.content_text(content, place)


def _truncated(response: Mapping[str, Json]) -> bool:
    details = response.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, Mapping) else None
    return reason in TRUNCATED or response.get("status") == "incomplete"
