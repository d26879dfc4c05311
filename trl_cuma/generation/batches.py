# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""One batch of prompts, each with its own length and its own person, through `generate`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteria
from transformers import StoppingCriteriaList as CriteriaList

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or the messages of a conversation up to the answer."""

# What samples or searches in a model's own generation settings. Sampling is done by `row_sampling` instead.
_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_length": None}
_GREEDY |= dict.fromkeys(["temperature", "top_k", "top_p", "top_h", "min_p", "typical_p"])
_GREEDY |= dict.fromkeys(["epsilon_cutoff", "eta_cutoff"])


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """A prompt's tokens as TRL's trainers make them: text by itself, messages up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it can word a conversation. Some tokenizers do so without a template, and have no such attribute."""
    return bool(getattr(tokenizer, "chat_template", "none is needed"))


def context_length(model: torch.nn.Module) -> int | None:
    """The longest input that the model was made for; `None` where its positions have no end (ALiBi)."""
    config = extract_model_from_parallel(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def check_length(model: torch.nn.Module, tokens: Sequence[int], max_new_tokens: int, what: str = "The prompt") -> None:
    """Raise a `ValueError` if a prompt is empty, or longer with its answer than the model can read."""
    limit = context_length(model) or float("inf")
    if not tokens:
        raise ValueError(f"{what} has no tokens, so there is nothing to answer.")
    if len(tokens) + max_new_tokens > limit:
        raise ValueError(
            f"{what} has {len(tokens)} tokens, and with `max_new_tokens={max_new_tokens}` that is more than the "
            f"model's context of {limit}. Lower `max_new_tokens`, or shorten or leave out such prompts."
        )


def greedy_config(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """The model's own generation settings but for what samples or searches, with the tokens that end and pad a row."""
    config = copy.deepcopy(model.generation_config)
    config.update(**_GREEDY, max_new_tokens=max_new_tokens)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        ends = config.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        if config.pad_token_id is None:  # what it is makes no difference: it is masked
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends or 0
    return config


def end_tokens(config: GenerationConfig) -> list[int | None]:
    """The tokens that end an answer."""
    return config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]


def answer_end(tokens: Sequence[int], ends: Sequence[int | None]) -> int | None:
    """Length of an answer in what follows its prompt, its end token included; `None` where it has not ended."""
    return next((place for place, token in enumerate(tokens, start=1) if token in ends), None)


def generate_batch(
    model: torch.nn.Module,
    encoded: Sequence[Sequence[int]],
    embeds: torch.Tensor | None,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    criteria: Sequence[StoppingCriteria] = (),
) -> list[list[int]]:
    """
    The tokens that follow each prompt. A row that has ended is padded up to the longest.

    Args:
        model (`torch.nn.Module`): A causal language model, in evaluation mode.
        encoded (`Sequence[Sequence[int]]`): The tokens of each prompt, of any lengths; padded on the left here.
        embeds (`torch.Tensor` of shape `(rows, dim)`, *optional*): The vector of each row's profile.
        config (`GenerationConfig`): Of [`greedy_config`].
        processors (`LogitsProcessorList`): What draws, see [`row_sampling`].
        criteria (`Sequence[StoppingCriteria]`): What ends rows, beside their end token and the config.
    """
    device = next(model.parameters()).device
    width = max(len(tokens) for tokens in encoded)
    ids = torch.full((len(encoded), width), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if embeds is not None:
        inputs["demographic_embeds"] = embeds.to(device)
    if criteria:
        inputs["stopping_criteria"] = CriteriaList(criteria)
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=copy.deepcopy(config), logits_processor=processors)
    return output[:, width:].tolist()
