"""Several processes of one run: equal settings at the start, and the first failure's reason in all processes."""

import atexit
import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # the key-value store of jax.distributed is not public
from jax.experimental import multihost_utils

from tarsier_jax.errors import InputError
from tarsier_jax.files import new_directory
from train.checks import first_difference

_FAILURE, _SETTINGS = "tarsier_jax/failure", "tarsier_jax/settings"
_FOREVER = 10**9  # milliseconds, longer than any run
_INTERVAL = 0.5  # seconds between two checks for a failure
_DELIVERY = 2.0  # seconds in which all processes see it


def check_same_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Compares JSON values of this process with those of process 0, under a name that a run uses once.

    Raises:
        InputError: a value differs. The message names its key.
    """
    if jax.process_count() == 1:
        return
    client, process = _client(), jax.process_index()
    ours, key = json.loads(json.dumps(settings)), f"{_SETTINGS}/{name}"
    if process == 0:
        client.key_value_set(key, json.dumps(ours))
    else:
        theirs = json.loads(client.blocking_key_value_get(key, _FOREVER))
        unlike = first_difference(theirs, ours)
        if unlike is not None:
            raise InputError(
                f"{unlike} is {ours.get(unlike)!r} in process {process} and {theirs.get(unlike)!r} in process 0. Start "
                "all processes with the same flags and the same data."
            )
    multihost_utils.sync_global_devices(key)


def on_any(condition: bool) -> bool:
    """Returns whether the condition holds in some process. Every process must call it."""
    return (
        bool(np.any(multihost_utils.process_allgather(np.array(condition)))) if jax.process_count() > 1 else condition
    )


def from_first(digest: Callable[[], bytes]) -> bytes:
    """Returns the SHA-256 that process 0 computes; the other processes do not compute it. All must call it."""
    if jax.process_count() == 1:
        return digest()
    own = digest() if jax.process_index() == 0 else bytes(hashlib.sha256().digest_size)
    return multihost_utils.broadcast_one_to_all(np.frombuffer(own, np.uint8)).tobytes()


def write_once(directory: Path, write: Callable[[Path], object], is_shared: bool = True) -> Path:
    """Returns `directory`, which process 0 fills with `write` unless it exists.

    The other processes do not wait here: they read it after `open_run` has compared their settings with process 0's.

    Args:
        is_shared: Whether all processes have the same directory; otherwise each one fills its own.
    """
    if (jax.process_index() == 0 or not is_shared) and not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(directory, 0) as partial:
            write(partial)
    return directory


@contextlib.contextmanager
def shared_failure() -> Iterator[None]:
    """Ends all processes when one of them raises, with its reason.

    The others may wait in a collective operation, which cannot be interrupted. A thread of each process prints the
    reason and ends the process.
    """
    if jax.process_count() == 1:
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done,))
    watcher.start()
    try:
        yield
    except BaseException as error:
        if _failure():
            watcher.join()  # the error follows from the other process's failure; the watcher ends this one
        done.set()
        reason = str(error) if isinstance(error, Exception) else "It was interrupted."
        with contextlib.suppress(Exception):  # another process fails at the same moment
            _client().key_value_set(_FAILURE, f"process {jax.process_index()}: {reason or repr(error)}")
        time.sleep(_DELIVERY)
        # At its exit JAX waits for the other processes, which are gone, and aborts. This runs before that.
        atexit.register(os._exit, 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)
        raise
    finally:
        done.set()
    watcher.join()


def _watch(done: threading.Event) -> None:
    while not done.wait(_INTERVAL):
        reason = _failure()
        if reason:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            if jax.process_index() == 0:
                time.sleep(2 * _DELIVERY)  # the processes abort when the first one, which has the store, is gone
            os._exit(1)


def _failure() -> str | None:
    try:
        return _client().key_value_try_get(_FAILURE)
    except Exception:  # the key does not exist
        return None


def _client() -> Any:
    return global_state.client
