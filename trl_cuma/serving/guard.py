# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What every request passes before anything reads it: the key, the size of its body, the clock."""

from __future__ import annotations

import hmac
import time
from typing import Any

from starlette.responses import JSONResponse

from .metrics import Metrics
from .responses import error_body

OPEN = ("/health",)


class Guard:
    """
    ASGI middleware. Reads the body whole, up to `max_body` bytes, whether or not its length is declared.

    Args:
        app: What it guards.
        metrics ([`Metrics`]): Counts requests.
        endpoints (`frozenset[str]`): Paths that are counted under their own name.
        api_key (`str`, *optional*): Asked for everywhere but at `/health`.
        max_body (`int`): Bytes.
    """

    def __init__(
        self, app: Any, *, metrics: Metrics, endpoints: frozenset[str], api_key: str | None, max_body: int
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.endpoints = endpoints
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()
        self.max_body = max_body

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in self.endpoints else "other"
        began, status = time.monotonic(), 499  # that there was nobody to answer

        async def send_and_note(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, send_and_note)
        finally:
            self.metrics.requests.labels(endpoint, str(status)).inc()
            self.metrics.seconds.labels(endpoint).observe(time.monotonic() - began)

    async def _guarded(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if self.expected is not None and scope["path"] not in OPEN:
            if not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
                response = JSONResponse(
                    error_body(401, "Send the server's key as `Authorization: Bearer KEY`.", code="invalid_api_key"),
                    401,
                    {"WWW-Authenticate": "Bearer"},
                )
                await response(scope, receive, send)
                return
        declared = headers.get(b"content-length", b"")
        body = b""
        # As h11 does, an endless number is taken for a number: it is never read into an int of its own size.
        too_large = declared.isdigit() and (len(declared) > 18 or int(declared) > self.max_body)
        more = not too_large
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            too_large = len(body) > self.max_body
            more = message.get("more_body", False) and not too_large
        if too_large:
            text = f"The body is longer than {self.max_body} bytes. Send less, or start the server with `--max_body`."
            # The rest of it is not read: the connection can't be used again.
            response = JSONResponse(error_body(413, text), 413, {"Connection": "close"})
            await response(scope, receive, send)
            return
        replayed = False

        async def replay() -> dict[str, Any]:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)
