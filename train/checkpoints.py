"""Checkpoints of a run: asynchronous, whole or not there at all, a few kept (Orbax)."""

import dataclasses
import errno
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from tarsier_jax.errors import CheckpointError, InputError
from train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run has counted so far, over all processes."""

    samples: int = 0
    tokens: int = 0
    cut: int = 0
    bad: int = 0
    seen: int = 0

    def __add__(self, other: "Progress") -> "Progress":
        return Progress(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


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

    def save(self, step: int, state: TrainState, data: grain.DatasetIterator, progress: Progress) -> None:
        """Copies the state to the host and writes it while the run goes on. Does nothing if the step is saved.

        Raises:
            CheckpointError: the disk has not the room, or an earlier save failed.
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
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),
            data=grain.checkpoint.CheckpointSave(data),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        )
        with _clear_errors(self.directory):
            self._manager.save(step, args=items)

    def restore(self, shapes: TrainState, data: grain.DatasetIterator) -> tuple[TrainState, Progress]:
        """The newest checkpoint, laid out as `shapes` says; `data` goes on where it was.

        Raises:
            CheckpointError: the checkpoint is of another model, optimizer or data pipeline, or damaged.
        """
        step = self._manager.latest_step()
        tree = _tree(shapes)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)),
            data=grain.checkpoint.CheckpointRestore(data),
            progress=ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as e:  # Orbax and grain raise what they like
            reason = str(e).strip().split("\n")[0]
            raise CheckpointError(
                f"{self.directory / str(step)} cannot be restored ({reason}). It was written with another model, "
                "optimizer or data configuration, or it is damaged: remove it to go on from the one before, or choose "
                "another --workdir."
            ) from None
        return TrainState(**restored["state"]), Progress(**restored["progress"])

    def reached_preemption(self, step: int) -> bool:
        """Whether some process of several was told to end; all of them give the same answer."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Until the last save is whole. Raises CheckpointError if it failed."""
        with _clear_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def claim(workdir: Path, facts: dict[str, Any]) -> None:
    """Writes down what a workdir is for, or compares.

    Raises:
        InputError: the workdir belongs to a run of another model or kind.
    """
    file = workdir / "run.json"
    facts = json.loads(json.dumps(facts))
    if file.exists():
        try:
            known = json.loads(file.read_text())
        except ValueError:
            raise InputError(f"{file} is no JSON. Choose another --workdir, or restore the file.") from None
        for key, value in facts.items():
            if known.get(key) != value:
                raise InputError(
                    f"{workdir} belongs to another run: {key} was {known.get(key)!r} and is now {value!r}. Choose "
                    "another --workdir, or give the same configuration as before."
                )
    elif jax.process_index() == 0:
        with _clear_errors(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(facts, indent=2))
            partial.rename(file)


def _tree(state: TrainState) -> dict[str, Any]:
    """What is saved: not the reference model, which is the one that the run started from."""
    return {"step": state.step, "params": state.params, "frozen": state.frozen, "opt_state": state.opt_state}


@contextmanager
def _clear_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e) or "ENOSPC" in str(e):
            message = f"The disk of {directory} is full. Make room, then start again: nothing saved before is lost."
            raise CheckpointError(message) from None
        if isinstance(e, OSError):
            raise CheckpointError(f"{directory} cannot be written ({e.strerror or e}). Choose another one.") from None
        raise
