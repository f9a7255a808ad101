"""How a run captions clips, wherever its engines run, and the line that it writes about each."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax

import tarsier_jax
from infer.bulk.inputs import Item, with_prediction
from infer.bulk.journal import Journal
from infer.bulk.loading import LoadStats, load_requests
from infer.engine import Completion, Engine, Request, RequestError, SharedEngine, fit_config
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import check_sampling
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import ProcessorOptions
from tarsier_jax.programs import resolve_dtype
from tarsier_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """What every engine of a run is made of and told; the fields are the flags of `infer.caption`.

    Raises:
        InputError: a value is outside its range.
    """

    model: str
    dtype: str
    int8: bool
    mesh: str
    slots: int
    n_frames: int
    prompt_tokens: int | None
    max_new_tokens: int
    prompt: str
    temperature: float
    top_p: float
    seed: int
    workers: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})

    def __post_init__(self) -> None:
        check_sampling(self.temperature, 0, self.top_p, seed=self.seed)
        if self.max_new_tokens < 1 or self.workers < 0:
            raise InputError(
                f"--max_new_tokens {self.max_new_tokens} has to be at least 1, and --workers {self.workers} at least 0."
            )
        mesh_sizes(self.mesh)
        _ = self.options

    @property
    def options(self) -> ProcessorOptions:
        return ProcessorOptions(n_frames=self.n_frames)

    def start(self) -> Engine:
        """Loads the model over this process's devices and compiles the engine.

        Raises:
            CheckpointError, InputError: the model cannot be loaded, or does not fit the devices.
        """
        mesh = local_mesh(self.mesh)
        model, processor = tarsier_jax.load(self.model, resolve_dtype(self.dtype), mesh, self.int8)
        processor = dataclasses.replace(processor, options=self.options)
        groups = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        return Engine(
            model, processor, fit_config(processor, self.slots, self.max_new_tokens, groups, self.prompt_tokens)
        )

    def lines(
        self,
        engine: Engine | SharedEngine,
        items: Sequence[Item],
        loading: LoadStats,
        journal: Journal | None = None,
    ) -> Iterator[dict[str, Any]]:
        """A line for each item, in the order in which they end: its caption, or why there is none."""

        def make(number: int, example: Example) -> Request:
            sampling = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed + number}
            return Request(number, example, self.max_new_tokens, **sampling)

        numbered = {item.number: item for item in items}
        requests = load_requests(items, engine.processor, self.prompt, make, self.workers, loading, journal)
        for result in engine.run(requests):
            yield _line(numbered[result.key], result, engine, self.prompt)


def mesh_sizes(flag: str) -> dict[str, int]:
    """The sizes that --mesh gives to axes. Raises InputError."""
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in flag.split(",") if part)}
        if sizes.keys() <= {"data", "fsdp", "tensor"} and min(sizes.values(), default=1) > 0:
            return sizes
    except ValueError:
        pass
    raise _unfit_mesh(flag, "what a mesh is")


def local_mesh(flag: str) -> jax.sharding.Mesh | None:
    """The mesh over this process's devices; None for one device. Raises InputError."""
    devices, sizes = jax.local_devices(), mesh_sizes(flag)
    sizes.setdefault("data", len(devices) // (sizes.get("tensor", 1) * sizes.get("fsdp", 1)))
    try:
        mesh = make_mesh(**sizes, devices=devices)
    except ValueError:
        raise _unfit_mesh(flag, f"{len(devices)} devices") from None
    return mesh if len(devices) > 1 else None


def _unfit_mesh(flag: str, what: str) -> InputError:
    return InputError(
        f"--mesh {flag} does not fit {what}. Give axes (data, fsdp, tensor) whose sizes multiply to the number of "
        "devices, such as data=2,tensor=4."
    )


def _line(item: Item, result: Completion | RequestError, engine: Engine | SharedEngine, prompt: str) -> dict[str, Any]:
    known = {"idx": item.idx, "input": item.input}
    if isinstance(result, RequestError):
        return {**known, "error": result.reason}
    text, example = engine.text(result), result.request.example
    told = {
        "n_frames": example.frames,
        "tokens": len(result.tokens),
        "finish_reason": result.finish_reason,
        "seconds": round(result.seconds, 3),
    }
    if item.is_annotation:
        return {**with_prediction(item.line, text), **known, **told}
    return {**known, "caption": text, "prompt": item.line.get("prompt") or prompt, **told}
