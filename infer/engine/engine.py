"""Continuous batching: prompts enter free slots while other answers are decoded.

The host packs waiting prompts into prefill batches, and the device runs three programs in turn: `encode_frames` runs
the vision tower, `prefill_into_slots` runs the prompts into free slots, and `decode_slots` decodes all slots until some
answers end. Meanwhile the host packs the next batch, and the device does not wait. All shapes are in EngineConfig. They
are compiled at the start, and nothing is compiled later.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from infer.engine.config import EngineConfig
from infer.engine.prefetch import Prefetcher
from infer.engine.requests import Completion, Request, RequestError
from infer.engine.scheduler import PrefillBatch, Scheduler, truncate
from infer.engine.stats import DeviceTimer, EngineStats
from tarsier_jax.api import mesh_of, use_mesh_of
from tarsier_jax.generation.decode import trim_at_eos
from tarsier_jax.generation.slots import SlotAssignment, decode_slots, empty_slots, encode_frames, prefill_into_slots
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch
from tarsier_jax.processing.processor import Processor
from tarsier_jax.sharding import BATCH

_STEPS = 16  # between two looks at prompts that may have come
_STREAM_EVERY = 4  # between two calls of on_tokens


@dataclasses.dataclass
class _Running:
    request: Request
    began: float
    length: int  # tokens in its slot
    num_streamed: int = 0  # tokens that on_tokens has got


class Engine:
    """Compiles its programs when made; then `run` as often as you like. One thread at a time, but for `cancel`.

    The model keeps the mesh that it was loaded with; config.groups is how many parts of it have rows of their own.
    """

    def __init__(self, model: Tarsier, processor: Processor, config: EngineConfig):
        self.model, self.processor, self.config = model, processor, config
        self._mesh = mesh_of(model)
        self._eos = jnp.asarray(sorted(processor.eos_token_ids), jnp.int32)
        with use_mesh_of(model):
            self._state = empty_slots(model.config, config.slots, config.size, config.new_tokens, self._mesh)
        self._free = self._all_slots()
        self._running: dict[tuple[int, int], _Running] = {}  # by group and slot
        self._cancelled: set[Any] = set()
        self.stats = EngineStats()
        self._warm_up()
        self.stats = EngineStats()

    def run(self, requests: Iterable[Request | RequestError]) -> Iterator[Completion | RequestError]:
        """Answers in the order in which they end. Refusals among the requests are passed on.

        A thread draws the requests, a few rows ahead.
        """
        source = Prefetcher(requests, room=2 * self.config.slots)
        waiting, ready = Scheduler(self.config, self.processor), None
        clock = DeviceTimer(self.stats)
        out: list[Completion | RequestError] = []
        try:
            while True:
                if ready is not None and self._has_room(ready[0]):
                    self._insert(*ready)
                    ready = None
                progress = self._advance(ready, source.ended) if self._running else None
                if progress is not None:
                    clock.watch(progress)
                yield from out
                out = waiting.draw(source, block=progress is None and ready is None)
                if ready is None:
                    flush = source.ended or (progress is None and source.empty)
                    out += [Completion(request, [], "cancelled", 0.0) for request in waiting.drop(self._cancelled)]
                    rows = waiting.take(flush)
                    if rows is not None:
                        ready = rows, self._look(rows)
                        clock.watch(ready[1])
                if progress is not None:
                    out += self._collect(progress)
                elif ready is None and source.ended and not waiting:
                    yield from out
                    return
        finally:
            source.close()
            clock.stop()
            self._abandon()

    def cancel(self, key: Any) -> None:
        """The request with this key ends at the next look, with what it has; from any thread."""
        self._cancelled.add(key)

    def text(self, answer: Completion) -> str:
        return self.processor.decode(answer.tokens)

    # What the device is given.

    def _look(self, rows: PrefillBatch) -> jax.Array:
        """The features of the rows' frames."""
        with use_mesh_of(self.model):
            patches, frame_hw = self._placed(rows.batch.patches), self._placed(rows.batch.frame_hw)
            features = self.config.features
            return encode_frames(self.model, patches, frame_hw, jnp.int32(rows.steps), step=rows.step, room=features)

    def _insert(self, rows: PrefillBatch, features: jax.Array) -> None:
        now = time.perf_counter()
        prompts = SlotAssignment.none(self.config.groups, self.config.buckets[0].samples)
        for group, placed in enumerate(rows.prompts):
            prompts.count[group] = len(placed)
            for n, (request, start) in enumerate(placed):
                slot = self._free[group].pop()
                self._running[group, slot] = _Running(request, now, len(request.example.input_ids))
                _fill(prompts, (group, n), request, start, slot)
        self._count(rows)
        self._run_insert(rows.batch, features, prompts)

    def _count(self, rows: PrefillBatch) -> None:
        self.stats.prompts += sum(map(len, rows.prompts))
        self.stats.tokens += rows.batch.input_ids.size
        self.stats.valid_tokens += int(rows.batch.lengths.sum())
        self.stats.patches += self.config.groups * rows.steps * rows.step * rows.batch.patches.shape[2]
        self.stats.valid_patches += int(rows.batch.frame_hw.prod(axis=-1).sum())

    def _run_insert(self, batch: Batch, features: jax.Array, prompts: SlotAssignment) -> None:
        batch = dataclasses.replace(batch, patches=None, frame_hw=None, labels=None)
        with use_mesh_of(self.model):
            self._state = prefill_into_slots(
                self.model, self._state, self._placed(batch), features, self._placed(prompts)
            )

    def _advance(self, ready: tuple[PrefillBatch, Any] | None, ended: bool) -> tuple[jax.Array, jax.Array]:
        """Decodes on; gives which slots are done, and all tokens."""
        missing = sum(max(0, need - len(free)) for need, free in self._needs(ready[0])) if ready else 1
        steps = self.config.new_tokens if ready or ended else _STEPS
        if any(running.request.on_tokens for running in self._running.values()):
            steps = _STREAM_EVERY
        cancelled = np.zeros(self.config.slots, bool)
        for (group, slot), running in self._running.items():
            cancelled[self._slot(group, slot)] = running.request.key in self._cancelled
        longest = max(running.length for running in self._running.values())
        span = next((span for span in self.config.read_lengths if span >= longest + _STEPS), self.config.size)
        return self._run_advance(cancelled, steps, max(missing, 1), span)

    def _run_advance(self, cancelled: np.ndarray, steps: int, wanted: int, span: int) -> tuple[jax.Array, jax.Array]:
        with use_mesh_of(self.model):
            self._state, progress = decode_slots(
                self.model, self._state, cancelled, self._eos, jnp.int32(steps), jnp.int32(wanted), read_length=span
            )
        return progress

    def _collect(self, progress: tuple[jax.Array, jax.Array]) -> list[Completion | RequestError]:
        """Waits for the device, and frees the slots of answers that have ended."""
        done, tokens = jax.device_get(progress)
        answers: list[Completion | RequestError] = []
        for (group, slot), running in list(self._running.items()):
            at = self._slot(group, slot)
            request, row = running.request, tokens[at]
            generation = trim_at_eos(row, self.processor.eos_token_ids)
            running.length = len(request.example.input_ids) + len(generation.tokens)
            if request.on_tokens and generation.tokens[running.num_streamed :]:
                request.on_tokens(generation.tokens[running.num_streamed :])
                running.num_streamed = len(generation.tokens)
            if not done[at]:
                continue
            del self._running[group, slot]
            self._free[group].append(slot)
            reason = generation.finish_reason
            if reason == "length" and len(generation.tokens) < request.max_new_tokens:
                reason = "cancelled"
                self._cancelled.discard(request.key)
            seconds = time.perf_counter() - running.began
            answers.append(Completion(request, generation.tokens, reason, seconds))
            self.stats.answers += 1
            self.stats.new_tokens += len(generation.tokens)
        return answers

    def _abandon(self) -> None:
        """Frees the slots of answers that nobody waits for any more."""
        if self._running:
            self._run_advance(np.ones(self.config.slots, bool), 0, 1, self.config.size)
            self._running.clear()
            self._free = self._all_slots()

    def _warm_up(self) -> None:
        """Compiles every program, twice, as the first results may lie otherwise than what they were made of."""
        samples = self.config.buckets[0].samples
        for _ in range(2):
            for bucket in range(len(self.config.buckets)):
                rows = Scheduler(self.config, self.processor).empty_rows(bucket)
                features = self._look(rows)
            for length in self.config.lengths:
                self._run_insert(
                    truncate(rows.batch, length), features, SlotAssignment.none(self.config.groups, samples)
                )
            for span in self.config.read_lengths:
                self._run_advance(np.zeros(self.config.slots, bool), 1, 1, span)
        jax.block_until_ready(self._state)

    # Where things are.

    def _all_slots(self) -> list[list[int]]:
        return [list(range(self.config.slots // self.config.groups)) for _ in range(self.config.groups)]

    def _needs(self, rows: PrefillBatch) -> Sequence[tuple[int, list[int]]]:
        return [(len(placed), free) for placed, free in zip(rows.prompts, self._free, strict=True)]

    def _has_room(self, rows: PrefillBatch) -> bool:
        return all(need <= len(free) for need, free in self._needs(rows))

    def _slot(self, group: int, slot: int) -> int:
        return group * (self.config.slots // self.config.groups) + slot

    def _placed(self, tree: Any) -> Any:
        """On the devices, each group's part on its own."""
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, NamedSharding(self._mesh, P(BATCH)))


def _fill(prompts: SlotAssignment, at: tuple[int, int], request: Request, start: int, slot: int) -> None:
    example = request.example
    values = {
        "start": start,
        "slot": slot,
        "length": len(example.input_ids) - 1,
        "last_token": example.input_ids[-1],
        "last_position": example.position_ids[:, -1].max(),
        "max_new_tokens": request.max_new_tokens,
        "seed": request.seed,
        "top_k": request.top_k,
        "temperature": request.temperature,
        "top_p": request.top_p,
    }
    for name, value in values.items():
        getattr(prompts, name)[at] = value
