"""Full fine-tuning: the real step of `train.sft` on random weights and random packed samples.

    python -m benchmarks.train                     # a CPU, against transformers and torch.optim.AdamW, side by side
    python -m benchmarks.train --size 2b           # an accelerator: MFU, memory; --profile DIR writes a trace

small: 30.4 million parameters, float32, four samples of 340 tokens (four frames of 16 x 16 patches, an answer of 62
tokens), as four rows of one sample, two rows of two, and one row of four. The reference has one batch of the four
samples, sdpa and a fused AdamW. The patch embedding is frozen in both, because the backward pass of PyTorch's Conv3d
takes minutes on a CPU. Rounds alternate, with two threads each. 2b: Qwen2-VL-2B's sizes, bfloat16, a row of 16,384
tokens per device.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.samples import END, IMAGE, START, make_example, seconds
from tarsier_jax.config import ModelConfig, Qwen2VisionConfig, TextConfig
from tarsier_jax.families import load_config
from tarsier_jax.models.attention import default_implementation
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.packing import Row, RowShape
from tarsier_jax.sharding import make_mesh
from train.data.packing import PackedRow
from train.losses import sft_loss
from train.mesh import global_batch
from train.optimizer import OptimizerConfig
from train.state import StateSpec, StepBatch, TrainState, init_state, make_state_spec, make_train_step
from train.throughput import Work, peak_flops, step_flops, work_of

OPTIMIZER = OptimizerConfig(warmup_steps=0)
TEXT_2B = TextConfig(151_936, 1536, 8960, 28, 12, 2, 128, tie_embeddings=True)
VIDEO_2B = (16, 26, 46)  # frames, height and width in patches
SMALL_VOCABULARY = 16_384
FROZEN = ("vision/patch_embed/.*",)


def pack(examples: list[Example], shape: RowShape, config: ModelConfig) -> list[PackedRow]:
    """Packs examples first fit, in order."""
    rows: list[Row] = []
    for example in examples:
        if not any(row.add([example]) for row in rows):
            rows.append(Row(shape, config))
            rows[-1].add([example])
    return [PackedRow(row.build(0, config.dtype), {}, 0, 0, (), ()) for row in rows]


def time_steps(spec: StateSpec, state: TrainState, batch: StepBatch, steps: int, profile: str | None) -> list[float]:
    """Returns the seconds of each step, after two steps that compile and warm up."""
    step_function, times = make_train_step(spec, sft_loss), []
    for i in range(steps + 2):
        if i == 2 and profile:
            jax.profiler.start_trace(profile)
        start = time.perf_counter()
        state, metrics = step_function(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    if profile:
        jax.profiler.stop_trace()
    return times[2:]


def random_state(spec: StateSpec) -> TrainState:
    def make() -> TrainState:
        keys = iter(jax.random.split(jax.random.key(0), len(spec.shapes.params)))
        params = {p: 0.02 * jax.random.normal(next(keys), x.shape, x.dtype) for p, x in spec.shapes.params.items()}
        return TrainState(jnp.int32(0), params, {}, spec.tx.init(params))

    return jax.jit(make, out_shardings=spec.shardings)()


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """One training step on all devices.

    Attributes:
        seconds: Median of a step.
        work: Tokens and patches of a step.
        flops: Model FLOPs of a step.
        memory: Peak bytes of a device since the process started; 0 if the device does not report them.
    """

    seconds: float
    work: Work
    flops: float
    memory: int


def measure_step(
    config: ModelConfig, shape: RowShape, video: tuple[int, int, int], steps: int, profile: str | None = None
) -> StepTiming:
    """Times full fine-tuning on one row per device, packed with videos.

    Args:
        config: Configuration of the model.
        shape: Shape of a row.
        video: Frames, height and width of a video in patches.
        steps: Number of timed steps.
        profile: Directory for a trace.
    """
    count = jax.device_count()
    mesh = make_mesh(fsdp=count)
    spec = make_state_spec(config, OPTIMIZER, 100, mesh)
    samples = shape.tokens // (math.prod(video) // 4 + 322)  # a question of 20 tokens and an answer of 300
    rows = pack([make_example(config, *video, 300, i) for i in range(count * samples)], shape, config)
    work = sum((work_of(row.batch) for row in rows), Work())
    with jax.set_mesh(mesh):
        times = time_steps(spec, random_state(spec), global_batch(rows, 1, mesh), steps, profile)
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return StepTiming(statistics.median(times), work, step_flops(config, work), memory)


def config_2b() -> ModelConfig:
    """Returns Qwen2-VL-2B's sizes, with the attention of the available devices."""
    vision = Qwen2VisionConfig(out_dim=TEXT_2B.hidden_size)
    attention = default_implementation(jax.devices()[0], "bfloat16")
    return ModelConfig(TEXT_2B, vision, dtype="bfloat16", attention=attention, remat="full")


def row_2b(tokens: int) -> RowShape:
    """Returns the shape of a row for videos of 16 frames of 360p."""
    return RowShape(tokens, bins=tokens * 28 // 16_384, patches=2432, frames=4, samples=16)


def benchmark_2b(steps: int, tokens: int, profile: str | None) -> None:
    config, count, device = config_2b(), jax.device_count(), jax.devices()[0]
    step = measure_step(config, row_2b(tokens), VIDEO_2B, steps, profile)
    work, rate, peak = step.work, step.flops / step.seconds / count, peak_flops(device)
    print(f"{count} x {device.device_kind}, {config.attention}: {work.tokens:,} tokens of {tokens * count:,}, ", end="")
    print(f"{step.seconds * 1e3:.0f} ms per step, {work.tokens / step.seconds:,.0f} tokens/s", end=", ")
    print(f"{rate / 1e12:.1f} TFLOP/s")
    print(f"MFU {rate / peak:.1%}" if peak else "MFU unknown: no peak for this device", end=", ")
    print(f"peak memory {step.memory / 2**30:.2f} GiB")


def make_small_reference(directory: Path) -> Any:
    """Creates a random model of 30.4 million parameters in transformers and saves it into `directory`."""
    from benchmarks.describe import TEXT, VISION, make_reference

    text = {**TEXT, "vocab_size": SMALL_VOCABULARY, "hidden_size": 384, "intermediate_size": 1024}
    text |= {"num_hidden_layers": 9, "num_attention_heads": 6}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
    ids = {name: small_ids(np.array(i)).item() for name, i in ids.items()}
    model = make_reference(directory, text, {**VISION, "depth": 6, "hidden_size": 384}, tie_word_embeddings=True, **ids)
    return model.train()


def small_ids(ids: np.ndarray) -> np.ndarray:
    """Returns the tokens of `make_example` in the small vocabulary, in which those of images are the last."""
    words = SMALL_VOCABULARY - 8
    return np.where(ids < 0, ids, np.where(ids >= START, ids - START + words, ids % words))


def small_examples(config: ModelConfig) -> list[Example]:
    examples = [make_example(config, 4, 16, 16, 62, seed) for seed in range(4)]
    ids = [(small_ids(e.input_ids).astype(np.int32), small_ids(e.labels).astype(np.int32)) for e in examples]
    return [dataclasses.replace(e, input_ids=i, labels=labels) for e, (i, labels) in zip(examples, ids, strict=True)]


class OurSteps:
    """Training steps on rows of `samples` samples each."""

    def __init__(self, directory: Path, examples: list[Example], samples: int):
        config = load_config(directory)
        frozen = dataclasses.replace(OPTIMIZER, freeze=FROZEN)
        self.spec = make_state_spec(config, frozen, 100, make_mesh(devices=jax.devices()[:1]))
        self.state = init_state(self.spec, directory)
        rows = pack(examples, RowShape(340 * samples, 4 * samples, 256, 1, samples), config)
        self.batch = global_batch(rows, 1, self.spec.mesh)
        self.function = make_train_step(self.spec, sft_loss)

    def __call__(self) -> float:
        self.state, metrics = self.function(self.state, self.batch)
        return float(metrics["loss"])


class ReferenceSteps:
    """Training steps of transformers and torch.optim."""

    def __init__(self, model: Any, examples: list[Example]):
        import torch

        from benchmarks.describe import reference_inputs

        self.model, self.inputs = model, reference_inputs(examples)
        self.labels = torch.from_numpy(np.stack([e.labels for e in examples])).long()
        model.model.visual.patch_embed.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=OPTIMIZER.peak_lr, eps=OPTIMIZER.eps, fused=True)

    def __call__(self) -> float:
        import torch

        self.optimizer.zero_grad()
        logits = self.model(**self.inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_norm)
        self.optimizer.step()
        return float(loss.detach())


def benchmark_small(steps: int) -> None:
    """Times our steps and the reference's in turn."""
    jax.config.update("jax_platforms", "cpu")  # before the import below, which limits the threads
    import torch

    from benchmarks.describe import THREADS

    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as directory:
        model = make_small_reference(Path(directory))
        examples = small_examples(load_config(Path(directory)))
        runs: dict[str, Callable[[], float]] = {
            f"ours, rows of {samples}": OurSteps(Path(directory), examples, samples) for samples in (1, 2, 4)
        }
    runs["reference"] = ReferenceSteps(model, examples)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters; loss of the first step:")
    print(", ".join(f"{name} {run():.6f}" for name, run in runs.items()), flush=True)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.2f} s per step, ratio {medians['reference'] / median:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("small", "2b"), default="small")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens per row of the 2b size")
    parser.add_argument("--profile", help="directory for a trace of the 2b size")
    args = parser.parse_args()
    if args.size == "2b":
        benchmark_2b(args.steps, args.tokens, args.profile)
    else:
        benchmark_small(args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
