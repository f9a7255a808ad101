"""A run from the start to its summary, and the ways in which it stops."""

import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

import tarsier_jax
from configs.recap_7b import get_config
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.weights import convert_to_hf
from tests.train.texts import open_numbers
from train.best import BestCheckpoint, read_best
from train.checkpoints import Checkpoints, DataProgress
from train.config import TrainConfig, read_config
from train.debug_data import write_debug_clips, write_debug_data
from train.loop import NonFiniteLoss, Summary, Terminator, train
from train.sft import sft_objective
from train.state import TrainState
from train.workdir import saved_steps


def debug_config(**over: Any) -> TrainConfig:
    config = get_config("debug")
    config.num_train_steps, config.data.num_workers, config.eval_every = 4, 0, 4
    config.processor.n_frames = 3
    config.update_from_flattened_dict(over)
    return read_config(config)


def train_sft(config: TrainConfig, workdir: Path) -> Summary:
    config = write_debug_data(config, workdir)
    return train(config, workdir, sft_objective(config))


@pytest.mark.slow
def test_a_run_and_what_it_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = write_debug_clips(tmp_path / "clips")
    lines = clips.read_text().splitlines()
    missing = lines[0].replace("0.gif", "missing.gif")
    (clips.parent / "train.jsonl").write_text("\n".join([*lines, missing, "{not json"]))
    workdir = tmp_path / "run"
    data = {
        "data.train": str(clips.parent / "train.jsonl"),
        "data.eval": str(clips),
        "data.media_root": str(clips.parent),
    }
    over = {"optimizer.peak_lr": 1e-3, "data.max_bad_fraction": 0.5, "best_metric": "eval_loss", "eval_every": 3}
    config = debug_config(**data, profile_step=1, **over)
    summary = train_sft(config, workdir)
    assert (summary.step, summary.stop_signal, summary.compilations) == (4, False, 0)

    printed = capsys.readouterr().out
    assert "step 4/4  loss" in printed and "eval_loss" in printed and "finished step 4" in printed
    assert printed.count("annotations.jsonl line") == 4  # captions of two held-out clips at the steps 3 and 4
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 3, 3, 4, 4]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "data_wait", "padding"} <= logged[0].keys()
    assert logged[4]["loss"] < logged[0]["loss"] and 0 < logged[5]["eval_loss"] < logged[3]["eval_loss"] < 7
    assert logged[5]["eval_loss"] < 6 and read_best(workdir) == BestCheckpoint(4, "eval_loss", logged[5]["eval_loss"])
    assert saved_steps(workdir) == [3, 4]  # the step 3 was saved because it was the best
    events = EventAccumulator(str(workdir))
    events.Reload()
    assert [event.step for event in events.Scalars("eval_loss")] == [3, 4]
    for i in range(2):  # captions, and their frames
        assert [event.step for event in events.Tensors(f"caption_{i}")] == [3, 4]
        _, picture = events.Images(f"caption_{i}_frames")
        assert picture.step == 4 and picture.width > 4 * 120 and picture.height > 120
    assert list(workdir.glob("plugins/profile/*/*.xplane.pb"))

    bad = [json.loads(line) for line in (workdir / "bad_samples_0.jsonl").read_text().splitlines()]
    assert {sample["line"] for sample in bad} <= {9, 10} and bad
    assert any("missing.gif does not exist" in s["reason"] or "no JSON" in s["reason"] for s in bad)

    model, processor = tarsier_jax.load(workdir / "model")
    question = json.loads(lines[0])["messages"][:1]
    question[0]["content"][0]["video"]["video_file"] = str(clips.parent / "0.gif")
    (answer,) = tarsier_jax.generate(model, processor, [{"messages": question}], max_new_tokens=8)
    assert answer
    for layout in ("tarsier2", "qwen2_vl"):
        out = tmp_path / layout
        convert_to_hf(workdir / "model", out, layout)
        assert (out / "model.safetensors").exists()
        tokenizer = AutoTokenizer.from_pretrained(out)
        video = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
        rendered = tokenizer.apply_chat_template(video, tokenize=False, add_generation_prompt=True)
        assert "user\n<|vision_start|><|video_pad|><|vision_end|>What?<|im_end|>\n" in rendered
        plain = [{"role": "user", "content": "What?"}]
        assert "user\nWhat?<|im_end|>\n" in tokenizer.apply_chat_template(plain, tokenize=False)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    config = debug_config(**{"optimizer.peak_lr": 1e20, "optimizer.warmup_steps": 0, "save_every": 1, "eval_every": 0})
    with pytest.raises(NonFiniteLoss, match=r"At step (\d).*lower optimizer.peak_lr") as raised:
        train_sft(config, tmp_path)
    step = int(str(raised.value).split("At step ")[1][0])
    (file,) = tmp_path.glob("non_finite_step_*.npz")
    rows = np.load(file)
    assert file.name == f"non_finite_step_{step}_process_0.npz" and rows["input_ids_0"].shape == (1, 448)
    kept = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept and max(kept) < step  # nothing that came of it was saved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_noticed(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, stop = list[int](), Terminator(Checkpoints(tmp_path, keep=1))
    monkeypatch.setattr("os._exit", ended.append)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with stop:
        assert not stop.requested(3) and stop.signal == 0
        signal.raise_signal(number)
        wait_for(lambda: stop.requested(4))
        assert stop.signal == number and not ended
        signal.raise_signal(signal.SIGINT)
        wait_for(lambda: stop.signal == signal.SIGINT)
        wait_for(lambda: ended == ([130] if number == signal.SIGINT else []))  # at the second Ctrl-C
    assert capfd.readouterr().err.count("Press Ctrl-C again to end at once") == 1
    assert before == {n: signal.getsignal(n) for n in before}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_only_bad_samples(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("3\n" * 3)
    config = debug_config(**{"data.train": str(tmp_path / "bad.jsonl"), "data.eval": ""})
    with pytest.raises(
        InputError, match=r"11 of 11 samples.*max_bad_fraction 0.01.*bad.jsonl line \d: .*not a JSON object"
    ):
        train_sft(config, tmp_path / "run")


@pytest.mark.slow
def test_held_out_samples_that_cannot_be_used_lose_no_training(tmp_path: Path) -> None:
    clips, bad = write_debug_clips(tmp_path / "clips"), tmp_path / "bad.jsonl"
    bad.write_text("3\n" * 200)
    data = {"data.train": str(clips), "data.eval": str(bad), "data.media_root": str(clips.parent)}
    config = debug_config(**data)
    with pytest.raises(InputError, match=r"bad.jsonl line \d"):
        train_sft(config, tmp_path / "run")
    assert Checkpoints(tmp_path / "run", keep=1).latest() == config.num_train_steps


def test_no_space_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState(jnp.int32(3), {"decoder/norm/weight": jnp.ones(2**18)}, {}, ())
    data = open_numbers()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, state, data, DataProgress())
    checkpoints.wait()
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(2**19))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GiB, but only 0\.0 GiB are free.*resumes from its last"):
        checkpoints.save(4, state, data, DataProgress())
    assert checkpoints.latest() == 3
    restored, _ = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state), data)
    np.testing.assert_array_equal(restored.params["decoder/norm/weight"], state.params["decoder/norm/weight"])
