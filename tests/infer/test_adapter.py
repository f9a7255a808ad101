"""--adapter of the programs: the answers are those of the merged model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tarsier_jax
from eval import run as evaluation
from infer import caption, chat, describe, web
from infer.bulk.config import CaptionConfig
from infer.serve import __main__ as serve
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import load_config
from tarsier_jax.processing.processor import media_sample
from tarsier_jax.programs import run
from tarsier_jax.weights.adapter import linear_parameters, write_adapter
from tarsier_jax.weights.digest import digest_adapter


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random updates of the decoder."""
    config, rng = load_config(checkpoint), np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    matrices = {
        p.path: (draw(p.shape[0], 2, p.shape[-1]), draw(*p.shape[:-1], 2))
        for p in linear_parameters(config)
        if p.path[0] == "decoder"
    }
    out = tmp_path_factory.mktemp("programs") / "adapter"
    write_adapter(out, config, matrices, 2.0, str(checkpoint))
    return out


def test_describe(checkpoint: Path, adapter: Path, gif: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = []
    for more in ((), ("--adapter", adapter)):
        flags = ("--model", checkpoint, "--input", gif, "--n_frames", 4, "--max_new_tokens", 5, "--json", *more)
        args = describe.parse([str(flag) for flag in flags])
        assert run(lambda args=args: describe.main(args)) == 0
        captions.append(json.loads(capsys.readouterr().out)["caption"])
    model, processor = tarsier_jax.load(checkpoint, adapter=adapter)
    sample = media_sample(gif, "Describe the video in detail.")
    (expected,) = tarsier_jax.generate(model, processor.replace(n_frames=4), [sample], max_new_tokens=5)
    assert captions[1] == expected != captions[0]


def test_every_program_has_the_flag() -> None:
    flags = {
        caption: ["--input=a", "--output=b.jsonl"],
        chat: [],
        describe: ["--input=a"],
        evaluation: ["--output=b", "--benchmarks=shapes"],
        serve: [],
        web: [],
    }
    for program, necessary in flags.items():
        assert program.parse(["--adapter=gs://some/adapter", *necessary]).adapter == "gs://some/adapter"
    assert CaptionConfig.of(caption.parse(["--adapter=a", *flags[caption]])).adapter == "a"


def test_predictions_of_another_adapter_are_not_continued(checkpoint: Path, adapter: Path) -> None:
    flags = [f"--model={checkpoint}", "--output=o", "--benchmarks=shapes"]
    args = (evaluation.parse([*flags, *more]) for more in ([], [f"--adapter={adapter}"]))
    plain, ours = (evaluation.run_settings(each, [])["weights"] for each in args)
    assert ours.startswith(f"{plain}+")


def test_a_model_as_the_adapter(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a LoRA adapter: it contains no adapter_config\.json"):
        tarsier_jax.load(checkpoint, adapter=checkpoint)


def test_an_adapter_is_identified_by_its_options_and_weights(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert digest_adapter(copy) == digest_adapter(adapter)
    options = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**options, "lora_alpha": 3.0}))
    assert digest_adapter(copy) != digest_adapter(adapter)
