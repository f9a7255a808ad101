"""Continuous batching: prompts enter free slots while other answers go on.

The host packs waiting prompts into rows, and the device runs three programs in turn: `encode_frames` looks at the
rows' frames,
`prefill_into_slots` runs the prompts into free slots, `decode_slots` decodes all slots until some end. While it
decodes, the host packs
the next rows, so that the device waits for nobody. All shapes are in EngineShape: they are compiled at the start, and
nothing is compiled later.
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

from infer.engine.config import EngineShape
from infer.engine.prefetch import Source
from infer.engine.requests import Answer, Refusal, Request
from infer.engine.scheduler import Rows, Waiting, cut
from infer.engine.stats import BusyClock, Report
from tarsier_jax.api import mesh_of, use_mesh_of
from tarsier_jax.generation.decode import trim_at_eos
from tarsier_jax.generation.slots import SlotAssignment, decode_slots, empty_slots, encode_frames, prefill_into_slots
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch
from tarsier_jax.processing.processor import Processor
from tarsier_jax.sharding import BATCH

_STEPS = 16  # between two looks at prompts that may have come
_STEPS_ALOUD = 4  # between two calls of on_tokens


@dataclasses.dataclass
class _Running:
    request: Request
    began: float
    length: int  # tokens in its slot
    told: int = 0  # tokens that on_tokens has got


class Engine:
    """Compiles its programs when made; then `run` as often as you like. One thread at a time, but for `cancel`.

    The model keeps the mesh that it was loaded with; shape.groups is how many parts of it have rows of their own.
    """

    def __init__(self, model: Tarsier, processor: Processor, shape: EngineShape):
        self.model, self.processor, self.shape = model, processor, shape
        self._mesh = mesh_of(model)
        self._eos = jnp.asarray(sorted(processor.eos_token_ids), jnp.int32)
        with use_mesh_of(model):
            self._state = empty_slots(model.config, shape.slots, shape.size, shape.new_tokens, self._mesh)
        self._free = self._all_slots()
        self._running: dict[tuple[int, int], _Running] = {}  # by group and slot
        self._cancelled: set[Any] = set()
        self.report = Report()
        self._warm_up()
        self.report = Report()

    def run(self, requests: Iterable[Request | Refusal]) -> Iterator[Answer | Refusal]:
        """Answers in the order in which they end. Refusals among the requests are passed on.

        A thread draws the requests, a few rows ahead.
        """
        source = Source(requests, room=2 * self.shape.slots)
        waiting, ready = Waiting(self.shape, self.processor), None
        clock = BusyClock(self.report)
        out: list[Answer | Refusal] = []
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
                    out += [Answer(request, [], "cancelled", 0.0) for request in waiting.drop(self._cancelled)]
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

    def text(self, answer: Answer) -> str:
        return self.processor.decode(answer.tokens)

    # What the device is given.

    def _look(self, rows: Rows) -> jax.Array:
        """The features of the rows' frames."""
        with use_mesh_of(self.model):
            patches, frame_hw = self._placed(rows.batch.patches), self._placed(rows.batch.frame_hw)
            return encode_frames(
                self.model, patches, frame_hw, jnp.int32(rows.steps), step=rows.step, room=self.shape.features
            )

    def _insert(self, rows: Rows, features: jax.Array) -> None:
        now = time.perf_counter()
        prompts = SlotAssignment.none(self.shape.groups, self.shape.rows[0].samples)
        for group, placed in enumerate(rows.prompts):
            prompts.count[group] = len(placed)
            for n, (request, start) in enumerate(placed):
                slot = self._free[group].pop()
                self._running[group, slot] = _Running(request, now, len(request.example.input_ids))
                _fill(prompts, (group, n), request, start, slot)
        self._count(rows)
        self._run_insert(rows.batch, features, prompts)

    def _count(self, rows: Rows) -> None:
        self.report.prompts += sum(map(len, rows.prompts))
        self.report.tokens += rows.batch.input_ids.size
        self.report.valid_tokens += int(rows.batch.lengths.sum())
        self.report.patches += self.shape.groups * rows.steps * rows.step * rows.batch.patches.shape[2]
        self.report.valid_patches += int(rows.batch.frame_hw.prod(axis=-1).sum())

    def _run_insert(self, batch: Batch, features: jax.Array, prompts: SlotAssignment) -> None:
        batch = dataclasses.replace(batch, patches=None, frame_hw=None, labels=None)
        with use_mesh_of(self.model):
            self._state = prefill_into_slots(
                self.model, self._state, self._placed(batch), features, self._placed(prompts)
            )

    def _advance(self, ready: tuple[Rows, Any] | None, ended: bool) -> tuple[jax.Array, jax.Array]:
        """Decodes on; gives which slots are done, and all tokens."""
        missing = sum(max(0, need - len(free)) for need, free in self._needs(ready[0])) if ready else 1
        steps = self.shape.new_tokens if ready or ended else _STEPS
        if any(running.request.on_tokens for running in self._running.values()):
            steps = _STEPS_ALOUD
        cancelled = np.zeros(self.shape.slots, bool)
        for (group, slot), running in self._running.items():
            cancelled[self._slot(group, slot)] = running.request.key in self._cancelled
        longest = max(running.length for running in self._running.values())
        span = next((span for span in self.shape.spans if span >= longest + _STEPS), self.shape.size)
        return self._run_advance(cancelled, steps, max(missing, 1), span)

    def _run_advance(self, cancelled: np.ndarray, steps: int, wanted: int, span: int) -> tuple[jax.Array, jax.Array]:
        with use_mesh_of(self.model):
            self._state, progress = decode_slots(
                self.model, self._state, cancelled, self._eos, jnp.int32(steps), jnp.int32(wanted), read_length=span
            )
        return progress

    def _collect(self, progress: tuple[jax.Array, jax.Array]) -> list[Answer | Refusal]:
        """Waits for the device, and frees the slots of answers that have ended."""
        done, tokens = jax.device_get(progress)
        answers: list[Answer | Refusal] = []
        for (group, slot), running in list(self._running.items()):
            at = self._slot(group, slot)
            request, row = running.request, tokens[at]
            generation = trim_at_eos(row, self.processor.eos_token_ids)
            running.length = len(request.example.input_ids) + len(generation.tokens)
            if request.on_tokens and generation.tokens[running.told :]:
                request.on_tokens(generation.tokens[running.told :])
                running.told = len(generation.tokens)
            if not done[at]:
                continue
            del self._running[group, slot]
            self._free[group].append(slot)
            reason = generation.finish_reason
            if reason == "length" and len(generation.tokens) < request.max_new_tokens:
                reason = "cancelled"
                self._cancelled.discard(request.key)
            seconds = time.perf_counter() - running.began
            answers.append(Answer(request, generation.tokens, reason, seconds))
            self.report.answers += 1
            self.report.new_tokens += len(generation.tokens)
        return answers

    def _abandon(self) -> None:
        """Frees the slots of answers that nobody waits for any more."""
        if self._running:
            self._run_advance(np.ones(self.shape.slots, bool), 0, 1, self.shape.size)
            self._running.clear()
            self._free = self._all_slots()

    def _warm_up(self) -> None:
        """Compiles every program, twice, as the first results may lie otherwise than what they were made of."""
        samples = self.shape.rows[0].samples
        for _ in range(2):
            for kind in range(len(self.shape.rows)):
                rows = Waiting(self.shape, self.processor).empty_rows(kind)
                features = self._look(rows)
            for length in self.shape.lengths:
                self._run_insert(cut(rows.batch, length), features, SlotAssignment.none(self.shape.groups, samples))
            for span in self.shape.spans:
                self._run_advance(np.zeros(self.shape.slots, bool), 1, 1, span)
        jax.block_until_ready(self._state)

    # Where things are.

    def _all_slots(self) -> list[list[int]]:
        return [list(range(self.shape.slots // self.shape.groups)) for _ in range(self.shape.groups)]

    def _needs(self, rows: Rows) -> Sequence[tuple[int, list[int]]]:
        return [(len(placed), free) for placed, free in zip(rows.prompts, self._free, strict=True)]

    def _has_room(self, rows: Rows) -> bool:
        return all(need <= len(free) for need, free in self._needs(rows))

    def _slot(self, group: int, slot: int) -> int:
        return group * (self.shape.slots // self.shape.groups) + slot

    def _placed(self, tree: Any) -> Any:
        """On the devices, each group's part on its own."""
        mesh = self._mesh
        if mesh is None:
            return jax.tree.map(jnp.asarray, tree)

        def place(path: Any, x: np.ndarray) -> jax.Array:
            rows_second = any(getattr(k, "name", None) == "position_ids" for k in path)  # (3, B, S)
            return jax.device_put(x, NamedSharding(mesh, P(None, BATCH) if rows_second else P(BATCH)))

        return jax.tree_util.tree_map_with_path(place, tree)


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
