"""LoRA of the embedded model on a few clips of your own, in minutes on two CPU cores. See "LoRA" in docs/training.md.

Set --config.data.train=FILE and --config.data.media_root=DIR.
"""

from ml_collections import ConfigDict

from configs import micro
from configs.debug import sized


def get_config(size: str = "full") -> ConfigDict:
    config = micro.get_config()
    config.model = "tarsier2-micro"
    config.lora.rank, config.lora.alpha = 16, 64.0
    config.data.shuffle = True
    config.data.seq_len, config.data.vision_bins = 512, 32  # four clips of 16 frames
    config.data.global_batch_size, config.data.max_samples_per_seq = 2, 4
    config.num_train_steps, config.save_every, config.eval_every = 200, 100, 100
    config.log_every = 20
    config.optimizer.muon_params = config.optimizer.lr_groups = ()
    config.optimizer.peak_lr, config.optimizer.final_lr = 1e-3, 0.0
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0
    return sized(config, size)
