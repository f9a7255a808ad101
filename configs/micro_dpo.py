"""DPO of the embedded model, on preference pairs of its own descriptions.

Takes minutes on two CPU cores. The clips, whose seeds are neither trained on nor held out, and the pairs:

    python -m eval.shapes --output CLIPS --clips 2000 --seed 500000000
    python -m train.pairs --model DIR/model --input CLIPS/descriptions.jsonl --media_root CLIPS --output PAIRS \\
        --judge rules --temperature 1 --top_p 1 --max_new_tokens 96

Start from the trained model and its pairs: --config.model=DIR/model --config.data.train=PAIRS/pairs.jsonl
--config.data.media_root=CLIPS.
"""

from ml_collections import ConfigDict

from configs import micro
from configs.debug import sized


def get_config(size: str = "full") -> ConfigDict:
    config = micro.get_config()
    config.data.shuffle = True
    config.data.max_samples_per_seq = 4
    config.num_train_steps, config.save_every = 300, 100
    config.optimizer.muon_params = config.optimizer.lr_groups = ()
    config.optimizer.peak_lr, config.optimizer.final_lr = 2e-5, 0.0
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0
    config.dpo.beta = 0.5
    return sized(config, size)
