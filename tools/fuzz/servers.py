"""What judges, model servers and sandboxed programs answer, and what clients ask of our servers."""

from __future__ import annotations

import json
from http.client import HTTPMessage
from types import SimpleNamespace

from nemo_cascade.data.gym_wire import response_of
from nemo_cascade.data.responses import transcript_of
from nemo_cascade.data.rows import too_deep
from nemo_cascade.domains import tool_use
from nemo_cascade.reward import assertions, judge, patience, sandbox, wire
from nemo_cascade.reward.genrm import parse_verdict
from nemo_cascade.reward.gym.client import outcome_of
from nemo_cascade.reward.gym.service import DOMAIN_ERRORS, GymService, Handler
from nemo_cascade.rollout import openai_api
from nemo_cascade.types import UserError
from tools.fuzz import grammars
from tools.fuzz.calls import gold, tokenizer
from tools.fuzz.catalogue import as_bytes, parser


@parser("comparisons", grammars.VERDICTS, "preference", "reward.genrm reward.preference_judge")
def _comparisons(text: str) -> object:
    return parse_verdict(judge._THINKING.sub("", text))


@parser("equivalence", grammars.VERDICTS, "long_context", "reward.judge")
def _equivalence(text: str) -> object:
    return judge.parse_equivalence(text)


@parser("judge's replies", grammars.CHOICES, "preference long_context", "reward.judge", (ValueError,))
def _judge_reply(text: str) -> object:
    return judge._content(text)


@parser("pauses", grammars.PAUSES, "preference long_context nemo_gym", "reward.patience")
def _pauses(text: str) -> object:
    """A `Retry-After` header, and the pause that follows it."""
    return patience.pause_after(3, patience.retry_after(text))


@parser("gym verdicts", grammars.OUTCOMES, "nemo_gym", "reward.gym.client", (ValueError,))
def _gym_verdict(text: str) -> object:
    return outcome_of(text)


@parser("responses", grammars.RESPONSES, "nemo_gym", "data.responses", (UserError,))
def _responses(text: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    value = value if isinstance(value, dict) else {"output": value}
    if too_deep(value):
        return None
    transcript = transcript_of(value, "response")
    return response_of(transcript), tool_use.ToolUse().score(gold("tool_use"), transcript)


class _Asked(Handler):
    """A gym server's handler without a socket: the path and the cookie are given, the answer is returned."""

    def __init__(self, path: str, service: GymService) -> None:
        self.path, self.headers = path, HTTPMessage()
        self.server = SimpleNamespace(service=service, stopped=False)  # type: ignore[assignment]


@parser(
    "gym requests", grammars.GYM_BODIES, "nemo_gym tool_use", "reward.gym.service data.gym_wire", DOMAIN_ERRORS
)  # fmt: skip
def _gym_requests(text: str) -> object:
    """What `do_POST` reads, rows and their truth included; a UserError is its answer 422, a domain's error its 500."""
    content, service = as_bytes(text), GymService(tool_use.ToolUse())
    path = next((path for path in ("verify", "aggregate_metrics", "seed_session") if _WANTS[path] in text), "find")
    return _Asked(f"/{path}", service)._answer(content)


_WANTS = {"verify": '"response"', "aggregate_metrics": '"verify_responses"', "seed_session": "responses_create_params"}


@parser("chat requests", grammars.API_BODIES, "preference nemo_gym", "rollout.openai_api", (UserError,), seconds=3.0)
def _api_requests(text: str) -> object:
    body = openai_api.body_of(as_bytes(text))
    chat = tokenizer()
    if "messages" not in body:
        prompts = openai_api.prompts_of(body, chat)
    else:
        prompts = [chat.messages_ids(openai_api.messages_of(body), openai_api.tools_of(body), True)]
    return openai_api.asked(body, prompts, chat.stop_ids)


@parser("frames", grammars.FRAMES, "code swe_agentless swe_agentic", "reward.wire reward.bubblewrap", (ValueError,))
def _frames(text: str) -> object:
    return wire.decode(as_bytes(text))


@parser("function results", grammars.JSON, "code", "reward.sandbox")
def _results(text: str) -> object:
    return sandbox._call_result(sandbox.RunResult("ok", 0, "", text, 0.1), as_bytes(text))


@parser(
    "candidate's values", grammars.PLAIN, "code", "reward.assertions",
    (ValueError, TypeError, KeyError, OverflowError, AttributeError, RecursionError),
)  # fmt: skip
def _plain(text: str) -> object:
    """In the test's own process inside the sandbox, where any exception fails the test."""
    return assertions.plain(json.loads(text))
