"""Our OpenAI-compatible server on loopback, over the local Sampler: judges, chats, and samplers in another process.

`GET /health`, `GET /v1/models`, `POST /v1/completions`, `POST /v1/chat/completions`, and `POST /weights` for refit: a
JSON body `{"folder": ..., "version": ...}`, or the tensors themselves as safetensors with `?version=`. Requests of all
connections share one batch; their answers do not depend on each other. It binds to 127.0.0.1 and has no authentication:
anyone on this machine may use it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import errno
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.rollout import openai_api as api
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.rollout.server_process import ServerHandle, start_server
from nemo_cascade.rollout.service import DecodingThread
from nemo_cascade.types import Json, UserError

__all__ = ["ServerHandle", "start_server"]

LOG = logging.getLogger(__name__)
HOST = "127.0.0.1"
ANSWER_TIMEOUT_S = 600.0
Answer = dict[str, Json]


class Server:
    """What the handlers share: the decoding thread, the tokenizer (None for a folder without one) and the model's name.

    `thinking` is the mode of chats whose request does not name one (`chat_template_kwargs.enable_thinking`).
    """

    def __init__(self, sampler: LocalSampler, chat: ChatTokenizer | None, name: str, thinking: bool = True) -> None:
        self.sampler, self.chat, self.name, self.thinking = sampler, chat, name, thinking
        self.decoding = DecodingThread(sampler)

    def health(self) -> Answer:
        """Up, with which weights; `routed_experts`: completions report them when asked."""
        sampler = self.sampler
        vocab_size = sampler.config.vocab_size
        held = {"version": sampler.version, "checksum": sampler.checksum, "holds": sampler.holds}
        return {"status": "ok", "vocab_size": vocab_size, "routed_experts": True, **held}

    def models(self) -> Answer:
        """The one model that is served."""
        return {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "nemo_cascade"}]}

    def completions(self, body: Answer) -> Answer:
        """Text or token ids in, one choice per prompt and sample out."""
        prompts = api.prompts_of(body, self.chat)
        found = self.decoding.complete(api.asked(body, prompts, self._stop_ids()), ANSWER_TIMEOUT_S)
        logprobs = body.get("logprobs") not in (None, False)
        choices: list[Json] = [
            api.completion_choice(index, completion, self.chat, logprobs) for index, completion in enumerate(found)
        ]
        return {"object": "text_completion", "model": self.name, "choices": choices, "usage": api.usage(prompts, found)}

    def chat_completions(self, body: Answer) -> Answer:
        """A conversation in, assistant messages out."""
        if self.chat is None:
            raise UserError("messages: this model folder has no tokenizer; use /v1/completions with token ids")
        if body.get("return_routed_experts"):
            raise UserError("return_routed_experts: only /v1/completions reports experts; send token ids there")
        template = body.get("chat_template_kwargs") or {}
        thinking = bool(template.get("enable_thinking", self.thinking)) if isinstance(template, dict) else self.thinking
        tools = api.tools_of(body)
        prompts = [self.chat.messages_ids(api.messages_of(body), tools, thinking)]
        found = self.decoding.complete(api.asked(body, prompts, self._stop_ids()), ANSWER_TIMEOUT_S)
        choices: list[Json] = [
            api.chat_choice(index, completion, self.chat, thinking, tools) for index, completion in enumerate(found)
        ]
        return {"object": "chat.completion", "model": self.name, "choices": choices, "usage": api.usage(prompts, found)}

    def load_folder(self, body: Answer) -> Answer:
        """Refit from a folder that this machine can read."""
        folder, version = body.get("folder"), body.get("version")
        if not isinstance(folder, str) or not isinstance(version, int):
            raise UserError("weights: `folder` (a path) and `version` (a whole number) are needed")
        self.decoding.refit(lambda: self.sampler.load_folder(folder, version), ANSWER_TIMEOUT_S)
        return self.health()

    def load_bytes(self, content: bytes, version: int) -> Answer:
        """Refit from the tensors themselves."""
        try:
            tensors = load_safetensors(content)
        except SafetensorError as error:
            raise UserError(f"weights: the body is not safetensors: {error}") from error
        self.decoding.refit(lambda: self.sampler.load_weights(iter(tensors.items()), version), ANSWER_TIMEOUT_S)
        return self.health()

    def _stop_ids(self) -> Sequence[int]:
        return self.chat.stop_ids if self.chat is not None else (self.sampler.config.eos_token_id,)


class Reply(NamedTuple):
    """A status and a JSON body."""

    status: int
    body: Answer


class Handler(BaseHTTPRequestHandler):
    """HTTP around `Server`: errors of the asker are 400 with one line, an answer that takes too long is 503."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: LoopbackServer

    def do_GET(self) -> None:
        """/health and /v1/models."""
        served = self.server.served
        routes: dict[str, Callable[[], Answer]] = {"/health": served.health, "/v1/models": served.models}
        route = routes.get(urlsplit(self.path).path)
        self._send(Reply(200, route()) if route else self._unknown())

    def do_POST(self) -> None:
        """Completions and weights."""
        content = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self._send(self._answer(content))

    def _answer(self, content: bytes) -> Reply:
        served, parts = self.server.served, urlsplit(self.path)
        routes: dict[str, Callable[[Answer], Answer]] = {
            "/v1/completions": served.completions,
            "/v1/chat/completions": served.chat_completions,
            "/weights": served.load_folder,
        }
        if parts.path not in routes:
            return self._unknown()
        try:
            if parts.path == "/weights" and "version" in (query := parse_qs(parts.query)):
                return Reply(200, served.load_bytes(content, int(query["version"][0])))
            return Reply(200, routes[parts.path](api.body_of(content)))
        except (ValueError, OSError) as error:  # UserError and malformed JSON among them
            return Reply(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
        except concurrent.futures.TimeoutError:
            return Reply(503, {"error": {"message": f"no answer within {ANSWER_TIMEOUT_S:.0f} s", "type": "timeout"}})

    def _unknown(self) -> Reply:
        return Reply(404, {"error": {"message": f"{self.path}: no such address", "type": "not_found"}})

    def _send(self, reply: Reply) -> None:
        content = json.dumps(reply.body).encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Requests go to the log, not to stderr."""
        LOG.debug(format, *args)


class LoopbackServer(ThreadingHTTPServer):
    """The listening socket; `served` answers."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, served: Server) -> None:
        self.served = served
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = "is in use" if error.errno == errno.EADDRINUSE else "may not be opened by this user"
            remedy = "choose another one, or 0 for a free one"
            raise UserError(f"--port {port}: the port {reason} on {HOST}; {remedy}") from error

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.server_address[1]}"


def serve(folder: Path, port: int, max_batch: int, thinking: bool) -> Iterator[str]:
    """Load the folder, listen; yields the address, then serves until the process is told to stop."""
    tokenizer = folder / "tokenizer.json"
    sampler = LocalSampler.from_folder(folder, max_batch)
    chat = ChatTokenizer(folder) if tokenizer.is_file() else None
    served = Server(sampler, chat, folder.resolve().name, thinking)
    try:
        listening = LoopbackServer(port, served)
    except UserError:
        served.decoding.close()  # its thread must not outlive the interpreter
        raise
    threading.Thread(target=_stop_with_parent, args=(listening,), daemon=True).start()
    yield listening.url
    listening.serve_forever(poll_interval=0.2)
    served.decoding.close()
    listening.server_close()


def _stop_with_parent(listening: LoopbackServer) -> None:
    """A server started by `start_server` holds a pipe from its parent; when it closes, nobody needs the server."""
    if not sys.stdin.isatty():
        sys.stdin.read()
        listening.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m nemo_cascade.rollout.server --model FOLDER --port N`: one line of JSON with the address, then it
    serves.
    """
    parser = argparse.ArgumentParser(description="Serve a NemotronH folder on 127.0.0.1 (OpenAI protocol).")
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free port")
    parser.add_argument("--max-batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; one is fastest for small models")
    parser.add_argument("--no-thinking", action="store_true", help="mode of chats that name none")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        for url in serve(options.model, options.port, options.max_batch, not options.no_thinking):
            sys.stdout.write(json.dumps({"url": url}) + "\n")
            sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
