"""Rematerialisation changes only memory."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tarsier_jax.models.layers import rematerialise
from tarsier_jax.models.tarsier import Tarsier
from tests import reference


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_gradients_do_not_depend_on_remat(tmp_path: Path, remat: str) -> None:
    reference.make_reference(tmp_path, reference.TINY)
    plain = reference.load_ours(tmp_path)
    _, batch = reference.make_case("image", plain.config)

    def gradients(model: Tarsier) -> list[jax.Array]:
        return jax.tree.leaves(jax.jit(jax.grad(lambda model: jnp.mean(model(batch)[:, :20] ** 2)))(model))

    config = dataclasses.replace(plain.config, remat=remat)
    _, state = nnx.split(plain)
    other = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Tarsier(config, nnx.Rngs(0)))), state)
    assert other.config.remat == remat
    for a, b in zip(gradients(other), gradients(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="remat is 'some'; it must be one of 'none', 'full', 'dots'"):
        rematerialise(lambda x: x, "some")
