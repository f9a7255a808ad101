"""Answered samples, in both row formats of the original, and files of them."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from tarsier_jax.errors import InputError
from tarsier_jax.processing.jsonl import check_line, parse_json

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
            raise InputError(f"it is not a row of either format of the original ({_reason(error)})") from None
        return cls(dataset=dataset, idx=idx, extra_info=extra, vid=vid, visuals=row.get("visuals"), **fields)


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
