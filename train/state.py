"""The state of a run and its one step: a pure function, jitted with explicit shardings and donation."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch
from tarsier_jax.sharding import BATCH, parameter_path, parameter_shardings
from tarsier_jax.weights import load_weights
from tarsier_jax.weights.names import abstract_state
from tarsier_jax.weights.quantize import check_qwix, quantized_shape, use_quantized
from train.lora import BASE, LoraConfig, add_lora, init_lora
from train.losses import Loss
from train.optimizer import OptimizerConfig, Params, make_optimizer, split_frozen

LossFunction = Callable[[Tarsier, Batch, dict[str, Any]], Loss]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step takes and returns.

    Attributes:
        step: Number of steps so far, int32 scalar.
        params: Trained parameters, float32, path -> array. With LoRA, its matrices.
        frozen: The other parameters, in the model's dtype or in int8.
        opt_state: State of optax for `params`.
        reference: Parameters of DPO's reference model, in the model's dtype; None in SFT, and with LoRA, whose frozen
            parameters are those of the reference model.
    """

    step: Any
    params: Params
    frozen: Params
    opt_state: Any
    reference: Params | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """The data of one step. The leading dimension of every array counts the parts whose gradients are summed.

    Attributes:
        batch: Packed rows.
        extra: Other inputs of the loss, such as DPO's reference log-probabilities.
    """

    batch: Batch
    extra: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """The constants of a run.

    Attributes:
        config: Sizes of the model, and its dtype, attention and remat.
        graph: Structure of the model.
        base_graph: Structure of the starting model, which differs from `graph` with LoRA.
        lora: Options of LoRA.
        mesh: Devices.
        tx: The optimizer.
        shapes: jax.ShapeDtypeStruct with a sharding for every array of the state.
    """

    config: ModelConfig
    graph: nnx.GraphDef
    base_graph: nnx.GraphDef
    lora: LoraConfig
    mesh: Mesh
    tx: optax.GradientTransformation
    shapes: TrainState

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.shapes)


def make_state_spec(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    steps: int,
    mesh: Mesh,
    with_reference: bool = False,
    lora: LoraConfig = LoraConfig(),
) -> StateSpec:
    """Returns the spec of a run without allocating device memory.

    Raises:
        InputError: the optimizer's patterns, its schedule or the targets of LoRA do not fit, or qwix is not installed.
        ValueError: a mesh axis does not divide the dimension that it splits.
    """
    base_graph, graph, abstract = model_structures(config, lora)
    optimizer = _without_base(optimizer) if lora.rank else optimizer
    shardings = {parameter_path(p): s for p, s in parameter_shardings(abstract, mesh).items()}
    shapes = {parameter_path(p): leaf.shape for p, leaf in nnx.to_flat_state(abstract)}

    def arrays(paths: Any, dtype: Any) -> Params:
        return {p: jax.ShapeDtypeStruct(shapes[p], jnp.dtype(dtype), sharding=shardings[p]) for p in paths}

    every = arrays(shapes, config.dtype)
    trained, frozen = split_frozen(every, optimizer.freeze)
    if lora.rank and any("/lora/" in path for path in frozen):
        raise InputError("optimizer.freeze freezes matrices of LoRA. Choose other patterns, or fewer lora targets.")
    if lora.int8:
        frozen = {path: quantized_shape(tuple(path.split("/")), x) for path, x in frozen.items()}
    params, tx = arrays(trained, "float32"), make_optimizer(optimizer, steps, every)
    everywhere = NamedSharding(mesh, P())

    def place(path: Any, leaf: Any) -> Any:  # a moment has the sharding of its parameter
        name = next((k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in params), None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name] if name else everywhere)

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    reference = every if with_reference and not lora.rank else None
    state = TrainState(step, params, frozen, opt_state, reference)
    return StateSpec(config, graph, base_graph, lora, mesh, tx, state)


def model_structures(config: ModelConfig, lora: LoraConfig) -> tuple[nnx.GraphDef, nnx.GraphDef, nnx.State]:
    """Returns the structures of the starting model and of the trained one, and the shapes of the trained one."""
    base, trained = abstract_state(config), add_lora(config, lora) if lora.rank else abstract_state(config)
    if not lora.int8:
        return base[0], *trained
    check_qwix()
    graphs = [nnx.split(use_quantized(nnx.merge(*model)))[0] for model in (base, trained)]
    return graphs[0], graphs[1], trained[1]


def _without_base(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Returns the optimizer with all parameters frozen except those of LoRA."""
    return dataclasses.replace(optimizer, freeze=(*optimizer.freeze, BASE))


def init_state(spec: StateSpec, directory: Path, seed: int = 0) -> TrainState:
    """Returns the state before the first step, from a checkpoint's weights, sharded from the start.

    Args:
        seed: Seed of the first matrices of LoRA.

    Raises:
        CheckpointError: see `tarsier_jax.weights.load_weights`.
    """
    if spec.lora.rank:
        return _init_lora_state(spec, directory, seed)
    loaded, dtype = _load(spec, directory, "float32"), spec.config.dtype

    def start(loaded: Params) -> TrainState:
        trained = {p: loaded[p] for p in spec.shapes.params}
        frozen = {p: loaded[p].astype(dtype) for p in spec.shapes.frozen}
        reference = None if spec.shapes.reference is None else {p: x.astype(dtype) for p, x in loaded.items()}
        return TrainState(jnp.int32(0), trained, frozen, spec.tx.init(trained), reference)

    return jax.jit(start, out_shardings=spec.shardings, donate_argnums=0)(loaded)


def _init_lora_state(spec: StateSpec, directory: Path, seed: int) -> TrainState:
    def start() -> TrainState:
        params = init_lora(spec.shapes.params, seed)
        return TrainState(jnp.int32(0), params, {}, spec.tx.init(params))

    state = jax.jit(start, out_shardings=dataclasses.replace(spec.shardings, frozen={}))()
    return complete_state(spec, state, directory)


def complete_state(spec: StateSpec, state: TrainState, directory: Path) -> TrainState:
    """Returns the state with the parameters of the starting model that checkpoints do not contain.

    These are the frozen ones of LoRA, or those of DPO's reference model.

    Raises:
        CheckpointError: see `tarsier_jax.weights.load_weights`.
    """
    if spec.lora.rank:
        return dataclasses.replace(state, frozen=load_reference(spec, directory))
    if spec.shapes.reference is not None:
        return dataclasses.replace(state, reference=load_reference(spec, directory))
    return state


def load_reference(spec: StateSpec, directory: Path) -> Params:
    """Returns the parameters of the starting model, DPO's reference. Raises CheckpointError."""
    return _load(spec, directory, spec.config.dtype)


def _load(spec: StateSpec, directory: Path, dtype: str) -> Params:
    config = dataclasses.replace(spec.config, param_dtype=dtype)
    model = load_weights(directory, config, spec.mesh, spec.lora.int8)
    return {parameter_path(p): leaf[...] for p, leaf in nnx.to_flat_state(nnx.state(model))}


def build_model(graph: nnx.GraphDef, params: Params, dtype: str) -> Tarsier:
    """Returns the model that computes in `dtype`. Norms and int8 weights keep their dtype."""
    # Cast here, before the layers use them: devices then exchange parameters and gradients in `dtype`.
    cast = {p: x.astype(dtype) if isinstance(x, jax.Array) and "norm" not in p else x for p, x in params.items()}
    state = nnx.from_flat_state([(tuple(p.split("/")), nnx.Param(x)) for p, x in cast.items()])
    return nnx.merge(graph, state)


def make_train_step(spec: StateSpec, loss: LossFunction) -> Any:
    """Returns the jitted `step(state, step_batch) -> (state, metrics)`, which donates the state.

    The metrics are float32 scalars: those of the loss and "loss", "weight", "grad_norm", "update_norm", "param_norm".
    """
    gradient = jax.value_and_grad(_loss_of_params(spec, loss), has_aux=True)

    def step(state: TrainState, batch: StepBatch) -> tuple[TrainState, dict[str, Array]]:
        def part(sums: Any, part: StepBatch) -> tuple[Any, None]:
            (total, aux), gradients = gradient(state.params, state, part)
            gradients = jax.lax.with_sharding_constraint(gradients, spec.shardings.params)
            return jax.tree.map(jnp.add, sums, (total, aux, gradients)), None

        first = jax.tree.map(lambda x: x[0], batch)
        (total, aux), gradients = jax.eval_shape(gradient, state.params, state, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (total, aux, gradients))
        (total, (weight, sums), gradients), _ = jax.lax.scan(part, zeros, batch)
        divisor = jnp.maximum(weight, 1.0)
        gradients = jax.tree.map(lambda g: g / divisor, gradients)
        updates, opt_state = spec.tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: value / divisor for name, value in sums.items()}
        norms = {"grad_norm": gradients, "update_norm": updates, "param_norm": params}
        metrics |= {"loss": total / divisor, "weight": weight}
        metrics |= {name: optax.tree.norm(tree) for name, tree in norms.items()}
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(spec.shardings, NamedSharding(spec.mesh, P())))


def make_eval_step(spec: StateSpec, loss: LossFunction) -> Any:
    """Returns the jitted `step(state, step_batch) -> sums`: "loss", "weight" and the loss's metrics, not divided."""
    loss_of_params = _loss_of_params(spec, loss)

    def step(state: TrainState, batch: StepBatch) -> dict[str, Array]:
        total, (weight, sums) = loss_of_params(state.params, state, jax.tree.map(lambda x: x[0], batch))
        return {"loss": total, "weight": weight, **sums}

    return jax.jit(step, out_shardings=NamedSharding(spec.mesh, P()))


def _loss_of_params(spec: StateSpec, loss: LossFunction) -> Callable[..., Any]:
    dtype = spec.config.dtype

    def loss_of_params(params: Params, state: TrainState, part: StepBatch) -> Any:
        extra = dict(part.extra)
        reference = state.frozen if spec.lora.rank else state.reference
        if reference is not None:
            extra["reference_model"] = build_model(spec.base_graph, reference, dtype)
        model = build_model(spec.graph, {**params, **state.frozen}, dtype)
        total, weight, metrics = loss(model, part.batch, extra)
        return total, (weight, metrics)

    return loss_of_params


def batch_shardings(batch: StepBatch, mesh: Mesh) -> StepBatch:
    """Returns shardings that split rows and their frames over data and fsdp."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P(None, BATCH)), batch)
