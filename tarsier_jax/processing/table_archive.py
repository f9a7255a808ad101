"""Reads Parquet and Arrow files whose rows contain videos or images, as Hugging Face datasets store them."""

import bisect
import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tarsier_jax.errors import InputError
from tarsier_jax.processing.formats import is_conversation
from tarsier_jax.processing.jsonl import parse_json
from tarsier_jax.processing.media_types import MEDIA_SUFFIXES, kind_of_suffix
from tarsier_jax.processing.prompt_rows import is_prompt_row
from tarsier_jax.processing.tar_archive import plain_sample

_JSON_COLUMNS = ("messages", "conversations", "extra_info", "image_processing_config")  # which may contain JSON
_MEDIA_COLUMNS = ("video", "videos", "image", "images")
_ROWS = 1000  # rows in memory at once, without their media
_MAX_GROUP = 1 << 30  # bytes
_LOCK = threading.Lock()  # one row group is read at a time


def kind_of_column(name: str) -> str:
    """Returns "image" or "video" for a column of media."""
    return "image" if name.startswith("image") or kind_of_suffix(f".{name}") == "image" else "video"


def unpack_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a row with JSON columns parsed. `where` names the row in errors. Raises InputError."""
    return {
        k: parse_json(v, f"{where}, {k},") if k in _JSON_COLUMNS and isinstance(v, str) else v for k, v in row.items()
    }


class TableArchive:
    """A Parquet or Arrow file. A row is a sample.

    A column has media if it is {"bytes", "path"}, as in Hugging Face datasets, or bytes and named video, videos, image,
    images or as an ending such as mp4, or the only column of bytes. Lists of these are media too.

    Raises:
        InputError: pyarrow is missing, or the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._errors():
            self._file = _ParquetFile(path) if path.suffix.lower() == ".parquet" else _ArrowFile(path)
            self._media = _media_columns(self._file.schema)
            self._texts = self._file.without_bytes(self._media)

    def __len__(self) -> int:
        return self._file.num_rows

    def sample(self, index: int, name: str) -> dict[str, Any]:
        """Returns a row without empty columns, with paths in the place of media.

        A row without a conversation and with one medium is {"input": path}, with `PLAIN_KEYS` of the row.

        Args:
            index: Number of the row.
            name: Name of the archive in the paths.

        Raises:
            InputError: the row cannot be read.
        """
        with self._errors():
            ((_, sample),) = self._samples(self._file.read(index, self._texts), index, name)
        if isinstance(sample, InputError):
            raise sample
        return sample

    def samples(self, name: str) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
        """Yields a name for every row, and its sample or the reason why it cannot be used.

        Raises:
            InputError: the file is damaged.
        """
        first = 0
        with self._errors():
            for batch in self._file.batches(self._texts):
                yield from self._samples(batch, first, name)
                first += batch.num_rows

    def content(self, place: str) -> bytes | Path:
        """Returns the bytes of a value, or the path that it has instead.

        Args:
            place: Row and column, and position in a list: "12/video", "12/images/0".

        Raises:
            KeyError: there is no such value.
        """
        row, column, *position = place.split("/")
        if not row.isdecimal() or int(row) >= len(self) or column not in self._media:
            raise KeyError(place)
        with self._errors():
            value = self._file.read(int(row), self._file.columns(column)).column(0)[0].as_py()
        for number in position:
            if not isinstance(value, list) or not number.isdecimal() or int(number) >= len(value):
                raise KeyError(place)
            value = value[int(number)]
        if isinstance(value, Mapping):
            value = value["bytes"] or Path(self.path.parent, value.get("path") or "")
        if not isinstance(value, bytes | Path):
            raise KeyError(place)
        return value

    def _samples(self, batch: Any, first: int, name: str) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
        """Yields name and sample of consecutive rows, of which row `first` is the first one."""
        columns = set(batch.schema.names)
        rows = batch.select([column for column in batch.schema.names if column not in self._media]).to_pylist()
        for i, row in enumerate(rows or [{}] * batch.num_rows):
            media = {}
            for column in self._media:
                place = f"{name}/{first + i}/{column}"
                media[column] = _places(batch.column(column)[i], place) if column in columns else place
            row = {key: value for key, value in row.items() if value is not None}
            where = f"{name} line {first + i + 1}"
            try:
                yield where, _with_media(unpack_row(row, where), media)
            except InputError as error:
                yield where, error

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        pa = _import_pyarrow(self.path)
        try:
            yield
        except OSError as error:
            raise InputError(
                f"The list {self.path} cannot be read ({error.strerror or error}). Check --input."
            ) from None
        except (pa.ArrowException, UnicodeDecodeError) as error:
            kind = "Parquet" if self.path.suffix.lower() == ".parquet" else "Arrow"
            raise InputError(f"The list {self.path} is not a readable {kind} file ({error}). Check --input.") from None


def _import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"Reading {path} needs pyarrow: pip install pyarrow.") from None
    return pyarrow


class _ParquetFile:
    """The rows of a Parquet file, which are read by row group."""

    def __init__(self, path: Path):
        import pyarrow.parquet as parquet

        self._path, self._file = path, parquet.ParquetFile(path)
        self.schema = self._file.schema_arrow
        self.num_rows = self._file.metadata.num_rows
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = list(itertools.accumulate(sizes))
        self._leaves = [self._file.schema.column(i).path for i in range(len(self._file.schema))]

    def columns(self, name: str) -> list[str]:
        """Returns the primitive columns of a column, such as "video.bytes" and "video.path"."""
        return [leaf for leaf in self._leaves if leaf == name or leaf.startswith(f"{name}.")]

    def without_bytes(self, media: Sequence[str]) -> list[str]:
        """Returns the primitive columns except the bytes of media, and with those of lists, which have a length."""
        lists = [name for name in media if _is_bytes_list(self.schema.field(name).type)]
        unread = {leaf for name in media if name not in lists for leaf in self.columns(name)}
        return [leaf for leaf in self._leaves if leaf not in unread or leaf.endswith(".path")]

    def read(self, row: int, columns: Sequence[str]) -> Any:
        """Returns one row as a table."""
        group = bisect.bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        with _LOCK:
            return _read_group(self, group, tuple(columns)).slice(row - first, 1)

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        import pyarrow.parquet as parquet

        yield from parquet.ParquetFile(self._path).iter_batches(_ROWS, columns=columns)

    def read_group(self, group: int, columns: Sequence[str]) -> Any:
        metadata = self._file.metadata.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)
        if size > _MAX_GROUP:
            raise InputError(
                f"{self._path} has a row group of {size / 2**30:.1f} GiB, all of which is read for each of its rows. "
                "Write smaller ones, such as with `pyarrow.parquet.write_table(table, path, row_group_size=10)`."
            )
        return self._file.read_row_group(group, columns=columns)


@functools.lru_cache(maxsize=3)
def _read_group(file: _ParquetFile, group: int, columns: tuple[str, ...]) -> Any:
    """Returns a row group. The last ones stay in memory, for a clip that is opened several times and the next rows."""
    return file.read_group(group, columns)


class _ArrowFile:
    """The rows of an Arrow file, which is mapped into memory."""

    def __init__(self, path: Path):
        import pyarrow as pa

        try:
            self._table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid:
            self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.schema, self.num_rows = self._table.schema, self._table.num_rows

    def columns(self, name: str) -> list[str]:
        return [name]

    def without_bytes(self, media: Sequence[str]) -> list[str]:
        """Returns all columns: bytes that are not used are not read from the disk."""
        return self.schema.names

    def read(self, row: int, columns: Sequence[str]) -> Any:
        return self._table.select(columns).slice(row, 1)

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        yield from self._table.select(columns).to_batches(_ROWS)


def _media_columns(schema: Any) -> list[str]:
    """Returns the names of the columns with media."""
    fields = {field.name: field.type for field in schema if _is_bytes(_value_type(field.type))}
    named = [name for name in fields if name in _MEDIA_COLUMNS or f".{name.lower()}" in MEDIA_SUFFIXES]
    structs = [name for name, kind in fields.items() if _is_struct(_value_type(kind))]
    if named or structs:
        return sorted({*named, *structs})
    return list(fields) if len(fields) == 1 and "input" not in schema.names else []


def _value_type(kind: Any) -> Any:
    return kind.value_type if hasattr(kind, "value_type") else kind


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind)


def _is_bytes(kind: Any) -> bool:
    """Whether a type is bytes, or a struct with them."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_bytes_list(kind: Any) -> bool:
    return hasattr(kind, "value_type") and not _is_struct(kind.value_type)


def _places(value: Any, place: str) -> Any:
    """Returns the path of a value, a list of paths for a list, or None for an empty value."""
    if not value.is_valid:
        return None
    if hasattr(value.type, "value_type"):  # a list
        return [_places(each, f"{place}/{i}") for i, each in enumerate(value)]
    return place


def _with_media(row: dict[str, Any], media: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row with the paths of its media where an annotation has them, or as "input" if it has no messages."""
    media = {column: value for column, value in media.items() if value is not None}
    if is_prompt_row(row):
        return row
    if is_conversation(row):
        lists: dict[str, Any] = {}
        for column, value in media.items():
            key = column if column in _MEDIA_COLUMNS else f"{kind_of_column(column)}s"
            lists.setdefault(key, []).extend(value if isinstance(value, list) else [value])
        return {**row, **lists}
    paths = [path for value in media.values() for path in (value if isinstance(value, list) else [value])]
    if len(paths) == 1 and row.get("input") is None:
        return plain_sample(paths[0], row)
    return {**row, **media}
