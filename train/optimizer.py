"""AdamW, Muon for some matrices, cosine decay, clipping, learning-rate groups, layer-wise decay of the vision tower.

Parameters are a flat dict, path -> array, such as "decoder/norm/weight". Patterns are regular expressions
that match whole paths.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from tarsier_jax.errors import InputError
from train.checks import check, check_at_least, check_dtype

Params = dict[str, Any]

_VECTORS = (r".*/bias", r".*norm[12]?/weight")  # parameters that are not matrices


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for some matrices, with warm-up, cosine decay and clipping.

    Attributes:
        peak_lr: Learning rate after the warm-up.
        final_lr: Learning rate at the last step, the end of the cosine.
        warmup_steps: Steps of linear warm-up from 0.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        clip_norm: Largest norm of the whole gradient; 0 turns clipping off.
        vision_layer_decay: Vision block i of n learns at peak_lr * decay^(n - i), the patch embedding at decay^(n + 1).
        lr_groups: (regex, factor) pairs of learning rates; the first pattern that matches applies.
        freeze: Patterns of parameters that are not trained and take part in no optimizer state.
        no_decay: Patterns of parameters without weight decay.
        muon_params: Patterns of matrices that Muon updates instead of Adam, see `_muon`.
        mu_dtype: Dtype of the first moment; the second stays float32, as bfloat16 would lose its small increments.

    Raises:
        InputError: a number is out of its range, or mu_dtype is not supported.
    """

    peak_lr: float = 2e-5
    final_lr: float = 0.0
    warmup_steps: int = 1000
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    vision_layer_decay: float = 0.9
    lr_groups: tuple[tuple[str, float], ...] = ()
    freeze: tuple[str, ...] = ()
    no_decay: tuple[str, ...] = _VECTORS
    muon_params: tuple[str, ...] = ()
    mu_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_at_least(self, 0, "peak_lr", "weight_decay", "clip_norm")
        check(self, ["final_lr"], lambda x: 0 <= x <= self.peak_lr, f"between 0 and peak_lr {self.peak_lr}")
        check(self, ["b1", "b2"], lambda x: 0 <= x < 1, "at least 0 and below 1")
        check(self, ["eps"], lambda x: 0 < x < math.inf, "above 0")
        check(self, ["vision_layer_decay"], lambda x: 0 < x <= 1, "above 0 and at most 1")
        pairs = "(regex, factor) pairs with factors of at least 0"
        check(self, ["lr_groups"], lambda groups: all(0 <= factor < math.inf for _, factor in groups), pairs)
        check_dtype(self, "mu_dtype")


def split_frozen(params: Mapping[str, Any], freeze: Sequence[str]) -> tuple[Params, Params]:
    """Returns the trained and the frozen parameters.

    Raises:
        InputError: a pattern matches no parameter, or all parameters are frozen.
    """
    _check_patterns("freeze", freeze, params)
    frozen = {path: value for path, value in params.items() if _matches(path, freeze)}
    trained = {path: value for path, value in params.items() if path not in frozen}
    if not trained:
        raise InputError("optimizer.freeze freezes every parameter. Leave some to train.")
    return trained, frozen


def lr_factors(params: Mapping[str, Any], config: OptimizerConfig) -> dict[str, Any]:
    """Returns each parameter's factor of the learning rate: a scalar, or one factor per stacked layer.

    Raises:
        InputError: a pattern of lr_groups matches no parameter.
    """
    _check_patterns("lr_groups", [pattern for pattern, _ in config.lr_groups], params)
    factors = {}
    for path, value in params.items():
        group = next((factor for pattern, factor in config.lr_groups if re.fullmatch(pattern, path)), 1.0)
        factors[path] = np.float32(group) * _layer_decay(path, value.shape, config.vision_layer_decay, params)
    return factors


def _layer_decay(path: str, shape: Sequence[int], decay: float, params: Mapping[str, Any]) -> Any:
    """Blocks are stacked along the first dimension of their parameters. Source of the rule: arXiv 2106.08254."""
    if path.startswith("vision/blocks/"):
        n = shape[0]
        return (decay ** np.arange(n, 0, -1, dtype=np.float32)).reshape(n, *[1] * (len(shape) - 1))
    if path.startswith("vision/patch_embed/"):
        depth = next((v.shape[0] for p, v in params.items() if p.startswith("vision/blocks/")), 0)
        return np.float32(decay ** (depth + 1))
    return np.float32(1.0)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns a linear warm-up from 0, then a cosine.

    Raises:
        InputError: the warm-up is longer than the run.
    """
    if not 0 <= config.warmup_steps <= steps:
        raise InputError(f"optimizer.warmup_steps is {config.warmup_steps}, but the run has {steps} steps.")
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.peak_lr,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.final_lr,
    )


def make_optimizer(
    config: OptimizerConfig, steps: int, params: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """Returns the update of the trained parameters. `params`: all parameters of the model, or their shapes.

    Source of AdamW: arXiv 1711.05101.

    Raises:
        InputError: see `split_frozen`, `make_schedule` and `lr_factors`; or a pattern of muon_params matches no trained
            parameter, or one that is not a matrix.
    """
    trained, _ = split_frozen(params, config.freeze)
    factors = {path: factor for path, factor in lr_factors(params, config).items() if path in trained}
    decayed = {path: not _matches(path, config.no_decay) for path in trained}
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        _direction(config, trained),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors)),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def _direction(config: OptimizerConfig, trained: Params) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)
    if not config.muon_params:
        return adam
    _check_patterns("muon_params", config.muon_params, trained)
    kinds = {path: "muon" if _matches(path, config.muon_params) else "adam" for path in trained}
    vectors = [path for path, kind in kinds.items() if kind == "muon" and _matches(path, _VECTORS)]
    if vectors:
        raise InputError(
            f"optimizer.muon_params matches {vectors[0]}, which is not a matrix. Leave biases and norms to Adam."
        )
    return optax.partition({"adam": adam, "muon": _muon(config)}, kinds)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Steps along the nearest orthogonal matrix, with a root mean square of 0.2, as most steps of AdamW.

    The last two dimensions are those of a matrix; the others stack layers. Source: arXiv 2502.16982, section 2.2.
    """

    def matrices(updates: Any) -> Any:
        return jax.tree.map(lambda u: optax.contrib.MuonDimensionNumbers(u.ndim - 1, u.ndim - 2), updates)

    def match_adam(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)

    muon = optax.contrib.scale_by_muon(mu_dtype=config.mu_dtype, weight_dimension_numbers=matrices)
    return optax.chain(muon, optax.stateless(match_adam))


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _check_patterns(name: str, patterns: Sequence[str], params: Mapping[str, Any]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            raise InputError(f"optimizer.{name} has {pattern!r}, which is not a regular expression ({e}).") from None
        if not any(re.fullmatch(pattern, path) for path in params):
            raise InputError(
                f"optimizer.{name} has {pattern!r}, which matches no parameter. Names look like "
                f"{', '.join(sorted(params)[:3])}; a pattern matches a whole name, so end it in '.*' for a group."
            )
