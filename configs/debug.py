"""The debug size of every recipe: a random model of two layers and rendered clips; takes seconds on a CPU."""

from ml_collections import ConfigDict


def sized(config: ConfigDict, size: str, model: str = "random") -> ConfigDict:
    """Returns the recipe ("full") or its debug size, with the same learning rates and loss.

    Args:
        config: The recipe.
        size: "full" or "debug".
        model: Model of the debug size, a key of `train.debug_data.MODELS`.
    """
    if size not in ("full", "debug"):
        raise ValueError(f"Size {size!r} does not exist. A recipe has the sizes full and debug.")
    if size == "full":
        return config
    config.model, config.data.train, config.data.eval = model, "random", "random"
    config.num_epochs = 0.0
    config.num_train_steps, config.log_every, config.save_every, config.eval_every = 20, 1, 10, 10
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 2)
    config.processor.n_frames, config.processor.max_pixels = 4, 12_544
    config.data.seq_len = 448
    config.data.vision_bins = config.data.patches_per_bin = config.data.frames_per_bin = -1
    config.data.global_batch_size, config.data.num_workers = 4, 2
    config.data.max_samples_per_seq = min(config.data.max_samples_per_seq, 4)
    return config
