"""1,000 samples against a judge with faults, and a run that is killed: no reply is lost, and none is paid for twice."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.judges import make_predictions, make_table, request_counts, scripted_judge
from eval.judges.cache import ReplyCache
from eval.judges.endpoint import EndpointJudge, EndpointOptions
from eval.judges.prompts import DEFAULT_PROMPTS
from eval.metrics.autodq import AUTODQ
from eval.metrics.scores import SampleScore
from eval.predictions import Prediction

NUM_SAMPLES, TIMEOUT = 1000, 3.0
pytestmark = pytest.mark.slow


def score(url: str, path: Path, predictions: Sequence[Prediction]) -> list[SampleScore]:
    options = EndpointOptions(f"{url}/v1", timeout=TIMEOUT, first_wait=0.05)
    with ReplyCache(path) as cache:
        return list(AUTODQ.score(predictions, EndpointJudge(options, DEFAULT_PROMPTS, cache)))


def test_faults_change_no_score_and_repeat_no_answered_request(tmp_path: Path) -> None:
    predictions = make_predictions(NUM_SAMPLES)
    faulty, sound = (make_table(predictions, faults, TIMEOUT + 1) for faults in (0.05, 0.0))
    with scripted_judge(faulty, 0.01, tmp_path) as url:
        scores = score(url, tmp_path / "faulty.sqlite", predictions)
        counts = request_counts(url)
        # A second run costs nothing.
        assert [each.values for each in score(url, tmp_path / "faulty.sqlite", predictions)] == [
            each.values for each in scores
        ]
        assert request_counts(url) == counts
    assert [each.status for each in scores] == ["scored"] * NUM_SAMPLES
    assert counts == {row["name"]: len(row["replies"]) for row in faulty["rows"]}
    num_faults = sum(len(row["replies"]) - 1 for row in faulty["rows"])
    assert num_faults > 100
    verdicts = [_expected(sound["rows"][3 * i : 3 * i + 3]) for i in range(NUM_SAMPLES)]
    assert [(each.values["recall"], each.values["precision"]) for each in scores] == verdicts


def _expected(rows: Sequence[dict]) -> tuple[float, float]:
    """Returns recall and precision of the last replies of a sample's rows: extraction, recall, precision."""
    recall, precision = (row["replies"][-1]["text"].count('"entailment"') / 2 for row in rows[1:])
    return recall, precision


PROGRAM = """
    import pathlib, sys
    from benchmarks.judges import make_predictions
    from tests.eval.judges.test_load import score
    score(sys.argv[1], pathlib.Path(sys.argv[2]), make_predictions(200))
"""


def test_a_killed_run_repeats_no_stored_request(tmp_path: Path) -> None:
    predictions, path = make_predictions(200), tmp_path / "replies.sqlite"
    with scripted_judge(make_table(predictions, 0.0, 0.0), 0.3, tmp_path) as url:
        program = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRAM), url, str(path)])
        while sum(request_counts(url).values()) < 300:
            assert program.poll() is None
            time.sleep(0.02)
        program.kill()
        program.wait()
        num_before = sum(request_counts(url).values())
        with ReplyCache(path) as cache:
            num_stored = len(cache)
        assert num_before - 64 <= num_stored < 600
        scores = score(url, path, predictions)
        assert [each.status for each in scores] == ["scored"] * 200
        # The requests that were in flight are sent again, all others once.
        assert sum(request_counts(url).values()) == num_before + 600 - num_stored
        assert max(request_counts(url).values()) <= 2
