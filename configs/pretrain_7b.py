"""Tarsier2's pre-training: Qwen2-VL-7B on 40 million samples. arXiv 2501.07888, table 12.

Videos have 8 to 128 frames, by duration: set their `fps` and `min_n_frames` in the annotations.
"""

from ml_collections import ConfigDict

from configs.debug import sized
from train.config import default_config


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()
    config.model = "Qwen/Qwen2-VL-7B-Instruct"
    config.num_train_steps = 200_000
    config.processor.max_n_frames = 128
    config.data.global_batch_size = 192  # rows of two full-size videos each
    config.optimizer.peak_lr = 2e-5
    config.optimizer.warmup_steps = 1000
    return sized(config, size)
