"""A small file with the clips that are being decoded. It survives a crash of the process."""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self, TypeVar

from tarsier_jax.errors import InputError
from tarsier_jax.files import hidden, is_special

ClipT = TypeVar("ClipT")
_CRASHES = 2  # after which a clip is not decoded again


class Journal:
    """Clips in progress, by name. Thread-safe.

    A crash of a native decoder ends the process before it can write an error line, and every later run crashes at the
    same clip. With a journal the next run knows the clips that were in progress. These are its `suspects`, which the
    caller decodes alone: only a clip that was in progress at two crashes is refused.

    The file is `.NAME.journal` beside the output. It contains only the clips in progress and the suspects, and is
    overwritten in place: the kernel keeps written data when the process dies. It is removed when the run ends without
    a crash. The journal never fails a run: if its file cannot be written, the run has no journal.
    """

    def __init__(self, output: Path, overwrite: bool = False):
        self._path, self._mutex = hidden(output, "journal"), threading.Lock()
        self._crashes = {} if overwrite else _read_crashes(self._path)
        self._in_progress: list[str] = []
        self._file: int | None = None
        if not is_special(output):
            with contextlib.suppress(OSError):
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self._write()

    @property
    def suspects(self) -> frozenset[str]:
        """Clips that were in progress at one crash and have not been decoded since."""
        return frozenset(name for name, crashes in self._crashes.items() if crashes < _CRASHES)

    def try_suspects(self, clips: Iterable[tuple[str, ClipT]], decode: Callable[[ClipT], object]) -> None:
        """Decodes the suspects among named clips, one at a time: the next crash shows which of them it is."""
        for name, clip in clips:
            if name in self.suspects:
                with contextlib.suppress(Exception):  # reported when the clip is decoded again for its answer
                    decode(clip)

    @contextlib.contextmanager
    def note(self, name: str) -> Iterator[None]:
        """Records the clip as in progress while the block runs.

        Raises:
            InputError: the clip was in progress at two crashes.
        """
        if self._crashes.get(name, 0) >= _CRASHES:
            raise InputError(
                f"{name}: decoding it ended the program {_CRASHES} times. Convert the file with ffmpeg, or remove it."
            )
        with self._mutex:
            self._in_progress.append(name)
            self._write()
        try:
            yield
        finally:
            with self._mutex:
                if name in self._in_progress:  # else the journal is closed
                    self._in_progress.remove(name)
                self._crashes.pop(name, None)
                self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Forgets the clips in progress: the run did not crash. After an error the suspects stay for the next run."""
        with self._mutex:
            self._in_progress = []
            self._write()
            if self._file is None:
                return
            if error is None or not self._crashes:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None  # threads may still be decoding

    def _write(self) -> None:
        if self._file is None:
            return
        line = json.dumps({"crashes": self._crashes, "begun": self._in_progress}).encode() + b"\n"
        with contextlib.suppress(OSError):  # such as a full disk, which is not the fault of the clip
            os.pwrite(self._file, line, 0)
            os.ftruncate(self._file, len(line))


def _read_crashes(path: Path) -> dict[str, int]:
    """Returns the number of crashes during which each clip was in progress; empty for a missing or damaged file."""
    try:
        content = json.loads(path.read_bytes().split(b"\n")[0])
        crashes = {str(name): int(count) for name, count in content["crashes"].items()}
        in_progress = {str(name) for name in content["begun"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return crashes | {name: crashes.get(name, 0) + 1 for name in in_progress}
