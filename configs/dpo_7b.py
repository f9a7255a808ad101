"""Tarsier2's preference stage: vanilla DPO on 20,000 pairs, one per row. arXiv 2501.07888, table 12 and appendix D.

Start from the model of SFT-2: --config.model=DIRECTORY. A row contains a pair for a full-size video of 16
frames. The two answers share its frames, which the vision tower encodes once.
"""

from ml_collections import ConfigDict

from configs.debug import sized
from train.config import default_config


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()
    config.num_train_steps = 1000
    config.data.global_batch_size = 64
    config.data.max_samples_per_seq = 2
    config.optimizer.peak_lr = 1e-6
    config.optimizer.warmup_steps = 100
    config.dpo.beta = 0.1
    return sized(config, size)
