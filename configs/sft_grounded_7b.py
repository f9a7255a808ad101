"""Tarsier2's first fine-tuning stage (SFT-1): captions whose events name their frames. arXiv 2501.07888, table 12.

Targets look like "<frame: 1> A man enters. <frame: 2-5> He sits down."; the tags are checked against the frames.
Start from the pre-trained model: --config.model=DIRECTORY.
"""

from ml_collections import ConfigDict

from configs.debug import sized
from train.config import default_config


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()
    config.num_train_steps = 5000
    config.data.global_batch_size = 32  # rows of two full-size videos each
    config.optimizer.peak_lr = 2e-5
    config.optimizer.warmup_steps = 250
    return sized(config, size)
