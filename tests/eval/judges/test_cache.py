"""The cache of replies is shared by threads and processes, and survives their end."""

import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eval.judges.cache import Reply, ReplyCache, Store
from tarsier_jax.errors import InputError


def test_replies_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "new" / "replies.sqlite"
    with ReplyCache(path) as cache:
        assert cache.get("a") is None
        cache.put("a", Reply("text \u2028 \U0001f600", 3, 4))
        cache.put("b", Reply(""))
        cache.put("a", Reply("later"))
        assert cache.get("a") == Reply("text \u2028 \U0001f600", 3, 4)
    with ReplyCache(path) as cache:
        assert cache.get("a") == Reply("text \u2028 \U0001f600", 3, 4)
        assert cache.get("b") == Reply("", None, None)


def test_a_reply_is_requested_once(tmp_path: Path) -> None:
    requests = []

    def request(store: Store) -> Reply:
        requests.append(1)
        time.sleep(0.05)
        store(Reply("text"))
        return Reply("text")

    with ReplyCache(tmp_path / "replies.sqlite") as cache, ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda _: cache.get_or_request("a", request), range(64)))
    assert len(requests) == 1
    assert [reply for reply, _ in results] == [Reply("text")] * 64
    assert sum(is_new for _, is_new in results) == 1


def test_an_error_reaches_all_that_wait_and_is_not_stored(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=10)

    def fail(store: Store) -> Reply:
        both.wait()
        time.sleep(0.1)
        raise InputError("no reply")

    def answer(store: Store) -> Reply:
        store(Reply("text"))
        return Reply("text")

    def wait() -> None:
        both.wait()
        cache.get_or_request("a", lambda store: Reply("of the second"))

    with ReplyCache(tmp_path / "replies.sqlite") as cache, ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(cache.get_or_request, "a", fail), pool.submit(wait)]:
            with pytest.raises(InputError, match="no reply"):
                future.result()
        assert cache.get_or_request("a", answer) == (Reply("text"), True)
        assert cache.get_or_request("a", fail) == (Reply("text"), False)


WRITER = """
    import sys, pathlib
    from eval.judges.cache import Reply, ReplyCache, Store
    cache = ReplyCache(pathlib.Path(sys.argv[1]))
    for i in range(int(sys.argv[3])):
        cache.put(f"{sys.argv[2]} {i}", Reply(str(i)))
        print(i, flush=True)
"""


def start_writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_several_processes_create_and_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    writers = [start_writer(path, str(number), 200) for number in range(4)]
    assert [writer.communicate(timeout=120)[0].count("\n") for writer in writers] == [200] * 4
    with ReplyCache(path) as cache:
        assert all(cache.get(f"{number} {i}") == Reply(str(i)) for number in range(4) for i in range(200))


@pytest.mark.slow
def test_a_stored_reply_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    writer = start_writer(path, "a", 10**9)
    assert writer.stdout is not None
    last = [int(writer.stdout.readline()) for _ in range(100)][-1]
    writer.kill()
    writer.wait()
    with ReplyCache(path) as cache:
        assert all(cache.get(f"a {i}") == Reply(str(i)) for i in range(last + 1))
        cache.put("b", Reply("text"))


def test_files_that_are_no_cache(tmp_path: Path) -> None:
    text, other, newer = tmp_path / "notes.txt", tmp_path / "other.sqlite", tmp_path / "newer.sqlite"
    text.write_text("A list of things to do.\n" * 100)
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE replies (key TEXT)")
    ReplyCache(newer).close()
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(InputError, match=r"notes.txt, cannot be used \(file is not a database\)"):
        ReplyCache(text)
    for path in (other, newer):
        with pytest.raises(InputError, match="not a cache of replies of this version"):
            ReplyCache(path)
    assert text.read_text() == "A list of things to do.\n" * 100
    with pytest.raises(InputError, match="cannot be used"):
        ReplyCache(tmp_path)
    with pytest.raises(InputError, match="cannot be used"):
        ReplyCache(text / "replies.sqlite")


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    with ReplyCache(path) as cache:
        for i in range(2000):
            cache.put(f"key {i}", Reply("text " * 20))
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xff" * (len(content) - 8192)
    path.write_bytes(content)
    with ReplyCache(path) as cache, pytest.raises(InputError, match="cannot be used"):
        for i in range(2000):
            cache.get(f"key {i}")
