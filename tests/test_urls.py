"""Paths of programs that are URLs of an object store: fsspec's memory."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convert import hf_to_orbax, merge_lora, orbax_to_hf
from eval import compare, score
from eval.evaluation import BenchmarkInput
from eval.shapes import __main__ as shapes
from infer import quickstart
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.families import load_config
from tarsier_jax.files import local_path
from tarsier_jax.mirror import destination, mirrored, new_output
from tarsier_jax.storage import local_copy
from tarsier_jax.weights.adapter import linear_parameters, read_adapter, write_adapter
from tarsier_jax.weights.digest import digest_adapter
from tests.eval.benchmarks.rows import question_row
from tests.weights.conftest import bits
from train import dpo, export
from train.config import TrainConfig
from train.data.packing import DataConfig
from train.debug_data import TINY
from train.run import TrainRun
from train.untrained import write_untrained

PROGRAMS = {
    "convert": ("hf_to_orbax", "merge_lora", "orbax_to_hf", "verify"),
    "infer": ("caption", "chat", "describe", "quickstart", "serve.__main__", "web"),
    "eval": ("compare", "judges.__main__", "run", "score", "shapes.__main__"),
    "train": ("export", "pairs"),
}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the main function of a program with words as its command line."""

    def call(program: Any, *words: str) -> int:
        monkeypatch.setattr("sys.argv", [program.__name__, *words])
        return program.main() if program.__name__.startswith("convert") else program.main(program.parse())

    return call


def test_flags_of_local_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database in SQLite, a secret, and the root of a file server, which opens files below a descriptor."""

    class Parsed(Exception):
        pass

    def keep(parser: Any, _: object = None) -> None:
        raise Parsed(parser)

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", keep)
    flags = set()
    for package, names in PROGRAMS.items():
        for name in names:
            module = importlib.import_module(f"{package}.{name}")
            with pytest.raises(Parsed) as parsed:
                getattr(module, "parse", module.main)()
            actions = parsed.value.args[0]._actions
            flags |= {f"{package}.{name} {each.dest}" for each in actions if each.type is local_path}
    judges = {f"{name} judge_cache" for name in ("eval.judges.__main__", "eval.run", "eval.score", "train.pairs")}
    server = {"infer.serve.__main__ api_key_file", "infer.serve.__main__ media_root"}
    assert flags == judges | server


def test_conversions(store: Any, call: Any, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_untrained(machine / "random", TINY)
    store.put(f"{source}/", "/b/hf/", recursive=True)
    assert call(hf_to_orbax, "memory://b/hf", "memory://b/orbax/") == 0
    assert "memory://b/orbax/: " in capsys.readouterr().out
    assert call(orbax_to_hf, "memory://b/orbax", "memory://b/back") == 0
    assert bits(local_copy("memory://b/back")) == bits(source)
    assert call(hf_to_orbax, "memory://b/hf", "memory://b/orbax") == 1
    assert "memory://b/orbax exists already" in capsys.readouterr().err
    config = load_config(source)
    first = next(p for p in linear_parameters(config) if p.path[0] == "decoder")
    shapes = (*first.shape[:-2], 2, first.shape[-1]), (*first.shape[:-1], 2)
    matrices = {first.path: tuple(np.ones(shape, np.float32) for shape in shapes)}
    with new_output("memory://b/adapter") as out:
        write_adapter(out, config, matrices, 2.0, "base")  # pyright: ignore[reportArgumentType]
    local = local_copy("memory://b/adapter")
    assert read_adapter("memory://b/adapter", config).matrices.keys() == {first.path}
    assert digest_adapter("memory://b/adapter") == digest_adapter(local)
    assert call(merge_lora, "memory://b/orbax", "memory://b/adapter", "memory://b/merged") == 0
    assert call(orbax_to_hf, "memory://b/merged", str(machine / "merged")) == 0
    ours, before = bits(machine / "merged"), bits(source)
    changes = {name.partition("layers.")[2] for name in before if ours[name] != before[name]}
    assert changes == {name.partition("layers.")[2] for name in first.names}  # the layouts differ before that
    assert not list((machine / "cache" / "tarsier_jax" / "mirrors").iterdir())


def test_a_new_directory_whose_upload_fails(store: Any, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its configuration, which is uploaded last, it cannot be mistaken for a model."""

    def put(self: Any, names: list[str], targets: list[str], **_: Any) -> None:
        if any(name.endswith("config.json") for name in names):
            raise ConnectionError("reset by peer")
        store.pipe({target: b"" for target in targets})

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put", put)
        message = rf"memory://b/m cannot be written \(reset by peer\).* files are in {machine}"
        with pytest.raises(InputError, match=message), new_output("memory://b/m") as out:
            out.mkdir()
            for name in ("config.json", "model.safetensors"):
                (out / name).write_text("{}")
    assert store.find("/b/m") == ["/b/m/model.safetensors"] and (out / "config.json").exists()
    with pytest.raises(KeyError), new_output("memory://b/n") as out:
        out.mkdir()
        raise KeyError
    assert not out.exists() and not store.exists("/b/n")
    with pytest.raises(CheckpointError, match="memory://b/m exists already"), new_output("memory://b/m"):
        pass


def test_the_url_of_a_path(machine: Path) -> None:
    with mirrored("memory://b/run") as directory:
        assert destination(directory / "model" / "config.json") == "memory://b/run/model/config.json"
        assert destination(directory) == "memory://b/run"
    assert destination(machine / "model") == str(machine / "model")


def test_an_exported_model(store: Any, call: Any, machine: Path, monkeypatch: Any, capsys: Any) -> None:
    def export_checkpoint(workdir: str, step: str, output: Path | None) -> Path:
        path = Path(output or f"{workdir}/model-3")
        path.mkdir()
        (path / "config.json").write_text("{}")
        return path

    monkeypatch.setattr(export, "export_checkpoint", export_checkpoint)
    for flags, name in ((("--output", "memory://b/model"), "memory://b/model"), ((), str(machine / "model-3"))):
        assert call(export, str(machine), *flags) == 0
        assert capsys.readouterr().out == f"{name}\n"
    assert store.cat("/b/model/config.json") == b"{}"


def test_scores(store: Any, call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [question_row(idx) for idx in range(4)]
    store.pipe("/b/annotations/TVBench.jsonl", "\n".join(map(json.dumps, rows)).encode())
    for run, letters in (("one", "BBAA"), ("two", "BBBA")):
        for row, letter in zip(rows, letters, strict=True):
            row["messages"][-1]["content"][-1]["text"] = letter
        store.pipe(f"/b/{run}/predictions/tvbench.jsonl", "\n".join(map(json.dumps, rows)).encode())
        store.pipe(f"/b/{run}/settings.json", json.dumps({"model": f"model {run}"}).encode())
    common = ("--benchmarks", "tvbench", "--annotations", "memory://b/annotations")
    with pytest.warns(UserWarning, match="lacks samples of the benchmark"):
        assert call(score, "--predictions", "memory://b/one/predictions", *common, "--output", "memory://b/scores") == 0
    assert call(score, "--predictions", "memory://b/two/predictions/tvbench.jsonl", *common) == 0
    out = capsys.readouterr().out
    for directory in ("scores", "two/predictions"):
        assert f"The score sheet is memory://b/{directory}/report.html." in out
        assert store.exists(f"/b/{directory}/report.html")
    assert json.loads(store.cat("/b/scores/eval_records/tvbench.json"))["settings"]["model"] == "model one"
    runs = ("memory://b/scores", "memory://b/two/predictions")
    call(compare, *runs, "--output", "memory://b/comparison")
    assert "memory://b/comparison contains compare.md" in capsys.readouterr().out
    differences = json.loads(store.cat("/b/comparison/compare.json"))["tvbench"]["differences"]
    assert list(differences) == ["predictions"]
    assert compare.name_runs([*runs, "memory://c/scores"]) == [*runs, "memory://c/scores"]
    with pytest.raises(InputError, match="memory://b/scores/ is named twice"):
        compare.name_runs([runs[0], "memory://b/scores/"])


def test_videos_of_a_benchmark(store: Any) -> None:
    rows = [question_row(1, "a/1.avi"), question_row(2, "a/2.avi"), question_row(3, "a/3.avi")]
    rows.append(question_row(4, video_file="mine/4.mp4"))
    store.pipe("/b/annotations/TVBench.jsonl", "\n".join(map(json.dumps, rows)).encode())
    store.pipe({"/b/v/TVBench/a/1.avi": b"", "/b/v/a/2.webm": b"", "/b/v/mine/4.mp4": b"", "/b/v/a/3.txt": b""})
    benchmark = next(each for each in compare.BENCHMARKS if each.name == "tvbench")
    with pytest.warns(UserWarning, match="lacks samples of the benchmark"):
        source = BenchmarkInput.load(benchmark, "memory://b/annotations", "memory://b/v/")
    files = [row["messages"][0]["content"][0]["video"]["video_file"] for row in source.rows]
    assert files == [f"memory://b/v/{name}" for name in ("TVBench/a/1.avi", "a/2.webm", "mine/4.mp4")]
    assert source.missing == ["memory://b/v/TVBench/a/3.avi"]
    with pytest.raises(InputError, match=r"memory://b/none/TVBench\.jsonl does not exist"):
        BenchmarkInput.load(benchmark, "memory://b/none", "memory://b/v")


def test_generated_files(store: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(shapes, "--output", "memory://b/shapes", "--clips", "1", "--gif") == 0
    assert {name for name in store.find("/b/shapes") if "mirror" not in name} == {
        f"/b/shapes/{name}" for name in ("0.gif", "descriptions.jsonl", "questions.jsonl")
    }
    monkeypatch.setattr(
        quickstart.tarsier_jax, "load", lambda _: (None, SimpleNamespace(options=TrainConfig().processor))
    )
    monkeypatch.setattr(quickstart, "describe_file", lambda *_: SimpleNamespace(caption="A clip."))
    assert call(quickstart, "--output", "memory://b/demo.png") == 0
    assert store.cat("/b/demo.png").startswith(b"\x89PNG")


def test_reference_log_probabilities(store: Any, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def write(run: TrainRun, reference: Any, _: int) -> None:
        counts.append(len(reference))
        with reference.append(0) as file:
            file.write(json.dumps({"key": str(len(reference)), "chosen": -1.0, "rejected": -2.0}) + "\n")

    monkeypatch.setattr(dpo, "write_reference", write)
    monkeypatch.setattr("train.data.reference_logprobs.fingerprint", lambda _: "")
    config = TrainConfig(data=DataConfig(max_samples_per_seq=2))
    config = dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, reference="memory://b/reference"))
    objective = dpo.dpo_objective(config)
    nothing: Any = None
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(machine / name))  # another machine
        assert objective.before
        objective.before(TrainRun(config, machine, machine, nothing, nothing, objective))
    assert counts == [0, 1] and store.cat("/b/reference.0").count(b"\n") == 2
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(InputError, match="memory://b/reference is in an object store, which a run of several"):
        dpo.dpo_objective(config)
