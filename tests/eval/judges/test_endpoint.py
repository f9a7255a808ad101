"""A judge behind an endpoint: retries, errors, stored replies, settings, and counts."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from eval.judges.endpoint import DEFAULT_MODEL, EndpointJudge, EndpointOptions
from eval.judges.judge import JudgeError
from eval.judges.prompts import DEFAULT_PROMPTS
from eval.judges.tasks import AnswerComparison, AnswerVerdict, EventEntailment, EventExtraction
from eval.judges.usage import Prices, Usage, estimate_usage
from tarsier_jax.errors import InputError
from tests.eval.judges.servers import ServerFactory, completion, fault, ok

TASK = EventExtraction("a man sits.")
COMPARISON = AnswerComparison("who?", "a man", "a boy")
JudgeFactory = Callable[..., EndpointJudge]


def test_a_request(start_server: ServerFactory, make_judge: JudgeFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = start_server(ok())
    assert make_judge(server.url).answer(TASK) == ["a man sits"]
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {"model": "m", "messages": DEFAULT_PROMPTS.messages(TASK)}
    assert make_judge(server.url, temperature=0.5).answer(TASK) == ["a man sits"]
    assert server.requests[-1][2]["temperature"] == 0.5


def test_azure(start_server: ServerFactory, make_judge: JudgeFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(ok())
    url = server.url.removesuffix("/v1")
    with pytest.raises(InputError, match="Set AZURE_OPENAI_API_KEY"):
        make_judge(url, api_version="2024-02-01", model="d")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "secret")
    judge = make_judge(url, api_version="2024-02-01", model="d")
    assert judge.answer(TASK) == ["a man sits"]
    ((path, headers, _),) = server.requests
    assert path == "/openai/deployments/d/chat/completions?api-version=2024-02-01"
    assert headers["api-key"] == "secret"
    assert judge.settings["api version"] == "2024-02-01"


def test_settings(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    server = start_server(ok())
    url = server.url.replace("http://", "http://me:secret@") + "/?key=secret"
    assert make_judge(url).settings == {
        "judge": server.url,
        "model": "m",
        "temperature": "default",
        "requests per task": {"extract_events": 10, "entailment": 10, "answer": 1},
        "prompts": DEFAULT_PROMPTS.hash,
        "openai": openai.__version__,
    }
    settings = make_judge(server.url, model="other", temperature=0.0, retries=2).settings
    assert settings["model"] == "other" and settings["temperature"] == 0.0
    assert set(settings["requests per task"].values()) == {3}


@pytest.mark.parametrize(("models", "model"), [((), DEFAULT_MODEL), (("a",), "a"), (("a", "b"), DEFAULT_MODEL)])
def test_the_default_model(
    start_server: ServerFactory, make_judge: JudgeFactory, models: tuple[str, ...], model: str
) -> None:
    assert make_judge(start_server(ok(), models=models).url).settings["model"] == model


@pytest.mark.parametrize(
    "first",
    [
        fault(429),
        fault(500),
        fault(503),
        fault(408),
        ok(delay=0.4),
        (200, "{broken", {}, 0.0),
        (200, "<html>", {"Content-Type": "text/html"}, 0.0),
        (200, {"error": {"message": "overloaded"}}, {}, 0.0),
        (200, {**completion(""), "choices": []}, {}, 0.0),
    ],
    ids=["429", "500", "503", "408", "hangs", "no JSON", "a page", "an error with status 200", "no choices"],
)
def test_faults_of_the_server_do_not_count_as_replies(
    start_server: ServerFactory, make_judge: JudgeFactory, first: Any
) -> None:
    server = start_server(*[first] * 2, ok(repr({"pred": "yes", "score": 5})))
    judge = make_judge(server.url, timeout=0.2)
    assert judge.answer(COMPARISON) == AnswerVerdict("yes", 5.0)
    assert len(server.requests) == 3
    usage = judge.pop_usage()
    assert (usage.replies, usage.failures) == (1, 2)


def test_a_server_that_stays_broken(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    server = start_server(*[fault(500)] * 10, ok())
    judge = make_judge(server.url)
    with pytest.raises(JudgeError, match="failed 10 times in a row"):
        judge.answer(TASK)
    assert len(server.requests) == 10
    assert judge.answer(TASK) == ["a man sits"]


def test_retry_after(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    server = start_server(fault(429, {"Retry-After": "0.4"}), fault(503, {"Retry-After": "soon"}), ok())
    start = time.monotonic()
    assert make_judge(server.url).answer(TASK) == ["a man sits"]
    assert 0.4 <= time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (fault(401), "Set OPENAI_API_KEY to a key"),
        (fault(403), "Set OPENAI_API_KEY to a key"),
        (fault(404), "lacks the model 'm', or chat completions .* The server lists: m"),
        (fault(405), "or chat completions"),
        (fault(429, code="insufficient_quota"), "lacks credit"),
    ],
)
def test_errors_that_end_the_run(
    start_server: ServerFactory, make_judge: JudgeFactory, reply: Any, message: str
) -> None:
    server = start_server(reply)
    judge = make_judge(server.url)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            judge.answer(TASK)
    assert len(server.requests) == 1  # the second call need not ask


def test_a_wrong_key_is_found_at_the_start(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    server = start_server(ok())
    server.list_status = 401
    with pytest.raises(InputError, match=r"refuses access.*OPENAI_API_KEY"):
        make_judge(server.url)
    server.list_status = 404  # the server does not list models
    assert make_judge(server.url).answer(TASK) == ["a man sits"]


def test_keys(start_server: ServerFactory, make_judge: JudgeFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(ok())
    monkeypatch.setenv("OPENAI_API_KEY", " secret\n")
    make_judge(server.url).answer(TASK)
    assert server.requests[0][1]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sécret")
    with pytest.raises(InputError, match="OPENAI_API_KEY has characters"):
        make_judge(server.url)


def test_an_unreachable_server(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/v1 cannot be reached .*Start the server"):
        make_judge("http://127.0.0.1:9/v1")
    server = start_server(ok())
    judge = make_judge(server.url)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="cannot be reached"):
        judge.answer(TASK)


@pytest.mark.parametrize("bad", [ok("no"), fault(400), fault(422)], ids=["malformed", "400", "422"])
def test_unusable_replies_are_requested_again(start_server: ServerFactory, make_judge: JudgeFactory, bad: Any) -> None:
    server = start_server(*[bad] * 9, ok())
    assert make_judge(server.url).answer(TASK) == ["a man sits"]
    assert len(server.requests) == 10
    server = start_server(*[bad] * 10, ok())
    with pytest.raises(JudgeError, match="no usable reply to 10 requests"):
        make_judge(server.url).answer(TASK)
    assert len(server.requests) == 10


def test_the_number_of_requests(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    server = start_server(ok("no"), ok(repr({"pred": "yes", "score": 5})))
    with pytest.raises(JudgeError, match=r"no usable reply to 1 requests.*'no'"):
        make_judge(server.url).answer(COMPARISON)
    # The first reply is stored; the second request is new.
    assert make_judge(server.url, retries=1).answer(COMPARISON) == AnswerVerdict("yes", 5.0)
    assert len(server.requests) == 2
    with pytest.raises(JudgeError):
        make_judge(server.url, retries=0).answer(COMPARISON)
    assert len(server.requests) == 2


def test_stored_replies(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    server = start_server(ok("no"), ok())
    for _ in range(2):
        assert make_judge(server.url).answer(TASK) == ["a man sits"]
        assert len(server.requests) == 2
    make_judge(server.url, model="other").answer(TASK)
    make_judge(server.url, temperature=0.0).answer(TASK)
    make_judge(server.url).answer(EventExtraction("A man sits."))
    assert len(server.requests) == 5


def test_identical_requests_in_flight_are_sent_once(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    server = start_server(ok(delay=0.2))
    judge = make_judge(server.url)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(judge.answer, [TASK] * 32)) == [["a man sits"]] * 32
    assert len(server.requests) == 1
    usage = judge.pop_usage()
    assert (usage.replies, usage.cached) == (1, 31)


def test_as_many_requests_as_permitted_are_in_flight(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    server = start_server(ok(delay=0.5))
    judge = make_judge(server.url)
    with ThreadPoolExecutor(judge.concurrency) as pool:
        list(pool.map(judge.answer, [EventExtraction(str(i)) for i in range(128)]))
    assert server.most_in_flight == judge.options.concurrency == 64


def test_usage(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    server = start_server(
        ok(usage={"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}), ok("no"), ok()
    )
    judge = make_judge(server.url, prices=Prices(1.0, 2.0))
    judge.answer(TASK)
    judge.answer(TASK)
    usage = judge.pop_usage()
    assert usage == Usage(1, 100, 10, cached=1, cached_prompt_tokens=100, cached_completion_tokens=10)
    assert usage.cost(Prices(1.0, 2.0)) == pytest.approx(120e-6)
    assert usage.record(Prices(1.0, 2.0))["cost"] == 0.00012
    assert "cost" not in usage.record(None)
    assert usage.summary(None) == "1 replies (100 + 10 tokens), 1 cached replies"
    assert judge.pop_usage() == Usage()
    judge.answer(EventExtraction("b"))  # the server does not count
    usage = judge.pop_usage()
    assert (usage.replies, usage.uncounted) == (2, 2) and usage.prompt_tokens > 100


def test_the_estimate_needs_no_request_and_leaves_out_stored_replies(
    start_server: ServerFactory, make_judge: JudgeFactory
) -> None:
    server = start_server(ok("no"), ok())
    judge = make_judge(server.url)
    judge.answer(TASK)
    judge.pop_usage()

    def score(judge: Any) -> None:
        assert judge.answer(TASK) == ["a man sits"]
        assert judge.answer(EventExtraction("One. Two!")) == ["One", " Two"]
        assert len(judge.answer(EventEntailment("a description", ("a", "b")))) == 2
        assert len(judge.answer(EventEntailment("a description", (), "a caption"))) == 1
        assert judge.answer(COMPARISON) == AnswerVerdict("no", 0.0)

    usage = estimate_usage(score, judge)
    assert (usage.replies, usage.cached, usage.failures) == (4, 0, 0)
    characters = len(DEFAULT_PROMPTS.messages(COMPARISON)[0]["content"])
    assert characters / 4 < usage.prompt_tokens < 4 * 500
    assert judge.pop_usage() == Usage()
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "must be a URL"),
        ({"url": "rules"}, "must be a URL"),
        ({"temperature": -1.0}, "--judge_temperature"),
        ({"temperature": float("nan")}, "--judge_temperature"),
        ({"retries": -1}, "--judge_retries"),
        ({"concurrency": 0}, "--judge_concurrency"),
        ({"timeout": 0.0}, "--judge_timeout"),
        ({"prices": Prices(-1.0, 1.0)}, "--judge_prices"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EndpointOptions(**{"url": "http://localhost/v1", **options})


def test_an_error_reaches_every_thread(start_server: ServerFactory, make_judge: JudgeFactory) -> None:
    judge = make_judge(start_server(fault(401)).url)
    start = threading.Barrier(8, timeout=10)

    def answer(i: int) -> str:
        start.wait()
        with pytest.raises(InputError) as error:
            judge.answer(EventExtraction(str(i % 2)))
        return str(error.value)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(answer, range(8)))) == 1
