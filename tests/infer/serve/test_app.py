"""Routes, security, streams, limits and failures, with an engine that repeats a few words."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from infer.serve import connections, replies
from infer.serve.app import BodyLimits
from tarsier_jax.weights import EMBEDDED
from tests.infer.serve.faults import body, data_url, image, picture, video
from tests.infer.serve.stub import WORDS, RunningServer, StubEngine

KEY = "a-key-of-some-length"
QUESTION = {"messages": [{"role": "user", "content": "What happens?"}]}
SLOW = 0.05  # seconds per token


@pytest.fixture(scope="module")
def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture(scope="module")
def server(engine: StubEngine) -> Iterator[RunningServer]:
    with RunningServer(engine, waiting=8) as server:
        yield server


def post(server: RunningServer, content: Any = QUESTION, **options: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/chat/completions", json=content, timeout=30, **options)


def get(server: RunningServer, path: str, **options: Any) -> httpx2.Response:
    return httpx2.get(f"{server.url}{path}", timeout=30, **options)


def metric(server: RunningServer, name: str) -> float:
    lines = get(server, "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"tarsier_{name}{{"))


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def events(server: RunningServer, **fields: Any) -> list[str]:
    """The lines of a stream that are not empty."""
    response = post(server, {**QUESTION, "stream": True, **fields})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    return [line for line in response.text.split("\n") if line]


def chunks(lines: list[str]) -> list[dict[str, Any]]:
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_response(server: RunningServer) -> None:
    response = post(server, {**QUESTION, "max_tokens": 6}).json()
    assert response["object"] == "chat.completion" and response["model"] == EMBEDDED
    (choice,) = response["choices"]
    assert choice["message"]["role"] == "assistant" and WORDS.startswith(choice["message"]["content"])
    assert choice["finish_reason"] == "length"
    usage = response["usage"]
    assert usage["completion_tokens"] == 6 and usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert response["media"] == []


def test_the_order_of_a_stream(server: RunningServer) -> None:
    first, *deltas, last, usage = chunks(events(server, max_tokens=40, stream_options={"include_usage": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas)
    assert text == post(server, {**QUESTION, "max_tokens": 40}).json()["choices"][0]["message"]["content"]
    assert "圆" in text and "\ufffd" not in text and len(deltas) > 2
    assert last["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "length"} and last["media"] == []
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 40
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in (first, *deltas, last, usage)}) == 1


def test_a_stop_string(server: RunningServer) -> None:
    *_, last = stream = chunks(events(server, stop=["moves"]))
    assert last["choices"][0]["finish_reason"] == "stop"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in stream) == "A red circle"


def test_media_are_reported(server: RunningServer, engine: StubEngine) -> None:
    content = body(image(data_url(picture(), "image/png")), video(data_url(picture("GIF"), "image/gif")))
    response = post(server, content).json()
    first, second = response["media"]
    assert first["type"] == "image" and second["type"] == "video"
    assert first["n_frames"] == 1 and (first["height"], first["width"]) == (84, 112)
    assert first["decode_seconds"] > 0 and first["fetch_seconds"] == 0
    details = response["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] > 0 and details["video_tokens"] > 0
    assert chunks(events(server, **content))[-1]["media"][1]["frame_indices"] == [0]
    assert metric(server, "media_frames_total") >= 4


def test_models(server: RunningServer) -> None:
    (card,) = get(server, "/v1/models").json()["data"]
    assert card["id"] == EMBEDDED and card == get(server, f"/v1/models/{EMBEDDED}").json()
    for name in ("org%2Fname", "org/name"):
        response = get(server, f"/v1/models/{name}")
        assert response.status_code == 404 and "org/name" in response.json()["error"]["message"]
    assert post(server, {**QUESTION, "model": "other"}).status_code == 404


def test_probes(server: RunningServer) -> None:
    assert get(server, "/health").status_code == get(server, "/ready").status_code == 200
    server.service.is_draining = True
    try:
        assert get(server, "/health").status_code == 200 and get(server, "/ready").status_code == 503
        response = post(server)
        assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"
    finally:
        server.service.is_draining = False


def test_metrics(server: RunningServer) -> None:
    post(server)
    for name in ("num_requests_running", "num_requests_waiting"):
        assert f'tarsier_{name}{{model_name="{EMBEDDED}"}} 0.0' in get(server, "/metrics").text
    assert metric(server, "request_success_total") >= 1
    assert metric(server, "e2e_request_latency_seconds_count") >= 1


def test_errors_are_objects(server: RunningServer) -> None:
    """Also those of routes that do not exist."""
    for response in (
        get(server, "/v1/other"),
        get(server, "/v1/chat/completions"),
        get(server, "/v1/chat/completions/"),
        post(server, {}),
        httpx2.post(f"{server.url}/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}),
    ):
        error = response.json()["error"]
        assert 400 <= response.status_code < 500 and set(error) == {"message", "type", "param", "code"}


def test_request_ids(server: RunningServer) -> None:
    """Only plain ones are returned."""
    assert get(server, "/health", headers={"X-Request-Id": "abc_1-2"}).headers["x-request-id"] == "abc_1-2"
    for identifier in ("a b", "a" * 65, "<script>", ""):
        assert len(get(server, "/health", headers={"X-Request-Id": identifier}).headers["x-request-id"]) == 32


def test_other_hosts_are_refused(server: RunningServer) -> None:
    """A page of another site reaches the server by a name of its own that resolves to 127.0.0.1."""
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "", "127.0.0.1@evil.example"):
        for path in ("/v1/models", "/health"):
            assert get(server, path, headers={"Host": host}).status_code == 403
    for host in ("localhost", f"LOCALHOST:{server.port}", "[::1]:80"):
        assert get(server, "/v1/models", headers={"Host": host}).status_code == 200
    assert "access-control-allow-origin" not in get(server, "/v1/models", headers={"Origin": "http://a.b"}).headers


def test_the_key(engine: StubEngine) -> None:
    with RunningServer(engine, key=KEY) as server:
        assert get(server, "/health").status_code == 200
        for path in (
            "/v1/models",
            "/metrics",
            "/ready",
            "/v1/other",
            "//health",
            "/health/",
            "/%68ealth/x",
            "/health/../metrics",
        ):
            for header in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": KEY},
                {"Authorization": f"Basic {KEY}"},
            ):
                response = get(server, path, headers=header)
                assert response.status_code == 401, (path, header)
                assert response.headers["www-authenticate"] == "Bearer"
        assert post(server).status_code == 401
        assert get(server, "/v1/models", headers={"Authorization": f"bearer {KEY}"}).status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            assert client.models.list().data[0].id == EMBEDDED
            with pytest.raises(openai.AuthenticationError, match="key"):
                client.with_options(api_key="wrong").models.list()
        host = {"Authorization": f"Bearer {KEY}", "Host": "/health?"}
        assert get(server, "/v1/models", headers=host).status_code == 403


def test_a_full_server(engine: StubEngine) -> None:
    """The official client tries again after the time that the server names."""
    engine.seconds = SLOW
    with RunningServer(engine, waiting=0) as server, contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(
                httpx2.stream("POST", f"{server.url}/v1/chat/completions", json={**QUESTION, "stream": True})
            )
            for _ in range(2)
        ]
        response = post(server)
        assert response.status_code == 429 and response.headers["retry-after"] == "2"
        assert response.json()["error"]["code"] == "queue_full"
        assert metric(server, "admission_rejections_total") == 1
        for stream in streams:
            stream.close()
        engine.seconds = 0
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            messages: Any = QUESTION["messages"]
            assert client.chat.completions.create(model=EMBEDDED, messages=messages, max_tokens=3).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(server: RunningServer, engine: StubEngine, stream: bool) -> None:
    """Before its answer starts, or in the middle of a stream."""
    engine.seconds = SLOW
    request = json.dumps({**QUESTION, "stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(f"{head}Content-Length: {len(request)}\r\n\r\n".encode() + request)
    if stream:
        assert b"200 OK" in client.recv(4096)
    wait_until(lambda: metric(server, "num_requests_running") == 1)
    client.close()
    wait_until(lambda: metric(server, "num_requests_running") == 0)
    engine.seconds = 0
    assert engine.requests[-1].cancelled.is_set()
    assert server.service.frontend.num_pending == 0


def test_the_deadline_of_a_request(engine: StubEngine) -> None:
    """The client does not repeat it."""
    engine.seconds = SLOW
    with RunningServer(engine, seconds=1.5) as server:
        response = post(server)
        assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
        *_, last = chunks(events(server))
        assert last["error"]["code"] == "timeout"
        wait_until(lambda: server.service.frontend.num_pending == 0)
    engine.seconds = 0


def test_comments_keep_a_silent_stream_open(
    server: RunningServer, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "_KEEP_ALIVE_S", 0.01)
    engine.seconds = SLOW
    lines = events(server, max_tokens=5)
    engine.seconds = 0
    assert ": keep-alive" in lines
    assert chunks([line for line in lines if not line.startswith(":")])


def test_an_error_in_a_stream(engine: StubEngine) -> None:
    """It is an event, which the official client raises; an error before the stream has its own status."""
    with RunningServer(engine) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        messages: Any = [{"role": "user", "content": [video("data:video/mp4;base64,AAAA")]}]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=EMBEDDED, messages=messages, stream=True)
        engine.is_broken.set()
        messages = QUESTION["messages"]
        with pytest.raises(openai.APIError, match="engine has failed"):
            list(client.chat.completions.create(model=EMBEDDED, messages=messages, stream=True))
        engine.is_broken.clear()


def test_a_failure_of_the_engine_ends_the_server() -> None:
    """All requests that wait are answered, and not sent again."""
    engine = StubEngine()
    engine.is_broken.set()
    with RunningServer(engine) as server:
        response = post(server)
        assert response.status_code == 503 and response.headers["x-should-retry"] == "false"
        assert "RESOURCE_EXHAUSTED" not in response.text and server.service.error is not None
        wait_until(lambda: not server.is_alive)


def raw(server: RunningServer, data: bytes, seconds: float = 10) -> bytes:
    """Returns everything that the server sends, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as client:
        client.sendall(data)
        answer = b""
        while part := client.recv(65536):
            answer += part
        return answer


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_slow_and_large_requests(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HEADER_S", 1)
    monkeypatch.setattr(connections, "_KEEP_ALIVE_S", 1)
    with RunningServer(engine, body=BodyLimits(nbytes=10_000, seconds=0.5)) as server:
        assert b"408" in raw(server, HEAD + b'Content-Length: 100\r\n\r\n{"messages"')
        for part in (b"", HEAD[:30], b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he"):
            start = time.monotonic()
            raw(server, part)
            assert time.monotonic() - start < 5
        for request in (
            HEAD + b"Content-Length: 10001\r\n\r\n",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n3000\r\n" + b"a" * 0x3000 + b"\r\n",
        ):
            assert b"HTTP/1.1 413" in raw(server, request)
        for request in (
            HEAD + b"X-Long: " + b"a" * 40_000,
            b"GET /" + b"a" * 40_000,
            b"\x16\x03\x01\x02\x00",
            b"GET\r\n\r\n",
        ):
            answer = raw(server, request)
            assert b"HTTP/1.1 400" in answer and b'"error"' in answer
        assert b"415" in raw(
            server, HEAD + b"Content-Encoding: gzip\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
        )
        assert post(server).status_code == 200


def test_the_number_of_connections(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_SPARE_CONNECTIONS", 1)
    with RunningServer(engine, waiting=0) as server, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(2)]
        wait_until(lambda: get(server, "/health").status_code == 503)
        idle[0].close()
        wait_until(lambda: get(server, "/health").status_code == 200)


def test_files_below_the_root(engine: StubEngine, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for name in ("root/a b.png", "secret.png"):
        (tmp_path / name).write_bytes(picture())
    url = image(f"file://{tmp_path}/root/a%20b.png")
    with RunningServer(engine, root=tmp_path / "root") as server:
        assert post(server, body(url)).status_code == 200
        response = post(server, body(image(f"file://{tmp_path}/secret.png")))
        assert response.status_code == 400 and response.json()["error"]["code"] == "forbidden"
    with RunningServer(engine) as server:
        response = post(server, body(url))
        assert response.status_code == 400 and response.json()["error"]["code"] == "forbidden"


class _PictureHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = picture()
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_hosts(engine: StubEngine) -> None:
    """Media are fetched from those that a flag allows."""
    with HTTPServer(("127.0.0.1", 0), _PictureHandler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{files.server_port}"
        content = body(image(f"http://{host}/a.png"))
        with RunningServer(engine, hosts=(host,)) as server:
            response = post(server, content)
            assert response.status_code == 200 and response.json()["media"][0]["fetch_seconds"] > 0
            assert metric(server, "media_fetch_seconds_count") == 1
        with RunningServer(engine) as server:
            response = post(server, content)
            assert response.status_code == 400 and response.json()["error"]["code"] == "forbidden"
            assert metric(server, "media_refused_total") == 1
        files.shutdown()


def test_a_decoder_that_is_killed(server: RunningServer) -> None:
    """In the middle of a file: only this request fails."""
    content = body(image(data_url(picture(size=(200, 100)), "image/png")))
    assert post(server, content).status_code == 200
    (pid,) = server.loader._children.pids
    os.kill(pid, signal.SIGSTOP)
    responses: list[httpx2.Response] = []
    other = body(image(data_url(picture(size=(100, 200)), "image/png")))
    thread = threading.Thread(target=lambda: responses.append(post(server, other)))
    thread.start()
    wait_until(lambda: server.service.frontend.num_pending == 1)
    time.sleep(1)  # the decoder has the file
    os.kill(pid, signal.SIGKILL)
    thread.join(30)
    assert responses[0].status_code == 400 and responses[0].json()["error"]["code"] == "crashed"
    assert post(server, other).status_code == 200
