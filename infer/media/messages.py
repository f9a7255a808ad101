"""The messages between the loader and a child process, over a Unix socket.

A message is one byte with descriptors. The first one is a file in memory with the content, the others are the files to
decode. A request is pickled. A reply comes from a process that decodes untrusted files: it is JSON and an array, and is
checked.
"""

import json
import math
import os
import socket
from collections.abc import Sequence
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from tarsier_jax.processing.frame_sampling import FrameSelection
from tarsier_jax.processing.visuals import VisualInputs

_ALIGNMENT = 64  # of the array in a reply
_MOST_DESCRIPTORS = 253  # of a message, a limit of the kernel
_LARGEST_HEADER = 16 << 20  # bytes
_LARGEST_SIDE = 1 << 20  # patches


class MalformedReplyError(Exception):
    """A reply that our program does not send."""


def send(connection: socket.socket, parts: Sequence[bytes | memoryview], descriptors: Sequence[int] = ()) -> None:
    """Sends a message with the concatenated parts as its content."""
    content = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        with open(content, "wb", closefd=False, buffering=0) as file:
            for part in map(memoryview, parts):
                while part:  # a write has at most 2 GiB
                    part = part[file.write(part) :]
        os.lseek(content, 0, os.SEEK_SET)  # the receiver has the same position
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


def read_header(reply: BinaryIO) -> dict[str, Any]:
    """Reads the header of a reply, up to its array. Raises MalformedReplyError."""
    try:
        length = int.from_bytes(reply.read(8), "little")
        if not 0 < length <= _LARGEST_HEADER:
            raise MalformedReplyError("length")
        header = json.loads(reply.read(length))
        reply.seek(-(8 + length) % _ALIGNMENT, os.SEEK_CUR)
    except (OSError, ValueError, RecursionError) as error:
        raise MalformedReplyError("header") from error
    if not isinstance(header, dict):
        raise MalformedReplyError("header")
    return header


def visuals_to_header(visuals: VisualInputs) -> dict[str, Any]:
    """Returns everything except the pixels as JSON values."""
    selections = [[each.indices, each.times, each.frame_size, each.decode_seconds] for each in visuals.selections]
    return {"grid_thw": visuals.grid_thw.tolist(), "frames": visuals.frames, "selections": selections}


def read_visuals(reply: BinaryIO, header: dict[str, Any], patch_dim: int, count: int) -> VisualInputs:
    """Reads the array of a reply and returns its visuals. The array is read-only.

    Args:
        reply: The reply, at the end of its header.
        header: The header.
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
    selected = tuple(map(_selection, selections))
    num_patches = sum(math.prod(row) for row in grid)
    if os.fstat(reply.fileno()).st_size - reply.tell() != num_patches * patch_dim * 4:
        raise MalformedReplyError("pixels")
    pixel_values = np.empty((num_patches, patch_dim), np.float32)
    if reply.readinto(pixel_values.data.cast("B")) != pixel_values.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
        raise MalformedReplyError("pixels")
    pixel_values.flags.writeable = False
    return VisualInputs(pixel_values, np.array(grid, np.int32), frames, selected)


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
