"""Errors whose message is written for the person at the keyboard: what is wrong, where, and how to mend it."""


class TarsierError(Exception):
    """Base of every error that a program prints as one paragraph instead of a traceback."""


class InputError(TarsierError):
    """A video, image, prompt or sample that cannot be used as it is."""


class CheckpointError(TarsierError):
    """A checkpoint directory that cannot be read, or does not hold the tensors that its config asks for."""
