"""One rule for every parameter."""

import dataclasses

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.sharding import constrain, fit_spec, make_mesh, parameter_path, parameter_shardings, parameter_spec


def abstract_7b() -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Tarsier(ModelConfig(), nnx.Rngs(0))))


def test_every_parameter_of_the_7b_has_one_rule_that_fits_it() -> None:
    for path, leaf in nnx.to_flat_state(abstract_7b()):
        assert len(parameter_spec(parameter_path(path))) <= leaf.ndim


def test_large_parameters_are_split_both_ways() -> None:
    for path, leaf in nnx.to_flat_state(abstract_7b()):
        if leaf.size * 4 > 2**24 and "patch_embed" not in path:
            assert {"fsdp", "tensor"} <= set(parameter_spec(parameter_path(path))), path


@pytest.mark.parametrize(
    ("weight", "a", "b"),
    [
        ("decoder/layers/attn/q", P(None, None, "fsdp"), P(None, "tensor", None)),
        ("decoder/layers/mlp/down", P(None, None, "tensor"), P(None, "fsdp", None)),
        ("vision/blocks/attn/qkv", P(None, None, "fsdp"), P(None, None, "tensor", None)),
        ("vision/merger/fc1", P(None, "fsdp"), P("tensor", None)),
    ],
)
def test_matrices_of_lora_are_split_as_their_weight(weight: str, a: P, b: P) -> None:
    assert parameter_spec(f"{weight}/lora/a") == a
    assert parameter_spec(f"{weight}/lora/b") == b


def test_unknown_parameter() -> None:
    with pytest.raises(ValueError, match="0 sharding rules match parameter decoder/lora/weight"):
        parameter_spec("decoder/lora/weight")


def test_mesh_has_to_match_the_devices() -> None:
    with pytest.raises(ValueError, match="data=2, fsdp=1, tensor=4 does not match 1 devices"):
        make_mesh(data=2, tensor=4, devices=jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that the layout of a mesh depends on."""

    id: int
    slice_index: int
    platform: str
    device_kind: str = ""


def test_a_slice_has_whole_rows_of_fsdp_and_tensor() -> None:
    """Compiled for two slices in test_aot."""
    devices = [Device(i, i // 8, "tpu") for i in range(16)]
    with pytest.raises(InputError, match=r"data=3 is not a multiple of the 2 TPU slices. Set data to 2 .* has 3 chips"):
        make_mesh(data=3, tensor=2, devices=[*devices[:3], *devices[8:11]])
    with pytest.raises(InputError, match="data=1 is not a multiple of the 2 TPU slices"):
        make_mesh(fsdp=16, devices=devices)


def test_fsdp_may_span_the_nodes_of_a_gpu_cluster() -> None:
    devices = [Device(i, i // 8, "gpu") for i in range(16)]
    mesh = make_mesh(fsdp=8, tensor=2, devices=devices[::-1])
    assert [device.id for device in mesh.devices.flat] == list(range(16))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 2}


def test_axis_that_does_not_divide_is_named() -> None:
    mesh = jax.sharding.AbstractMesh((1, 1, 3), ("data", "fsdp", "tensor"))
    with pytest.raises(ValueError, match="tensor=3 does not divide dimension 512 of decoder/layers/attn/k"):
        parameter_shardings(abstract_7b(), mesh)


def test_fit_spec_replicates_a_dimension_that_an_axis_does_not_divide() -> None:
    """With one warning per axis and shape."""
    mesh = jax.sharding.AbstractMesh((2, 2, 4), ("data", "fsdp", "tensor"))
    with pytest.warns(UserWarning) as warned:
        for shape in ((8, 6), (8, 6), (8, 4), (6, 8), (8, 7)):
            expected = P(("data", "fsdp") if shape[0] == 8 else None, "tensor" if shape[1] % 4 == 0 else None)
            assert fit_spec(shape, (("data", "fsdp"), "tensor"), mesh) == expected
    assert [str(warning.message).partition(" of an")[0] for warning in warned] == [
        "Mesh axis tensor=4 does not divide dimension 1",
        "Mesh axis data=2 x fsdp=2 does not divide dimension 0",
        "Mesh axis tensor=4 does not divide dimension 1",
    ]


def test_fit_spec_warns_of_replication_only(recwarn: pytest.WarningsRecorder) -> None:
    mesh = jax.sharding.AbstractMesh((1, 2, 1), ("data", "fsdp", "tensor"))
    assert fit_spec((2, 3, 5), (("data", "fsdp"), "tensor", None), mesh) == P(("data", "fsdp"), "tensor", None)
    assert not recwarn


def test_constrain_without_a_mesh_does_nothing() -> None:
    x = jax.numpy.ones(3)
    assert constrain(x, "tensor") is x
