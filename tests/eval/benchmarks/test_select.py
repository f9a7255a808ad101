"""Names of benchmarks and groups."""

import argparse
import json
from pathlib import Path

import pytest

from eval.benchmarks import BENCHMARKS, GROUPS, add_benchmarks_flag, select
from tarsier_jax.errors import InputError

CASES = json.loads((Path(__file__).parents[1] / "goldens" / "benchmark_names.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case["asked"]) or "none")
def test_names_of_the_original(case: dict[str, list[str]]) -> None:
    """Differences: no benchmark runs twice, names behind `all` count, and an unknown name is an error."""
    if "no-such-thing" in case["asked"]:
        with pytest.raises(InputError, match="There is no benchmark no-such-thing"):
            select(case["asked"])
        return
    expected = list(dict.fromkeys(case["run"]))
    if "all" in case["asked"][:-1]:
        expected += case["asked"][case["asked"].index("all") + 1 :]
    assert [benchmark.name for benchmark in select(case["asked"])] == expected


def test_some_benchmarks_are_in_no_group() -> None:
    others = {benchmark.name for benchmark in BENCHMARKS} - {benchmark.name for benchmark in select(list(GROUPS))}
    assert others == {"tvbench", "favor-bench", "shapes", "shapes-qa"}


def test_an_unknown_name_names_close_ones(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_benchmarks_flag(parser)
    assert parser.parse_args(["--benchmarks", "TVBench", "dream"]).benchmarks == ["TVBench", "dream"]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--benchmarks", "dream", "tvbensh"])
    assert "There is no benchmark tvbensh. Use tvbench" in capsys.readouterr().err


def test_records() -> None:
    for field in ("name", "dataset"):
        assert len({getattr(benchmark, field) for benchmark in BENCHMARKS}) == len(BENCHMARKS)
    assert sum(select(["dream"])[0].subsets.values()) == 1000
    assert sum(select(["tvbench"])[0].subsets.values()) == 2525
    (dream,) = select(["dream"])
    assert dream.expected_counts(["DREAM/youtube"]) == dream.subsets
    assert dream.expected_counts(["DREAM/youtube", "DREAM/shorts"]) == {}
