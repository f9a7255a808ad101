"""Outputs in object stores, which can neither append to an object nor rename a directory.

A program writes a directory on this machine, and a thread uploads what is complete. The object `.mirror.json`, written
last, lists the objects of every file: an upload that is cut short changes nothing. A file of JSON lines is uploaded in
parts, each with the lines since the previous one; at the end it becomes one object.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.files import atomic_write, cache_directory, is_remote, locked, warn
from tarsier_jax.storage import open_store, store_errors, transfer_progress

MANIFEST = ".mirror.json"  # of a directory; that of a file has the name of the file in front
_EVERY = 30.0  # seconds between two uploads
_PART = ".part-"
_UNFINISHED = ".orbax-checkpoint-tmp"

_URLS: dict[Path, str] = {}  # directory of each mirror of this process -> its URL


class OtherRunError(InputError):
    """Another run has written the URL."""


# Path of a file in the directory -> names of its objects; of JSON lines in parts, also their size and digest.
Files = dict[str, dict[str, Any]]


@contextlib.contextmanager
def output_directory(path: str) -> Iterator[Path]:
    """Yields the directory of an output: the path itself, or the local directory of a URL, see `mirrored`."""
    with mirrored(path) if is_remote(path) else contextlib.nullcontext(Path(path)) as directory:
        yield directory


@contextlib.contextmanager
def output_file(path: str) -> Iterator[Path]:
    """Yields the path of an output, or for a URL a local path. Files beside it whose names begin with its are uploaded.

    Several runs may write files in the same directory of a store.
    """
    if not is_remote(path):
        yield Path(path)
        return
    parent, _, name = path.rpartition("/")
    with mirrored(parent, name) as directory:
        yield directory / name


@contextlib.contextmanager
def new_output(path: str) -> Iterator[Path]:
    """Yields the path of a directory to create: the path itself, or for a URL a local one.

    The local directory is uploaded at the end of the block and removed. The configuration is uploaded last: without it,
    a directory whose upload is cut short cannot be loaded.

    Raises:
        CheckpointError: the URL exists.
        InputError: the URL cannot be written. The local directory remains.
    """
    if not is_remote(path):
        yield Path(path)
        return
    path = path.rstrip("/")
    fs, root = open_store(path)
    with store_errors(path, "written"):
        fs.invalidate_cache()
        exists = fs.exists(root)
    if exists:
        raise CheckpointError(f"{path} exists already. Remove it, or choose another name.")
    parent = Path(tempfile.mkdtemp(prefix="new-", dir=_local_root(path)))
    out = parent / os.path.basename(root)
    try:
        yield out
    except BaseException:
        shutil.rmtree(parent, ignore_errors=True)
        raise
    try:
        _upload_directory(path, out)
    except InputError as error:
        raise InputError(f"{error} The files are in {out}: copy them with the tool of the store.") from None
    shutil.rmtree(parent, ignore_errors=True)


def _upload_directory(url: str, directory: Path) -> None:
    fs, root = open_store(url)
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    configurations = [name for name in names if name.endswith("config.json")]
    with store_errors(url, "written"), transfer_progress(url) as progress:
        for part in ([name for name in names if name not in configurations], configurations):
            fs.put([str(directory / name) for name in part], [f"{root}/{name}" for name in part], callback=progress)


def destination(path: str | os.PathLike[str]) -> str:
    """Returns the URL that a path in a mirror is uploaded to, or another path as it is. For messages."""
    if is_remote(path):
        return str(path)
    resolved = Path(path).resolve()
    for directory, url in _URLS.items():
        if resolved.is_relative_to(directory):
            return "/".join([url, *resolved.relative_to(directory).parts])
    return str(path)


def _local_root(url: str) -> Path:
    """Returns the directory of the mirrors on this machine. Raises InputError."""
    root = cache_directory("mirrors")
    if root is None:
        raise InputError(f"{url} needs a directory on this machine. Set XDG_CACHE_HOME to a writable directory.")
    return root


@contextlib.contextmanager
def mirrored(url: str, name: str = "") -> Iterator[Path]:
    """Yields the directory of `open_mirror`."""
    with open_mirror(url, name) as mirror:
        yield mirror.directory


@contextlib.contextmanager
def open_mirror(url: str, name: str = "") -> Iterator["Mirror"]:
    """Yields a local directory with the content of `url`, whose changes are uploaded until the end of the block.

    The directory is in the cache of this machine and is kept: after a crash, a run on the same machine uploads the
    changes that the store lacks, unless another machine has written `url` since. Only one run may write `url` at a
    time: the uploads of a second one fail.

    Args:
        url: URL of a directory.
        name: Restricts the mirror to files whose names begin with this one.

    Raises:
        InputError: the store cannot be used, or the last changes cannot be uploaded.
    """
    directory = _local_root(url) / hashlib.blake2b(f"{url}/{name}".encode(), digest_size=16).hexdigest()
    _URLS[directory.resolve()] = url.rstrip("/")
    with locked(directory):
        mirror = Mirror(url, directory, name)
        mirror.download()
        with mirror.uploads():
            yield mirror
        mirror.upload(is_last=True)
        print(f"{directory} is uploaded to {url}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def last_upload(url: str, *names: str) -> Iterator[Path]:
    """Yields a temporary directory with some files of the last upload to `url`, which a run may be writing.

    Raises:
        InputError: the store cannot be read, or the upload lacks a file.
    """
    with tempfile.TemporaryDirectory(prefix="tarsier_jax-") as directory:
        Mirror(url, Path(directory)).fetch(names)
        yield Path(directory)


class Mirror:
    """A directory, or the files in it whose names begin with `name`, and its copy in an object store.

    Attributes:
        directory: The directory on this machine.
    """

    def __init__(self, url: str, directory: Path, name: str = ""):
        self._name, self._manifest = name, f".{name}{MANIFEST}" if name else MANIFEST
        self._url, self.directory = url.rstrip("/"), directory
        self._fs, self._root = open_store(self._url)
        self._record = directory / MANIFEST  # the identifier of the last upload or download, and the stamps
        self._writers, self._files = {""}, Files()  # identifiers of this run's uploads
        self._stamps: dict[str, tuple[int, int]] = {}  # size and time of each uploaded file
        self._lock = threading.Lock()  # one upload at a time

    def download(self) -> None:
        """Makes the directory equal to the store, unless the store is unchanged since this machine wrote it."""
        writer, self._files = self._read_manifest()
        self._writers.add(writer)
        self._remove_orphans()
        record = json.loads(self._record.read_text(encoding="utf-8")) if self._record.exists() else {}
        if record.get("writer") == writer:
            self._stamps = {name: (size, time) for name, (size, time) in record["stamps"].items()}
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        for name in self._files:
            self._download_file(name)
            self._stamps[name] = _stamp(self.directory / name)
        self._write_record(writer)

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads some files of the last upload, and changes nothing in the store."""
        _, self._files = self._read_manifest()
        for name in names:
            if name not in self._files:
                raise InputError(f"{self._url} lacks {name}. Check the URL.")
            self._download_file(name)

    def _download_file(self, name: str) -> None:
        path = self.directory / name
        if ".." in path.parts or not path.is_relative_to(self.directory):
            raise InputError(f"{self._url}/{self._manifest} names a file outside of the directory: {name}. Remove it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out, store_errors(f"{self._url}/{name}"):
            for piece in self._files[name]["objects"]:
                with self._fs.open(self._object(piece), "rb") as content:
                    shutil.copyfileobj(content, out, 1 << 20)

    @contextlib.contextmanager
    def uploads(self) -> Iterator[None]:
        """Uploads in a thread until the end of the block. A failure is warned about, and repeated later."""
        ended = threading.Event()
        thread = threading.Thread(target=self._upload_until, args=(ended,), name="upload", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            ended.set()
            thread.join()
            with contextlib.suppress(InputError, OSError):
                self.upload()  # the checkpoint of a run that was interrupted, for instance
            raise
        ended.set()
        thread.join()

    def _upload_until(self, ended: threading.Event) -> None:
        while not ended.wait(_EVERY):
            with contextlib.suppress(OtherRunError):  # raised again at the end
                self.try_upload()

    def try_upload(self) -> None:
        """Uploads the changes. A failure is warned about; the thread of `uploads` repeats the upload later.

        Raises:
            OtherRunError: another run has written the URL.
        """
        try:
            self.upload()
        except FileNotFoundError:
            pass  # the run removed a checkpoint meanwhile
        except (InputError, OSError) as error:
            warn(f"{self._url} is not up to date. The upload is tried again. ({error})")
            if isinstance(error, OtherRunError):
                raise

    def upload(self, is_last: bool = False) -> None:
        """Uploads the changes. At the end (`is_last`), files of JSON lines become one object each.

        Raises:
            InputError: the store cannot be written. The files remain in the directory on this machine.
        """
        try:
            with self._lock, store_errors(self._url, "written"):
                self._upload(is_last)
        except InputError as error:
            raise type(error)(f"{error} The files are in {self.directory}; the same command uploads them.") from None

    def _upload(self, is_last: bool) -> None:
        paths = {path.relative_to(self.directory).as_posix(): path for path in _complete_files(self.directory)}
        stamps = {name: _stamp(path) for name, path in paths.items()}
        if stamps == self._stamps and not is_last:
            return
        self._check_writer()
        files, targets = Files(), dict[str, Path]()
        for name, path in paths.items():
            former = self._files.get(name)
            is_whole = former is not None and former["objects"] == [name]
            if former is not None and self._stamps.get(name) == stamps[name] and (is_whole or not is_last):
                files[name] = former
            elif name.endswith(".jsonl") and not is_last:
                files[name] = self._upload_lines(name, path, None if is_whole else former)
            else:
                files[name], targets[name] = {"objects": [name]}, path
        self._put(targets)
        if targets or files != self._files:
            self._commit(files, stamps)

    def _put(self, targets: dict[str, Path]) -> None:
        """Uploads whole files. Links preserve them, since the run may remove a checkpoint during its upload."""
        if not targets:
            return
        with tempfile.TemporaryDirectory(prefix=".upload-", dir=self.directory) as links:
            sources = [os.path.join(links, str(i)) for i in range(len(targets))]
            for path, link in zip(targets.values(), sources, strict=True):
                os.link(path, link)
            self._fs.put(sources, [self._object(name) for name in targets])

    def _upload_lines(self, name: str, path: Path, former: dict[str, Any] | None) -> dict[str, Any]:
        """Uploads the lines since the last upload as another object, or all lines if the earlier ones have changed."""
        parts = former or {"objects": [], "size": 0, "digest": ""}
        with path.open("rb") as file:
            digest = _hash_of(file, parts["size"])
            if digest.hexdigest() != parts["digest"]:
                file.seek(0)
                parts, digest = {"objects": [], "size": 0}, hashlib.blake2b(digest_size=16)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        objects = parts["objects"]
        if lines:
            piece = f"{name}{_PART}{uuid.uuid4().hex}"  # a new name: the former objects are valid until the commit
            self._fs.pipe_file(self._object(piece), lines)
            objects = [*objects, piece]
            digest.update(lines)
        return {"objects": objects, "size": parts["size"] + len(lines), "digest": digest.hexdigest()}

    def _commit(self, files: Files, stamps: dict[str, tuple[int, int]]) -> None:
        """Writes the manifest, and then removes the objects that are not in it."""
        self._check_writer()
        unused = _objects(self._files) - _objects(files)
        writer = uuid.uuid4().hex
        self._writers.add(writer)  # first: a store may report an error after it has written
        self._fs.pipe_file(self._object(self._manifest), json.dumps({"writer": writer, "files": files}).encode())
        self._files, self._stamps = files, stamps
        self._write_record(writer)
        if unused:
            self._fs.rm([self._object(name) for name in unused])

    def _check_writer(self) -> None:
        if self._read_manifest()[0] not in self._writers:
            raise OtherRunError(
                f"{self._url} was written by another run meanwhile. Choose another URL for one of them."
            )

    def _read_manifest(self) -> tuple[str, Files]:
        """Returns an identifier of the last upload, and its files."""
        self._fs.invalidate_cache()
        with store_errors(self._url):
            if self._fs.exists(self._object(self._manifest)):
                manifest = json.loads(self._fs.cat_file(self._object(self._manifest)))
                return manifest["writer"], manifest["files"]
        return "", {}

    def _remove_orphans(self) -> None:
        """Removes the parts of an upload that was cut short, except those of other mirrors in the directory."""
        used = {self._object(name) for name in _objects(self._files)}
        with store_errors(self._url, "written"):
            names = self._fs.find(self._root)
            others = tuple(_prefixes(names, self._object(self._name)))
            parts = [name for name in names if name.startswith(self._object(self._name)) and _PART in name]
            if orphans := [name for name in parts if name not in used and not name.startswith(others)]:
                self._fs.rm(orphans)

    def _write_record(self, writer: str) -> None:
        with atomic_write(self._record) as partial:
            partial.write_text(json.dumps({"writer": writer, "stamps": self._stamps}), encoding="utf-8")

    def _object(self, name: str) -> str:
        return f"{self._root}/{name}"


def _complete_files(directory: Path) -> Iterator[Path]:
    """Yields the files that are neither hidden nor in a directory that is being written."""
    for parent, names, files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith(".") and _UNFINISHED not in name]
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _prefixes(names: Iterable[str], prefix: str) -> Iterator[str]:
    """Yields the prefixes of the names of other mirrors, from their manifests: a directory, or one with a name.

    Args:
        names: Names of objects.
        prefix: That of the own mirror, with which the others begin.
    """
    for name in names:
        if name.endswith(MANIFEST):
            directory, _, hidden = name.removesuffix(MANIFEST).rpartition("/")
            other = f"{directory}/{hidden.removeprefix('.')}"
            if other != prefix and other.startswith(prefix):
                yield other


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _objects(files: Files) -> set[str]:
    return {name for file in files.values() for name in file["objects"]}


def _hash_of(file: BinaryIO, size: int) -> Any:
    """Reads up to `size` bytes, and returns their hash."""
    digest = hashlib.blake2b(digest_size=16)
    while size > 0 and (piece := file.read(min(size, 1 << 20))):
        digest.update(piece)
        size -= len(piece)
    return digest
