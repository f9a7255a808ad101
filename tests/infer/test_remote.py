"""Conversations with a server: the requests, the answers and the errors of OpenAI's protocol."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infer.conversation import Conversation
from infer.remote import KEY_VARIABLE, RemoteModel
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.frame_sampling import FrameSelection

MEDIA = [
    {"type": "video", "n_frames": 2, "frame_indices": [0, 5], "frame_times": [0.0, 0.5], "height": 84, "width": 112}
]


class Handler(BaseHTTPRequestHandler):
    """Answers "one two", and fails as the question demands."""

    server: "FakeServer"

    def do_GET(self) -> None:
        self.server.headers.append(dict(self.headers))
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._reply(401, {"error": {"message": "no key"}})
        else:
            self._reply(200, {"object": "list", "data": [{"id": "org/model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        question = body["messages"][-1]["content"][-1]["text"]
        if question == "refuse":
            self._reply(400, {"error": {"message": "messages[0]: the video is broken. Convert it."}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        self._event({"choices": [{"index": 0, "delta": {"content": "one"}, "finish_reason": None}]})
        if question == "wait":
            self.server.resume.wait(30)
        if question == "break":
            self._event({"error": {"message": "The engine has failed."}})
            return
        self.wfile.write(b": keep-alive\n\n")
        self._event({"choices": [{"index": 0, "delta": {"content": " two"}, "finish_reason": None}]})
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "media": MEDIA})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    """A server on loopback.

    Attributes:
        key: The key that it requires, or "".
        headers: Headers of the requests for the list of models.
        bodies: Bodies of the requests for answers.
        resume: Continues the answer to "wait".
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key = ""
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.resume = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.resume.set()
        server.shutdown()


def test_answers_are_streamed(server: FakeServer, gif: Path) -> None:
    options = SamplingOptions(temperature=0.7, top_k=5, stop=("END",))
    conversation = Conversation(RemoteModel(server.url), options, {"n_frames": 2, "max_pixels": 50_000})
    conversation.open(gif)
    assert conversation.selections == ()
    assert list(conversation.ask("What?")) == ["one", " two"] and conversation.finish_reason == "length"
    assert conversation.selections == [FrameSelection((0, 5), (0.0, 0.5), (84, 112))]
    list(conversation.ask("And then?"))
    first, second = server.bodies
    url = f"data:image/gif;base64,{base64.b64encode(gif.read_bytes()).decode()}"
    video, text = first.pop("messages")[0]["content"]
    assert video == {"type": "video_url", "video_url": {"url": url}} and text == {"type": "text", "text": "What?"}
    assert first == {
        "model": "org/model",
        "stream": True,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 5,
        "seed": 0,
        "stop": ["END"],
        "media_io_kwargs": {"video": {"num_frames": 2}},
        "mm_processor_kwargs": {"max_pixels": 50_000},
    }
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == [{"type": "text", "text": "one two"}]


def test_errors_of_the_server(server: FakeServer, gif: Path) -> None:
    conversation = Conversation(RemoteModel(f"{server.url}/v1"))
    conversation.open(gif)
    with pytest.raises(InputError, match="the video is broken"):
        list(conversation.ask("refuse"))
    assert conversation.files == [] and conversation.messages == []
    pieces = conversation.ask("break")
    assert next(pieces) == "one"
    with pytest.raises(InputError, match="The engine has failed"):
        list(pieces)
    assert "".join(conversation.ask("What?")) == "one two"


def test_an_answer_is_cancelled_while_the_server_is_silent(server: FakeServer) -> None:
    conversation = Conversation(RemoteModel(server.url))
    pieces = conversation.ask("wait")
    assert next(pieces) == "one"
    conversation.cancel()
    assert list(pieces) == [] and conversation.finish_reason == "cancelled"
    assert conversation.messages[-1]["content"] == [{"type": "text", "text": "one"}]


def test_the_key(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret"
    with pytest.raises(InputError, match=f"Set {KEY_VARIABLE}"):
        RemoteModel(server.url)
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert RemoteModel(server.url).name == "org/model"


def test_addresses() -> None:
    for url in ("localhost:8000", "ftp://a", "http://"):
        with pytest.raises(InputError, match="not the address of a server"):
            RemoteModel(url)
    with pytest.raises(InputError, match="does not answer"):
        RemoteModel("http://127.0.0.1:9")


def test_an_option_that_the_protocol_lacks(server: FakeServer) -> None:
    conversation = Conversation(RemoteModel(server.url), options={"max_seq_len": 9})
    with pytest.raises(InputError, match="not max_seq_len"):
        list(conversation.ask("What?"))


def test_files_that_cannot_be_sent(server: FakeServer, tmp_path: Path) -> None:
    conversation = Conversation(RemoteModel(server.url))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "frames").mkdir()
    for name, problem in (("absent.mp4", "cannot be read"), ("empty.mp4", "is empty"), ("frames", "is a directory")):
        with pytest.raises(InputError, match=problem):
            conversation.open(tmp_path / name)
    assert conversation.files == []
