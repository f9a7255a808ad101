"""The files of scores: figures and samples as JSON, the original's record files, plots, and the score sheet.

OUT/eval_records/NAME.json           figures, counts, tables and settings of the benchmark NAME
OUT/eval_records/NAME_samples.jsonl  one record per sample
OUT/eval_records/NAME.png            plot of the figures per subset
OUT/eval_records/                    the original's record files
OUT/report.html                      the score sheet
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prettytable import PrettyTable

from eval import bootstrap, sheet
from eval.metrics.scores import SampleScore, ScoreArrays, arrays_of
from eval.plots import plot_scores
from eval.scoring import BenchmarkScores
from eval.texts import digits_of, figure_text, flatten_settings
from tarsier_jax.errors import InputError
from tarsier_jax.files import atomic_write
from tarsier_jax.processing.jsonl import parse_json, to_json

RECORDS = "eval_records"
_SUFFIX = "_samples.jsonl"


@dataclasses.dataclass(frozen=True)
class StoredScores:
    """The scores of a benchmark, as read from the files of a run.

    Attributes:
        summary: Content of NAME.json.
        samples: Records of the samples.
    """

    summary: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]

    def arrays(self, strict: bool = False) -> ScoreArrays:
        """Returns the original's values of the samples, or the strict ones."""
        rows = [sample["strict" if strict else "values"] for sample in self.samples]
        names = dict.fromkeys(name for sample in self.samples for name in sample["strict"])  # which every sample has
        return ScoreArrays(
            keys=[sample["idx"] for sample in self.samples],
            subsets=[sample["dataset"] for sample in self.samples],
            videos=[sample["vid"] for sample in self.samples],
            row_format=self.summary["row_format"],
            values={name: np.array([row.get(name) for row in rows], dtype=float) for name in names},
        )


def write_report(output: Path, results: Sequence[BenchmarkScores]) -> None:
    """Writes the files of a run; a file that exists is replaced.

    Args:
        output: Directory of the run.
        results: The scores of each benchmark.
    """
    records = output / RECORDS
    records.mkdir(parents=True, exist_ok=True)
    pages = []
    for result in results:
        name = result.benchmark.name
        estimates = bootstrap.estimate(result.benchmark.metric, arrays_of(result.scores), _strict(result))
        page = sheet.Page(
            summary=json.loads(to_json(_summary(result, estimates))),
            samples=[to_json(_sample_record(score)) for score in result.scores],
            plot=plot_scores(_title(result), estimates),
        )
        (records / f"{name}.json").unlink(missing_ok=True)  # written last: it marks a complete set of files
        for file, content in result.records.items():
            _write_text(records / file, content)
        _write_text(records / f"{name}{_SUFFIX}", "".join(f"{line}\n" for line in page.samples))
        with atomic_write(records / f"{name}.png") as partial:
            partial.write_bytes(page.plot)
        _write_text(records / f"{name}.json", json.dumps(page.summary, indent=1) + "\n")
        pages.append(page)
    _write_text(output / "report.html", sheet.render(pages))


def read_scores(output: Path) -> dict[str, StoredScores]:
    """Returns the stored scores of a run by benchmark.

    Raises:
        InputError: `output` is not the directory of a run, or one of its files cannot be read.
    """
    directory = output / RECORDS
    files = sorted(directory.glob(f"*{_SUFFIX}")) if directory.is_dir() else []
    if not files:
        raise InputError(
            f"{output} contains no {RECORDS}/*{_SUFFIX}: it is not the output of a run. Pass a directory that "
            "eval.run or eval.score wrote as --output."
        )
    return {name: _read(directory, name) for name in (file.name.removesuffix(_SUFFIX) for file in files)}


def _read(directory: Path, name: str) -> StoredScores:
    path, samples = directory / f"{name}.json", directory / f"{name}{_SUFFIX}"
    try:
        summary = parse_json(path.read_text(encoding="utf-8"), str(path))
        lines = samples.read_bytes().decode("utf-8").split("\n")  # captions may contain U+2028
        records = [parse_json(line, f"{samples} line {i}") for i, line in enumerate(lines, 1) if line]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise InputError(
            f"The scores of {name} in {directory} are incomplete: {error}. Score the predictions again."
        ) from None
    if not {"row_format", "settings", "total"} <= summary.keys() or len(records) != summary["total"]:
        raise InputError(f"{path} and {samples.name} are not of one run. Score the predictions again.")
    return StoredScores(summary, records)


def screen_text(result: BenchmarkScores) -> str:
    """Returns the text for the screen: the original's tables, and everything that the figures depend on."""
    tables = "\n\n".join(f"====={table.title}=====\n{table}" for table in result.tables)
    return f"{tables}\n\n{_figure_table(result)}\n{_count_line(result)}\n{_facts(result)}\n"


def _figure_table(result: BenchmarkScores) -> PrettyTable:
    """Returns the comparable figures, the strict ones and those of baselines."""
    table = PrettyTable([result.benchmark.name, "Comparable", "Strict", *result.baselines])
    for name, strict in result.strict_figures.items():
        baselines = [figures.get(name, math.nan) for figures in result.baselines.values()]
        values = [result.figures.get(name, math.nan), strict, *baselines]
        table.add_row([name, *(figure_text(each, digits_of(name)) for each in values)])
    return table


def _count_line(result: BenchmarkScores) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in result.counts.items())
    return (
        f"{sum(result.counts.values())} samples: {counts}. The strict figures count all but the scored ones as wrong."
    )


def _facts(result: BenchmarkScores) -> str:
    audit = [f"Parser audit: {', '.join(f'{text}: {count}' for text, count in result.audit.items())}."]
    settings = ", ".join(f"{name}={value}" for name, value in flatten_settings(result.settings).items())
    return "\n".join([*result.notes, *(audit if result.audit else []), f"Settings: {settings}"])


def _title(result: BenchmarkScores) -> str:
    model = result.settings.get("model")
    return f"{result.benchmark.name}: {model}" if model else result.benchmark.name


def _strict(result: BenchmarkScores) -> ScoreArrays:
    return arrays_of(result.scores, strict=True)


def _summary(result: BenchmarkScores, estimates: Sequence[bootstrap.Estimate]) -> dict[str, Any]:
    return {
        "benchmark": result.benchmark.name,
        "dataset": result.benchmark.dataset,
        "row_format": arrays_of(result.scores).row_format,
        "figures": result.figures,
        "strict_figures": result.strict_figures,
        "counts": result.counts,
        "total": len(result.scores),
        "estimates": [dataclasses.asdict(each) for each in estimates],
        "tables": [dataclasses.asdict(table) for table in result.tables],
        "notes": result.notes,
        "baselines": result.baselines,
        "audit": result.audit,
        "settings": result.settings,
    }


def _sample_record(score: SampleScore) -> dict[str, Any]:
    prediction = score.prediction
    return {
        "idx": prediction.key,
        "dataset": prediction.dataset,
        "vid": prediction.vid,
        "status": score.status,
        "values": score.values,
        "strict": score.strict,
        "prompt": prediction.prompt,
        "prediction": prediction.text,
        "error": prediction.error,
        "references": prediction.references,
        "visuals": prediction.visuals,
        "details": score.details,
    }


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
