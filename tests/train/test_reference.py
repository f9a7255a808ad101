"""DPO's reference log-probabilities on disk: the same as those of the weights, and never computed twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.dpo_7b import get_config
from tarsier_jax.errors import InputError
from tests.train.programs import curve
from train.builtin import write_clips
from train.config import parse_config
from train.dpo import dpo_job
from train.loop import train


def run(workdir: Path, **over: Any) -> list[tuple[int, float, float]]:
    config = get_config("debug")
    config.steps, config.data.workers, config.eval_every, config.optimizer.peak_lr = 3, 0, 0, 1e-3
    config.update_from_flattened_dict(over)
    train(parse_config(config), workdir, dpo_job)
    return curve(workdir)


def test_the_disk_gives_what_the_weights_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, clips = tmp_path / "reference.jsonl", write_clips(tmp_path / "clips")
    data = {"data.train": str(clips), "data.media_root": str(clips.parent)}
    from_weights = run(tmp_path / "weights", **data)
    from_disk = run(tmp_path / "disk", **data, **{"dpo.reference": str(file)})
    assert "reference 8/8" in capsys.readouterr().out
    for (_, loss, norm), (_, expected, expected_norm) in zip(from_disk, from_weights, strict=True):
        assert (loss, norm) == pytest.approx((expected, expected_norm), rel=1e-4)

    written = Path(f"{file}.0")
    lines = written.read_text().splitlines()
    assert len(lines) == 8 and {"key", "chosen", "rejected"} == json.loads(lines[0]).keys()
    written.write_text("\n".join([*lines[:5], lines[5][:20]]) + "\n")  # a run cut short
    run(tmp_path / "again", **data, steps=0, **{"dpo.reference": str(file), "optimizer.warmup_steps": 0})
    assert "reference 3/3" in capsys.readouterr().out
    assert sorted(set(written.read_text().splitlines()) & set(lines)) == sorted(lines)


def test_random_frames_have_no_stored_reference(tmp_path: Path) -> None:
    over = {"dpo.reference": str(tmp_path / "file"), "processor.video_sampler": "v2"}
    with pytest.raises(InputError, match=r"sampler v1, or --config.dpo.reference=weights"):
        run(tmp_path, **over)
