"""Requests that wait for a slot, and the prefill batches that they are packed into."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from infer.engine.config import EngineConfig
from infer.engine.prefetch import Prefetcher
from infer.engine.prefixes import visual_prefix
from infer.engine.requests import Request, RequestError
from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Batch, Example, frame_sizes
from tarsier_jax.processing.packing import Row, stack_rows
from tarsier_jax.processing.processor import Processor

_MAX_WAITING = 4  # tokens that wait, as a multiple of a full prefill batch
_OLDEST_EVERY = 8  # every so many prefill batches, the bucket of the oldest request is next
_MAX_WAIT = 0.25  # seconds after which a request does not wait for a full prefill batch


@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """One packed row per group.

    Attributes:
        batch: The packed prompts, each without its last token (see `generation.slots`).
        prompts: For each group, the requests in its row, with the index of their first token.
        step: Number of vision bins that the vision tower runs at a time.
        steps: Number of times that it runs, to cover all bins in use.
        first: Position of the oldest request in the order of arrival.
    """

    batch: Batch
    prompts: list[list[tuple[Request, int]]]
    step: int
    steps: int
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Queued:
    """A request that waits.

    Attributes:
        number: Position in the order of arrival.
        arrival: Time of arrival, of `time.monotonic`, in seconds.
        request: The request.
        example: Its prompt without the last token.
        visuals: The `visual_prefix` of its prompt; None without visuals, or if the engine does not reuse prefixes.
    """

    number: int
    arrival: float
    request: Request
    example: Example
    visuals: bytes | None = None


class Scheduler:
    """Waiting requests, in one queue per bucket, in the order of arrival. A request waits in the bucket whose bins its
    frames fill best."""

    def __init__(self, config: EngineConfig, processor: Processor):
        self._config, self._processor = config, processor
        self._queues: list[list[Queued]] = [[] for _ in config.buckets]
        self._num_arrived = self._num_batches = 0

    def __bool__(self) -> bool:
        return any(self._queues)

    def draw(self, source: Prefetcher, block: bool) -> list[RequestError]:
        """Takes the requests that the source has ready, up to the limit of waiting tokens.

        Args:
            block: Wait for one item if nothing waits here.

        Returns:
            The errors among the items, and one error per request that is too large for the engine.
        """
        errors: list[RequestError] = []
        while self._waiting_tokens() < _MAX_WAITING * self._full:
            item = source.next(block and not self and not errors)
            if item is None:
                break
            if isinstance(item, RequestError):
                errors.append(item)
                continue
            try:
                self._add(item)
            except InputError as error:
                errors.append(RequestError(item.key, str(error)))
        return errors

    def drop_cancelled(self) -> list[Request]:
        """Removes and returns the requests that are cancelled."""
        return self.take_where(lambda queued: queued.request.cancelled.is_set())

    def take_where(self, accept: Callable[[Queued], bool]) -> list[Request]:
        """Removes and returns the requests that `accept` accepts, in the order of arrival within a bucket."""
        accepted: list[Request] = []
        for k, queue in enumerate(self._queues):
            waiting = []
            for queued in queue:
                if accept(queued):
                    accepted.append(queued.request)
                else:
                    waiting.append(queued)
            self._queues[k] = waiting
        return accepted

    @property
    def has_late(self) -> bool:
        """Whether a request has waited too long for a full prefill batch."""
        return bool(self) and time.monotonic() - min(q[0].arrival for q in self._queues if q) > _MAX_WAIT

    def take(self, flush: bool, can_continue: Callable[[Request], bool] = lambda _: False) -> PrefillBatch | None:
        """Returns rows of the bucket for which most tokens wait, filled up with requests of other buckets.

        Of several requests that begin with the same visuals, one is taken. The others wait, and continue its slot.

        Args:
            flush: Return rows that are not full too; otherwise None takes their place.
            can_continue: Returns whether a request continues a slot; it is not taken.
        """
        queues = self._without_continued(can_continue)
        if not any(queues):
            return None
        bucket = max(range(len(queues)), key=lambda k: _num_tokens(queues[k]))
        is_full = _num_tokens(queues[bucket]) >= self._full or self._waiting_tokens() >= _MAX_WAITING * self._full
        if not flush and not is_full:
            return None
        self._num_batches += 1
        if self._num_batches % _OLDEST_EVERY == 0:
            bucket = min((k for k, queue in enumerate(queues) if queue), key=lambda k: queues[k][0].number)
        return self._pack(bucket, queues)

    def _without_continued(self, can_continue: Callable[[Request], bool]) -> list[list[Queued]]:
        """Returns the queues without the requests that continue a slot, or will continue that of an earlier request."""
        visuals: set[bytes] = set()
        queues: list[list[Queued]] = []
        for queue in self._queues:
            queues.append([])
            for queued in queue:
                if queued.visuals in visuals or can_continue(queued.request):
                    continue
                if queued.visuals is not None:
                    visuals.add(queued.visuals)
                queues[-1].append(queued)
        return queues

    def _pack(self, bucket: int, queues: list[list[Queued]]) -> PrefillBatch:
        rows = self._new_rows(bucket)
        prompts: list[list[tuple[Request, int]]] = [[] for _ in rows]
        taken: set[int] = set()
        others = [k for k in range(len(queues)) if k != bucket]
        for k in [bucket, *others]:
            for queued in queues[k]:
                place = _add_to_row(rows, queued.example, may_be_first=k == bucket)
                if place is not None:
                    row, start = place
                    prompts[row].append((queued.request, start))
                    taken.add(queued.number)
        self.take_where(lambda queued: queued.number in taken)
        batch, step = self._build(rows), self._config.step(bucket)
        length = next(length for length in self._config.lengths if length >= batch.lengths.max())
        bins = int(batch.frame_hw.any(axis=(2, 3)).sum(axis=1).max())  # the first ones are in use
        return PrefillBatch(truncate(batch, length), prompts, step, -(-bins // step), min(taken))

    def empty_batch(self, bucket: int) -> PrefillBatch:
        """Returns a prefill batch of a bucket without requests, of the greatest length."""
        rows = self._new_rows(bucket)
        return PrefillBatch(self._build(rows), [[] for _ in rows], self._config.step(bucket), 0)

    def _new_rows(self, bucket: int) -> list[Row]:
        return [Row(self._config.buckets[bucket], self._processor.config) for _ in range(self._config.groups)]

    @property
    def _full(self) -> int:
        """Tokens of a full prefill batch."""
        return self._config.buckets[0].tokens * self._config.groups

    def _waiting_tokens(self) -> int:
        """Returns the number of waiting tokens."""
        return sum(map(_num_tokens, self._queues))

    def _add(self, request: Request) -> None:
        """Raises InputError for a request that is too large for the engine."""
        example, config, limit = request.example, self._config, request.options.max_new_tokens
        if len(example.input_ids) > config.prompt_tokens or limit > config.new_tokens:
            raise InputError(
                f"The prompt has {len(example.input_ids)} tokens and the answer may have {limit}, but the engine takes "
                f"at most {config.prompt_tokens} and {config.new_tokens}. Use fewer or smaller frames or a smaller "
                "limit, or raise the engine's limits (--prompt_tokens, --max_new_tokens)."
            )
        # The last token is run when decoding starts; see generation.slots.
        example = dataclasses.replace(
            example,
            input_ids=example.input_ids[:-1],
            labels=example.labels[:-1],
            position_ids=example.position_ids[:, :-1],
        )
        bucket = config.bucket_of(int(frame_sizes(example).prod(axis=1).max(initial=1)))
        Row(config.buckets[bucket], self._processor.config).add([example])  # raises if an empty row is too small
        visuals = None if request.content is None else visual_prefix(request.content)
        self._queues[bucket].append(Queued(self._num_arrived, time.monotonic(), request, example, visuals))
        self._num_arrived += 1

    def _build(self, rows: list[Row]) -> Batch:
        dtype = self._processor.config.dtype
        return stack_rows([row.build(self._processor.pad_token_id, dtype) for row in rows])


def truncate(batch: Batch, length: int) -> Batch:
    """Returns packed rows without their tokens from `length` on, which are padding."""
    names = ("input_ids", "labels", "position_ids", "segment_ids", "vision_token_index")
    arrays: dict[str, Any] = {name: getattr(batch, name)[:, :length] for name in names}
    return dataclasses.replace(batch, **arrays)


def without_segments(batch: Batch) -> Batch:
    """Returns packed rows without `segment_ids` if no row contains several prompts: a causal mask is enough."""
    return batch if np.max(batch.segment_ids) > 1 else dataclasses.replace(batch, segment_ids=None)


def _num_tokens(queue: list[Queued]) -> int:
    return sum(len(queued.example.input_ids) for queued in queue)


def _add_to_row(rows: list[Row], example: Example, may_be_first: bool) -> tuple[int, int] | None:
    """Adds the example to the emptiest row with enough space.

    Args:
        may_be_first: Whether the example may be the first of a row.

    Returns:
        The row's index and the index of the example's first token in it; None if no row has the space.
    """
    for i in sorted(range(len(rows)), key=lambda i: rows[i].tokens):
        start = rows[i].tokens
        if (may_be_first or rows[i].num_examples) and rows[i].add([example]):
            return i, start
    return None
