"""Prompts that wait for a place, and the rows they are packed into."""

import dataclasses
from collections.abc import Set
from typing import Any

from infer.engine.config import EngineConfig
from infer.engine.prefetch import Prefetcher
from infer.engine.requests import Request, RequestError
from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Batch, Example, frame_sizes
from tarsier_jax.processing.packing import Row, stack_rows
from tarsier_jax.processing.processor import Processor

_ROWS_AHEAD = 4  # of each group, that wait at most
_PATIENCE = 8  # every so many rows are those of the prompt that has waited longest


@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """One row a group, and for each the requests in it, with the token at which their prompts begin.

    step, steps: how many bins to run at a time, and how often, so that all that are in use are run.
    """

    batch: Batch
    prompts: list[list[tuple[Request, int]]]
    step: int
    steps: int


class Scheduler:
    """Waiting prompts, by the bucket of row that suits their frames; the oldest come first."""

    def __init__(self, config: EngineConfig, processor: Processor):
        self._config, self._processor = config, processor
        self._queues: list[list[tuple[int, Request, Example]]] = [[] for _ in config.buckets]
        self._drawn = self._taken = 0

    def __bool__(self) -> bool:
        return any(self._queues)

    def draw(self, source: Prefetcher, block: bool) -> list[Any]:
        """Takes what the source has, as far as there is room; gives refusals, the source's and of what is too large.

        block: waits for one item at least, unless some wait here.
        """
        refusals = list[RequestError]()
        while self._tokens() < _ROWS_AHEAD * self._full:
            item = source.next(block and not self and not refusals)
            if item is None:
                break
            try:
                refusals += [item] if isinstance(item, RequestError) else self._add(item)
            except InputError as error:
                refusals.append(RequestError(item.key, str(error)))
        return refusals

    def drop(self, keys: Set[Any]) -> list[Request]:
        """Gives up the requests with these keys."""
        dropped = [request for bucket in self._queues for _, request, _ in bucket if request.key in keys]
        self._queues = [[entry for entry in bucket if entry[1].key not in keys] for bucket in self._queues]
        return dropped

    def take(self, flush: bool) -> PrefillBatch | None:
        """Rows of the bucket that most tokens wait for, filled up with others; None if they would not be full.

        flush: also if they are not.
        """
        if not self:
            return None
        bucket = max(range(len(self._queues)), key=self._tokens)
        if not flush and self._tokens(bucket) < self._full and self._tokens() < _ROWS_AHEAD * self._full:
            return None
        self._taken += 1
        if self._taken % _PATIENCE == 0:
            bucket = min((k for k, entries in enumerate(self._queues) if entries), key=lambda k: self._queues[k][0][0])
        rows = [Row(self._config.buckets[bucket], self._processor.config) for _ in range(self._config.groups)]
        prompts: list[list[tuple[Request, int]]] = [[] for _ in rows]
        for k in sorted(range(len(self._queues)), key=lambda k: k != bucket):
            left = []
            for entry in self._queues[k]:
                placed = _place(rows, entry[2], first=k == bucket)
                if placed is None:
                    left.append(entry)
                else:
                    prompts[placed[0]].append((entry[1], placed[1]))
            self._queues[k] = left
        batch, step = self._build(rows), self._config.step(bucket)
        length = next(length for length in self._config.lengths if length >= batch.lengths.max())
        bins = int(batch.frame_hw.any(axis=(2, 3)).sum(axis=1).max())  # they are filled from the first on
        return PrefillBatch(truncate(batch, length), prompts, step, -(-bins // step))

    def empty_rows(self, bucket: int) -> PrefillBatch:
        """Rows of a bucket with nothing in them, of the greatest length."""
        rows = [Row(self._config.buckets[bucket], self._processor.config) for _ in range(self._config.groups)]
        return PrefillBatch(self._build(rows), [[] for _ in rows], self._config.step(bucket), 0)

    @property
    def _full(self) -> int:
        return self._config.buckets[0].tokens * self._config.groups

    def _tokens(self, *buckets: int) -> int:
        """That wait, of some buckets or all."""
        entries = (entry for bucket in buckets or range(len(self._queues)) for entry in self._queues[bucket])
        return sum(len(example.input_ids) for _, _, example in entries)

    def _add(self, request: Request) -> list[RequestError]:
        """Raises InputError for a request that the engine is too small for."""
        example, config = request.example, self._config
        if len(example.input_ids) > config.prompt_tokens or request.max_new_tokens > config.new_tokens:
            raise InputError(
                f"The prompt has {len(example.input_ids)} tokens and the answer may have {request.max_new_tokens}, but "
                f"there is room for {config.prompt_tokens} and {config.new_tokens}. Show fewer or smaller frames, ask "
                "for less, or make room for more (--prompt_tokens, --max_new_tokens)."
            )
        # The last token is run when decoding begins; see generation.slots.
        cut = {"input_ids": example.input_ids[:-1], "labels": example.labels[:-1]}
        example = dataclasses.replace(example, **cut, position_ids=example.position_ids[:, :-1])
        bucket = config.bucket_of(int(frame_sizes(example).prod(axis=1).max(initial=1)))
        Row(config.buckets[bucket], self._processor.config).add([example])  # raises if no row can hold it
        self._queues[bucket].append((self._drawn, request, example))
        self._drawn += 1
        return []

    def _build(self, rows: list[Row]) -> Batch:
        dtype = self._processor.config.dtype
        return stack_rows([row.build(self._processor.pad_token_id, dtype) for row in rows])


def truncate(rows: Batch, length: int) -> Batch:
    """The rows without their tokens from `length` on, which are padding."""
    names = ("input_ids", "labels", "position_ids", "segment_ids", "vision_token_index")
    return dataclasses.replace(rows, **{name: getattr(rows, name)[:, :length] for name in names})


def _place(rows: list[Row], example: Example, first: bool) -> tuple[int, int] | None:
    """Adds the example to the emptiest row that it fits; gives that row and where in it the example begins.

    first: it may be a row's first.
    """
    for i in sorted(range(len(rows)), key=lambda i: rows[i].tokens):
        start = rows[i].tokens
        if (first or rows[i].examples) and rows[i].add([example]):
            return i, start
    return None
