"""Tarsier2's second fine-tuning stage (SFT-2): diverse instructions and refined captions. arXiv 2501.07888, table 12.

Start from the model of SFT-1: --config.model=DIRECTORY.
"""

from ml_collections import ConfigDict

from configs.debug import sized
from train.config import default_config


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()
    config.num_train_steps = 5000
    config.data.global_batch_size = 32  # rows of two full-size videos each
    config.optimizer.peak_lr = 2e-6
    config.optimizer.warmup_steps = 250
    return sized(config, size)
