"""Run by test_lora on eight simulated devices: LoRA over an int8 base is sharded, with the numbers of one device."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tarsier_jax.families import load_config
from tarsier_jax.sharding import make_mesh
from tests.train.packs import make_examples, step_batch
from train.lora import LoraConfig
from train.losses import sft_loss
from train.optimizer import OptimizerConfig
from train.state import init_state, make_state_spec, make_train_step


def two_steps(directory: Path, mesh: Mesh) -> tuple[list[float], Any]:
    lora = LoraConfig(rank=4, alpha=64.0, vision_targets=("attn.qkv",), int8=True)
    optimizer = OptimizerConfig(peak_lr=1e-2, warmup_steps=0)
    spec = make_state_spec(load_config(directory), optimizer, 10, mesh, lora=lora)
    with jax.set_mesh(mesh):
        state, step = init_state(spec, directory), make_train_step(spec, sft_loss)
        examples, losses = make_examples(spec.config), []
        for _ in range(2):
            rows = [examples[:3], examples[3:5], examples[5:7], examples[7:]]
            state, metrics = step(state, step_batch(rows, spec.config, mesh))
            losses += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return losses, state


def main(directory: Path) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    alone, _ = two_steps(directory, make_mesh(devices=jax.devices()[:1]))
    over_eight, state = two_steps(directory, make_mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(over_eight, alone, rtol=1e-4)
    assert state.params["decoder/layers/attn/q/lora/a"].sharding.spec == P(None, None, "fsdp")
    assert state.params["decoder/layers/attn/q/lora/b"].sharding.spec == P(None, "tensor", None)
    assert state.frozen["decoder/layers/mlp/down/weight"].qvalue.sharding.spec == P(None, "fsdp", "tensor")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
