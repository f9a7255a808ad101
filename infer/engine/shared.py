"""One engine for several threads."""

import dataclasses
import os
import queue
import threading
import traceback
from collections.abc import Iterable, Iterator

from infer.engine.engine import Engine
from infer.engine.requests import Completion, Request, RequestError


class SharedEngine:
    """Goes on with some threads' requests while others' end, so that its slots stay full.

    An error of the engine's ends the process: nobody would give the answers that threads wait for.
    """

    def __init__(self, engine: Engine):
        self.processor, self.text = engine.processor, engine.text
        self._engine = engine
        self._requests: queue.Queue[Request] = queue.Queue(1)  # the engine itself draws ahead
        threading.Thread(target=self._run, daemon=True).start()

    def run(self, requests: Iterable[Request | RequestError]) -> Iterator[Completion | RequestError]:
        """As `Engine.run`, but all requests are drawn first."""
        results: queue.SimpleQueue[Completion | RequestError] = queue.SimpleQueue()
        asked = 0
        for request in requests:
            asked += 1
            if isinstance(request, RequestError):
                results.put(request)
            else:
                self._requests.put(dataclasses.replace(request, key=(results, request.key)))
        for _ in range(asked):
            yield results.get()

    def _run(self) -> None:
        try:
            for result in self._engine.run(iter(self._requests.get, None)):
                results, key = result.key
                if isinstance(result, RequestError):
                    results.put(dataclasses.replace(result, key=key))
                else:
                    results.put(dataclasses.replace(result, request=dataclasses.replace(result.request, key=key)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
