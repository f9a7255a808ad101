"""What an engine has done: throughput, padding, compilations, how busy the device was."""

import dataclasses
import queue
import threading
import time
from typing import Any

import jax


@dataclasses.dataclass
class EngineStats:
    """Counts since the engine's warm-up.

     prompts, answers, new_tokens: begun, ended, and written.  tokens, patches: in rows, and of these valid ones.
    busy: seconds for which the device had something to run.
    """

    prompts: int = 0
    answers: int = 0
    new_tokens: int = 0
    tokens: int = 0
    valid_tokens: int = 0
    patches: int = 0
    valid_patches: int = 0
    busy: float = 0.0
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

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
    """Adds up the time for which something that was handed to the device had not ended yet.

    A thread waits for one program after the other; they run in the order in which they are handed over.
    """

    def __init__(self, stats: EngineStats):
        self._stats = stats
        self._given: queue.SimpleQueue[tuple[float, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def watch(self, result: Any) -> None:
        """`result`: an array that the program makes, and that no later program consumes."""
        self._given.put((time.perf_counter(), result))

    def stop(self) -> None:
        self._given.put(None)
        self._thread.join()

    def _watch(self) -> None:
        last = 0.0
        while (given := self._given.get()) is not None:
            begin, result = given
            jax.block_until_ready(result)
            end = time.perf_counter()
            self._stats.busy += end - max(begin, last)
            last = end
