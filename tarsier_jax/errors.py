"""Errors whose message is written for the person at the keyboard: what is wrong, where, and how to mend it."""

import re


class TarsierError(Exception):
    """Base of every error that a program prints as one paragraph instead of a traceback."""


class InputError(TarsierError):
    """A video, image, prompt or sample that cannot be used as it is."""


class CheckpointError(TarsierError):
    """A checkpoint directory that cannot be read, or does not hold the tensors that its config asks for."""


def reason_of(error: Exception) -> str:
    """The reason for a line that cannot be used, in words, also for an error that no code expected."""
    if isinstance(error, TarsierError):
        return str(error)
    if isinstance(error, RecursionError):
        return "The sample is nested too deeply to be read. Leave it out, or flatten it."
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    return f"The sample could not be prepared, because of an unexpected {kind}: {error}. Check its keys and values."
