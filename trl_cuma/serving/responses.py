# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""OpenAI's shapes of answers, pieces of answers, and errors."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from starlette.exceptions import HTTPException

from ..generation.replies import Reply

Kind = Literal["chat", "text"]

TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}


class ApiError(HTTPException):
    """
    An error that the client sees as OpenAI's clients expect it.

    Args:
        status (`int`): HTTP's.
        message (`str`): What is wrong and what to do; never a profile's value.
        param (`str`, *optional*): The field of the request.
        code (`str`, *optional*): OpenAI's name of the error.
        headers (`dict`, *optional*): Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        return error_body(self.status_code, self.detail, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as JSON."""
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Envelope:
    """
    What all JSON of one response shares.

    Args:
        kind (`"chat"` or `"text"`): Which endpoint.
        model (`str`): The name under which the model is served.
        warnings (`Sequence[str]`): About the profile; an addition to OpenAI's format.
    """

    def __init__(self, kind: Kind, model: str, warnings: Sequence[str] = ()) -> None:
        self.kind = kind
        self.warnings = list(warnings)
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self.common = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, replies: Sequence[Reply], prompt_tokens: int) -> dict[str, Any]:
        """The response with all answers."""
        choices = [
            {"index": index, **self._content(reply.text, "message"), "finish_reason": reply.ending, "logprobs": None}
            for index, reply in enumerate(replies)
        ]
        body = {**self.common, "object": "chat.completion" if self.kind == "chat" else "text_completion"}
        return self._warned(body | {"choices": choices, "usage": usage(replies, prompt_tokens)})

    def piece(self, index: int, text: str, ending: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """A piece of the answer `index`, or its end."""
        content = self._content(text, "delta", first=first)
        body = self._chunk([{"index": index, **content, "finish_reason": ending, "logprobs": None}])
        return self._warned(body) if first else body

    def last(self, replies: Sequence[Reply], prompt_tokens: int) -> dict[str, Any]:
        """The chunk after all pieces, with the counts."""
        return self._chunk([]) | {"usage": usage(replies, prompt_tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self.common, "object": kind, "choices": choices}

    def _content(self, text: str, name: str, *, first: bool = False) -> dict[str, Any]:
        if self.kind == "text":
            return {"text": text}
        message: dict[str, str] = {"role": "assistant"} if first or name == "message" else {}
        return {name: message | ({"content": text} if text or name == "message" else {})}

    def _warned(self, body: dict[str, Any]) -> dict[str, Any]:
        return body | ({"warnings": self.warnings} if self.warnings else {})


def usage(replies: Sequence[Reply], prompt_tokens: int) -> dict[str, int]:
    """Token counts; a prompt counts once, however many answers it gets."""
    generated = sum(reply.num_tokens for reply in replies)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


def event(body: dict[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n"
