"""The chat template twice: as the Jinja file that ships with every model, and as pieces that know who wrote them.

Section 4.1 of the method (figure 1 of the paper): ChatML, a system block always, an empty <think></think> for the
non-thinking mode, tools as XML, tool results in user turns. The Jinja file serves other engines; the pieces serve
training, because a string no longer tells template text from a user's text that spells `<|im_end|>`. A test holds them
equal.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_cascade.types import Json, Message, Tool

TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CONTROL = (
    IM_START,
    IM_END,
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""Texts with authority: only the template and the model's own sampled ids may bring them in as tokens."""

TOOLS_BEGIN = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
TOOLS_END = """
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not tell \
the user about function calls
</IMPORTANT>"""


class Piece(NamedTuple):
    """A stretch of the rendered conversation; `trusted` when the template itself wrote it."""

    text: str
    trusted: bool


def _t(text: str) -> Piece:
    return Piece(text, True)


def _u(text: str) -> Piece:
    return Piece(text, False)


def to_json(value: Json) -> str:
    """How the template writes a value that is not a string (as in transformers: plain JSON, no HTML escapes)."""
    return json.dumps(value, ensure_ascii=False)


def value_text(value: Json) -> str:
    """An argument as the template writes it: strings as they are, anything else as JSON."""
    return value if isinstance(value, str) else to_json(value)


def tool_pieces(tool: Tool) -> list[Piece]:
    """One <function> block of the system prompt."""
    pieces = [_t("\n<function>\n<name>"), _u(tool.name), _t("</name>")]
    if tool.description:
        pieces += [_t("\n<description>"), _u(tool.description), _t("</description>")]
    pieces.append(_t("\n<parameters>"))
    properties = tool.parameters.get("properties") or {}
    for name, field in properties.items():
        pieces += [_t("\n<parameter>\n<name>"), _u(name), _t("</name>")]
        if "type" in field:
            pieces += [_t("\n<type>"), _u(value_text(field["type"])), _t("</type>")]
        if field.get("description"):
            pieces += [_t("\n<description>"), _u(field["description"]), _t("</description>")]
        if "enum" in field:
            pieces += [_t("\n<enum>"), _u(to_json(field["enum"])), _t("</enum>")]
        pieces.append(_t("\n</parameter>"))
    if tool.parameters.get("required"):
        pieces += [_t("\n<required>"), _u(to_json(tool.parameters["required"])), _t("</required>")]
    return [*pieces, _t("\n</parameters>\n</function>")]


def system_pieces(system: str, tools: Sequence[Tool]) -> list[Piece]:
    """The system block, present even when empty."""
    pieces = [_t(f"{IM_START}system\n"), _u(system)]
    if tools:
        pieces.append(_t(("\n\n" if system else "") + TOOLS_BEGIN))
        for tool in tools:
            pieces += tool_pieces(tool)
        pieces.append(_t(TOOLS_END))
    return [*pieces, _t(f"{IM_END}\n")]


def answer_pieces(message: Message) -> list[Piece]:
    """Content and tool calls of an assistant turn, without reasoning and end mark."""
    pieces = [_u(message.content)]
    for index, call in enumerate(message.tool_calls):
        pieces += [
            _t("\n" if message.content or index else ""),
            _t("<tool_call>\n<function="),
            _u(call.name),
            _t(">\n"),
        ]
        for name, value in call.arguments.items():
            pieces += [_t("<parameter="), _u(name), _t(">\n"), _u(value_text(value)), _t("\n</parameter>\n")]
        pieces.append(_t("</function>\n</tool_call>"))
    return pieces


def completion_pieces(message: Message, thinking: bool) -> list[Piece]:
    """What the model must produce after the generation prompt of its mode, end mark included.

    In the thinking mode the prompt has already opened <think>; in the other the block is already closed and any
    reasoning of `message` is left out.
    """
    pieces: list[Piece] = []
    if thinking:
        pieces += [_u(message.reasoning), _t("\n</think>\n" if message.reasoning else "</think>\n")]
    return [*pieces, *answer_pieces(message), _t(IM_END)]


def turn_pieces(messages: Sequence[Message], last_user: int) -> list[Piece]:
    """All turns after the system block. Assistant turns before index `last_user` lose their reasoning."""
    pieces: list[Piece] = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            keep = message.reasoning and index > last_user
            thought = [_t("<think>\n"), _u(message.reasoning), _t("\n</think>\n")] if keep else [_t("<think></think>")]
            pieces += [_t(f"{IM_START}assistant\n"), *thought, *answer_pieces(message), _t(f"{IM_END}\n")]
        elif message.role == "tool":
            opens = index == 0 or messages[index - 1].role != "tool"
            closes = index + 1 == len(messages) or messages[index + 1].role != "tool"
            pieces += [_t(f"{IM_START}user" if opens else ""), _t("\n<tool_response>\n"), _u(message.content)]
            pieces += [_t("\n</tool_response>"), _t(f"{IM_END}\n" if closes else "")]
        else:
            pieces += [_t(f"{IM_START}{message.role}\n"), _u(message.content), _t(f"{IM_END}\n")]
    return pieces


def generation_prompt(thinking: bool) -> Piece:
    """The opening of the assistant turn to sample; its end selects the mode."""
    return _t(f"{IM_START}assistant\n<think>\n" if thinking else f"{IM_START}assistant\n<think></think>")


def prompt_pieces(messages: Sequence[Message], tools: Sequence[Tool], thinking: bool) -> list[Piece]:
    """A whole prompt up to and with the generation prompt."""
    system = messages[0].content if messages and messages[0].role == "system" else ""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    last_user = max((index for index, message in enumerate(turns) if message.role == "user"), default=-1)
    return [*system_pieces(system, tools), *turn_pieces(turns, last_user), generation_prompt(thinking)]


@functools.cache
def _compiled() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = to_json
    return environment.from_string(TEMPLATE_FILE.read_text())


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Json]]:
    """Messages in the OpenAI form that chat templates take."""
    rows: list[dict[str, Json]] = []
    for message in messages:
        row: dict[str, Json] = {"role": message.role, "content": message.content}
        if message.reasoning:
            row["reasoning_content"] = message.reasoning
        if message.tool_calls:
            calls = message.tool_calls
            row["tool_calls"] = [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in calls]
        rows.append(row)
    return rows


def tool_dicts(tools: Sequence[Tool]) -> list[dict[str, Json]]:
    """Tools in the OpenAI form."""
    return [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
        }
        for t in tools
    ]


def render_prompt(messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool = True) -> str:
    """A prompt as text, by the Jinja file: for people and other engines. Training uses `ChatTokenizer.prompt_ids`."""
    values: Mapping[str, object] = {
        "messages": as_dicts(messages),
        "tools": tool_dicts(tools),
        "enable_thinking": thinking,
        "add_generation_prompt": True,
    }
    return _compiled().render(**values)
