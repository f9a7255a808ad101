"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import family_of
from tarsier_jax.files import new_directory
from tarsier_jax.storage import local_source
from tarsier_jax.weights.names import Parameter, parameters
from tarsier_jax.weights.safetensors import Tensor, open_file

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<matrix>[AB])\.(?:default\.)?weight")
_MAX_LISTED = 5  # names in an error

# Fields of adapter_config.json that determine the scale of the update.
_SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# Fields without effect on the output of a stored adapter. The names of its tensors determine the modules.
_WITHOUT_EFFECT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("megatron_config", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"),
    "runtime_config",
)
# Initial values that do not change the base model, which others (PiSSA, OLoRA, LoftQ, CorDA) do.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The low-rank updates of an adapter.

    Attributes:
        matrices: Path of a weight -> (A, B) with the update B A, float32: [rank, in] and [out, rank], with a leading
            layer dimension for stacked weights. B contains the scale; layers without an update have zeros.
    """

    matrices: Mapping[tuple[Any, ...], tuple[np.ndarray, np.ndarray]]

    def merge(self, path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        """Returns W + B A for the parameter W at `path`, and deletes `x` if the adapter updates it."""
        if path not in self.matrices:
            return x
        return jax.block_until_ready(_merge(x.sharding)(x, *self.matrices[path]))  # before the next one is loaded


@functools.cache
def _merge(sharding: jax.sharding.Sharding) -> Any:
    def add(matrices: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = matrices
        update = jnp.matmul(b, a, precision="highest").reshape(weight.shape)
        return (weight.astype(jnp.float32) + update).astype(weight.dtype)

    def run(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # Layer by layer: the update of all layers in float32 can be larger than the model.
        return jax.lax.map(add, (weight, a, b)) if a.ndim == 3 else add((weight, a, b))

    return jax.jit(run, donate_argnums=0, out_shardings=sharding)


def read_adapter(directory: str | Path, config: ModelConfig) -> Adapter:
    """Reads an adapter of PEFT for a model of these sizes, in any of the family's layouts of names.

    Args:
        directory: Directory of the adapter, or its URL in an object store.
        config: Configuration of the model.

    Raises:
        InputError: the URL cannot be read.
        CheckpointError: the directory is not an adapter of LoRA, has an option that is not supported, or does not fit
            the model. The message names the option or the tensors.
    """
    directory = Path(local_source(str(directory)))
    options = _read_options(directory)
    file = next((path for name in _WEIGHTS if (path := directory / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{directory} contains no {_WEIGHTS[0]}. Download the adapter again.")
    names, problems = _module_names(config), []
    updates: dict[Parameter, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for module, pair in _pair(open_file(file)).items():
        try:
            parameter, layer = names[module]
            a, b = _read_pair(pair["A"], pair["B"], parameter)
        except KeyError:
            problems.append(f"{module} is not a matrix of the model with lora_A and lora_B")
        except ValueError as error:
            problems.append(f"{module} has {error}")
        else:
            updates.setdefault(parameter, {})[layer] = a, b * np.float32(_scale(options, module, len(a)))
    if problems or not updates:
        listed = "; ".join(problems[:_MAX_LISTED]) or "it contains no lora_A and lora_B"
        raise CheckpointError(
            f"{directory} does not fit the model: {listed}. Pass the base model of the adapter as --model."
        )
    return Adapter({parameter.path: _stack(parameter, layers) for parameter, layers in updates.items()})


def _module_names(config: ModelConfig) -> dict[str, tuple[Parameter, int]]:
    """Returns the weight and the layer of each module, by its name in any layout."""
    return {
        name.removesuffix(".weight"): (parameter, layer)
        for layout in family_of(config).layouts
        for parameter in parameters(config, layout)
        for layer, name in enumerate(parameter.names)
        if name.endswith(".weight")
    }


def _read_options(directory: Path) -> dict[str, Any]:
    """Returns the content of adapter_config.json. Raises CheckpointError for options that are not supported."""
    path = directory / ADAPTER_CONFIG
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        kind = options.get("peft_type")
        scales = float(options["lora_alpha"]), int(options["r"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a LoRA adapter: it contains no {ADAPTER_CONFIG}. Use WORKDIR/adapter of a training "
            "run with config.lora.rank, or an adapter of PEFT."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} cannot be read ({e!r}). Download the adapter again.") from None
    if kind != "LORA" or scales[1] < 1:
        raise CheckpointError(f"{path} has peft_type {kind} and r {scales[1]}, but only LoRA (LORA) can be read.")
    if problems := list(_unsupported(options)):
        raise CheckpointError(
            f"{path} has {', '.join(problems)}, which is not supported. Merge the adapter with PEFT "
            "(`merge_and_unload`), and use the merged model."
        )
    return options


def _unsupported(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if name == "init_lora_weights":
            is_plain = value in _PLAIN_STARTS
        elif name == "bias":
            is_plain = value == "none"
        else:
            is_plain = name in _SCALES or name in _WITHOUT_EFFECT or not value
        if not is_plain:
            yield f"{name} {value!r}"


def _pair(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors A and B of each module. Other tensors are listed under their own names."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        module, matrix = (match["module"], match["matrix"]) if match else (name, "other")
        pairs.setdefault(module, {})[matrix] = tensor
    return pairs


def _read_pair(a: Tensor, b: Tensor, parameter: Parameter) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B in float32. Those of a convolution over whole patches are flattened.

    Raises:
        ValueError: their shapes do not fit the weight.
    """
    shape = parameter.tensor_shape[0], math.prod(parameter.tensor_shape[1:])
    sizes = [(tensor.shape[0], math.prod(tensor.shape[1:])) for tensor in (a, b) if tensor.shape]
    if len(sizes) < 2 or (sizes[1][0], sizes[0][1]) != shape or sizes[0][0] != sizes[1][1]:
        raise ValueError(f"A {a.shape} and B {b.shape} for a weight {shape}")
    first, second = (tensor.read(0, tensor.size).astype(np.float32) for tensor in (a, b))
    return first.reshape(sizes[0]), second.reshape(sizes[1])


def _scale(options: Mapping[str, Any], module: str, rank: int) -> float:
    """Returns alpha / rank, or alpha / sqrt(rank) of rsLoRA (arXiv 2312.03732). PEFT's LoraLayer.update_layer."""
    patterns = options.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), options["lora_alpha"])
    return alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _stack(parameter: Parameter, layers: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B of all layers. Smaller ranks are padded with zeros."""
    if not parameter.stacked:
        return layers[0]
    rank = max(a.shape[0] for a, _ in layers.values())
    first_a, first_b = next(iter(layers.values()))
    depth = parameter.shape[0]
    a = np.zeros((depth, rank, first_a.shape[1]), np.float32)
    b = np.zeros((depth, first_b.shape[0], rank), np.float32)
    for layer, (own_a, own_b) in layers.items():
        a[layer, : own_a.shape[0]] = own_a
        b[layer, :, : own_b.shape[1]] = own_b
    return a, b


def linear_parameters(config: ModelConfig) -> list[Parameter]:
    """Returns the weights that training with LoRA can update, with the names of transformers.

    These are the matrices of the decoder's layers, of the vision tower's blocks and of the projector.
    """
    return [p for p in _named(config) if len(p.tensor_shape) == 2 and not re.search("embed|lm_head", p.names[0])]


def _named(config: ModelConfig) -> list[Parameter]:
    named = parameters(config, family_of(config).peft_layout)
    return [parameter for parameter in named if parameter.names[0].endswith(".weight")]


def write_adapter(
    out: Path,
    config: ModelConfig,
    matrices: Mapping[tuple[Any, ...], tuple[np.ndarray, np.ndarray]],
    alpha: float,
    base: str,
) -> None:
    """Writes an adapter as PEFT reads it, with the names of transformers. `out` appears only when it is complete.

    Args:
        out: Directory to create.
        config: Sizes of the model.
        matrices: As in `Adapter`, but without the scale, and with several output dimensions as in `LowRank`.
        alpha: Scale of the update times the rank.
        base: Name or directory of the base model.

    Raises:
        CheckpointError: `out` exists, or the disk is full.
    """
    from safetensors.numpy import save_file

    targets = [parameter for parameter in linear_parameters(config) if parameter.path in matrices]
    tensors = {}
    for parameter in targets:
        a, b = matrices[parameter.path]
        for i, name in enumerate(parameter.names):
            own_a, own_b = (a[i], b[i]) if parameter.stacked else (a, b)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(own_a)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(own_b.reshape(-1, own_b.shape[-1]))
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": next(iter(matrices.values()))[0].shape[-2],
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(targets, _named(config)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_directory(out, sum(x.nbytes for x in tensors.values())) as partial:
        save_file(tensors, partial / _WEIGHTS[0], {"format": "pt"})
        (partial / ADAPTER_CONFIG).write_text(json.dumps(options, indent=2), encoding="utf-8")


def _target_modules(targets: Sequence[Parameter], every: Iterable[Parameter]) -> list[str] | str:
    """Returns the last parts of the modules' names, or a regular expression if these match other modules too."""
    parts = sorted({_module(parameter).rpartition(".")[2] for parameter in targets})
    if [p.path for p in every if _module(p).rpartition(".")[2] in parts] == [p.path for p in targets]:
        return parts
    patterns = (re.escape(_module(p)).replace(r"\.0\.", r"\.\d+\.", int(p.stacked)) for p in targets)
    return "|".join(patterns)


def _module(parameter: Parameter) -> str:
    return parameter.names[0].removesuffix(".weight")
