import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.families import parse_config
from tarsier_jax.sharding import parameter_path
from tarsier_jax.weights.names import abstract_state
from tests.tarsier1 import TARSIER_7B
from train.config import (
    FORMER_KEYS,
    REMOVED_KEYS,
    TrainConfig,
    default_config,
    define_flags,
    read_config,
    read_flags,
)
from train.data.packing import DataConfig, fit_packing
from train.debug_data import MODELS
from train.mesh import build_mesh, check_rows
from train.optimizer import lr_factors, make_schedule, split_frozen
from train.record import flatten
from train.run import run_config

RECIPES = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.py") if path.stem != "debug")


# A recipe's dictionary


def test_the_defaults_are_those_of_the_dataclasses() -> None:
    assert read_config(default_config()) == TrainConfig()


def test_values_become_what_the_dataclasses_hold() -> None:
    config = default_config()
    config.optimizer.peak_lr = 1
    config.optimizer.freeze = ["vision/.*"]
    config.optimizer.lr_groups = [["decoder/embed/weight", 0.1], ["vision/.*", 2]]
    optimizer = read_config(config).optimizer
    assert {type(number) for number in (optimizer.peak_lr, *dict(optimizer.lr_groups).values())} == {float}
    assert (optimizer.freeze, optimizer.lr_groups) == (
        ("vision/.*",),
        (("decoder/embed/weight", 0.1), ("vision/.*", 2.0)),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_step": 3}, r"config\.num_train_step does not exist\. Did you mean num_train_steps\?"),
        ({"data": {"seq_lem": 3}}, r"config\.data\.seq_lem does not exist\. Did you mean seq_len\?"),
        ({"mesh": {"model": 2}}, r"config\.mesh\.model does not exist\. It has data, fsdp, tensor\."),
        ({"num_train_steps": "many"}, r"config\.num_train_steps must be of type int, but is 'many'"),
        ({"seed": 1.5}, r"config\.seed must be of type int, but is 1\.5"),
        ({"dpo": {"beta": "0.1"}}, r"config\.dpo\.beta must be of type float, but is '0\.1'"),
        ({"data": 3}, r"config\.data must contain keys, but is 3"),
        ({"optimizer": {"freeze": "vision/.*"}}, r"config\.optimizer\.freeze must be a tuple, not 'vision"),
        ({"optimizer": {"freeze": (7,)}}, r"config\.optimizer\.freeze\[0\] must be of type str, but is 7"),
        ({"optimizer": {"lr_groups": (("vision/.*",),)}}, r"config\.optimizer\.lr_groups\[0\] must be a tuple of 2"),
        ({"processor": {"n_frames": 0}}, r"config\.processor\.n_frames must be at least 1"),
        ({"num_train_steps": True}, r"config\.num_train_steps must be of type int, but is True"),
    ],
)
def test_unfit_keys_and_values(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_config(changed(change))


def changed(change: dict) -> ConfigDict:
    """The default configuration with other values, of any type."""
    config = default_config()
    with config.unlocked(), config.ignore_type():
        for key, value in change.items():
            config[key] = {**config[key].to_dict(), **value} if isinstance(value, dict) else value
    return config


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("section", "key", "values", "accepted"),
    [
        ("", "num_train_steps", (-1,), "at least 0"),
        ("", "seed", (-1,), "at least 0"),
        ("", "max_to_keep", (0, -2), "at least 1"),
        ("", "log_every", (-1,), "at least 0"),
        ("", "save_every", (-1,), "at least 0"),
        ("", "eval_every", (-5,), "at least 0"),
        ("", "eval_captions", (-1,), "at least 0"),
        ("", "profile_step", (-1,), "at least 0"),
        ("", "remat", ("offload", "", "Full"), "one of none, dots, full"),
        ("", "attention", ("flash", "sdpa"), "one of auto, xla, cudnn, splash"),
        ("dpo", "beta", (0.0, -0.1, NAN, INFINITY), "above 0"),
        ("dpo", "reference", ("",), '"weights" or the name of a file'),
        ("data", "seq_len", (0, -1), "at least 1"),
        ("data", "vision_bins", (-2,), "at least 0, or -1 to be derived"),
        ("data", "patches_per_bin", (0, -2), "at least 1, or -1 to be derived"),
        ("data", "frames_per_bin", (0, -2), "at least 1, or -1 to be derived"),
        ("data", "max_samples_per_seq", (0,), "at least 1"),
        ("data", "packing_buffer", (0, -4), "at least 1"),
        ("data", "num_workers", (-1,), "at least 0"),
        ("data", "max_bad_fraction", (-0.1, 1.1, NAN), "between 0 and 1"),
        ("optimizer", "peak_lr", (-1e-5, NAN, INFINITY), "at least 0"),
        ("optimizer", "final_lr", (-1e-6, 1e-3, NAN), "between 0 and peak_lr 2e-05"),
        ("optimizer", "b1", (1.0, -0.1, NAN), "at least 0 and below 1"),
        ("optimizer", "b2", (1.5, -1.0, NAN), "at least 0 and below 1"),
        ("optimizer", "eps", (0.0, -1e-8, NAN), "above 0"),
        ("optimizer", "weight_decay", (-0.1, NAN), "at least 0"),
        ("optimizer", "clip_norm", (-1.0, NAN, INFINITY), "at least 0"),
        ("optimizer", "vision_layer_decay", (0.0, -0.9, 1.1, NAN), "above 0 and at most 1"),
        ("optimizer", "lr_groups", ((("vision/.*", -1.0),), (("vision/.*", NAN),)), r"(regex, factor) pairs with"),
    ],
)
def test_values_out_of_range(section: str, key: str, values: tuple, accepted: str) -> None:
    name = f"config.{section}.{key}" if section else f"config.{key}"
    for value in values:
        change = {section: {key: value}} if section else {key: value}
        with pytest.raises(InputError, match=re.escape(f"{name} is {value!r}, but must be {accepted}")):
            read_config(changed(change))


def test_the_ends_of_the_ranges() -> None:
    zeros = dict.fromkeys(("peak_lr", "b1", "b2", "weight_decay", "clip_norm", "warmup_steps"), 0.0)
    optimizer = {**zeros, "warmup_steps": 0, "vision_layer_decay": 1.0, "lr_groups": (("vision/.*", 0.0),)}
    config = read_config(
        changed({"num_train_steps": 0, "optimizer": optimizer, "data": {"vision_bins": 0, "max_bad_fraction": 1.0}})
    )
    assert config.optimizer.b2 == config.num_train_steps == 0


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("bf16", r"one of (auto, )?float32, bfloat16\. Did you mean bfloat16\?"),
        ("BF16", r"Did you mean bfloat16\?"),
        ("fp32", r"Did you mean float32\?"),
        ("int8", r"one of (auto, )?float32, bfloat16\."),
        ("fp16", r"float16 is not supported.*Choose bfloat16\."),
        ("float16", r"float16 is not supported.*Choose bfloat16\."),
        ("half", r"float16 is not supported.*Choose bfloat16\."),
    ],
)
def test_dtypes_that_are_not_supported(dtype: str, message: str) -> None:
    for name, change in (("dtype", {"dtype": dtype}), ("optimizer.mu_dtype", {"optimizer": {"mu_dtype": dtype}})):
        with pytest.raises(InputError, match=rf"^config\.{name} is '{dtype}', but .*{message}"):
            read_config(changed(change))


def test_a_warm_up_longer_than_the_run() -> None:
    with pytest.raises(InputError, match=r"^config\.optimizer\.warmup_steps is 1000, but the run has 10 steps"):
        read_config(changed({"num_train_steps": 10}))


def device(platform: str) -> SimpleNamespace:
    """The attributes of a device that the attention depends on."""
    return SimpleNamespace(platform=platform, compute_capability="9.0" if platform == "gpu" else "")


@pytest.mark.parametrize(
    ("change", "platform", "message"),
    [
        ({"attention": "splash"}, "cpu", r"config\.attention=splash needs a TPU, not cpu and float32\. Choose auto"),
        (
            {"attention": "cudnn"},
            "tpu",
            r"attention=cudnn needs an NVIDIA GPU .*and bfloat16, not tpu",
        ),
        (
            {"attention": "cudnn", "dtype": "float32"},
            "gpu",
            r"cudnn needs an NVIDIA GPU .*, not gpu and float32",
        ),
    ],
)
def test_values_that_the_machine_or_the_model_refuses(change: dict, platform: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_config(ModelConfig(), read_config(changed(change)), device(platform))


def test_attention_that_the_machine_has() -> None:
    for platform, attention in (("cpu", "xla"), ("gpu", "xla"), ("gpu", "cudnn"), ("tpu", "splash")):
        config = read_config(changed({"attention": attention, "dtype": "bfloat16"}))
        assert run_config(ModelConfig(), config, device(platform)).attention == attention


# The command line


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """Parses the command line of a program."""

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
        "--config.data.global_batch_size=8",
        "--config.optimizer.peak_lr=1",
        "--config.optimizer.freeze=('vision/.*', 'decoder/embed/weight')",
        "--config.optimizer.lr_groups=(('decoder/.*', 0.5),)",
    )
    assert (config.data.train, config.data.global_batch_size) == ("a.jsonl=3,b.jsonl=1", 8)
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
        (
            ["--config.data.seq_lem=3"],
            r"^--config\.data\.seq_lem does not exist\. Did you mean --config\.data\.seq_len\?",
        ),
        (["--config.data.global_batch_size=abc"], r"--config\.data\.global_batch_size=abc: .*'abc'"),
        (["--config.data=3"], r"--config\.data=3: .*'3'"),
        (["--wrkdir=run"], r"^--wrkdir does not exist\. Did you mean --workdir\? Other flags: --workdir\."),
        (["run"], "^'run' is not a flag"),
    ],
)
def test_unfit_flags(command_line: Callable[..., TrainConfig], recipe: str, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command_line(recipe, *arguments)


def test_help_lists_every_key(command_line: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line("--help")
    printed = capsys.readouterr().out
    for key, default in flatten(dataclasses.asdict(TrainConfig()), "--config.").items():
        (description,) = re.findall(rf"^{re.escape(f'{key}={default!r}')}\n    (.*)$", printed, re.MULTILINE)
        assert description, key


@pytest.mark.parametrize(
    ("former", "message"),
    [
        *((former, f"is now config.{key}. Use the new name") for former, key in FORMER_KEYS.items()),
        *((removed, "no longer exists. `python -m train.micro`") for removed in REMOVED_KEYS),
    ],
)
def test_keys_of_earlier_versions(
    command_line: Callable[..., TrainConfig], recipe: str, tmp_path: Path, former: str, message: str
) -> None:
    message = f"^config.{former} {message}"
    with pytest.raises(InputError, match=message):
        command_line(recipe, f"--config.{former}=1")
    path = tmp_path / "former.py"
    path.write_text(
        Path(recipe.removeprefix("--config="))
        .read_text()
        .replace("return default_config()", f"config = default_config()\n    config.{former} = 1\n    return config")
    )
    with pytest.raises(InputError, match=message):
        command_line(f"--config={path}")
    section, _, name = former.rpartition(".")
    with pytest.raises(InputError, match=message):
        read_config(changed({section: {name: 1}} if section else {name: 1}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"^Give a recipe: --config configs/recap_7b\.py"),
        (["--config=configs/none.py"], r"^configs/none\.py does not exist\. Give a recipe"),
        (
            ["--config=configs/none.py", "--config.num_train_steps=3"],
            r"configs/none\.py.*No such file|No such file.*configs/none\.py",
        ),
    ],
)
def test_no_recipe(command_line: Callable[..., TrainConfig], arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command_line(*arguments)


# The recipes


# The full model of a recipe, by the model of its debug size.
FULL_MODELS = {"random": ModelConfig(), "random_tarsier1": parse_config(TARSIER_7B)}


@pytest.fixture(scope="session")
def parameters() -> dict[str, dict[str, Any]]:
    """Names and shapes of the parameters of each of `FULL_MODELS`."""
    states = {name: abstract_state(config)[1] for name, config in FULL_MODELS.items()}
    return {
        name: {parameter_path(path): leaf for path, leaf in nnx.to_flat_state(state)} for name, state in states.items()
    }


@pytest.mark.parametrize("size", ["", ":debug"], ids=["full", "debug"])
@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe(
    command_line: Callable[..., TrainConfig], parameters: dict[str, dict[str, Any]], path: Path, size: str
) -> None:
    config, model = command_line(f"--config={path}{size}"), command_line(f"--config={path}:debug").model
    trained, _ = split_frozen(parameters[model], config.optimizer.freeze)
    lr_factors(trained, config.optimizer)
    schedule = make_schedule(config.optimizer, config.num_train_steps)
    assert 0 < schedule(config.optimizer.warmup_steps) <= np.float32(1e-3)
    vision = FULL_MODELS[model].vision
    shape = fit_packing(config.data, config.processor, vision).row_shape
    assert shape.tokens % 64 == 0 and shape.patches % vision.bin_multiple == 0
    check_rows(config, build_mesh(config.mesh, jax.devices()[:1] * 2))
    if size:
        assert config.data.train == config.data.eval == "random" and config.num_train_steps <= 50
        assert config.model in MODELS
    else:
        assert config.model not in MODELS and "random" not in (config.data.train, config.data.eval)


def test_the_first_tarsiers_recipes_train_the_projector_and_the_decoder(
    command_line: Callable[..., TrainConfig], parameters: dict[str, dict[str, Any]]
) -> None:
    """As published, with rows of three samples of 8 frames."""
    for stage in (1, 2):
        config = command_line(f"--config={RECIPES[0].with_name(f'tarsier1_stage{stage}.py')}")
        trained, frozen = split_frozen(parameters["random_tarsier1"], config.optimizer.freeze)
        assert {path.rpartition("/")[0] for path in trained if path.startswith("vision/")} == {
            "vision/projector/linear_1",
            "vision/projector/linear_2",
        }
        assert not any(path.startswith("decoder/") for path in frozen)
        shape = fit_packing(config.data, config.processor, FULL_MODELS["random_tarsier1"].vision).row_shape
        assert (shape.patches, shape.frames, shape.bins) == (576, 1, 25) and config.processor.n_frames == 8


def test_epochs_of_a_recipe_and_steps_of_the_command_line(command_line: Callable[..., TrainConfig]) -> None:
    recipe = f"--config={RECIPES[0].with_name('recap_7b.py')}"
    assert command_line(recipe).num_epochs == 2 and command_line(f"{recipe}:debug").num_epochs == 0
    with pytest.raises(InputError, match=r"num_train_steps is without effect, since config\.num_epochs is 2\. .*=0"):
        command_line(recipe, "--config.num_train_steps=300")
    assert command_line(recipe, "--config.num_train_steps=300", "--config.num_epochs=0").num_train_steps == 300


def test_there_are_recipes() -> None:
    assert {"recap_7b", "sft_7b", "dpo_7b"} <= {path.stem for path in RECIPES}
