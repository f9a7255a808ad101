"""From a clip to its prompt: decoded and patchified, with the journal of the clips in progress."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from infer.bulk.inputs import Item
from infer.bulk.journal import Journal
from tarsier_jax.processing.batch import Example


class ItemLoader:
    """Prepares items for an engine; the `prepare` of `infer.engine.Frontend`, called by several threads.

    Args:
        prepare: Returns the example of a sample; see `CaptionConfig.preparer`.
        prompt: Used where an item has none.
        journal: Records the clips in progress.

    Attributes:
        frames: Number of frames that were decoded and patchified.
        seconds: Time that all threads together spent on it.
    """

    def __init__(self, prepare: Callable[[Mapping[str, Any]], Example], prompt: str, journal: Journal | None = None):
        self._prepare, self._prompt, self._journal = prepare, prompt, journal
        self._mutex = threading.Lock()
        self.frames, self.seconds = 0, 0.0

    def __call__(self, item: Item) -> Example:
        """Raises InputError for an item that cannot be used, and any error of a decoder."""
        start = time.perf_counter()
        with self._journal.note(item.input) if self._journal else contextlib.nullcontext():
            example = self._prepare(item.sample(self._prompt))
        with self._mutex:
            self.seconds += time.perf_counter() - start
            self.frames += example.frames
        return example

    def try_suspects(self, items: Iterable[Item]) -> None:
        """Loads the journal's suspects among the items, one at a time: the next crash shows which of them it is."""
        if self._journal and self._journal.suspects:
            self._journal.try_suspects(((item.input, item) for item in items), self)
