"""Clips decoded and patchified ahead, in threads with a bounded buffer (grain)."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import grain

from infer.bulk.inputs import Item
from infer.bulk.journal import Journal
from infer.engine import Request, RequestError
from tarsier_jax.errors import reason_of
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An item's prompt, or why there is none; number: the item's.  seconds: that it took."""

    number: int
    example: Example | None
    error: str  # empty if there is an example
    seconds: float


@dataclasses.dataclass
class LoadStats:
    """frames: decoded and patchified.  seconds: that threads took for it, all together."""

    frames: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Prepare(grain.transforms.Map):
    processor: Processor
    prompt: str
    journal: Journal | None

    def map(self, element: Item) -> Prepared:
        start = time.perf_counter()
        try:
            with self.journal.note(element.input) if self.journal else contextlib.nullcontext():
                example, error = self.processor(element.sample(self.prompt)), ""
        except Exception as e:  # whatever a file of millions does, the run goes on, and its line says why
            example, error = None, reason_of(e)
        return Prepared(element.number, example, error, time.perf_counter() - start)


def load_requests(
    items: Sequence[Item],
    processor: Processor,
    prompt: str,
    make: Callable[[int, Example], Request],
    workers: int,
    stats: LoadStats,
    journal: Journal | None = None,
) -> Iterator[Request | RequestError]:
    """Requests for the items in turn, as `make` makes them of an item's number and prompt; refusals for bad ones.

    Args:
        workers: threads, each with two clips ready or under way at most; 0 loads when asked for the next.
        journal: records the clips in progress. Its suspects are loaded once before all others, each alone, so that it
            is known which of them crashes.
    """
    prepare = _Prepare(processor, prompt, journal)
    for item in items:
        if journal and item.input in journal.suspects:
            prepare.map(item)
    ahead = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    for prepared in grain.MapDataset.source(list(items)).map(prepare).to_iter_dataset(ahead):
        if prepared.example is None:
            yield RequestError(prepared.number, prepared.error)
            continue
        stats.seconds += prepared.seconds
        stats.frames += prepared.example.frames
        yield make(prepared.number, prepared.example)
