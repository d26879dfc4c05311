# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""One question to a chat-completions endpoint: its reply, or the kind of its failure."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..extras import needs_extra

_OWN_ARGUMENTS = {"messages", "model", "n", "stream", "timeout"}


@dataclass(frozen=True, repr=False)
class Reply:
    """
    Attributes:
        text (`str`): What the model wrote.
        failure (`str`, *optional*): Why there is no text to read: `"timeout"`, `"connection"`, `"http_429"` (or
            another status), `"malformed"` or `"truncated"`.
        tokens (`int`, *optional*): `usage.total_tokens`, where the server tells it.
    """

    text: str = ""
    failure: str | None = None
    tokens: int | None = None


class ChatEndpoint:
    """
    A model behind an OpenAI-compatible endpoint. May be asked from several threads.

    The `openai` client does the retries: after a time-out, a lost connection and the statuses 408, 409, 429 and 5xx,
    with exponential back-off and jitter, or after what `Retry-After` says if that is at most two minutes.

    Args: see [`ProfileJudge`].

    Raises:
        ImportError: The `openai` package is not installed.
        ValueError: There is no API key, or `sampling` has an argument that is not its own.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        api_key: str | None,
        timeout: float,
        max_retries: int,
        sampling: Mapping[str, Any],
    ) -> None:
        with needs_extra("judge", "The judge"):
            import openai
        if refused := _OWN_ARGUMENTS & set(sampling):
            raise ValueError(f"`sampling` has {sorted(refused)}: set what the judge has arguments for there.")
        api_key = api_key or os.environ.get("OPENAI_API_KEY")
        if not api_key:
            raise ValueError(
                "There is no API key: pass `api_key` or set the environment variable OPENAI_API_KEY. A server of your "
                "own that checks none takes any text."
            )
        self.model = model
        self.sampling = dict(sampling)
        self._openai = openai
        self._client = openai.OpenAI(api_key=api_key, base_url=base_url, timeout=timeout, max_retries=max_retries)
        self.identity = json.dumps([str(self._client.base_url), model, self.sampling], sort_keys=True)
        """Everything that decides a reply beside the question."""

    def ask(self, question: str) -> Reply:
        """Send `question` as the only message. Failures are returned by kind: a server's words may repeat the text."""
        try:
            response = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": question}], **self.sampling
            )
        except self._openai.APITimeoutError:
            return Reply(failure="timeout")
        except self._openai.APIStatusError as error:
            return Reply(failure=f"http_{error.status_code}")
        except self._openai.APIConnectionError:
            return Reply(failure="connection")
        except (self._openai.APIError, ValueError):  # the client passes json's own error on
            return Reply(failure="malformed")
        # The client does not check a body against the API: any field may be absent or of another type.
        try:
            choice, usage = response.choices[0], response.usage
            text, truncated = choice.message.content, choice.finish_reason == "length"
            tokens = None if usage is None else int(usage.total_tokens)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return Reply(failure="malformed")
        if truncated:  # the verdict comes last
            return Reply(failure="truncated", tokens=tokens)
        if not isinstance(text, str):
            return Reply(failure="malformed", tokens=tokens)
        return Reply(text, tokens=tokens)
