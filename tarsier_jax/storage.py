"""Files and directories in object stores: gs://, s3:// and hf:// URLs, through fsspec.

Content is copied to a cache on this machine before it is read. The name of a copy contains the version of the content
(ETag, generation or time of the last change), so an object that changes is copied again. Copies are complete: they get
their names at the end.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tarsier_jax.errors import InputError
from tarsier_jax.files import cache_directory, is_remote

_EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme -> extra of setup.py with its package
_SIGNIFICANT = ("size", "ETag", "etag", "generation", "md5Hash", "blob_id", "mtime", "LastModified", "created")


def open_store(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it.

    Raises:
        InputError: the package of the store is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition(":")[0], "")
        raise InputError(
            f"{url} needs a package that is not installed ({error}). In a clone: pip install -e '.[{extra}]'."
        ) from None


@contextlib.contextmanager
def store_errors(url: str, action: str = "read") -> Iterator[None]:
    """Converts the errors of a store, which have any type, to InputError with the URL. Errors of this disk pass."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and os.path.isabs(error.filename or ""):
            raise
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{url} does not exist. Check the URL.") from None
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"{url} cannot be {action} ({reason}). Check the URL, the network and the credentials of this machine."
        ) from None


def local_copy(url: str) -> Path:
    """Returns a copy of a file or a directory in the cache of this machine. Prints the progress of a long download.

    Raises:
        InputError: the content does not exist or cannot be read, its package is not installed, or there is no cache.
        OSError: the disk of the cache is full.
    """
    cache = cache_directory("objects")
    if cache is None:
        raise InputError(f"{url} needs a directory for its copy. Set XDG_CACHE_HOME to a writable directory.")
    fs, path = open_store(url)
    with store_errors(url):
        is_file = fs.isfile(path)
        infos = {path: fs.info(path)} if is_file else fs.find(path, detail=True)
    if not infos:
        raise InputError(f"{url} does not exist. Check the URL.")
    copy = cache / _digest(url, infos) / os.path.basename(path.rstrip("/"))
    if not copy.exists():
        root = os.path.dirname(path) if is_file else path
        names = {name: os.path.relpath(name, root) for name in infos}
        with _new_copy(copy.parent) as partial:
            target = partial if is_file else partial / copy.name
            _download(url, fs, {name: target / relative for name, relative in names.items()})
    return copy


def local_source(path: str) -> str:
    """Returns a path as it is, and the path of the `local_copy` of a URL. Raises InputError."""
    return str(local_copy(path)) if is_remote(path) else path


@dataclasses.dataclass(frozen=True)
class FetchedFile:
    """The content of a URL in a temporary file, which is removed with the last reference to it.

    Attributes:
        file: The file, which has no name.
        size: Number of bytes.
    """

    file: BinaryIO
    size: int

    def open(self) -> BinaryIO:
        """Opens the content to read. Raises OSError."""
        return open(f"/proc/self/fd/{self.file.fileno()}", "rb")


def fetch(url: str) -> FetchedFile:
    """Returns the content of a URL.

    Raises:
        InputError: the URL cannot be read, or its package is not installed.
        OSError: the disk of temporary files is full.
    """
    fs, path = open_store(url)
    with tempfile.NamedTemporaryFile(prefix="tarsier_jax-") as target:
        with store_errors(url):
            fs.get_file(path, target.name)
        file = open(target.name, "rb")  # noqa: SIM115  # it stays open
    return FetchedFile(file, os.fstat(file.fileno()).st_size)


def list_files(url: str) -> list[str]:
    """Returns the URLs of the files that a glob matches, or that are in a directory and below; a file is itself.

    Raises:
        InputError: the store cannot be read, or its package is not installed.
    """
    fs, path = open_store(url)
    with store_errors(url):
        names = fs.glob(path) if glob.has_magic(path) else [path] if fs.isfile(path) else fs.find(path)
    scheme = url.partition("://")[0]
    return [f"{scheme}://{name.lstrip('/')}" for name in names]


def _digest(url: str, infos: dict[str, dict[str, Any]]) -> str:
    """Returns a digest of the URL and the versions of its objects."""
    versions = {name: {key: info[key] for key in _SIGNIFICANT if key in info} for name, info in infos.items()}
    text = json.dumps([url, versions], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _new_copy(directory: Path) -> Iterator[Path]:
    """Yields an empty directory, which is renamed to `directory` at the end of the block.

    Of two processes that copy the same content, the first one to end keeps its copy.
    """
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=directory.parent))
    try:
        yield partial
        try:
            partial.rename(directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def transfer_progress(url: str) -> Any:
    """Returns a callback of fsspec that prints the progress of a long copy, and is closed by a `with` statement."""
    from fsspec.callbacks import TqdmCallback

    return TqdmCallback(tqdm_kwargs={"desc": url, "unit": "file", "delay": 2, "leave": False})


def _download(url: str, fs: Any, targets: dict[str, Path]) -> None:
    for target in targets.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    with store_errors(url), transfer_progress(url) as progress:
        fs.get(list(targets), [str(target) for target in targets.values()], callback=progress)
