# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What TRL passes to a reward: columns of the batch, and texts as a reader sees them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast


def read_column(columns: Mapping[str, Any], name: str, argument: str) -> Sequence[Any]:
    """The column `name`; a `ValueError` with the columns that are there if it is absent."""
    if name not in columns:
        present = sorted(key for key, value in columns.items() if isinstance(value, list))
        raise ValueError(f"There is no {name!r} column; there are {present}. Name yours with `{argument}`.")
    return columns[name]


def read_texts(values: Sequence[Any], what: str) -> list[str]:
    """
    [`plain_text`] of each row.

    Raises:
        ValueError, TypeError: a row has none, or is no text; the message names the row and `what`.
    """
    texts = []
    for row, value in enumerate(values):
        if value is None:
            raise ValueError(f"Row {row} of the batch has no text in {what}.")
        try:
            texts.append(plain_text(value))
        except TypeError as error:
            raise TypeError(f"Row {row} of the batch, {what}: {error}.") from None
    return texts


def plain_text(value: str | Sequence[Mapping[str, Any]]) -> str:
    """
    The text of a prompt or a completion: itself, the content of its only message, or its messages each under its role.

    Raises:
        TypeError: if it is neither text nor messages, or a message has no `role`, no `content` (unless it calls tools)
            or holds something else than text.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not all(isinstance(message, Mapping) for message in value):
        raise TypeError(f"expected text or a list of chat messages, got {type(value).__name__}")
    messages = cast(Sequence[Mapping[str, Any]], value)
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise TypeError("expected chat messages with a `role` each, got one without")
        if "content" not in message and not message.get("tool_calls"):
            raise TypeError("expected chat messages with a `content` each, got one without")
    contents = [_content_text(message.get("content")) for message in messages]
    if len(contents) == 1:
        return contents[0]
    return "\n\n".join(f"{message['role']}: {content}" for message, content in zip(messages, contents, strict=True))


def strip_reasoning(text: str) -> str:
    """
    `text` without its `<think>…</think>` passages. Also where the opening tag is missing, since chat templates put it
    into the prompt, and where the closing one is, since the reasoning was cut off.
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    return text.rpartition("</think>")[2].partition("<think>")[0].strip()


def _content_text(content: Any) -> str:
    if content is None:  # a message that only calls tools
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) and "text" in part for part in content):
        raise TypeError("expected messages of text only, got one with other content")
    return "".join(part["text"] for part in content)
