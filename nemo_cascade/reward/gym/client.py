"""A running NeMo-Gym resources server: one session per rollout, tools as calls to it, the verdict from `/verify`.

    POST /seed_session   the row                    -> a cookie that names the session
    POST /TOOL           the call's arguments       -> what the model reads, word for word
    POST /verify         the row and its `response` -> `reward`

A server that is down, slow, rate-limited or that answers nonsense is no fault of the policy: it is asked again with
growing pauses (`Retry-After` is kept to), then the rollout is lost with a reason. A call that the server may already
have acted on is never repeated in its session: a fresh session replays what came before, and a server that answers the
replay differently is not believed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TypeVar
from urllib.parse import quote

from nemo_cascade.config.bounds import web_address
from nemo_cascade.data.gym_wire import response_of
from nemo_cascade.reward.patience import Health, pause_after, retry_after
from nemo_cascade.types import Invalid, Json, Outcome, Scored, Transcript

T = TypeVar("T")
log = logging.getLogger(__name__)
AGAIN = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses that speak of the server and not of the request."""
NOT_DONE = frozenset({425, 429, 503})
"""Of these, the ones that promise that nothing was done."""
MAX_ANSWER_BYTES = 64 << 20
MAX_TOOL_CHARS = 1 << 20


class Lost(Exception):
    """The server did not do its part within the deadline; the message says what went wrong."""


class _Trouble(Exception):
    """A request that failed and may be made again. `acted`: the server may have acted on it already."""

    def __init__(self, message: str, acted: bool, pause_s: float = 0.0) -> None:
        super().__init__(message)
        self.acted, self.pause_s = acted, pause_s


@dataclass(frozen=True)
class _Answer:
    status: int
    text: str
    cookies: Mapping[str, str]


class GymClient:
    """One server at one address. Safe to share between threads; `timeout_s` bounds a call with all its retries.

    A server that is gone is not asked for `timeout_s`, as in `Judge`: a stage notices after about one timeout.
    """

    def __init__(self, url: str, timeout_s: float = 300.0, retries: int = 4) -> None:
        import httpx  # takes longer to import than the rest of the package together

        web_address("address of a NeMo-Gym server", url)
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        self.health = Health(timeout_s)
        no_jar = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # cookies belong to sessions, not to the client
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.Client(cookies=no_jar, limits=limits, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def post(self, path: str, body: Json, cookies: Mapping[str, str], deadline: float) -> _Answer:
        """One request, once; _Trouble when it may be made again."""
        import httpx

        left = max(deadline - time.monotonic(), 0.001)
        headers = {"Content-Type": "application/json"}
        if cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        chunks: list[bytes] = []
        size = 0
        try:
            timeout = httpx.Timeout(left, connect=min(left, 10.0))
            content = json.dumps(body).encode()
            with self._client.stream("POST", self.url + path, content=content, headers=headers, timeout=timeout) as got:
                for chunk in got.iter_bytes():
                    chunks.append(chunk)
                    size += len(chunk)
                    if time.monotonic() > deadline:
                        raise _Trouble("the answer was still coming at the deadline", acted=True)
                    if size > MAX_ANSWER_BYTES:
                        raise _Trouble(f"an answer longer than {MAX_ANSWER_BYTES} bytes", acted=True)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _Trouble(str(error) or type(error).__name__, acted=False) from error
        except httpx.HTTPError as error:
            raise _Trouble(str(error) or type(error).__name__, acted=True) from error
        text = b"".join(chunks).decode("utf-8", "replace")
        if got.status_code in AGAIN:
            problem = f"HTTP {got.status_code}: {_short(text)}"
            raise _Trouble(problem, got.status_code not in NOT_DONE, retry_after(got.headers.get("Retry-After")))
        return _Answer(got.status_code, text, {cookie.name: cookie.value or "" for cookie in got.cookies.jar})

    def until_done(self, what: str, run: Callable[[float], T], spoiled: Callable[[], None]) -> T:
        """`run(deadline)` with retries; `spoiled` is called before a retry of what may have been done already."""
        silent_s = self.health.gone()
        if silent_s:
            raise Lost(
                f"{self.url} is gone: none of its last {self.health.failed} calls was answered in {silent_s:.3g} s; it "
                f"is called again after {self.timeout_s:g} s"
            )
        deadline, problem = time.monotonic() + self.timeout_s, "it was never reached"
        for attempt in range(self.retries + 1):
            try:
                done = run(deadline)
                self.health.answered()
                return done
            except _Trouble as trouble:
                problem = str(trouble)
                if trouble.acted:
                    spoiled()
                pause = pause_after(attempt, trouble.pause_s)
            left = deadline - time.monotonic()
            if attempt == self.retries or left <= pause:
                break
            log.warning("%s: %s: %s; trying again, %.0f s left", self.url, what, problem, left)
            time.sleep(pause)
        self.health.left_unanswered()
        raise Lost(f"{self.url}: {what} failed within {self.timeout_s:g} s: {problem}")


class Session:
    """One rollout's session on a server. `history` is what has been called in it, with the answers that were read."""

    def __init__(
        self, client: GymClient, row: Mapping[str, Json], history: Sequence[tuple[str, Json, str]] = ()
    ) -> None:
        self.client, self.row = client, row
        self.history = list(history)
        self._cookies: dict[str, str] | None = None  # None: first seed a session and replay the history in it

    def open(self) -> None:
        """Seed the session; Lost when the server does not."""
        self.client.until_done("/seed_session", self._ready, self._spoil)

    def call(self, tool: str, arguments: Mapping[str, Json]) -> str:
        """A tool's answer as the model reads it: the body, whatever the status, as NeMo-Gym's own agent does."""

        def once(deadline: float) -> str:
            self._ready(deadline)
            return self._tool(tool, dict(arguments), deadline)

        text = self.client.until_done(f"tool {tool}", once, self._spoil)
        self.history.append((tool, dict(arguments), text))
        return text

    def verify(self, transcript: Transcript) -> Outcome:
        """The server's verdict; Invalid with a reason when there is none."""
        body: dict[str, Json] = {**self.row, "response": response_of(transcript)}

        def once(deadline: float) -> Outcome:
            self._ready(deadline)
            answer = self.client.post("/verify", body, self._cookies or {}, deadline)
            if answer.status >= 500:
                raise _Trouble(f"HTTP {answer.status}: {_short(answer.text)}", acted=True)
            if answer.status != 200:
                return Invalid(f"{self.client.url}/verify refuses the row: HTTP {answer.status}: {_short(answer.text)}")
            try:
                return outcome_of(answer.text)
            except ValueError as error:
                raise _Trouble(f"no verdict: {error}", acted=True) from error

        try:
            return self.client.until_done("/verify", once, self._spoil)
        except Lost as error:
            return Invalid(str(error))

    def _spoil(self) -> None:
        self._cookies = None

    def _ready(self, deadline: float) -> None:
        """Seed, then replay the history, unless that is done. A server without `/seed_session` keeps no sessions."""
        if self._cookies is not None:
            return
        answer = self.client.post("/seed_session", dict(self.row), {}, deadline)
        if answer.status >= 500:
            raise _Trouble(f"/seed_session: HTTP {answer.status}: {_short(answer.text)}", acted=False)
        if answer.status not in (200, 404, 405):
            raise Lost(f"{self.client.url}/seed_session refuses the row: HTTP {answer.status}: {_short(answer.text)}")
        self._cookies = dict(answer.cookies)
        for tool, arguments, said in self.history:
            again = self._tool(tool, arguments, deadline)
            if again != said:
                raise Lost(
                    f"{self.client.url}: a fresh session answered {tool} with {_short(again, 60)!r}, the rollout read "
                    f"{_short(said, 60)!r}; its state cannot be brought back"
                )

    def _tool(self, tool: str, arguments: Json, deadline: float) -> str:
        answer = self.client.post(f"/{quote(tool, safe='')}", arguments, self._cookies or {}, deadline)
        if answer.cookies:
            self._cookies = {**(self._cookies or {}), **answer.cookies}
        if len(answer.text) > MAX_TOOL_CHARS:
            raise Lost(f"{self.client.url}: {tool} answered {len(answer.text)} characters, over {MAX_TOOL_CHARS}")
        return answer.text


def outcome_of(text: str) -> Outcome:
    """The verdict in a `/verify` answer; ValueError when it holds none.

    `mask_sample` marks a failure of the environment: Invalid. `reward_components` become parts.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{_short(text, 60)!r} is no object")
    why = next((str(found[key]) for key in ("failure_reason", "reason", "error_message") if found.get(key)), "")
    if found.get("mask_sample") is True:
        return Invalid(why or "the server masks this sample and gives no reason")
    reward = _number(found.get("reward"))
    if reward is None:
        raise ValueError(f"reward {found.get('reward')!r} is no finite number")
    components = found.get("reward_components")
    parts = {name: _number(value) for name, value in components.items()} if isinstance(components, dict) else {}
    return Scored(reward, {name: value for name, value in parts.items() if value is not None}, why)


def _number(value: Json) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _short(text: str, length: int = 200) -> str:
    return " ".join(text.split())[:length]
