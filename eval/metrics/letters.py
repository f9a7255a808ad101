"""Multiple choice: the letter of an answer by the original's rule, and accuracy per subtask (its evaluate_qa_mc.py).

Invalid answers leave the denominator. The Tarsier2 code averages over all valid answers, the first version over
subtasks, and the two read digits and references differently. The format of the rows shows which code wrote them.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from eval.judges.judge import Judge
from eval.metrics.scores import (
    OVERALL,
    Metric,
    SampleScore,
    ScoreArrays,
    Table,
    exact_mean,
    group_by_subset,
    macro_mean,
    most_common,
    rounded,
    status_of,
    weighted_mean,
)
from eval.predictions import Prediction, RowFormat
from tarsier_jax.errors import InputError

_OPTIONS = "ABCDEF"
_BRACKETS = str.maketrans("", "", "()")
_OPTION = re.compile(r"^\s*\(([A-Z])\)", re.MULTILINE)
_STRICT = (
    re.compile(r"^\(?([A-Z])\)?(?:[.:,)]|\s*$)"),  # "B", "(B)", "B. To the left"
    re.compile(r"answer(?: is)?:? *\(?([A-Z])\)?(?:[.:,)]|\s*$)", re.IGNORECASE),
)

ReadAnswer = Callable[[Prediction], str | None]
ReadReference = Callable[[Prediction], str]


def letter_of(answer: str, first_digit: int = 0) -> str | None:
    """Returns the letter of an answer by the original's rule, or None if the answer is invalid.

    The letter is the first character after the removal of parentheses and white space. Digits up to 5 become letters;
    any other character must be an upper-case letter of any script.

    Args:
        answer: The answer.
        first_digit: The smallest digit that is read: 0 in the Tarsier2 code, 1 in the first version.
    """
    first = answer.translate(_BRACKETS).strip()[:1]
    if first in "012345" and first:
        return _OPTIONS[int(first)] if int(first) >= first_digit else None
    return first if first.isalpha() and first.isupper() else None


def reference_letter(reference: str, row_format: RowFormat) -> str:
    """Returns the letter of a reference: the first one in the Tarsier2 code, the text as it is in the first version."""
    return reference.translate(_BRACKETS).strip()[:1] if row_format == "messages" else reference


def strict_letter(answer: str, prompt: str) -> str | None:
    """Returns the letter of an answer that names one of the options in the prompt and nothing else, or None.

    "A man opens a door" names no option. Without options in the prompt, any letter counts.
    """
    options = _OPTION.findall(prompt)
    letters = [match[1].upper() for pattern in _STRICT if (match := pattern.search(answer.strip()))]
    return letters[0] if letters and (not options or letters[0] in options) else None


def read_answer(prediction: Prediction) -> str | None:
    return letter_of(prediction.text or "", 0 if prediction.row_format == "messages" else 1)


def read_reference(prediction: Prediction) -> str:
    return reference_letter(prediction.reference, prediction.row_format)


def score_letters(
    predictions: Sequence[Prediction],
    judge: Judge | None = None,
    *,
    answer: ReadAnswer = read_answer,
    reference: ReadReference = read_reference,
) -> list[SampleScore]:
    """Returns whether each answer chooses the right option; an invalid answer has no value.

    Raises:
        InputError: a reference is empty.
    """
    return [_score(prediction, answer(prediction), reference(prediction)) for prediction in predictions]


def _score(prediction: Prediction, letter: str | None, reference: str) -> SampleScore:
    if not reference and prediction.row_format == "messages":
        raise InputError(f"{prediction.key} has the reference {prediction.reference!r}, which contains no letter.")
    is_correct = float(letter == reference)
    return SampleScore(
        prediction=prediction,
        status=status_of(prediction, "unreadable" if letter is None else "scored"),
        values={} if letter is None else {"accuracy": is_correct},
        strict={"accuracy": is_correct},
        details={"letter": letter, "strict_letter": strict_letter(prediction.text or "", prediction.prompt)},
    )


def letters_figures(arrays: ScoreArrays, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the accuracy in percent over all valid answers, or over subtasks for rows of the first version."""
    mean = macro_mean if arrays.row_format == "text" else micro_mean
    return {"Accuracy": 100 * mean(arrays, "accuracy", weights)}


def flat_figures(arrays: ScoreArrays, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the accuracy in percent over all valid answers."""
    return {"Accuracy": 100 * micro_mean(arrays, "accuracy", weights)}


def micro_mean(arrays: ScoreArrays, name: str, weights: np.ndarray) -> np.ndarray:
    return weighted_mean(arrays.values[name], weights)


def subtask_tables(dataset: str, scores: Sequence[SampleScore]) -> list[Table]:
    """Returns the table of subtasks. A subtask without a valid answer has a row of nan, which the original omits."""
    groups: dict[str, list[SampleScore]] = {}
    for score in scores:
        groups.setdefault(score.prediction.dataset, []).append(score)
    is_v1 = bool(scores) and scores[0].prediction.row_format == "text"
    tasks = sorted(((_task_name(name, is_v1), group) for name, group in groups.items()), key=lambda pair: pair[0])
    means = [mean for _, group in tasks if (mean := exact_mean(_accuracies(group))) == mean]
    overall = exact_mean(means) if is_v1 else exact_mean(_accuracies(scores))
    rows = [_row(name, exact_mean(_accuracies(group)), group) for name, group in tasks]
    columns = ["Task", "Accuracy", "Success", "Failed"]
    return [Table("Evaluation Summary", columns, [*rows, _row(OVERALL, overall, scores)])]


def _task_name(dataset: str, is_v1: bool) -> str:
    """Returns the last part of a dataset's name; the first version prints the initials of its first two words."""
    name = dataset.split("/")[-1]
    return "".join(word[:1] for word in name.split()[:2]) if is_v1 else name


def _accuracies(scores: Sequence[SampleScore]) -> list[float]:
    return [score.values["accuracy"] for score in scores if score.values]


def _row(name: str, accuracy: float, scores: Sequence[SampleScore]) -> list[str]:
    num_valid = len(_accuracies(scores))
    return [name, rounded(100 * accuracy, 1), str(num_valid), str(len(scores) - num_valid)]


def flat_tables(dataset: str, scores: Sequence[SampleScore]) -> list[Table]:
    """Returns a table of one row."""
    row = _row(dataset, exact_mean(_accuracies(scores)), scores)
    return [Table("Evaluation Summary", ["Dataset", "Accuracy", "Success", "Failed"], [row])]


def subtask_records(dataset: str, scores: Sequence[SampleScore]) -> dict[str, str]:
    return {f"{dataset}_eval_result.txt": f"{subtask_tables(dataset, scores)[0]}\n"}


def flat_records(dataset: str, scores: Sequence[SampleScore]) -> dict[str, str]:
    _, accuracy, num_valid, num_failed = flat_tables(dataset, scores)[0].rows[0]
    text = (
        f"=====Evaluation Summary=====\nDataset: {dataset}\tMetric: Accuracy\n#Successful Results: {num_valid}\n"
        f"#Failed Results: {num_failed}\nAccuracy: {accuracy}\n"
    )
    return {f"{dataset}_eval_result.txt": text}


def constant_letters(predictions: Sequence[Prediction]) -> list[str]:
    """Returns the references, the most frequent one first."""
    return most_common(prediction.reference for prediction in predictions)


def _notes(scores: Sequence[SampleScore]) -> list[str]:
    groups = group_by_subset([score for score in scores if score.status != "missing"])
    sentences = []
    if unread := [name for name, group in groups.items() if not _accuracies(group)]:
        sentences.append(f"No answer is valid in {', '.join(unread)}. The original omits the row.")
    if empty := [score.prediction.key for score in scores if score.prediction.references == ("",)]:
        sentences.append(f"Empty references, to which every answer is wrong: {len(empty)}, such as {empty[0]}.")
    return sentences


def subtask_accuracy(answer: ReadAnswer = read_answer, reference: ReadReference = read_reference) -> Metric:
    """Returns the metric of a benchmark with subtasks.

    Args:
        answer: Returns the letter of an answer, or None if it has none.
        reference: Returns the letter of the reference.
    """
    return Metric(
        value_names=("accuracy",),
        figures=letters_figures,
        score=functools.partial(score_letters, answer=answer, reference=reference),
        tables=subtask_tables,
        records=subtask_records,
        constant_answers=constant_letters,
        notes=_notes,
    )


SUBTASK_ACCURACY = subtask_accuracy()
ACCURACY = dataclasses.replace(SUBTASK_ACCURACY, figures=flat_figures, tables=flat_tables, records=flat_records)
