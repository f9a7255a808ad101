"""The first Tarsier's stage 2: 500,000 samples, the vision tower frozen, projector and decoder trained.

arXiv 2407.00634. Start from the model of stage 1: --config.model=DIRECTORY. The number of samples and the frozen
parameters are published. Learning rate, batch size, warm-up and steps are ours: one pass, with three samples of
8 frames per row.
"""

from ml_collections import ConfigDict

from configs import tarsier1_stage1
from configs.debug import sized


def get_config(size: str = "full") -> ConfigDict:
    config = tarsier1_stage1.get_config()
    config.num_train_steps = 2600
    config.data.global_batch_size = 64
    config.optimizer.warmup_steps = 250
    return sized(config, size, "random_tarsier1")
