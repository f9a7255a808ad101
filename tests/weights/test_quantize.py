"""Weights in int8: values, logits, bytes, and sharding over a mesh."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import qwix
from flax import nnx

from tarsier_jax.errors import InputError
from tarsier_jax.families import load_config
from tarsier_jax.models.layers import Linear
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.sharding import parameter_path
from tarsier_jax.weights import load_weights
from tarsier_jax.weights.quantize import Int8, use_quantized
from tarsier_jax.weights.streaming import convert_hf
from tests import reference
from tests.devices import simulated_devices


def load(directory: Path, int8: Int8, dtype: str = "float32") -> Tarsier:
    config = dataclasses.replace(load_config(directory), dtype=dtype, param_dtype=dtype)
    return load_weights(directory, config, int8=int8)


def parameters(model: Tarsier) -> dict[str, Any]:
    return {parameter_path(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values(checkpoint: Path, dtype: str) -> None:
    """Each output channel has a scale of its own, and is rounded to nearest; all else is as it was."""
    plain, quantized = (parameters(load(checkpoint, int8, dtype)) for int8 in (False, True))
    matrices = {name for name, x in quantized.items() if isinstance(x, qwix.QArray)}
    assert len(matrices) == 7 and all(name.startswith("decoder/layers/") for name in matrices)
    for name, x in plain.items():
        x, q = np.asarray(x, np.float32), quantized[name]
        if name not in matrices:
            np.testing.assert_array_equal(np.asarray(q, np.float32), x)
            continue
        scale = np.abs(x).max(axis=-1, keepdims=True) / 127.5  # the largest values round to -128 and 127
        assert q.qvalue.dtype == np.int8
        np.testing.assert_allclose(np.asarray(q.scale), scale, rtol=1e-6)
        assert np.abs(np.asarray(q.qvalue) - x / scale).max() < 0.5001


def test_logits_are_those_of_the_rounded_weights(checkpoint: Path) -> None:
    quantized, rounded = load(checkpoint, int8=True), load(checkpoint, int8=False)
    values = parameters(quantized)
    for path, leaf in nnx.to_flat_state(nnx.state(rounded)):
        if isinstance(q := values[parameter_path(path)], qwix.QArray):
            leaf[...] = jax.numpy.asarray(np.asarray(q.qvalue, np.float32) * np.asarray(q.scale))
    _, batch = reference.make_case("unlike samples", quantized.config)
    valid = np.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    forward = jax.jit(lambda model, batch: model(batch))
    logits, expected = (np.asarray(forward(model, batch))[valid] for model in (quantized, rounded))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    plain = np.asarray(forward(load(checkpoint, int8=False), batch))[valid]
    assert np.abs(plain - expected).max() > 1e-3  # the tolerance is narrow


def test_products_are_scaled_before_they_are_rounded() -> None:
    """In bfloat16, the result is the exact product, rounded once, and so is the gradient of x, scaled before it."""
    keys = jax.random.split(jax.random.key(0), 3)
    linear = Linear(512, 96, bias=False, dtype="bfloat16", param_dtype="float32", rngs=nnx.Rngs(0))
    model = nnx.Dict(decoder=nnx.Dict(layers=nnx.Dict(attn=nnx.Dict(q=linear))))
    use_quantized(model)  # pyright: ignore[reportArgumentType]
    weight = qwix.quantize(linear.weight[...], "int8", channelwise_axes=[0])
    linear.weight = nnx.Param(weight)
    x, g = (jax.random.normal(key, (64, n), "bfloat16") for key, n in zip(keys, (512, 96), strict=False))
    y, pull = jax.vjp(jax.jit(linear), x)
    values, scale = np.asarray(weight.qvalue, np.float64), np.asarray(weight.scale, np.float64)
    exact = np.asarray(x, np.float64) @ (values * scale).T
    half = 2.0**-8  # of the last of eight digits
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=1.01 * half, atol=1e-5)
    scaled = np.asarray(jax.numpy.asarray(np.asarray(g, np.float32) * np.asarray(weight.scale)[:, 0], "bfloat16"))
    expected = np.asarray(scaled, np.float64) @ values
    np.testing.assert_allclose(np.asarray(pull(g)[0], np.float64), expected, rtol=1.01 * half, atol=1e-4)


def test_products_of_integers() -> None:
    """With "w8a8", each token is rounded with a scale of its own. Sums of integers are exact."""
    linear = Linear(512, 96, bias=False, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    model = nnx.Dict(decoder=nnx.Dict(layers=nnx.Dict(attn=nnx.Dict(q=linear))))
    use_quantized(model, "w8a8")  # pyright: ignore[reportArgumentType]
    weight = qwix.quantize(linear.weight[...], "int8", channelwise_axes=[0])
    linear.weight = nnx.Param(weight)
    values, weight_scale = np.asarray(weight.qvalue, np.int64), np.asarray(weight.scale)[:, 0]
    x = np.random.default_rng(0).normal(size=(2, 32, 512)).astype(np.float32)
    x[0, 3] *= 1e4  # has no influence on other tokens
    x[1, 5] = 0
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    rounded = np.rint(x / np.where(scale == 0, 1, scale))
    y = np.asarray(jax.jit(linear)(x))
    np.testing.assert_allclose(y, (rounded.astype(np.int64) @ values.T) * scale * weight_scale, rtol=1e-6)
    exact = (x @ values.T) * weight_scale
    error = np.linalg.norm(y - exact, axis=-1) / np.maximum(np.linalg.norm(exact, axis=-1), 1)
    assert 1e-3 < error.max() < 0.02 and not y[1, 5].any()


def test_half_of_bfloat16(checkpoint: Path) -> None:
    plain, quantized = (
        sum(x.nbytes for x in jax.tree.leaves(nnx.state(load(checkpoint, int8, "bfloat16").decoder.layers)))
        for int8 in (False, True)
    )
    assert quantized < 0.56 * plain


def test_converted_directories_give_the_same(checkpoint: Path, tmp_path: Path) -> None:
    convert_hf(checkpoint, tmp_path / "orbax")
    one, other = (nnx.state(load(directory, int8=True)) for directory in (checkpoint, tmp_path / "orbax"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_over_eight_devices(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "tests.weights.quantized", str(checkpoint)]
    done = subprocess.run(command, env=simulated_devices(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_value(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"int8 is 'w4a16'\. Pass False, True or 'w8a8'\."):
        load(checkpoint, int8="w4a16")  # pyright: ignore[reportArgumentType]


def test_without_qwix(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match=r"need qwix: pip install -e '\.\[int8\]'"):
        load(checkpoint, int8=True)
