"""A server without a model: its engine repeats a few words. Run as a program, it serves until a signal."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from infer.engine import Completion, RequestError
from infer.media import MediaLimits, MediaLoader
from infer.network import is_loopback, listen
from infer.serve.app import BodyLimits, make_app
from infer.serve.connections import make_server, serve
from infer.serve.prompts import PromptLimits
from infer.serve.service import Service
from tarsier_jax.families import family_of, load_config
from tarsier_jax.processing.processor import Processor
from tarsier_jax.weights import EMBEDDED, resolve

WORDS = "A red circle moves to the left. 圆 "
LIMITS = MediaLimits(max_pixels=4_000_000, timeout=20.0)


def embedded_processor() -> Processor:
    directory = Path(resolve(EMBEDDED))
    config = load_config(directory)
    return family_of(config).load_processor(directory, config)


class StubEngine:
    """Answers one request after the other with the tokens of a text, again and again up to the limit.

    Args:
        slots: Number of slots.
        seconds: Time per token.
        text: The text.
        once: Answers end after the text.

    Attributes:
        seconds: Time per token.
        is_broken: Set to make the engine fail at the next request.
        requests: All requests so far.
    """

    def __init__(self, slots: int = 2, seconds: float = 0.0, text: str = WORDS, once: bool = False):
        self.processor: Any = embedded_processor()
        self.config: Any = SimpleNamespace(slots=slots, prompt_tokens=4096)
        self.stats: Any = SimpleNamespace(prompts=0, answers=0)
        self.seconds, self.is_broken = seconds, threading.Event()
        self.requests: list[Any] = []
        self._words = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        self._most = len(self._words) if once else 10**9

    def run(self, requests: Any) -> Iterator[Any]:
        for request in requests:
            if isinstance(request, RequestError):
                yield request
                continue
            if self.is_broken.is_set():
                raise RuntimeError("RESOURCE_EXHAUSTED")
            self.requests.append(request)
            self.stats.prompts += 1
            yield self._answer(request)

    def _answer(self, request: Any) -> Completion:
        tokens: list[int] = []
        limit = min(request.options.max_new_tokens, self._most)
        while len(tokens) < limit and not request.cancelled.is_set():
            tokens.append(self._words[len(tokens) % len(self._words)])
            if request.on_tokens:
                request.on_tokens(tokens[-1:])
            time.sleep(self.seconds)
        self.stats.answers += 1
        text, is_stopped = request.options.truncate(self.processor.decode(tokens))
        reason = "stop" if is_stopped else "eos" if limit == self._most else "length"
        reason = "cancelled" if request.cancelled.is_set() else reason
        return Completion(request, text, tokens, reason, 0.01)


class RunningServer:
    """A server in a thread.

    Attributes:
        service: Its service.
        url: Its address.
    """

    def __init__(
        self,
        engine: Any,
        *,
        key: str | None = None,
        root: Path | None = None,
        hosts: Sequence[str] = (),
        body: BodyLimits | None = None,
        waiting: int | None = None,
        seconds: float = 60.0,
        new_tokens: int = 64,
    ):
        processor, tokens = engine.processor, engine.config.prompt_tokens
        self.loader = MediaLoader(processor, LIMITS, workers=1, root=root, hosts=hosts)
        self.service = Service(engine, self.loader, EMBEDDED, workers=2, waiting=waiting, seconds=seconds)
        limits = PromptLimits(tokens, new_tokens, processor.options, root is not None)
        sock = listen("127.0.0.1", 0)
        host, self.port = sock.getsockname()[:2]
        self.url = f"http://127.0.0.1:{self.port}"
        app = make_app(self.service, limits, body or BodyLimits(), key=key, local=is_loopback(host))
        self._server = make_server(app, self.service, 5)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]}, daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.end()
        self._thread.join(30)
        self.service.frontend.close()
        self.loader.close()


def main() -> None:
    """Serves with `seconds` per token, the first argument. A second argument makes the engine fail."""
    engine = StubEngine(seconds=float(sys.argv[1]))
    if len(sys.argv) > 2:
        engine.is_broken.set()
    sock = listen("127.0.0.1", 0)
    with MediaLoader(engine.processor, workers=1) as loader:
        service = Service(engine, loader, EMBEDDED, workers=1, waiting=4, seconds=60)  # pyright: ignore
        app = make_app(service, PromptLimits(4096, 256, engine.processor.options))
        print(sock.getsockname()[1], flush=True)
        serve(service, app, sock, 10)


if __name__ == "__main__":
    from tarsier_jax.programs import run

    sys.exit(run(main))
