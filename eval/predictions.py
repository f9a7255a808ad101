"""Answered samples, and files of them: JSON lines in the format of the original's predictions."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tarsier_jax.errors import InputError
from tarsier_jax.processing.jsonl import parse_json

AnnotatedSample = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answered sample.

    Attributes:
        subset: `dataset` of the sample, such as "Shapes/backwards".
        idx: Index of the sample in its subset.
        prompt: Texts of the user's turn, joined.
        text: The answer.
        reference: The expected answer.
        extra_info: Further annotations, such as the events of the reference.
    """

    subset: str
    idx: Any
    prompt: str
    text: str
    reference: str
    extra_info: Mapping[str, Any]

    @classmethod
    def of(cls, sample: AnnotatedSample) -> Self:
        """Reads a sample whose last turn contains the answer beside its reference.

        A text of the assistant without a reference is the prefill, which is no part of the answer.
        """
        user, assistant = (message["content"] for message in sample["messages"])
        texts = [item for item in assistant if item.get("reference")]
        return cls(
            subset=sample["dataset"],
            idx=sample["idx"],
            prompt="".join(item["text"] for item in user if item["type"] == "text"),
            text="".join(item["text"] for item in texts),
            reference="".join(item["reference"] for item in texts),
            extra_info=sample.get("extra_info") or {},
        )


def key_of(sample: AnnotatedSample) -> tuple[str, str]:
    """Returns the subset and the index of a sample, which identify it."""
    return sample["dataset"], str(sample["idx"])


def read_predictions(path: Path) -> dict[tuple[str, str], AnnotatedSample]:
    """Returns the lines of an earlier run by key, and removes a line that a killed run left unfinished at the end.

    Raises:
        InputError: a line is not a prediction.
    """
    if not path.exists():
        return {}
    with path.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        file.truncate(end)
    lines = data[:end].decode(errors="surrogateescape").split("\n")[:-1]
    samples = (_parse(line, f"{path} line {number}") for number, line in enumerate(lines, 1))
    return {key_of(sample): sample for sample in samples}


def _parse(line: str, where: str) -> AnnotatedSample:
    sample = parse_json(line, where)
    if not isinstance(sample, Mapping) or not {"dataset", "idx", "messages"} <= sample.keys():
        raise InputError(f"{where} is not a prediction. Choose another --output, or remove the file.")
    return sample
