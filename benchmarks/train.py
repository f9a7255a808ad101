"""Full fine-tuning: the real step of `train.sft` on random weights and random packed samples.

    python -m benchmarks.train                     # a CPU, against transformers and torch.optim.AdamW, side by side
    python -m benchmarks.train --size 2b           # an accelerator: MFU, memory; --profile DIR writes a trace

small: the model of `benchmarks.describe` with tied embeddings, float32, eight samples of one to six frames of 12 x 22
patches, packed into rows of 1,024 tokens. The reference processes the samples one by one and accumulates their
gradients, as training code without packing does. The vision tower is frozen in both, because the backward pass of
PyTorch's Conv3d takes minutes on a CPU. 2b: Qwen2-VL-2B's sizes, bfloat16, a row of 16,384 tokens per device.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.samples import make_example, seconds
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
SMALL_VIDEOS = (1, 6, 2, 5, 3, 4, 2, 6)  # frames of each small sample


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


def benchmark_small(steps: int) -> None:
    """Times our steps and the reference's in turn."""
    jax.config.update("jax_platforms", "cpu")  # before the import below, which limits the threads
    import torch

    from benchmarks.describe import THREADS, make_reference, reference_inputs

    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as directory:
        theirs = make_reference(Path(directory), tied=True)
        config = dataclasses.replace(load_config(directory), remat="dots")
        frozen = dataclasses.replace(OPTIMIZER, freeze=("vision/.*",))
        spec = make_state_spec(config, frozen, 100, make_mesh(devices=jax.devices()[:1]))
        state = init_state(spec, Path(directory))
    examples = [make_example(config, frames, 12, 22, 24 + 8 * i, i) for i, frames in enumerate(SMALL_VIDEOS)]
    rows = pack(examples, RowShape(1024, 16, 272, 1, 8), config)
    work = sum((work_of(row.batch) for row in rows), Work())
    batch = global_batch(rows, 1, spec.mesh)
    step_function = make_train_step(spec, sft_loss)
    theirs.model.visual.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=OPTIMIZER.peak_lr, eps=OPTIMIZER.eps
    )
    answers = sum(int((e.labels >= 0).sum()) for e in examples)
    losses: dict[str, float] = {}

    def ours() -> None:
        nonlocal state
        state, metrics = step_function(state, batch)
        losses["ours"] = float(metrics["loss"])

    def reference() -> None:
        optimizer.zero_grad()
        total = 0.0
        for e in examples:
            logits = theirs(**reference_inputs([e])).logits[0, :-1]
            targets = torch.from_numpy(e.labels[1:]).long()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / answers
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        losses["reference"] = total

    ours()
    reference()
    print(f"{len(examples)} samples of {work.tokens} tokens in {len(rows)} rows, padding {work.padding:.1%}")
    print(f"loss of the first step: ours {losses['ours']:.6f}, reference {losses['reference']:.6f}")
    times: dict[str, list[float]] = {"ours": [], "reference": []}
    for _ in range(steps):
        times["ours"].append(seconds(ours))
        times["reference"].append(seconds(reference))
    a, b = (statistics.median(times[who]) for who in ("ours", "reference"))
    print(f"ours {a:.2f} s per step ({work.tokens / a:.0f} tokens/s)   reference {b:.2f} s   ratio {b / a:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("small", "2b"), default="small")
    parser.add_argument("--steps", type=int, default=5)
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
