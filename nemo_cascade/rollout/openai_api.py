"""The OpenAI protocol as records: bodies in, requests and sampling parameters out, completions back into answers.

Extensions beside the standard: prompts may be token ids; with several prompts `seed` and `max_tokens` may be lists, one
per prompt; answers carry `token_ids` and the `version` of the weights, and with `return_routed_experts` also
`routed_experts`: base64 of uint8 [prompt and answer tokens, MoE layers, top-k], 255 where none is known. Messages may
have the roles `response_1` and `response_2` of the generative reward model. Not here: streaming, `best_of`, penalties,
`logit_bias`; asking for one is an error, not silence.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping, Sequence

from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.rows import MAX_NESTING, too_deep
from nemo_cascade.types import Completion, Json, Message, Request, SamplingParams, Tool, ToolCall, UserError

DEFAULT_MAX_TOKENS = 256
MAX_COPIES = 4096  # answers to one prompt of one request
LARGEST = 2.0**53  # what fits into a float without loss
REFUSED = ("best_of", "logit_bias", "frequency_penalty", "presence_penalty", "stream", "echo", "stop")
ROLES = ("system", "user", "assistant", "tool", "response_1", "response_2")

Asked = list[tuple[Request, SamplingParams]]


def refuse_unsupported(body: Mapping[str, Json]) -> None:
    """A field that would change the answer and that this server does not honour."""
    for key in REFUSED:
        if body.get(key):
            raise UserError(f"{key}: not supported by this server; leave it out")


def body_of(content: bytes) -> dict[str, Json]:
    """The JSON object of a request."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"body: not JSON: {error}") from error
    if not isinstance(body, dict):
        raise UserError("body: a JSON object is needed")
    if too_deep(body):
        raise UserError(f"body: nested deeper than {MAX_NESTING} levels")
    return body


def number(body: Mapping[str, Json], key: str, default: float) -> float:
    """A number of the body."""
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        raise UserError(f"{key}: {repr(value)[:60]} is not a number")
    return value


def per_prompt(body: Mapping[str, Json], key: str, count: int) -> list[int] | None:
    """A whole number for all prompts or a list with one for each; None when absent."""
    value = body.get(key)
    if value is None:
        return None
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise UserError(f"{key}: {value!r} must be a whole number, or a list of {count}, one per prompt")
    return [int(item) for item in values]  # type: ignore[arg-type]


LOGPROBS_MODES = {"processed_logprobs": "kept", "raw_logprobs": "raw"}
"""Whose log-probabilities an answer carries, in the words of other inference servers -> `SamplingParams.logprobs`."""


def asked(body: Mapping[str, Json], prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> Asked:
    """Requests for every prompt, `n` of each; sample i of a prompt uses seed + i. No seed: a fresh one."""
    refuse_unsupported(body)
    copies = int(number(body, "n", 1))
    if not 1 <= copies <= MAX_COPIES:
        raise UserError(f"n: {copies} is not between 1 and {MAX_COPIES}")
    seeds = per_prompt(body, "seed", len(prompts))
    key = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    limits = per_prompt(body, key, len(prompts)) or [DEFAULT_MAX_TOKENS] * len(prompts)
    stops = body.get("stop_token_ids")
    if stops is not None and not _is_ids(stops):
        raise UserError("stop_token_ids: a list of token ids is needed")
    mode = body.get("logprobs_mode", "processed_logprobs")
    if not isinstance(mode, str) or mode not in LOGPROBS_MODES:
        raise UserError(f"logprobs_mode: {mode!r} is not one of {', '.join(LOGPROBS_MODES)}")
    params = SamplingParams(
        max_new_tokens=max(limits),
        temperature=float(number(body, "temperature", 1.0)),
        top_p=float(number(body, "top_p", 1.0)),
        top_k=int(number(body, "top_k", 0)),
        stop_ids=tuple(stop_ids if stops is None else stops),  # type: ignore[arg-type]
        logprobs=LOGPROBS_MODES[mode],
        routed_experts=body.get("return_routed_experts") is True,
    )
    found: Asked = []
    for index, prompt in enumerate(prompts):
        seed = secrets.randbits(62) if seeds is None else seeds[index]
        found += [(Request(tuple(prompt), seed + copy, limits[index]), params) for copy in range(copies)]
    return found


def prompts_of(body: Mapping[str, Json], chat: ChatTokenizer | None) -> list[list[int]]:
    """`prompt` of /v1/completions: a text, token ids, or a list of either."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [_encoded(prompt, chat)]
    if not isinstance(prompt, list) or not prompt:
        raise UserError("prompt: a text, a list of token ids, or a list of prompts is needed")
    if _is_ids(prompt):
        return [list(prompt)]  # type: ignore[arg-type]
    prompts: list[list[int]] = []
    for item in prompt:
        if isinstance(item, str):
            prompts.append(_encoded(item, chat))
        elif _is_ids(item):
            prompts.append(list(item))  # type: ignore[arg-type]
        else:
            raise UserError("prompt: a list of prompts holds texts or lists of token ids")
    return prompts


def _is_ids(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _encoded(text: str, chat: ChatTokenizer | None) -> list[int]:
    if chat is None:
        raise UserError("prompt: this model folder has no tokenizer; send token ids")
    return chat.encode_text(text)


def messages_of(body: Mapping[str, Json]) -> list[Message]:
    """The messages of a chat request."""
    rows = body.get("messages")
    if not isinstance(rows, list) or not rows:
        raise UserError("messages: a list with at least one message is needed")
    return [_message(row, index) for index, row in enumerate(rows)]


def _message(row: Json, index: int) -> Message:
    if not isinstance(row, dict) or row.get("role") not in ROLES:
        raise UserError(f"messages[{index}].role: one of {', '.join(ROLES)} is needed")
    content = row.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    calls = row.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UserError(f"messages[{index}].tool_calls: a list is needed")
    reasoning = str(row.get("reasoning_content") or "")
    role = str(row["role"])
    return Message(role, str(content), reasoning, tuple(_call(call, index) for call in calls))  # type: ignore[arg-type]


def _call(row: Json, index: int) -> ToolCall:
    function = row.get("function") if isinstance(row, dict) else None
    if not isinstance(function, dict):
        raise UserError(f"messages[{index}].tool_calls: every call needs `function` with `name` and `arguments`")
    arguments = function.get("arguments") or {}
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise UserError(f"messages[{index}].tool_calls: arguments are not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise UserError(f"messages[{index}].tool_calls: arguments must be a JSON object")
    return ToolCall(str(function.get("name")), parsed)


def tools_of(body: Mapping[str, Json]) -> list[Tool]:
    """The tools of a chat request."""
    rows = body.get("tools") or []
    tools: list[Tool] = []
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        function = row.get("function") if isinstance(row, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"tools[{index}]: `function` with a `name` is needed")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict) or not _are_fields(parameters.get("properties") or {}):
            raise UserError(f"tools[{index}].function.parameters: a JSON schema with `properties` of objects is needed")
        tools.append(Tool(str(function["name"]), str(function.get("description") or ""), parameters))
    return tools


def _are_fields(properties: Json) -> bool:
    """Whether each property is an object, as the chat template writes them, with a text as its description."""
    fields = properties.values() if isinstance(properties, dict) else [None]
    return all(isinstance(field, dict) and isinstance(field.get("description") or "", str) for field in fields)


def completion_choice(
    index: int, completion: Completion, chat: ChatTokenizer | None, logprobs: bool
) -> dict[str, Json]:
    """One choice of /v1/completions."""
    texts = [chat.decode([token]) for token in completion.token_ids] if chat and logprobs else []
    choice: dict[str, Json] = {
        "index": index,
        "text": "" if chat is None else chat.decode(completion.token_ids),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish,
        "version": completion.version,
        "logprobs": None,
    }
    if completion.routed_experts:
        choice["routed_experts"] = base64.b64encode(completion.routed_experts).decode("ascii")
    if logprobs:
        choice["logprobs"] = {"tokens": list(texts), "token_logprobs": list(completion.logprobs)}
    return choice


def chat_choice(
    index: int, completion: Completion, chat: ChatTokenizer, thinking: bool, tools: Sequence[Tool]
) -> dict[str, Json]:
    """One choice of /v1/chat/completions, reasoning and tool calls taken apart."""
    answer = chat.parse_assistant(completion.token_ids, thinking, tools)
    calls: list[Json] = [
        {
            "id": f"call_{place}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
        }
        for place, call in enumerate(answer.tool_calls)
    ]
    message: dict[str, Json] = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if calls:
        message["tool_calls"] = calls
    finish = "tool_calls" if calls else completion.finish
    rows: list[Json] = [
        {"token": chat.decode([token]), "token_id": token, "logprob": logprob}
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return {"index": index, "message": message, "finish_reason": finish, "logprobs": {"content": rows}}


def usage(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> dict[str, Json]:
    """Token counts of an answer."""
    read = sum(len(prompt) for prompt in prompts)
    written = sum(len(completion.token_ids) for completion in completions)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
