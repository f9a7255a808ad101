"""Servers of chat completions for tests."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EVENTS_REPLY = '{"events": ["a man sits"]}'


def completion(text: str, usage: Mapping[str, int] | None = None) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return body | ({"usage": dict(usage)} if usage else {})


class Server(ThreadingHTTPServer):
    """Answers completions with `replies` in turn, the last one for ever; a reply is (status, body, headers, delay).

    Attributes:
        requests: The requests as (path, headers, body).
        models: Names that the server lists.
        most_in_flight: Largest number of requests that were in flight at once.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *replies: tuple[int, Any, Mapping[str, str], float], models: tuple[str, ...] = ("m",)) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = list(replies)
        self.requests: list[tuple[str, Message, Any]] = []
        self.models = models
        self.list_status = 200
        self.lock = threading.Lock()
        self.num_in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in self.server.models]
        self._send(self.server.list_status, {"object": "list", "data": models}, {"Connection": "close"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers, body))
            self.server.num_in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.num_in_flight)
            replies = self.server.replies
            status, content, headers, delay = replies.pop(0) if len(replies) > 1 else replies[0]
        time.sleep(delay)
        with self.server.lock:
            self.server.num_in_flight -= 1
        with contextlib.suppress(OSError):  # the client has hung up
            self._send(status, content, headers)

    def _send(self, status: int, content: Any, headers: Mapping[str, str]) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def ok(text: str = EVENTS_REPLY, delay: float = 0.0, usage: Mapping[str, int] | None = None) -> Any:
    return 200, completion(text, usage), {}, delay


def fault(status: int, headers: Mapping[str, str] | None = None, code: str | None = None) -> Any:
    return status, {"error": {"message": "a scripted fault", "code": code}}, headers or {}, 0.0


@contextlib.contextmanager
def serve(server: ThreadingHTTPServer) -> Iterator[None]:
    """Runs a server in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


ServerFactory = Callable[..., Server]
