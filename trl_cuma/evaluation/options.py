# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a language model answers: the probability of each option of a question, for a person."""

from __future__ import annotations

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.survey import OPTION_LETTERS, Survey, format_completion, format_prompt


def option_tokens(tokenizer: PreTrainedTokenizerBase, max_options: int) -> torch.Tensor:
    """
    The token of each option's letter, `(max_options,)`.

    Raises:
        ValueError: if a letter is more than one token, or two letters share one.
    """
    encoded = [tokenizer(format_completion(k), add_special_tokens=False)["input_ids"] for k in range(max_options)]
    for letter, tokens in zip(OPTION_LETTERS, encoded, strict=False):
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            raise ValueError(f"Option letter {letter!r} must be one token of the tokenizer, got {len(tokens)}.")
    return torch.tensor([tokens[0] for tokens in encoded])


@torch.no_grad()
def option_log_probs(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    survey: Survey,
    question: np.ndarray,
    profile: np.ndarray,
    *,
    prompt_profile: bool = False,
    demographic_embeds: torch.Tensor | None = None,
    batch_size: int = 256,
    description: str | None = None,
) -> np.ndarray:
    """
    Log-probability of each option's letter as the first token after the prompt. What the options of a row don't add up
    to is the probability outside the options.

    Each unique input is computed once, in batches of similar length, padded on the right.

    Args:
        model (`torch.nn.Module`): a causal language model, with or without an adapter.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        survey (`Survey`): questions and profiles.
        question (`np.ndarray` of shape `(cells,)`): index into `survey.questions`.
        profile (`np.ndarray` of shape `(cells,)`): index into `survey.profiles`.
        prompt_profile (`bool`): whether the prompt states the profile.
        demographic_embeds (`torch.Tensor` of shape `(profiles, dim)`, *optional*): the vector of each of the survey's
            profiles, for a CuMA adapter.
        batch_size (`int`): prompts per forward.
        description (`str`, *optional*): shows a progress bar with this name.

    Returns:
        `np.ndarray` of shape `(cells, max_options)`: `-inf` beyond a question's own options.
    """
    device = next(model.parameters()).device
    reads_profile = prompt_profile or demographic_embeds is not None
    keys = np.stack([question, profile if reads_profile else np.zeros_like(profile)], 1)
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    prompts = [
        format_prompt(survey.questions[q], survey.profiles[p] if prompt_profile else None) for q, p in unique.tolist()
    ]
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    letters = option_tokens(tokenizer, survey.max_options).to(device)
    mask = torch.from_numpy(survey.option_mask).to(device)
    order = np.argsort([len(tokens) for tokens in encoded], kind="stable")
    result = np.empty((len(unique), survey.max_options))
    was_training = model.training
    model.eval()
    batches = range(0, len(order), batch_size)
    for start in tqdm(batches, desc=description, unit="batch", disable=description is None, leave=False):
        rows = order[start : start + batch_size]
        lengths = torch.tensor([len(encoded[row]) for row in rows], device=device)
        ids = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id, device=device)
        for index, row in enumerate(rows):
            ids[index, : len(encoded[row])] = torch.tensor(encoded[row], device=device)
        attention_mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
        if demographic_embeds is not None:
            inputs["demographic_embeds"] = demographic_embeds[unique[rows, 1]].to(device)
        logits = model(**inputs).logits[torch.arange(len(rows), device=device), lengths - 1]
        log_probs = logits.float().log_softmax(-1)[:, letters]
        log_probs = log_probs.masked_fill(~mask[unique[rows, 0]], -torch.inf)
        result[rows] = log_probs.cpu().numpy()
    model.train(was_training)
    return result[inverse.reshape(-1)]


def split_options(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities `(cells, max_options)` → distributions over the options, and the probability outside them."""
    probs = np.exp(log_probs)
    inside = probs.sum(1)
    return probs / inside[:, None], 1 - inside
