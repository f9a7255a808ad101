"""LoRA (arXiv 2106.09685): small matrices that are trained beside the frozen weights of the model."""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.families import family_of
from tarsier_jax.models.layers import LowRank
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.weights.adapter import linear_parameters
from tarsier_jax.weights.names import Parameter
from train.checks import check, check_at_least

BASE = r"(?!.*/lora/[ab]$).*"  # paths of all parameters that are not of LoRA


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Training of low-rank updates instead of the model's parameters.

    Attributes:
        rank: Rank of the updates; 0 trains the parameters themselves.
        alpha: The updates are multiplied by alpha / rank.
        targets: Names or last parts of the names of modules in the language model, as in PEFT's target_modules.
        vision_targets: The same for the vision tower and the projector, such as ("attn.qkv", "attn.proj", "mlp.fc1").
        int8: Store the frozen weights of the decoder's layers in int8, as --int8 does for inference (needs qwix).

    Raises:
        InputError: a value is out of its range.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    vision_targets: tuple[str, ...] = ()
    int8: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, 0, "rank")
        check(self, ["alpha"], lambda alpha: 0 < alpha < math.inf, "above 0")
        check(self, ["targets"], lambda targets: bool(targets or self.vision_targets), "at least one name")
        check(self, ["int8"], lambda int8: self.rank > 0 or not int8, "False unless rank is set: int8 is not trained")


def add_lora(config: ModelConfig, lora: LoraConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the structure of the model with LoRA, and the shapes of its parameters.

    The matrices of "decoder/layers/attn/q/weight" are "decoder/layers/attn/q/lora/a" and ".../b", stacked as it is.

    Raises:
        InputError: a target is not the name of a module.
    """
    targets = _target_parameters(config, lora)

    def make() -> Tarsier:
        model = family_of(config).model(config, nnx.Rngs(0))
        modules: dict[Any, Any] = dict(nnx.iter_modules(model))
        for parameter in targets:
            *outputs, d_in = parameter.shape
            a = jnp.zeros((*(outputs[:1] if parameter.stacked else ()), lora.rank, d_in))
            b = jnp.zeros((*outputs, lora.rank))
            modules[parameter.path[:-1]].lora = nnx.data(LowRank(a, b, lora.alpha / lora.rank))
        return model

    return nnx.split(nnx.eval_shape(make))


def _target_parameters(config: ModelConfig, lora: LoraConfig) -> list[Parameter]:
    every = linear_parameters(config)
    decoder = [parameter for parameter in every if parameter.path[0] == "decoder"]
    vision = [parameter for parameter in every if parameter.path[0] == "vision"]
    return [*_select("targets", lora.targets, decoder), *_select("vision_targets", lora.vision_targets, vision)]


def _select(field: str, targets: Sequence[str], parameters: Sequence[Parameter]) -> list[Parameter]:
    names = {parameter.names[0].removesuffix(".weight"): parameter for parameter in parameters}
    matches = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
    if unknown := [target for target in targets if not matches[target]]:
        choices = sorted({".".join(name.split(".")[-2:]) for name in names})
        raise InputError(f"lora.{field} has {unknown[0]!r}, which is no module. Choose from {', '.join(choices)}.")
    hits = set(itertools.chain(*matches.values()))
    return [parameter for name, parameter in names.items() if name in hits]


def init_lora(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, jax.Array]:
    """Returns the first matrices: A is uniform in +-1 / sqrt(in), and B is 0. PEFT's LoraLayer.reset_lora_parameters.

    The values do not depend on the mesh.
    """
    params = {}
    for path, x in shapes.items():
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(x.shape[-1])
        is_a = path.endswith("/a")
        params[path] = jax.random.uniform(key, x.shape, x.dtype, -bound, bound) if is_a else jnp.zeros(x.shape, x.dtype)
    return params


def lora_matrices(params: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Returns the trained matrices by the path of their weight, as `write_adapter` takes them."""
    modules = [path.removesuffix("/lora/a") for path in params if path.endswith("/lora/a")]
    return {(*m.split("/"), "weight"): (params[f"{m}/lora/a"], params[f"{m}/lora/b"]) for m in modules}
