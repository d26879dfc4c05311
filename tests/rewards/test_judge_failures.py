# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from trl_cuma.rewards import JudgeError

from .conftest import KEY, Response, prefer_by_profile, section

SECRETS = ("Atlantis", "what is the secret", "my own answer", "the other answer", KEY)
ROW = {
    "prompts": ["what is the secret"],
    "completions": ["my own answer"],
    "demographic": [{"country": "Atlantis"}],
    "reference": ["the other answer"],
}


def rows(count: int) -> dict[str, list]:
    """`count` rows with different completions: two requests each."""
    return {
        "prompts": ["what is the secret"] * count,
        "completions": [f"my own answer {row}" for row in range(count)],
        "demographic": [{"country": "Atlantis"}] * count,
        "reference": ["the other answer"] * count,
    }


def echo(question: str) -> str:
    """An error body that repeats everything it got, as some servers do."""
    return json.dumps({"error": {"message": f"cannot read {question} with the key {KEY}"}})


FAILURES = {
    "http_500": lambda question: Response(status=500, body=echo(question)),
    "http_429": lambda question: Response(status=429, body=echo(question)),
    "http_401": lambda question: Response(status=401, body=echo(question)),
    "http_400": lambda question: Response(status=400, body=echo(question)),
    "malformed": lambda question: Response(body='{"choices": [{"message": ' + question),
    "truncated": lambda question: Response("[[A]] " + question, finish_reason="length"),
    "unparsable": lambda question: "I refuse to judge " + question,
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_counted_and_logged_but_no_score(server, make_judge, caplog, kind):
    server.respond = FAILURES[kind]
    judge = make_judge()
    with caplog.at_level(logging.DEBUG):
        assert judge(**ROW) == [None]
    stats = judge.stats
    assert stats.failures == {kind: 2}
    assert (stats.wins, stats.losses, stats.ties, stats.dropped) == (0, 0, 0, 1)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warnings] == [
        f"The judge left 1 of 1 rows unscored; requests that failed: {kind} 2."
    ]
    assert len(caplog.records) > 1  # the client logs too
    assert not [secret for secret in SECRETS if secret in caplog.text]


@pytest.mark.parametrize("kind", FAILURES)
def test_where_failures_stop_the_error_tells_the_kind_and_no_text(server, make_judge, kind):
    server.respond = FAILURES[kind]
    judge = make_judge(on_failure="stop")
    with pytest.raises(JudgeError, match=rf"\({kind}\), and `on_failure` is 'stop'") as error:
        judge(**ROW)
    shown = [str(error.value), repr(error.value), repr(error.value.__cause__), repr(error.value.__context__)]
    assert not [secret for secret in SECRETS if secret in "".join(shown)]
    assert (judge.stats.wins, judge.stats.losses, judge.stats.ties) == (0, 0, 0)


@pytest.mark.parametrize(
    "response",
    [
        Response(body=""),
        Response(body="[[A]]"),
        Response(body="[]"),
        Response(body="null"),
        Response(body='"[[A]]"'),
        Response(body="{}"),
        Response(body='{"choices": []}'),
        Response(body='{"choices": "[[A]]"}'),
        Response(body='{"choices": [{"message": null}]}'),
        Response(body='{"choices": [{"message": {"content": {"text": "[[A]]"}}, "finish_reason": "stop"}]}'),
        Response(content=None),
        Response(content="[[A]]", headers={"Content-Encoding": "gzip"}),
    ],
)
def test_a_body_that_is_no_chat_completion_is_malformed(server, make_judge, response):
    server.respond = lambda question: response
    judge = make_judge()
    assert judge(**ROW) == [None]
    assert sum(judge.stats.failures.values()) == 2
    assert set(judge.stats.failures) <= {"malformed", "connection"}


def test_a_row_with_one_failed_order_has_no_score(server, make_judge):
    server.respond = lambda question: (
        Response(status=500) if section(question, "answer_a") == "my own answer 1" else "[[A]]"
    )
    judge = make_judge()
    assert judge(**rows(3)) == [0.5, None, 0.5]
    assert (judge.stats.dropped, judge.stats.failures) == (1, {"http_500": 1})


def test_a_server_that_does_not_answer_in_time_is_a_timeout(server, make_judge):
    server.respond = lambda question: Response(hang=True)
    judge = make_judge(timeout=0.2)
    assert judge(**ROW) == [None]
    assert judge.stats.failures == {"timeout": 2}


def test_a_server_that_is_not_there_is_a_lost_connection(server, make_judge):
    url = server.url
    server.shutdown()
    server.server_close()
    judge = make_judge(base_url=url)
    assert judge(**ROW) == [None]
    assert judge.stats.failures == {"connection": 2}


# ---------------------------------------------------------------------- retries
@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's pauses between tries, recorded instead of waited."""
    recorded: list[float] = []
    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(**{**vars(time), "sleep": recorded.append}))
    return recorded


def failing(times: int, **response: Any) -> Callable[[str], Response | str]:
    seen: dict[str, int] = {}

    def respond(question: str) -> Response | str:
        seen[question] = seen.get(question, 0) + 1
        return Response(**response) if seen[question] <= times else prefer_by_profile(question)

    return respond


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_failure_is_tried_again_with_growing_pauses(server, make_judge, waits, status):
    server.respond = failing(3, status=status, body="{}")
    judge = make_judge(max_retries=3, concurrency=1)
    assert judge(**ROW) == [0.5]
    assert not judge.stats.failures
    assert judge.stats.requests == 2
    assert len(server.bodies) == 8  # each of two requests in four tries
    # 0.5 · 2^n seconds, less up to a quarter
    assert [0.75 <= wait / expected <= 1 for wait, expected in zip(waits, [0.5, 1, 2] * 2, strict=True)] == [True] * 6


def test_retry_after_is_heeded(server, make_judge, waits):
    server.respond = failing(1, status=429, headers={"Retry-After": "7"}, body="{}")
    assert make_judge(max_retries=1)(**ROW) == [0.5]
    assert waits == [7.0, 7.0]


def test_retries_end(server, make_judge, waits):
    server.respond = failing(10, status=500, body="{}")
    judge = make_judge(max_retries=2)
    assert judge(**ROW) == [None]
    assert judge.stats.failures == {"http_500": 2}
    assert len(server.bodies) == 6


def test_a_timeout_is_tried_again(server, make_judge, waits):
    server.respond = failing(1, hang=True)
    judge = make_judge(max_retries=1, timeout=0.3)
    assert judge(**ROW) == [0.5]
    assert len(server.bodies) == 4


# ---------------------------------------------------------------------- too many failures
def test_above_the_failure_rate_it_stops_whatever_the_setting(server, make_judge):
    server.respond = FAILURES["http_500"]
    judge = make_judge(concurrency=1, max_failure_rate=0.5)
    with pytest.raises(
        JudgeError, match=r"100% of the judge's last 20 requests failed, .*20 requests so far"
    ) as error:
        judge(**rows(30))
    assert not [secret for secret in SECRETS if secret in str(error.value)]
    server.respond = prefer_by_profile
    assert judge(**ROW) == [0.5]  # asked after whatever was still waiting
    assert 22 <= len(server.bodies) < 40  # of 60: the rest was given up


def test_a_few_failures_are_too_few_to_tell_a_rate(server, make_judge):
    server.respond = FAILURES["http_500"]
    assert make_judge(max_failure_rate=0.0)(**rows(9)) == [None] * 9  # 18 requests


def test_at_the_failure_rate_it_goes_on(server, make_judge):
    def respond(question: str) -> Response | str:
        return Response(status=500) if section(question, "answer_a") != "the other answer" else "[[A]]"

    server.respond = respond  # one of each row's two requests fails: never more than 50 % of an even number
    judge = make_judge(concurrency=1, max_failure_rate=0.6)
    assert judge(**rows(30)) == [None] * 30
    assert judge.stats.failures == {"http_500": 30}


def test_the_rate_is_that_of_the_latest_requests(server, make_judge):
    judge = make_judge(concurrency=1, max_failure_rate=0.5)
    judge(**rows(200))  # 400 good ones
    server.respond = FAILURES["http_500"]
    with pytest.raises(JudgeError, match=r"50% of the judge's last 200 requests failed|51%"):
        judge(**{**rows(200), "reference": ["yet another"] * 200})
    assert judge.stats.failures == {"http_500": 101}  # the first above half of 200


def test_cached_verdicts_do_not_dilute_the_rate(server, make_judge, tmp_path):
    make_judge(cache_path=tmp_path / "verdicts.sqlite")(**rows(50))
    judge = make_judge(cache_path=tmp_path / "verdicts.sqlite", concurrency=1)
    judge(**rows(50))
    server.respond = FAILURES["http_500"]
    with pytest.raises(JudgeError, match="last 20 requests"):
        judge(**{**rows(30), "reference": ["yet another"] * 30})


# ---------------------------------------------------------------------- the budget
def test_the_budget_in_requests_is_kept_and_what_is_over_it_has_no_score(server, make_judge, caplog):
    judge = make_judge(concurrency=4, max_requests=6, max_failure_rate=0.0, on_budget="drop", on_failure="stop")
    rewards = judge(**rows(20))
    assert rewards == [0.5] * 3 + [None] * 17
    assert judge.stats.requests == len(server.bodies) == 6
    assert judge.stats.failures == {"budget": 34}
    assert "The judge left 17 of 20 rows unscored; requests that failed: budget 34." in caplog.text
    assert judge(**ROW) == [None]
    assert len(server.bodies) == 6


def test_a_spent_budget_stops_by_default_even_where_failures_are_dropped(server, make_judge, tmp_path):
    judge = make_judge(concurrency=1, max_requests=4, on_failure="drop", cache_path=tmp_path / "verdicts.sqlite")
    assert judge(**rows(2)) == [0.5, 0.5]
    assert judge(**rows(2)) == [0.5, 0.5]  # known: costs nothing
    with pytest.raises(JudgeError, match=r"budget is spent: 4 requests of `max_requests=4`.*`on_budget='drop'`"):
        judge(**rows(3))
    assert len(server.bodies) == 4


def test_the_budget_in_tokens_is_kept(server, make_judge):
    server.respond = lambda question: Response("[[C]]", tokens=30)
    judge = make_judge(concurrency=1, max_tokens=100, on_budget="drop")
    assert judge(**rows(4)) == [0.5, 0.5, None, None]  # spent by the fourth request: 120
    assert (judge.stats.requests, judge.stats.tokens, judge.stats.failures) == (4, 120, {"budget": 4})
    with pytest.raises(JudgeError, match=r"120 tokens of `max_tokens=100`"):
        make_judge(concurrency=1, max_tokens=100)(**rows(4))


def test_a_budget_in_tokens_needs_a_server_that_counts_them(server, make_judge):
    server.respond = lambda question: Response("[[C]]", tokens=None)
    judge = make_judge(max_tokens=100)
    assert judge(**ROW) == [None]
    assert judge.stats.failures == {"no_usage": 2}
    assert make_judge()(**ROW) == [0.5]
