"""DPO's reference log-probabilities on disk: those of the weights, computed once, and never used for another model."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from tokenizers import AddedToken

from configs.dpo_7b import get_config
from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import Processor, ProcessorOptions
from tarsier_jax.weights.digest import digest_weights
from tarsier_jax.weights.streaming import convert_hf
from tests import reference
from train.config import TrainConfig, read_config
from train.data.reference_logprobs import ReferenceFile, fingerprint
from train.debug_data import TINY, write_debug_clips
from train.dpo import dpo_objective
from train.loop import train
from train.lora import LoraConfig
from train.run import open_run
from train.untrained import write_untrained


def debug_config(**over: Any) -> TrainConfig:
    config = get_config("debug")
    config.data.num_workers, config.eval_captions, config.num_train_steps, config.optimizer.warmup_steps = 0, 0, 1, 1
    config.update_from_flattened_dict(over)
    return read_config(config)


def compute(workdir: Path, **over: Any) -> None:
    """Runs the work before the first step."""
    config = debug_config(**over)
    run = open_run(config, workdir, dpo_objective(config))
    assert run.objective.before
    with jax.set_mesh(run.spec.mesh):
        run.objective.before(run)


@pytest.mark.slow
def test_the_disk_gives_what_the_weights_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that is its reference gets rewards of 0, in training and on held-out pairs."""
    clips, file = write_debug_clips(tmp_path / "clips"), tmp_path / "reference"
    lines = clips.read_text().splitlines()
    for name, some in (("train", lines[:5]), ("held_out", lines[5:])):
        (clips.parent / f"{name}.jsonl").write_text("\n".join(some))
    over = {"data.train": str(clips.parent / "train.jsonl"), "data.eval": str(clips.parent / "held_out.jsonl")}
    over |= {"data.media_root": str(clips.parent), "model": str(write_untrained(tmp_path / "model", TINY))}
    over |= {"dpo.reference": str(file)}
    config = debug_config(**over)
    train(config, tmp_path / "run", dpo_objective(config))
    printed = capsys.readouterr().out
    assert "reference 8/8" in printed and "not used" not in printed
    values = measured(tmp_path / "run")
    assert values["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert values["eval_loss"] == pytest.approx(math.log(2), abs=1e-3)
    rewards = [values[f"{part}reward_{answer}"] for part in ("", "eval_") for answer in ("chosen", "rejected")]
    assert rewards == pytest.approx([0] * 4, abs=1e-3)
    assert values["eval_log_prob_chosen"] < -10

    written = tmp_path / "reference.0"
    records = written.read_text().splitlines()
    assert len(records) == 8 and {"key", "chosen", "rejected"} == json.loads(records[0]).keys()
    written.write_text("\n".join([*records[:5], records[5][:20]]))  # a pass that is killed while it writes
    compute(tmp_path / "again", **over)
    assert "reference 3/3" in capsys.readouterr().out
    assert set(written.read_text().splitlines()) > set(records)

    for _ in range(2):
        compute(tmp_path / "other", **over, **{"processor.n_frames": 2})
    printed = capsys.readouterr().out
    assert printed.count("reference: 8 of 8 records") == printed.count("reference 8/8") == 1


def measured(workdir: Path) -> dict[str, float]:
    """Everything that a run of one step logs."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def test_random_frames_have_no_stored_reference(tmp_path: Path) -> None:
    over = {"dpo.reference": str(tmp_path / "file"), "processor.video_sampler": "v2"}
    with pytest.raises(InputError, match=r"sampler v1, or --config.dpo.reference=weights"):
        dpo_objective(debug_config(**over))


# Keys of records


@pytest.fixture
def run(tmp_path: Path, processor: Processor) -> Any:
    """As much of a run as decides the log-probabilities."""
    reference.make_reference(tmp_path / "model", reference.TINY)
    spec = SimpleNamespace(config=processor.config, lora=LoraConfig())
    config = SimpleNamespace(processor=processor.options)
    return SimpleNamespace(config=config, spec=spec, processor=processor, model_directory=tmp_path / "model")


def with_processor(run: Any, **over: Any) -> Any:
    return SimpleNamespace(**{**vars(run), "processor": dataclasses.replace(run.processor, **over)})


def with_model(run: Any, **over: Any) -> Any:
    spec = SimpleNamespace(config=dataclasses.replace(run.spec.config, **over), lora=LoraConfig())
    return SimpleNamespace(**{**vars(run), "spec": spec})


def test_a_fingerprint_is_of_all_that_decides_log_probabilities(run: Any) -> None:
    options = [
        {"n_frames": 8},
        {"max_n_frames": 64},
        {"max_pixels": 10_000},
        {"min_pixels": 100},
        {"max_pixels_per_sample": 100_000},
        {"max_seq_len": 512},
        {"force_frames_n_divisible": 2},
        {"double_frames": False},
    ]
    runs = [
        run,
        *(with_processor(run, options=ProcessorOptions(**option)) for option in options),
        with_processor(run, chat_template=run.processor.chat_template + " "),
        with_processor(run, image=dataclasses.replace(run.processor.image, mean=(0.5, 0.5, 0.5))),
        with_processor(run, image=dataclasses.replace(run.processor.image, double_frames=False)),
        with_model(run, dtype="bfloat16"),
        with_model(run, text=dataclasses.replace(run.spec.config.text, rope_theta=10_000.0)),
    ]
    before = [fingerprint(r) for r in runs]
    assert len(set(before)) == len(runs)
    assert fingerprint(with_model(run, attention="splash", remat="full")) == before[0]  # the same numbers
    run.processor.tokenizer.add_tokens([AddedToken("<frame>")])
    assert fingerprint(run) not in before


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_every_byte_of_the_weights_counts(tmp_path: Path, run: Any) -> None:
    directory, converted = run.model_directory, tmp_path / "converted"
    convert_hf(directory, converted)
    shutil.copytree(directory, tmp_path / "copy")
    shutil.copytree(converted, tmp_path / "converted_copy")
    assert digest_weights(tmp_path / "copy") == digest_weights(directory)
    assert digest_weights(tmp_path / "converted_copy") == digest_weights(converted)
    (weights,) = (tmp_path / "copy").glob("*.safetensors")
    chunk = max((tmp_path / "converted_copy" / "params").glob("*/c/**/*"), key=lambda path: path.stat().st_size)
    for file in (weights, chunk):
        flip(file, at=file.stat().st_size * 2 // 3)
    assert digest_weights(tmp_path / "copy") != digest_weights(directory)
    assert digest_weights(tmp_path / "converted_copy") != digest_weights(converted)


def pair(source: str, chosen: str = "A.", **video: Any) -> dict[str, Any]:
    question = [{"type": "video", "video": {"video_file": source, **video}}, {"type": "text", "text": "What happens?"}]
    answer = {"type": "text", "chosen": chosen, "rejected": "Nothing."}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": [answer]}]}


def test_a_key_is_of_the_pair_and_its_media(tmp_path: Path, run: Any, clip: str) -> None:
    file = ReferenceFile(str(tmp_path / "reference"))
    file.open(run, tmp_path / "reference")
    video = tmp_path / "a.mp4"
    video.write_bytes(b"first")
    line = pair(str(video))
    keys = [file.key(line), file.key(pair(str(video), "B.")), file.key(pair(str(video), fps=2)), file.key(pair(clip))]
    assert file.key(pair(str(video))) == keys[0]  # of equal lines
    video.write_bytes(b"another")
    shutil.copy(f"{clip}/0.png", f"{clip}/40.png")
    keys += [file.key(line), file.key(pair(clip)), file.key(pair(str(tmp_path / "none.mp4")))]
    assert len(set(keys)) == len(keys)
    with pytest.raises(InputError, match="lacks the reference log-probabilities of the pair"):
        file.of(line)
