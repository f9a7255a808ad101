"""Rows that waste little: the recipes' for videos of several sizes, and those that `train.plan` proposes."""

import re
import sys

import numpy as np
import pytest

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.processing.options import ProcessorOptions
from tarsier_jax.processing.packing import RowShape, RowSpace, UnitSize
from train import plan
from train.data.packing import DataConfig, fit_packing
from train.data.planning import estimate_rows

MODEL = ModelConfig()
# Height and width of frames in patches, of at most 460,800 pixels.
FRAMES = {
    "240p": (18, 30),
    "240p 4:3": (18, 22),
    "360p": (26, 46),
    "480p 4:3": (34, 46),
    "480p": (34, 60),
    "1080p": (36, 64),
    "portrait": (64, 36),
    "768p 4:3": (42, 56),
}


def videos(*names: str, num_samples: int = 160, seed: int = 0) -> list[UnitSize]:
    """Sizes of videos of 16 frames with 85 to 475 tokens of text."""
    rng = np.random.default_rng(seed)
    grids = [np.array([[16, *FRAMES[names[i % len(names)]]]], np.int32) for i in range(num_samples)]
    return [UnitSize(1, int(grid.prod()) // 4 + int(rng.integers(85, 476)), grid) for grid in grids]


def default_shape() -> RowShape:
    return fit_packing(DataConfig(), ProcessorOptions(), MODEL.vision).row_shape


@pytest.mark.parametrize(
    "names", [("1080p",), ("480p 4:3",), ("360p",), ("240p",), tuple(FRAMES)], ids=lambda names: "-".join(names)[:12]
)
def test_rows_of_the_recipes_waste_little(names: tuple[str, ...]) -> None:
    rows = estimate_rows(videos(*names), default_shape(), DataConfig().packing_buffer)
    assert rows.token_padding < 0.15 and rows.patch_padding < 0.15 and rows.num_too_large == 0


def test_proposed_rows_cost_less_and_fit_every_sample() -> None:
    sizes, shape = videos("480p 4:3", num_samples=40), default_shape()
    present, proposals = plan.make_plan(sizes, shape, 4, MODEL), plan.propose(sizes, shape, 4, MODEL)
    assert [proposal.shape.tokens for proposal in proposals] == [20_480, 17_920, 15_360, 12_800, 10_240]
    best = min(proposals, key=lambda proposal: proposal.flops)
    assert best.flops < present.flops and best.rows.token_padding < 0.15 and best.rows.patch_padding < 0.15
    for proposal in proposals:
        assert proposal.shape.patches % 1600 == 0  # whole frames of 1,564 patches, in tiles of 64
        assert all(RowSpace(proposal.shape).allocate(size) is not None for size in sizes)


def test_samples_beyond_the_longest_row_are_counted() -> None:
    sizes = videos("360p", num_samples=12) + videos("1080p", num_samples=2)
    shape = RowShape(tokens=9000, bins=8, patches=2496, frames=4, samples=64)
    assert {proposal.rows.num_too_large for proposal in plan.propose(sizes, shape, 4, MODEL)} == {2}


def test_bins_of_small_frames() -> None:
    """A bin fills a tile of attention with whole frames, here of 32 patches."""
    grid = np.array([[16, 4, 8]], np.int32)
    for proposal in plan.propose([UnitSize(1, 1200, grid)], default_shape(), 4, MODEL):
        assert proposal.shape.patches in (512, 576, 640) and proposal.shape.frames == 32


def test_rows_for_texts_have_no_bins() -> None:
    texts = [UnitSize(1, tokens, np.zeros((0, 3), np.int32)) for tokens in (100, 300, 500)]
    assert {proposal.shape.bins for proposal in plan.propose(texts, default_shape(), 4, MODEL)} == {0}


def test_flops_count_padding() -> None:
    """Twice the bins are twice the tower's work; bins of twice the patches are more, by their attention."""
    shape = RowShape(tokens=1024, bins=8, patches=512, frames=4, samples=8)
    no_bins, one, two, wide = (
        plan.row_flops(MODEL, RowShape(1024, bins, patches, 4, 8))
        for bins, patches in ((0, 512), (shape.bins, 512), (2 * shape.bins, 512), (shape.bins, 1024))
    )
    assert two - no_bins == pytest.approx(2 * (one - no_bins))
    attention = 3 * 4 * MODEL.vision.depth * MODEL.vision.embed_dim * shape.bins * (1024**2 - 2 * 512**2)
    assert wide - two == pytest.approx(attention)


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "--config=configs/recap_7b.py:debug", *flags])
    plan.main()


def test_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--samples=6", "--max_seq_len=320")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 of 8 lines, 0 of them unusable"
    table = [line.split() for line in lines if re.match(r" +\d", line)]
    assert [(row[0], row[-2]) for row in table[:2]] == [("448", "1.00"), ("320", table[1][-2])]
    assert re.fullmatch(
        r"--config\.data\.seq_len=\d+ --config\.data\.vision_bins=\d+ --config\.data\.patches_per_bin=\d+ "
        r"--config\.data\.frames_per_bin=\d+",
        lines[-1],
    )


def test_rows_that_are_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"No row of up to 64 tokens fits the samples\. Raise --max_seq_len\."):
        run(monkeypatch, "--max_seq_len=64")


def test_a_plan_needs_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"config\.model is empty"):
        run(monkeypatch, "--config.model=")
