"""The score sheet: complete, closed in itself, and safe for texts of models."""

import html.parser
import json
import re
from pathlib import Path

from eval.report import write_report
from tests.eval.scores import benchmark_scores, random_scores, sample_score

HOSTILE = "</script><script>alert(1)</script><!-- \" ' & \u2028 \u202e <img src=x onerror=alert(1)>"


class _Sheet(html.parser.HTMLParser):
    """Reads a score sheet as a browser does.

    Attributes:
        tags: Names and attributes of the elements.
        scripts: Contents of the script elements.
        text: The text outside scripts.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        self.scripts += [""] if self._in_script else []

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data


def _sheet(directory: Path, *results: object) -> _Sheet:
    write_report(directory, results)  # pyright: ignore[reportArgumentType]
    return _Sheet((directory / "report.html").read_text())


def test_everything_is_in_the_sheet(tmp_path: Path) -> None:
    sheet = _sheet(tmp_path, benchmark_scores(random_scores(40, ["Quiz/A", "Quiz/B"])))
    for text in ("Quiz/A", "OVERALL", "constant answer (C)", "27.5", "readers disagree", "Two rows are repeated."):
        assert text in sheet.text
    for text in ("judge.temperature", "org/describer", "bfloat16", "Evaluation Summary", "judge failed"):
        assert text in sheet.text
    lines = (tmp_path / "eval_records" / "quiz_samples.jsonl").read_text().split("\n")
    assert json.loads(sheet.scripts[0]) == [json.loads(line) for line in lines if line]
    (image,) = [attrs for tag, attrs in sheet.tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,")


def test_the_sheet_needs_no_other_file(tmp_path: Path) -> None:
    sheet = _sheet(tmp_path, benchmark_scores(random_scores(4, ["Quiz/A"])))
    assert not any(tag in ("link", "iframe", "object") for tag, _ in sheet.tags)
    urls = [attrs[name] for _, attrs in sheet.tags for name in ("src", "href") if name in attrs]
    assert all(url.startswith(("data:", "#")) for url in urls)
    assert "http" not in re.sub(r"http-equiv", "", (tmp_path / "report.html").read_text())


def test_texts_of_models_stay_text(tmp_path: Path) -> None:
    events = [{"event": HOSTILE, "relationship": "neutral", "reason": HOSTILE}]
    fields = {"text": HOSTILE, "prompt": HOSTILE, "references": (HOSTILE,), "details": {"events_gt": events}}
    scores = [sample_score(1, 1.0, f"Quiz/{HOSTILE}", HOSTILE, **fields), sample_score(2, 0.0, "Quiz/B")]
    result = benchmark_scores(scores, notes=[HOSTILE], settings={"model": HOSTILE}, audit={HOSTILE: 1})
    sheet = _sheet(tmp_path, result)
    assert len(sheet.scripts) == 2 and len([tag for tag, _ in sheet.tags if tag == "img"]) == 1
    assert not any(name.startswith("on") for _, attrs in sheet.tags for name in attrs)
    sample = json.loads(sheet.scripts[0])[0]
    assert sample["prediction"] == HOSTILE and sample["details"]["events_gt"] == events
    assert "<" not in sheet.scripts[0] and "\u2028" not in sheet.scripts[0]
    assert sheet.text.count(HOSTILE) >= 3  # note, model and audit
    assert "innerHTML" not in sheet.scripts[1]


def test_several_benchmarks_and_no_score(tmp_path: Path) -> None:
    missing = benchmark_scores([sample_score(1, 0.0, status="missing", text=None)], baselines={}, audit={}, notes=[])
    sheet = _sheet(tmp_path, benchmark_scores(random_scores(4, ["Quiz/A"])), missing)
    assert len(sheet.scripts) == 3 and "nan" in sheet.text
    assert json.loads(sheet.scripts[1])[0]["prediction"] is None


def test_the_sheet_of_a_large_benchmark_is_small(tmp_path: Path) -> None:
    write_report(tmp_path, [benchmark_scores(random_scores(2500, ["Quiz/A", "Quiz/B"]))])
    assert (tmp_path / "report.html").stat().st_size < 2**20
