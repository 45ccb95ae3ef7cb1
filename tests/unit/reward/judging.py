"""A judge over HTTP for tests: answers from a script, hangs or fails on demand."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

Reply = Callable[[list[dict[str, str]]], str]


class JudgeServer:
    """Serves /v1/chat/completions on a free port; `reply` maps messages to the answer. Counts its calls.

    `recover_after` calls the status becomes 200 and `headers` are gone; `body` stands for the whole response.
    """

    def __init__(
        self, reply: Reply, status: int = 200, delay: float = 0.0, fail_first: int = 0, dribble: bool = False,
        headers: Mapping[str, str] | None = None, recover_after: int = 1 << 30, body: bytes | None = None,
    ) -> None:  # fmt: skip
        self.calls = 0
        self.authorization: str | None = None
        self.body: dict[str, Any] = {}
        lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.calls += 1
                    failing, sick = outer.calls <= fail_first, outer.calls <= recover_after
                outer.body = request
                outer.authorization = self.headers["Authorization"]
                time.sleep(delay)
                said = json.dumps({"choices": [{"message": {"content": reply(request["messages"])}}]}).encode()
                said = said if body is None else body
                self.send_response(503 if failing else status if sick else 200)
                for name, value in (headers or {}).items() if sick else ():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                try:
                    if dribble:
                        for byte in said:
                            self.wfile.write(bytes([byte]))
                            self.wfile.flush()
                            time.sleep(0.05)
                    else:
                        self.wfile.write(said)
                except (BrokenPipeError, ConnectionResetError):
                    return

            def log_message(self, *_: object) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
