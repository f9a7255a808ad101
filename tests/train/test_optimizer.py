import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tarsier_jax.errors import InputError
from train.optimizer import OptimizerConfig, Params, lr_factors, make_optimizer, make_schedule, split_frozen

DEPTH = 3
SHAPES = {
    "decoder/embed/weight": (8, 4),
    "decoder/layers/attn/q/weight": (2, 4, 4),
    "decoder/layers/attn/q/bias": (2, 4),
    "decoder/layers/input_norm/weight": (2, 4),
    "decoder/norm/weight": (4,),
    "vision/patch_embed/weight": (4, 6),
    "vision/blocks/norm1/weight": (DEPTH, 4),
    "vision/blocks/attn/proj/weight": (DEPTH, 4, 4),
    "vision/merger/fc1/weight": (4, 4),
}
PLAIN = OptimizerConfig(peak_lr=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=1e9, vision_layer_decay=1.0)


def make_params() -> Params:
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in SHAPES.items()}


def first_step(config: OptimizerConfig, params: Params, gradients: Params) -> tuple[Params, Any]:
    """The first update, and the state after it."""
    tx = make_optimizer(config, 100, params)
    return jax.jit(lambda: tx.update(gradients, tx.init(params), params))()


# Factors of the learning rate


def test_the_vision_tower_learns_slower_the_deeper_a_block_lies() -> None:
    """Block i of n has decay^(n - i), the patch embedding decay^(n + 1); the merger and the decoder have all of it."""
    factors = lr_factors(make_params(), OptimizerConfig(vision_layer_decay=0.5))
    blocks = [0.5**3, 0.5**2, 0.5]
    np.testing.assert_array_equal(factors["vision/blocks/norm1/weight"], np.reshape(blocks, (3, 1)))
    np.testing.assert_array_equal(factors["vision/blocks/attn/proj/weight"], np.reshape(blocks, (3, 1, 1)))
    assert factors["vision/patch_embed/weight"] == 0.5**4
    others = {path for path in SHAPES if "blocks" not in path and "patch_embed" not in path}
    assert {float(factors[path]) for path in others} == {1.0}


def test_of_groups_the_first_that_matches_counts() -> None:
    groups = (("decoder/embed/weight", 0.25), ("decoder/.*", 2.0), ("vision/.*", 3.0))
    factors = lr_factors(make_params(), OptimizerConfig(vision_layer_decay=0.5, lr_groups=groups))
    assert factors["decoder/embed/weight"] == 0.25
    assert factors["decoder/norm/weight"] == factors["decoder/layers/attn/q/bias"] == 2.0
    assert factors["vision/merger/fc1/weight"] == 3.0
    assert factors["vision/patch_embed/weight"] == 3.0 * 0.5**4  # both count
    np.testing.assert_array_equal(factors["vision/blocks/norm1/weight"][:, 0], [0.375, 0.75, 1.5])


def test_factors_scale_the_steps() -> None:
    """Adam's first step has the size of the learning rate for any gradient."""
    params = make_params()
    config = dataclasses.replace(PLAIN, vision_layer_decay=0.5, lr_groups=(("decoder/.*", 0.1),))
    updates, _ = first_step(config, params, jax.tree.map(lambda x: 7 * jnp.ones_like(x), params))
    sizes = {path: -0.1 * factor for path, factor in lr_factors(params, config).items()}
    for path, update in updates.items():
        np.testing.assert_allclose(update, np.broadcast_to(sizes[path], update.shape), rtol=1e-5, err_msg=path)


# The parts of an update


def test_biases_and_norms_do_not_decay() -> None:
    params = make_params()
    updates, _ = first_step(dataclasses.replace(PLAIN, weight_decay=0.5), params, jax.tree.map(jnp.zeros_like, params))
    for path, update in updates.items():
        decays = not path.endswith(("bias", "norm/weight", "norm1/weight"))
        np.testing.assert_allclose(update, -0.1 * 0.5 * params[path] if decays else 0 * params[path], rtol=1e-6)


def test_gradients_are_clipped_by_their_norm_over_all_parameters() -> None:
    """Seen in the first moment, which is a tenth of the first gradient."""
    params = make_params()
    gradients = jax.tree.map(lambda x: 3 * x, params)
    whole = float(optax.tree.norm(gradients))
    for clip, size in ((1.0, 1.0), (1e9, whole), (0.0, whole)):  # 0 turns clipping off
        _, state = first_step(dataclasses.replace(PLAIN, clip_norm=clip), params, gradients)
        np.testing.assert_allclose(optax.tree.norm(moments(state).mu), (1 - PLAIN.b1) * size, rtol=1e-5)


def test_the_state_has_the_same_structure_without_clipping() -> None:
    """A run resumes with clipping turned off or on."""
    structures = {
        jax.tree.structure(jax.eval_shape(make_optimizer(config, 10, make_params()).init, make_params()))
        for config in (dataclasses.replace(PLAIN, clip_norm=norm) for norm in (0.0, 1.0))
    }
    assert len(structures) == 1


def moments(state: Any) -> optax.ScaleByAdamState:
    (adam,) = (part for part in state if isinstance(part, optax.ScaleByAdamState))
    return adam


@pytest.mark.parametrize("mu_dtype", ["bfloat16", "float32"])
def test_only_the_first_moment_takes_another_dtype(mu_dtype: str) -> None:
    params = make_params()
    updates, state = first_step(dataclasses.replace(PLAIN, mu_dtype=mu_dtype), params, params)
    adam = moments(state)
    assert {x.dtype.name for x in adam.mu.values()} == {mu_dtype}
    assert {x.dtype.name for x in jax.tree.leaves((adam.nu, updates))} == {"float32"}


# Muon

MUON = dataclasses.replace(PLAIN, muon_params=(".*/attn/.*/weight",))


def test_muon_steps_along_the_nearest_orthogonal_matrix_of_each_layer() -> None:
    """U V^T of the gradient's singular vectors, 0.2 in root mean square; a square matrix of 4 has 16 entries."""
    params = make_params()
    updates, _ = first_step(MUON, params, params)
    for path in ("decoder/layers/attn/q/weight", "vision/blocks/attn/proj/weight"):
        for update, gradient in zip(updates[path], params[path], strict=True):
            u, _, v = np.linalg.svd(np.asarray(gradient))
            step = -np.asarray(update) / (0.1 * 0.2 * 4**0.5)
            singular = np.diag(u.T @ step @ v.T)
            np.testing.assert_allclose(step, u @ np.diag(singular) @ v, atol=1e-5)  # its singular vectors, all alike
            assert (singular > 0.6).all() and (singular < 1.3).all()  # Newton-Schulz's five steps come no nearer


def test_other_parameters_stay_with_adam() -> None:
    params = make_params()
    (with_muon, _), (without, _) = (first_step(config, params, params) for config in (MUON, PLAIN))
    for path in SHAPES:
        assert np.array_equal(with_muon[path], without[path]) == ("/attn/" not in path or path.endswith("bias")), path


def test_muon_keeps_one_moment_and_lies_where_its_parameters_do() -> None:
    _, state = first_step(MUON, make_params(), make_params())
    kept = [path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(state)[0] if hasattr(path[-1], "key")]
    matrices = {"decoder/layers/attn/q/weight", "vision/blocks/attn/proj/weight"}
    assert {path: kept.count(path) for path in SHAPES} == {path: 1 if path in matrices else 2 for path in SHAPES}


def test_muon_of_what_is_no_matrix() -> None:
    with pytest.raises(
        InputError, match=r"optimizer\.muon_params matches decoder/layers/attn/q/bias, which is not a matrix"
    ):
        make_optimizer(dataclasses.replace(PLAIN, muon_params=("decoder/layers/.*",)), 10, make_params())
    with pytest.raises(InputError, match=r"optimizer\.muon_params has 'vision', which matches no parameter"):
        make_optimizer(dataclasses.replace(PLAIN, muon_params=("vision",)), 10, make_params())


# Frozen parameters


def test_frozen_parameters_have_no_optimizer_state() -> None:
    trained, frozen = split_frozen(make_params(), ("vision/.*", "decoder/embed/weight"))
    assert set(frozen) == {path for path in SHAPES if path.startswith("vision/") or "embed" in path}
    assert set(trained) | set(frozen) == set(SHAPES) and not set(trained) & set(frozen)
    state = make_optimizer(OptimizerConfig(warmup_steps=1), 10, trained).init(trained)
    adam = moments(state)
    assert set(adam.mu) == set(adam.nu) == set(trained)
    sizes = [x.size for x in jax.tree.leaves(state) if x.ndim]
    assert sum(sizes) == 2 * sum(x.size for x in trained.values())


def test_nothing_is_frozen_unless_asked() -> None:
    params = make_params()
    trained, frozen = split_frozen(params, ())
    assert (list(trained), frozen) == (list(params), {})


def test_freezing_everything() -> None:
    with pytest.raises(InputError, match="freezes every parameter"):
        split_frozen(make_params(), ("vision/.*", "decoder/.*"))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("visual/.*", r"'visual/\.\*', which matches no parameter.*decoder/embed/weight"),
        ("vision", r"'vision', which matches no parameter.*matches a whole name, so end it in '\.\*'"),
        ("vision/(.*", r"'vision/\(\.\*', which is not a regular expression \(missing \)"),
    ],
)
def test_patterns_that_choose_nothing(pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"optimizer\.freeze has {message}"):
        split_frozen(make_params(), ("decoder/norm/weight", pattern))
    with pytest.raises(InputError, match=rf"optimizer\.lr_groups has {message}"):
        lr_factors(make_params(), OptimizerConfig(lr_groups=((pattern, 0.1),)))


# The schedule


def test_warm_up_then_half_a_cosine() -> None:
    schedule = make_schedule(OptimizerConfig(peak_lr=0.1, final_lr=0.02, warmup_steps=10), 110)
    values = {step: float(schedule(step)) for step in (0, 5, 10, 35, 60, 110, 200)}
    quarter = 0.02 + 0.08 * (1 + math.cos(math.pi / 4)) / 2
    expected = {0: 0.0, 5: 0.05, 10: 0.1, 35: quarter, 60: 0.06, 110: 0.02, 200: 0.02}
    assert values == pytest.approx(expected, rel=1e-5)


def test_without_warm_up() -> None:
    schedule = make_schedule(OptimizerConfig(peak_lr=0.1, warmup_steps=0), 100)
    assert [float(schedule(step)) for step in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0.0], rel=1e-5)


def test_a_run_of_nothing_but_warm_up() -> None:
    schedule = make_schedule(OptimizerConfig(peak_lr=0.1, warmup_steps=4), 4)
    assert [float(schedule(step)) for step in range(5)] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1], rel=1e-5)


@pytest.mark.parametrize("warmup", [11, -1])
def test_a_warm_up_that_does_not_fit(warmup: int) -> None:
    with pytest.raises(InputError, match=rf"optimizer\.warmup_steps is {warmup}, but the run has 10 steps"):
        make_schedule(OptimizerConfig(warmup_steps=warmup), 10)
