"""Responses objects become the turns they were made of."""

from __future__ import annotations

import pytest

from nemo_cascade.data.responses import transcript_of
from nemo_cascade.types import Message, ToolCall, UserError


def text(content: str, role: str = "assistant") -> dict[str, object]:
    return {"type": "message", "role": role, "content": [{"type": "output_text", "text": content}]}


def call(name: str, arguments: str) -> dict[str, object]:
    return {"type": "function_call", "name": name, "arguments": arguments, "call_id": f"call_{name}"}


def output(content: str) -> dict[str, object]:
    return {"type": "function_call_output", "call_id": "call_x", "output": content}


def test_one_message_is_one_turn() -> None:
    transcript = transcript_of({"output": [text("four")], "status": "completed", "incomplete_details": None}, "r:1")
    assert transcript.messages == (Message("assistant", "four"),)
    assert not transcript.truncated


def test_reasoning_text_and_parallel_calls_share_a_turn() -> None:
    reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "look it up"}], "content": None}
    found = transcript_of(
        {
            "output": [
                reasoning,
                text("One moment."),
                call("find", '{"name": "Dan"}'),
                call("find", '{"name": "Eva", "page": 2}'),
                output('{"output": "41"}'),
                output("none"),
                {"type": "reasoning", "summary": [], "encrypted_content": "x"},
                text("It is 41."),
            ]
        },
        "r:1",
    )
    calls = (ToolCall("find", {"name": "Dan"}), ToolCall("find", {"name": "Eva", "page": 2}))
    assert found.messages == (
        Message("assistant", "One moment.", "look it up", calls),
        Message("tool", '{"output": "41"}'),
        Message("tool", "none"),
        Message("assistant", "It is 41."),
    )
    assert found.final.content == "It is 41."


def test_reasoning_of_open_models_users_and_refusals() -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "2+2"}]}
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    found = transcript_of({"output": [thought, text("4"), text("Sure?", "user"), refused]}, "r:1")
    assert found.messages == (Message("assistant", "4", "2+2"), Message("user", "Sure?"), Message("assistant", "No."))


def test_a_turn_may_be_calls_alone_or_nothing() -> None:
    ended = transcript_of({"output": [call("done", "")]}, "r:1")
    assert ended.messages == (Message("assistant", tool_calls=(ToolCall("done", {}),)),)
    assert transcript_of({"output": []}, "r:1").final == Message("assistant")


@pytest.mark.parametrize(
    ("extra", "truncated"),
    [
        ({"incomplete_details": {"reason": "max_output_tokens"}}, True),
        ({"status": "incomplete"}, True),
        ({"status": "completed", "incomplete_details": None}, False),
        ({"incomplete_details": {"reason": "content_filter"}, "status": "completed"}, False),
    ],
)
def test_truncation_is_what_the_server_said(extra: dict[str, object], truncated: bool) -> None:
    assert transcript_of({"output": [text("four")], **extra}, "r:1").truncated is truncated


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({}, "r:1: field 'output' is missing"),
        ({"output": ["four"]}, r"r:1 output\[0\]: an item must be an object, this is str"),
        ({"output": [text("a"), {"type": "web_search_call"}]}, r"output\[1\]: item of type 'web_search_call'"),
        ({"output": [call("find", "{name")]}, r"output\[0\]: field 'arguments' is text but not JSON"),
        ({"output": [call("find", "[1]")]}, "must hold an object, this is list"),
        ({"output": [{"type": "function_call", "arguments": "{}"}]}, "field 'name' is missing"),
        ({"output": [{"role": "assistant", "content": 3}]}, "field 'content' must be text or a list"),
    ],
)
def test_mistakes_are_named(response: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        transcript_of(response, "r:1")


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nIs it \\boxed{A}?</think>\n\n\\boxed{B}", "Is it \\boxed{A}?", "\\boxed{B}"),
        ("Is it A?</think>B", "Is it A?", "B"),
        ("<think>a</think>b<think>c</think>d", "a</think>b<think>c", "d"),
        (" <think>It is \\boxed{A}", "It is \\boxed{A}", ""),
        ("no thought", "", "no thought"),
        ("say <think> aloud", "", "say <think> aloud"),
    ],
)
def test_thinking_left_in_the_text_is_no_answer(text, reasoning, content):
    item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
    final = transcript_of({"output": [item]}, "x").final
    assert (final.reasoning, final.content) == (reasoning, content)
