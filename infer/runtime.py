"""What the programs of this room share: a process's settings, a machine's dtype, captions of single files."""

import argparse
import dataclasses
import os
from typing import Any, Self

import jax
import jax.numpy as jnp

from tarsier_jax.api import use_mesh_of
from tarsier_jax.errors import InputError
from tarsier_jax.files import cache_directory, path_text
from tarsier_jax.generation.decode import generate_batch
from tarsier_jax.generation.sampling import Sampling, check_sampling, make_sampling
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.processor import Processor, media_sample
from tarsier_jax.weights import EMBEDDED


def prepare_process() -> None:
    """Keeps compiled programs in the user's cache directory, so that only a machine's first run compiles.

    Also spares the user transformers' advice to install PyTorch, which describing does not use.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if directory := cache_directory("xla"):
        jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    """--model, the same in every program."""
    parser.add_argument(
        "--model",
        type=path_text,
        default=EMBEDDED,
        help="checkpoint directory (Hugging Face or converted) or hub id (default %(default)s, the small model in the "
        "package, which knows moving shapes only)",
    )


def add_precision_flags(parser: argparse.ArgumentParser) -> None:
    """--dtype and --int8."""
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--int8", action="store_true", help="hold the weights of the decoder's layers in int8")


def resolve_dtype(dtype: str, platform: str | None = None) -> str:
    """ "auto" is bfloat16 on accelerators and float32 on CPUs, which compute bfloat16 slowly.

    platform: "cpu", "gpu" or "tpu"; JAX's default backend when None.
    """
    if dtype != "auto":
        return dtype
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Options:
    """How an answer is generated; the fields are those of `tarsier_jax.generate`. Raises InputError for unfit ones."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, 0, self.top_p, seed=self.seed)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")

    def sampling(self) -> Sampling:
        return make_sampling(1, temperature=self.temperature, top_p=self.top_p)


@dataclasses.dataclass(frozen=True)
class Caption:
    """One described file; the fields of a line that `infer.describe --json` prints."""

    input: str
    prompt: str
    caption: str
    n_frames: int
    prompt_tokens: int
    new_tokens: int
    finish_reason: str


def describe_file(model: Tarsier, processor: Processor, path: str, prompt: str, options: Options) -> Caption:
    """Answers `prompt` about one video, GIF or image.

    Raises:
        InputError: the file cannot be used.
    """
    example = processor(media_sample(path, prompt))
    batch = jax.tree.map(jnp.asarray, processor.batch([example]))
    with use_mesh_of(model):
        (answer,) = generate_batch(
            model,
            batch,
            sampling=options.sampling(),
            eos_ids=processor.eos_token_ids,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
        )
    return Caption(
        input=path,
        prompt=prompt,
        caption=processor.decode(answer.tokens),
        n_frames=example.frames,
        prompt_tokens=len(example.input_ids),
        new_tokens=len(answer.tokens),
        finish_reason=answer.finish_reason,
    )


class Compilations:
    """Counts the programs that XLA compiles meanwhile."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0

    def _heard(self, event: str, *_: Any, **__: Any) -> None:
        self.count += event == self._EVENT

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)
