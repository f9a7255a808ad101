"""Requests drawn ahead by a thread."""

import queue
import threading
from collections.abc import Iterable
from typing import Any

_END = object()


class Prefetcher:
    """An iterator that never makes its reader wait unless asked to.

    ended: everything has been read.  An error of the iterator is raised to the reader, at its place.
    """

    def __init__(self, items: Iterable[Any], room: int):
        self._items: queue.Queue[Any] = queue.Queue(room)
        self._closed = threading.Event()
        self.ended = False
        threading.Thread(target=self._draw, args=(iter(items),), daemon=True).start()

    @property
    def empty(self) -> bool:
        return self._items.empty()

    def next(self, block: bool) -> Any | None:
        """The next item; None if there is none, or none yet and `block` is false."""
        if self.ended:
            return None
        try:
            item = self._items.get(block)
        except queue.Empty:
            return None
        if item is _END or isinstance(item, BaseException):
            self.ended = True
            if item is not _END:
                raise item
            return None
        return item

    def close(self) -> None:
        """Lets the thread end; what it has drawn is dropped."""
        self._closed.set()

    def _draw(self, items: Any) -> None:
        end: Any = _END
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # handed to the reader
            end = error
        self._put(end)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
