"""Runs side by side: differences, published figures, and warnings about runs that are not comparable."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import BENCHMARKS
from eval.compare import STRICT, Comparison, compare_runs, main, markdown, name_runs, parse, reference_estimates
from eval.metrics.scores import OVERALL, SampleScore
from eval.report import read_scores, write_report
from tarsier_jax.errors import InputError
from tests.eval.scores import METRIC, benchmark_scores, random_scores, sample_score

METRICS = {"quiz": METRIC, "tvbench": METRIC}


def _write(directory: Path, scores: Sequence[SampleScore], benchmark: str = "quiz", **settings: Any) -> Path:
    result = benchmark_scores(scores, settings={"model": directory.name, "judge": {"model": "a"}, **settings})
    write_report(
        directory, [dataclasses.replace(result, benchmark=dataclasses.replace(result.benchmark, name=benchmark))]
    )
    return directory


def _compare(*directories: Path, reference: bool = False) -> Comparison:
    (comparison,) = compare_runs({path.name: read_scores(path) for path in directories}, METRICS, reference)
    return comparison


def _answers(num_samples: int, num_correct: int, **fields: Any) -> list[SampleScore]:
    subsets = ("Quiz/A", "Quiz/B")
    return [sample_score(i, float(i < num_correct), subsets[i % 2], **fields) for i in range(num_samples)]


def test_differences(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "a", _answers(100, 50)), _write(tmp_path / "b", _answers(100, 60))
    comparison = _compare(first, second)
    differences = comparison.differences["b"]
    assert list(differences) == ["Quiz/A", "Quiz/B", OVERALL, STRICT]
    assert {name: each.num_shared for name, each in differences.items()} == {
        "Quiz/A": 50,
        "Quiz/B": 50,
        OVERALL: 100,
        STRICT: 100,
    }
    for each in differences.values():
        low, high = each.intervals["Accuracy"]
        assert each.figures["Accuracy"] == pytest.approx(10) and 0 < low < 10 < high < 20
    text = markdown(comparison)
    assert not comparison.warnings and "Warning" not in text
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {OVERALL} ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2].startswith("50.0 [") and cells[3].startswith("60.0 [")
    assert cells[4].startswith("+10.0 [+") and cells[4].endswith("(n = 100)")


def test_an_unreadable_answer_counts_in_the_strict_difference_only(tmp_path: Path) -> None:
    first = _write(tmp_path / "a", _answers(10, 10))
    second = _write(tmp_path / "b", [*_answers(10, 10)[:5], *_answers(10, 10, status="unreadable")[5:]])
    differences = _compare(first, second).differences["b"]
    assert differences[OVERALL].num_shared == 5 and differences[OVERALL].figures == {"Accuracy": 0.0}
    assert differences[STRICT].num_shared == 10 and differences[STRICT].figures == {"Accuracy": -50.0}


def test_other_settings_are_visible(tmp_path: Path) -> None:
    first = _write(tmp_path / "a", _answers(10, 5), frames=8)
    judge = _write(tmp_path / "b", _answers(10, 5), judge={"model": "b"}, frames=16)
    comparison = _compare(first, judge)
    assert comparison.warnings == ["The figures are not comparable, because these settings differ: judge.model (a, b)."]
    assert comparison.settings == {"model": ["a", "b"], "judge.model": ["a", "b"], "frames": ["8", "16"]}
    text = markdown(comparison)
    assert "**Warning:** The figures are not comparable" in text and "| frames " in text


def test_other_versions_are_no_other_judge(tmp_path: Path) -> None:
    first, second = (
        _write(tmp_path / name, _answers(4, 2), judge={"model": "a", "openai": name}) for name in ("1.0", "2.0")
    )
    comparison = _compare(first, second)
    assert not comparison.warnings and comparison.settings["judge.openai"] == ["1.0", "2.0"]


def test_other_rows_and_prompts_are_visible(tmp_path: Path) -> None:
    first = _write(tmp_path / "a", _answers(10, 5))
    rows = _write(tmp_path / "b", _answers(10, 5, row_format="text"))
    assert "row_format (messages, text)" in _compare(first, rows).warnings[0]
    prompts = _write(tmp_path / "c", _answers(10, 5, prompt="Another?"))
    assert _compare(first, prompts).warnings == [
        "The figures are not comparable: prompt of 10 samples differ in a and c."
    ]


def test_other_samples_are_visible(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "a", _answers(10, 5)), _write(tmp_path / "b", _answers(8, 5))
    (warning,) = _compare(first, second).warnings
    assert "a has 10, b has 8, and 8 are in both" in warning


def test_published_figures_by_initials(tmp_path: Path) -> None:
    subsets = ["TVBench/Action Antonym", "TVBench/Action Count"]
    comparison = _compare(_write(tmp_path / "a", random_scores(40, subsets), "tvbench"), reference=True)
    recap = comparison.references["Tarsier2-Recap-7b"]
    assert [(each.subset, each.num_samples) for each in recap] == [
        (subsets[0], 320),
        (subsets[1], 536),
        (OVERALL, 2525),
    ]
    assert [each.figures for each in recap] == [{"Accuracy": 91.2}, {"Accuracy": 43.1}, {"Accuracy": 54.0}]
    (row,) = [line for line in markdown(comparison).splitlines() if line.startswith(f"| {OVERALL} ")]
    assert [cell.strip() for cell in row.strip("|").split("|")][3:] == ["54.0", "54.7"]


def test_every_published_figure_has_a_name_of_the_metric() -> None:
    tables = json.loads(Path("eval/reference_tables.json").read_text())
    names = {
        "dream": ["F1 Score", "Action Recall", "Action Precision"],
        "tvbench": ["Accuracy"],
        "favor-bench": ["Accuracy"],
    }
    for benchmarks in tables.values():
        for benchmark, rows in benchmarks.items():
            estimates = reference_estimates(rows, [row["Task"] for row in rows])
            assert len(estimates) == len(rows) and all(list(each.figures) == names[benchmark] for each in estimates)


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.compare.BENCHMARKS", [benchmark_scores(_answers(1, 1)).benchmark])
    runs = [str(_write(tmp_path / name, _answers(20, num_correct))) for name, num_correct in (("a", 5), ("b|c", 15))]
    main(parse([*runs, "--output", str(tmp_path / "out")]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "compare.md", "quiz.png"]
    content = json.loads((tmp_path / "out" / "compare.json").read_text())["quiz"]
    assert content["differences"]["b|c"][OVERALL]["figures"] == {"Accuracy": 50.0}
    assert (tmp_path / "out" / "compare.md").read_text() in capsys.readouterr().out


def test_the_benchmarks_are_those_of_the_evaluation() -> None:
    assert {"dream", "tvbench"} <= {benchmark.name for benchmark in BENCHMARKS}


def test_names_of_runs(tmp_path: Path) -> None:
    assert name_runs([f"{tmp_path}/x/a", f"{tmp_path}/b"]) == ["a", "b"]
    assert name_runs([f"{tmp_path}/x/a", f"{tmp_path}/a"]) == [f"{tmp_path}/x/a", f"{tmp_path}/a"]
    with pytest.raises(InputError, match="is named twice"):
        name_runs([f"{tmp_path}/a", f"{tmp_path}/x/../a"])


def test_nothing_to_compare(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "a", _answers(4, 2)), _write(tmp_path / "b", _answers(4, 2), "tvbench")
    with pytest.raises(InputError, match="no benchmark in common: a has quiz; b has tvbench"):
        _compare(first, second)
    with pytest.raises(InputError, match="No figures of quiz are published"):
        _compare(first, reference=True)
    with pytest.raises(InputError, match="Pass a second one, or --reference"):
        main(parse([str(first)]))
    with pytest.raises(InputError, match="is not the output of a run"):
        main(parse([str(first), str(tmp_path / "absent")]))
    other = _write(tmp_path / "c", _answers(4, 2), "other")
    with pytest.raises(InputError, match="no benchmark other in this version"):
        _compare(other, other)
