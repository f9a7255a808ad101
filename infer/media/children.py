"""A pool of child processes that decode media."""

import contextlib
import os
import pickle
import queue
import select
import socket
import subprocess
import sys
import threading
from typing import Any, BinaryIO

from infer.media import messages
from infer.media.limits import MediaLimits
from tarsier_jax.errors import InputError, MediaError
from tarsier_jax.files import warn
from tarsier_jax.processing.visuals import VisualInputs, VisualStage

PROGRAM = "infer.media.child"
_START_TIMEOUT = 60.0  # seconds
_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")  # keys and tokens are not passed on


class _CrashError(Exception):
    """The process ended, or sent something else than a reply."""


class Child:
    """One child process.

    Attributes:
        pid: Number of the process.
    """

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C ends the loader's program, which ends its children
            )
        self.pid, self._is_ready = self._process.pid, False

    @property
    def is_alive(self) -> bool:
        """Whether the process waits for a request."""
        if self._process.poll() is not None:
            return False
        readable, _, _ = select.select([self._connection], [], [], 0)
        return not readable or not self._is_ready  # a message without a request is the end of the connection

    def wait_until_ready(self) -> None:
        """Raises _CrashError if the process does not start."""
        if self._is_ready:
            return
        self._connection.settimeout(_START_TIMEOUT)
        with contextlib.suppress(OSError):
            self._is_ready = self._connection.recv(1) == b"r"
        if not self._is_ready:
            raise _CrashError("the process does not start")

    def request(self, content: bytes, descriptors: list[int], timeout: float) -> BinaryIO:
        """Returns the reply.

        Raises:
            TimeoutError: `timeout` seconds passed.
            _CrashError: the process ended, or sent something else than a reply.
        """
        self.wait_until_ready()
        self._connection.settimeout(timeout)
        try:
            messages.send(self._connection, [content], descriptors)
            replies = messages.receive(self._connection)
        except TimeoutError:
            raise
        except OSError as error:
            raise _CrashError("the connection ended") from error
        if len(replies) == 1:
            return open(replies[0], "rb")
        for reply in replies:
            os.close(reply)
        raise _CrashError("the process ended")

    def kill(self) -> None:
        """Ends the process. Another thread that waits for its reply receives an error."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        self._connection.close()


class ChildPool:
    """Child processes that decode the media of one sample each. Thread-safe.

    A process that crashes, hangs or exhausts its memory is replaced.

    Args:
        limits: Limits of each sample.
        size: Number of processes.
    """

    def __init__(self, limits: MediaLimits, size: int):
        self._limits = limits
        self._mutex, self._is_closed = threading.Lock(), False
        self._children = {Child() for _ in range(size)}
        self._idle: queue.LifoQueue[Child | None] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    @property
    def pids(self) -> list[int]:
        """Numbers of the processes."""
        with self._mutex:
            return sorted(child.pid for child in self._children)

    def decode(
        self, stage: VisualStage, sample: list[dict[str, Any]], pixel_limits: Any, descriptors: list[int]
    ) -> VisualInputs:
        """Runs the visual stage in a process.

        Args:
            stage: The visual stage.
            sample: Messages with attachments, from `Sources`.
            pixel_limits: The image_processing_config of the sample.
            descriptors: Descriptors of the attachments.

        Raises:
            InputError: the media or the sample cannot be used.
        """
        content = pickle.dumps((stage, sample, pixel_limits, self._limits))
        count = sum(len(message["content"]) for message in sample)
        child: Child | None = None
        reusable: Child | None = None
        try:
            child = self._take()
            with child.request(content, descriptors, self._limits.timeout) as reply:
                header = messages.read_header(reply)
                visuals = _error_of(header) or messages.read_visuals(reply, header, stage.vision.patch_dim, count)
            reusable = None if header.get("is_last") else child
        except TimeoutError:
            message = f"Decoding did not end within {self._limits.timeout:g} seconds. Send a shorter or smaller file."
            raise MediaError(message, "timeout") from None
        except (_CrashError, messages.MalformedReplyError):
            raise self._crash() from None
        finally:
            self._give_back(child, reusable)
        if isinstance(visuals, InputError):
            raise visuals
        texts = header.get("warnings")
        for text in texts if isinstance(texts, list) else ():
            warn(str(text))
        return visuals

    def close(self) -> None:
        """Ends all processes. Calls in progress raise MediaError."""
        with self._mutex:
            self._is_closed = True
            children = list(self._children)
        for child in children:
            child.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                if child := self._idle.get_nowait():
                    child.close()
        self._idle.put(None)  # for a thread that waits

    def _take(self) -> Child:
        """Waits for an idle process and returns it, or starts another if it died meanwhile."""
        child = self._idle.get()
        try:
            if child is not None and child.is_alive and not self._is_closed:
                return child
            if child is not None:
                self._discard(child)
            return self._start()
        except BaseException:
            self._idle.put(None)
            raise

    def _give_back(self, child: Child | None, reusable: Child | None) -> None:
        """Makes a process available again, or ends it and starts another."""
        if child is not None and reusable is None:
            self._discard(child)
            with contextlib.suppress(OSError, _CrashError):
                reusable = self._start()
        if child is not None:
            self._idle.put(reusable)

    def _start(self) -> Child:
        with self._mutex:
            if self._is_closed:
                raise _CrashError("closed")
            child = Child()
            self._children.add(child)
        return child

    def _discard(self, child: Child) -> None:
        child.close()
        with self._mutex:
            self._children.discard(child)

    def _crash(self) -> MediaError:
        if self._is_closed:
            return MediaError("The media loader is closed.", "crashed")
        return MediaError(
            "The decoder crashed on the images and videos. Convert them, for example with `ffmpeg -i in.mp4 out.mp4`.",
            "crashed",
        )


def _environment() -> dict[str, str]:
    """Returns the environment of a process: the modules of this one, and no other variables than necessary."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {**variables, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _error_of(header: dict[str, Any]) -> InputError | None:
    """Returns the error in the header of a reply."""
    error, reason = header.get("error"), header.get("reason")
    if not isinstance(error, str):
        return None
    return MediaError(error, reason) if isinstance(reason, str) else InputError(error)
