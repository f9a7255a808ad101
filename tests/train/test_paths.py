"""Paths of a training run: URLs are refused by name, and a workdir has one run at a time."""

from pathlib import Path
from typing import Any

import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.files import locked
from train import sft

CONFIG = Path(__file__).parents[2] / "configs" / "recap_7b.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs SFT with flags until training starts; returns the configuration and the workdir of `train`."""

    def run(*flags: str) -> tuple[Any, Path]:
        trained: list[Any] = []

        def train(config: Any, workdir: Path, *_: object) -> Any:
            trained.append((config, workdir))
            with pytest.raises(InputError, match="Another run"), locked(workdir, inside=True):
                pass
            raise KeyboardInterrupt

        monkeypatch.setattr("sys.argv", ["sft", f"--config={CONFIG}:debug", *flags])
        monkeypatch.setattr(sft, "write_debug_data", lambda config, *_, **__: config)
        monkeypatch.setattr(sft, "train", train)
        with pytest.raises(KeyboardInterrupt):
            sft.main()
        return trained[0]

    return run


def test_the_workdir(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for flag, expected in (("a/../w", tmp_path / "w"), ("~/w", tmp_path / "home" / "w")):
        assert run(f"--workdir={flag}")[1] == expected and not list(expected.iterdir())
    with locked(tmp_path / "w", inside=True), pytest.raises(InputError, match=r"Another run is writing .*/w\. Wait"):
        run("--workdir=w")
    with pytest.raises(InputError, match=r"--workdir https://host/run is a URL"):
        run("--workdir=https://host/run")
    assert not Path("https:").exists()


def test_a_workdir_in_a_store(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run("--workdir=memory://bucket/run")[1].is_relative_to(tmp_path / "tarsier_jax" / "mirrors")
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(InputError, match=r"store that a run of several processes cannot write\. Choose a gs://"):
        run("--workdir=memory://bucket/run")


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("model=https://host/name", "config.model https://host/name"),
        ("data.train=a.jsonl=1,az://bucket/b.jsonl=2", "config.data.train az://bucket/b.jsonl=2"),
        ("data.eval=https://host/b.jsonl", "config.data.eval https://host/b.jsonl"),
        ("data.media_root=https://host", "config.data.media_root https://host"),
        ("dpo.reference=az://bucket/r", "config.dpo.reference az://bucket/r"),
        ("benchmark.data_root=https://host", "config.benchmark.data_root https://host"),
    ],
)
def test_urls_in_the_configuration(run: Any, tmp_path: Path, flag: str, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is a URL"):
        run(f"--workdir={tmp_path}", f"--config.{flag}")


def test_home_in_the_configuration(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    flags = ("--config.model=~/m", "--config.data.media_root=~/clips", "--config.dpo.reference=~/r")
    config, _ = run(f"--workdir={tmp_path}", *flags)
    assert (config.model, config.data.media_root) == ("/home/ann/m", "/home/ann/clips")
    assert config.dpo.reference == "/home/ann/r"
