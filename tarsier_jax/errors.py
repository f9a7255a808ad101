"""Errors with a message for the user that names the problem, its place and the remedy."""

import re


class TarsierError(Exception):
    """Base of every error that a program prints as one paragraph instead of a traceback."""


class InputError(TarsierError):
    """A video, image, prompt or sample that cannot be used as it is."""


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
