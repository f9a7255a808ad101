"""`python -m eval.run`: predictions, scores and the score sheet, and errors in one line."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from eval import run as program
from eval.benchmarks import GROUPS
from eval.evaluation import BASELINES
from eval.run import main, parse
from tarsier_jax.errors import InputError
from tarsier_jax.programs import run
from tests.eval.benchmarks.rows import caption_row, question_row, write_rows
from tests.eval.oracle import OracleEngines, SampleProcessor, reference_of
from train.micro.checkpoint import MICRO
from train.untrained import write_untrained

SHAPES = ("--benchmarks", "shapes", "shapes-qa")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> OracleEngines:
    """Engines that know every answer, in place of those of the program."""
    oracle = OracleEngines(reference_of)
    monkeypatch.setattr(program, "Engines", lambda *_: oracle)
    return oracle


def tvbench(directory: Path, rows: list[dict[str, Any]], *more: str) -> list[str]:
    """Writes rows, and returns the flags of a run over them."""
    write_rows(directory / "annotations" / "TVBench.jsonl", rows)
    (directory / "videos").mkdir(exist_ok=True)
    folders = [f"--{name}={directory / name}" for name in ("annotations", "output")]
    return ["--benchmarks", "tvbench", *folders, f"--data_root={directory / 'videos'}", *more]


def touch(directory: Path, name: str) -> None:
    path = directory / "videos" / "TVBench" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.slow
def test_a_model_that_knows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its descriptions score nothing. Started again, the program generates nothing; other settings are refused."""
    model = write_untrained(tmp_path / "model", MICRO)
    output = tmp_path / "output"
    flags = [*SHAPES, f"--model={model}", f"--output={output}", "--limit=1", "--slots=2", "--max_pixels=12544"]
    assert main(parse(flags)) == 0
    summary = json.loads((output / "eval_records" / "shapes.json").read_text())
    assert summary["figures"]["F1 Score"] in (0, None) and summary["counts"]["scored"] == 6
    assert summary["settings"]["max_pixels"] == 12544 and summary["settings"]["model"] == str(model)
    out, err = capsys.readouterr()
    assert "Shapes/held_out" in out and "ShapesQA" not in err and "shapes: " in err
    predictions = [(output / "predictions" / f"{name}.jsonl").read_bytes() for name in ("shapes", "shapes-qa")]
    assert main(parse(flags)) == 0 and capsys.readouterr().out == out
    assert [(output / "predictions" / f"{name}.jsonl").read_bytes() for name in ("shapes", "shapes-qa")] == predictions
    with pytest.raises(InputError, match="dtype was 'float32' and is 'bfloat16'"):
        main(parse([*flags, "--dtype=bfloat16"]))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="weights was "):
        main(parse(flags))


def test_files_of_a_run(tmp_path: Path, engines: OracleEngines, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SHAPES, f"--output={tmp_path}", "--limit=2", "--baselines", "--n_frames=4", "--max_new_tokens=8"]
    assert main(parse(flags)) == 0
    out = capsys.readouterr().out
    assert "Shapes/held_out" in out and "no_video" in out and "limit=2" in out and "n_frames=4" in out
    assert (tmp_path / "report.html").stat().st_size and (
        tmp_path / "eval_records" / "ShapesQA_eval_result.txt"
    ).exists()
    for directory in ("predictions", *(f"baselines/{name}" for name in BASELINES)):
        assert len((tmp_path / directory / "shapes.jsonl").read_text().splitlines()) == 12
    assert len(engines.rows) == (12 + 2) * 4


def test_missing_videos_end_the_run(tmp_path: Path, engines: OracleEngines, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [question_row(i, f"a/{i}.mp4") for i in range(15)]
    flags = tvbench(tmp_path, rows)
    touch(tmp_path, "a/3.mp4")
    assert run(functools.partial(main, parse(flags))) == 1
    err = capsys.readouterr().err
    assert "tvbench: 14 videos of 14 samples are missing" in err and err.count(".mp4") == 10
    assert "error: 14 videos are missing" in err and "--allow_missing" in err and not engines.rows
    assert main(parse([*flags, "--allow_missing"])) == 0
    assert len(engines.rows) == 1
    assert "15 samples: 1 scored, 0 unreadable, 0 judge failed, 14 missing" in capsys.readouterr().out


@pytest.mark.usefixtures("engines")
def test_failed_samples_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = tvbench(tmp_path, [question_row(1, "a/1.mp4"), question_row(2, "a/2.mp4")])
    touch(tmp_path, "a/1.mp4")
    touch(tmp_path, "a/2.mp4")

    def fail(processor: SampleProcessor, sample: dict) -> None:
        raise InputError("a/1.mp4 is empty.")

    with monkeypatch.context() as patch:
        patch.setattr(SampleProcessor, "__call__", fail)
        assert main(parse(flags)) == 1
    err = capsys.readouterr().err
    assert "2 samples have no answer" in err and "TVBench/Action Count_1: a/1.mp4 is empty." in err
    assert main(parse(flags)) == 0 and "have no answer" not in capsys.readouterr().err


def test_a_judge_is_needed_before_anything_runs(tmp_path: Path, engines: OracleEngines) -> None:
    write_rows(tmp_path / "DREAM-1k.jsonl", [caption_row(1)])
    flags = [
        "--benchmarks",
        "dream",
        f"--annotations={tmp_path}",
        f"--data_root={tmp_path}",
        f"--output={tmp_path}/out",
    ]
    with pytest.raises(InputError, match=r"The metric of dream needs a judge\. Pass --judge URL"):
        main(parse(flags))
    assert not engines.rows and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--limit=0", "--limit 0 must be at least 1"),
        ("--n_frames=0", "n_frames must be at least 1"),
        ("--max_new_tokens=0", "max_new_tokens"),
        ("--max_pixels=0", "max_pixels must be at least 1"),
    ],
)
def test_bad_numbers(tmp_path: Path, flag: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(parse([*SHAPES, f"--output={tmp_path / 'out'}", flag]))
    assert not (tmp_path / "out").exists()


def test_files_of_a_benchmark_are_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--annotations"):
        main(parse(["--benchmarks", "tvbench", f"--output={tmp_path / 'out'}"]))
    assert parse(["--benchmarks", *GROUPS, f"--output={tmp_path}"]).annotations is None


def test_unknown_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--benchmarks", "shapes", "shape", "--output", str(tmp_path)])
    assert "There is no benchmark shape. Use shapes" in capsys.readouterr().err


def test_missing_model_and_unwritable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for output, model, message in (
        (tmp_path / "output", str(tmp_path / "missing"), "missing"),
        (tmp_path / "file", "embedded", "file"),
    ):
        flags = [*SHAPES, "--limit=1", f"--output={output}", f"--model={model}"]
        assert run(functools.partial(main, parse(flags))) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert not (tmp_path / "output" / "settings.json").exists()  # the next run may name another model
