"""DPO's reference log-probabilities on disk: computed once, read by the data pipeline."""

import hashlib
import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tarsier_jax.errors import InputError
from train.data import Line, lines_of, read_sample
from train.log import duration
from train.losses import pair_log_probs
from train.optimizer import Params
from train.setup import Run, global_batch
from train.state import StepBatch, build_model, load_reference


def sample_key(sample: Mapping[str, Any]) -> str:
    """What a sample is found by: a hash of what it says."""
    return hashlib.sha256(json.dumps(sample, sort_keys=True).encode()).hexdigest()[:24]


class ReferenceFile:
    """JSON lines {"key", "chosen", "rejected"}, one file a process: FILE.0, FILE.1, ..."""

    def __init__(self, path: str):
        self.path = Path(path)
        self._known: dict[str, tuple[float, float]] | None = None

    def known(self) -> dict[str, tuple[float, float]]:
        """Log-probabilities of the chosen and the rejected answer, by key; a line cut short is left out."""
        found = {}
        for file in sorted(self.path.parent.glob(f"{self.path.name}.*")):
            for line in file.read_text().splitlines():
                try:
                    record = json.loads(line)
                    found[record["key"]] = (record["chosen"], record["rejected"])
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def of(self, sample: Mapping[str, Any]) -> np.ndarray:
        """float32 (2,). Raises InputError for a sample that the file does not hold."""
        if self._known is None:
            self._known = self.known()
        values = self._known.get(sample_key(sample))
        if values is None:
            raise InputError(f"{self.path} holds no reference log-probabilities of the sample. Compute them again.")
        return np.array(values, np.float32)


def write_reference(run: Run, pairs: int) -> None:
    """Computes what the run's reference file lacks, with the model that the run starts from.

    Every process adds its rows' lines to a file of its own as they come; a run cut short goes on where it was.

    Raises:
        TarsierError: the annotations or the checkpoint cannot be used.
    """
    path, mesh, config = Path(run.config.dpo.reference), run.plan.mesh, run.config
    missing = _Missing(run, ReferenceFile(str(path)).known())
    if not len(missing):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    params = load_reference(run.plan, run.model_directory)
    rows = iter(run.rows(grain.MapDataset.source(missing), config.data.rows, config.data.workers))

    def compute(params: Params, step: StepBatch) -> tuple[jax.Array, jax.Array]:
        batch = jax.tree.map(lambda x: x[0], step.batch)
        model = build_model(run.plan.graph, params, run.plan.config.dtype)
        return pair_log_probs(model, batch, pairs), jnp.sum(jnp.max(batch.segment_ids, axis=1) // 2)

    compute = jax.jit(compute, out_shardings=NamedSharding(mesh, P()))
    start, done = time.perf_counter(), 0
    with path.with_name(f"{path.name}.{jax.process_index()}").open("a") as file:
        while True:
            local = [next(rows) for _ in range(config.data.rows // run.row_groups)]
            log_probs, count = (np.asarray(x) for x in compute(params, global_batch(local, 1, mesh)))
            if not count:  # the lines have run out; all processes see it at once
                break
            for row, values in zip(local, log_probs[run.row_group * len(local) :], strict=False):
                for key, (chosen, rejected) in zip(row.keys, values.tolist(), strict=False):
                    file.write(json.dumps({"key": key, "chosen": chosen, "rejected": rejected}) + "\n")
            file.flush()
            done += int(count)
            if jax.process_index() == 0:
                rate = done / (time.perf_counter() - start)
                left = duration((len(missing) - done) / rate)
                print(f"reference {done}/{len(missing)}  {rate:.2f} pairs/s  left {left}", flush=True)
    rows.close()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the reference is whole")


class _Missing(grain.sources.RandomAccessDataSource):  # pyright: ignore[reportMissingTypeArgument]
    """The lines of config.data.train that are not among the known keys."""

    def __init__(self, run: Run, known: Collection[str]):
        self._lines: Any = lines_of(run.config.data.train, run.config.seed, repeat=False)
        self._indices = [i for i in range(len(self._lines)) if _key(self._lines[i], run) not in known]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> Line:
        return self._lines[self._indices[int(index)]]


def _key(line: Line, run: Run) -> str | None:
    try:
        return sample_key(read_sample(line.text, run.config.data.media_root))
    except InputError:
        return None  # it counts as a bad sample when it is loaded
