# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A server on loopback, in a thread of the tests' process, and clients for it."""

import contextlib
import http.client
import json
import threading
from types import SimpleNamespace

import pytest

from trl_cuma.generation.answering import Answerer
from trl_cuma.generation.loading import load_model

KENYA, JAPAN = {"country": "Kenya", "age": "18"}, {"country": "Japan", "age": "70"}


@pytest.fixture(scope="session")
def answerer(saved_adapter) -> Answerer:
    model, tokenizer, _ = load_model(None, str(saved_adapter()))
    return Answerer(model, tokenizer)


class Server:
    """What a client sees of it: an address, and raw requests."""

    def __init__(self, port, engine):
        self.port, self.engine = port, engine
        self.url = f"http://127.0.0.1:{port}/v1"

    def request(self, method, path, body=None, headers=None):
        """Any bytes; returns status, headers and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def post(self, path, **fields):
        """JSON in, status and JSON out."""
        status, _, body = self.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})
        return status, json.loads(body)

    def chat(self, text="Tea or coffee ?", metadata=KENYA, **fields):
        """A question for a person."""
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", **({"messages": messages, "metadata": metadata} | fields))

    def metric(self, name):
        """A sample's value; `name` with its labels as they are printed."""
        text = self.request("GET", "/metrics")[2].decode()
        values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(values[0]) if values else 0.0


@pytest.fixture(scope="session")
def run_server():
    """A context in which a server runs."""
    uvicorn = pytest.importorskip("uvicorn")
    from trl_cuma.serving.app import ServerSettings, create_app

    @contextlib.contextmanager
    def run(answerer, **settings):
        app = create_app(answerer, ServerSettings(**({"name": "cuma"} | settings)))
        config = uvicorn.Config(app, port=0, access_log=False, log_level="warning")
        server = uvicorn.Server(config)
        ready = threading.Event()
        startup = server.startup

        async def started(*args, **kwargs):
            await startup(*args, **kwargs)
            ready.set()

        server.startup = started
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        assert ready.wait(60)
        try:
            yield Server(server.servers[0].sockets[0].getsockname()[1], app.state.engine)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not app.state.engine.is_alive

    return run


@pytest.fixture(scope="module")
def server(run_server, answerer):
    with run_server(answerer, max_total_tokens=200, default_max_tokens=6, max_choices=4, wait_ms=50) as running:
        yield running


@pytest.fixture
def slow_answerer(answerer):
    """Answers no token before it is let; notes the sizes of its batches."""
    gate, sizes, began = threading.Event(), [], threading.Event()

    class Slow:
        model, tokenizer, table = answerer.model, answerer.tokenizer, answerer.table
        encode, check_profile, sampling = answerer.encode, answerer.check_profile, answerer.sampling

        def answer(self, questions, **kwargs):
            sizes.append(len(questions))
            began.set()
            assert gate.wait(60)
            return answerer.answer(questions, **kwargs)

    return SimpleNamespace(answerer=Slow(), gate=gate, sizes=sizes, began=began)
