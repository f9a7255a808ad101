import collections
import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest
from PIL import Image

from tarsier_jax.config import ClipVisionConfig, Qwen2VisionConfig
from tarsier_jax.errors import InputError
from tarsier_jax.processing.image import Qwen2ImageProcessor, smart_resize
from tarsier_jax.processing.packing import RowShape, RowSpace, UnitSize
from tarsier_jax.processing.processor import Processor, ProcessorOptions
from tests.train.texts import ROWS, former_state, load, open_rows, write_lines, write_texts
from train.config import TrainConfig
from train.data.annotations import AnnotationLine, mix_files
from train.data.loading import RowLoader
from train.data.packing import (
    FORGIVEN,
    BadSample,
    DataConfig,
    LoadLine,
    PackedRow,
    PackingConfig,
    PackUnit,
    check_share,
    fit_packing,
)
from train.run import Objective
from train.sft import sft_objective

SHAPE = RowShape(tokens=64, bins=2, patches=16, frames=2, samples=8)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """24 texts of 3 to 40 tokens."""
    return write_texts(tmp_path / "texts.jsonl", np.random.default_rng(0).integers(3, 41, 24).tolist())


@pytest.fixture
def packer(processor: Processor) -> PackingConfig:
    return PackingConfig(
        processor, SHAPE, packing_buffer=3, max_bad_fraction=0.01, dtype="float32", extra={"weight": (8, 1)}
    )


def take(n: int, rows: RowLoader) -> list[PackedRow]:
    """The rows of n steps, one after the other."""
    return [row for _ in range(n) for row in next(rows)]


def rows_of(n: int, files: str, packer: PackingConfig, **options: Any) -> list[PackedRow]:
    rows = open_rows(files, packer, **options)
    taken = take(n, rows)
    rows.close()
    return taken


def contents(rows: Sequence[PackedRow]) -> list[tuple]:
    """All that is in the rows, to compare bit for bit."""
    arrays = [tuple(np.asarray(x).tobytes() for x in jax.tree.leaves((row.batch, row.extra))) for row in rows]
    return [(row.keys, row.num_drawn, row.num_truncated, row.bad, *a) for row, a in zip(rows, arrays, strict=True)]


# The mixture


@pytest.mark.parametrize(("weights", "share"), [(("", ""), 0.25), (("=3", "=1"), 0.75), (("=1", "=9"), 0.1)])
def test_weights_are_honoured(tmp_path: Path, weights: tuple[str, str], share: float) -> None:
    a, b = write_texts(tmp_path / "a", [1] * 10), write_texts(tmp_path / "b", [1] * 30)
    lines = mix_files(f"{a}{weights[0]},{b}{weights[1]}", 0, repeat=True)
    drawn = [(line.file, line.number) for line in (lines[i] for i in range(400))]
    of_a = [number for file, number in drawn if file == a]
    assert abs(len(of_a) - 400 * share) <= 1
    counts = collections.Counter(of_a)
    assert len(counts) == 10 and max(counts.values()) - min(counts.values()) <= 1


def numbers(lines: grain.MapDataset, first: int, n: int) -> list[int]:
    return [lines[i].number for i in range(first, first + n)]


def test_every_epoch_is_another_order_of_all_lines(texts: str) -> None:
    lines = mix_files(texts, 0, repeat=True)
    first, second, third = (numbers(lines, 24 * epoch, 24) for epoch in range(3))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(1, 25))
    assert len({tuple(first), tuple(second), tuple(third), tuple(sorted(first))}) == 4


def test_the_seed_chooses_the_order(texts: str) -> None:
    orders = [numbers(mix_files(texts, seed, repeat=True), 0, 48) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_held_out_lines_come_once_and_in_order(tmp_path: Path, texts: str) -> None:
    other = write_texts(tmp_path / "other", [1] * 3)
    lines = mix_files(f"{texts},{other}", 0, repeat=False)
    assert [(line.file, line.number) for line in lines] == [
        *((texts, i) for i in range(1, 25)),
        *((other, i) for i in range(1, 4)),
    ]


# Rows


def test_a_row_takes_what_fits_of_the_next_few(tmp_path: Path, packer: PackingConfig) -> None:
    files = write_texts(tmp_path / "a.jsonl", [30, 40, 20, 30, 10, 64])
    rows = rows_of(4, files, packer, repeat=False, num_rows=1)
    assert [row.keys for row in rows] == [("0", "2", "4"), ("1",), ("3",), ("5",)]
    assert [int(row.batch.lengths[0]) for row in rows] == [60, 40, 30, 64]
    assert [row.num_drawn for row in rows] == [6, 0, 0, 0]
    np.testing.assert_array_equal(rows[0].extra["weight"][0, :, 0], [30, 20, 10, 0, 0, 0, 0, 0])


def test_rows_are_empty_once_held_out_samples_run_out(tmp_path: Path, packer: PackingConfig) -> None:
    files = write_texts(tmp_path / "a.jsonl", [30, 40, 50])
    rows = rows_of(3, files, packer, repeat=False)
    assert [row.keys for row in rows] == [("0",), ("1",), ("2",), *[()] * 9]
    assert not any(row.batch.segment_ids.any() for row in rows[3:])


def test_row_r_packs_every_fourth_sample(texts: str, packer: PackingConfig) -> None:
    """Over three epochs: none left out, none twice, only the few that wait are still to come."""
    lines = mix_files(texts, 0, repeat=True)
    rows = rows_of(8, texts, packer)
    for r in range(ROWS):
        mine = rows[r::ROWS]
        num_drawn = sum(row.num_drawn for row in mine)
        ids = [json.loads(lines[r + ROWS * i].text)["id"] for i in range(num_drawn)]
        keys = [key for row in mine for key in row.keys]
        waiting = collections.Counter(ids) - collections.Counter(keys)
        assert waiting.total() == num_drawn - len(keys) <= packer.packing_buffer
        assert mine[0].keys[0] == ids[0]
    assert sum(row.num_drawn for row in rows) > 72


def test_every_held_out_sample_is_in_one_row(texts: str, packer: PackingConfig) -> None:
    rows = rows_of(8, texts, packer, repeat=False)
    assert sorted((key for row in rows for key in row.keys), key=int) == [str(i) for i in range(24)]
    assert rows[-1].keys == ()


def test_the_order_and_the_random_choices_of_earlier_versions(texts: str, packer: PackingConfig) -> None:
    """The hash is that of the rows of grain's iterators, one thread per row, which earlier versions used."""
    rows = rows_of(8, texts, packer)
    assert [row.keys for row in rows[:2]] == [("21", "18", "23"), ("2", "7", "3")]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.keys, row.num_drawn, row.num_truncated]).encode())
        for x in jax.tree.leaves((row.batch, row.extra)):
            digest.update(np.asarray(x).tobytes())
    assert digest.hexdigest()[:16] == "025016643bdb963e"


def share_of(process: int, processes: int) -> list[int]:
    return np.split(np.arange(ROWS), processes)[process].tolist()


def test_rows_continue_on_other_numbers_of_processes_and_workers(texts: str, packer: PackingConfig) -> None:
    """2 processes, then 1, 4 and 1 again, with other numbers of threads: the rows are those of one process."""
    expected, states = contents(rows_of(8, texts, packer)), []
    for step, (processes, workers) in enumerate([(2, 2), (1, 16), (4, 1), (1, 0)]):
        loaders = [
            open_rows(texts, packer, local_rows=share_of(process, processes), num_workers=workers)
            for process in range(processes)
        ]
        for loader in loaders:
            if states:
                loader.set_state(states)
        rows = [row for _ in range(2) for loader in loaders for row in next(loader)]
        assert contents(rows) == expected[2 * ROWS * step : 2 * ROWS * (step + 1)]
        states = json.loads(json.dumps([loader.get_state() for loader in loaders]))
        for loader in loaders:
            loader.close()
    assert sum(len(row["waiting"]) for row in states[0].values()) == 12  # in no row yet


@pytest.mark.parametrize(("before", "waiting"), [(0, 0), (1, 12), (3, 12)])
def test_rows_go_on_where_they_were(texts: str, packer: PackingConfig, before: int, waiting: int) -> None:
    rows = open_rows(texts, packer)
    take(before, rows)
    state = json.dumps(rows.get_state())
    expected = take(2, rows)
    rows.close()
    again = open_rows(texts, packer)
    take(3, again)  # its earlier state does not matter
    again.set_state([json.loads(state)])
    assert json.dumps(again.get_state()) == state
    assert contents(take(2, again)) == contents(expected)
    again.close()
    assert sum(len(row["waiting"]) for row in json.loads(state).values()) == waiting  # in no row yet


def test_states_of_another_number_of_rows(texts: str, packer: PackingConfig) -> None:
    rows = open_rows(texts, packer)
    with pytest.raises(ValueError, match="it has the states of 3 rows, not of 4"):
        rows.set_state([{str(row): {"num_drawn": 0, "num_bad": 0, "waiting": []} for row in range(3)}])
    rows.close()


@pytest.mark.parametrize(
    ("workers", "shares", "processes"), [(0, 1, 1), (1, 1, 1), (2, 1, 1), (4, 1, 1), (0, 2, 2), (0, 4, 4), (0, 2, 4)]
)
def test_states_of_earlier_versions(
    texts: str, packer: PackingConfig, workers: int, shares: int, processes: int
) -> None:
    """There, share i of n had the rows i, i + n, ..., and processes of one tensor group had the same share."""
    rows = open_rows(texts, packer)
    take(1, rows)
    state = list(rows.get_state().values())
    expected = contents(take(1, rows))
    rows.close()
    former = [former_state(state[process * shares // processes :: shares], workers) for process in range(processes)]
    again = open_rows(texts, packer)
    again.set_state(former)
    assert contents(take(1, again)) == expected
    again.close()


@pytest.mark.parametrize("num_rows", [1, 4, 8])
def test_as_many_samples_decode_at_once_as_workers(texts: str, packer: PackingConfig, num_rows: int) -> None:
    """Of one row, or of several: three are neither a divisor nor a multiple of four or eight rows."""
    num_running, most, lock = 0, 0, threading.Lock()

    def counted(sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        nonlocal num_running, most
        with lock:
            num_running += 1
            most = max(most, num_running)
        time.sleep(0.005)
        with lock:
            num_running -= 1
        return load(sample, rng)

    rows = open_rows(texts, packer, load=counted, num_workers=3, num_rows=num_rows)
    take(1, rows)
    first, most = most, 0
    deadline = time.monotonic() + 20
    while most < 3 and time.monotonic() < deadline:
        take(1, rows)
    rows.close()
    assert first == most == 3  # on filling the buffers, and later


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_decoded_samples_of_a_row_are_bounded(tmp_path: Path, packer: PackingConfig, num_workers: int) -> None:
    """A row ready and the buffer full, and as many more samples as keep the workers busy, however long nobody asks."""
    decoded = []

    def counted(sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        decoded.append(sample["id"])
        return load(sample, rng)

    files = write_texts(tmp_path / "long.jsonl", [60] * 24)  # a row each
    rows = open_rows(files, packer, num_rows=1, load=counted, num_workers=num_workers)
    take(1, rows)
    deadline = time.monotonic() + 30
    bound = 2 + packer.packing_buffer + num_workers - 1
    while len(decoded) < bound and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(decoded) == bound
    rows.close()


def test_waiting_samples_are_decoded_in_parallel_on_resume(texts: str, packer: PackingConfig) -> None:
    """Three of each of four rows: none returns before all are in progress."""
    rows = open_rows(texts, packer)
    take(1, rows)
    state = rows.get_state()
    rows.close()
    barrier, waiting = threading.Barrier(12, timeout=30), threading.Semaphore(12)

    def together(sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        if waiting.acquire(blocking=False):
            barrier.wait()
        return load(sample, rng)

    again = open_rows(texts, packer, load=together, num_workers=12)
    again.set_state([state])
    take(1, again)
    again.close()
    assert not barrier.broken


def test_a_step_of_rows_is_made_ahead(tmp_path: Path, packer: PackingConfig) -> None:
    """One worker makes all eight while the step before is computed: every row is one long text, with two waiting."""
    made = []

    def counted(sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        made.append(sample["id"])
        return load(sample, rng)

    rows = open_rows(write_texts(tmp_path / "long.jsonl", [60] * 24), packer, num_rows=8, load=counted)
    take(1, rows)
    deadline = time.monotonic() + 30
    while len(made) < 8 * 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    rows.close()
    assert len(made) >= 8 * 5


# Samples that cannot be used


def test_bad_lines_are_skipped_and_counted(tmp_path: Path, packer: PackingConfig) -> None:
    texts = [{"id": str(i), "tokens": 30} for i in range(3)]
    lines = [
        texts[0],
        "{'id': 0}",
        texts[1],
        "[1, 2]",
        {"id": "x", "tokens": 0},
        {"id": "y", "tokens": 65},
        "{}",
        texts[2],
    ]
    files = write_lines(tmp_path / "a.jsonl", lines)
    rows = rows_of(2, files, packer, repeat=False, num_rows=1)
    assert [row.keys for row in rows] == [("0", "1"), ("2",)]
    assert [(row.num_drawn, len(row.bad)) for row in rows] == [(8, 5), (0, 0)]
    assert {(bad.file, bad.line) for bad in rows[0].bad} == {(files, line) for line in (2, 4, 5, 6, 7)}
    reasons = [bad.reason for bad in rows[0].bad]
    assert reasons[0].startswith("The line is not JSON (Expecting property name")
    assert reasons[1:3] == ["The line is not a JSON object.", "Sample x is empty."]
    assert "1 answers of 65 tokens, with 0 frames" in reasons[3] and "8 answers, 64 tokens" in reasons[3]
    assert "could not be prepared, because of an unexpected key error: 'tokens'" in reasons[4]


def test_a_bad_sample_is_remembered_with_the_state(tmp_path: Path, packer: PackingConfig) -> None:
    """The share counts from the start of the run, not from where it went on."""
    files = write_texts(tmp_path / "a.jsonl", [0] * FORGIVEN + [60] * 4 + [0] * 10)
    rows = open_rows(files, packer, repeat=False, num_rows=1)
    take(1, rows)
    again = open_rows(files, packer, repeat=False, num_rows=1)
    again.set_state([rows.get_state()])
    with pytest.raises(InputError, match=f"{FORGIVEN + 1} of 15 samples cannot be used"):
        take(3, again)
    rows.close()
    again.close()


def test_too_large_a_share_of_bad_samples() -> None:
    last = BadSample("a.jsonl", 7, "It is broken.")
    check_share(FORGIVEN, FORGIVEN, 0.0, last)
    check_share(FORGIVEN + 5, 500, 0.01, last)
    with pytest.raises(
        InputError, match=r"16 of 500 .*max_bad_fraction 0.01 allows. .*: a.jsonl line 7: It is broken\."
    ):
        check_share(FORGIVEN + 6, 500, 0.01, last)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_share_stops_the_run_wherever_samples_are_made(tmp_path: Path, packer: PackingConfig, workers: int) -> None:
    files = write_texts(tmp_path / "a.jsonl", [0] * 30)
    rows = open_rows(files, packer, num_workers=workers)
    with pytest.raises(
        InputError, match=r"^11 of 11 samples .*max_bad_fraction 0.01 .*a.jsonl line \d+: Sample \d+ is"
    ):
        next(rows)
    rows.close()


def test_cut_samples_are_counted(tmp_path: Path, packer: PackingConfig) -> None:
    lines = [{"id": str(i), "tokens": 30, "cut": 5 * (i % 2)} for i in range(4)]
    rows = rows_of(2, write_lines(tmp_path / "a.jsonl", lines), packer, repeat=False, num_rows=1)
    assert [(row.keys, row.num_truncated) for row in rows] == [(("0", "1"), 1), (("2", "3"), 1)]


# Media


def caption(video: str, text: str) -> dict:
    question = [{"type": "video", "video": {"video_file": video}}, {"type": "text", "text": "Describe the video."}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}


@pytest.fixture
def media_rows(tmp_path: Path, clip: str, processor: Processor) -> Any:
    """Rows of annotations of real clips, made as in SFT, with frames drawn at random."""
    objective: Objective = sft_objective(TrainConfig())
    processor = processor.replace(n_frames=3, max_pixels=3136, max_seq_len=120, video_sampler="v2")
    shape = RowShape(tokens=160, bins=4, patches=16, frames=2, samples=4)
    packer = PackingConfig(processor, shape, packing_buffer=2, max_bad_fraction=0.0, dtype="bfloat16")

    def rows(lines: Sequence[Any], repeat: bool) -> RowLoader:
        def load(sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
            return objective.load(processor, sample, rng)

        files = write_lines(tmp_path / "a.jsonl", lines)
        return open_rows(files, packer, repeat, load=load, media_root=str(tmp_path), num_rows=1)

    return rows


def test_clips_and_what_is_wrong_with_some(tmp_path: Path, media_rows: Any, processor: Processor) -> None:
    Image.new("RGB", (640, 640)).save(tmp_path / "large.png")
    large = caption("clip", "It is large.")
    large["image_processing_config"] = {"max_pixels": 640 * 640}
    large["messages"][0]["content"][0] = {"type": "image", "image": {"image_file": "large.png"}}
    lines = [
        caption("clip", "It gets brighter."),
        caption("nowhere.mp4", "It is not there."),
        caption("clip", "  "),
        large,
        caption("clip", "It gets brighter. " * 20),
    ]
    rows = media_rows(lines, repeat=False)
    first, second = take(2, rows)
    rows.close()
    reasons = {bad.line: bad.reason for bad in first.bad}
    assert sorted(reasons) == [2, 3, 4]
    assert str(tmp_path / "nowhere.mp4") in reasons[2]
    assert "nothing to train on" in reasons[3]
    assert "max_seq_len is 120" in reasons[4]
    assert (first.num_truncated, second.num_truncated, first.num_drawn) == (0, 1, 5)
    answer = first.batch.labels[0][first.batch.labels[0] >= 0]
    assert processor.tokenizer.decode(answer) == "It gets brighter.<|im_end|>"
    assert second.batch.lengths == 120 and first.batch.patches.dtype.name == "bfloat16"
    assert (first.batch.frame_hw.prod(axis=-1) > 0).sum() == 3


def test_patches_wait_in_the_dtype_of_the_row(clip: str, processor: Processor) -> None:
    """The answers of a pair share one array."""
    processor = processor.replace(n_frames=3, max_pixels=3136)
    shape = RowShape(tokens=512, bins=4, patches=16, frames=2, samples=4)
    packer = PackingConfig(processor, shape, packing_buffer=2, max_bad_fraction=0.0, dtype="bfloat16")
    line = AnnotationLine("a.jsonl", 1, json.dumps(caption(clip, "It gets brighter.")))

    def load_pair(sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        return PackUnit([processor(sample, training=True) for _ in range(2)], {})

    unit: Any = LoadLine(load_pair, packer).random_map(line, np.random.default_rng(0))
    expected = processor(caption(clip, "It gets brighter."), training=True).pixel_values.astype("bfloat16")
    np.testing.assert_array_equal(unit.unit[0].pixel_values, expected)
    assert unit.unit[0].pixel_values is unit.unit[1].pixel_values


def test_drawn_frames_are_the_same_again_after_a_restore(media_rows: Any) -> None:
    lines = [caption("clip", f"Clip {i}.") for i in range(2)]
    rows = media_rows(lines, repeat=True)
    take(1, rows)
    state = json.dumps(rows.get_state())
    expected = take(3, rows)
    again = media_rows(lines, repeat=True)
    again.set_state([json.loads(state)])
    assert contents(take(3, again)) == contents(expected)
    frames = {row.batch.patches.tobytes() for row in expected}
    assert len(frames) == 3  # of one clip, other ones each time
    rows.close()
    again.close()


def test_a_clip_that_was_decoded_before_a_restart_may_be_gone_after_it(clip: str, media_rows: Any) -> None:
    lines = [caption("clip", f"Clip {i}.") for i in range(4)]
    rows = media_rows(lines, repeat=False)
    take(1, rows)
    state = rows.get_state()
    rows.close()
    Path(clip).rename(Path(clip).with_name("elsewhere"))
    again = media_rows(lines, repeat=False)
    again.set_state([state])
    (row,) = take(1, again)
    assert row.keys == () and [bad.line for bad in row.bad] == [4]  # lines 2 and 3 were drawn before
    again.close()


# Sizes of the bins


def test_sizes_of_bins_follow_from_the_sequence_and_the_frames() -> None:
    def sizes(data: DataConfig, answers: int = 1, **options: int) -> tuple[int, int, int]:
        fitted = fit_packing(data, ProcessorOptions(**options), Qwen2VisionConfig(), answers)
        return fitted.vision_bins, fitted.patches_per_bin, fitted.frames_per_bin

    assert sizes(DataConfig()) == (16, 4928, 32)  # 32 frames of 460,800 pixels are 18,811 of 20,480 tokens
    assert sizes(DataConfig(seq_len=16_384)) == (13, 4928, 32)
    assert sizes(DataConfig(seq_len=9472)) == (8, 4928, 32)  # 16 frames, of 9,405 tokens
    assert sizes(DataConfig(seq_len=500)) == (1, 4928, 32)
    assert sizes(DataConfig(max_samples_per_seq=2), answers=2) == (16, 2496, 32)  # a pair per row: a bin per frame
    assert sizes(DataConfig(max_samples_per_seq=4), n_frames=3) == (6, 4928, 32)
    assert sizes(DataConfig(seq_len=448, max_samples_per_seq=4), n_frames=3, max_pixels=12_544) == (6, 160, 10)
    assert sizes(DataConfig(vision_bins=0, patches_per_bin=64)) == (0, 64, 4)  # set values stay
    assert sizes(DataConfig(patches_per_bin=2496)) == (32, 2496, 32)
    with pytest.raises(InputError, match=r"config\.data\.patches_per_bin is 50, but must be a multiple of 4"):
        sizes(DataConfig(patches_per_bin=50))


def test_bins_of_frames_of_one_size() -> None:
    vision = ClipVisionConfig()
    fitted = fit_packing(DataConfig(seq_len=6016), ProcessorOptions(n_frames=8), vision)
    assert (fitted.vision_bins, fitted.patches_per_bin, fitted.frames_per_bin) == (10, 576, 1)  # 601 tokens a frame
    assert fit_packing(DataConfig(), ProcessorOptions(), ClipVisionConfig(image_size=378)).patches_per_bin == 27**2
    with pytest.raises(InputError, match="patches_per_bin is 640, but must be a multiple of 576"):
        fit_packing(DataConfig(patches_per_bin=640), ProcessorOptions(), vision)


@pytest.mark.parametrize("seq_len", [9472, 16_384, 19_000, 20_480])
@pytest.mark.parametrize("n_frames", [5, 16, 32])
def test_bins_take_a_video_of_full_size(seq_len: int, n_frames: int) -> None:
    """Where its tokens fit the row."""
    frame_tokens = 18 * 32  # 896 x 504 pixels
    shape = fit_packing(DataConfig(seq_len=seq_len), ProcessorOptions(n_frames=n_frames), Qwen2VisionConfig()).row_shape
    video = UnitSize(1, n_frames * frame_tokens, np.array([[n_frames, 36, 64]], np.int32))
    assert (RowSpace(shape).allocate(video) is not None) == (n_frames * frame_tokens <= seq_len)


@pytest.mark.parametrize("max_pixels", [3136, 12_544, 73_728, 460_800])
def test_every_frame_up_to_four_times_as_wide_as_high_fits_a_bin(max_pixels: int) -> None:
    one_sample, several = (
        fit_packing(DataConfig(max_samples_per_seq=n), ProcessorOptions(max_pixels=max_pixels), Qwen2VisionConfig())
        for n in (1, 64)
    )
    rng, image, areas = np.random.default_rng(0), Qwen2ImageProcessor(), []
    for _ in range(3000):
        height, aspect = int(rng.integers(200, 2000)), rng.uniform(1, 3.9)
        size = smart_resize(height, int(height * aspect), 1, 0, max_pixels)
        if min(size) >= image.factor:  # smaller ones are refused
            height, width = smart_resize(*size, image.factor, image.min_pixels, image.max_pixels)
            areas.append(height * width // image.patch_size**2)
    assert one_sample.patches_per_bin / 1.25 <= max(areas) <= one_sample.patches_per_bin
    assert several.patches_per_bin / 1.25 <= 2 * max(areas) <= several.patches_per_bin
