"""Reads JSON and JSON lines of other programs: encodings, byte order marks, numbers that are not valid JSON."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tarsier_jax.errors import InputError

_BOM = "\ufeff"


def parse_json(text: str, where: str) -> Any:
    """Parses a JSON text. NaN and infinities, which are not valid JSON, are read as in Python.

    Args:
        where: Name of the text in errors, such as "list.jsonl line 3".

    Raises:
        InputError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text.strip().removeprefix(_BOM))
    except RecursionError:
        raise InputError(f"{where} cannot be read as JSON: it is nested too deeply.") from None
    except ValueError as e:
        raise InputError(f"{where} is not JSON ({e}).") from None


def to_json(value: Any, encoding: str = "utf-8") -> str:
    """Returns one line of valid JSON that `encoding` can represent.

    Half surrogates, which represent the bytes of a file name that are not UTF-8, become escapes. Numbers that are not
    finite become null. Values of other types, such as dates, become strings.

    Raises:
        RecursionError: the value is nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        value = _with_nulls(value)
        text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, default=str)
    return text


def read_lines(path: Path) -> Iterator[str]:
    """Yields the non-blank lines of a list, each a JSON text.

    The list is JSON lines, an array, or one object over several lines, in UTF-8 with or without a byte order mark,
    UTF-16 or UTF-32. Only JSON lines are read one by one; other lists are in memory as a whole.

    Raises:
        InputError: the text is in another encoding.
        OSError: the file cannot be read.
    """
    lines = (line for line in _decoded_lines(path) if line.removeprefix(_BOM).strip())
    first = next(lines, None)
    if first is None:
        return
    whole = None if _is_whole_line(first) else _whole_value(decode_text(path, path.read_bytes()))
    if whole is None:
        yield first
        yield from lines
    else:
        yield from map(json.dumps, whole if isinstance(whole, list) else [whole])  # NaN stays NaN


def _decoded_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
        file.seek(0)
        if encoding.startswith("utf-8"):
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode(encoding if number == 1 else "utf-8").removesuffix("\n")
                except UnicodeDecodeError as e:
                    raise _not_utf8(str(path), number, e) from None
            return
        try:
            for line in io.TextIOWrapper(file, encoding, newline="\n"):
                yield line.removesuffix("\n")
        except UnicodeDecodeError as e:
            raise _damaged(path, encoding, e) from None


def check_line(path: str, number: int, line: bytes, first: bool) -> None:
    """Checks a line of annotations in UTF-8.

    Args:
        path: Name of the file in errors.
        number: Number of the line.
        line: The line.
        first: Whether this is the first non-blank line, which shows an array or another encoding.

    Raises:
        InputError: the encoding is another one, or the file is a JSON array.
    """
    encoding = json.detect_encoding(line[:4]) if first else "utf-8"
    if not encoding.startswith("utf-8"):
        raise InputError(f"{path} has the encoding {encoding}. {_convert(path, encoding)}")
    if first and line.removeprefix(_BOM.encode()).lstrip().startswith(b"["):
        raise InputError(
            f"{path} is a JSON array; annotations are one JSON object per line. Convert it with "
            f"`jq -c '.[]' {path} > lines.jsonl`."
        )
    try:
        line.decode()
    except UnicodeDecodeError as e:
        raise _not_utf8(path, number, e) from None


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode_text(path: Path, data: bytes) -> str:
    """Returns the text of a file in UTF-8, UTF-16 or UTF-32.

    Args:
        path: Name of the file in errors.
        data: Its content.

    Raises:
        InputError: the text is in another encoding.
    """
    encoding = json.detect_encoding(data[:4])
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        if encoding.startswith("utf-8"):
            raise _not_utf8(str(path), data[: e.start].count(b"\n") + 1, e) from None
        raise _damaged(path, encoding, e) from None


def _damaged(path: Path, encoding: str, error: UnicodeDecodeError) -> InputError:
    return InputError(f"{path} has the encoding {encoding}, but is cut off or damaged ({error.reason}).")


def _not_utf8(path: str, number: int, error: UnicodeDecodeError) -> InputError:
    byte = error.object[error.start]
    return InputError(
        f"{path} line {number} is not UTF-8 (byte 0x{byte:02x}): the file has another encoding. "
        f"{_convert(path, 'latin1')} Name its encoding in place of latin1 if it has another."
    )


def _convert(path: str | Path, encoding: str) -> str:
    encoding = encoding.replace("-le", "le").replace("-be", "be")  # as iconv spells it
    return f"Convert it to UTF-8: `iconv -f {encoding} -t utf-8 {path} > utf8.jsonl`."


def _is_whole_line(line: str) -> bool:
    """Returns whether a line is a complete value other than a list."""
    try:
        return not isinstance(parse_json(line, ""), list)
    except InputError:
        return False


def _whole_value(text: str) -> Any:
    """Returns the list or object that is the entire text, or None."""
    try:
        value = parse_json(text, "")
    except InputError:
        return None
    return value if isinstance(value, list | dict) else None
