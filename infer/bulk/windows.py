"""Splits long videos into windows, each with a line of its own in the output."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator

from infer.bulk.inputs import Item, Items
from tarsier_jax.errors import InputError
from tarsier_jax.processing.clip import media_file
from tarsier_jax.processing.video_files import read_length

_WINDOWS = 1_000_000  # largest number per item: the window i of item n has the number 1,000,000 n + i


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a video: [0, window), [every, every + window), ...

    Attributes:
        every: Seconds between the starts of two windows.
        window: Length of a window in seconds.

    Raises:
        InputError: a number is not above 0.
    """

    every: float
    window: float

    def __post_init__(self) -> None:
        for name, seconds in vars(self).items():
            if not 0 < seconds < math.inf:
                raise InputError(f"--{name} is {seconds}; it must be a number of seconds above 0.")

    def split(self, items: Items) -> Items:
        """Returns an item for each window. Images, animations and directories of frames stay whole."""
        return Items(lambda: itertools.chain.from_iterable(map(self._windows, items)))

    def _windows(self, item: Item) -> Iterator[Item]:
        if item.is_annotation and not item.problem:
            problem = f"{item.input} is an annotation, which --every does not split. Set start_time and end_time in it."
            item = dataclasses.replace(item, problem=problem)
        length = None
        with contextlib.suppress(Exception):  # which the line of the whole clip reports
            length = None if item.problem else read_length(media_file(item.input))
        if length is None:
            yield dataclasses.replace(item, number=item.number * _WINDOWS)
            return
        seconds, frame = length
        last_frame = max(seconds - frame, 0.0)
        for i in range(min(int(last_frame / self.every) + 1, _WINDOWS)):
            start = i * self.every
            end = min(start + self.window, seconds)
            last = max(start, end - frame)
            number = item.number * _WINDOWS + i
            yield dataclasses.replace(item, number=number, start=round(start, 6), end=round(end, 6), last_frame=last)


def windows_of(every: float | None, window: float | None) -> Windows | None:
    """Returns the windows of --every and --window, of which each is the default of the other. Raises InputError."""
    if every is None:
        every = window
    if window is None:
        window = every
    return None if every is None or window is None else Windows(every, window)
