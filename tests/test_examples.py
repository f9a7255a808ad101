"""The examples run as they are, and the notebook's stored outputs are those of its cells."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from examples import finetune_embedded

pytestmark = pytest.mark.slow


def stored_text(cell: dict[str, Any]) -> str:
    return "".join(line for output in cell["outputs"] if output["output_type"] == "stream" for line in output["text"])


def test_notebook() -> None:
    cells = json.loads(Path("examples/describe.ipynb").read_text())["cells"]
    namespace: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec("".join(cell["source"]), namespace)
            assert printed.getvalue() == stored_text(cell)
    pictures = [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert len(pictures) == 1 and "image/png" in pictures[0]
    assert namespace["caption"].startswith("The blue cross and the orange triangle collide.")


def test_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps of a few clips run from the clips to answers before and after."""
    arguments = ["--workdir", str(tmp_path), "--clips", "24", "--steps", "3"]
    finetune_embedded.main(finetune_embedded.parse(arguments))
    printed = capsys.readouterr().out
    assert printed.count("before: ") == printed.count("after: ") == 4
    annotations = [json.loads(line) for line in (tmp_path / "train" / "lists.jsonl").read_text().splitlines()]
    assert len(annotations) == 24
    assert all(a["messages"][1]["content"][0]["text"].startswith("- ") for a in annotations)
    assert (tmp_path / "run" / "model" / "config.json").exists()
