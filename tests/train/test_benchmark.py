"""The weights of a run are scored on a benchmark."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from eval.evaluation import BenchmarkInput
from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import Processor
from tarsier_jax.sharding import make_mesh, parameter_path
from tarsier_jax.weights.names import abstract_state
from train import benchmark
from train.benchmark import BenchmarkEvaluation
from train.config import BenchmarkConfig, TrainConfig
from train.loop import train
from train.lora import LoraConfig
from train.sft import sft_objective
from train.state import StateSpec, TrainState


def make_run(workdir: Path, processor: Processor, **options: Any) -> Any:
    config = TrainConfig(benchmark=BenchmarkConfig(**options))
    config = dataclasses.replace(config, processor=dataclasses.replace(config.processor, n_frames=4))
    model = dataclasses.replace(processor.config, dtype="float32", remat="full")
    graph, _ = abstract_state(model)
    mesh, state = make_mesh(devices=jax.devices()[:1]), TrainState(0, {}, {}, ())
    spec = StateSpec(model, graph, graph, LoraConfig(), mesh, optax.sgd(0.1), state)
    return SimpleNamespace(config=config, workdir=workdir, processor=processor, spec=spec)


def test_the_weights_of_the_state_are_scored(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations = list[tuple[Any, BenchmarkInput, Path]]()

    def evaluate(engines: Any, source: BenchmarkInput, output: Path) -> Any:
        assert not output.exists()  # without the answers of other weights
        (output / "predictions").mkdir(parents=True)
        evaluations.append((engines._load(), source, output))
        return SimpleNamespace(strict_figures={"F1 Score": 0.5, "Action Recall": 0.25})

    monkeypatch.setattr(benchmark, "evaluate", evaluate)
    evaluation = BenchmarkEvaluation(make_run(tmp_path, processor, name="shapes", limit=2))
    _, abstract = abstract_state(processor.config)
    shapes = {parameter_path(path): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    for value in (1.0, 2.0):
        params = {path: jnp.full(shape, value) for path, shape in shapes.items()}
        frozen = {path: params.pop(path) for path in list(params) if path.startswith("vision/")}
        state = TrainState(jnp.int32(0), params, frozen, ())
        assert evaluation.scores(state) == {"shapes_f1_score": 0.5, "shapes_action_recall": 0.25}
        (model, used), source, output = evaluations.pop()
        assert model.config.remat == "none" and isinstance(model.decoder.layers, nnx.List)
        assert all((np.asarray(x) == value).all() for x in jax.tree.leaves(nnx.state(model)))
        assert not any(x.is_deleted() for x in jax.tree.leaves(state))  # the run continues with them
        assert used.options.video_sampler == "v1" and source.benchmark.n_frames == 4
        assert len({sample["vid"] for sample in source.samples}) == 2 and output == tmp_path / "benchmark"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dream", "must be one benchmark without a judge"),
        ("mc_qa", "must be one benchmark without a judge"),
        ("shape", "There is no benchmark shape. Use .*shapes"),
        ("tvbench", "--annotations"),
    ],
)
def test_benchmarks_that_cannot_be_used(tmp_path: Path, processor: Processor, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BenchmarkEvaluation(make_run(tmp_path, processor, name=name))


def test_a_best_metric_needs_an_evaluation(tmp_path: Path) -> None:
    config = TrainConfig(best_metric="eval_loss")
    with pytest.raises(InputError, match=r"best_metric is 'eval_loss', but the run has no evaluation"):
        train(config, tmp_path, sft_objective(config))
