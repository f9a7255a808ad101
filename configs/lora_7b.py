"""Tarsier2-Recap-7B with LoRA on your own clips. See "LoRA" in docs/training.md.

One row per device on a v5e-8 slice. On one GPU of 80 GB add --config.grad_accum_steps=8. The values are common ones for
LoRA, not published ones of Tarsier2.
"""

from ml_collections import ConfigDict

from configs.debug import sized
from train.config import default_config


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()
    config.model = "omni-research/Tarsier2-Recap-7b"
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.num_train_steps = 200
    config.save_every = config.eval_every = 50
    config.data.global_batch_size = 8
    config.optimizer.peak_lr = 1e-4
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.0
    return sized(config, size)
