import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarsier_jax.config import ModelConfig, Qwen2VisionConfig, TextConfig
from tarsier_jax.processing.packing import RowShape, stack_rows
from tests.reference import IMAGE, VIDEO
from tests.train.packs import make_examples, pack
from train.data.packing import BadSample
from train.losses import shifted_labels
from train.metric_writer import BadSamples, Log, console_line, duration
from train.throughput import Meter, Work, peak_flops, step_flops, work_of

CONFIG = ModelConfig(
    text=TextConfig(
        vocab_size=50,
        hidden_size=8,
        mlp_dim=12,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        mrope_section=(1, 1, 1),
    ),
    vision=Qwen2VisionConfig(depth=2, embed_dim=16, num_heads=2, mlp_ratio=3.0, out_dim=8),
    image_token_id=IMAGE,
    video_token_id=VIDEO,
)
SHAPE = RowShape(tokens=32, bins=4, patches=20, frames=2, samples=4)


# The work in a step


def test_the_work_in_packed_rows() -> None:
    """A row of a video of two frames and of text; a row with one image."""
    video, text, image = make_examples(CONFIG, [[4, (2, 2, 4), 5], [7], [3, (1, 4, 4), 6]])
    assert [len(example.input_ids) for example in (video, text, image)] == [4 + 6 + 5, 7, 3 + 6 + 6]
    rows = [pack([[video], [text]], CONFIG, SHAPE), pack([[image]], CONFIG, SHAPE)]
    expected = Work(
        samples=3,
        tokens=15 + 7 + 15,
        tokens_with_padding=2 * 32,
        patches=2 * 8 + 16,
        patches_with_padding=2 * 4 * 20,
        token_pairs=15 * 16 // 2 + 7 * 8 // 2 + 15 * 16 // 2,  # of a sample, each token with itself and those before
        patch_pairs=2 * 8**2 + 16**2,  # of a frame, each with all
        targets=4 + 6 + 5,
    )
    assert work_of(stack_rows([row.batch for row in rows])) == expected
    assert work_of(rows[0].batch) + work_of(rows[1].batch) == expected
    assert expected.padding == pytest.approx(1 - (37 + 32) / (64 + 160))


def test_an_empty_row_is_no_work() -> None:
    work = work_of(pack([], CONFIG, SHAPE).batch)
    assert dataclasses.astuple(work) == (0, 0, 32, 0, 80, 0, 0, 0)
    assert work.padding == 1.0
    assert Work().padding == 1.0


def multiply_adds(lengths: list[int], frames: list[int], targets: int) -> int:
    """Those of a forward pass, written out matrix by matrix: [rows, in] times [in, out]."""
    text, vision, total = CONFIG.text, CONFIG.vision, 0

    def product(rows: int, width: int, out: int) -> None:
        nonlocal total
        total += rows * width * out

    for S in lengths:
        for _ in range(text.num_layers):
            product(S, text.hidden_size, text.num_heads * text.head_dim)  # q
            for _ in "kv":
                product(S, text.hidden_size, text.num_kv_heads * text.head_dim)
            for _ in range(text.num_heads):
                for query in range(S):
                    product(1, text.head_dim, query + 1)  # scores
                    product(1, query + 1, text.head_dim)  # values
            product(S, text.num_heads * text.head_dim, text.hidden_size)  # o
            for _ in ("gate", "up", "down"):
                product(S, text.hidden_size, text.mlp_dim)
    product(targets, text.hidden_size, text.vocab_size)
    for P in frames:
        product(P, vision.patch_dim, vision.embed_dim)
        for _ in range(vision.depth):
            for _ in ("q", "k", "v", "proj"):
                product(P, vision.embed_dim, vision.embed_dim)
            for _ in range(vision.num_heads):
                product(P, vision.head_dim, P)
                product(P, P, vision.head_dim)
            for _ in ("fc1", "fc2"):
                product(P, vision.embed_dim, vision.mlp_dim)
        product(P // 4, 4 * vision.embed_dim, 4 * vision.embed_dim)
        product(P // 4, 4 * vision.embed_dim, text.hidden_size)
    return total


@pytest.mark.parametrize(
    ("samples", "lengths", "frames"), [([[7], [12]], [7, 12], []), ([[4, (2, 2, 4), 5]], [15], [8, 8])]
)
def test_flops_of_a_step(samples: list[list[Any]], lengths: list[int], frames: list[int]) -> None:
    """Two for each multiplication and addition; the backward pass takes twice as many as the forward pass."""
    row = pack([[example] for example in make_examples(CONFIG, samples)], CONFIG, SHAPE)
    targets = int((np.asarray(shifted_labels(row.batch)) >= 0).sum())
    assert 0 < targets < sum(lengths)
    assert step_flops(CONFIG, work_of(row.batch)) == 6 * multiply_adds(lengths, frames, targets)


def test_flops_of_the_7b_are_six_a_parameter_and_token() -> None:
    """7.07e9 parameters take part in matrix products for every token: all of Qwen2-7B but the embedding table."""
    text = ModelConfig()
    assert step_flops(text, Work(tokens=1000, targets=1000)) == pytest.approx(6 * 7.07e9 * 1000, rel=1e-3)


def test_rates_are_those_since_the_last_report(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 110.0, 112.0])  # made, asked, reset, asked
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("train.throughput.peak_flops", lambda device: 1e9)
    meter, work = Meter(CONFIG), Work(samples=2, tokens=40, tokens_with_padding=50)
    meter.add(work, waited=1.0)
    meter.add(work, waited=0.0)
    assert meter.rates() == pytest.approx(
        {
            "tokens_per_s": 20.0,
            "samples_per_s": 1.0,
            "seconds_per_step": 2.0,
            "data_wait": 0.25,
            "padding": 0.2,
            "mfu": step_flops(CONFIG, work) / 2 / 1e9,
        }
    )
    meter.reset()
    meter.add(work, waited=0.0)
    assert meter.rates()["tokens_per_s"] == 20.0


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind: str, peak: float | None) -> None:
    class Device:
        device_kind = kind

    assert peak_flops(Device()) == peak


# Logs


VALUES = {
    "loss": 1.23456,
    "lr": 2e-5,
    "grad_norm": 0.5,
    "tokens_per_s": 12345.6,
    "samples_per_s": 3.25,
    "seconds_per_step": 2.0,
    "data_wait": 0.012,
    "padding": 0.1,
}


def test_the_line_on_the_console() -> None:
    assert console_line(40, 100, VALUES) == (
        "step 40/100  loss 1.2346  lr 2.00e-05  grad 0.50  tokens/s 12,346  samples/s 3.25  data wait 1.2%  "
        "padding 10.0%  left 0:02:00"
    )
    line = console_line(100, 100, {**VALUES, "mfu": 0.456, "accuracy": 0.75, "margin": 0.125, "reward_chosen": 1.0})
    assert "grad 0.50  accuracy 0.750  margin 0.125  tokens/s" in line
    assert "mfu 45.6%" in line and line.endswith("left 0:00:00")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (360000, "100:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def logged(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_beyond_the_step_a_run_goes_on_from_are_void(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in (10, 20, 30):
        log.scalars(step, {"loss": step / 100})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # killed in the middle of a line
    log = Log(tmp_path, 20)
    assert logged(tmp_path) == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.2}]
    log.scalars(30, {"loss": 0.25, "accuracy": 1.0})
    log.close()
    assert logged(tmp_path)[2:] == [{"step": 30, "loss": 0.25, "accuracy": 1.0}]
    assert list(tmp_path.glob("events.out.tfevents.*")) and not list(tmp_path.glob("*.partial"))


def test_the_first_run_starts_a_new_file(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log.scalars(1, {"loss": 2.0})
    log.close()
    assert logged(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_each_bad_sample_is_written_once(tmp_path: Path) -> None:
    first, second = BadSample("a.jsonl", 3, "It is broken."), BadSample("a.jsonl", 4, "It is broken.")
    bad_samples = BadSamples(tmp_path)
    bad_samples.write([first, first])
    bad_samples.write([second, first])
    again = BadSamples(tmp_path)  # the next epoch, after a restart
    again.write([second, BadSample("a.jsonl", 4, "It is missing.")])
    lines = [json.loads(line) for line in again.file.read_text().splitlines()]
    assert again.file == tmp_path / "bad_samples_0.jsonl"
    assert [(line["file"], line["line"], line["reason"]) for line in lines] == [
        ("a.jsonl", 3, "It is broken."),
        ("a.jsonl", 4, "It is broken."),
        ("a.jsonl", 4, "It is missing."),
    ]
