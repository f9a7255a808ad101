"""Annotations in archives: the samples of the files that they were made of, and a description without the path."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import Processor
from tests.processing.test_archives import STRUCT, write_table, write_tar
from tests.train.texts import write_lines
from train.data.annotations import describe_files, mix_files, num_lines, read_sample
from train.data.archives import ArchiveAnnotations
from train.data.samples import prepare

PROMPT = "Describe the video in detail."


def chat(answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"<video>{PROMPT}"}, {"role": "assistant", "content": answer}]


@pytest.fixture
def clips(render: Callable[..., Path]) -> list[Path]:
    """Three videos with different pictures."""
    filters = {"plain.mp4": "null", "negative.mp4": "negate", "small.mp4": "scale=48:32"}
    return [render(name, "-vf", filter_) for name, filter_ in filters.items()]


@pytest.fixture
def archives(clips: list[Path], tmp_path: Path) -> dict[str, str]:
    """The same three samples, as lines beside files, in two tar files, and in Parquet and Arrow files."""
    lines = [{"messages": chat(f"Clip {i}."), "videos": [str(clip)]} for i, clip in enumerate(clips)]
    first, second, third = (clip.read_bytes() for clip in clips)
    write_tar(
        tmp_path / "s-0.tar",
        {"a.mp4": first, "a.txt": "Clip 0.", "b.json": {"messages": chat("Clip 1.")}, "b.mp4": second},
    )
    conversation = [{"from": "human", "value": f"<video>{PROMPT}"}, {"from": "gpt", "value": "Clip 2."}]
    write_tar(tmp_path / "s-1.tar", {"c.json": {"conversations": conversation, "video": "old/c.mp4"}, "c.mp4": third})
    videos = pa.array([[{"bytes": data, "path": None}] for data in (first, second, third)], pa.list_(STRUCT))
    for name in ("rows.parquet", "rows.arrow"):
        write_table(tmp_path / name, messages=[line["messages"] for line in lines], videos=videos)
    names = {name: str(tmp_path / name) for name in ("s-*.tar", "rows.parquet", "rows.arrow")}
    return {"lines": write_lines(tmp_path / "lines.jsonl", lines), **names}


@pytest.mark.parametrize("name", ["s-*.tar", "rows.parquet", "rows.arrow"])
def test_samples_are_those_of_the_files(name: str, archives: dict[str, str], processor: Processor) -> None:
    def examples(files: str) -> list[Any]:
        lines: Any = mix_files(files, 0, repeat=False)
        rng = np.random.default_rng(0)
        samples = [prepare(read_sample(lines[i].text, "/media"), rng) for i in range(len(lines))]
        return [processor(sample, training=True) for sample in samples]

    every, expected = examples(archives[name]), examples(archives["lines"])
    assert len(every) == len(expected) == 3
    for one, other in zip(every, expected, strict=True):
        for field in ("input_ids", "labels", "pixel_values", "grid_thw"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_the_place_of_a_sample(archives: dict[str, str], tmp_path: Path) -> None:
    samples = ArchiveAnnotations(archives["s-*.tar"])
    places = [(Path(samples[i].file).name, samples[i].number) for i in range(len(samples))]
    assert places == [("s-0.tar", 1), ("s-0.tar", 2), ("s-1.tar", 1)]
    lines: Any = mix_files(f"{archives['s-*.tar']}=1,{archives['lines']}=3", 0, repeat=True)
    assert sum(Path(lines[i].file).suffix == ".tar" for i in range(8)) == 2
    assert num_lines(f"{archives['s-*.tar']}=1,{archives['lines']}=3") == 6


def test_archives_are_described_by_their_annotations(archives: dict[str, str], tmp_path: Path) -> None:
    """Independently of their path. The content of media is not part of it, as for lines of paths."""
    (tmp_path / "moved").mkdir()
    for name in ("s-0.tar", "s-1.tar"):
        shutil.copy(tmp_path / name, tmp_path / "moved" / name)
    (before,) = describe_files(archives["s-*.tar"])
    assert describe_files(str(tmp_path / "moved")) == [before] and before.startswith("3 samples, blake2b ")
    assert describe_files(f"{archives['s-*.tar']}=2") == [f"{before}, weight 2"]
    write_tar(tmp_path / "moved" / "s-1.tar", {"c.json": {"messages": chat("Another answer.")}, "c.mp4": b"x"})
    assert describe_files(str(tmp_path / "moved")) != [before]


def test_a_bad_sample_is_not_an_error_of_the_run(tmp_path: Path) -> None:
    members = {"a.mp4": b"x", "b.mp4": b"x", "b.json": "{", "c.json": json.dumps({"messages": chat("C.")})}
    samples = ArchiveAnnotations(str(write_tar(tmp_path / "a.tar", members)))
    for i, reason in enumerate((r"a\.mp4 has neither messages nor a caption", r"b\.json is not JSON")):
        with pytest.raises(InputError, match=reason):
            _ = samples[i].text
    assert json.loads(samples[2].text) == {"messages": chat("C.")}
    with pytest.raises(InputError, match=r"empty\.tar are empty"):
        ArchiveAnnotations(str(write_tar(tmp_path / "empty.tar", {"README": "x"})))
    with pytest.raises(InputError, match="compressed"):
        mix_files(str(tmp_path / "a.tar.gz"), 0, repeat=True)
