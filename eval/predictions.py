"""Answered samples, in both row formats of the original, and files of them."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from tarsier_jax.errors import InputError
from tarsier_jax.processing.jsonl import decode_text, parse_json

# "messages" is the format of the original's Tarsier2 code, "text" that of its first version.
RowFormat = Literal["messages", "text"]
AnnotatedSample = Mapping[str, Any]
ERROR = "<error>"  # the answer of a sample that could not be answered
PLACEHOLDER = "<placeholder>"  # the path of a video in the annotations of the original


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A sample with its answer.

    Attributes:
        dataset: `dataset` of the sample, such as "TVBench/Action Count".
        idx: Index of the sample in its dataset.
        prompt: Texts of the user's turn, joined.
        question: The question without its instruction, if the row has one.
        text: The answer; None if there is none.
        references: The expected answers.
        extra_info: Further annotations, such as the events of the reference.
        vid: The clip, of which several samples may ask.
        row_format: Format of the row.
        visuals: Frames that the model received, as `eval.run` records them.
        error: Reason why there is no answer, as `eval.run` records it.
    """

    dataset: str
    idx: Any
    prompt: str
    question: str | None
    text: str | None
    references: tuple[str, ...]
    extra_info: Mapping[str, Any]
    vid: str
    row_format: RowFormat = "messages"
    visuals: Any = None
    error: Any = None

    @property
    def key(self) -> str:
        return f"{self.dataset}_{self.idx}"

    @property
    def reference(self) -> str:
        return " | ".join(self.references)

    @property
    def is_missing(self) -> bool:
        return self.text is None or self.text == ERROR

    @classmethod
    def of(cls, row: AnnotatedSample) -> Self:
        """Reads a row.

        In a row with `messages`, texts of the last turn without a reference are the prefill of the answer, and no part
        of it.

        Raises:
            InputError: the row has neither format, or has no reference.
        """
        try:
            fields = _of_text(row) if "text" in row else _of_messages(row)
            dataset, idx, extra = row["dataset"], row["idx"], dict(row.get("extra_info") or {})
            vid = str(row.get("vid", extra.get("vid", f"{dataset}_{idx}")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"is not a row of either format of the original ({_reason(error)}).") from None
        if not fields["references"]:
            raise InputError(f"({dataset}, idx {idx}) has no reference.")
        fields |= {"visuals": row.get("visuals"), "error": row.get("error")}
        return cls(dataset=dataset, idx=idx, extra_info=extra, vid=vid, **fields)


def _of_messages(row: AnnotatedSample) -> dict[str, Any]:
    user = [item for message in row["messages"] if message["role"] == "user" for item in message["content"]]
    assistant = [item for message in row["messages"] if message["role"] == "assistant" for item in message["content"]]
    answers = [item for item in assistant if item.get("reference")]
    texts = [item["text"] for item in answers]
    return {
        "prompt": "".join(item["text"] for item in user if item["type"] == "text"),
        "question": None,
        "text": None if any(text is None for text in texts) else "".join(texts),
        "references": _joined_references([item["reference"] for item in answers]),
        "row_format": "messages",
    }


def _joined_references(references: Sequence[Any]) -> tuple[str, ...]:
    """Returns the references of a turn: its texts joined, or the texts of its one list."""
    if len(references) == 1 and isinstance(references[0], list):
        return tuple(map(str, references[0]))
    return ("".join(references),) if references else ()


def _of_text(row: AnnotatedSample) -> dict[str, Any]:
    text = row["text"]
    response = text["response"]
    references = tuple(map(str, response)) if isinstance(response, list) else (() if response is None else (response,))
    return {
        "prompt": text["prompt"],
        "question": text.get("question"),
        "text": text.get("prediction"),
        "references": references,
        "row_format": "text",
    }


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def prediction_at(place: str, row: AnnotatedSample) -> Prediction:
    """Reads a row as `Prediction.of` does. Raises InputError with the row's place."""
    try:
        return Prediction.of(row)
    except InputError as error:
        raise InputError(f"{place} {error}") from None


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of one dataset in files.

    Attributes:
        rows: One prediction per sample, in the order of the files' names and their lines. The first row of a sample
            counts, as in the original.
        num_repeated: Number of later rows of the same samples, with the same answer.
        num_conflicting: Number of later rows with another answer.
        num_unanswered: Number of rows that look like rows of an annotation file: a placeholder for the video, and an
            empty answer.
    """

    rows: Sequence[Prediction]
    num_repeated: int = 0
    num_conflicting: int = 0
    num_unanswered: int = 0


class PredictionFiles:
    """Rows in one file, or in all files of a directory whose names end in ".jsonl".

    Attributes:
        path: The file or directory.
        num_rows: Number of rows per dataset, the part of `dataset` before the first slash.
        num_failed: Number of lines that infer.caption wrote for samples without an answer, which name no dataset.

    Raises:
        InputError: there is no such file, or a line is not a row.
    """

    def __init__(self, path: Path):
        self.path = path
        self.num_failed = 0
        self._rows: dict[str, list[tuple[str, AnnotatedSample]]] = {}
        for file in _files(path):
            for place, row in read_rows(file):
                if "dataset" not in row:
                    self.num_failed += 1
                    continue
                self._rows.setdefault(str(row["dataset"]).split("/")[0], []).append((place, row))
        self.num_rows = {name: len(rows) for name, rows in self._rows.items()}

    def of(self, dataset: str) -> Predictions:
        """Returns the predictions of a dataset.

        Raises:
            InputError: a row has neither format or lacks a reference, or rows of both formats are mixed.
        """
        rows: dict[str, Prediction] = {}
        num_repeated = num_conflicting = num_unanswered = 0
        for place, row in self._rows.get(dataset, ()):
            prediction = prediction_at(place, row)
            first = rows.setdefault(prediction.key, prediction)
            num_repeated += first is not prediction and first.text == prediction.text
            num_conflicting += first is not prediction and first.text != prediction.text
            num_unanswered += not prediction.text and PLACEHOLDER in str(row)
        formats = {prediction.row_format for prediction in rows.values()}
        if len(formats) > 1:
            raise InputError(
                f"{self.path} has rows of {dataset} in both formats of the original, which are scored by different "
                "rules. Score them apart."
            )
        return Predictions(list(rows.values()), num_repeated, num_conflicting, num_unanswered)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist. Pass a file of predictions, or a directory of .jsonl files.")
    files = sorted(file for file in path.iterdir() if file.name.endswith(".jsonl") and file.is_file())
    if not files:
        raise InputError(f"{path} contains no .jsonl file. Pass the directory with the files of predictions.")
    return files


def read_rows(file: Path) -> Iterator[tuple[str, AnnotatedSample]]:
    """Yields the rows of a file of JSON lines, with their place in errors, such as "a.jsonl line 3".

    Blank lines are skipped. Only a line feed or carriage return ends a line.

    Raises:
        InputError: a line is not JSON, such as the last line of a killed run, or not a row with a `dataset` and `idx`.
        OSError: the file cannot be read.
    """
    for number, line in enumerate(re.split("\r\n|\n|\r", decode_text(file, file.read_bytes())), 1):
        if not line.removeprefix("\ufeff").strip():
            continue
        place = f"{file} line {number}"
        try:
            row = parse_json(line, place)
        except InputError as error:
            raise InputError(
                f"{error} Copy the file again. If a run was killed while it wrote the line, remove the line."
            ) from None
        keys = {"error", "input"} if isinstance(row, Mapping) and "dataset" not in row else {"dataset", "idx"}
        if not isinstance(row, Mapping) or not keys <= row.keys():
            raise InputError(f'{place} has no "dataset" and "idx", which every row of annotations or predictions has.')
        yield place, row
