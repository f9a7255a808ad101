"""The child process that decodes media: `python -m infer.media.child DESCRIPTOR`, started by `infer.media.children`.

It opens, checks, decodes, resizes and patchifies the media of one sample after the other, within limits of memory, time
and files. It imports neither JAX nor transformers.
"""

import os
import pickle
import resource
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infer.media import messages
from infer.media.limits import MediaLimits
from infer.media.sources import attached_messages
from tarsier_jax.errors import InputError, MediaError
from tarsier_jax.processing.visuals import VisualInputs, VisualStage

_OPEN_FILES = 64  # besides the media
_GRACE = 1.0  # seconds after which the process ends itself, if the loader has not ended it

Decode = Callable[[VisualStage, list[dict[str, Any]], Any, MediaLimits], VisualInputs]


def decode(stage: VisualStage, sample: list[dict[str, Any]], pixel_limits: Any, limits: MediaLimits) -> VisualInputs:
    return stage(sample, pixel_limits, None, limits)


def serve(connection: socket.socket, decode: Decode) -> None:
    """Answers requests until the connection ends or the memory is exhausted."""
    connection.send(b"r")  # ready
    while descriptors := messages.receive(connection):
        request, *files = descriptors
        with open(request, "rb") as content:
            stage, sample, pixel_limits, limits = pickle.load(content)
        _limit_resources(limits)
        signal.setitimer(signal.ITIMER_REAL, limits.timeout + _GRACE)  # the default action of SIGALRM ends the process
        paths = [Path(f"/proc/self/fd/{file}") for file in files]
        header, visuals = _answer(decode, stage, attached_messages(sample, paths, limits), pixel_limits, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        messages.send_reply(connection, header, None if visuals is None else visuals.pixel_values)
        for file in files:
            os.close(file)
        if header.get("is_last"):
            return


def _answer(
    decode: Decode, stage: VisualStage, sample: list[dict[str, Any]], pixel_limits: Any, limits: MediaLimits
) -> tuple[dict[str, Any], VisualInputs | None]:
    """Returns the header of the reply and, unless it is an error, the visuals."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            visuals = decode(stage, sample, pixel_limits, limits)
        texts = [str(warning.message) for warning in caught if warning.category is UserWarning]
        return {**messages.visuals_to_header(visuals), "warnings": texts}, visuals
    except MediaError as error:
        return {"error": error.public_message, "reason": error.reason}, None
    except InputError as error:
        return {"error": str(error), "reason": None}, None
    except MemoryError:
        message = "The images and videos need more memory than is allowed. Send smaller ones, or select fewer frames."
        return {"error": message, "reason": "too_large", "is_last": True}, None
    except Exception as error:  # one sample must not end the process; the text may contain addresses of memory
        message = f"The images and videos cannot be decoded ({type(error).__name__}). Convert them, or copy them again."
        return {"error": message, "reason": "undecodable"}, None


def _limit_resources(limits: MediaLimits) -> None:
    for kind, limit in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.memory_bytes),
        (resource.RLIMIT_NOFILE, limits.max_files + _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), decode)
