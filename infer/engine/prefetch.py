"""An iterator that a thread reads ahead."""

import queue
import threading
from collections.abc import Iterable
from typing import Any

_END = object()


class Prefetcher:
    """Reads an iterator ahead in a thread. Its reader waits only on request.

    Attributes:
        ended: The reader has received every item. An error of the iterator is raised to the reader at its place.
    """

    def __init__(self, items: Iterable[Any], capacity: int):
        self._items: queue.Queue[Any] = queue.Queue(capacity)
        self._closed = threading.Event()
        self.ended = False
        threading.Thread(target=self._read, args=(iter(items),), daemon=True).start()

    @property
    def empty(self) -> bool:
        """Whether no item is ready."""
        return self._items.empty()

    def next(self, block: bool) -> Any | None:
        """Returns the next item; None after the last one, and None when no item is ready and `block` is false."""
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
        """Ends the thread; the items that it has read are dropped."""
        self._closed.set()

    def _read(self, items: Any) -> None:
        end: Any = _END
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # raised to the reader by `next`
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
