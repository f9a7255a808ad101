import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.sharding import parameter_path
from tarsier_jax.weights.names import abstract_state
from train.config import MeshConfig, TrainConfig, default_config, define_flags, parse_config, read_flags
from train.data import DataConfig
from train.optimizer import lr_factors, make_schedule, split_frozen
from train.setup import check_rows, mesh_of, row_share

RECIPES = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.py") if path.stem != "debug")


# A recipe's dictionary


def test_the_defaults_are_those_of_the_dataclasses() -> None:
    assert parse_config(default_config()) == TrainConfig()


def test_values_become_what_the_dataclasses_hold() -> None:
    config = default_config()
    config.optimizer.peak_lr = 1
    config.optimizer.freeze = ["vision/.*"]
    config.optimizer.lr_groups = [["decoder/embed/weight", 0.1], ["vision/.*", 2]]
    optimizer = parse_config(config).optimizer
    assert {type(number) for number in (optimizer.peak_lr, *dict(optimizer.lr_groups).values())} == {float}
    assert (optimizer.freeze, optimizer.lr_groups) == (
        ("vision/.*",),
        (("decoder/embed/weight", 0.1), ("vision/.*", 2.0)),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 3}, r"config\.step does not exist\. Did you mean steps\?"),
        ({"data": {"row": 3}}, r"config\.data\.row does not exist\. Did you mean rows\?"),
        ({"mesh": {"model": 2}}, r"config\.mesh\.model does not exist\. It has data, fsdp, tensor\."),
        ({"steps": "many"}, r"config\.steps has to be of type int, but is 'many'"),
        ({"seed": 1.5}, r"config\.seed has to be of type int, but is 1\.5"),
        ({"dpo": {"beta": "0.1"}}, r"config\.dpo\.beta has to be of type float, but is '0\.1'"),
        ({"data": 3}, r"config\.data has to hold keys, but is 3"),
        ({"optimizer": {"freeze": "vision/.*"}}, r"config\.optimizer\.freeze has to be a tuple, not 'vision"),
        ({"optimizer": {"freeze": (7,)}}, r"config\.optimizer\.freeze\[0\] has to be of type str, but is 7"),
        ({"optimizer": {"lr_groups": (("vision/.*",),)}}, r"config\.optimizer\.lr_groups\[0\] has to be a tuple of 2"),
        ({"processor": {"n_frames": 0}}, "n_frames has to be at least 1"),
    ],
)
def test_unfit_keys_and_values(change: dict, message: str) -> None:
    config = default_config()
    with config.unlocked(), config.ignore_type():
        for key, value in change.items():
            config[key] = {**config[key].to_dict(), **value} if isinstance(value, dict) else value
    with pytest.raises(InputError, match=message):
        parse_config(config)


# The command line


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """Parses what a program is given."""

    def read(*arguments: str) -> TrainConfig:
        monkeypatch.setattr("sys.argv", ["sft", *arguments])
        values = define_flags()
        flags.DEFINE_string("workdir", None, "Where checkpoints go.", flag_values=values)
        return read_flags(values)

    return read


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.py"
    path.write_text("from train.config import default_config\n\n\ndef get_config():\n    return default_config()\n")
    return f"--config={path}"


def test_keys_on_the_command_line(command_line: Callable[..., TrainConfig], recipe: str) -> None:
    config = command_line(
        recipe,
        "--workdir=run",
        "--config.data.train=a.jsonl=3,b.jsonl=1",
        "--config.data.rows=8",
        "--config.optimizer.peak_lr=1",
        "--config.optimizer.freeze=('vision/.*', 'decoder/embed/weight')",
        "--config.optimizer.lr_groups=(('decoder/.*', 0.5),)",
    )
    assert (config.data.train, config.data.rows) == ("a.jsonl=3,b.jsonl=1", 8)
    assert config.optimizer.peak_lr == 1.0
    assert config.optimizer.freeze == ("vision/.*", "decoder/embed/weight")
    assert config.optimizer.lr_groups == (("decoder/.*", 0.5),)
    assert dataclasses.replace(config, data=DataConfig(), optimizer=TrainConfig().optimizer) == TrainConfig()


@pytest.mark.parametrize("value", ["('vision/.*',)", "vision/.*"])
def test_a_single_pattern_to_freeze(command_line: Callable[..., TrainConfig], recipe: str, value: str) -> None:
    assert command_line(recipe, f"--config.optimizer.freeze={value}").optimizer.freeze == ("vision/.*",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.nope=3"], r"^--config\.nope does not exist\."),
        (["--config.data.rowz=3"], r"^--config\.data\.rowz does not exist\. Did you mean --config\.data\.rows\?"),
        (["--config.data.rows=abc"], r"--config\.data\.rows=abc: .*'abc'"),
        (["--config.data=3"], r"--config\.data=3: .*'3'"),
        (["--wrkdir=run"], r"^--wrkdir does not exist\. Did you mean --workdir\? Other flags: --workdir\."),
        (["run"], "^'run' is no flag"),
    ],
)
def test_unfit_flags(command_line: Callable[..., TrainConfig], recipe: str, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command_line(recipe, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"^Give a recipe: --config configs/recap_7b\.py"),
        (["--config=configs/none.py"], r"^configs/none\.py does not exist\. Give a recipe"),
        (
            ["--config=configs/none.py", "--config.steps=3"],
            r"configs/none\.py.*No such file|No such file.*configs/none\.py",
        ),
    ],
)
def test_no_recipe(command_line: Callable[..., TrainConfig], arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command_line(*arguments)


# The recipes


@pytest.fixture(scope="session")
def parameters() -> dict[str, Any]:
    """Names and shapes of the 7B's parameters."""
    _, abstract = abstract_state(ModelConfig())
    return {parameter_path(path): leaf for path, leaf in nnx.to_flat_state(abstract)}


@pytest.mark.parametrize("size", ["", ":debug"], ids=["full", "debug"])
@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe(
    command_line: Callable[..., TrainConfig], parameters: dict[str, Any], path: Path, size: str
) -> None:
    config = command_line(f"--config={path}{size}")
    trained, _ = split_frozen(parameters, config.optimizer.freeze)
    lr_factors(trained, config.optimizer)
    schedule = make_schedule(config.optimizer, config.steps)
    assert 0 < schedule(config.optimizer.warmup_steps) <= np.float32(1e-3)
    shape = config.data.row_shape
    assert shape.tokens % 64 == 0 and shape.patches % 4 == 0  # whole merged patches
    check_rows(config, mesh_of(config.mesh, devices(2)))
    if size:
        assert config.model == config.data.train == config.data.eval == "random" and config.steps <= 50
    else:
        assert "random" not in (config.model, config.data.train, config.data.eval)


def test_there_are_recipes() -> None:
    assert {"recap_7b", "sft_7b", "dpo_7b"} <= {path.stem for path in RECIPES}


# The mesh and the rows


def devices(count: int) -> list[jax.Device]:
    """As many as a mesh needs in order to be described; it could not compute."""
    return jax.devices()[:1] * count


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=8, fsdp=1, tensor=-1), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_one_axis_takes_what_the_others_leave(config: MeshConfig, sizes: tuple[int, int, int]) -> None:
    assert dict(mesh_of(config, devices(8)).shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=1, fsdp=4, tensor=1),
        MeshConfig(data=1, fsdp=3, tensor=-1),
        MeshConfig(data=2, fsdp=-1, tensor=-1),
        MeshConfig(data=0, fsdp=-1, tensor=1),
        MeshConfig(data=-2, fsdp=-4, tensor=1),
    ],
)
def test_a_mesh_that_does_not_match_the_devices(config: MeshConfig) -> None:
    sizes = f"data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}"
    with pytest.raises(InputError, match=f"{sizes} does not match 8 devices.* has to be 8"):
        mesh_of(config, devices(8))


def with_rows(rows: int, parts: int) -> TrainConfig:
    return TrainConfig(parts=parts, data=DataConfig(rows=rows))


def test_rows_are_split_into_parts_and_over_data_and_fsdp() -> None:
    mesh = mesh_of(MeshConfig(data=2, fsdp=2, tensor=2), devices(8))
    check_rows(with_rows(rows=12, parts=3), mesh)
    with pytest.raises(InputError, match=r"rows=12 .*parts=2 times the 4 devices .* a multiple of 8"):
        check_rows(with_rows(rows=12, parts=2), mesh)
    for rows, parts in ((0, 1), (12, 0)):
        with pytest.raises(InputError, match=rf"rows={rows} .*parts={parts} times .* a multiple of 4"):
            check_rows(with_rows(rows, parts), mesh)


@pytest.mark.parametrize(
    ("config", "processes", "shares"),
    [
        (MeshConfig(), 1, [(0, 1)]),
        (MeshConfig(), 2, [(0, 2), (1, 2)]),
        (MeshConfig(data=2, fsdp=2, tensor=2), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (MeshConfig(fsdp=2, tensor=4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # the tensor axis spans two processes
        (MeshConfig(fsdp=1, tensor=8), 2, [(0, 1), (0, 1)]),
    ],
)
def test_processes_share_rows(
    monkeypatch: pytest.MonkeyPatch, config: MeshConfig, processes: int, shares: list[tuple[int, int]]
) -> None:
    mesh = mesh_of(config, devices(8))
    for process, share in enumerate(shares):
        own = np.arange(8) // (8 // processes) == process

        class Sharding:
            """What a process sees of a `NamedSharding` of rows over data and fsdp."""

            def __init__(self, mesh: Mesh, *_: Any) -> None:
                self.rows = np.arange(8).reshape(-1, mesh.shape["tensor"])

            def addressable_devices_indices_map(self, shape: tuple[int], own: np.ndarray = own) -> dict:
                assert shape == (len(self.rows),)
                return {i: (slice(r, r + 1),) for r, row in enumerate(self.rows) for i in row.tolist() if own[i]}

        monkeypatch.setattr("train.setup.NamedSharding", Sharding)
        assert row_share(mesh) == share
