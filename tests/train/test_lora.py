"""LoRA against PEFT: ten steps, adapters exchanged in both directions, int8, preferences, and a run that resumes."""

import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import pytest
import qwix
import torch
from flax import nnx

from configs.lora_7b import get_config
from convert.merge_lora import merge
from tarsier_jax.errors import InputError
from tarsier_jax.families import load_config
from tarsier_jax.sharding import make_mesh
from tarsier_jax.weights import load_weights
from tarsier_jax.weights.adapter import write_adapter
from tests import reference
from tests.devices import simulated_devices
from tests.train.packs import make_examples, pack, step_batch
from tests.train.test_parity import (
    DPO_SHAPE,
    OPTIMIZER,
    answer_log_prob,
    layer_factor,
    make_pairs,
    torch_optimizer,
    torch_step,
)
from train.config import TrainConfig, read_config
from train.debug_data import write_debug_data
from train.loop import train
from train.lora import LoraConfig, lora_matrices
from train.losses import dpo_loss, sft_loss
from train.mesh import global_batch
from train.run import open_run
from train.sft import sft_objective
from train.state import StateSpec, TrainState, build_model, init_state, make_state_spec, make_train_step

STEPS = 10
LORA = LoraConfig(rank=4, alpha=64.0, vision_targets=("attn.qkv", "attn.proj", "mlp.0"))


def make_lora_run(
    directory: Path, lora: LoraConfig = LORA, with_reference: bool = False
) -> tuple[StateSpec, TrainState]:
    mesh = make_mesh(devices=jax.devices()[:1])
    spec = make_state_spec(load_config(directory), OPTIMIZER, STEPS, mesh, with_reference, lora)
    return spec, init_state(spec, directory, seed=1)


def write(out: Path, spec: StateSpec, state: TrainState) -> Path:
    write_adapter(out, spec.config, lora_matrices(jax.device_get(state.params)), spec.lora.alpha, "base")
    return out


class TenSteps(NamedTuple):
    """The same ten steps here and in PEFT, from the same matrices."""

    directory: Path
    spec: StateSpec
    state: TrainState
    losses: list[float]
    theirs: Any
    their_losses: list[float]


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory: pytest.TempPathFactory) -> TenSteps:
    directory = tmp_path_factory.mktemp("lora")
    model = reference.make_reference(directory, reference.TINY)
    spec, state = make_lora_run(directory)
    theirs = peft.PeftModel.from_pretrained(model, str(write(directory / "start", spec, state)), is_trainable=True)
    optimizer = torch_optimizer(theirs, lambda _, name: layer_factor(model, name))
    step_function, ours, expected = make_train_step(spec, sft_loss), [], []
    for step in range(STEPS):
        examples = make_examples(spec.config, seed=8 * (step % 2))[:4]
        state, metrics = step_function(state, step_batch([examples], spec.config, spec.mesh))
        ours.append(float(metrics["loss"]))
        sums = [answer_log_prob(theirs, example) for example in examples]
        loss = -torch.stack([s for s, _ in sums]).sum() / sum(n for _, n in sums)
        torch_step(theirs, optimizer, step, loss)
        expected.append(float(loss.detach()))
    return TenSteps(directory, spec, state, ours, theirs.eval(), expected)


def test_ten_steps_equal_peft(ten_steps: TenSteps) -> None:
    assert ten_steps.their_losses[-1] < ten_steps.their_losses[1] - 0.1  # it learned something
    np.testing.assert_allclose(ten_steps.losses, ten_steps.their_losses, rtol=1e-4, atol=0)


def test_only_the_matrices_are_trained(ten_steps: TenSteps) -> None:
    assert len(ten_steps.state.params) == 2 * (7 + 3)
    assert all(path.endswith(("/lora/a", "/lora/b")) for path in ten_steps.state.params)
    moments = sum(x.size for x in jax.tree.leaves(ten_steps.state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in ten_steps.state.params.values())


def test_logits_equal_in_every_direction(ten_steps: TenSteps, tmp_path: Path) -> None:
    """Unmerged and merged here, unmerged in PEFT, and PEFT's own files merged here."""
    spec = ten_steps.spec
    example = make_examples(spec.config)[1]
    expected = reference.reference_logits(ten_steps.theirs, example)
    batch = reference.make_batch([example], spec.config, reference.BUCKETS)
    forward = jax.jit(lambda model, batch: model(batch))

    def logits(model: Any) -> np.ndarray:
        return np.asarray(forward(model, batch))[0, : len(example.input_ids)]

    unmerged = build_model(spec.graph, {**ten_steps.state.params, **ten_steps.state.frozen}, "float32")
    np.testing.assert_allclose(logits(unmerged), expected, atol=1e-4)
    ours = write(tmp_path / "ours", spec, ten_steps.state)
    ten_steps.theirs.save_pretrained(tmp_path / "theirs")
    for adapter in (ours, tmp_path / "theirs"):
        merged = load_weights(ten_steps.directory, spec.config, adapter=adapter)
        np.testing.assert_allclose(logits(merged), expected, atol=1e-4)
    plain = logits(load_weights(ten_steps.directory, spec.config))
    assert np.abs(plain - expected).max() > 0.1  # the adapter matters


def test_merge_lora(ten_steps: TenSteps, tmp_path: Path) -> None:
    """The converted directory contains the weights of --adapter."""
    adapter = write(tmp_path / "adapter", ten_steps.spec, ten_steps.state)
    merge(str(ten_steps.directory), adapter, tmp_path / "merged")
    ours = nnx.state(load_weights(tmp_path / "merged", ten_steps.spec.config))
    expected = nnx.state(load_weights(ten_steps.directory, ten_steps.spec.config, adapter=adapter))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_transformers_loads_a_trained_adapter(ten_steps: TenSteps, tmp_path: Path) -> None:
    """With the same matrices as PEFT ten_steps."""
    model = reference.make_reference(tmp_path / "base", reference.TINY)
    loaded = peft.PeftModel.from_pretrained(model, str(write(tmp_path / "ours", ten_steps.spec, ten_steps.state)))
    example = make_examples(ten_steps.spec.config)[3]
    logits, expected = (reference.reference_logits(each, example) for each in (loaded, ten_steps.theirs))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    ours, theirs = (peft.get_peft_model_state_dict(each) for each in (loaded, ten_steps.theirs))
    assert ours.keys() == theirs.keys()


def test_base_in_int8(ten_steps: TenSteps) -> None:
    """The frozen matrices are int8, and the first losses differ from those of the plain base by rounding."""
    spec, state = make_lora_run(ten_steps.directory, dataclasses.replace(LORA, vision_targets=(), int8=True))
    quantized = [path for path, x in state.frozen.items() if isinstance(x, qwix.QArray)]
    assert len(quantized) == 7 and all(path.startswith("decoder/layers/") for path in quantized)
    assert jax.tree.structure(state) == jax.tree.structure(spec.shapes)
    step_function = make_train_step(spec, sft_loss)
    for step in range(3):
        examples = make_examples(spec.config, seed=8 * (step % 2))[:4]
        state, metrics = step_function(state, step_batch([examples], spec.config, spec.mesh))
        difference = abs(float(metrics["loss"]) - ten_steps.losses[step])
        assert 0 < difference < 0.02 * ten_steps.losses[step]


@pytest.mark.slow
def test_over_eight_devices(ten_steps: TenSteps) -> None:
    command = [sys.executable, "-m", "tests.train.lora_mesh", str(ten_steps.directory)]
    done = subprocess.run(command, env=simulated_devices(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_reference_of_dpo_is_the_base(ten_steps: TenSteps) -> None:
    """Its log-probabilities do not change while the policy's do, and no second model is stored."""
    spec, state = make_lora_run(ten_steps.directory, dataclasses.replace(LORA, vision_targets=()), with_reference=True)
    assert state.reference is None
    rows = [pack(make_pairs(spec.config)[:2], spec.config, DPO_SHAPE)]
    step_function = make_train_step(spec, functools.partial(dpo_loss, beta=0.5, pairs=2))
    history = []
    for _ in range(4):
        state, metrics = step_function(state, global_batch(rows, 1, spec.mesh))
        history.append(jax.device_get(metrics))
    # Two programs compute the log-probabilities of an answer, which are sums: they differ by their rounding.
    rounding = np.finfo(np.float32).eps * abs(history[0]["log_prob_chosen"])
    assert abs(history[0]["loss"] - math.log(2)) < rounding and abs(history[0]["margin"]) < rounding
    assert history[-1]["loss"] < history[0]["loss"] - 0.01
    for half in ("chosen", "rejected"):
        base = [each[f"log_prob_{half}"] - each[f"reward_{half}"] / 0.5 for each in history]
        np.testing.assert_allclose(base, base[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ("q_proj", "attention")}, r"lora\.targets has 'attention', which is no module.*self_attn\.q_proj"),
        ({"vision_targets": ("q_proj",)}, r"lora\.vision_targets has 'q_proj', which is no module.*attn\.qkv"),
    ],
)
def test_targets_that_are_no_modules(ten_steps: TenSteps, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_state_spec(ten_steps.spec.config, OPTIMIZER, STEPS, ten_steps.spec.mesh, lora=LoraConfig(rank=4, **lora))


def test_frozen_matrices_are_refused(ten_steps: TenSteps) -> None:
    frozen = dataclasses.replace(OPTIMIZER, freeze=("vision/.*",))
    with pytest.raises(InputError, match=r"optimizer\.freeze freezes matrices of LoRA"):
        make_state_spec(ten_steps.spec.config, frozen, STEPS, ten_steps.spec.mesh, lora=LORA)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"rank": -1}, "lora.rank is -1"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha is 0.0"),
        ({"rank": 4, "targets": ()}, "lora.targets is ()"),
        ({"int8": True}, "lora.int8 is True"),
    ],
)
def test_options(over: dict[str, Any], message: str) -> None:
    config = get_config()
    config.lora.rank = 0
    config.lora.update(over)
    with pytest.raises(InputError) as error:
        read_config(config)
    assert f"config.{message}" in str(error.value)


def debug_config(steps: int) -> TrainConfig:
    config = get_config("debug")
    config.num_train_steps, config.save_every, config.eval_every, config.data.num_workers = steps, 1, 0, 0
    return read_config(config)


def run_debug(workdir: Path, steps: int) -> list[np.ndarray]:
    """Trains, and returns the matrices of the exported adapter."""
    from safetensors.numpy import load_file

    config = write_debug_data(debug_config(steps), workdir)
    train(config, workdir, sft_objective(config))
    return list(load_file(workdir / "adapter" / "adapter_model.safetensors").values())


def test_a_run_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    whole = run_debug(tmp_path / "whole", 3)
    assert not (tmp_path / "whole" / "model").exists()
    saved = json.loads((tmp_path / "whole" / "checkpoints" / "3" / "progress" / "metadata").read_text())["state"]
    assert {path.split("/")[0] for path in saved} == {"step", "params", "opt_state"}
    # As if it had stopped after a step: the schedule is the same.
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / str(step), ignore_errors=True)
    resumed = run_debug(tmp_path / "resumed", 3)
    for ours, theirs in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    weights = next((tmp_path / "resumed" / "random_model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    config = write_debug_data(debug_config(3), tmp_path / "resumed")
    with pytest.raises(InputError, match="belongs to another run: weights was"):
        open_run(config, tmp_path / "resumed", sft_objective(config))
