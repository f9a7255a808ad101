"""The workdir of a run: local, mirrored to an object store, or in Google Cloud Storage.

TensorStore writes gs:// itself, so all processes of a run write checkpoints and the trained model to a gs:// workdir
directly, and `best.json` with them. All other files are in a mirror: that of process 0 is the workdir, and every other
process has one of WORKDIR/process_N.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from fsspec.config import conf

from tarsier_jax.errors import InputError
from tarsier_jax.files import check_local, is_remote, locked
from tarsier_jax.mirror import open_mirror, output_directory
from train.processes import shared_failure

_GCS = "gs://"
_CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class RunStore:
    """A gs:// workdir, of which this process has a mirror.

    Attributes:
        url: The workdir.
        upload: Uploads the changes in the mirror of this process. A failure causes a warning, except that another run
            has written the workdir, which is an InputError.
    """

    url: str
    upload: Callable[[], None]


def is_direct(path: str | os.PathLike[str]) -> bool:
    """Returns whether Orbax writes a path without a mirror although it is in an object store."""
    return os.fspath(path).startswith(_GCS)


def check_workdir(name: str, text: str) -> str:
    """Returns a gs:// URL as it is, and another path as `check_local` does. Raises InputError."""
    return text if is_direct(text) else check_local(name, text)


@contextlib.contextmanager
def open_workdir(workdir: str) -> Iterator[tuple[Path, RunStore | None]]:
    """Yields the local directory of the run, and for gs:// its store.

    Refuses a second run in the workdir, and ends all processes when any fails.

    Raises:
        InputError: another run writes the workdir, or it is in an object store that cannot be used.
    """
    with shared_failure():
        if is_direct(workdir):
            with _open_store(workdir.rstrip("/")) as (directory, store):
                yield directory, store
            return
        with output_directory(workdir) as directory:
            directory = directory.resolve()
            # Process 0 has the lock for all, since all processes of a run write the workdir.
            with locked(directory, inside=True) if jax.process_index() == 0 else contextlib.nullcontext():
                yield directory, None


@contextlib.contextmanager
def _open_store(url: str) -> Iterator[tuple[Path, RunStore]]:
    process = jax.process_index()
    with open_mirror(f"{url}/process_{process}" if process else url) as mirror:
        directory = mirror.directory.resolve()
        if (directory / _CHECKPOINTS).exists():
            raise InputError(
                f"{url} was written by an earlier version, whose checkpoints this one does not read there. All its "
                f"files are in {directory}: copy them to another directory, and pass that one as --workdir."
            )
        yield directory, RunStore(url, mirror.try_upload)


def checkpoint_directory(root: str | os.PathLike[str]) -> epath.Path:
    """Returns the directory of the checkpoints in a local or gs:// workdir."""
    directory = epath.Path(root) / _CHECKPOINTS
    if not is_remote(directory):
        return directory.resolve()
    # The cache of listings of gcsfs lacks the changes of other processes and of TensorStore.
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return directory


def saved_steps(root: str | os.PathLike[str]) -> list[int]:
    """Returns the steps of the complete checkpoints in order. Reads only, so a run may be writing others.

    Args:
        root: A local or gs:// workdir.
    """
    paths = [path for path in checkpoint_directory(root).glob("*") if path.name.isdigit()]
    return sorted(int(path.name) for path in paths if ocp.utils.is_checkpoint_finalized(path))
