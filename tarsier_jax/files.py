"""Paths on the command line, locks of outputs, atomic writes of files and directories, caches, and warnings."""

import argparse
import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from tarsier_jax.errors import CheckpointError, InputError

_SCHEME = re.compile(r"\s*(\w[\w+.-]+):/", re.IGNORECASE)  # also with one slash, since `Path` reduces two to one
_STORES = re.compile(r"(gs|s3|hf|memory)://")  # memory:// is for tests
_MAX_URL = 200  # characters of a URL in an error
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}  # from some network file systems


def is_url(text: str) -> bool:
    """Returns whether `text` is a URL instead of a local path."""
    return text.startswith("data:") or _SCHEME.match(text) is not None


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a URL of an object store, which `tarsier_jax.storage` reads."""
    return _STORES.match(str(path)) is not None


def check_source(name: str, text: str) -> str:
    """Returns a URL of an object store as it is, and another path as `check_local` does. Raises InputError."""
    return text if is_remote(text) else check_local(name, text)


def check_local(name: str, text: str) -> str:
    """Returns the path `text`, with a leading ~ expanded.

    Args:
        name: Name of the flag or key in errors.
        text: A path.

    Raises:
        InputError: `text` is empty or a URL. Object stores are not supported, and `Path` would convert gs://bucket/a
            to a local directory `gs:`.
    """
    if not text.strip():
        raise InputError(f"{name} is empty. Pass a path.")
    if text.startswith("data:"):
        raise InputError(f"{name} is a data URL, which is not read. Write its content to a file, and pass the path.")
    if scheme := _SCHEME.match(text):
        raise InputError(
            f"{name} {text[:_MAX_URL]} is a URL; only local paths are supported. {_remedy(scheme[1].lower())}"
        )
    return os.path.expanduser(text)


def _remedy(scheme: str) -> str:
    if scheme == "file":
        return "Pass the path without file://."
    if scheme in ("hf", "http", "https"):
        return "Download it and pass the local path. For a checkpoint on the Hugging Face hub, pass org/name."
    return (
        f"Copy it to or from a local disk with the tool of {scheme}://, or mount the store and pass the mounted path."
    )


def path_text(text: str, check: Callable[[str, str], str] = check_local) -> str:
    """Applies `check_local` as the `type` of a command-line flag. argparse adds the flag's name to the error."""
    try:
        return check("the path", text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def source_text(text: str) -> str:
    """Applies `check_source` as the `type` of a command-line flag."""
    return path_text(text, check_source)


def local_path(text: str) -> Path:
    """Applies `path_text` and returns a `Path`."""
    return Path(path_text(text))


@functools.cache
def warn(message: str) -> None:
    """Issues a warning, once per process. `tarsier_jax.programs.run` prints warnings as one line each."""
    warnings.warn(message, stacklevel=2)


def hidden(path: Path, ending: str) -> Path:
    """Returns the hidden path `.NAME.ending` beside the file that `path` is, or links to."""
    try:
        path = path.resolve()
        return path.with_name(f".{path.name}.{ending}")
    except (ValueError, RuntimeError):  # the root directory, or a loop of links
        raise InputError(f"{path} cannot be written. Choose another path.") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a hidden path beside `path` to write a file to, and renames that file to `path` at the end of the block.

    If the block raises, the partial file is removed and `path` stays as it is. A link is followed, not replaced.

    Raises:
        InputError: `path` is not a valid name of a file.
        OSError: `path` cannot be written; a full disk is reported with the name of the file.
    """
    partial = hidden(path, "partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path.resolve())
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


@contextlib.contextmanager
def new_directory(out: Path, nbytes: int) -> Iterator[Path]:
    """Yields an empty directory beside `out`, and renames it to `out` at the end of the block.

    If the block raises, the directory is removed.

    Args:
        out: The directory to create.
        nbytes: Size of the content in bytes, which is the necessary free space.

    Raises:
        CheckpointError: `out` exists, or the disk has too little space, before or while writing.
        InputError: another run is writing `out`.
    """
    out = out.resolve()
    with locked(out):
        partial = _make_partial(out, nbytes)
        try:
            yield partial
            os.sync()  # the content must be on the disk before the name
            if out.exists():
                out.rmdir()  # empty
            partial.rename(out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if is_disk_full(error):
                message = f"The disk filled up while {out} was written. Make room, then run again."
                raise CheckpointError(message) from None
            raise


def _make_partial(out: Path, nbytes: int) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already. Remove it, or choose another name.")
    partial = hidden(out, "partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    free = shutil.disk_usage(out.parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{out} needs {nbytes / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free. Make room, or choose "
            "another disk."
        )
    partial.mkdir()
    return partial


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error reports a full disk. The errors of TensorStore and Orbax lack an errno."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "ENOSPC" in str(error)


def is_special(path: Path) -> bool:
    """Returns whether `path` is a device or a pipe, such as /dev/null."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def locked(path: Path, inside: bool = False) -> Iterator[None]:
    """Locks `path`, a file or a directory, against a second run until the block ends.

    The operating system releases the lock when the process ends in any way. The lock is on a hidden file beside `path`,
    which is removed at the end. A file system without locks causes a warning.

    Args:
        path: The output.
        inside: Whether the hidden file is in the directory `path`, which is created if necessary.

    Raises:
        InputError: another run writes `path`.
        OSError: `path` cannot be written.
    """
    if is_special(path):
        yield
        return
    file = path / ".lock" if inside else hidden(path, "lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(file, path)
    try:
        yield
    finally:
        if descriptor is not None:
            if _is_at(descriptor, file):
                file.unlink()
            os.close(descriptor)


def _lock(file: Path, path: Path) -> int | None:
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if not path.exists():
                raise OSError(error.errno, error.strerror, str(path)) from None
            warn(f"{path} cannot be locked ({error.strerror}). Start no second run that writes it.")
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"Another run is writing {path}. Wait until it ends, or choose another path for this one."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            warn(f"{path} cannot be locked ({error.strerror}). Start no second run that writes it.")
        if _is_at(descriptor, file):
            return descriptor
        os.close(descriptor)  # a run that ended removed the file between the two calls


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def cache_directory(name: str) -> Path | None:
    """Returns a directory for a cache, in $XDG_CACHE_HOME or ~/.cache, or None with a warning if it is not writable."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        root = os.path.expanduser("~/.cache")
    directory = Path(root, "tarsier_jax", name)
    try:
        if not directory.is_absolute():
            raise FileNotFoundError(errno.ENOENT, "the user lacks a home directory")
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{directory} is not writable")
        return directory
    except OSError as error:
        warn(f"the cache of {name} files is not used ({error.strerror}). Set XDG_CACHE_HOME to a writable directory.")
        return None
