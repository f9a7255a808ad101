"""Agreement of two judges: shares of equal verdicts, Cohen's kappa, and the difference of their figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.agreement import PAIRS, agreement_figures, measure_agreement
from eval.judges.__main__ import main, parse
from eval.judges.judge import JudgeError
from eval.judges.tasks import AnswerComparison, AnswerVerdict, EventEntailment, EventVerdict
from eval.metrics.autodq import AUTODQ
from eval.metrics.open_qa import OPEN_QA
from eval.metrics.scores import ScoreArrays
from eval.predictions import Prediction
from eval.shapes.judge import RulesJudge
from tarsier_jax.errors import InputError
from tests.eval.rows import prediction, row
from tests.eval.scripted import GOLDENS, scripted_judge

EVENTS = ["The red circle moves to the left.", "The blue bar grows.", "The green ring jumps.", "The red cross shrinks."]


class StrictJudge(RulesJudge):
    """A judge that finds no event of bars entailed, and that fails on crosses."""

    def answer(self, task: Any) -> Any:
        if isinstance(task, EventEntailment) and any("cross" in event for event in task.events):
            raise JudgeError("a cross")
        answer = super().answer(task)
        if isinstance(task, EventEntailment):
            return [EventVerdict(each.event, "neutral", "") if "bar" in each.event else each for each in answer]
        return answer


def arrays(table: list[list[int]]) -> ScoreArrays:
    values = dict(zip(PAIRS, np.array(table, float).T, strict=True))
    names = [str(i) for i in range(len(table))]
    return ScoreArrays(names, names, names, "messages", values)


def test_kappa() -> None:
    table = [[20, 0, 5, 0], [0, 5, 5, 15]]  # of two samples, 50 verdicts
    figures = agreement_figures(arrays(table), np.array([[1.0, 1.0], [0.0, 1.0]]))
    assert figures["Agreement"] == pytest.approx([0.7, 0.6])
    # Shares of yes 25/50 and 30/50; for the second sample alone, 5/25 and 5/25.
    assert figures["Cohen's kappa"] == pytest.approx([(0.7 - 0.5) / 0.5, (0.6 - 0.68) / 0.32])


def test_kappa_of_equal_and_opposite_judges() -> None:
    ones = np.ones((1, 1))
    assert agreement_figures(arrays([[3, 0, 0, 4]]), ones)["Cohen's kappa"] == 1.0
    assert agreement_figures(arrays([[0, 2, 2, 0]]), ones)["Cohen's kappa"] == -1.0
    assert np.isnan(agreement_figures(arrays([[4, 0, 0, 0]]), ones)["Cohen's kappa"])


def dream_row(events: list[str], reference_events: list[str], idx: int) -> Prediction:
    extra_info = {"events": reference_events}
    return prediction(
        "DREAM/a", idx, " ".join(events), " ".join(reference_events) or "Nothing.", extra_info=extra_info, vid=idx
    )


def test_events() -> None:
    rows = [
        dream_row(EVENTS[:3], EVENTS[:2], 0),  # 2 of 2 and 2 of 3; the judge of B rejects the bar
        dream_row(EVENTS[:1], EVENTS[1:3], 1),  # 0 of 2 and 0 of 1
        dream_row([], [], 2),
        dream_row(EVENTS[:1], EVENTS[3:], 3),  # B fails
    ]
    agreement = measure_agreement("dream", AUTODQ, rows, [RulesJudge(), StrictJudge()])
    assert (agreement.num_samples, agreement.num_failed) == (4, 1)
    assert agreement.counts == {
        "reference events": {"both yes": 1, "only A": 1, "only B": 0, "both no": 2},
        "predicted events": {"both yes": 1, "only A": 1, "only B": 0, "both no": 2},
        "all": {"both yes": 2, "only A": 2, "only B": 0, "both no": 4},
    }
    assert agreement.verdicts["all"].figures["Agreement"] == 6 / 8
    low, high = agreement.verdicts["all"].intervals["Agreement"]
    assert low < 6 / 8 <= high
    assert [each.num_scored for each in agreement.scores] == [4, 3]
    assert agreement.scores[0].figures["Action Recall"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert agreement.scores[1].figures["Action Recall"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert agreement.difference.num_shared == 3
    assert agreement.difference.figures["Action Recall"] == pytest.approx(-1 / 2 / 3)


class YesJudge(RulesJudge):
    def answer(self, task: Any) -> Any:
        return AnswerVerdict("yes", 3.0) if isinstance(task, AnswerComparison) else super().answer(task)


def test_answers() -> None:
    rows = [prediction("MSVD-QA-val", i, text, "a man", vid=i) for i, text in enumerate(["A man.", "a boy", "the man"])]
    agreement = measure_agreement("msvd-qa", OPEN_QA, rows, [RulesJudge(), YesJudge()])
    assert agreement.counts == {"answers": {"both yes": 1, "only A": 0, "only B": 2, "both no": 0}}
    assert agreement.scores[0].figures["Accuracy"] == pytest.approx(100 / 3)
    assert agreement.difference.figures["Accuracy"] == pytest.approx(200 / 3)


def test_reference_events_that_the_annotation_lacks_are_those_of_the_first_judge() -> None:
    rows = [prediction("DREAM/a", 1, EVENTS[0], " ".join(EVENTS[:2]))]
    agreement = measure_agreement("dream", AUTODQ, rows, [RulesJudge(), StrictJudge()])
    assert agreement.counts["reference events"] == {"both yes": 1, "only A": 0, "only B": 0, "both no": 1}


def run(*flags: str) -> None:
    main(parse(list(flags)))


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads((GOLDENS / "oe-msvd" / "judge.json").read_text(encoding="utf-8"))
    predictions = str(GOLDENS / "oe-msvd" / "predictions")
    with scripted_judge(table) as server:
        flags = ("--predictions", predictions, "--judge_cache", str(tmp_path / "replies.sqlite"))
        run(server.url, "rules", *flags, "--output", str(tmp_path))
        with pytest.raises(InputError, match="A and B are the same judge"):
            run(server.url, server.url, *flags)
    text = capsys.readouterr().out
    assert "msvd-qa: A needs about 25 replies" in text and "B - A, 19 samples" in text
    result = json.loads((tmp_path / "agreement.json").read_text())
    assert result["judges"]["B"] == {"judge": "rules"}
    assert result["benchmarks"]["msvd-qa"]["num_failed"] == 6
    assert sum(result["benchmarks"]["msvd-qa"]["counts"]["answers"].values()) == 19


def test_benchmarks_without_a_judge(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row("TVBench/a", 1, "A", "A")) + "\n")
    flags = ("rules", "http://127.0.0.1:9/v1", "--predictions", str(tmp_path))
    with pytest.raises(InputError, match="tvbench is scored without a judge"):
        run(*flags, "--benchmarks", "tvbench")
    with pytest.raises(InputError, match=r"lacks rows of DREAM, .* It contains rows of TVBench"):
        run(*flags)
