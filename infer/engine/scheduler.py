"""Prompts that wait for a place, and the rows they are packed into."""

import dataclasses
from collections.abc import Set
from typing import Any

from infer.engine.config import EngineShape
from infer.engine.prefetch import Source
from infer.engine.requests import Refusal, Request
from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Batch, Example, frame_sizes
from tarsier_jax.processing.packing import Row, stack_rows
from tarsier_jax.processing.processor import Processor

_ROWS_AHEAD = 4  # of each group, that wait at most
_PATIENCE = 8  # every so many rows are those of the prompt that has waited longest


@dataclasses.dataclass(frozen=True)
class Rows:
    """One row a group, and for each the requests in it, with the token at which their prompts begin.

    step, steps: how many bins to run at a time, and how often, so that all that are in use are run.
    """

    batch: Batch
    prompts: list[list[tuple[Request, int]]]
    step: int
    steps: int


class Waiting:
    """Waiting prompts, by the kind of row that suits their frames; the oldest come first."""

    def __init__(self, shape: EngineShape, processor: Processor):
        self._shape, self._processor = shape, processor
        self._kinds: list[list[tuple[int, Request, Example]]] = [[] for _ in shape.rows]
        self._drawn = self._taken = 0

    def __bool__(self) -> bool:
        return any(self._kinds)

    def draw(self, source: Source, block: bool) -> list[Any]:
        """Takes what the source has, as far as there is room; gives refusals, the source's and of what is too large.

        block: waits for one item at least, unless some wait here.
        """
        refusals = list[Refusal]()
        while self._tokens() < _ROWS_AHEAD * self._full:
            item = source.next(block and not self and not refusals)
            if item is None:
                break
            try:
                refusals += [item] if isinstance(item, Refusal) else self._add(item)
            except InputError as error:
                refusals.append(Refusal(item.key, str(error)))
        return refusals

    def drop(self, keys: Set[Any]) -> list[Request]:
        """Gives up the requests with these keys."""
        dropped = [request for kind in self._kinds for _, request, _ in kind if request.key in keys]
        self._kinds = [[entry for entry in kind if entry[1].key not in keys] for kind in self._kinds]
        return dropped

    def take(self, flush: bool) -> Rows | None:
        """Rows of the kind that most tokens wait for, filled up with others; None if they would not be full.

        flush: also if they are not.
        """
        if not self:
            return None
        kind = max(range(len(self._kinds)), key=self._tokens)
        if not flush and self._tokens(kind) < self._full and self._tokens() < _ROWS_AHEAD * self._full:
            return None
        self._taken += 1
        if self._taken % _PATIENCE == 0:
            kind = min((k for k, entries in enumerate(self._kinds) if entries), key=lambda k: self._kinds[k][0][0])
        rows = [Row(self._shape.rows[kind], self._processor.config) for _ in range(self._shape.groups)]
        prompts: list[list[tuple[Request, int]]] = [[] for _ in rows]
        for k in sorted(range(len(self._kinds)), key=lambda k: k != kind):
            left = []
            for entry in self._kinds[k]:
                placed = _place(rows, entry[2], first=k == kind)
                if placed is None:
                    left.append(entry)
                else:
                    prompts[placed[0]].append((entry[1], placed[1]))
            self._kinds[k] = left
        batch, step = self._build(rows), self._shape.step(kind)
        length = next(length for length in self._shape.lengths if length >= batch.lengths.max())
        bins = int(batch.frame_hw.any(axis=(2, 3)).sum(axis=1).max())  # they are filled from the first on
        return Rows(cut(batch, length), prompts, step, -(-bins // step))

    def empty_rows(self, kind: int) -> Rows:
        """Rows of a kind with nothing in them, of the greatest length."""
        rows = [Row(self._shape.rows[kind], self._processor.config) for _ in range(self._shape.groups)]
        return Rows(self._build(rows), [[] for _ in rows], self._shape.step(kind), 0)

    @property
    def _full(self) -> int:
        return self._shape.rows[0].tokens * self._shape.groups

    def _tokens(self, *kinds: int) -> int:
        """That wait, of some kinds or all."""
        entries = (entry for kind in kinds or range(len(self._kinds)) for entry in self._kinds[kind])
        return sum(len(example.input_ids) for _, _, example in entries)

    def _add(self, request: Request) -> list[Refusal]:
        """Raises InputError for a request that the engine is too small for."""
        example, shape = request.example, self._shape
        if len(example.input_ids) > shape.prompt_tokens or request.max_new_tokens > shape.new_tokens:
            raise InputError(
                f"The prompt has {len(example.input_ids)} tokens and the answer may have {request.max_new_tokens}, but "
                f"there is room for {shape.prompt_tokens} and {shape.new_tokens}. Show fewer or smaller frames, ask "
                "for less, or make room for more (--prompt_tokens, --max_new_tokens)."
            )
        # The last token is run when decoding begins; see generation.slots.
        cut = {"input_ids": example.input_ids[:-1], "labels": example.labels[:-1]}
        example = dataclasses.replace(example, **cut, position_ids=example.position_ids[:, :-1])
        kind = shape.kind_of(int(frame_sizes(example).prod(axis=1).max(initial=1)))
        Row(shape.rows[kind], self._processor.config).add([example])  # raises if no row can hold it
        self._kinds[kind].append((self._drawn, request, example))
        self._drawn += 1
        return []

    def _build(self, rows: list[Row]) -> Batch:
        dtype = self._processor.config.dtype
        return stack_rows([row.build(self._processor.pad_token_id, dtype) for row in rows])


def cut(rows: Batch, length: int) -> Batch:
    """The rows without their tokens from `length` on, which are padding."""
    names = ("input_ids", "labels", "position_ids", "segment_ids", "vision_token_index")
    return dataclasses.replace(rows, **{name: getattr(rows, name)[..., :length] for name in names})


def _place(rows: list[Row], example: Example, first: bool) -> tuple[int, int] | None:
    """Adds the example to the emptiest row that it fits; gives that row and where in it the example begins.

    first: it may be a row's first.
    """
    for i in sorted(range(len(rows)), key=lambda i: rows[i].tokens):
        start = rows[i].tokens
        if (first or rows[i].examples) and rows[i].add([example]):
            return i, start
    return None
