"""Tarsier2-Recap-7B: Qwen2-VL-7B-Instruct on Tarsier2-Recap-585K. See docs/training.md.

The model card publishes two epochs and a learning rate of 2e-5, but no batch size and frames. Those here are from the
fine-tuning stages in arXiv 2501.07888, table 12.
"""

from ml_collections import ConfigDict

from configs.debug import sized
from train.config import default_config


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()
    config.model = "Qwen/Qwen2-VL-7B-Instruct"
    config.num_epochs = 2.0
    config.data.global_batch_size = 64
    config.optimizer.peak_lr = 2e-5
    config.optimizer.warmup_steps = 250
    return sized(config, size)
