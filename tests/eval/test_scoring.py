"""Scores of a benchmark: counts, strict figures, missing samples, baselines and notes."""

import dataclasses
import math

import pytest

from eval.benchmarks.benchmark import Benchmark
from eval.metrics import AUTODQ, SUBTASK_ACCURACY
from eval.predictions import PLACEHOLDER, Prediction, Predictions
from eval.scoring import score
from tarsier_jax.errors import InputError
from tests.eval.metrics.judges import sentence_judge
from tests.eval.rows import prediction, row

LETTER_BENCHMARK = Benchmark(
    name="tvbench",
    dataset="TVBench",
    metric=SUBTASK_ACCURACY,
    annotations="TVBench.jsonl",
    video="{vid}",
    subsets={"TVBench/One": 4, "TVBench/Two": 2},
)


def rows(*texts: str | None, dataset: str = "TVBench/One") -> list[Prediction]:
    return [prediction(dataset, i, text, "A") for i, text in enumerate(texts)]


def test_counts_add_up_and_the_strict_figure_counts_the_rest_as_wrong() -> None:
    answers = [*rows("A", "B", "none"), *rows("A", "<error>", dataset="TVBench/Two")]
    result = score(LETTER_BENCHMARK, Predictions(answers))
    assert result.counts == {"scored": 3, "unreadable": 1, "judge failed": 0, "missing": 2}
    assert sum(result.counts.values()) == len(result.scores) == 6
    assert result.figures == {"Accuracy": pytest.approx(200 / 3)}
    assert result.strict_figures == {"Accuracy": pytest.approx(100 * 2 / 6)}
    assert result.tables[0].rows[-1] == ["OVERALL", "66.7", "3", "2"]  # of the rows that the original sees
    assert result.notes[0].startswith("Answers <error> (missing;") and result.notes[0].endswith(": 1.")


def test_samples_of_the_annotations_without_a_row_are_missing() -> None:
    expected = rows("", "", "")
    result = score(LETTER_BENCHMARK, Predictions(rows("A", "B")), expected=expected)
    assert result.counts["missing"] == 1 and result.scores[-1].prediction.key == "TVBench/One_2"
    extra = score(LETTER_BENCHMARK, Predictions(rows("A", "B", "A", "A")), expected=expected)
    assert extra.counts["missing"] == 0 and "Rows that are not in the annotation file, scored: 1." in extra.notes


def test_a_row_without_an_answer_is_missing_and_leaves_the_tables() -> None:
    result = score(LETTER_BENCHMARK, Predictions(rows("A", None)), expected=rows("", ""))
    assert result.counts["missing"] == 1 and result.tables[0].rows[-1] == ["OVERALL", "100.0", "1", "0"]


def test_datasets_of_another_version_have_an_unknown_size() -> None:
    result = score(LETTER_BENCHMARK, Predictions(rows("A", dataset="TVBench/Three")))
    assert result.counts["missing"] == 0
    assert "missing samples are not counted without annotations" in result.notes[0]


def test_an_absent_subset_is_named() -> None:
    result = score(LETTER_BENCHMARK, Predictions(rows("A")))
    assert "No row is of TVBench/Two: the figures are of 1 subsets." in result.notes


def test_repeated_rows_are_named() -> None:
    notes = score(LETTER_BENCHMARK, Predictions(rows("A"), num_repeated=2, num_conflicting=3)).notes
    assert notes[0] == "Repeated rows with the same answer, ignored: 2."
    assert notes[1] == "Repeated rows with another answer (the first row counts): 3."


def test_the_best_constant_answer_is_a_baseline() -> None:
    answers = [prediction("TVBench/One", i, "A", letter) for i, letter in enumerate("ABBC")]
    result = score(LETTER_BENCHMARK, Predictions(answers))
    assert result.baselines == {"constant answer 'B'": {"Accuracy": 50}}


def test_constant_answers_cost_nothing_by_default() -> None:
    benchmark = dataclasses.replace(LETTER_BENCHMARK, metric=AUTODQ)
    judge, answers = sentence_judge(), rows("a. b.", "c.")
    assert score(benchmark, Predictions(answers), judge).baselines == {}
    num_tasks = len(judge.tasks)
    assert score(benchmark, Predictions(answers), judge, constant_answers=True).baselines
    assert len(judge.tasks) == 3 * num_tasks
    assert score(dataclasses.replace(benchmark, judge=judge), Predictions(answers), judge).baselines


def test_the_parser_audit_counts_disagreements() -> None:
    answers = rows("A", "A man opens it", "The answer is B.", "answer: B")
    assert score(LETTER_BENCHMARK, Predictions(answers)).audit == {
        "answers": 4,
        "readers disagree": 3,
        "only the original's rule reads a letter": 1,  # A man
        "only the strict reader reads a letter": 1,  # answer: B; the original reads T in the third
    }


def test_settings_contain_those_of_the_model_and_the_judge() -> None:
    benchmark = dataclasses.replace(LETTER_BENCHMARK, metric=AUTODQ)
    settings = score(benchmark, Predictions(rows("a.")), sentence_judge(), {"model": "m"}).settings
    assert settings["model"] == "m" and settings["judge"] == {"judge": "fake"} and settings["package_version"]


def test_annotations_are_not_predictions() -> None:
    samples = [row("TVBench/One", i, "", "A") for i in range(2)]
    for sample in samples:
        sample["messages"][0]["content"][0]["video"]["video_file"] = PLACEHOLDER
    answers = [Prediction.of(sample) for sample in samples]
    with pytest.raises(InputError, match="these are annotations instead of predictions"):
        score(LETTER_BENCHMARK, Predictions(answers, num_unanswered=2))
    notes = score(LETTER_BENCHMARK, Predictions(rows("", ""))).notes
    assert "No row has an answer. Check that these are predictions." in notes


def test_no_valid_answer() -> None:
    result = score(LETTER_BENCHMARK, Predictions(rows("none")))
    assert math.isnan(result.figures["Accuracy"]) and result.strict_figures == {"Accuracy": 0}
    assert "| OVERALL |   nan    |    0    |   1    |" in result.records["TVBench_eval_result.txt"]
