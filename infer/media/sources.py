"""The sources of images and videos: paths, bytes, data URLs and http(s) URLs become files for a child process."""

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.media.fetch import Fetcher
from infer.media.limits import MediaLimits
from tarsier_jax.errors import MediaError
from tarsier_jax.files import is_remote
from tarsier_jax.processing.clip import MediaFile, check_size, kind_of
from tarsier_jax.processing.media_types import HEAD, kind_of_content
from tarsier_jax.processing.sample import SOURCES
from tarsier_jax.storage import fetch

_ANYWHERE = Path("/")
_NAME = 200  # characters of a URL in an error


@dataclasses.dataclass(frozen=True)
class Attachment:
    """An opened file in the request to a child process.

    Attributes:
        index: Position among the descriptors that the child receives.
        name: Its name in errors.
        kind: "video", "gif" or "image".
        identity: Digest of its content, or the state of a local file, which identifies the content in a cache.
    """

    index: int
    name: str
    kind: str
    identity: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class SourcePolicy:
    """Where media may come from.

    Attributes:
        root: The directory below which local files may be read, resolved; None for none.
        fetcher: Fetches URLs.
        limits: Limits of the files.
    """

    root: Path | None
    fetcher: Fetcher
    limits: MediaLimits


class Sources:
    """The opened sources of one sample. `close` it, or use it in a `with` statement.

    Attributes:
        messages: The messages without texts, with attachments or paths in place of the sources.
        descriptors: Descriptors of the attachments.
        fetch_seconds: Seconds to fetch each image or video.
        identities: What identifies the files that the child opens by path, for a cache; None if they are unknown.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]], policy: SourcePolicy):
        self._policy, self._bytes = policy, 0
        self._deadline = time.monotonic() + policy.limits.timeout
        self.descriptors: list[int] = []
        self.fetch_seconds: list[float] = []
        self.identities: list[tuple[Any, ...]] | None = []
        try:
            self.messages = [{"content": [self._open_item(item) for item in _visual_items(messages)]}]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []

    def __enter__(self) -> "Sources":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_item(self, item: Mapping[str, Any]) -> dict[str, Any]:
        kind = item["type"]
        value = dict(item[kind])
        self.fetch_seconds.append(0.0)
        name = f"{kind} {len(self.fetch_seconds)}"
        for key in SOURCES:
            if value.get(key) is not None:
                value[key] = self._open(value[key], name)
        return {"type": kind, kind: value}

    def _open(self, source: Any, name: str) -> Any:
        """Returns an attachment or a path in place of a source, and a list in place of several."""
        if isinstance(source, list | tuple):
            return [self._open(each, f"frame {i} of {name}") for i, each in enumerate(source)]
        if isinstance(source, bytes | bytearray | memoryview):
            return self._attach_content(bytes(source), f"The {name}")
        if not isinstance(source, str | Path):
            return source  # an array or an image in memory
        text = str(source)
        scheme = text[:8].lower()
        if scheme.startswith("data:"):
            return self._open_data_url(text, name)
        if scheme.startswith(("http:", "https:")):
            return self._fetch(text)
        if is_remote(text):
            return self._fetch_object(text)
        return self._open_path(text.removeprefix("file://"))

    def _open_data_url(self, url: str, name: str) -> Any:
        """Returns the attachment of a data URL, or a list of them for frames (`data:video/jpeg;base64,AAA,BBB`)."""
        header, comma, payload = url.partition(",")
        kind, *parameters = header[len("data:") :].lower().split(";")
        if not comma or parameters[-1:] != ["base64"]:
            raise MediaError(f"The data URL of the {name} is not base64. Write data:TYPE;base64,DATA.", "unsupported")
        if kind != "video/jpeg":
            check_size(f"The {name}", len(payload) // 4 * 3 - 2, self._policy.limits.max_bytes)
            return self._attach_content(_decode_base64(payload, name), f"The {name}")
        if payload.count(",") >= self._policy.limits.max_files:
            raise self._too_many_files()
        parts = payload.split(",")
        return [
            self._attach_content(_decode_base64(part, f"frame {i} of {name}"), f"The frame {i} of {name}")
            for i, part in enumerate(parts)
        ]

    def _fetch(self, url: str) -> Attachment:
        start = time.perf_counter()
        content = self._policy.fetcher.fetch(url, self._policy.limits.max_bytes, self._deadline)
        self.fetch_seconds[-1] += time.perf_counter() - start
        return self._attach_content(content, url[:_NAME])

    def _fetch_object(self, url: str) -> Attachment:
        """Returns the attachment of a URL of an object store, which is read with the credentials of this process."""
        if self._policy.root != _ANYWHERE:
            raise MediaError(f"{url[:_NAME]}: object stores are not allowed here. Send the content.", "forbidden")
        start = time.perf_counter()
        content = fetch(url)
        self.fetch_seconds[-1] += time.perf_counter() - start
        check_size(url[:_NAME], content.size, self._policy.limits.max_bytes)
        with content.open() as file:
            return self._attach_content(file.read(), url[:_NAME])

    def _attach_content(self, content: bytes, name: str) -> Attachment:
        limits = self._policy.limits
        check_size(name, len(content), limits.max_bytes)
        self._bytes += len(content)
        check_size(f"{name}, with the media before it,", self._bytes, limits.max_sample_bytes)
        kind = kind_of_content(content[:HEAD], name)
        descriptor = os.memfd_create("media", os.MFD_CLOEXEC)
        self._add(descriptor)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        return Attachment(len(self.descriptors) - 1, name, kind, (hashlib.sha256(content).hexdigest(),))

    def _open_path(self, path: str) -> Attachment | str:
        root = self._policy.root
        if root is None:
            raise MediaError(f"{path[:_NAME]}: local files are not allowed here. Send the content.", "forbidden")
        if root == _ANYWHERE:
            self._identify(path)
            return path
        descriptor = _open_below(root, path)
        self._add(descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _forbidden(path)
        if not status.st_size:
            raise MediaError(f"{path[:_NAME]} is empty. Copy the file again.", "undecodable")
        check_size(path[:_NAME], status.st_size, self._policy.limits.max_bytes)
        return Attachment(len(self.descriptors) - 1, path, kind_of(root / path), _identity(status))

    def _identify(self, path: str) -> None:
        """Records the state of a file that the child opens by its path."""
        identity = None
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            identity = _identity(status) if stat.S_ISREG(status.st_mode) else None
        if identity is None:
            self.identities = None
        elif self.identities is not None:
            self.identities.append(identity)

    def _add(self, descriptor: int) -> None:
        self.descriptors.append(descriptor)
        if len(self.descriptors) > self._policy.limits.max_files:
            raise self._too_many_files()

    def _too_many_files(self) -> MediaError:
        limit = self._policy.limits.max_files
        return MediaError(
            f"The sample has more than {limit} files or frames. Send fewer, or a video.", "too_many_frames"
        )


def attached_messages(
    messages: Sequence[Mapping[str, Any]], paths: Sequence[Path], limits: MediaLimits
) -> list[dict[str, Any]]:
    """Returns the messages of `Sources` with a MediaFile in place of each attachment.

    Args:
        messages: Messages with attachments.
        paths: Where the content of each attachment is.
        limits: Limits of the files.
    """

    def resolve(value: Any) -> Any:
        if isinstance(value, Attachment):
            return MediaFile(paths[value.index], value.name, value.kind, limits)
        if isinstance(value, list):
            return [resolve(each) for each in value]
        return {key: resolve(each) for key, each in value.items()} if isinstance(value, dict) else value

    return resolve(list(messages))


def _visual_items(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (item for message in messages for item in message["content"] if item["type"] != "text")


def _decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise MediaError(f"The data URL of the {name} has invalid base64. Encode it again.", "undecodable") from None


def _open_below(root: Path, path: str) -> int:
    """Opens a file below `root`, once, and returns its descriptor. Raises MediaError."""
    try:
        resolved = (root / path).resolve(strict=True)
        if not resolved.is_relative_to(root):
            raise _forbidden(path)
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(f"{path[:_NAME]} does not exist. Check the path.", "not_found") from None
    except (OSError, ValueError, RuntimeError):
        raise _forbidden(path) from None
    # A directory may have become a link between the two calls.
    if not Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(root):
        os.close(descriptor)
        raise _forbidden(path)
    return descriptor


def _forbidden(path: str) -> MediaError:
    return MediaError(
        f"{path[:_NAME]} is not a regular file below the directory that is allowed. Check the path.", "forbidden"
    )


def _identity(status: os.stat_result) -> tuple[Any, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
