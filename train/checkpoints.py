"""Checkpoints of a run: asynchronous, whole or not there at all, a few kept, verified when they are read (Orbax)."""

import dataclasses
import itertools
import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tarsier_jax.errors import CheckpointError
from tarsier_jax.files import is_disk_full
from train.data.packing import row_states
from train.processes import on_any
from train.state import TrainState

# Parts of errors that do not come from the checkpoint's content.
_PASSING = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "out of memory")
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class _Damage(Exception):
    """The content of a checkpoint is not as it was saved."""


@dataclasses.dataclass(frozen=True)
class DataProgress:
    """What a run has counted so far, over all processes."""

    samples: int = 0
    tokens: int = 0
    cut: int = 0
    bad: int = 0
    seen: int = 0

    def __add__(self, other: "DataProgress") -> "DataProgress":
        return DataProgress(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


class Checkpoints:
    """The checkpoints in WORKDIR/checkpoints."""

    def __init__(self, workdir: Path, keep: int):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every phase of every save
        self.directory = (workdir / "checkpoints").resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        with _clear_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=("state", "data", "progress")
            )

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: grain.DatasetIterator, progress: DataProgress) -> None:
        """Copies the state to the host and writes it while the run goes on. Does nothing if the step is saved.

        Raises:
            CheckpointError: the disk has not the room, an earlier save failed, or the state is not finite.
        """
        if step == self.latest():
            return
        tree = _tree(state)
        needed = sum(x.nbytes for x in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise CheckpointError(
                f"A checkpoint needs {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free on the disk of "
                f"{self.directory}. Make room, then start again: the run goes on from its last checkpoint."
            )
        fingerprints, not_finite = _fingerprints(tree)
        if not_finite:
            raise CheckpointError(
                f"At step {step} the state has values that are not finite, in {not_finite[0]} among others. It is not "
                "saved. Lower optimizer.peak_lr and start again."
            )
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),
            data=grain.checkpoint.CheckpointSave(_SealedData(data)),
            progress=ocp.args.JsonSave(_seal({**dataclasses.asdict(progress), "state": fingerprints})),
        )
        with _clear_errors(self.directory):
            self._manager.save(step, args=items)

    def restore(self, shapes: TrainState, data: grain.DatasetIterator) -> tuple[TrainState, DataProgress]:
        """The newest undamaged checkpoint, laid out as `shapes` says; `data` continues where it was.

        Damaged checkpoints that are newer are renamed to STEP.damaged, so that no later start reads them again.

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
            return TrainState(**state), progress
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damage.items())
        raise CheckpointError(
            f"Every checkpoint in {self.directory} is damaged ({reasons}). Nothing was changed. Restore the files from "
            "a copy, or choose another --workdir to start from the beginning."
        )

    def _read(self, step: int, tree: dict[str, Any]) -> tuple[dict[str, Any], DataProgress, Any]:
        """State, progress and the state of the data. All processes agree on whether one of them is damaged.

        Raises:
            _Damage: the checkpoint is damaged.
            CheckpointError: it is of another model or optimizer, or cannot be read at the moment.
        """
        directory = epath.Path(self.directory / str(step))
        # The items are read by their handlers, not by the manager: it then waits for all processes, and would wait
        # for ever if one of them found damage.
        saved, state, rows, damage = {}, {}, _SealedData(), None
        try:
            saved = _unseal(ocp.JsonCheckpointHandler().restore(directory / "progress"))
            _check_layout(directory, tree, saved)
            grain.checkpoint.CheckpointHandler().restore(
                directory / "data", args=grain.checkpoint.CheckpointRestore(rows)
            )
            restore = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            state = ocp.PyTreeCheckpointHandler().restore(directory / "state", args=restore)
        except CheckpointError:
            raise
        except Exception as e:  # Orbax and grain raise what they like
            damage = _first_line(e)
            passing = isinstance(e, MemoryError) or (isinstance(e, OSError) and not isinstance(e, _MISSING))
            if passing or any(text in str(e) for text in _PASSING):
                raise CheckpointError(
                    f"{directory} cannot be read ({damage}). Mend the cause and start again."
                ) from None
            if saved and "state" not in saved:  # of an earlier version, which wrote nothing to compare with
                raise CheckpointError(
                    f"{directory} cannot be restored ({damage}). It was written with another model, optimizer or data "
                    "configuration, or it is damaged: remove it to go on from the one before, or choose another "
                    "--workdir."
                ) from None
        if on_any(damage is not None):
            raise _Damage(damage or "another process cannot read its part")
        fingerprints, not_finite = _fingerprints(state)
        before = saved.get("state", fingerprints)
        changed = [path for path, value in fingerprints.items() if value != before[path]]
        if changed or not_finite:
            raise _Damage(f"{(changed + not_finite)[0]} is not as it was saved")
        return state, DataProgress(**{f.name: saved[f.name] for f in dataclasses.fields(DataProgress)}), rows.state

    def _set_aside(self, damage: Mapping[int, str], step: int) -> None:
        """Renames damaged checkpoints, and prints what happened to them."""
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

    def _resume(self, data: grain.DatasetIterator, rows: Any, step: int) -> None:
        try:
            data.set_state(row_states(rows))
        except Exception as e:  # the state was verified, so the pipeline is another one
            raise CheckpointError(
                f"The data of {self.directory / str(step)} cannot continue ({_first_line(e)}). It was written with "
                "another data configuration. Give the same one as before, or choose another --workdir."
            ) from None
        data.start_prefetch()

    def reached_preemption(self, step: int) -> bool:
        """Whether some process of several was told to end; all of them give the same answer."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Until the last save is whole. Raises CheckpointError if it failed."""
        with _clear_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _tree(state: TrainState) -> dict[str, Any]:
    """What is saved: not the reference model, which is the one that the run started from."""
    return {"step": state.step, "params": state.params, "frozen": state.frozen, "opt_state": state.opt_state}


def _check_layout(directory: epath.Path, tree: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises CheckpointError if other arrays were saved than the run has; an earlier version did not record them."""
    if "state" not in saved:
        return
    ours, theirs = _layout(tree), {path: text.split()[0] for path, text in saved["state"].items()}
    unlike = next((path for path in {**theirs, **ours} if ours.get(path) != theirs.get(path)), None)
    if unlike is not None:
        raise CheckpointError(
            f"{directory} was written with another model, optimizer or dtype: {unlike} was "
            f"{theirs.get(unlike, 'absent')} and is now {ours.get(unlike, 'absent')}. Give the same configuration as "
            "before, or choose another --workdir."
        )


def _layout(tree: Any) -> dict[str, str]:
    """Path -> "float32[64,2]" of every array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype.name}[{','.join(map(str, x.shape))}]"
        for path, x in leaves
    }


def _fingerprints(tree: Any) -> tuple[dict[str, str], list[str]]:
    """Path -> "float32[64,2] 9f86d081" of every array, and the paths of arrays with values that are not finite.

    The hash is computed where the array is, and does not depend on how it is split over devices.
    """
    everywhere = jnp.asarray(tree["step"]).sharding
    hashes, finite = map(np.asarray, jax.jit(_hashes, out_shardings=everywhere)(jax.tree.leaves(tree)))
    layout = _layout(tree)
    fingerprints = {path: f"{text} {value:08x}" for (path, text), value in zip(layout.items(), hashes, strict=True)}
    return fingerprints, [path for path, value in zip(layout, finite, strict=True) if not value]


def _hashes(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """uint32 and bool, of every array."""
    finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.stack([_hash(x) for x in leaves]), jnp.stack(finite)


def _hash(x: jax.Array) -> jax.Array:
    """The sum of the mixed bits of every value and its position (the mixer is MurmurHash3's)."""
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    words += position * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        words = (words ^ (words >> shift)) * np.uint32(factor)
    return jnp.sum(words, dtype=jnp.uint32)


class _SealedData:
    """The state of the data with a checksum, in the form that grain's handler saves and restores."""

    def __init__(self, data: grain.DatasetIterator | None = None):
        self._data, self.state = data, None

    def get_state(self) -> bytes:
        assert self._data is not None
        return json.dumps(_seal({"rows": self._data.get_state()}), indent=1).encode()

    def set_state(self, state: bytes) -> None:
        content = _unseal(json.loads(state))
        self.state = content.get("rows", content)  # an earlier version saved the rows alone

    def start_prefetch(self) -> None:
        """Part of the interface; the data is started when the checkpoint is verified."""


def _seal(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "crc32": _checksum(content)}


def _unseal(content: Any) -> dict[str, Any]:
    """The content without its checksum, which an earlier version did not write. Raises _Damage."""
    if not isinstance(content, dict):
        raise _Damage("a JSON file of it holds no object")
    content = dict(content)
    checksum = content.pop("crc32", None)
    if checksum is not None and checksum != _checksum(content):
        raise _Damage("the checksum of a JSON file differs")
    return content


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or repr(error)


@contextmanager
def _clear_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if is_disk_full(e):
            message = f"The disk of {directory} is full. Make room, then start again: nothing saved before is lost."
            raise CheckpointError(message) from None
        if isinstance(e, OSError):
            raise CheckpointError(f"{directory} cannot be written ({e.strerror or e}). Choose another one.") from None
        raise
