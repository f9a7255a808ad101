"""Padding and FLOPs of training rows for videos and images of several sizes, as `train.plan` estimates them.

    python -m benchmarks.packing

Each material has samples of 60 to 450 tokens of text, and videos of 16 frames or one image of the stated sizes. The
rows are the former ones of the recipes (27 bins of 2,496 patches in 16,384 tokens), those of configs/recap_7b.py, and
those that `train.plan` proposes for the material. FLOPs per sample are those of the 7B's training step, padding
included, relative to the former rows. No video is decoded and no model runs.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs import recap_7b
from tarsier_jax.config import ModelConfig
from tarsier_jax.families import load_config
from tarsier_jax.processing.packing import RowShape
from train.config import read_config
from train.data.packing import fit_packing
from train.data.planning import Material, collect, measure_samples
from train.debug_data import TINY
from train.plan import Plan, make_plan, propose
from train.run import training_processor
from train.sft import sft_objective
from train.untrained import write_untrained

FORMER = RowShape(tokens=16_384, bins=27, patches=2496, frames=16, samples=64)
NUM_FRAMES = 16
_240P, _360P, _480P, _720P, _1080P = (426, 240), (640, 360), (854, 480), (1280, 720), (1920, 1080)
_480P_4_3, _240P_4_3, _720P_PORTRAIT = (640, 480), (320, 240), (720, 1280)
# Kind of the visual, and the sizes of its frames as width and height.
MATERIALS: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "1080p": ("video", [_1080P]),
    "480p at 4:3": ("video", [_480P_4_3]),
    "eight sizes, 240p to 1080p": (
        "video",
        [_240P, _240P_4_3, _360P, _480P_4_3, _480P, _720P, _1080P, _720P_PORTRAIT],
    ),
    "360p": ("video", [_360P]),
    "240p": ("video", [_240P]),
    "one image of 1024 x 768": ("image", [(1024, 768)]),
    "text alone": ("text", [(0, 0)]),
}


def write_sample(directory: Path, kind: str, size: tuple[int, int], rng: np.random.Generator) -> dict[str, Any]:
    """Returns an annotation with a visual of a size, whose frames are written to the directory."""
    content: list[dict[str, Any]] = [{"type": "text", "text": "Describe the video in detail."}]
    if kind != "text":
        frames = directory / f"{size[0]}x{size[1]}"
        if not frames.exists():
            frames.mkdir()
            Image.new("RGB", size).save(frames / "0.png")
            for i in range(1, NUM_FRAMES):
                (frames / f"{i}.png").symlink_to("0.png")
        source = {"video_file": str(frames)} if kind == "video" else {"image_file": str(frames / "0.png")}
        content.insert(0, {"type": kind, kind: source})
    answer = " red" * int(rng.integers(60, 451))  # a token per word
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def measure(name: str, num_samples: int) -> Material:
    """Returns the measured samples of one of `MATERIALS`."""
    kind, sizes = MATERIALS[name]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        model = directory / "model"
        model.mkdir()
        write_untrained(model, TINY)
        samples = [write_sample(directory, kind, sizes[i % len(sizes)], rng) for i in range(num_samples)]
        annotations = directory / "annotations.jsonl"
        annotations.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        config = read_config(recap_7b.get_config())
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(annotations)))
        processor = training_processor(model, load_config(model), config)
        return collect(measure_samples(config, processor, sft_objective(config).load, num_samples))


def plans(material: Material) -> list[Plan]:
    """Returns the former rows, those of the recipe, and the proposed rows with the fewest FLOPs per sample."""
    config, model = read_config(recap_7b.get_config()), ModelConfig()
    data = fit_packing(config.data, config.processor, model.vision)
    proposals = propose(material.sizes, data.row_shape, data.packing_buffer, model)
    shapes = [FORMER, data.row_shape, min(proposals, key=lambda plan: plan.flops).shape]
    return [make_plan(material.sizes, shape, data.packing_buffer, model) for shape in shapes]


def print_plans(name: str, rows: Sequence[Plan]) -> None:
    for kind, plan in zip(("former", "recipe", "proposed"), rows, strict=True):
        shape, content = plan.shape, plan.rows
        print(
            f"| {name} | {kind}: {shape.tokens:,} and {shape.bins} x {shape.patches:,} | {content.samples:.2f} | "
            f"{content.token_padding:.1%} | {content.patch_padding:.1%} | {plan.flops / rows[0].flops:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=400, help="samples per material")
    args = parser.parse_args()
    print(
        "| material | tokens and bins x patches | samples per row | token padding | patch padding | FLOPs per sample |"
    )
    print("|---|---|---|---|---|---|")
    for name in MATERIALS:
        print_plans(name, plans(measure(name, args.samples)))


if __name__ == "__main__":
    main()
