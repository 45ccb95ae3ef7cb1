"""A NeMo-Gym server that does what a test tells it to: slow, rate-limited, lying, forgetful."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]
Behave = Callable[[str, Any, str], Answer]
"""(path, body, cookie header) -> (status, body, headers)."""


class Scripted(ThreadingHTTPServer):
    """Keeps every request that it saw."""

    daemon_threads = True

    def __init__(self, behave: Behave) -> None:
        self.behave = behave
        self.seen: list[tuple[str, Any, str]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.seen]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = (self.path, body, self.headers.get("Cookie", ""))
        self.server.seen.append(request)
        status, answer, *rest = self.server.behave(*request)
        if status == 0:  # hang up in the middle
            self.close_connection = True
            return
        content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (rest[0] if rest else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def scripted(behave: Behave) -> Iterator[Scripted]:
    server = Scripted(behave)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
