"""The embedded model, a small Tarsier2 that `train.micro` teaches to describe moving shapes; its card has the scores.

`train.micro` writes the starting checkpoint and the clips. `train.sft` takes the recipe with a model and data.
"""

from ml_collections import ConfigDict

from configs.debug import sized
from train.config import default_config


def get_config(size: str = "full") -> ConfigDict:
    config = default_config()
    config.data.shuffle = False  # the order of the curriculum
    config.num_train_steps = 9800
    config.remat = "none"
    config.log_every, config.save_every, config.eval_every, config.max_to_keep = 50, 1000, 1000, 1
    config.data.seq_len, config.data.vision_bins = 320, 20
    config.data.patches_per_bin, config.data.frames_per_bin = 48, 1
    config.data.global_batch_size, config.data.max_samples_per_seq, config.data.num_workers = 4, 24, 1
    config.optimizer.peak_lr = 1e-3
    config.optimizer.final_lr = 2e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.05
    config.optimizer.vision_layer_decay = 1.0
    config.optimizer.b2 = 0.99
    matrices = (
        r"decoder/layers/(attn|mlp)/.*/weight",
        r"vision/blocks/(attn|mlp)/.*/weight",
        r"vision/merger/fc[12]/weight",
    )
    config.optimizer.muon_params = matrices
    config.optimizer.lr_groups = tuple((pattern, 4.0) for pattern in matrices)
    return sized(config, size)
