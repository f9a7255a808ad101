"""`python -m infer.describe`: what it prints, and how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tarsier_jax
from infer import describe
from tarsier_jax.processing.processor import media_sample
from tarsier_jax.programs import run
from tarsier_jax.weights import EMBEDDED_CLIP
from tests.infer.conftest import write_gif


def describe_main(*flags: object) -> int:
    args = describe.parse([str(flag) for flag in flags])
    return run(lambda: describe.main(args), args.traceback)


def test_json_lines(checkpoint: Path, gif: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", checkpoint, "--input", gif, "--prompt", "What happens?", "--n_frames", 4)
    assert describe_main(*flags, "--max_new_tokens", 5, "--json") == 0
    out, err = capsys.readouterr()
    line = json.loads(out)
    assert {**line, "caption": None} == {
        "input": str(gif),
        "prompt": "What happens?",
        "caption": None,
        "n_frames": 4,
        "prompt_tokens": line["prompt_tokens"],
        "new_tokens": 5,
        "finish_reason": "length",
    }
    assert f"[1/1] {gif}: 5 tokens" in err
    model, processor = tarsier_jax.load(checkpoint)
    processor = processor.replace(n_frames=4)
    sample = media_sample(gif, "What happens?")
    assert len(processor(sample).input_ids) == line["prompt_tokens"]
    assert tarsier_jax.generate(model, processor, [sample], max_new_tokens=5) == [line["caption"]]


def test_the_caption_is_the_references(checkpoint: Path, gif: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file to text, against transformers on the same checkpoint."""
    from convert.backends import load_reference

    describe_main("--model", checkpoint, "--input", gif, "--max_new_tokens", 16, "--json")
    _, processor = tarsier_jax.load(checkpoint)
    theirs = load_reference(checkpoint, processor.config, processor.eos_token_ids)
    example = processor(media_sample(gif, "Describe the video in detail."))
    expected = processor.decode(theirs.answer(example, 16))
    assert json.loads(capsys.readouterr().out)["caption"] == expected


def test_plain_output_of_a_directory(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_gif(clips / "b.gif")
    Image.new("RGB", (60, 60), "red").save(clips / "a.png")
    (clips / "notes.txt").write_text("no clip")
    assert describe_main("--model", checkpoint, "--input", clips, "--max_new_tokens", 3) == 0
    blocks = capsys.readouterr().out.strip("\n").split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == [str(clips / "a.png"), str(clips / "b.gif")]


def test_one_bad_file_among_many(
    checkpoint: Path, gif: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    flags = ("--model", checkpoint, "--input", broken, gif, tmp_path / "missing.mp4", "--max_new_tokens", 3, "--json")
    assert describe_main(*flags) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["input"] for line in out.splitlines()] == [str(gif)]
    assert "broken.mp4" in err
    assert "missing.mp4" in err
    assert "2 of the inputs could not be described" in err


def one_pixel(directory: Path) -> Path:
    Image.new("RGB", (1, 1)).save(directory / "dot.png")
    return directory / "dot.png"


def long_strip(directory: Path) -> Path:
    Image.new("RGB", (28 * 201, 28)).save(directory / "strip.png")
    return directory / "strip.png"


def empty_file(directory: Path) -> Path:
    (directory / "empty.mp4").touch()
    return directory / "empty.mp4"


def text_file(directory: Path) -> Path:
    (directory / "notes.txt").write_text("hello")
    return directory / "notes.txt"


def empty_directory(directory: Path) -> Path:
    (directory / "nothing").mkdir()
    return directory / "nothing"


def truncated_video(directory: Path) -> Path:
    whole = EMBEDDED_CLIP.read_bytes()
    (directory / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return directory / "cut.mp4"


BAD = [one_pixel, long_strip, empty_file, text_file, empty_directory, truncated_video]


@pytest.mark.parametrize("make", BAD)
def test_bad_input_is_named(checkpoint: Path, tmp_path: Path, make, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path)
    assert describe_main("--model", checkpoint, "--input", path, "--max_new_tokens", 3) == 1
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(path) in errors[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--n_frames", 300), "n_frames 300 is above max_n_frames 256"),
        (("--top_p", 0), "top_p is 0.0; it must be above 0"),
        (("--max_new_tokens", 0), "max_new_tokens is 0"),
        (("--prompt", "word " * 20_000), "max_seq_len"),
    ],
)
def test_unfit_options_are_named(
    checkpoint: Path, gif: Path, flags: tuple, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe_main("--model", checkpoint, "--input", gif, *flags) == 1
    assert message in capsys.readouterr().err


def test_bad_checkpoints_are_named(checkpoint: Path, gif: Path, tmp_path: Path, capsys) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, content, message in (
        ("nothing", None, "config.json does not exist"),
        ("config.json", b'{"model_type": "gpt2"}', "model_type is 'gpt2', which is not supported"),
        ("config.json", (checkpoint / "config.json").read_bytes(), "tokenizer"),
        ("tokenizer.json", (checkpoint / "tokenizer.json").read_bytes(), "contains no *.safetensors"),
        ("model.safetensors", b"\0" * 30, "is not a valid safetensors file"),
    ):
        if content is not None:
            (model / name).write_bytes(content)
        assert describe_main("--model", model, "--input", gif) == 1
        assert message in capsys.readouterr().err


def test_a_template_without_placeholders(checkpoint: Path, gif: Path, tmp_path: Path, capsys) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    assert describe_main("--model", model, "--input", gif) == 1
    assert "template" in capsys.readouterr().err


def test_a_traceback_when_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(tarsier_jax.InputError):
        describe_main("--model", checkpoint, "--input", tmp_path / "missing.mp4", "--traceback")


@pytest.mark.slow
def test_as_a_process(checkpoint: Path, tmp_path: Path) -> None:
    """Exit statuses, and no traceback, from outside; the compilation cache lands in the home directory."""
    command = [sys.executable, "-m", "infer.describe"]
    environment = {**os.environ, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}

    def call(*flags: object) -> subprocess.CompletedProcess[str]:
        words = [*command, *map(str, flags)]
        return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)

    wrong = call("--model", checkpoint, "--frames", 3)
    assert wrong.returncode == 2
    missing = call("--model", checkpoint, "--input", tmp_path / "missing.mp4")
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr
    good = call("--model", checkpoint, "--input", write_gif(tmp_path / "clip.gif"), "--max_new_tokens", 4)
    assert good.returncode == 0
    assert good.stdout.startswith(str(tmp_path / "clip.gif"))
    assert (tmp_path / ".cache" / "tarsier_jax" / "xla").is_dir()


def test_several_samples_of_unlike_kinds_at_once(checkpoint: Path, gif: Path) -> None:
    model, processor = tarsier_jax.load(checkpoint)
    samples = [
        media_sample(gif, "Describe."),
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello there"}]}]},
        {"messages": [*media_sample(gif, "Which?")["messages"][:1], prefilled(" Answer: (")]},
    ]
    together = tarsier_jax.generate(model, processor, samples, max_new_tokens=6)
    assert together == [tarsier_jax.generate(model, processor, [s], max_new_tokens=6)[0] for s in samples]


def prefilled(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
