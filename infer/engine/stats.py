"""Statistics of an engine: throughput, padding, device utilization."""

import dataclasses
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import jax


@dataclasses.dataclass
class EngineStats:
    """Counts since the engine's warm-up.

    Attributes:
        prompts: Number of prompts started.
        answers: Number of answers finished.
        new_tokens: Number of tokens generated.
        tokens: Number of tokens processed in prefill, including padding.
        valid_tokens: Number of tokens processed in prefill, without padding.
        patches: Number of patches processed, including padding.
        valid_patches: Number of patches processed, without padding.
        busy: Time for which the device had work, in seconds.
        start: Time of the end of the warm-up, of `time.perf_counter`.
    """

    prompts: int = 0
    answers: int = 0
    new_tokens: int = 0
    tokens: int = 0
    valid_tokens: int = 0
    patches: int = 0
    valid_patches: int = 0
    busy: float = 0.0
    start: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def busy_share(self) -> float:
        return self.busy / self.seconds

    @property
    def token_padding(self) -> float:
        return 1 - self.valid_tokens / max(self.tokens, 1)

    @property
    def patch_padding(self) -> float:
        return 1 - self.valid_patches / max(self.patches, 1)


class DeviceTimer:
    """Adds up the time during which the device had work.

    A thread waits for the results of programs, which run in the order of their calls.
    """

    def __init__(self, stats: EngineStats):
        self._stats = stats
        self._results: queue.SimpleQueue[tuple[float, Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def watch(self, result: Future[Any]) -> None:
        """Adds the time until the arrays of `result` are ready. No later program may donate them."""
        self._results.put((time.perf_counter(), result))

    def stop(self) -> None:
        self._results.put(None)
        self._thread.join()

    def _watch(self) -> None:
        last = 0.0
        while (item := self._results.get()) is not None:
            start, result = item
            if result.exception() is None:
                jax.block_until_ready(result.result())
            end = time.perf_counter()
            self._stats.busy += end - max(start, last)
            last = end
