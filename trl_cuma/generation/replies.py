# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Replies as they grow: text as soon as it is final, and where each row of a batch ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

Ending = Literal["stop", "length", "cancelled"]

_HALF = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to


@dataclass(frozen=True)
class Reply:
    """
    Attributes:
        text (`str`): Without special tokens, and up to a stop text.
        num_tokens (`int`): Generated, with the one that ends it.
        prompt_tokens (`int`): Of the prompt.
        ending (`str`): `"stop"`: by the model or a stop text; `"length"`: by `max_new_tokens`; `"cancelled"`.
    """

    text: str
    num_tokens: int
    prompt_tokens: int
    ending: Ending


class GrowingText:
    """
    The text of one row, token by token. What [`add`] and [`finish`] return, joined, is the reply.

    Text comes out when no later token can change it: not in the middle of a character, nor where a stop text may have
    begun. Tokens are decoded with those just before them, since many tokenizers treat the beginning of a text
    differently.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.tokens: list[int] = []
        self.stopped = False
        self._before, self._read = 0, 0  # where the window begins, and up to where it has been decoded
        self._held = ""  # decoded, and not yet out

    def add(self, token: int) -> str:
        """The text that is final with this token."""
        self.tokens.append(token)
        self._held += self._decode()
        places = [place for place in map(self._held.find, self.stop) if place >= 0]
        if places:
            self.stopped = True
            return self._release(min(places))
        return self._release(len(self._held) - self._begun_stop())

    def finish(self) -> str:
        """What was held back, unless a stop text ended it."""
        if self.stopped:
            return ""
        rest = self._held + self._decode(whole=True)
        self._held = ""
        places = [place for place in map(rest.find, self.stop) if place >= 0]
        self.stopped = bool(places)
        return rest[: min(places)] if places else rest

    def _decode(self, *, whole: bool = False) -> str:
        known = self.tokenizer.decode(self.tokens[self._before : self._read], skip_special_tokens=True)
        text = self.tokenizer.decode(self.tokens[self._before :], skip_special_tokens=True)
        if len(text) <= len(known) or (text.endswith(_HALF) and not whole):
            return ""
        self._before, self._read = self._read, len(self.tokens)
        return text[len(known) :]

    def _begun_stop(self) -> int:
        """Length of the longest end of the held text with which a stop text begins."""
        lengths = (size for stop in self.stop for size in range(1, len(stop)) if self._held.endswith(stop[:size]))
        return max(lengths, default=0)

    def _release(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text


class ReplyWatch(StoppingCriteria):
    """
    Follows a `generate`: hands out text, and ends each row by itself.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Decodes.
        ends (`Sequence[int]`): Tokens that end a reply.
        limits (`Sequence[int]`): Of each row, how many tokens it may have.
        stop (`Sequence[Sequence[str]]`): Of each row, the texts before which it ends.
        prompt_tokens (`Sequence[int]`): Of each row's prompt.
        on_text (`Callable[[int, str], Any]`, *optional*): Gets a row's number and its next piece of text.
        on_reply (`Callable[[int, Reply], Any]`, *optional*): Gets a row's number and its reply, as soon as it ends.
        cancelled (`Callable[[int], bool]`, *optional*): Whether nobody waits for a row any more; asked at each token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int | None],
        limits: Sequence[int],
        stop: Sequence[Sequence[str]],
        prompt_tokens: Sequence[int],
        on_text: Callable[[int, str], Any] | None = None,
        on_reply: Callable[[int, Reply], Any] | None = None,
        cancelled: Callable[[int], bool] | None = None,
    ) -> None:
        self.ends = set(ends)
        self.limits = limits
        self.prompt_tokens = prompt_tokens
        self.on_text = on_text
        self.on_reply = on_reply
        self.cancelled = cancelled
        self.growing = [GrowingText(tokenizer, texts) for texts in stop]
        self.texts = ["" for _ in stop]
        self.replies: list[Reply | None] = [None for _ in stop]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.replies[row] is None:
                self._step(row, token)
        return torch.tensor([reply is not None for reply in self.replies], device=input_ids.device)

    def _step(self, row: int, token: int) -> None:
        growing = self.growing[row]
        self._out(row, growing.add(token))
        ending: Ending | None = None
        if token in self.ends or growing.stopped:
            ending = "stop"
        elif len(growing.tokens) >= self.limits[row]:
            ending = "length"
        elif self.cancelled is not None and self.cancelled(row):
            ending = "cancelled"
        if ending is not None:
            self._end(row, ending)

    def close(self) -> list[Reply]:
        """The replies; a row that `generate` ended by itself (a model's own `max_time`) was cut off."""
        for row, reply in enumerate(self.replies):
            if reply is None:
                self._end(row, "length")
        return self.replies

    def _end(self, row: int, ending: Ending) -> None:
        growing = self.growing[row]
        self._out(row, growing.finish())
        ending = "stop" if growing.stopped else ending
        self.replies[row] = Reply(self.texts[row], len(growing.tokens), self.prompt_tokens[row], ending)
        if self.on_reply is not None:
            self.on_reply(row, self.replies[row])

    def _out(self, row: int, text: str) -> None:
        self.texts[row] += text
        if text and self.on_text is not None:
            self.on_text(row, text)
