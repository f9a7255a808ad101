"""Which settings a resumed run keeps, and which may change."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.recap_7b import get_config
from tarsier_jax.errors import InputError
from train.config import read_config
from train.debug_data import write_debug_clips, write_debug_data
from train.dpo import dpo_objective
from train.run import TrainRun, open_run
from train.sft import sft_objective


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the debug data."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def open_debug(files: Path) -> Callable[..., TrainRun]:
    def open_debug(workdir: Path, make_objective: Any = sft_objective, **over: Any) -> TrainRun:
        config = get_config("debug")
        config.update_from_flattened_dict(over)
        config = write_debug_data(read_config(config), files)
        return open_run(config, workdir, make_objective(config))

    return open_debug


@pytest.fixture(scope="module")
def started_sft(tmp_path_factory: pytest.TempPathFactory, open_debug: Callable[..., TrainRun]) -> Path:
    workdir = tmp_path_factory.mktemp("sft")
    open_debug(workdir)
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    return workdir


@pytest.fixture
def started(tmp_path: Path, started_sft: Path) -> Path:
    return Path(shutil.copytree(started_sft, tmp_path / "run"))


@pytest.mark.parametrize(
    ("key", "value", "was"),
    [
        ("seed", 5, "0"),
        ("data.seq_len", 512, "448"),
        ("data.vision_bins", 9, "8"),
        ("data.patches_per_bin", 72, "160"),
        ("data.frames_per_bin", 3, "10"),
        ("data.max_samples_per_seq", 3, "4"),
        ("data.global_batch_size", 8, "4"),
        ("data.shuffle", False, "True"),
        ("data.packing_buffer", 5, "4"),
        ("processor.n_frames", 2, "4"),
        ("processor.max_pixels", 3136, "12544"),
        ("processor.video_sampler", "v2", "'v1'"),
        ("optimizer.freeze", ("vision/.*",), r"\[\]"),
        ("optimizer.muon_params", ("decoder/layers/mlp/.*",), r"\[\]"),
        ("optimizer.mu_dtype", "bfloat16", "'float32'"),
    ],
)
def test_what_decides_the_data_or_the_state_is_kept(
    open_debug: Callable[..., TrainRun], started: Path, key: str, value: Any, was: str
) -> None:
    with pytest.raises(InputError, match=rf"belongs to another run: {key} was {was} and is now .*another --workdir"):
        open_debug(started, **{key: value})


def test_what_does_not_is_free_and_named(open_debug: Callable[..., TrainRun], started: Path) -> None:
    free = {
        "data.num_workers": 1,
        "log_every": 2,
        "save_every": 7,
        "max_to_keep": 3,
        "eval_every": 0,
        "profile_step": 3,
    }
    free |= {"num_train_steps": 40, "optimizer.peak_lr": 1e-6, "grad_accum_steps": 2, "data.max_bad_fraction": 0.5}
    run = open_debug(started, **free)
    assert {change.split(" was ")[0] for change in run.changes} == free.keys()
    assert "optimizer.peak_lr was 2e-05 and is now 1e-06" in run.changes
    assert len((started / "runs.jsonl").read_text().splitlines()) == 2


def test_the_number_of_processes_may_change(open_debug: Callable[..., TrainRun], started: Path) -> None:
    """An earlier version kept it, and the number of processes that load different rows, in run.json."""
    run = started / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "processes": 2, "row_groups": 2}))
    open_debug(started)
    assert not json.loads(run.read_text()).keys() & {"processes", "row_groups"}


@pytest.mark.parametrize("make_objective", [sft_objective, dpo_objective])
def test_the_steps_of_epochs_are_the_same_on_resume(
    open_debug: Callable[..., TrainRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_objective: Any
) -> None:
    """Estimated once: 8 lines, rows of 4 samples (2 pairs), and 4 rows per step."""
    over = {"dpo.reference": str(tmp_path / "reference")} if make_objective is dpo_objective else {}
    steps = [5, 9] if make_objective is dpo_objective else [3, 5]
    first = open_debug(tmp_path / "run", make_objective, num_epochs=9.0, **over)
    assert first.config.num_train_steps == steps[1]
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    monkeypatch.setattr("train.run.measure_samples", lambda *_: pytest.fail("measured again"))
    for epochs, expected in ((9.0, steps[1]), (5.0, steps[0])):
        assert (
            open_debug(tmp_path / "run", make_objective, num_epochs=epochs, **over).config.num_train_steps == expected
        )


def test_epochs_shorter_than_the_warm_up(open_debug: Callable[..., TrainRun], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="warmup_steps is 2, but the run has 1 steps"):
        open_debug(tmp_path, num_epochs=0.5)


def of_files(*files: Path) -> dict[str, Any]:
    return {"data.train": ",".join(map(str, files)), "data.eval": "", "data.media_root": str(files[0].parent)}


def test_annotations_are_told_by_their_content(open_debug: Callable[..., TrainRun], tmp_path: Path) -> None:
    a = write_debug_clips(tmp_path / "clips")
    b = Path(shutil.copy(a, a.with_name("b.jsonl")))
    lines = a.read_text().splitlines(keepends=True)
    b.write_text("".join(lines[::-1]))
    workdir = tmp_path / "run"
    open_debug(workdir, **of_files(a, b))
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    open_debug(workdir, **of_files(Path(a.rename(a.with_name("moved.jsonl"))), b))
    for files in (f"{b},{b.with_name('moved.jsonl')}", f"{b}", f"{b.with_name('moved.jsonl')}=2,{b}=1"):
        with pytest.raises(InputError, match=r"data.train was \['\d+ bytes, blake2b \w+', .*\] and is now"):
            open_debug(workdir, **{**of_files(b), "data.train": files})
    for content in ("".join(lines), "".join([*lines[::-1], lines[0]]), "".join(lines[:0:-1])):
        b.write_text(content)
        with pytest.raises(InputError, match=r"data.train was"):
            open_debug(workdir, **of_files(b.with_name("moved.jsonl"), b))


@pytest.mark.parametrize(
    ("file", "old", "new", "fact"),
    [
        ("tokenizer.json", '"square"', '"squares"', "tokenizer"),
        ("chat_template.jinja", "user", "User", "chat_template"),
    ],
)
def test_tokenizer_and_template_are_kept(
    open_debug: Callable[..., TrainRun], files: Path, started: Path, file: str, old: str, new: str, fact: str
) -> None:
    path = Path(shutil.copytree(files / "random_model", started / "model")) / file
    path.write_text(path.read_text().replace(old, new) + " ")
    with pytest.raises(InputError, match=f"{fact} was "):
        open_debug(started, model=str(path.parent))


def test_dpo_keeps_its_reference(open_debug: Callable[..., TrainRun], files: Path, tmp_path: Path) -> None:
    open_debug(tmp_path, dpo_objective)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(InputError, match=r"dpo.beta was 0.1 and is now 0.2"):
        open_debug(tmp_path, dpo_objective, **{"dpo.beta": 0.2})
    other = shutil.copytree(files / "random_model", tmp_path / "other")
    with pytest.raises(InputError, match=r"model was '.*random_model' and is now '.*other'"):
        open_debug(tmp_path, dpo_objective, model=str(other))
    with pytest.raises(InputError, match=r"program was 'dpo' and is now 'sft'"):
        open_debug(tmp_path, sft_objective)


def test_the_recorded_configuration_is_the_one_that_was_given(files: Path, started: Path) -> None:
    start = json.loads((started / "runs.jsonl").read_text())
    given = dataclasses.asdict(write_debug_data(read_config(get_config("debug")), files))
    assert start["config"] == json.loads(json.dumps(given)) and start["config"]["data"]["vision_bins"] == -1
