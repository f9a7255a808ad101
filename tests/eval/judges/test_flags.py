"""Flags of judges."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.judges.endpoint import EndpointJudge
from eval.judges.flags import add_judge_flags, judge_of, make_judge
from eval.judges.prompts import DEFAULT_PROMPTS
from eval.judges.tasks import EventExtraction
from eval.judges.usage import Prices
from eval.shapes.judge import RulesJudge
from tarsier_jax.errors import InputError
from tests.eval.judges.servers import ServerFactory, ok


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_judge_flags(parser)
    return parser.parse_args(flags)


def test_no_judge() -> None:
    assert judge_of(parse()) is None


def test_the_rules() -> None:
    assert isinstance(make_judge("rules", parse()), RulesJudge)


def test_the_flags_reach_the_judge(start_server: ServerFactory, tmp_path: Path) -> None:
    prompts: dict[str, Any] = {name: list(messages) for name, messages in DEFAULT_PROMPTS.templates.items()}
    prompts["extract_events"] = [{"role": "user", "content": "{caption}"}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    server, cache = start_server(ok()), tmp_path / "replies.sqlite"
    flags = f"--judge {server.url} --judge_model b --judge_temperature 0 --judge_retries 3 --judge_concurrency 7"
    flags += f" --judge_timeout 9 --judge_prices 0.5 1.5 --judge_prompts {tmp_path}/prompts.json --judge_cache {cache}"
    judge = judge_of(parse(*flags.split()))
    assert isinstance(judge, EndpointJudge)
    assert judge.answer(EventExtraction("a man")) == ["a man sits"]
    body = {"model": "b", "temperature": 0.0, "messages": [{"role": "user", "content": "a man"}]}
    assert server.requests[0][2] == body
    options = judge.options
    assert (options.retries, options.concurrency, options.timeout, options.prices) == (3, 7, 9.0, Prices(0.5, 1.5))
    assert cache.exists()


def test_the_model_in_a_url(start_server: ServerFactory) -> None:
    server = start_server(ok())
    judge = make_judge(f"{server.url}#org/name", parse("--judge_model", "b"))
    assert judge.settings["model"] == "org/name"
    assert judge.settings["judge"] == server.url


def test_the_default_cache(start_server: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = parse("--judge", start_server(ok()).url)
    assert judge_of(flags) is not None
    assert (tmp_path / "cache" / "tarsier_jax" / "judge" / "replies.sqlite").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="judge"), pytest.raises(InputError, match="Pass --judge_cache"):
        judge_of(flags)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "eval.judges.endpoint")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"needs the package openai: pip install -e '\.\[eval\]'"):
        make_judge("http://localhost:1/v1", parse())
