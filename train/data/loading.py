"""The rows of each step, packed ahead; samples are decoded in a pool of threads.

With B rows per step over all processes, row r of every step packs the samples r, r + B, r + 2 B, ... of the mixture.
The rows of a step and their states therefore do not depend on the number of processes or threads.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from tarsier_jax.processing.packing import Row
from train.data.packing import BadSample, Load, LoadLine, PackedRow, PackingConfig, PackUnit, check_share


class RowLoader(Iterator[list[PackedRow]]):
    """Iterates over steps, each a list of the rows that this process loads. Packs one step ahead.

    Threads suffice: decoding, resizing and patchifying release the GIL, and the patches of a row, hundreds of
    megabytes, need no copy between processes.

    Args:
        lines: Mixture of the annotations.
        load: Returns the unit of a sample.
        config: Parameters of packing.
        seed: Seed of the random choices of `load`.
        media_root: Directory that relative paths of media start from.
        num_rows: Rows per step over all processes.
        local_rows: Rows that this process loads; all by default.
        num_workers: Threads that decode samples, of one row or of several.
    """

    def __init__(
        self,
        lines: grain.MapDataset,
        load: Load,
        config: PackingConfig,
        *,
        seed: int,
        media_root: str,
        num_rows: int,
        local_rows: Sequence[int] | None = None,
        num_workers: int = 1,
    ):
        self.num_rows, self.local_rows = num_rows, list(range(num_rows) if local_rows is None else local_rows)
        samples = lines.seed(seed).random_map(LoadLine(load, config, media_root))
        self._decoders = ThreadPoolExecutor(max(num_workers, 1), "decode")
        self._packers = ThreadPoolExecutor(len(self.local_rows), "pack")
        num_ahead = max(-(-num_workers // len(self.local_rows)) - 1, 0)
        self._rows = [_RowPacker(samples[row::num_rows], config, self._decoders, num_ahead) for row in self.local_rows]
        self._states = [row.get_state() for row in self._rows]
        self._next: list[Future[PackedRow]] = []

    def __next__(self) -> list[PackedRow]:
        self._next = self._next or [self._packers.submit(row.pack) for row in self._rows]
        step = []
        for i, row in enumerate(self._rows):
            step.append(self._next[i].result())
            self._states[i] = row.get_state()
            self._next[i] = self._packers.submit(row.pack)
        return step

    def get_state(self) -> dict[str, Any]:
        """Returns the state of every local row after the last step: row -> JSON object."""
        return {str(row): state for row, state in zip(self.local_rows, self._states, strict=True)}

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Resumes after the step of the states. Samples that wait to be packed are decoded again, all in parallel.

        Args:
            states: Results of `get_state` in all processes, of any number.

        Raises:
            ValueError: the states are of another number of rows.
        """
        merged = merge_states(states, self.num_rows)
        if merged.keys() != set(range(self.num_rows)):
            raise ValueError(f"it has the states of {len(merged)} rows, not of {self.num_rows}")
        for future in self._next:
            future.exception()  # waits until no thread packs
        self._next, self._states = [], [merged[row] for row in self.local_rows]
        for row, state in zip(self._rows, self._states, strict=True):
            row.set_state(state)

    def close(self) -> None:
        """Ends the threads, after the samples in progress."""
        self._decoders.shutdown(cancel_futures=True)
        self._packers.shutdown(cancel_futures=True)


class _RowPacker:
    """Packs samples into one row per step. A row takes the oldest samples of a small buffer that fit.

    Args:
        samples: A PackUnit or BadSample for every line.
        config: Parameters of packing.
        decoders: Threads that decode samples.
        num_ahead: Samples that are decoded before the buffer has room for them.
    """

    def __init__(self, samples: Any, config: PackingConfig, decoders: Executor, num_ahead: int):
        self._samples, self._config, self._decoders = samples, config, decoders
        self._limit = config.packing_buffer + num_ahead  # of decoded samples
        self.set_state({"num_drawn": 0, "num_bad": 0, "waiting": []})

    def get_state(self) -> dict[str, Any]:
        waiting = [number for number, _ in self._waiting]
        return {"num_drawn": self._num_drawn, "num_bad": self._num_bad, "waiting": waiting}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._num_drawn, self._num_bad = state["num_drawn"], state["num_bad"]
        self._waiting: list[tuple[int, PackUnit]] = []  # each with its number among the samples
        self._restored = [(number, self._decode(number)) for number in state["waiting"]]
        self._decoding: collections.deque[Future[PackUnit | BadSample]] = collections.deque()

    def pack(self) -> PackedRow:
        """Returns the next row."""
        self._wait_for_restored()
        config, bad, before = self._config, list[BadSample](), self._num_drawn
        row, units = Row(config.shape, config.processor.config), list[PackUnit]()
        while True:
            bad += self._fill()
            fits = next((i for i, (_, unit) in enumerate(self._waiting) if row.add(unit.unit)), None)
            if fits is None:
                break
            units.append(self._waiting.pop(fits)[1])
        extra = {name: _stack_extra(name, shape, units) for name, shape in config.extra.items()}
        batch = row.build(config.processor.pad_token_id, config.dtype)
        num_truncated = sum(any(example.num_truncated for example in unit.unit) for unit in units)
        keys = tuple(unit.key for unit in units)
        return PackedRow(batch, extra, self._num_drawn - before, num_truncated, tuple(bad), keys)

    def _fill(self) -> list[BadSample]:
        """Draws samples until the buffer is full; returns the bad ones among them."""
        bad = []
        while len(self._waiting) < self._config.packing_buffer:
            self._decode_ahead()
            if not self._decoding:
                break
            number, sample = self._num_drawn, self._decoding.popleft().result()
            self._num_drawn += 1
            if isinstance(sample, BadSample):
                bad.append(sample)
                self._num_bad += 1
                check_share(self._num_bad, self._num_drawn, self._config.max_bad_fraction, sample)
            else:
                self._waiting.append((number, sample))
        return bad

    def _decode_ahead(self) -> None:
        while len(self._waiting) + len(self._decoding) < self._limit:
            number = self._num_drawn + len(self._decoding)
            if number >= len(self._samples):
                break
            self._decoding.append(self._decode(number))

    def _decode(self, number: int) -> Future[PackUnit | BadSample]:
        return self._decoders.submit(self._samples.__getitem__, number)

    def _wait_for_restored(self) -> None:
        samples = [(number, future.result()) for number, future in self._restored]
        self._restored = []
        # A sample may be bad now: its video has disappeared.
        self._waiting += [(number, sample) for number, sample in samples if isinstance(sample, PackUnit)]


def _stack_extra(name: str, shape: tuple[int, ...], units: Sequence[PackUnit]) -> np.ndarray:
    out = np.zeros((1, *shape), np.float32)
    for i, unit in enumerate(units):
        out[0, i] = unit.extra[name]
    return out


def merge_states(states: Sequence[Mapping[str, Any]], num_rows: int) -> dict[int, dict[str, Any]]:
    """Returns row -> state from the states of all processes, of this version or of an earlier one."""
    merged: dict[int, dict[str, Any]] = {}
    for process, state in enumerate(states):
        if "iterators_in_use_states" in state:
            rows = _read_former_states(state)
            num_shares = num_rows // len(rows)
            share = process * num_shares // len(states)
            merged |= {share + num_shares * i: row for i, row in enumerate(rows)}
        else:
            merged |= {int(row): dict(value) for row, value in state.items()}
    return merged


def _read_former_states(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the states of a process's rows from those of grain's iterators.

    Share i of n had the rows i, i + n, ... of a step. In the first version each thread had several rows, in turn.
    """
    threads = state["iterators_in_use_states"]
    if any("streams" in thread for thread in threads):
        num_rows = sum(len(thread["streams"]) for thread in threads)
        threads = [threads[i % len(threads)]["streams"][i // len(threads)] for i in range(num_rows)]
    return [
        {
            "num_drawn": row["samples"]["next_index"],
            "num_bad": row["bad"],
            "waiting": [sample["next_index"] for sample in row["waiting"]],
        }
        for row in threads
    ]
