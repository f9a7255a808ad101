"""DPO's reference log-probabilities on disk: computed once, read by the data pipeline."""

import dataclasses
import glob
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex, TextIO

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tarsier_jax.errors import InputError
from tarsier_jax.processing.archives import split_archive
from tarsier_jax.weights.digest import digest_weights
from train.config import TrainConfig
from train.data.annotations import AnnotationLine, mix_files, read_sample
from train.data.samples import prepare_pair
from train.losses import pair_log_probs
from train.mesh import global_batch
from train.metric_writer import duration
from train.optimizer import Params
from train.processes import from_first
from train.run import TrainRun
from train.state import StepBatch, build_model, load_reference


class ReferenceFile:
    """JSON lines {"key", "chosen", "rejected"}, one file per process: FILE.0, FILE.1, ...

    Args:
        name: The path FILE, or its URL in an object store.

    Attributes:
        name: The argument.
        path: The path on this machine, of the method `open`.

    A key is a hash of all inputs of a pair's log-probabilities: the pair, the sizes of its media files, and the run's
    `fingerprint`. Records of another model or of other frames therefore have other keys. The key does not change if a
    media file is replaced by another one of the same name and size.
    """

    def __init__(self, name: str):
        self.name, self.path = name, Path()
        self._fingerprint, self._n_frames = "", 0
        self._known: dict[str, tuple[float, float]] = {}

    def open(self, run: TrainRun, path: Path) -> None:
        """Reads the records and computes the fingerprint of the run. Must be called before every other method."""
        self.path = path
        self._fingerprint, self._n_frames = fingerprint(run), run.config.processor.n_frames
        self.read()

    def read(self) -> None:
        """Reads the records of all processes; skips lines that are incomplete, damaged or not finite."""
        self._known = {}
        for file in sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.*")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    values = float(record["chosen"]), float(record["rejected"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
                if np.isfinite(values).all():
                    self._known[record["key"]] = values

    def append(self, process: int) -> TextIO:
        """Opens a process's file to append records."""
        path = self.path.with_name(f"{self.path.name}.{process}")
        cut_short = path.exists() and not path.read_bytes().endswith(b"\n")
        file = path.open("a", encoding="utf-8")
        file.write("\n" if cut_short else "")
        return file

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def key(self, sample: Mapping[str, Any]) -> str:
        """Returns the key of a line's pair. Raises InputError for a line without one."""
        pair = prepare_pair(sample, np.random.default_rng(0), self._n_frames)
        facts = [self._fingerprint, pair, list(_media_sizes(pair[0]))]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

    def of(self, sample: Mapping[str, Any]) -> np.ndarray:
        """Returns the log-probabilities of the chosen and the rejected answer, float32 (2,).

        Raises:
            InputError: the file lacks the record of the pair.
        """
        values = self._known.get(self.key(sample))
        if values is None:
            raise InputError(
                f"{self.name} lacks the reference log-probabilities of the pair: its line or its media have "
                "changed since the start. Start the run again."
            )
        return np.array(values, np.float32)


def _media_sizes(chat: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the sizes in bytes of the media files of a chat.

    For directories these are names and sizes of their files, for media in archives the sizes of the archives.
    """
    items = [item for message in chat["messages"] for item in message["content"] if item["type"] != "text"]
    values = [value for item in items for value in item[item["type"]].values()]
    paths = [path for value in values for path in (value if isinstance(value, list) else [value])]
    for path in (Path(path) for path in paths if isinstance(path, str)):
        if path.is_dir():
            yield sorted((file.name, file.stat().st_size) for file in path.iterdir())
        elif path.is_file():
            yield path.stat().st_size
        elif (split := split_archive(path)) is not None:
            yield split[0].stat().st_size


def fingerprint(run: TrainRun) -> str:
    """Returns a hash of the model and of the processing of samples, on which all log-probabilities of a run depend.

    It covers the bytes of the weights, and the values of: sizes and dtype of the model, processor options, image
    options, tokenizer, chat template. Attention, recomputation, mesh and rows change the numbers by rounding only, and
    are not part of it.
    """
    model, processor = dataclasses.replace(run.spec.config, attention="", remat=""), run.processor
    tokenizer: Any = processor.tokenizer
    facts = {
        "version": 2,  # of the definition of the log-probabilities: see `train.dpo.mask_shared`
        "weights": from_first(lambda: digest_weights(run.model_directory)).hex(),
        "model": dataclasses.asdict(model),
        "options": dataclasses.asdict(processor.options),
        "image": dataclasses.asdict(processor.image),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "template": processor.chat_template,
        **({"int8": True} if run.spec.lora.int8 else {}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_reference(run: TrainRun, reference: ReferenceFile, pairs: int) -> None:
    """Computes the missing records of a run's reference file with the starting model.

    Every process appends the records of its rows to its own file. An interrupted pass resumes.

    Raises:
        TarsierError: the annotations or the checkpoint cannot be used.
    """
    mesh, config = run.spec.mesh, run.config
    missing = _Missing(config, reference)
    if not len(missing):
        return
    _report_unused(reference, missing)
    reference.path.parent.mkdir(parents=True, exist_ok=True)
    params = load_reference(run.spec, run.model_directory)
    loader = run.rows(grain.MapDataset.source(missing), config.data.global_batch_size)

    def compute(params: Params, step: StepBatch) -> tuple[jax.Array, jax.Array]:
        batch = jax.tree.map(lambda x: x[0], step.batch)
        model = build_model(run.spec.base_graph, params, run.spec.config.dtype)
        return pair_log_probs(model, batch, pairs), jnp.sum(jnp.max(batch.segment_ids, axis=1) // 2)

    compute = jax.jit(compute, out_shardings=NamedSharding(mesh, P()))
    start, done = time.perf_counter(), 0
    with reference.append(jax.process_index()) as file:
        for local in loader:
            log_probs, count = (np.asarray(x) for x in compute(params, global_batch(local, 1, mesh)))
            if not count:  # no lines remain; all processes see it in the same step
                break
            for row, values in zip(local, log_probs[loader.local_rows], strict=True):
                for key, (chosen, rejected) in zip(row.keys, values.tolist(), strict=False):
                    file.write(json.dumps({"key": key, "chosen": chosen, "rejected": rejected}) + "\n")
            file.flush()
            done += int(count)
            if jax.process_index() == 0:
                rate = done / (time.perf_counter() - start)
                remaining = duration((len(missing) - done) / rate)
                print(f"reference {done}/{len(missing)}  {rate:.2f} pairs/s  left {remaining}", flush=True)
    loader.close()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the reference is complete")
    reference.read()


def _report_unused(reference: ReferenceFile, missing: "_Missing") -> None:
    num_unused = len(reference) - missing.num_present
    if num_unused and jax.process_index() == 0:
        print(
            f"reference: {num_unused} of {len(reference)} records in {reference.name}.* are not used: they belong to "
            "other pairs, another model, other frames or another chat template",
            flush=True,
        )


class _Missing(grain.sources.RandomAccessDataSource):  # pyright: ignore[reportMissingTypeArgument]
    """The lines of training and held-out pairs without a record in the reference file, each pair once.

    Attributes:
        num_present: Number of pairs with a record.
    """

    def __init__(self, config: TrainConfig, reference: ReferenceFile):
        data = config.data
        files = [data.train, data.eval] if data.eval and config.eval_every else [data.train]
        parts = [mix_files(names, config.seed, repeat=False) for names in files]
        self._lines: Any = grain.MapDataset.concatenate(parts)
        first: dict[str, int] = {}
        for i in range(len(self._lines)):
            key = _key(self._lines[i], data.media_root, reference)
            if key is not None:
                first.setdefault(key, i)
        self._indices = [i for key, i in first.items() if key not in reference]
        self.num_present = len(first) - len(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> AnnotationLine:
        return self._lines[self._indices[int(index)]]


def _key(line: AnnotationLine, media_root: str, reference: ReferenceFile) -> str | None:
    try:
        return reference.key(read_sample(line.text, media_root))
    except Exception:  # training counts the line as a bad sample
        return None
