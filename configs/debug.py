"""The debug size of every recipe: a random model of two layers and rendered clips, seconds on a CPU."""

from ml_collections import ConfigDict


def sized(config: ConfigDict, size: str) -> ConfigDict:
    """The recipe as it is ("full") or shrunk; what makes it this recipe (learning rates, the loss) stays."""
    if size not in ("full", "debug"):
        raise ValueError(f"A recipe has no size {size!r}; its sizes are full and debug.")
    if size == "full":
        return config
    config.model = config.data.train = config.data.eval = "random"
    config.score_clips = 0
    config.steps, config.log_every, config.save_every, config.eval_every = 20, 1, 10, 10
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 2)
    config.processor.n_frames, config.processor.max_pixels = 4, 12_544
    config.data.tokens, config.data.bins, config.data.patches, config.data.frames = 448, 8, 64, 2
    config.data.rows, config.data.workers = 4, 2
    config.data.samples = min(config.data.samples, 4)
    return config
