# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A server on loopback that speaks the chat-completions API and can misbehave."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trl_cuma.rewards import ProfileJudge

KEY = "key-that-nobody-may-see"


@dataclass
class Response:
    """One HTTP answer; `body` overrides the chat completion that is made of `content`."""

    content: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    finish_reason: str = "stop"
    tokens: int | None = 10
    hang: bool = False

    def encode(self) -> bytes:
        if self.body is not None:
            return self.body.encode()
        message = {"role": "assistant", "content": self.content}
        completion = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish_reason}],
        }
        if self.tokens is not None:
            completion["usage"] = {"prompt_tokens": 0, "completion_tokens": self.tokens, "total_tokens": self.tokens}
        return json.dumps(completion).encode()


class JudgeServer(ThreadingHTTPServer):
    """`respond` maps the question to a [`Response`] or to the judge's words; everything that came is kept."""

    daemon_threads = True
    block_on_close = False  # a hanging request would never end
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.respond: Callable[[str], Response | str] = prefer_by_profile
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str] = []
        self.active = 0
        self.most_active = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client hung up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms otherwise
    server: JudgeServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.authorizations.append(self.headers["Authorization"])
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            response = server.respond(body["messages"][0]["content"])
        finally:
            with server.lock:
                server.active -= 1
        if isinstance(response, str):
            response = Response(response)
        if response.hang:
            server.closing.wait(5)  # then hangs up: a client that waited longer met no time-out
            self.close_connection = True
            return
        content = response.encode()
        self.send_response(response.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


def section(question: str, tag: str) -> str:
    return question.partition(f"<{tag}>\n")[2].partition(f"\n</{tag}>")[0]


def prefer_by_profile(question: str) -> str:
    """The person prefers the answer that names their country; neither or both is a tie."""
    country = section(question, "person").rpartition("country: ")[2]
    liked = [country in section(question, tag) for tag in ("answer_a", "answer_b")]
    verdict = "C" if liked[0] == liked[1] else "AB"[liked.index(True)]
    return f"They would say so.\n[[{verdict}]]"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def make_judge(server: JudgeServer) -> Callable[..., ProfileJudge]:
    def make(model: str = "judge", **settings: Any) -> ProfileJudge:
        defaults: dict[str, Any] = {"base_url": server.url, "api_key": KEY, "max_retries": 0, "timeout": 20.0}
        return ProfileJudge(model, **(defaults | settings))

    return make
