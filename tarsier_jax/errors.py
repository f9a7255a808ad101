"""Errors with a message for the user that names the problem, its place and the remedy."""

import re


class TarsierError(Exception):
    """Base of every error that a program prints as one paragraph instead of a traceback."""


class InputError(TarsierError):
    """A video, image, prompt or sample that cannot be used as it is."""


class MediaError(InputError):
    """An image or video that cannot be used.

    Attributes:
        reason: A short label, such as for a counter of errors: too_large, too_many_pixels, too_many_frames, too_long,
            not_found, forbidden, unsupported, undecodable, timeout, crashed or fetch_failed.
        detail: The part of the message that a library wrote, or "".
    """

    def __init__(self, message: str, reason: str, detail: str = ""):
        super().__init__(message, reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.args[0]

    @property
    def public_message(self) -> str:
        """The message without `detail`, which may contain addresses of memory."""
        return self.args[0].replace(self.detail, "", 1) if self.detail else self.args[0]


class CheckpointError(TarsierError):
    """A checkpoint directory that cannot be read, or lacks tensors of its configuration."""


def reason_of(error: Exception) -> str:
    """Returns the reason why a line cannot be used, as a sentence, also for an unexpected error."""
    if isinstance(error, TarsierError):
        return str(error)
    if isinstance(error, RecursionError):
        return "The sample is nested too deeply to be read. Remove it, or flatten it."
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    return f"The sample could not be prepared, because of an unexpected {kind}: {error}. Check its keys and values."
