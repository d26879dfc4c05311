# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a client may not do, what it is told then, and that the server answers the next one."""

import http.client
import json
import logging
import random
import socket
import threading
import time

import pytest

KENYA = {"country": "Kenya", "age": "18"}
JSON = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        (
            {"metadata": {"planet": "Zanzibar"}},
            400,
            "metadata",
            "has no field that the adapter knows. It knows",
        ),
        (
            {"metadata": KENYA | {"planet": "Zanzibar"}},
            400,
            "metadata",
            "field planet, which the adapter doesn't",
        ),
        ({"metadata": None}, 400, "metadata", "is missing or says nothing, and the adapter needs one. It knows the"),
        ({"metadata": {}}, 400, "metadata", "is missing or says nothing"),
        ({"metadata": {"country": 3}}, 400, "metadata", "`metadata.country`: Input should be a valid string"),
        ({"metadata": {"country": "Zanzibar" * 99}}, 400, "metadata", "at most 512 characters"),
        ({"metadata": {str(i): "Zanzibar" for i in range(17)}}, 400, "metadata", "at most 16 items"),
        ({"metadata": "Zanzibar"}, 400, "metadata", "`metadata`: Input should be a valid dictionary"),
        ({"metadata": {" country": "Zanzibar", "country": "Zanzibar"}}, 400, "metadata", "the field 'country' twice"),
        ({"model": "other"}, 404, "model", "the one that is served is 'cuma'"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": None}, 400, "messages", "Field required"),
        ({"messages": "Zanzibar"}, 400, "messages", "should be a valid list"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages", "Input should be 'system', 'developer'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "`messages.0`: "),
        ({"messages": [{"role": "user", "content": "a", "tool": 1}]}, 400, "messages", "is not supported"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, 400, "max_tokens", "valid integer"),
        ({"max_tokens": 200}, 400, "max_tokens", "and 200 are asked for; both together may be 200"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 400, None, "are one thing: give one of them"),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, 400, None, "both together may be 200. Shorten the"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, 400, "temperature", "valid number"),
        ({"top_p": 0.5}, 400, None, "`top_p` needs a `temperature` above 0"),
        ({"n": 5}, 400, "n", "at most 4 answers"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4 items"),
        ({"stop": ""}, 400, "stop", "at least 1 character"),
        ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"stream": "yes"}, 400, "stream", "valid boolean"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "`tools` is not supported. Leave it out."),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "is not supported"),
        ({"tempreature": 1}, 400, "tempreature", "`tempreature` is not supported"),
    ],
)
def test_what_is_wrong_is_said_without_the_profile(server, fields, status, param, message):
    got, body = server.chat(**fields)
    error = body["error"]
    assert (got, error["param"]) == (status, param), body
    assert message in error["message"] and "Zanzibar" not in json.dumps(body)
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize("prompt", [[], [1, 2], [[1]], None, "", 5], ids=str)
def test_prompts_that_are_no_text(server, prompt):
    status, body = server.post("/v1/completions", prompt=prompt, metadata=KENYA)
    assert status == 400 and body["error"]["param"] == "prompt"


def test_paths_and_methods(server):
    for method, path, expected in (("GET", "/v1/embeddings", 404), ("GET", CHAT, 405), ("POST", "/health", 405)):
        status, _, body = server.request(method, path)
        assert status == expected and json.loads(body)["error"]["message"]


# ---------------------------------------------------------------------- bodies
def malformed():
    """Bodies that are broken in every way that comes to mind, and at random."""
    good = json.dumps({"messages": [{"role": "user", "content": "Tea or coffee ?"}], "metadata": KENYA}).encode()
    draw = random.Random(0)
    bodies = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"3",
        b"{}",
        b"\xff\xfe\x00",
        b'{"messages": NaN}',
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b'{"n": ' + b"9" * 5_000 + b"}",
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "metadata": {"country": "Kenya"}}',
        b'{"messages": [{"role": "user", "content": "a"}], "metadata": {"country": "\\udc00"}}',
        b'{"messages": [{"role": "user", "content": "a"}], "metadata": {"\\ud800": "Kenya"}}',
        b'{"messages": [{"role": "user", "content": "a"}], "metadata": {"country": "\\u0000"}}',
        good + good,
        good.decode().encode("utf-16"),
    ]
    for _ in range(25):
        cut = bytearray(good)
        for _ in range(draw.randrange(1, 4)):
            cut[draw.randrange(len(cut))] = draw.randrange(256)
        bodies.append(bytes(cut[: draw.randrange(1, len(cut) + 1)]))
    return bodies


def test_no_malformed_body_stops_the_server(server):
    statuses = []
    for body in malformed():
        for path in (CHAT, "/v1/completions"):
            status, headers, answer = server.request("POST", path, body, JSON)
            statuses.append(status)
            assert status in (200, 400), (body[:100], answer)  # a changed letter of the prompt is another prompt
            assert "error" in json.loads(answer) or status == 200
    assert statuses.count(400) > 70
    assert server.request("POST", CHAT, b"{}", {"Content-Type": "text/plain"})[0] == 400
    assert server.chat()[0] == 200


def test_bytes_that_are_no_http(server):
    for data in (
        b"\x00\x01\x02\r\n\r\n",
        b"POST /v1/chat/completions HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"\r\n" * 100,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(data)
    assert server.chat()[0] == 200


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_that_is_too_long_is_not_read(run_server, answerer, declared):
    with run_server(answerer, max_body=1000, default_max_tokens=2) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Type", "application/json")
        if declared:
            connection.putheader("Content-Length", str(10**9))  # of which nothing is ever sent
            connection.endheaders()
        else:
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            for _ in range(3):
                connection.send(b"200\r\n" + b"a" * 512 + b"\r\n")
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        assert response.status == 413 and "longer than 1000 bytes" in error["message"]
        connection.close()
        assert running.chat()[0] == 200


# ---------------------------------------------------------------------- keys
def test_a_key_is_asked_for(run_server, answerer):
    with run_server(answerer, api_key="geheim", default_max_tokens=2) as running:
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], "metadata": KENYA})
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "geheim"},
            {"Authorization": "Bearer "},
        ):
            status, headers, answer = running.request("POST", CHAT, body, JSON | header)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert json.loads(answer)["error"]["code"] == "invalid_api_key"
        assert running.request("GET", "/metrics")[0] == running.request("GET", "/v1/models")[0] == 401
        assert running.request("GET", "/health")[0] == 200
        assert running.request("POST", CHAT, body, JSON | {"Authorization": "Bearer geheim"})[0] == 200


# ---------------------------------------------------------------------- load
def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_queue_asks_to_come_back(run_server, slow_answerer):
    with run_server(slow_answerer.answerer, max_queue=2, wait_ms=0, default_max_tokens=2) as running:
        answers = []
        asking = [threading.Thread(target=lambda: answers.append(running.chat())) for _ in range(3)]
        asking[0].start()
        assert slow_answerer.began.wait(60)
        for thread in asking[1:]:
            thread.start()
        wait_until(lambda: len(running.engine._waiting) == 2)
        assert running.metric("cuma_queue_length") == 2
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], "metadata": KENYA})
        status, headers, answer = running.request("POST", CHAT, body, JSON)
        assert status == 503 and headers["retry-after"] == "1"
        assert "Too many answers wait" in json.loads(answer)["error"]["message"]
        slow_answerer.gate.set()
        for thread in asking:
            thread.join(60)
        assert [status for status, _ in answers] == [200, 200, 200]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_hangs_up_leaves_the_queue(run_server, slow_answerer, stream):
    with run_server(slow_answerer.answerer, wait_ms=0, default_max_tokens=2) as running:
        first = threading.Thread(target=running.chat)
        first.start()
        assert slow_answerer.began.wait(60)
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        fields = {"messages": [{"role": "user", "content": "a"}], "metadata": KENYA, "stream": stream}
        connection.request("POST", CHAT, json.dumps(fields), JSON)
        wait_until(lambda: len(running.engine._waiting) == 1)
        job = running.engine._waiting[0]
        connection.sock.close() if connection.sock else connection.close()
        connection.close()
        wait_until(lambda: job.is_cancelled)
        slow_answerer.gate.set()
        first.join(60)
        assert running.chat()[0] == 200
        assert slow_answerer.sizes == [1, 1]  # it was never decoded


def test_a_client_that_hangs_up_in_the_middle_ends_its_answer(run_server, answerer):
    with run_server(answerer, wait_ms=0, max_total_tokens=8000) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        fields = {
            "messages": [{"role": "user", "content": "a"}],
            "metadata": KENYA,
            "stream": True,
            "max_tokens": 7000,
        }
        connection.request("POST", CHAT, json.dumps(fields), JSON)
        response = connection.getresponse()
        response.read(2000)
        response.close()
        connection.close()
        wait_until(lambda: running.metric('cuma_answers_total{ending="cancelled"}') == 1)
        assert running.metric("cuma_generated_tokens_total") < 7000


# ---------------------------------------------------------------------- failures
def test_a_batch_that_fails_is_a_500_and_the_next_is_answered(run_server, answerer, monkeypatch, caplog):
    with run_server(answerer, wait_ms=0, default_max_tokens=2) as running:
        generate = answerer.model.generate

        def broken(**kwargs):
            raise RuntimeError("secret prompt of Zanzibar")

        monkeypatch.setattr(answerer.model, "generate", broken)
        with caplog.at_level(logging.DEBUG):
            status, body = running.chat()
            assert status == 500 and body["error"]["type"] == "server_error"
            raw = running.request(
                "POST",
                CHAT,
                json.dumps({"messages": [{"role": "user", "content": "a"}], "metadata": KENYA, "stream": True}),
                JSON,
            )[2].decode()
            assert '"server_error"' in raw and "[DONE]" not in raw
            monkeypatch.setattr(answerer.model, "generate", generate)
            assert running.chat()[0] == 200
        assert running.metric("cuma_batch_failures_total") == 2
        assert "A batch of 1 failed: RuntimeError at" in caplog.text
        for text in ("Zanzibar", "Kenya", "coffee", "secret"):
            assert text not in caplog.text + raw + json.dumps(body)


def test_metrics_count_and_name_nobody(run_server, answerer):
    with run_server(answerer, default_max_tokens=3) as running:
        assert running.chat()[0] == running.chat(n=2)[0] == 200
        assert running.chat(metadata=None)[0] == 400
        running.request("GET", "/wp-admin/zanzibar")
        tokens = len(answerer.encode([{"role": "user", "content": "Tea or coffee ?"}]))
        expected = {
            'cuma_requests_total{endpoint="/v1/chat/completions",status="200"}': 2,
            'cuma_requests_total{endpoint="/v1/chat/completions",status="400"}': 1,
            'cuma_requests_total{endpoint="other",status="404"}': 1,
            'cuma_request_seconds_count{endpoint="/v1/chat/completions"}': 3,
            "cuma_generated_tokens_total": 9,
            "cuma_prompt_tokens_total": 3 * tokens,
            'cuma_answers_total{ending="length"}': 3,
            "cuma_batch_size_sum": 3,
            "cuma_queue_length": 0,
        }
        assert {name: running.metric(name) for name in expected} == expected
        text = running.request("GET", "/metrics")[2].decode()
        assert not any(word in text for word in ("Kenya", "country", "zanzibar", "coffee"))


def test_what_waits_when_the_server_ends_is_told_so(run_server, slow_answerer):
    answers = []
    with run_server(slow_answerer.answerer, wait_ms=0) as running:
        asking = [threading.Thread(target=lambda: answers.append(running.chat(max_tokens=50)[0])) for _ in range(2)]
        asking[0].start()
        assert slow_answerer.began.wait(60)
        asking[1].start()
        wait_until(lambda: len(running.engine._waiting) == 1)
        threading.Timer(0.2, slow_answerer.gate.set).start()
        closing = threading.Thread(target=running.engine.close)
        closing.start()
        for thread in asking:
            thread.join(60)
        closing.join(60)
        assert answers == [503, 503]
        assert running.request("GET", "/health")[0] == 503
        assert running.chat()[0] == 503
