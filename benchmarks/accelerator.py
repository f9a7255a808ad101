"""Parity and speed on the available devices, against ceilings and goals, in less than ten minutes.

    python -m benchmarks.accelerator                                       # the largest size that fits
    python -m benchmarks.accelerator --parts parity engine --json FILE     # some of the parts

ceilings  a copy and a matrix product: the bandwidth and the FLOP/s of the devices
parity    attention in bfloat16 against float32, for each kind of call; a difference sets the exit status to 1
engine    the embedded model: the engine's answers in float32 must equal those for one prompt at a time
sft       one step of full fine-tuning
vision    the vision tower on the frames of a clip
prefill   a clip's prompt into a free slot
decode    a step of all slots, each with a clip's prompt
clips     the engine on clips of this size, with answers of 100 to 300 tokens

7b: Qwen2-VL-7B's sizes with random weights, clips of 16 frames of 36 x 64 patches, 32 slots of 10,752 tokens per
data-parallel part; sft runs Qwen2-VL-2B, since its AdamW states fit on one device. 2b: Qwen2-VL-2B for all parts.
small: for a CPU. A goal is a share of the peak in the data sheet, if known; the goal of decode is a share of the
measured copy. The exit status is also 1 if a part raises an exception.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU; JAX's default is 0.75

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import tarsier_jax
from benchmarks.attention_parity import TOLERANCE, cases, errors
from benchmarks.samples import NoTexts, make_example, time_calls
from benchmarks.train import TEXT_2B, VIDEO_2B, StepTiming, config_2b, measure_step, row_2b
from eval.shapes.annotations import user_turn
from eval.shapes.clips import HELD_OUT, draw_clips
from infer.engine import Completion, Engine, EngineConfig, Request, fit_config
from infer.engine.scheduler import without_segments
from tarsier_jax.api import use_mesh_of
from tarsier_jax.config import ModelConfig, Qwen2VisionConfig, TextConfig
from tarsier_jax.generation.decode import DecodeState, generate_batch
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.generation.slots import SlotAssignment, decode_slots, empty_slots, encode_frames, prefill_into_slots
from tarsier_jax.models.attention import default_implementation, prefers_lengths
from tarsier_jax.models.tarsier import Tarsier, unstack
from tarsier_jax.processing.batch import Batch, Buckets, Example, frame_sizes
from tarsier_jax.processing.packing import Row, RowShape, stack_rows
from tarsier_jax.processing.processor import Processor
from tarsier_jax.programs import resolve_dtype
from tarsier_jax.sharding import BATCH, make_mesh, parameter_path, parameter_shardings
from tarsier_jax.weights import EMBEDDED
from tarsier_jax.weights.names import abstract_state
from train.throughput import Work, peak_flops, step_flops

_GIB = 2**30
GOALS = {"decode": 0.85, "prefill": 0.55, "vision": 0.55, "sft": 0.50}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and its load.

    Attributes:
        text: Sizes of the decoder.
        vision: Sizes of the vision tower.
        video: Frames of a clip, and their height and width in patches.
        patches: Patches per bin.
        slots: Slots per data-parallel part.
        prompt_tokens: Prompt tokens per slot.
        new_tokens: New tokens per slot.
        answer: Mean tokens per answer in the part "clips".
        memory: Minimum bytes of all devices together for this size to be the default.
        product: Rows and columns of the matrices in the matrix product.
        copied: Bytes per copy.
        parity: Tokens per row, patches per frame and tokens per cache in the part "parity".
    """

    text: TextConfig
    vision: Qwen2VisionConfig
    video: tuple[int, int, int]
    patches: int
    slots: int
    prompt_tokens: int
    new_tokens: int
    answer: int
    memory: int
    product: int
    copied: int
    parity: tuple[int, int, int]


_CLIP = {"video": (16, 36, 64), "patches": 2496, "slots": 32, "prompt_tokens": 10_240, "new_tokens": 512, "answer": 200}
_LARGE = {**_CLIP, "product": 8192, "copied": 2 * _GIB, "parity": (4096, 2496, 10_752)}
_SMALL_TEXT = TextConfig(152_064, 64, 128, 2, 4, 2, 16, mrope_section=(2, 3, 3))
WORKLOADS = {
    "7b": Workload(TextConfig(), Qwen2VisionConfig(), memory=60 * _GIB, **_LARGE),
    "2b": Workload(TEXT_2B, Qwen2VisionConfig(out_dim=1536), memory=30 * _GIB, **_LARGE),
    "small": Workload(
        _SMALL_TEXT,
        Qwen2VisionConfig(depth=2, embed_dim=64, num_heads=4, out_dim=64),
        video=(4, 8, 12),
        patches=104,
        slots=4,
        prompt_tokens=128,
        new_tokens=64,
        answer=16,
        memory=0,
        product=1024,
        copied=_GIB // 8,
        parity=(256, 96, 512),
    ),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        part: Part of the benchmark.
        name: Name of the measurement.
        value: The measured value.
        unit: Unit of the value.
        of_measured: Share of the measured ceiling.
        of_peak: Share of the peak in the data sheet.
        goal: Minimum share.
        status: "ok", "below goal", "FAILED" or "skipped".
        note: Reason of a failure, or details of the measurement.
    """

    part: str
    name: str
    value: float | None = None
    unit: str = ""
    of_measured: float | None = None
    of_peak: float | None = None
    goal: float | None = None
    status: str = "ok"
    note: str = ""


class SingleConfig(EngineConfig):
    """Shapes with one row length and one read length of the cache: three programs instead of up to thirteen."""

    @property
    def read_lengths(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.buckets[0].tokens,)


class Bench:
    """The devices, a model of one size on them, and the ceilings. Each is created at its first use."""

    def __init__(self, name: str):
        self.name, self.workload = name, WORKLOADS[name]
        self.devices, self.platform = jax.devices(), jax.default_backend()
        self.dtype = resolve_dtype("auto")
        self.attention = default_implementation(self.devices[0], self.dtype)
        self.tensor = math.gcd(len(self.devices), self.workload.text.num_kv_heads)
        self.groups = len(self.devices) // self.tensor
        self.mesh = make_mesh(data=self.groups, tensor=self.tensor) if len(self.devices) > 1 else None
        self.config = ModelConfig(
            self.workload.text, self.workload.vision, dtype=self.dtype, param_dtype=self.dtype, attention=self.attention
        )

    @functools.cached_property
    def model(self) -> Tarsier:
        model = random_model(self.config, self.mesh)
        return model if self.platform == "tpu" else unstack(model)

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes per second that one device reads and writes in a copy."""
        x = jax.random.normal(jax.random.key(0), (self.workload.copied // 4,))
        copy = jax.jit(lambda x: x + 1)
        return 2 * x.nbytes / time_calls(lambda: copy(x), 5)

    @functools.cached_property
    def product(self) -> float:
        """FLOP/s of one device in a matrix product."""
        n = self.workload.product
        x = jax.random.normal(jax.random.key(0), (n, n), self.dtype)
        multiply = jax.jit(jnp.dot)
        return 2 * n**3 / time_calls(lambda: multiply(x, x), 20)

    @property
    def peak(self) -> float | None:
        return peak_flops(self.devices[0]) if self.dtype == "bfloat16" else None

    @property
    def engine_config(self) -> SingleConfig:
        """The engine's shapes for clips of this size, with one clip per row."""
        size = self.workload
        bins = size.video[0] + size.video[0] % 2
        row = RowShape(size.prompt_tokens, bins, size.patches, 8, max(1, size.slots // 2))
        slots, parts = size.slots * self.groups, (self.groups, self.tensor)
        return SingleConfig(slots, size.prompt_tokens, size.new_tokens, (row,), *parts)

    @functools.cached_property
    def clip(self) -> Example:
        return make_example(self.config, *self.workload.video, 0, 0)

    @functools.cached_property
    def rows(self) -> Batch:
        """One row per data-parallel part with one clip each, on the devices."""
        row = Row(self.engine_config.buckets[0], self.config)
        row.add([self.clip])
        batch = stack_rows([row.build(0, self.dtype)] * self.groups)
        return self.on_devices(dataclasses.replace(batch, labels=None))

    def on_devices(self, tree: Any) -> Any:
        """Splits arrays with one entry per data-parallel part over the parts, and replicates the others."""
        mesh = self.mesh
        if mesh is None:
            return jax.tree.map(jnp.asarray, tree)

        def place(x: Any) -> jax.Array:
            return jax.device_put(x, NamedSharding(mesh, P(BATCH) if x.shape[:1] == (self.groups,) else P()))

        return jax.tree.map(place, tree)

    def empty_slots(self) -> DecodeState:
        shapes = self.engine_config
        with use_mesh_of(self.model):
            return empty_slots(self.model, shapes.slots, shapes.size, shapes.new_tokens, self.mesh)

    def mfu(self, part: str, name: str, flops: float, duration: float, note: str) -> Result:
        """Returns the row for `flops` of all devices in `duration` seconds."""
        rate = flops / duration / len(self.devices)
        shares = rate / self.product, rate / self.peak if self.peak else None
        return graded(Result(part, name, duration * 1e3, "ms", *shares, GOALS[part], note=note))


def graded(result: Result) -> Result:
    """Compares the share of the peak, or else of the measured ceiling, with the goal, and sets the status."""
    share = result.of_measured if result.of_peak is None else result.of_peak
    is_ok = result.goal is None or share is None or share >= result.goal
    return dataclasses.replace(result, status="ok" if is_ok else "below goal")


def random_model(config: ModelConfig, mesh: Mesh | None) -> Tarsier:
    """Returns a model with random weights, created on the devices. The weights of norms have the mean one."""
    graph, abstract = abstract_state(config)
    shardings = parameter_shardings(abstract, mesh) if mesh else {}
    parameters = []
    for i, (path, leaf) in enumerate(nnx.to_flat_state(abstract)):
        make = jax.jit(_random, static_argnames=("shape", "dtype"), out_shardings=shardings.get(path))
        mean = 1.0 if "norm" in parameter_path(path) and path[-1] == "weight" else 0.0
        array = make(jax.random.key(i), mean, shape=leaf.shape, dtype=leaf.dtype)
        parameters.append((path, leaf.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(parameters))


def _random(key: jax.Array, mean: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (mean + 0.02 * jax.random.normal(key, shape, dtype)).astype(dtype)


# The parts.


def measure_ceilings(bench: Bench) -> Iterator[Result]:
    note = f"{bench.workload.copied / _GIB:g} GiB per device"
    yield Result("ceilings", "copy", bench.bandwidth / 1e9, "GB/s", note=note)
    share = bench.product / bench.peak if bench.peak else None
    note = f"{bench.workload.product} x {bench.workload.product}, {bench.dtype}"
    yield Result("ceilings", "matrix product", bench.product / 1e12, "TFLOP/s", of_peak=share, note=note)


def measure_parity(bench: Bench) -> Iterator[Result]:
    implementation = default_implementation(bench.devices[0], "bfloat16")
    for case in cases(*bench.workload.parity):
        name = f"{case.name}, {implementation}"
        try:
            for array, error in errors(case, implementation):
                status = "ok" if error <= TOLERANCE else "FAILED"
                yield Result("parity", f"{name}, {array}", error, "relative error", status=status)
        except Exception as error:  # the other cases still run
            yield failure("parity", name, error)


def measure_engine(bench: Bench) -> Iterator[Result]:
    """Compares the engine's answers about synthetic clips with those for one prompt at a time, on the first device."""
    del bench
    jax.config.update("jax_default_matmul_precision", "highest")  # for the engine's thread too
    in_batches, alone = embedded_answers("float32")
    jax.config.update("jax_default_matmul_precision", None)
    equal = _equal(in_batches, alone)
    status = "ok" if equal == 1 else "FAILED"
    note = f"the engine's answers equal to those one by one, of {len(alone)}"
    yield Result("engine", "float32", 100 * equal, "%", status=status, note=note)
    half, half_alone = embedded_answers("bfloat16")
    yield Result("engine", "bfloat16", 100 * _equal(half, half_alone), "%", note=note)
    yield Result("engine", "bfloat16", 100 * _equal(half, alone), "%", note="the engine's answers equal to float32's")


def embedded_answers(dtype: str) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the embedded model's answers about 16 clips, from the engine and one by one."""
    model, processor = tarsier_jax.load(EMBEDDED, dtype)
    examples = [processor({"messages": [user_turn(clip.video)]}) for clip in draw_clips(HELD_OUT, 16)]
    config = fit_config(processor, 8, 96)
    config = SingleConfig(config.slots, config.prompt_tokens, config.new_tokens, config.buckets[-1:])
    answers = {}
    for answer in Engine(model, processor, config).run(
        Request(i, e, SamplingOptions(96)) for i, e in enumerate(examples)
    ):
        assert isinstance(answer, Completion), answer
        answers[answer.key] = answer.tokens
    sizes = [frame_sizes(example) for example in examples]
    buckets = Buckets(  # one size each: a single shape is compiled
        tokens=(max(len(example.input_ids) for example in examples),),
        patches=(max(int(size.prod(axis=1).max()) for size in sizes),),
        frames=(max(map(len, sizes)),),
    )
    alone = [_answer(model, dataclasses.replace(processor, buckets=buckets), example) for example in examples]
    return [answers[i] for i in range(len(examples))], alone


def _answer(model: Tarsier, processor: Processor, example: Example) -> list[int]:
    batch = jax.tree.map(jnp.asarray, processor.batch([example]))
    return generate_batch(model, batch, SamplingOptions(max_new_tokens=96), processor.eos_token_ids)[0].tokens


def _equal(answers: list[list[int]], others: list[list[int]]) -> float:
    return sum(a == b for a, b in zip(answers, others, strict=True)) / len(others)


def measure_sft(bench: Bench) -> Iterator[Result]:
    memory = _device_memory(bench.devices)
    if bench.name != "small" and memory < 60 * _GIB:
        note = f"AdamW's states of the 2B need 60 GiB; the devices have {memory / _GIB:.0f}"
        yield Result("sft", "step", status="skipped", note=note)
        return
    step = _sft_step(bench)
    note = f"{step.work.tokens:,} tokens on {len(bench.devices)} devices"
    yield bench.mfu("sft", "step", step.flops, step.seconds, note)
    yield Result("sft", "throughput", step.work.tokens / step.seconds, "tokens/s", note=note)
    yield Result("sft", "peak memory", step.memory / _GIB, "GiB", note="per device since the process started")


def _sft_step(bench: Bench) -> StepTiming:
    if bench.name != "small":
        return measure_step(config_2b(), row_2b(16_384), VIDEO_2B, 5)
    config = dataclasses.replace(bench.config, param_dtype="float32", remat="full")
    return measure_step(config, RowShape(512, 4, 104, 2, 4), bench.workload.video, 2)


def measure_vision(bench: Bench) -> Iterator[Result]:
    model, rows, shapes = bench.model, bench.rows, bench.engine_config
    step, num_features = shapes.step(0), shapes.num_features(bench.config.vision)
    steps = jnp.int32(bench.workload.video[0] // step)
    with use_mesh_of(model):
        duration = time_calls(
            lambda: encode_frames(model, rows.patches, rows.frame_hw, steps, step=step, num_features=num_features), 3
        )
    sizes = frame_sizes(bench.clip).prod(axis=1).astype(int)
    work = Work(patches=int(sizes.sum()), patch_pairs=int((sizes**2).sum()))
    flops = bench.groups * step_flops(bench.config, work) / 3  # a training step is three forward passes
    yield bench.mfu("vision", "a clip", flops, duration, f"{len(sizes)} frames, {step} bins at a time")


def measure_prefill(bench: Bench) -> Iterator[Result]:
    model, rows, shapes, config = bench.model, bench.rows, bench.engine_config, bench.config
    tokens, state = len(bench.clip.input_ids), bench.empty_slots()
    prompts = SlotAssignment.none(bench.groups, shapes.buckets[0].samples)
    prompts.count[:], prompts.length[:, 0], prompts.max_new_tokens[:, 0] = 1, tokens, shapes.new_tokens
    shape = bench.groups, shapes.num_features(config.vision), config.text.hidden_size
    features = jax.random.normal(jax.random.key(0), shape, config.dtype)
    prompts, features = bench.on_devices((prompts, features))
    batch = dataclasses.replace(rows, patches=None, frame_hw=None)
    if prefers_lengths(config.attention):
        batch = without_segments(batch)

    def call() -> Any:
        nonlocal state
        state = prefill_into_slots(model, state, batch, features, prompts)
        return state.num_generated

    with use_mesh_of(model):
        duration = time_calls(call, 3)
    work = Work(tokens=tokens, token_pairs=tokens * (tokens + 1) // 2)
    flops = bench.groups * step_flops(config, work) / 3  # without logits
    note = f"{tokens:,} tokens in a row of {shapes.buckets[0].tokens:,}"
    yield bench.mfu("prefill", "a clip", flops, duration, note)


def measure_decode(bench: Bench) -> Iterator[Result]:
    shapes, tokens = bench.engine_config, len(bench.clip.input_ids)
    state = jax.jit(_fill_cache, donate_argnums=0)(bench.empty_slots())
    few, many = (4, 16) if bench.name == "small" else (16, 64)
    with use_mesh_of(bench.model):
        state, short = _time_decode(bench, state, few)
        state, long = _time_decode(bench, state, many)
    step = (long - short) / (many - few)
    weights, cache = _bytes_per_step(bench, state, tokens + many // 2)
    floor = (weights / bench.tensor + cache / len(bench.devices)) / bench.bandwidth
    note = f"{shapes.slots} slots with {tokens:,} tokens; floor {floor * 1e3:.2f} ms"
    yield graded(Result("decode", "a step", step * 1e3, "ms", floor / step, goal=GOALS["decode"], note=note))
    note = "as the engine calls it while prompts may arrive"
    yield Result("decode", f"a step in calls of {few}", short / few * 1e3, "ms", floor / (short / few), note=note)
    yield Result("decode", "throughput", shapes.slots / step, "tokens/s")


def _fill_cache(state: DecodeState) -> DecodeState:
    """Fills the cache with random values. Products of zeros need less power, and a GPU computes them faster."""

    def fill(x: jax.Array) -> jax.Array:
        return x + jax.random.normal(jax.random.key(x.ndim), x.shape[-2:], x.dtype) if x.ndim > 2 else x

    return dataclasses.replace(state, cache=jax.tree.map(fill, state.cache))


def _time_decode(bench: Bench, state: DecodeState, steps: int) -> tuple[DecodeState, float]:
    """Returns the state, and the seconds of a call of `steps` steps of all slots, each after a clip's prompt."""
    slots, prompt = bench.engine_config.slots, len(bench.clip.input_ids)
    none, cancelled = jnp.zeros(0, jnp.int32), jnp.zeros(slots, bool)

    def call() -> Any:
        nonlocal state
        cache = dataclasses.replace(state.cache, lengths=jnp.full(slots, prompt, jnp.int32))
        numbers = {
            "num_generated": jnp.zeros(slots, jnp.int32),
            "max_new_tokens": jnp.full(slots, steps + 1, jnp.int32),
        }
        running = dataclasses.replace(state, cache=cache, done=jnp.zeros(slots, bool), **numbers)
        size = bench.engine_config.size
        state, (done, _) = decode_slots(
            bench.model, running, cancelled, none, jnp.int32(steps), jnp.int32(slots), read_length=size
        )
        return done

    duration = time_calls(call, 2)
    return state, duration


def _bytes_per_step(bench: Bench, state: DecodeState, tokens: int) -> tuple[int, int]:
    """Returns the bytes of the weights that a step reads, and of the keys and values of `tokens` tokens per slot."""
    decoder, text = bench.model.decoder, bench.config.text
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(decoder)))
    if not text.tie_embeddings:
        weights -= decoder.embed.weight[...].nbytes  # a step reads one row per slot
    cache = sum(x.nbytes for x in jax.tree.leaves(state.cache) if x.ndim > 2)
    return weights, cache * tokens // bench.engine_config.size


def measure_clips(bench: Bench) -> Iterator[Result]:
    processor: Any = NoTexts(bench.config)
    n, answer = 2 * bench.engine_config.slots, bench.workload.answer
    runner = Engine(bench.model, processor, bench.engine_config)
    limits = [answer // 2 + answer * (7 * i % n) // (n - 1) for i in range(n)]  # 0.5 to 1.5 times the mean
    start = time.perf_counter()
    for result in runner.run(Request(i, bench.clip, SamplingOptions(limit)) for i, limit in enumerate(limits)):
        assert isinstance(result, Completion), result
    rate = n / (time.perf_counter() - start)
    note = f"{n} clips, {sum(limits) / n:.0f} new tokens each; device busy {runner.stats.busy_share:.0%}"
    yield Result("clips", "throughput", 3600 * rate, "clips/h", note=note)


PARTS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "ceilings": measure_ceilings,
    "parity": measure_parity,
    "engine": measure_engine,
    "sft": measure_sft,  # before the model of the next parts, since it reports the peak of memory
    "vision": measure_vision,
    "prefill": measure_prefill,
    "decode": measure_decode,
    "clips": measure_clips,
}


def failure(part: str, name: str, error: Exception) -> Result:
    traceback.print_exception(error)
    reason = (str(error).strip().splitlines() or [""])[0]
    return Result(part, name, status="FAILED", note=f"{type(error).__name__}: {reason[:200]}")


def results(bench: Bench, parts: list[str]) -> Iterator[Result]:
    """Yields the rows of each part, and a row with the failure of a part that raises an exception."""
    for part in parts:
        start = time.perf_counter()
        try:
            yield from PARTS[part](bench)
        except Exception as error:  # the other parts still run
            yield failure(part, "part", error)
        print(f"# {part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def row_text(result: Result) -> str:
    def share(x: float | None) -> str:
        return "" if x is None else f"{x:.1%}"

    value = "" if result.value is None else f"{result.value:.4g}"
    cells = (share(result.of_measured), share(result.of_peak), share(result.goal), result.status)
    figures = f"{result.part:<9} {result.name:<40} {value:>9} {result.unit:<14}"
    return f"{figures} {cells[0]:>9} {cells[1]:>8} {cells[2]:>6}  {cells[3]:<10} {result.note}".rstrip()


def write_json(path: Path, bench: Bench, rows: list[Result]) -> None:
    device = bench.devices[0]
    environment = {
        "device": device.device_kind,
        "devices": len(bench.devices),
        "mesh": f"data {bench.groups}, tensor {bench.tensor}",
        "runtime": device.client.platform_version,
        "jax": jax.__version__,
        "size": bench.name,
        "dtype": bench.dtype,
        "attention": bench.attention,
    }
    path.write_text(json.dumps({**environment, "results": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n")


def _device_memory(devices: list[Any]) -> int:
    """Returns the bytes of all devices, or 0 if they do not report them."""
    return sum((device.memory_stats() or {}).get("bytes_limit", 0) for device in devices)


def largest_size() -> str:
    memory = 0 if jax.default_backend() == "cpu" else _device_memory(jax.devices())
    return next(name for name, size in WORKLOADS.items() if size.memory <= memory)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=WORKLOADS, help="default: the largest that fits; small on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--json", type=Path, help="a file for the results")
    args = parser.parse_args(argv)
    bench = Bench(args.size or largest_size())
    print(f"{len(bench.devices)} x {bench.devices[0].device_kind}, jax {jax.__version__}, {bench.name}, {bench.dtype}")
    heading = f"{'part':<9} {'':<40} {'':>9} {'':<14} {'measured':>9} {'peak':>8} {'goal':>6}  status"
    print(f"{'share of the ceiling':>94}\n{heading}", flush=True)
    rows: list[Result] = []
    for result in results(bench, args.parts):
        rows.append(result)
        print(row_text(result), flush=True)
        if args.json:
            write_json(args.json, bench, rows)
    return 1 if any(row.status == "FAILED" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
