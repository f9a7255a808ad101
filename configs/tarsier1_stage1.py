"""The first Tarsier's stage 1: 13 million samples, the vision tower frozen, projector and decoder trained.

arXiv 2407.00634. Start from a checkpoint of the first Tarsier: --config.model=DIRECTORY. The number of samples and the
frozen parameters are published. Learning rate, batch size, warm-up and steps are ours: one pass, with three samples of
8 frames per row.
"""

from ml_collections import ConfigDict

from configs.debug import sized
from train.config import default_config


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()
    config.num_train_steps = 34_000
    config.processor.n_frames = 8
    config.data.seq_len = 16_384
    config.data.global_batch_size = 128
    config.optimizer.peak_lr = 2e-5
    config.optimizer.warmup_steps = 1000
    config.optimizer.freeze = (r"vision/(?!projector/).*",)
    return sized(config, size, "random_tarsier1")
