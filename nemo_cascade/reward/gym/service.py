"""One of our domains behind NeMo-Gym's resources-server protocol, for NeMo-Gym's agents, NeMo-RL and whoever speaks it.

    POST /seed_session       a row         -> {} and the cookie of a session with a fresh environment
    POST /TOOL               arguments     -> the environment's answer, as text
    POST /verify             row, response -> the row again, `reward`, `reason`, `reward_components`
    POST /aggregate_metrics  {"verify_responses": [...]} -> the mean reward
    GET  /reverify_mode      "stateless": `/verify` reads the response alone, so it may be asked again
    GET  /health

A verdict that failed on our side comes back as `mask_sample: true` with `failure_reason` and reward 0, NeMo-Gym's way
of saying that the sample is not a measurement. It listens on 127.0.0.1 unless told otherwise, asks for no password and
runs no code of its callers but what the domain runs in its sandbox.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from nemo_cascade.data.gym_wire import task_of
from nemo_cascade.data.responses import transcript_of
from nemo_cascade.data.rows import MAX_NESTING, field, too_deep
from nemo_cascade.protocols import Domain, Episode
from nemo_cascade.types import Invalid, Json, Message, Task, ToolCall, UserError

log = logging.getLogger(__name__)
COOKIE = "nemo_cascade_session"
MAX_BODY_BYTES = 64 << 20
MAX_SESSIONS = 4096
VERDICTS_AT_ONCE = 64
DOMAIN_ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a domain of the user's own may raise: one answer with status 500, and the server goes on."""
Body = dict[str, Json]


class Reply(NamedTuple):
    """A status, a body (text as it is, anything else as JSON) and the session to set a cookie for."""

    status: int
    body: Json
    session: str = ""


class GymService:
    """What the server answers. The oldest of more than `MAX_SESSIONS` open sessions is forgotten: an agent that died
    never closes its own.
    """

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self._sessions: OrderedDict[str, tuple[Episode, threading.Lock]] = OrderedDict()
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(VERDICTS_AT_ONCE)

    def task(self, row: Mapping[str, Json]) -> Task:
        """A row as a Task: one that `row_of` wrote, or a released one."""
        known = task_of(row, self.domain.name, "row")
        return known if known is not None else self.domain.parse_row(row, "row")

    def seed_session(self, row: Body) -> Reply:
        """A fresh environment. A row without a prompt is a session for `/verify` alone, which needs none."""
        session = secrets.token_urlsafe(24)
        if "responses_create_params" in row and self.domain.max_turns > 1:
            episode = self.domain.begin(self.task(row))
            with self._lock:
                self._sessions[session] = (episode, threading.Lock())
                stale = [self._sessions.popitem(last=False) for _ in range(len(self._sessions) - MAX_SESSIONS)]
            for _, (old, _) in stale:
                old.close()
        return Reply(200, {}, session)

    def tool(self, session: str, name: str, arguments: Body) -> Reply:
        """The environment's answer to one call."""
        with self._lock:
            found = self._sessions.get(session)
            if found is not None:
                self._sessions.move_to_end(session)
        if found is None:
            return Reply(400, {"detail": "Session not initialized. Please call seed_session first."})
        episode, turn = found
        with turn:
            replies = episode.reply(Message("assistant", tool_calls=(ToolCall(name, arguments),)))
        return Reply(200, "\n".join(message.content for message in replies or ()))

    def verify(self, session: str, body: Body) -> Reply:
        """The verdict on a response; the session ends."""
        with self._lock:
            held = self._sessions.pop(session, None)
        if held is not None:
            held[0].close()
        transcript = transcript_of(field(body, "response", dict, "body"), "response")
        with self._room:
            outcome = self.domain.score(self.task(body), transcript)
        if isinstance(outcome, Invalid):
            return Reply(200, {**body, "reward": 0.0, "mask_sample": True, "failure_reason": outcome.reason})
        verdict: Body = {"reward": outcome.reward, "mask_sample": False, "failure_reason": None}
        return Reply(200, {**body, **verdict, "reason": outcome.reason, "reward_components": {**outcome.parts}})

    def aggregate_metrics(self, body: Body) -> Reply:
        """The mean reward of unmasked samples, under NeMo-Gym's names."""
        given = field(body, "verify_responses", list, "body")
        kept = [item for item in given if isinstance(item, dict) and item.get("mask_sample") is not True]
        rewards = [item["reward"] for item in kept if isinstance(item.get("reward"), (int, float))]
        metrics: Body = {"mean/reward": sum(rewards) / len(rewards)} if rewards else {}
        return Reply(200, {"group_level_metrics": [], "agent_metrics": metrics, "key_metrics": metrics})

    def close(self) -> None:
        """End all sessions."""
        with self._lock:
            held = list(self._sessions.values())
            self._sessions.clear()
        for episode, _ in held:
            episode.close()


class Handler(BaseHTTPRequestHandler):
    """HTTP around `GymService`: a bad row is 422 with one line, as FastAPI says it; a failure of ours is 500."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: GymHttpServer

    def do_GET(self) -> None:
        """/health and /reverify_mode."""
        answers: dict[str, Json] = {
            "/health": {"status": "ok", "domain": self.server.service.domain.name},
            "/reverify_mode": "stateless",
        }
        path = urlsplit(self.path).path
        self._send(Reply(200, answers[path]) if path in answers else Reply(404, {"detail": "Not Found"}), as_json=True)

    def do_POST(self) -> None:
        """Sessions, tools, verdicts."""
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._send(Reply(413, {"detail": f"a body of {length} bytes; {MAX_BODY_BYTES} are allowed"}))
            return
        content = self.rfile.read(int(length))
        if self.server.stopped:  # a connection that was kept alive
            self.close_connection = True
            return
        try:
            reply = self._answer(content)
        except UserError as error:
            reply = Reply(422, {"detail": str(error)})
        except DOMAIN_ERRORS as error:
            log.exception("%s failed", self.path)
            reply = Reply(500, {"detail": f"{type(error).__name__}: {error}"})
        self._send(reply)

    def _answer(self, content: bytes) -> Reply:
        try:
            body = json.loads(content or b"{}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"body: not JSON: {error}") from error
        if not isinstance(body, dict):
            raise UserError(f"body: must be a JSON object, this is {type(body).__name__}")
        if too_deep(body):
            raise UserError(f"body: nested deeper than {MAX_NESTING} levels")
        service, path = self.server.service, urlsplit(self.path).path
        if path == "/seed_session":
            return service.seed_session(body)
        if path == "/verify":
            return service.verify(self._session(), body)
        if path == "/aggregate_metrics":
            return service.aggregate_metrics(body)
        return service.tool(self._session(), unquote(path.removeprefix("/")), body)

    def _session(self) -> str:
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            return ""
        return morsel.value if morsel is not None else ""

    def _send(self, reply: Reply, as_json: bool = False) -> None:
        plain = isinstance(reply.body, str) and not as_json
        content = reply.body.encode() if plain else json.dumps(reply.body).encode()  # type: ignore[union-attr]
        self.send_response(reply.status)
        self.send_header("Content-Type", "text/plain; charset=utf-8" if plain else "application/json")
        if reply.session:
            self.send_header("Set-Cookie", f"{COOKIE}={reply.session}; Path=/; HttpOnly; SameSite=Lax")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Requests go to the log, not to stderr."""
        log.debug(format, *args)


class GymHttpServer(ThreadingHTTPServer):
    """The listening socket; `service` answers."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int, service: GymService) -> None:
        self.service = service
        self.stopped = False
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = "is in use" if error.errno == errno.EADDRINUSE else "may not be opened by this user"
            remedy = "choose another one, or 0 for a free one"
            raise UserError(f"--port {port}: the port {reason} on {host}; {remedy}") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hung up is no news on stderr."""
        log.debug("the connection of %s broke", client_address, exc_info=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"http://{host}:{port}"

    def start(self) -> None:
        """Serve in a daemon thread of this process, until `stop` or the end of the process."""
        threading.Thread(target=self.serve_forever, args=(0.05,), name="gym-service", daemon=True).start()

    def stop(self) -> None:
        """End the thread, the socket and all sessions; connections that are open are hung up at their next request."""
        self.stopped = True
        self.shutdown()
        self.server_close()
        self.service.close()


@contextlib.contextmanager
def serving(domain: Domain, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A server in a thread of this process; yields its address and stops it afterwards."""
    server = GymHttpServer(host, port, GymService(domain))
    server.start()
    try:
        yield server.url
    finally:
        server.stop()
