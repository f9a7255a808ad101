"""Replies of language models on disk: no request is paid for twice."""

import contextlib
import dataclasses
import functools
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Self

from tarsier_jax.errors import InputError

_APPLICATION_ID, _VERSION = 0x7A25E001, 1  # marks a file as a cache of replies, in this layout
_BUSY_S = 60.0  # time to wait for another process that writes
_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER, time REAL NOT NULL
) WITHOUT ROWID"""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply of a language model.

    Attributes:
        text: The reply.
        prompt_tokens: Tokens of the request; None if the server does not count.
        completion_tokens: Tokens of the reply; None if the server does not count.
    """

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


Store = Callable[[Reply], None]


class ReplyCache:
    """Replies by key in an SQLite file, which threads and processes may share.

    A stored reply survives the end of the process in any way.

    Args:
        path: The file; it is created if necessary.

    Raises:
        InputError: the file cannot be written, is damaged, or is something else. Every method raises it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._in_flight: dict[str, Future[Reply]] = {}
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._database.close()  # which ends the transaction
                raise

    def _prepare(self) -> None:
        # One transaction, since several processes may create the file at once.
        self._database.execute("BEGIN IMMEDIATE")
        (application,) = self._database.execute("PRAGMA application_id").fetchone()
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if (application, version) != (_APPLICATION_ID, _VERSION):
            (tables,) = self._database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if application or tables:
                raise InputError(
                    f"{self.path} is not a cache of replies of this version. Choose another --judge_cache."
                )
            self._database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._database.execute(f"PRAGMA user_version = {_VERSION}")
            self._database.execute(_TABLE)
        self._database.execute("COMMIT")
        # A write-ahead log lets processes read while one writes. It needs no flush per reply to survive a kill.
        with contextlib.suppress(sqlite3.OperationalError):  # while another process opens the file
            self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"The cache of the judge's replies, {self.path}, cannot be used ({error}). Remove it if it is damaged, "
                "or choose another --judge_cache on a local disk with free space."
            ) from None

    def __len__(self) -> int:
        with self._lock, self._errors():
            return self._database.execute("SELECT COUNT(*) FROM replies").fetchone()[0]

    def get(self, key: str) -> Reply | None:
        """Returns the reply of a key, or None."""
        with self._lock, self._errors():
            query = "SELECT text, prompt_tokens, completion_tokens FROM replies WHERE key = ?"
            row = self._database.execute(query, (key,)).fetchone()
        return None if row is None else Reply(*row)

    def put(self, key: str, reply: Reply) -> None:
        """Stores a reply; a reply that is already stored stays."""
        row = (key, reply.text, reply.prompt_tokens, reply.completion_tokens, time.time())
        with self._lock, self._errors():
            self._database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", row)

    def get_or_request(self, key: str, request: Callable[[Store], Reply]) -> tuple[Reply, bool]:
        """Returns the reply of a key, and whether this call requested it.

        A key that another thread requests at the moment is not requested again.

        Args:
            key: The key.
            request: Returns the reply, after it has called its argument with it, which stores it.
        """
        with self._lock:
            future = self._in_flight.get(key)
            if is_first := future is None:
                future = self._in_flight[key] = Future()
        if not is_first:
            return future.result(), False
        try:
            reply = self.get(key)
            if is_new := reply is None:
                reply = request(functools.partial(self.put, key))
            future.set_result(reply)
            return reply, is_new
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._in_flight[key]

    def close(self) -> None:
        """Closes the file."""
        with self._lock, self._errors():
            self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
