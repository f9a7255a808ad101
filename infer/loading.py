"""Clips decoded and patchified ahead, in worker processes with bounded buffers (grain)."""

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import jax
from absl import flags

from infer.engine import Refusal, Request
from infer.engine.source import Source
from infer.inputs import Item
from infer.runtime import prepare_worker
from tarsier_jax.errors import InputError, TarsierError
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor

_BUFFERED = 2  # clips a worker holds ready
_PATIENCE = 5.0  # seconds without a clip after which workers are looked at


@jax.tree_util.register_dataclass  # as a tree, its arrays come out of worker processes through shared memory
@dataclasses.dataclass(frozen=True)
class Prepared:
    """An item's prompt, or why there is none; number: the item's.  seconds: that it took."""

    number: int
    example: Example | None
    error: str  # empty if there is an example
    seconds: float


@dataclasses.dataclass
class LoadReport:
    """frames: decoded and patchified.  seconds: that workers took for it, all together."""

    frames: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Prepare(grain.transforms.Map):
    processor: Processor
    prompt: str

    def map(self, element: Item) -> Prepared:
        start = time.perf_counter()
        try:
            example, error = self.processor(element.sample(self.prompt)), ""
        except Exception as e:  # whatever a file of millions does, the run goes on, and its line says why
            example, error = None, f"{e}" if isinstance(e, InputError) else repr(e)
        return Prepared(element.number, example, error, time.perf_counter() - start)


def load_requests(
    items: Sequence[Item],
    processor: Processor,
    prompt: str,
    make: Callable[[int, Example], Request],
    workers: int,
    report: LoadReport,
) -> Iterator[Request | Refusal]:
    """Requests for the items in turn, as `make` makes them of an item's number and prompt; refusals for bad ones.

    workers: processes; 0 loads in this one.

    Raises:
        TarsierError: one of the processes was killed.
    """
    dataset = grain.MapDataset.source(list(items)).map(_Prepare(processor, prompt))
    loaded = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads flags of its own, which no command line of ours holds
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BUFFERED)
        loaded = loaded.mp_prefetch(options, worker_init_fn=prepare_worker)
    for prepared in _watched(loaded):
        if prepared.example is None:
            yield Refusal(prepared.number, prepared.error)
            continue
        report.seconds += prepared.seconds
        report.frames += int(prepared.example.grid_thw[:, 0].sum())
        yield make(prepared.number, prepared.example)


def _watched(loaded: Iterable[Prepared]) -> Iterator[Prepared]:
    """What is loaded, without waiting for a process that was killed: grain may do so for ever, if it was sending."""
    source, workers = Source(loaded, room=1), set[Any]()
    try:
        while not source.ended:
            prepared = source.next(block=True, seconds=_PATIENCE)
            workers.update(multiprocessing.active_children())
            if prepared is not None:
                yield prepared
            elif any(worker.exitcode for worker in workers):
                raise RuntimeError
    except RuntimeError:  # grain's own, where it sees it, or ours
        codes = ", ".join(f"{worker.exitcode}" for worker in workers if worker.exitcode)
        if not codes:
            raise
        raise TarsierError(
            f"A process that decodes clips was killed (exit code {codes}), perhaps for lack of memory. What is written "
            "stays: start again to go on, with fewer --workers if memory is short."
        ) from None
    finally:
        source.close()
