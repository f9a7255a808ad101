"""The messages between the loader and a child process, over a Unix socket.

A message is one byte with descriptors. The first descriptor is a sealed file in memory with the content, the others are
the files to decode. A request is pickled. A reply comes from a process that decodes untrusted files: it is JSON and an
array, and is checked.
"""

import fcntl
import json
import mmap
import os
import socket
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from tarsier_jax.processing.frame_sampling import FrameSelection
from tarsier_jax.processing.visuals import VisualInputs

_ALIGNMENT = 64  # of the array in a reply
_MOST_DESCRIPTORS = 253  # of a message, a limit of the kernel
_LARGEST_HEADER = 16 << 20  # bytes
_LARGEST_SIDE = 1 << 20  # patches
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class MalformedReplyError(Exception):
    """A reply that our program does not send."""


def send(connection: socket.socket, parts: Sequence[bytes | memoryview], descriptors: Sequence[int] = ()) -> None:
    """Sends a message with the concatenated parts as its content."""
    content = os.memfd_create("message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(content, "wb", closefd=False, buffering=0) as file:
            for part in map(memoryview, parts):
                while part:  # a write has at most 2 GiB
                    part = part[file.write(part) :]
        os.lseek(content, 0, os.SEEK_SET)  # the receiver has the same position
        fcntl.fcntl(content, fcntl.F_ADD_SEALS, _SEALS)
        socket.send_fds(connection, [b"m"], [content, *descriptors])
    finally:
        os.close(content)


def receive(connection: socket.socket) -> list[int]:
    """Returns the descriptors of the next message; an empty list at the end of the connection."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, _MOST_DESCRIPTORS)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return descriptors


def send_reply(connection: socket.socket, header: dict[str, Any], pixel_values: np.ndarray | None = None) -> None:
    """Sends a header and an array, float32."""
    data = json.dumps(header).encode()
    start = len(data).to_bytes(8, "little") + data
    start += bytes(-len(start) % _ALIGNMENT)
    values = memoryview(b"") if pixel_values is None else np.ascontiguousarray(pixel_values).data.cast("B")
    send(connection, [start, values])


def read_reply(descriptor: int) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the header of a reply and its array, float32 (values,), read-only and without a copy.

    Raises:
        MalformedReplyError: the content has another form, or its sender could change it.
    """
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise MalformedReplyError("not sealed")
        content = mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        length = int.from_bytes(content[:8], "little")
        if not 0 < length <= min(_LARGEST_HEADER, len(content) - 8):
            raise MalformedReplyError("length")
        header = json.loads(content[8 : 8 + length])
        start = 8 + length + -(8 + length) % _ALIGNMENT
        values = np.frombuffer(content, np.float32, offset=start) if start < len(content) else np.zeros(0, np.float32)
    except (OSError, ValueError, RecursionError) as error:
        raise MalformedReplyError("content") from error
    if not isinstance(header, dict):
        raise MalformedReplyError("header")
    return header, values


def visuals_to_header(visuals: VisualInputs) -> dict[str, Any]:
    """Returns everything except the pixels as JSON values."""
    selections = [[each.indices, each.times, each.frame_size, each.decode_seconds] for each in visuals.selections]
    return {"grid_thw": visuals.grid_thw.tolist(), "frames": visuals.frames, "selections": selections}


def visuals_from_header(header: dict[str, Any], values: np.ndarray, patch_dim: int, count: int) -> VisualInputs:
    """Returns the inputs in a reply.

    Args:
        header: Header of the reply.
        values: Its array, float32 (values,).
        patch_dim: Values per patch.
        count: Number of images and videos of the sample.

    Raises:
        MalformedReplyError: a value has another type, or the sizes contradict each other.
    """
    grid, frames, selections = (header.get(key, 0) for key in ("grid_thw", "frames", "selections"))
    if not _is_list(grid, count) or not _is_list(selections, count) or not _is_size(frames):
        raise MalformedReplyError("visuals")
    if not all(_is_list(row, 3) and all(map(_is_size, row)) for row in grid):
        raise MalformedReplyError("grid")
    grid_thw = np.array(grid, np.int32).reshape(count, 3)
    if values.size != int(grid_thw.astype(np.int64).prod(axis=1).sum()) * patch_dim:
        raise MalformedReplyError("pixels")
    return VisualInputs(values.reshape(-1, patch_dim), grid_thw, frames, tuple(map(_selection, selections)))


def _selection(value: Any) -> FrameSelection:
    if not _is_list(value, 4):
        raise MalformedReplyError("selection")
    indices, times, size, seconds = value
    if not isinstance(indices, list) or not all(type(i) is int for i in indices):
        raise MalformedReplyError("indices")
    if times is not None and not (_is_list(times, len(indices)) and all(type(t) is float for t in times)):
        raise MalformedReplyError("times")
    if not _is_list(size, 2) or not all(map(_is_size, size)) or type(seconds) is not float:
        raise MalformedReplyError("sizes")
    return FrameSelection(tuple(indices), None if times is None else tuple(times), tuple(size), 0.0, seconds)


def _is_list(value: Any, length: int) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and len(value) == length


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= _LARGEST_SIDE
