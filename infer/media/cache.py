"""A cache of decoded and patchified media."""

import collections
import threading

from tarsier_jax.processing.visuals import VisualInputs


class VisualCache:
    """The most recently used visuals, up to a number of bytes. Thread-safe. The arrays are read-only.

    Args:
        max_bytes: Largest size of all arrays together.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._mutex = threading.Lock()
        self._visuals: collections.OrderedDict[bytes, VisualInputs] = collections.OrderedDict()

    def get(self, key: bytes) -> VisualInputs | None:
        with self._mutex:
            if key in self._visuals:
                self._visuals.move_to_end(key)
            return self._visuals.get(key)

    def put(self, key: bytes, visuals: VisualInputs) -> None:
        """Stores visuals, and removes the least recently used ones beyond the limit."""
        with self._mutex:
            if key in self._visuals or visuals.pixel_values.nbytes > self._max_bytes:
                return
            self._visuals[key] = visuals
            self._bytes += visuals.pixel_values.nbytes
            while self._bytes > self._max_bytes:
                _, oldest = self._visuals.popitem(last=False)
                self._bytes -= oldest.pixel_values.nbytes
