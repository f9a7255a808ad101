"""Checkpoints of a run (Orbax): asynchronous, atomic, verified when they are read; the newest ones are kept."""

import dataclasses
import itertools
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tarsier_jax.errors import CheckpointError
from tarsier_jax.files import is_disk_full, is_remote
from tarsier_jax.storage import store_errors
from train.best import BestCheckpoint, read_best, write_best
from train.checks import first_difference
from train.data.loading import RowLoader
from train.optimizer import Params
from train.processes import on_any
from train.state import TrainState
from train.workdir import checkpoint_directory

# Counts under their names in checkpoints of earlier versions.
_FORMER_COUNTS = {"num_truncated": "cut", "num_bad": "bad", "num_drawn": "seen"}
# Parts of errors that do not come from the checkpoint's content.
_PASSING = (
    *("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
    "out of memory",
)
# Packages whose errors are about the network or the credentials. A missing object is a FileNotFoundError.
_CLIENTS = ("gcsfs", "google", "aiohttp", "requests")
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class _Damage(Exception):
    """The content of a checkpoint differs from the saved one."""


@dataclasses.dataclass(frozen=True)
class DataProgress:
    """Counts of a run since its start, over all processes.

    Attributes:
        samples: Samples that were trained on.
        tokens: Tokens that were trained on.
        num_truncated: Samples among them whose text was truncated.
        num_bad: Samples that could not be used.
        num_drawn: Samples drawn from the mixture, bad ones included.
    """

    samples: int = 0
    tokens: int = 0
    num_truncated: int = 0
    num_bad: int = 0
    num_drawn: int = 0

    def __add__(self, other: "DataProgress") -> "DataProgress":
        return DataProgress(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


@dataclasses.dataclass
class _NewestAndBest:
    """The policy by which Orbax preserves checkpoints.

    Attributes:
        keep: Number of newest checkpoints that stay.
        best: Step of another one that stays; None for none.
    """

    keep: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns a value per checkpoint; they are in the order of their steps."""
        newest = {checkpoint.step for checkpoint in checkpoints[-self.keep :]}
        return [checkpoint.step in newest or checkpoint.step == self.best for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints in WORKDIR/checkpoints, of which the newest `keep` and the best one stay.

    Args:
        root: A local or gs:// workdir.
        keep: Number of newest checkpoints that stay.
    """

    def __init__(self, root: str | os.PathLike[str], keep: int):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every phase of every save
        self.directory = checkpoint_directory(root)
        self._best = read_best(root)
        self._policy = _NewestAndBest(keep, self._best.step if self._best else None)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._policy, cleanup_tmp_directories=True)
        with _clear_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=("state", "data", "progress")
            )

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> BestCheckpoint | None:
        """The best checkpoint, unless it was removed or set aside."""
        return self._best if self._best and self._best.step in self._manager.all_steps() else None

    def keep_best(self, best: BestCheckpoint) -> None:
        """Records a saved checkpoint as the best one. Later saves remove the former one."""
        self.wait()  # a crash must leave a record of a complete checkpoint
        if jax.process_index() == 0:
            write_best(self.directory.parent, best)
        self._best, self._policy.best = best, best.step

    def save(self, step: int, state: TrainState, data: RowLoader, progress: DataProgress) -> None:
        """Copies the state to the host and writes it in the background, unless the step is saved already.

        Raises:
            CheckpointError: the disk has too little space, an earlier save failed, or the state is not finite.
        """
        if step == self.latest():
            return
        tree = _tree(state)
        nbytes = sum(x.nbytes for x in jax.tree.leaves(tree))
        free = math.inf if is_remote(self.directory) else shutil.disk_usage(self.directory).free
        if free < nbytes:
            raise CheckpointError(
                f"A checkpoint needs {nbytes / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free on the disk of "
                f"{self.directory}. Make room, then start again: the run resumes from its last checkpoint."
            )
        fingerprints, not_finite = _fingerprints(tree)
        if not_finite:
            raise CheckpointError(
                f"At step {step} the state has values that are not finite, in {not_finite[0]} among others. It is not "
                "saved. Lower optimizer.peak_lr and start again."
            )
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),
            data=grain.checkpoint.CheckpointSave(_SealedRows(data)),
            progress=ocp.args.JsonSave(_seal({**dataclasses.asdict(progress), "state": fingerprints})),
        )
        with _clear_errors(self.directory):
            self._manager.save(step, args=items)

    def restore(self, shapes: TrainState, data: RowLoader) -> tuple[TrainState, DataProgress]:
        """Returns the newest undamaged checkpoint with the shardings of `shapes`, and restores the state of `data`.

        The number of processes and the mesh may differ from those of the save. Newer checkpoints are damaged. They are
        renamed to STEP.damaged, and later starts ignore them.

        Raises:
            CheckpointError: all checkpoints are damaged, or one is of another model, optimizer or data pipeline.
        """
        tree, damage = _tree(shapes), dict[int, str]()
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, progress, rows = self._read(step, tree)
            except _Damage as e:
                damage[step] = str(e)
                continue
            self._set_aside(damage, step)
            self._resume(data, rows, step)
            return TrainState(**{"frozen": {}, **state}), progress
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damage.items())
        raise CheckpointError(
            f"Every checkpoint in {self.directory} is damaged ({reasons}). Nothing was changed. Restore the files from "
            "a copy, or choose another --workdir to start from the beginning."
        )

    def _read(self, step: int, tree: dict[str, Any]) -> tuple[dict[str, Any], DataProgress, list[dict[str, Any]]]:
        """Returns state, progress and the states of the rows, one object per process of the save.

        All processes agree on whether any part is damaged.

        Raises:
            _Damage: the checkpoint is damaged.
            CheckpointError: it is of another model or optimizer, or cannot be read at the moment.
        """
        directory = self.directory / str(step)
        # The items are read by their handlers, not by the manager, which waits for all processes after each item: it
        # would never return if one of them found damage.
        record, state, rows, damage = {}, {}, [], None
        try:
            record = _unseal(ocp.JsonCheckpointHandler().restore(directory / "progress"))
            _check_layout(directory, tree, record)
            rows = _read_rows(directory / "data")
            restore = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            state = ocp.PyTreeCheckpointHandler().restore(directory / "state", args=restore)
        except CheckpointError:
            raise
        except Exception as e:  # Orbax and grain raise any type
            damage = _first_line(e)
            if _is_passing(e):
                raise CheckpointError(
                    f"{directory} cannot be read ({damage}). Remove the cause and start again."
                ) from None
            if record and "state" not in record:  # an earlier version stored no fingerprints
                raise CheckpointError(
                    f"{directory} cannot be restored ({damage}). It was written with another model, optimizer or data "
                    "configuration, or it is damaged: remove it to resume from the one before, or choose another "
                    "--workdir."
                ) from None
        if on_any(damage is not None):
            raise _Damage(damage or "another process cannot read its part")
        _verify(state, record.get("state"))
        return state, _read_counts(record), rows

    def _set_aside(self, damage: Mapping[int, str], step: int) -> None:
        """Renames damaged checkpoints, and prints their new names."""
        if not damage:
            return
        if jax.process_index() == 0:
            for damaged, reason in damage.items():
                path = self.directory / str(damaged)
                names = (path.with_name(f"{damaged}.damaged{f'.{i}' if i else ''}") for i in itertools.count())
                aside = next(name for name in names if not name.exists())
                path.rename(aside)
                print(
                    f"{path} is damaged ({reason}). It is now {aside}; the run continues from step {step}.", flush=True
                )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are renamed")
        self._manager.reload()

    def _resume(self, data: RowLoader, rows: list[dict[str, Any]], step: int) -> None:
        try:
            data.set_state(rows)
        except Exception as e:  # the states were verified, so the configuration differs
            raise CheckpointError(
                f"The data of {self.directory / str(step)} cannot continue ({_first_line(e)}). It was written with "
                "another data configuration. Use the same one as before, or choose another --workdir."
            ) from None

    def reached_preemption(self, step: int) -> bool:
        """Returns whether any of several processes received SIGTERM; all of them return the same."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Waits until the last save is complete. Raises CheckpointError if it failed."""
        with _clear_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def load_parameters(root: str | os.PathLike[str], step: int, dtype: str) -> Params:
    """Returns the parameters of a checkpoint, trained and frozen, on one device.

    Each one is read, verified and cast alone. Memory needs the model in `dtype`, and one parameter as it was saved.

    Raises:
        CheckpointError: the checkpoint is damaged, or was written by a version that did not record its arrays.
    """
    directory = checkpoint_directory(root) / str(step)
    try:
        arrays = _unseal(ocp.JsonCheckpointHandler().restore(directory / "progress")).get("state")
        if arrays is None:
            raise CheckpointError(
                f"{directory} was written by an earlier version, which did not record its arrays. Resume the run, and "
                "export a checkpoint that it writes."
            )
        paths = [path for path in arrays if path.startswith(("params/", "frozen/"))]
        return {path.partition("/")[2]: _read_parameter(directory, arrays, path).astype(dtype) for path in paths}
    except CheckpointError:
        raise
    except Exception as e:  # Orbax raises any type
        if _is_passing(e):
            raise CheckpointError(f"{directory} cannot be read ({_first_line(e)}). Remove the cause.") from None
        raise CheckpointError(f"{directory} is damaged ({_first_line(e)}). Choose another step.") from None


def _read_parameter(directory: epath.Path, arrays: Mapping[str, str], path: str) -> jax.Array:
    """Reads one of the arrays, of which `arrays` has the fingerprints. Raises _Damage."""
    part, _, name = path.partition("/")
    item = {"step": _shape_of(arrays["step"]), part: {name: _shape_of(arrays[path])}}
    arguments = ocp.checkpoint_utils.construct_restore_args(item)
    restore = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
    tree = ocp.PyTreeCheckpointHandler().restore(directory / "state", args=restore)
    _verify(tree, arrays)
    return tree[part][name]


def _shape_of(fingerprint: str) -> jax.ShapeDtypeStruct:
    """ "float32[64,2] 9f86d081" -> the shape and dtype, on the first device."""
    dtype, _, sizes = fingerprint.split()[0].rstrip("]").partition("[")
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, sizes.split(",")))), jnp.dtype(dtype), sharding=sharding)


def _verify(tree: Any, arrays: Mapping[str, str] | None) -> None:
    """Raises _Damage if an array is not finite, or differs from its fingerprint. An earlier version stored none."""
    fingerprints, not_finite = _fingerprints(tree)
    changed = [path for path, value in fingerprints.items() if arrays is not None and value != arrays[path]]
    if changed or not_finite:
        raise _Damage(f"{(changed + not_finite)[0]} differs from the saved one")


def _read_counts(record: Mapping[str, Any]) -> DataProgress:
    names = {f.name: f.name if f.name in record else _FORMER_COUNTS[f.name] for f in dataclasses.fields(DataProgress)}
    return DataProgress(**{name: record[key] for name, key in names.items()})


def _tree(state: TrainState) -> dict[str, Any]:
    """Returns the saved part of the state: all but the parameters of the starting model.

    These are the reference model, and the frozen parameters of LoRA.
    """
    saved = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return saved if any("/lora/" in path for path in state.params) else {**saved, "frozen": state.frozen}


def _check_layout(directory: epath.Path, tree: dict[str, Any], record: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the saved arrays differ from the run's. An earlier version did not record them."""
    if "state" not in record:
        return
    ours, theirs = _layout(tree), {path: text.split()[0] for path, text in record["state"].items()}
    unlike = first_difference(theirs, ours)
    if unlike is not None:
        raise CheckpointError(
            f"{directory} was written with another model, optimizer or dtype: {unlike} was "
            f"{theirs.get(unlike, 'absent')} and is now {ours.get(unlike, 'absent')}. Use the same configuration as "
            "before, or choose another --workdir."
        )


def _layout(tree: Any) -> dict[str, str]:
    """Returns path -> "float32[64,2]" for every array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype.name}[{','.join(map(str, x.shape))}]"
        for path, x in leaves
    }


def _fingerprints(tree: Any) -> tuple[dict[str, str], list[str]]:
    """Returns path -> "float32[64,2] 9f86d081" for every array, and the paths of arrays that are not finite.

    The hash is computed on the devices, and does not depend on the sharding.
    """
    everywhere = jnp.asarray(tree["step"]).sharding
    hashes, finite = map(np.asarray, jax.jit(_hashes, out_shardings=everywhere)(jax.tree.leaves(tree)))
    layout = _layout(tree)
    fingerprints = {path: f"{text} {value:08x}" for (path, text), value in zip(layout.items(), hashes, strict=True)}
    return fingerprints, [path for path, value in zip(layout, finite, strict=True) if not value]


def _hashes(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns hashes (uint32) and finiteness (bool) of the arrays."""
    finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.stack([_hash(x) for x in leaves]), jnp.stack(finite)


def _hash(x: jax.Array) -> jax.Array:
    """Returns the sum of the mixed bits of every value and its position (mixer of MurmurHash3)."""
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    words += position * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        words = (words ^ (words >> shift)) * np.uint32(factor)
    return jnp.sum(words, dtype=jnp.uint32)


class _SealedRows:
    """The states of a process's rows with a checksum, in the form that grain's handler saves."""

    def __init__(self, data: RowLoader):
        self._data = data

    def get_state(self) -> bytes:
        return json.dumps(_seal({"rows": self._data.get_state()}), indent=1).encode()


def _read_rows(directory: epath.Path) -> list[dict[str, Any]]:
    """Returns the states of the rows, one per process of the save. Raises _Damage."""
    matches = [re.fullmatch(r"process_\d+-of-(\d+)\.json", file.name) for file in directory.iterdir()]
    count = max((int(match[1]) for match in matches if match), default=1)
    files = [directory / f"process_{i}-of-{count}.json" for i in range(count)]  # a missing one is an error
    contents = [_unseal(json.loads(file.read_text())) for file in files]
    return [content.get("rows", content) for content in contents]  # an earlier version saved the rows alone


def _seal(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "crc32": _checksum(content)}


def _unseal(content: Any) -> dict[str, Any]:
    """Returns the content without its checksum, which an earlier version did not write. Raises _Damage."""
    if not isinstance(content, dict):
        raise _Damage("a JSON file of it is not an object")
    content = dict(content)
    checksum = content.pop("crc32", None)
    if checksum is not None and checksum != _checksum(content):
        raise _Damage("the checksum of a JSON file differs")
    return content


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _is_passing(error: Exception) -> bool:
    """Returns whether the cause of an error is not the content of the checkpoint."""
    if isinstance(error, OSError) and not isinstance(error, _MISSING):
        return True
    is_client = type(error).__module__.partition(".")[0] in _CLIENTS
    return is_client or isinstance(error, MemoryError) or any(text in str(error) for text in _PASSING)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or repr(error)


@contextmanager
def _clear_errors(directory: epath.Path) -> Iterator[None]:
    if is_remote(directory):
        with store_errors(str(directory), "written"):
            yield
        return
    try:
        yield
    except Exception as e:
        if is_disk_full(e):
            message = f"The disk of {directory} is full. Make room, then start again: earlier checkpoints are intact."
            raise CheckpointError(message) from None
        if isinstance(e, OSError):
            raise CheckpointError(f"{directory} cannot be written ({e.strerror or e}). Choose another one.") from None
        raise
