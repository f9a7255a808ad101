"""Ten steps of AdamW match PyTorch's losses: Hugging Face's model, torch.optim.AdamW, the same examples unpacked."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from tarsier_jax.processing.batch import Example
from tests import reference
from tests.train.packs import SHAPE, make_examples, make_run, pack, step_batch
from train.losses import dpo_loss, sft_loss
from train.mesh import global_batch
from train.optimizer import OptimizerConfig
from train.state import make_train_step

STEPS = 10
OPTIMIZER = OptimizerConfig(peak_lr=1e-3, final_lr=1e-4, warmup_steps=3, clip_norm=1.0, vision_layer_decay=0.8)


def learning_rate(step: int) -> float:
    """Written out: linear from 0 to the peak, then half a cosine down to the final one."""
    o = OPTIMIZER
    if step < o.warmup_steps:
        return o.peak_lr * step / o.warmup_steps
    done = (step - o.warmup_steps) / (STEPS - o.warmup_steps)
    return o.final_lr + (o.peak_lr - o.final_lr) * (1 + math.cos(math.pi * done)) / 2


def layer_factor(model: Any, name: str) -> float:
    """Factor of the learning rate of a parameter of Qwen2-VL."""
    depth = len(model.model.visual.blocks)
    if ".visual.blocks." in name:
        return OPTIMIZER.vision_layer_decay ** (depth - int(name.split(".blocks.")[1].split(".")[0]))
    return OPTIMIZER.vision_layer_decay ** (depth + 1) if ".visual.patch_embed." in name else 1.0


def torch_optimizer(model: Any, factor_of: Callable[[Any, str], float] = layer_factor) -> torch.optim.AdamW:
    """A group for each parameter: its learning rate's factor is kept as "factor"."""
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = factor_of(model, name)
        plain = name.endswith("bias") or "norm" in name or ".ln_q." in name
        decay = 0.0 if plain else OPTIMIZER.weight_decay
        groups.append({"params": [parameter], "factor": factor, "weight_decay": decay})
    o = OPTIMIZER
    return torch.optim.AdamW(groups, lr=1.0, betas=(o.b1, o.b2), eps=o.eps)


def torch_step(model: Any, optimizer: torch.optim.AdamW, step: int, loss: torch.Tensor) -> float:
    """Returns the norm of the gradient before clipping."""
    optimizer.zero_grad()
    loss.backward()
    gradients = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(gradients, OPTIMIZER.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step) * group["factor"]
    optimizer.step()
    return float(norm)


def answer_log_prob(
    model: Any, example: Example, inputs: Callable[[Example], dict[str, Any]] = reference.reference_inputs
) -> tuple[torch.Tensor, int]:
    """Sum of the log-probabilities of the answer's tokens, and their number."""
    logits = model(**inputs(example)).logits[0].float()
    targets = torch.from_numpy(example.labels).long()[1:]
    known = targets >= 0
    log_probs = torch.log_softmax(logits[:-1], dim=-1)[known]
    return log_probs.gather(1, targets[known][:, None]).sum(), int(known.sum())


@pytest.mark.parametrize(
    "freeze",
    [pytest.param((), id="all trained"), pytest.param(("vision/.*",), id="frozen vision", marks=pytest.mark.slow)],
)
def test_ten_steps_of_sft(tmp_path: Path, freeze: tuple[str, ...]) -> None:
    theirs = reference.make_reference(tmp_path, reference.TINY)
    spec, state = make_run(tmp_path, dataclasses.replace(OPTIMIZER, freeze=freeze), remat="full")
    theirs.model.visual.requires_grad_(not freeze)
    optimizer, step_function = torch_optimizer(theirs), make_train_step(spec, sft_loss)
    ours, expected = [], []
    for step in range(STEPS):
        examples = make_examples(spec.config, seed=8 * (step % 2))
        rows = [examples[:3], examples[3:5], examples[5:7], examples[7:]]
        state, metrics = step_function(state, step_batch(rows, spec.config, spec.mesh, parts=2))
        ours.append(float(metrics["loss"]))
        sums = [answer_log_prob(theirs, example) for example in examples]
        loss = -torch.stack([s for s, _ in sums]).sum() / sum(n for _, n in sums)
        torch_step(theirs, optimizer, step, loss)
        expected.append(float(loss.detach()))
    assert expected[-1] < expected[1] - 0.1  # it learned something
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_ten_steps_of_dpo(tmp_path: Path) -> None:
    theirs = reference.make_reference(tmp_path, reference.TINY)
    spec, state = make_run(tmp_path, OPTIMIZER, with_reference=True)
    pairs = make_pairs(spec.config)
    with torch.no_grad():
        frozen = [[float(answer_log_prob(theirs, example)[0]) for example in pair] for pair in pairs]
    rows = [pack(pairs[:2], spec.config, DPO_SHAPE), pack(pairs[2:], spec.config, DPO_SHAPE)]
    optimizer = torch_optimizer(theirs)
    step_function = make_train_step(spec, functools.partial(dpo_loss, beta=0.5, pairs=2))
    for step in range(STEPS):
        state, metrics = step_function(state, global_batch(rows, 1, spec.mesh))
        policy = torch.stack([torch.stack([answer_log_prob(theirs, e)[0] for e in pair]) for pair in pairs])
        rewards = 0.5 * (policy - torch.tensor(frozen))
        margin = rewards[:, 0] - rewards[:, 1]
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        torch_step(theirs, optimizer, step, loss)
        expected = {
            "loss": loss,
            "margin": margin.mean(),
            "reward_chosen": rewards[:, 0].mean(),
            "reward_rejected": rewards[:, 1].mean(),
        }
        if margin.abs().min() > 1e-3:  # not while it is nothing but rounding
            expected["accuracy"] = (margin > 0).float().mean()
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], float(value.detach()), rtol=1e-4, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(metrics["loss"], float(loss.detach()), rtol=1e-4)
    assert "accuracy" in expected and float(metrics["loss"]) < 0.6  # ln 2 at the start


DPO_SHAPE = dataclasses.replace(SHAPE, tokens=192, samples=4)


def make_pairs(config: Any) -> list[list[Example]]:
    """Three pairs: the same video and question, a chosen and a rejected answer of another length."""
    pairs = []
    for chosen in make_examples(config)[:3]:
        ids = np.concatenate([chosen.input_ids, chosen.input_ids[-3:]])
        ids[len(chosen.input_ids) - 2 :] = [11, 12, 13, 14, 15]
        labels = np.concatenate([chosen.labels, ids[-3:]])
        labels[labels >= 0] = ids[labels >= 0]
        positions = np.concatenate([chosen.position_ids, chosen.position_ids[:, -1:] + np.arange(1, 4)], axis=1)
        rejected = dataclasses.replace(
            chosen, input_ids=ids.astype(np.int32), labels=labels.astype(np.int32), position_ids=positions
        )
        pairs.append([chosen, rejected])
    return pairs


def test_masters_and_moments_stay_float32(tmp_path: Path) -> None:
    """Parameters and moments are float32 for any dtype of matrix products."""
    reference.make_reference(tmp_path, reference.TINY)
    spec, state = make_run(tmp_path, OPTIMIZER, dtype="bfloat16")
    batch = step_batch([make_examples(spec.config)[:2]], spec.config, spec.mesh)
    state, metrics = make_train_step(spec, sft_loss)(state, batch)
    assert {x.dtype.name for x in jax.tree.leaves((state.params, metrics))} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
