# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Prompts answered for people, in batches that mix profiles, lengths and settings; text comes as it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from .batches import (
    Prompt,
    check_length,
    encode_prompt,
    end_tokens,
    generate_batch,
    greedy_config,
    has_chat_template,
)
from .profiles import check_profile
from .replies import Reply, ReplyWatch
from .row_sampling import MixedSampling
from .vectors import demographic_table


@dataclass(frozen=True)
class Sampling:
    """
    How one answer is made; the names are those of transformers' `GenerationConfig`.

    Attributes:
        max_new_tokens (`int`): A longer answer is cut off.
        temperature (`float`): Divides the logits; 0 is greedy.
        top_p (`float`): Mass of the most likely tokens that are drawn from.
        top_k (`int`): How many of them; 0 for all.
        min_p (`float`): Share of the likeliest token's probability that a token needs.
        seed (`int`): Of the draws. Answers of equal seeds share their noise, whatever stands beside them in a batch:
            between profiles they differ by the profile alone.
        stop (`tuple[str, ...]`): Texts before which an answer ends.

    Raises:
        ValueError: A value is out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
                raise ValueError(f"`{name}` is {value!r}, expected an integer of at least {low}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` is {self.temperature!r}, expected 0 (greedy) or a number above.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p!r}, expected a mass above 0 and up to 1.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` is {self.min_p!r}, expected a share from 0 to 1.")
        if not all(self.stop):
            raise ValueError("`stop` has an empty text, which would end every answer at once.")


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        tokens (`list[int]`): The prompt, see [`Answerer.encode`].
        profile (`Any`): Of the person whom it is answered for; `None` where none is needed.
        sampling ([`Sampling`]): How.
    """

    tokens: list[int]
    profile: Any
    sampling: Sampling


class Answerer:
    """
    A model that answers prompts for people.

    Args:
        model (`torch.nn.Module`): A causal language model, with a CuMA adapter or not; see [`load_model`].
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.

    Raises:
        ValueError: The adapter reads vectors that no encoder of its own makes.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.table = demographic_table(model)
        if self.table is not None and self.table.encoder is None:
            raise ValueError(
                "The adapter was trained on ready-made vectors and has no encoder for profiles. Call "
                "`model.generate(demographic_embeds=…)` with vectors of your own."
            )

    @property
    def reads_conversations(self) -> bool:
        """Whether a prompt can be a conversation."""
        return has_chat_template(self.tokenizer)

    def sampling(self, **given: Any) -> Sampling:
        """
        The model's own sampling settings (its `GenerationConfig`), under those that are given and not `None`.

        Raises:
            ValueError: As [`Sampling`], and for settings of sampling where `temperature` is 0, which is greedy.
        """
        given = {name: value for name, value in given.items() if value is not None}
        config, own = self.model.generation_config, {}
        if config.do_sample and given.get("temperature") != 0:
            names = ("temperature", "top_p", "top_k", "min_p")
            own = {name: value for name in names if (value := getattr(config, name)) is not None}
            own = {"temperature": 1.0} | own
        sampling = Sampling(**(own | given))
        idle = [name for name in ("top_p", "top_k", "min_p") if name in given]
        if sampling.temperature == 0 and idle and getattr(sampling, idle[0]) != getattr(Sampling, idle[0]):
            raise ValueError(f"`{idle[0]}` needs a `temperature` above 0: at 0 the likeliest token is taken.")
        return sampling

    def check_profile(self, profile: Any, what: str = "The profile") -> list[str]:
        """Warnings about a profile, or an error if it can't be used; see [`check_profile`]."""
        return check_profile(self.table, profile, what)

    def encode(self, prompt: Prompt) -> list[int]:
        """
        A prompt's tokens.

        Raises:
            ValueError: It is a conversation and the tokenizer has no chat template, or one that refuses it; or it has
                no tokens, or more than the model can read.
        """
        if not isinstance(prompt, str) and not self.reads_conversations:
            raise ValueError("The prompt is a conversation, and the tokenizer has no chat template. Give a text.")
        try:
            tokens = encode_prompt(self.tokenizer, prompt)
        except Exception as error:  # a template is a program, which raises what it likes
            if isinstance(prompt, str):
                raise
            raise ValueError(f"The chat template refuses the conversation: {error}") from error
        check_length(self.model, tokens, 1)
        return tokens

    def answer(
        self,
        questions: Sequence[Question],
        *,
        on_text: Callable[[int, str], Any] | None = None,
        on_reply: Callable[[int, Reply], Any] | None = None,
        cancelled: Callable[[int], bool] | None = None,
    ) -> list[Reply]:
        """
        Answer all questions in one batch, each as if it were alone.

        Args:
            questions (`Sequence[Question]`): At least one.
            on_text (`Callable[[int, str], Any]`, *optional*): Gets a question's number and the next piece of its
                answer; the pieces joined are the answer.
            on_reply (`Callable[[int, Reply], Any]`, *optional*): Gets a question's number and its reply when it ends,
                which may be long before the last of the batch.
            cancelled (`Callable[[int], bool]`, *optional*): Whether nobody waits for a question any more.

        Raises:
            ValueError: A prompt with its answer is longer than the model's context, or a profile can't be used.
        """
        settings = [question.sampling for question in questions]
        for question in questions:
            check_length(self.model, question.tokens, question.sampling.max_new_tokens)
        config = greedy_config(self.model, self.tokenizer, max(s.max_new_tokens for s in settings))
        processors = LogitsProcessorList()
        if any(s.temperature > 0 for s in settings):
            keys = [(s.temperature, s.top_p, s.top_k, s.min_p) for s in settings]
            processors.append(MixedSampling(keys, [s.seed for s in settings]))
        watch = ReplyWatch(
            self.tokenizer,
            ends=end_tokens(config),
            limits=[s.max_new_tokens for s in settings],
            stop=[s.stop for s in settings],
            prompt_tokens=[len(question.tokens) for question in questions],
            on_text=on_text,
            on_reply=on_reply,
            cancelled=cancelled,
        )
        embeds = self._vectors([question.profile for question in questions])
        generate_batch(self.model, [q.tokens for q in questions], embeds, config, processors, [watch])
        return watch.close()

    def _vectors(self, profiles: list[Any]) -> torch.Tensor | None:
        # By the encoder and not by the table, which keeps every profile that it has met.
        table = self.table
        return None if table is None else table.encoder.encode(profiles, missing=table.missing)
