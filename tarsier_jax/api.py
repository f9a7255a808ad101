"""The main functions: load a checkpoint, and answer samples with it."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from tarsier_jax.families import family_of, load_config
from tarsier_jax.generation.decode import GeneratedTokens, generate_batch
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.attention import default_implementation
from tarsier_jax.models.tarsier import Tarsier, unstack
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor
from tarsier_jax.weights import load_weights, resolve
from tarsier_jax.weights.quantize import Int8


def load(
    path: str | Path,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    int8: Int8 = False,
    adapter: str | Path | None = None,
) -> tuple[Tarsier, Processor]:
    """Loads a checkpoint for inference.

    Args:
        path: A Hugging Face directory, a hub id ("omni-research/Tarsier2-Recap-7b"), or a directory written by
            `convert.hf_to_orbax`.
        dtype: "float32" or "bfloat16", for parameters and matrix products.
        mesh: From `tarsier_jax.sharding.make_mesh`; the parameters are sharded over it. None uses one device.
        int8: Stores the weights of the decoder's layers in int8, with one scale per output channel (needs qwix). When
            a Hugging Face directory is loaded, devices store at most the quantized model and one parameter in `dtype`.
            "w8a8" also rounds the inputs of their products to int8, with one scale per token: prefill is faster on TPUs
            and GPUs, and less exact.
        adapter: Directory or URL of a LoRA adapter in PEFT's format, such as WORKDIR/adapter of a training run. It is
            merged into the weights, before they are quantized.

    Raises:
        CheckpointError: the checkpoint or the adapter is missing, damaged or not supported.
        InputError: `int8` is unknown, or set and qwix is not installed.
    """
    directory = resolve(path)
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    attention = default_implementation(device, dtype)
    config = dataclasses.replace(load_config(directory), dtype=dtype, param_dtype=dtype, attention=attention)
    processor = family_of(config).load_processor(directory, config)  # before the weights: it fails fast
    model = load_weights(directory, config, mesh, int8, adapter)
    # See models.layers.apply_layers: only TPUs read the slice of a layer without copying it.
    return (model if device.platform == "tpu" else unstack(model)), processor


def generate(
    model: Tarsier,
    processor: Processor,
    samples: Sequence[Mapping[str, Any]],
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
) -> list[str]:
    """Answers samples (in the annotation format, see docs/design.md) as one batch.

    The options are those of `SamplingOptions`. The defaults are greedy.

    Raises:
        InputError: an option is outside its range, or a sample cannot be used. The message names the file and the
            remedy.
    """
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    return [a.text for a in answer(model, processor, [processor(sample) for sample in samples], options)]


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer up to the first stop string, without special tokens and surrounding white space.
        tokens: All generated tokens, including those of a stop string and after it, without the end of sequence.
        finish_reason: "stop" (at a stop string), "eos" or "length".
    """

    text: str
    tokens: list[int]
    finish_reason: str


def answer(
    model: Tarsier, processor: Processor, examples: Sequence[Example], options: SamplingOptions
) -> list[Generation]:
    """Answers examples, the outputs of the processor, as one batch.

    Raises:
        InputError: `examples` is empty, or an example exceeds the largest bucket.
    """
    with use_mesh_of(model):
        answers = generate_batch(model, processor.batch(examples), options, processor.eos_token_ids)
    return [_to_generation(processor, tokens, options) for tokens in answers]


def _to_generation(processor: Processor, answer: GeneratedTokens, options: SamplingOptions) -> Generation:
    text, is_stopped = options.truncate(processor.decode(answer.tokens))
    return Generation(text, answer.tokens, "stop" if is_stopped else answer.finish_reason)


def use_mesh_of(model: Tarsier) -> contextlib.AbstractContextManager:
    """Sets the mesh of the model's parameters, if they have one."""
    mesh = model_mesh(model)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def model_mesh(model: Tarsier) -> Mesh | None:
    """Returns the mesh of the model's parameters, or None."""
    sharding = model.decoder.norm.weight[...].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None
