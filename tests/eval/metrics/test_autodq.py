"""AutoDQ: the requests to the judge, means of subsets, and buckets."""

import math
from typing import Any

import numpy as np
import pytest

from eval.judges.judge import JudgeError
from eval.judges.tasks import EventEntailment, EventExtraction
from eval.metrics import AUTODQ
from eval.metrics.scores import SampleScore, arrays_of
from eval.predictions import Prediction
from tarsier_jax.errors import InputError
from tests.eval.metrics.judges import FakeJudge, sentence_judge
from tests.eval.rows import prediction

COUNTS = {"n_subjects": 1, "n_shots": 2, "n_events": 3}


def description(idx: int, text: str, reference: str, subset: str = "DREAM/youtube", **extra: Any) -> Prediction:
    return prediction(subset, idx, text, reference, extra_info={**COUNTS, **extra})


def score(*descriptions: Prediction) -> list[SampleScore]:
    return AUTODQ.score(descriptions, sentence_judge())


def test_the_judge_receives_captions_in_lower_case_and_events_as_they_are() -> None:
    judge = sentence_judge()
    sample = description(1, 'A "Dog" Runs.', "A Cat Sits. It Yawns.", events=["A Cat Sits.", 'It "Yawns".'])
    AUTODQ.score([sample], judge)
    assert judge.tasks == [
        EventExtraction("a 'dog' runs."),
        EventEntailment('a "dog" runs.', ("A Cat Sits.", 'It "Yawns".'), "a cat sits. it yawns."),
        EventEntailment("a cat sits. it yawns.", ("a 'dog' runs",), 'a "dog" runs.'),
    ]


def test_events_of_the_reference_are_extracted_without_a_list_only() -> None:
    for events, count in ((["A cat sits."], 1), ([], 1), (None, 2)):
        judge = sentence_judge()
        AUTODQ.score([description(1, "A dog runs.", "A cat sits.", events=events)], judge)
        assert sum(isinstance(task, EventExtraction) for task in judge.tasks) == count


def test_the_share_of_an_empty_list_is_one() -> None:
    (empty,) = score(description(1, "", "A cat sits.", events=[]))
    assert empty.values == {"recall": 1, "precision": 1}
    assert empty.details["hit_num_recall"] == empty.details["hit_num_precision"] == "hit: 0 / 0"


def test_repeated_events_count_as_often_as_they_occur() -> None:
    (repeated,) = score(description(1, "a cat sits. a cat sits. a dog runs.", "a cat sits.", events=["a cat sits."]))
    assert repeated.values == {"recall": 1, "precision": pytest.approx(2 / 3)}


def test_overall_is_the_mean_of_subsets_and_f1_that_of_the_means() -> None:
    scores = score(
        description(1, "a. b.", "a. c.", "DREAM/one", events=["a", "c"]),  # recall 0.5, precision 0.5
        description(2, "a.", "a.", "DREAM/one", events=["a"]),  # 1, 1
        description(3, "x.", "y. z.", "DREAM/two", events=["y", "z"]),  # 0, 0
    )
    summary = AUTODQ.tables("DREAM", scores)[0].rows
    assert summary[0] == ["DREAM/one", "0.75", "0.75", "0.75", "2", "0"]
    assert summary[1] == ["DREAM/two", "nan", "0.0", "0.0", "1", "0"]
    assert summary[2] == ["OVERALL", "0.375", "0.375", "0.375", "3", "0"]
    figures = AUTODQ.figures(arrays_of(scores), np.ones((1, 3)))
    assert [float(value[0]) for value in figures.values()] == [0.375, 0.375, 0.375]


def test_a_failed_sample_leaves_the_comparable_figure_only() -> None:
    good = sentence_judge()

    def fail(task: EventExtraction) -> list[str]:
        if "broken" in task.caption:
            raise JudgeError("10 replies could not be read.")
        return good._answers[EventExtraction](task)

    judge = FakeJudge({**good._answers, EventExtraction: fail})
    samples = [description(1, "a.", "a.", events=["a"]), description(2, "broken", "a.", events=["a"])]
    scores = AUTODQ.score(samples, judge)
    assert [each.status for each in scores] == ["scored", "judge failed"]
    assert AUTODQ.tables("DREAM", scores)[0].rows[0] == ["DREAM/youtube", "1.0", "1.0", "1.0", "1", "1"]
    assert AUTODQ.figures(arrays_of(scores, strict=True), np.ones((1, 2)))["Action Recall"][0] == 0.5


def test_a_wrong_key_ends_the_run_at_once() -> None:
    def refuse(task: EventExtraction) -> list[str]:
        raise InputError("The key is wrong.")

    judge = FakeJudge({EventExtraction: refuse})
    with pytest.raises(InputError, match="key is wrong"):
        AUTODQ.score([description(i, "a.", "a.", events=["a"]) for i in range(500)], judge)
    assert len(judge.tasks) <= judge.concurrency


def test_a_sample_without_its_counts_omits_the_table_of_buckets() -> None:
    samples = [description(1, "a.", "a.", events=["a"]), prediction("DREAM/youtube", 2, "a.", "a.")]
    scores = AUTODQ.score(samples, sentence_judge())
    assert len(AUTODQ.tables("DREAM", scores)) == 1
    assert "n_subjects or n_shots or n_events" in AUTODQ.notes(scores)[0]
    scores = scores[:1]
    buckets = AUTODQ.tables("DREAM", scores)[2]
    assert buckets.title == "DREAM Evaluation Split by Bucket #shots" and not AUTODQ.notes(scores)
    assert buckets.rows[3] == ["Count", "0", "1", "0", "0"] and buckets.rows[0][1:3] == ["nan", "1.0"]


def test_means_do_not_depend_on_the_order_of_samples() -> None:
    rng = np.random.default_rng(0)
    scores = score(*(description(i, "a. b. c.", "a. b. d.", events=["a", "b", "d"]) for i in range(18)))
    tables = {str(AUTODQ.tables("DREAM", [scores[i] for i in rng.permutation(18)])[0]) for _ in range(20)}
    assert len(tables) == 1


def test_nothing_successful() -> None:
    assert math.isnan(float(AUTODQ.tables("DREAM", [])[0].rows[0][1]))
