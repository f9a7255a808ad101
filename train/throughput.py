"""The work of a step and its speed."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tarsier_jax.config import ModelConfig
from tarsier_jax.families import family_of
from tarsier_jax.processing.batch import Batch

# Peak dense bfloat16 FLOP/s of a device, by prefix of `device_kind`. Source: the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: Any) -> float | None:
    """Returns the peak of the device's kind, or None if it is not in the table."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)


@dataclasses.dataclass(frozen=True)
class Work:
    """The content and the padding of rows.

    Attributes:
        samples: Samples.
        tokens: Tokens without padding.
        tokens_with_padding: Tokens with padding.
        patches: Patches without padding.
        patches_with_padding: Patches with padding.
        token_pairs: Pairs of tokens in causal attention.
        patch_pairs: Pairs of patches in the vision tower's attention.
        targets: Tokens that are predicted; only they have logits.
    """

    samples: int = 0
    tokens: int = 0
    tokens_with_padding: int = 0
    patches: int = 0
    patches_with_padding: int = 0
    token_pairs: int = 0
    patch_pairs: int = 0
    targets: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def padding(self) -> float:
        """Fraction of padding among tokens and patches."""
        return 1 - (self.tokens + self.patches) / max(self.tokens_with_padding + self.patches_with_padding, 1)


def work_of(batch: Batch) -> Work:
    """Returns the work of packed rows on the host."""
    sizes = batch.frame_hw.prod(axis=-1).astype(np.int64)
    lengths = np.concatenate([np.bincount(row[row > 0])[1:] for row in batch.segment_ids])
    return Work(
        samples=len(lengths),
        tokens=int(lengths.sum()),
        tokens_with_padding=batch.input_ids.size,
        patches=int(sizes.sum()),
        patches_with_padding=int(np.prod(batch.patches.shape[:3])),
        token_pairs=int((lengths * (lengths + 1) // 2).sum()),
        patch_pairs=int((sizes**2).sum()),
        targets=int(((batch.labels[:, 1:] >= 0) & (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1])).sum()),
    )


def step_flops(config: ModelConfig, work: Work, vision_trained: bool = True, lora: bool = False) -> float:
    """Returns the FLOPs of a training step: matrix products, forward and twice that backward.

    With LoRA, the backward pass costs as much as the forward pass: the frozen weights have no gradients. The products
    with its own small matrices are not counted.

    A vision tower whose blocks are not trained runs forward only; the backward pass of a projector that is trained
    nevertheless, a small part of the step, is not counted. Recomputed activations and padding are not counted; see
    `Family.forward_flops` for the rest.
    """
    decoder, tower = family_of(config).forward_flops(
        config, work.tokens, work.token_pairs, work.patches, work.patch_pairs
    )
    decoder += 2 * config.text.hidden_size * config.text.vocab_size * work.targets
    passes = 2 if lora else 3
    return passes * decoder + (passes if vision_trained else 1) * tower


def _over_processes(work: Work) -> Work:
    if jax.process_count() == 1:
        return work
    everywhere = multihost_utils.process_allgather(np.array(dataclasses.astuple(work), np.float64))
    return Work(*(int(count) for count in everywhere.sum(axis=0)))


class Meter:
    """Sums work and time of the steps since the last reset."""

    def __init__(self, config: ModelConfig, vision_trained: bool = True, lora: bool = False):
        self._config, self._vision_trained, self._lora = config, vision_trained, lora
        peaks = [peak_flops(device) for device in jax.devices()]
        self._peak = sum(peak for peak in peaks if peak) if all(peaks) else None
        self.reset()

    def reset(self) -> None:
        self._start, self._waited, self._steps, self._work = time.perf_counter(), 0.0, 0, Work()

    def add(self, work: Work, waited: float) -> None:
        """Adds one step: this process's work, and its seconds of waiting for data."""
        self._steps, self._work, self._waited = self._steps + 1, self._work + work, self._waited + waited

    def rates(self) -> dict[str, float]:
        """Returns tokens/s, samples/s and MFU of all devices, seconds per step, fractions of waiting and padding."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        work = _over_processes(self._work)
        rates = {
            "tokens_per_s": work.tokens / seconds,
            "samples_per_s": work.samples / seconds,
            "seconds_per_step": seconds / max(self._steps, 1),
            "data_wait": self._waited / seconds,
            "padding": work.padding,
        }
        if self._peak:
            rates["mfu"] = step_flops(self._config, work, self._vision_trained, self._lora) / seconds / self._peak
        return rates
