"""The options of a captioning run, the engine that they make, and the output line of each clip."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax

import tarsier_jax
from infer.bulk.inputs import Item, with_prediction
from infer.engine import Completion, Engine, Frontend, RequestError, fit_config
from infer.media import MediaLimits, MediaLoader
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.image_files import MAX_PIXELS
from tarsier_jax.processing.options import ProcessorOptions
from tarsier_jax.processing.processor import Processor
from tarsier_jax.programs import (
    add_model_flag,
    add_precision_flags,
    add_sampling_flags,
    read_sampling_flags,
    resolve_dtype,
)
from tarsier_jax.sharding import make_mesh
from tarsier_jax.weights.quantize import Int8

# The user's own clips may have any size. Only a decoder that hangs or takes all memory is ended.
_LIMITS = MediaLimits(
    max_bytes=sys.maxsize,
    max_pixels=MAX_PIXELS,
    max_frames=sys.maxsize,
    max_animation_frames=sys.maxsize,
    max_selected_frames=sys.maxsize,
    max_seconds=sys.maxsize,
    timeout=600.0,
    memory_bytes=32 << 30,
    cache_bytes=1,
)


def add_config_flags(parser: argparse.ArgumentParser, seed_help: str) -> None:
    """Adds the flags of `CaptionConfig`."""
    add_model_flag(parser)
    parser.add_argument(
        "--prompt",
        default="Describe the video in detail.",
        help="used where the list has no prompt (default %(default)r)",
    )
    parser.add_argument("--n_frames", type=int, help="frames sampled from each video (default: the model's, 8 or 16)")
    parser.add_argument(
        "--slots", type=int, default=32, help="captions in progress at once, over all devices (default 32)"
    )
    parser.add_argument(
        "--prompt_tokens",
        type=int,
        help="limit of a prompt, in tokens (default: --n_frames of the largest frame, and 256 of text)",
    )
    parser.add_argument("--workers", type=int, default=2, help="threads that decode videos (default 2)")
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="decode in child processes: a clip on which a decoder crashes costs an error line, not the run",
    )
    parser.add_argument("--mesh", default="", help="such as data=2,tensor=4 (default: all devices on the data axis)")
    add_precision_flags(parser)
    add_sampling_flags(parser, seed_help)


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """The options of a run, equal for all of its engines.

    Attributes:
        model: Checkpoint directory or hub id.
        adapter: Directory of a LoRA adapter, its URL, or None.
        dtype: "auto", "float32" or "bfloat16".
        int8: Store the decoder's weights in int8, see `tarsier_jax.load`.
        mesh: Sizes of mesh axes, such as "data=2,tensor=4".
        slots: Number of captions in progress at once, over all devices.
        prompt_tokens: Limit of a prompt, in tokens; None derives it from the processor's options.
        prompt: Used where an item has none.
        workers: Number of threads that decode clips.
        n_frames: Frames per video; None for the checkpoint's default.
        isolate: Decode clips in child processes, where a crash of a decoder costs its clip only.
        sampling: How captions are generated; clip i with seed `sampling.seed` + i.

    Raises:
        InputError: a value is outside its range.
    """

    model: str
    adapter: str | None
    dtype: str
    int8: Int8
    mesh: str
    slots: int
    prompt_tokens: int | None
    prompt: str
    workers: int
    n_frames: int | None
    isolate: bool
    sampling: SamplingOptions

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Returns the config of the flags of `add_config_flags`."""
        names = ("model", "adapter", "dtype", "int8", "mesh", "slots", "prompt_tokens", "prompt", "workers")
        names = (*names, "n_frames", "isolate")
        options = {name: getattr(args, name) for name in names}
        return cls(**options, sampling=read_sampling_flags(args))

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise InputError(f"--workers is {self.workers}; it must be at least 0.")
        if self.n_frames is not None:
            ProcessorOptions(n_frames=self.n_frames)  # raises InputError
        mesh_sizes(self.mesh)

    @property
    def caption_options(self) -> dict[str, Any]:
        """The options that the captions depend on, besides the model."""
        names = ("dtype", "int8", "prompt", "n_frames")
        return {name: getattr(self, name) for name in names} | dataclasses.asdict(self.sampling)

    def start(self) -> Engine:
        """Loads the model over this process's devices and compiles the engine; see `start_engine`."""
        return start_engine(
            self.model,
            adapter=self.adapter,
            dtype=self.dtype,
            int8=self.int8,
            mesh=self.mesh,
            slots=self.slots,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.sampling.max_new_tokens,
            options={} if self.n_frames is None else {"n_frames": self.n_frames},
        )

    @contextlib.contextmanager
    def preparer(self, processor: Processor) -> Iterator[Callable[[Mapping[str, Any]], Example]]:
        """Yields the function that prepares samples: the processor, or with `isolate` a loader with child processes."""
        if not self.isolate:
            yield processor
            return
        with MediaLoader(processor, _LIMITS, workers=max(1, self.workers), root="/") as loader:
            yield loader

    def lines(self, frontend: Frontend, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """Yields the output line of each item in the order in which captions end: its caption, or its error.

        Only the items in progress are in memory.
        """
        pending: dict[int, Item] = {}

        def numbered() -> Iterator[tuple[int, Item]]:
            for item in items:
                pending[item.number] = item
                yield item.number, item

        for number, result in frontend.answer_all(numbered(), self.sampling):
            yield _line(pending.pop(number), result, self.prompt)


def start_engine(
    model: str,
    *,
    dtype: str,
    int8: Int8,
    mesh: str,
    slots: int,
    prompt_tokens: int | None,
    new_tokens: int,
    options: Mapping[str, Any],
    reuse_prefixes: bool = False,
    adapter: str | Path | None = None,
) -> Engine:
    """Loads a model over this process's devices and compiles its engine.

    Args:
        model: Checkpoint directory or hub id.
        dtype: "auto", "float32" or "bfloat16".
        int8: Store the decoder's weights in int8, see `tarsier_jax.load`.
        mesh: Sizes of mesh axes, such as "data=2,tensor=4".
        slots: Number of answers in progress at once, over all devices.
        prompt_tokens: Limit of a prompt, in tokens; None derives it from the processor's options.
        new_tokens: Limit of an answer, in tokens.
        options: Options of the processor, such as n_frames.
        reuse_prefixes: As in EngineConfig.
        adapter: Directory of a LoRA adapter, or None.

    Raises:
        CheckpointError, InputError: the model cannot be loaded, or does not fit the devices.
    """
    devices = local_mesh(mesh)
    parameters, processor = tarsier_jax.load(model, resolve_dtype(dtype), devices, int8, adapter)
    processor = processor.replace(**options)
    config = fit_config(processor, slots, new_tokens, devices, prompt_tokens)
    return Engine(parameters, processor, dataclasses.replace(config, reuse_prefixes=reuse_prefixes))


def mesh_sizes(flag: str) -> dict[str, int]:
    """Returns the size of each axis in --mesh. Raises InputError."""
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in flag.split(",") if part)}
        if sizes.keys() <= {"data", "fsdp", "tensor"} and min(sizes.values(), default=1) > 0:
            return sizes
    except ValueError:
        pass
    raise _mesh_error(flag, "is not a list of axes and sizes")


def local_mesh(flag: str) -> jax.sharding.Mesh | None:
    """Returns the mesh over this process's devices; None for one device. Raises InputError."""
    devices, sizes = jax.local_devices(), mesh_sizes(flag)
    sizes.setdefault("data", len(devices) // (sizes.get("tensor", 1) * sizes.get("fsdp", 1)))
    try:
        mesh = make_mesh(**sizes, devices=devices)
    except ValueError:
        raise _mesh_error(flag, f"does not fit {len(devices)} devices") from None
    return mesh if len(devices) > 1 else None


def _mesh_error(flag: str, problem: str) -> InputError:
    return InputError(
        f"--mesh {flag} {problem}. Use axes (data, fsdp, tensor) whose sizes multiply to the number of "
        "devices, such as data=2,tensor=4."
    )


def _line(item: Item, result: Completion | RequestError, prompt: str) -> dict[str, Any]:
    source = {"idx": item.idx, "input": item.input}
    if item.start is not None:
        source |= {"start": item.start, "end": item.end}
    if isinstance(result, RequestError):
        return {**source, "error": result.reason}
    example = result.request.example
    details = {
        "n_frames": example.frames,
        "prompt_tokens": len(example.input_ids),
        "new_tokens": len(result.tokens),
        "finish_reason": result.finish_reason,
        "seconds": round(result.seconds, 3),
    }
    if item.is_annotation:
        return {**with_prediction(item.line, result.text), **source, **details}
    return {**source, "caption": result.text, "prompt": item.line.get("prompt") or prompt, **details}
