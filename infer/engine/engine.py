"""Continuous batching: prompts enter free slots while other answers are decoded.

The device runs three programs in turn: `encode_frames` runs the vision tower on the frames of a prefill batch,
`prefill_into_slots` runs its prompts into free slots, and `decode_slots` decodes all slots until some answers end.
The host packs the next prefill batch meanwhile. A thread calls the programs: on a GPU, the call of a program with loops
returns when they end.

    host   | pack n+1 | collect | pack n+2 | collect |
    device | encode n | prefill n | decode | encode n+1 | prefill n+1 | decode |

A prompt that begins with the content of a slot continues it with `extend_slots` (see `infer.engine.prefixes`): there if
the slot is free, or in another slot while the answer to the first prompt is in progress.

All shapes are in EngineConfig. They are compiled at the start, and nothing is compiled later.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from infer.engine.config import EngineConfig
from infer.engine.prefetch import Prefetcher
from infer.engine.prefixes import StoredPrefixes, content_ids
from infer.engine.requests import Completion, Request, RequestError
from infer.engine.scheduler import PrefillBatch, Queued, Scheduler, truncate, without_segments
from infer.engine.stats import DeviceTimer, EngineStats
from tarsier_jax.api import model_mesh, use_mesh_of
from tarsier_jax.generation.decode import GeneratedTokens, trim_at_eos
from tarsier_jax.generation.slots import (
    Continuation,
    SlotAssignment,
    decode_slots,
    empty_slots,
    encode_frames,
    extend_slots,
    prefill_into_slots,
)
from tarsier_jax.models.attention import prefers_lengths
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch
from tarsier_jax.processing.processor import Processor
from tarsier_jax.sharding import BATCH

_STEPS = 16  # decoding steps between two checks for new requests and stop strings
_STREAM_EVERY = 4  # decoding steps between two calls of on_tokens
_NO_TOKENS = np.empty(0, np.int64)

_T = TypeVar("_T")
_Progress = tuple[jax.Array, jax.Array]  # which slots are done, and all tokens


@dataclasses.dataclass
class _Running:
    """A request in a slot.

    Attributes:
        request: The request.
        start: Time of its prefill, of `time.perf_counter`.
        length: Number of tokens in the slot.
        reused: Number of tokens that were in the slot before.
        num_streamed: Number of tokens that on_tokens has received.
        is_stopped: The text contains a stop string.
    """

    request: Request
    start: float
    length: int
    reused: int = 0
    num_streamed: int = 0
    is_stopped: bool = False


@dataclasses.dataclass(frozen=True)
class _Continued:
    """A request whose prompt begins with the content of a slot.

    Attributes:
        request: The request.
        group: Group of the slots.
        source: The slot with the content, in the group.
        slot: The slot of the answer, which may be the same.
        start: Number of tokens of the prompt that are in the source.
    """

    request: Request
    group: int
    source: int
    slot: int
    start: int


class Engine:
    """Compiles its programs when constructed; then `run` can be called repeatedly, by one thread at a time.

    The model keeps the mesh that it was loaded with; `config.groups` is the number of its data-parallel parts. Many
    threads share an engine through `infer.engine.Frontend`.
    """

    def __init__(self, model: Tarsier, processor: Processor, config: EngineConfig):
        self.model, self.processor, self.config = model, processor, config
        self._mesh = model_mesh(model)
        # Attention that skips the keys from a row's length on does not profit from a shorter read length.
        self._prefers_lengths = prefers_lengths(model.config.attention)
        self._read_lengths = (config.size,) if self._prefers_lengths else config.read_lengths
        self._eos = jnp.asarray(sorted(processor.eos_token_ids), jnp.int32)
        self._thread = ThreadPoolExecutor(1, "device")
        self._last_call: Future[Any] | None = None
        with use_mesh_of(model):
            self._state = empty_slots(model, config.slots, config.size, config.new_tokens, self._mesh)
        self._free = self._all_slots()
        self._running: dict[tuple[int, int], _Running] = {}  # by group and slot
        self._prefixes = StoredPrefixes(config.slots, config.size if config.reuse_prefixes else 0)
        self.stats = EngineStats()
        self._warm_up()
        self.stats = EngineStats()

    def run(self, requests: Iterable[Request | RequestError]) -> Iterator[Completion | RequestError]:
        """Yields the results in the order in which they end. Errors among the requests are passed on.

        A thread draws the requests ahead, up to twice the number of slots.

        Raises:
            Exception: any error of the iterator `requests`, or of the device.
        """
        if self.config.reuse_prefixes:
            requests = map(self._with_content, requests)
        source = Prefetcher(requests, capacity=2 * self.config.slots)
        scheduler = Scheduler(self.config, self.processor)
        timer = DeviceTimer(self.stats)
        next_batch: tuple[PrefillBatch, Future[jax.Array]] | None = None  # packed, with the features of its frames
        results: list[Completion | RequestError] = []
        try:
            while True:
                self._extend(self._find_continued(scheduler, next_batch))
                if next_batch is not None and self._has_free_slots(next_batch[0]):
                    self._prefill(*next_batch)
                    next_batch = None
                progress = self._decode(next_batch, source.ended) if self._running else None
                if progress is not None:
                    timer.watch(progress)
                yield from results
                results = [*scheduler.draw(source, block=progress is None and next_batch is None)]
                if next_batch is None:
                    results += [_cancelled(request) for request in scheduler.drop_cancelled()]
                    is_idle = source.empty and (progress is None or scheduler.has_late)
                    batch = scheduler.take(source.ended or is_idle, lambda r: self._find_prefix(r) is not None)
                    if batch is not None:
                        next_batch = batch, self._encode(batch)
                        timer.watch(next_batch[1])
                if progress is not None:
                    results += self._collect(progress)
                elif next_batch is None and source.ended and not scheduler:
                    yield from results
                    return
        finally:
            source.close()
            timer.stop()
            self._cancel_all()

    # Calls of the device programs. None waits for its result.

    def _submit(self, call: Callable[[], _T]) -> Future[_T]:
        """Runs `call` in the thread of the device programs, after the previous call, whose error it raises."""
        previous = self._last_call

        def run() -> _T:
            if previous is not None:
                previous.result()
            with use_mesh_of(self.model):
                return call()

        self._last_call = self._thread.submit(run)
        return self._last_call

    def _encode(self, batch: PrefillBatch) -> Future[jax.Array]:
        """Returns the features of a prefill batch's frames."""
        patches, frame_hw = self._on_device(batch.batch.patches), self._on_device(batch.batch.frame_hw)
        sizes = {"step": batch.step, "num_features": self.config.num_features(self.model.config.vision)}
        return self._submit(lambda: encode_frames(self.model, patches, frame_hw, jnp.int32(batch.steps), **sizes))

    def _prefill(self, batch: PrefillBatch, features: Future[jax.Array]) -> None:
        """Runs the prompts of a batch into free slots."""
        now = time.perf_counter()
        assignment = SlotAssignment.none(self.config.groups, self.config.buckets[0].samples)
        for group, prompts in enumerate(batch.prompts):
            assignment.count[group] = len(prompts)
            for n, (request, start) in enumerate(prompts):
                slot = self._free[group].pop(0)
                self._store_prefix(group, slot, request)
                self._running[group, slot] = _Running(request, now, len(request.example.input_ids))
                _assign(assignment, (group, n), request, start, slot)
        self._count(batch)
        rows = without_segments(batch.batch) if self._prefers_lengths else batch.batch
        self._run_prefill(rows, features, assignment)

    def _count(self, batch: PrefillBatch) -> None:
        self.stats.prompts += sum(map(len, batch.prompts))
        self.stats.tokens += batch.batch.input_ids.size
        self.stats.valid_tokens += int(batch.batch.lengths.sum())
        self.stats.patches += self.config.groups * batch.steps * batch.step * batch.batch.patches.shape[2]
        self.stats.valid_patches += int(batch.batch.frame_hw.prod(axis=-1).sum())

    def _run_prefill(self, batch: Batch, features: Future[jax.Array], assignment: SlotAssignment) -> None:
        batch = self._on_device(dataclasses.replace(batch, patches=None, frame_hw=None, labels=None))
        assignment = self._on_device(assignment)

        def call() -> None:
            self._state = prefill_into_slots(self.model, self._state, batch, features.result(), assignment)

        self._submit(call)

    def _extend(self, continued: list[_Continued]) -> None:
        """Runs the other tokens of prompts whose beginnings are in slots."""
        for item in continued:
            request, length = item.request, len(item.request.example.input_ids) - 1  # decoding runs the last token
            self._store_prefix(item.group, item.slot, request)
            self._running[item.group, item.slot] = _Running(request, time.perf_counter(), length + 1, item.start)
            assignment = SlotAssignment.none(self.config.groups, 1)
            assignment.count[item.group] = 1
            _assign(assignment, (item.group, 0), request, 0, item.slot)
            pieces = _pieces(item.start, length, self.config.chunks)
            for start, size in pieces:
                source = item.source if start == item.start else item.slot
                self._run_extend(self._continuation(item, source, start, size), assignment)
            self.stats.prompts += 1
            self.stats.tokens += self.config.groups * sum(size for _, size in pieces)
            self.stats.valid_tokens += length - item.start
            self.stats.reused_tokens += item.start

    def _continuation(self, item: _Continued, source: int, start: int, size: int) -> Continuation:
        """Returns up to `size` tokens of a prompt, from `start` on, without its last token."""
        example, group, new = item.request.example, item.group, self._no_continuation(size)
        length = len(example.input_ids)
        end = min(start + size, length - 1)
        new.input_ids[group, : end - start] = example.input_ids[start:end]
        new.position_ids[group, : end - start] = example.position_ids[:, start:end].T
        new.source[group], new.start[group], new.num_new[group] = source, start, end - start
        new.prompt[group, :length], new.prompt_length[group] = example.input_ids, length
        return new

    def _no_continuation(self, size: int) -> Continuation:
        return Continuation.none(self.config.groups, size, self.config.prompt_tokens)

    def _run_extend(self, new: Continuation, assignment: SlotAssignment) -> Future[None]:
        new, assignment = self._on_device(new), self._on_device(assignment)

        def call() -> None:
            self._state = extend_slots(self.model, self._state, new, assignment)

        return self._submit(call)

    def _decode(self, next_batch: tuple[PrefillBatch, Any] | None, source_ended: bool) -> Future[_Progress]:
        """Decodes until enough slots are free for the next batch. Returns which slots are done, and all tokens."""
        missing = sum(max(0, need - len(free)) for need, free in self._needs(next_batch[0])) if next_batch else 1
        steps = self.config.new_tokens if next_batch or source_ended else _STEPS
        if any(running.request.options.stop for running in self._running.values()):
            steps = min(steps, _STEPS)
        streamed = [running for running in self._running.values() if running.request.on_tokens]
        if streamed:  # the first token at once
            steps = _STREAM_EVERY if all(running.num_streamed for running in streamed) else 1
        cancelled = np.zeros(self.config.slots, bool)
        for (group, slot), running in self._running.items():
            cancelled[self._index(group, slot)] = running.is_stopped or running.request.cancelled.is_set()
        longest = max(running.length for running in self._running.values()) + _STEPS
        read_length = next((length for length in self._read_lengths if length >= longest), self.config.size)
        return self._run_decode(cancelled, steps, max(missing, 1), read_length)

    def _run_decode(self, cancelled: np.ndarray, steps: int, stop_after: int, read_length: int) -> Future[_Progress]:
        steps_, stop_after_ = jnp.int32(steps), jnp.int32(stop_after)

        def call() -> _Progress:
            self._state, progress = decode_slots(
                self.model, self._state, cancelled, self._eos, steps_, stop_after_, read_length=read_length
            )
            return progress

        return self._submit(call)

    def _collect(self, progress: Future[_Progress]) -> list[Completion]:
        """Waits for the device, and frees the slots of answers that have ended."""
        done, tokens = jax.device_get(progress.result())
        completions: list[Completion] = []
        for (group, slot), running in list(self._running.items()):
            index = self._index(group, slot)
            answer = trim_at_eos(tokens[index], self.processor.eos_token_ids)
            self._stream(running, answer.tokens)
            if done[index]:
                del self._running[group, slot]
                self._free[group].append(slot)  # the first one is the least recently used
                self._store_prefix(group, slot, running.request, tokens[index])
                completions.append(self._complete(running, answer))
        return completions

    def _stream(self, running: _Running, tokens: list[int]) -> None:
        request = running.request
        running.length = len(request.example.input_ids) + len(tokens)
        if request.options.stop:
            running.is_stopped = request.options.truncate(self.processor.decode(tokens))[1]
        if request.on_tokens and tokens[running.num_streamed :]:
            request.on_tokens(tokens[running.num_streamed :])
            running.num_streamed = len(tokens)

    def _complete(self, running: _Running, answer: GeneratedTokens) -> Completion:
        options, reason = running.request.options, answer.finish_reason
        text, is_stopped = options.truncate(self.processor.decode(answer.tokens))
        if is_stopped:
            reason = "stop"
        elif reason == "length" and len(answer.tokens) < options.max_new_tokens:
            reason = "cancelled"
        self.stats.answers += 1
        self.stats.new_tokens += len(answer.tokens)
        seconds = time.perf_counter() - running.start
        return Completion(running.request, text, answer.tokens, reason, seconds, running.reused)

    def _cancel_all(self) -> None:
        """Cancels all running requests and frees their slots, after the caller stopped iterating."""
        if sum(map(len, self._free)) < self.config.slots:
            self._run_decode(np.ones(self.config.slots, bool), 0, 1, self.config.size)
            self._running.clear()
            self._prefixes.clear()
            self._free = self._all_slots()

    def _warm_up(self) -> None:
        """Compiles every program, twice: the layout of the first results may differ from the initial state's."""
        scheduler, samples = Scheduler(self.config, self.processor), self.config.buckets[0].samples
        batches = [scheduler.empty_batch(bucket) for bucket in range(len(self.config.buckets))]
        for _ in range(2):
            features = [self._encode(batch) for batch in batches]
            for length in self.config.lengths:
                assignment, rows = SlotAssignment.none(self.config.groups, samples), truncate(batches[0].batch, length)
                self._run_prefill(rows, features[0], assignment)
                if self._prefers_lengths:
                    self._run_prefill(without_segments(rows), features[0], assignment)
            for read_length in self._read_lengths:
                self._run_decode(np.zeros(self.config.slots, bool), 1, 1, read_length).result()
            for size in self.config.chunks if self.config.reuse_prefixes else ():
                self._run_extend(self._no_continuation(size), SlotAssignment.none(self.config.groups, 1)).result()
        jax.block_until_ready(self._state)

    # Prefixes in slots.

    def _with_content(self, request: Request | RequestError) -> Request | RequestError:
        if isinstance(request, RequestError):
            return request
        return dataclasses.replace(request, content=content_ids(request.example, self.model.config))

    def _find_continued(self, scheduler: Scheduler, next_batch: tuple[PrefillBatch, Any] | None) -> list[_Continued]:
        """Removes the requests that continue a slot from the scheduler, takes a slot for each, and returns them.

        Those that continue a free slot are the first ones, because the others overwrite free slots. Enough slots remain
        free for the next batch, which otherwise could wait forever. Only requests that arrived before those of the
        batch take them.
        """
        continued: list[_Continued] = []

        def find(queued: Queued, only_free: bool) -> bool:
            free = [self._index(group, slot) for group, slots in enumerate(self._free) for slot in slots]
            match = self._find_prefix(queued.request, free if only_free else None)
            if match is None:
                return False
            group, source = divmod(match[0], self.config.slots // self.config.groups)
            slots, reserved = self._free[group], 0
            if next_batch is not None and queued.number > next_batch[0].first:
                reserved = len(next_batch[0].prompts[group])
            if len(slots) <= reserved:
                return False
            slot = source if source in slots else slots[0]
            slots.remove(slot)
            self._prefixes.remove(self._index(group, slot))
            continued.append(_Continued(queued.request, group, source, slot, start=match[1]))
            return True

        if self.config.reuse_prefixes:
            for only_free in (True, False):
                scheduler.take_where(functools.partial(find, only_free=only_free))
        return continued

    def _find_prefix(self, request: Request, slots: Sequence[int] | None = None) -> tuple[int, int] | None:
        return None if request.content is None else self._prefixes.find(request.content, slots)

    def _store_prefix(self, group: int, slot: int, request: Request, tokens: np.ndarray = _NO_TOKENS) -> None:
        """Stores the content of a slot: a prompt, and tokens of its answer. The last token of both was not run."""
        if request.content is not None:
            self._prefixes.store(self._index(group, slot), np.append(request.content, tokens[tokens >= 0])[:-1])

    # Slots and devices.

    def _all_slots(self) -> list[list[int]]:
        return [list(range(self.config.slots // self.config.groups)) for _ in range(self.config.groups)]

    def _needs(self, batch: PrefillBatch) -> Sequence[tuple[int, list[int]]]:
        """Returns, for each group, the number of slots that the batch needs, and the free ones."""
        return [(len(prompts), free) for prompts, free in zip(batch.prompts, self._free, strict=True)]

    def _has_free_slots(self, batch: PrefillBatch) -> bool:
        return all(need <= len(free) for need, free in self._needs(batch))

    def _index(self, group: int, slot: int) -> int:
        """Returns the index of a group's slot among all slots."""
        return group * (self.config.slots // self.config.groups) + slot

    def _on_device(self, tree: Any) -> Any:
        """Copies host arrays to the devices, each group's part to its own."""
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, NamedSharding(self._mesh, P(BATCH)))


def _pieces(start: int, end: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the start and the size of each call that runs the tokens from `start` to `end`; at least one call."""
    pieces: list[tuple[int, int]] = []
    while not pieces or start < end:
        pieces.append((start, next((size for size in sizes if size >= end - start), sizes[-1])))
        start += pieces[-1][1]
    return pieces


def _cancelled(request: Request) -> Completion:
    return Completion(request, "", [], "cancelled", 0.0)


def _assign(assignment: SlotAssignment, at: tuple[int, int], request: Request, start: int, slot: int) -> None:
    example, options = request.example, request.options
    values = {
        "start": start,
        "slot": slot,
        "length": len(example.input_ids) - 1,
        "last_token": example.input_ids[-1],
        "last_position": example.position_ids[:, -1].max(),
    }
    names = ("max_new_tokens", "seed", "top_k", "temperature", "top_p", "repetition_penalty")
    values |= {name: getattr(options, name) for name in names}
    for name, value in values.items():
        getattr(assignment, name)[at] = value
