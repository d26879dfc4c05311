# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The tokens of prompts and options, divided where TRL's trainers divide prompt and completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..generation.batches import Prompt

PROMPTS_PER_CALL = 500
NEAR = 64  # characters
ANSWER = "\ue000"  # stands for the answer while a chat template is rendered; in no text, since it is for private use


class EncodedOptions(NamedTuple):
    """
    A prompt and its options as tokens.

    Attributes:
        context (`np.ndarray` of shape `(tokens,)`): What precedes every option.
        options (`tuple[tuple[int, ...], ...]`): The tokens of each option after it.
    """

    context: np.ndarray
    options: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence: the prompt with its longest option."""
        return len(self.context) + max(map(len, self.options))

    @property
    def single_token(self) -> bool:
        """Whether every option is one token."""
        return all(len(tokens) == 1 for tokens in self.options)


def prompt_key(prompt: Prompt) -> str | tuple[tuple[str, str], ...]:
    """What is equal for equal prompts, and can be hashed."""
    return prompt if isinstance(prompt, str) else tuple((message["role"], message["content"]) for message in prompt)


def encode_options(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[str]],
    *,
    show_progress: bool = False,
) -> list[EncodedOptions]:
    """
    Tokens of prompts and options, as TRL's trainers tokenize `prompt` and `completion`.

    A text and its option are tokenized as one text; an option begins where the tokens of the text alone and of both
    differ, since tokens may merge across the boundary. Of a conversation, the option is the assistant's message, in
    the tokenizer's chat template. What a template puts before an answer (Qwen3's is an empty `<think>` block) was part
    of the completion in training; here it belongs to the context, since it says nothing about the options.

    What ends an answer (the end-of-sequence token that TRL adds to a text, or what the template puts after a message)
    is no part of an option, except for prompts of which one option begins another, such as "1" and "10": otherwise the
    longer option would be part of the shorter.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): All texts, or all conversations.
        options (`Sequence[Sequence[str]]`): The completions of each prompt. A text's usually begin with a space.
        show_progress (`bool`, defaults to `False`): Show a progress bar over many prompts.

    Returns:
        `list[EncodedOptions]`: One per prompt.

    Raises:
        `TypeError`: Texts and conversations are mixed.
        `ValueError`: A prompt has no tokens or no options, an option is blank, holds a token that the tokenizer
            doesn't know, or has the tokens of another option; or the chat template doesn't say an assistant's message
            as it is.
    """
    texts = [isinstance(prompt, str) for prompt in prompts]
    if any(texts) and not all(texts):
        raise TypeError(
            f"Prompt {texts.index(not texts[0])} is a {'conversation' if texts[0] else 'text'}, those before it are "
            "not: the tokenizer treats the two in different ways. Pass one kind."
        )
    encoded: list[EncodedOptions] = []
    division = _Division(tokenizer, is_text=all(texts))
    starts = range(0, len(prompts), PROMPTS_PER_CALL)
    hidden = not show_progress or len(starts) < 2
    for start in tqdm(starts, "Tokenizing", unit=f"×{PROMPTS_PER_CALL} prompts", disable=hidden):
        some = slice(start, start + PROMPTS_PER_CALL)
        around = [_around(tokenizer, prompt) for prompt in prompts[some]]
        heads = [head for head, _ in around]
        ids = division.tokens(heads)
        entries = division(heads, ids, options[some])
        unclear = [number for number, entry in enumerate(entries) if _one_begins_another(entry.options)]
        ended = [[text + around[number][1] for text in options[start + number]] for number in unclear]
        again = division([heads[number] for number in unclear], [ids[number] for number in unclear], ended)
        for number, entry in zip(unclear, again, strict=True):
            entries[number] = entry
        for number, entry in enumerate(entries, start=start):
            _check(tokenizer, entry, options[number], number)
        encoded += entries
    return encoded


def _around(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[str, str]:
    """The text before an answer, and what ends it."""
    if isinstance(prompt, str):
        return prompt, tokenizer.eos_token or ""
    said = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": ANSWER}], tokenize=False)
    head, found, tail = said.partition(ANSWER)
    if not found or ANSWER in tail:
        raise ValueError(
            "The tokenizer's chat template doesn't say an assistant's message once and as it is, so that the answer's "
            "tokens can't be told. Use another template, or prompts that are texts."
        )
    return head, tail


class _Division:
    """
    Divides the tokens of prompt and option where they begin to differ from the prompt's alone.

    How a text's end and an option divide is found once for all texts that end alike: only what is near a boundary has
    a say in the tokens there. So most prompts are tokenized once, and not once more with each option.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, is_text: bool) -> None:
        self.tokenizer = tokenizer
        self.is_text = is_text
        # The last characters of a prompt, and an option → how many of the prompt's tokens give way to which others.
        self.known: dict[tuple[str, str], tuple[int, list[int]]] = {}

    def tokens(self, texts: list[str]) -> list[list[int]]:
        # A chat template writes the special tokens itself.
        options = {"add_special_tokens": self.is_text, "return_attention_mask": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []

    def __call__(
        self, heads: list[str], head_ids: list[list[int]], options: Sequence[Sequence[str]]
    ) -> list[EncodedOptions]:
        keys = [[(head[-NEAR:], text) for text in some] for head, some in zip(heads, options, strict=True)]
        new = {key: number for number, some in enumerate(keys) for key in some if key not in self.known}
        whole = self.tokens([heads[number] + text for (_, text), number in new.items()])
        for (key, number), ids in zip(new.items(), whole, strict=True):
            shared = _common_prefix(head_ids[number], ids)
            self.known[key] = len(head_ids[number]) - shared, ids[shared:]
        return [self._divide(ids, [self.known[key] for key in some]) for ids, some in zip(head_ids, keys, strict=True)]

    @staticmethod
    def _divide(ids: list[int], ways: Sequence[tuple[int, list[int]]]) -> EncodedOptions:
        length = len(ids) - max((given for given, _ in ways), default=0)
        options = tuple((*ids[length : len(ids) - given], *tail) for given, tail in ways)
        return EncodedOptions(np.array(ids[:length], dtype=np.int32), options)


def _common_prefix(head: list[int], ids: list[int]) -> int:
    if ids[: len(head)] == head:
        return len(head)
    return next((place for place, pair in enumerate(zip(head, ids, strict=False)) if pair[0] != pair[1]), len(ids))


def _one_begins_another(options: Sequence[tuple[int, ...]]) -> bool:
    ordered = sorted(options)
    # Sorted, what an option begins follows it at once. Equal ones are an error of their own.
    return any(a != b and b[: len(a)] == a for a, b in zip(ordered, ordered[1:], strict=False))


def _check(tokenizer: PreTrainedTokenizerBase, entry: EncodedOptions, texts: Sequence[str], number: int) -> None:
    if not texts:
        raise ValueError(f"Prompt {number} has no options.")
    if not len(entry.context):
        raise ValueError(f"Prompt {number} has no token before its options, after which they could follow.")
    seen: dict[tuple[int, ...], str] = {}
    for text, tokens in zip(texts, entry.options, strict=True):
        if not tokens or not text.strip():
            raise ValueError(f"Option {text!r} of prompt {number} is blank.")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
            raise ValueError(f"Option {text!r} of prompt {number} holds a token that the tokenizer doesn't know.")
        if tokens in seen:
            raise ValueError(f"Options {seen[tokens]!r} and {text!r} of prompt {number} are the same tokens.")
        seen[tokens] = text
