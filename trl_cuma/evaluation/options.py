# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a language model answers: the log-likelihood of each option after a prompt, for a person."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.survey import Survey, format_completion, format_prompt
from ..generation.batches import context_length
from .option_tokens import EncodedOptions, Prompt, encode_options, prompt_key

POSITIONS_PER_SUM = 1024  # of logits that are summed in float32 at once


class OptionLogProbs(NamedTuple):
    """
    Log-likelihoods of options.

    Attributes:
        log_probs (`np.ndarray` of shape `(pairs, max_options)`): Of all tokens of each option, given what precedes it;
            `-inf` beyond a prompt's own options.
        single_token (`np.ndarray` of shape `(pairs,)`): Whether every option of the prompt is one token. Where they
            are, what their probabilities don't add up to is the probability of anything else.
    """

    log_probs: np.ndarray
    single_token: np.ndarray


def option_log_probs(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[str]],
    *,
    prompt: np.ndarray | None = None,
    profile: np.ndarray | None = None,
    demographic_embeds: torch.Tensor | None = None,
    max_batch_tokens: int = 8_192,
    padding_side: Literal["right", "left"] = "right",
    description: str | None = None,
) -> OptionLogProbs:
    """
    Log-likelihood of each option of a prompt, as the model was trained on it: see [`encode_options`] for the tokens,
    [`score_options`] for the rest.

    Args:
        model (`torch.nn.Module`): A causal language model: plain, a `PeftModel`, or with a CuMA adapter.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): Texts, or conversations that end before the answer.
        options (`Sequence[Sequence[str]]`): The completions of each prompt.
        prompt (`np.ndarray` of shape `(pairs,)`, *optional*): Index into `prompts` of each pair to score; by default
            each prompt once.
        profile (`np.ndarray` of shape `(pairs,)`, *optional*): Index into `demographic_embeds` of each pair; by
            default its rows are those of the pairs.
        demographic_embeds (`torch.Tensor` of shape `(profiles, dim)`, *optional*): The profiles' vectors, for an
            adapter that reads them.
        max_batch_tokens (`int`, defaults to 8192): Tokens of a batch, with its padding. Lower it if memory runs out.
        padding_side (`str`, defaults to `"right"`): Where batches are padded, whatever the tokenizer's own side is.
            The results are the same. `"right"` for prompt learning.
        description (`str`, *optional*): Shows a progress bar with this name.

    Returns:
        [`OptionLogProbs`]: One row per pair.

    Raises:
        `ValueError`: As [`encode_options`] and [`score_options`].
    """
    if len(prompts) != len(options):
        raise ValueError(f"`options` has {len(options)} entries for {len(prompts)} `prompts`: pass one per prompt.")
    keys: dict[tuple, int] = {}
    position = [keys.setdefault((prompt_key(p), tuple(o)), len(keys)) for p, o in zip(prompts, options, strict=True)]
    first = np.unique(position, return_index=True)[1]
    encoded = encode_options(
        tokenizer, [prompts[i] for i in first], [options[i] for i in first], show_progress=description is not None
    )
    prompt = np.arange(len(prompts)) if prompt is None else np.asarray(prompt)
    return score_options(
        model,
        encoded,
        np.asarray(position, dtype=np.int64)[prompt],
        profile=profile,
        demographic_embeds=demographic_embeds,
        max_batch_tokens=max_batch_tokens,
        padding_side=padding_side,
        description=description,
    )


@torch.no_grad()
def score_options(
    model: torch.nn.Module,
    encoded: Sequence[EncodedOptions],
    prompt: np.ndarray,
    *,
    profile: np.ndarray | None = None,
    demographic_embeds: torch.Tensor | None = None,
    max_batch_tokens: int = 8_192,
    padding_side: Literal["right", "left"] = "right",
    description: str | None = None,
) -> OptionLogProbs:
    """
    Log-likelihoods of encoded options.

    Each unique pair of prompt and vector is computed once, and options that differ in their last token only (so all
    that are one token) share a forward. Batches hold sequences of similar length, the longest first, so that memory
    that doesn't suffice shows at once. Under `accelerate launch` the batches are divided over the processes, which
    must all call this with the same arguments, and each gets the whole result. Every process does the same number of
    forwards, as sharded models need it.

    Args:
        model, profile, demographic_embeds, max_batch_tokens, padding_side, description: See [`option_log_probs`].
        encoded (`Sequence[EncodedOptions]`): What [`encode_options`] made of the prompts.
        prompt (`np.ndarray` of shape `(pairs,)`): Index into `encoded` of each pair.

    Returns:
        [`OptionLogProbs`]: One row per pair.

    Raises:
        `ValueError`: A prompt with an option is longer than the model's context, `profile` has no vectors or another
            length than `prompt`, or an argument is out of its range.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"`padding_side` is {padding_side!r}, expected 'right' or 'left'.")
    if max_batch_tokens < 1:
        raise ValueError(f"`max_batch_tokens` is {max_batch_tokens}, expected at least 1.")
    pairs, index, inverse = _unique_pairs(np.asarray(prompt), profile, demographic_embeds)
    asked = [encoded[number] for number in pairs]
    limit = context_length(model)
    if limit is not None and any(entry.length > limit for entry in asked):
        long = [number for number, entry in enumerate(encoded) if entry.length > limit]
        raise ValueError(
            f"{len(long)} of {len(encoded)} prompts are longer with their options than the model's context of {limit} "
            f"tokens, the first of them number {long[0]}. Leave them out."
        )
    sequences = list(_sequences(asked))
    lengths = np.array([len(sequence.ids) for sequence in sequences], dtype=np.int64)
    batches = list(_batches(lengths, max_batch_tokens))
    state = PartialState()
    steps = -(-len(batches) // state.num_processes) * state.num_processes
    mine = range(state.process_index, steps, state.num_processes)
    forward = _Forward(model, padding_side)
    found = []
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        hidden = description is None or not state.is_main_process
        for step in tqdm(mine, desc=description, unit="batch", disable=hidden, leave=False):
            some = [sequences[number] for number in batches[step % len(batches)]]
            vectors = None
            if demographic_embeds is not None:
                vectors = demographic_embeds[torch.from_numpy(index[[sequence.pair for sequence in some]])]
            values = forward(some, vectors)
            if step < len(batches):
                found.append(values)
    finally:
        for module in training:
            module.training = True
    result = np.full((len(asked), max((len(entry.options) for entry in asked), default=0)), -np.inf)
    for row, entry in enumerate(asked):
        result[row, : len(entry.options)] = 0.0
    for pair, option, value in gather_object(found) if state.num_processes > 1 else found:
        np.add.at(result, (pair, option), value)
    single = np.array([entry.single_token for entry in asked], dtype=bool)
    return OptionLogProbs(result[inverse], single[inverse])


def survey_log_probs(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    survey: Survey,
    question: np.ndarray,
    profile: np.ndarray,
    *,
    prompt_profile: bool = False,
    demographic_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """
    Log-probability of each option's letter after a survey's prompt ([`~trl_cuma.data.survey.format_prompt`]).

    Args:
        model, tokenizer: See [`option_log_probs`].
        survey (`Survey`): Questions and profiles.
        question (`np.ndarray` of shape `(cells,)`): Index into `survey.questions`.
        profile (`np.ndarray` of shape `(cells,)`): Index into `survey.profiles`.
        prompt_profile (`bool`, defaults to `False`): Whether the prompt states the profile.
        demographic_embeds (`torch.Tensor` of shape `(profiles, dim)`, *optional*): The vector of each of the survey's
            profiles, for an adapter that reads them.
        kwargs: `max_batch_tokens`, `padding_side` and `description` of [`option_log_probs`].

    Returns:
        `np.ndarray` of shape `(cells, max_options)`: `-inf` beyond a question's own options.

    Raises:
        `ValueError`: As [`option_log_probs`].
    """
    asked = np.stack([question, profile if prompt_profile else np.zeros_like(profile)], 1)
    unique, prompt = np.unique(asked, axis=0, return_inverse=True)
    questions = [survey.questions[q] for q, _ in unique]
    profiles = [survey.profiles[p] if prompt_profile else None for _, p in unique]
    log_probs, _ = option_log_probs(
        model,
        tokenizer,
        [format_prompt(each, person) for each, person in zip(questions, profiles, strict=True)],
        [[format_completion(k) for k in range(len(each.options))] for each in questions],
        prompt=prompt.reshape(-1),
        profile=None if demographic_embeds is None else profile,
        demographic_embeds=demographic_embeds,
        **kwargs,
    )
    width = survey.max_options - log_probs.shape[1]  # of these questions none may have as many as the survey's largest
    return np.pad(log_probs, ((0, 0), (0, width)), constant_values=-np.inf)


def split_options(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities `(cells, max_options)` → distributions over the options, and the probability outside them."""
    probs = np.exp(log_probs - log_probs.max(1, keepdims=True))  # so that the least likely text still has a share
    return probs / probs.sum(1, keepdims=True), 1 - np.exp(log_probs).sum(1)


class _Sequence(NamedTuple):
    """One input, and what is read off it: the tokens of some options, the last `tokens` of which follow the input."""

    pair: int
    ids: np.ndarray
    start: int  # the first position whose next token belongs to an option
    options: list[tuple[int, tuple[int, ...]]]  # option and its tokens


def _sequences(asked: Sequence[EncodedOptions]) -> Iterator[_Sequence]:
    """The fewest inputs, one for all options that differ in their last token only."""
    for pair, entry in enumerate(asked):
        alike: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for option, tokens in enumerate(entry.options):
            alike.setdefault(tokens[:-1], []).append((option, tokens))
        for beginning, options in alike.items():
            ids = np.append(entry.context, np.array(beginning, dtype=np.int32)) if beginning else entry.context
            yield _Sequence(pair, ids, len(entry.context) - 1, options)


def _batches(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Indices of the sequences of each batch, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, max_tokens // int(lengths[order[start]]))
        yield order[start:stop]
        start = stop


def _unique_pairs(
    prompt: np.ndarray, profile: np.ndarray | None, embeds: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt and vector of the unique pairs, and which of them each pair is. Equal vectors are one."""
    if embeds is None:
        if profile is not None:
            raise ValueError("`profile` was passed without `demographic_embeds`, into which it points.")
        profile = np.zeros(len(prompt), dtype=np.int64)
    else:
        profile = np.arange(len(embeds)) if profile is None else np.asarray(profile)
    if len(profile) != len(prompt):
        name = "`demographic_embeds`, one row per pair without `profile`," if embeds is not None else "`profile`"
        raise ValueError(f"{name} has {len(profile)} entries for {len(prompt)} pairs of prompt and profile.")
    if embeds is not None:
        seen: dict[bytes, int] = {}
        used, position = np.unique(profile, return_inverse=True)
        rows = embeds[torch.from_numpy(used)].float().cpu().numpy()
        same = np.array([seen.setdefault(row.tobytes(), int(number)) for number, row in zip(used, rows, strict=True)])
        profile = same[position.reshape(-1)] if len(used) else profile
    unique, inverse = np.unique(np.stack([prompt, profile], 1), axis=0, return_inverse=True)
    return unique[:, 0], unique[:, 1], inverse.reshape(-1)


class _Forward:
    """Runs batches of sequences, and picks the log-probabilities of the options' tokens."""

    def __init__(self, model: torch.nn.Module, padding_side: str) -> None:
        # DDP's own forward would wait for the other processes' to exchange buffers.
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        inner = extract_model_from_parallel(model)
        base = inner.get_base_model() if isinstance(inner, PeftModel) else inner
        self.accepted = inspect.signature(base.forward).parameters
        # Virtual tokens shift the positions of the logits, but not as counted from the end.
        virtual = isinstance(inner, PeftModel) and inner.active_peft_config.is_prompt_learning
        if virtual and padding_side == "left":
            raise ValueError(
                "`padding_side` is 'left', but prompt learning puts its virtual tokens before the padding, where they "
                "would be further from the prompt than in training. Use 'right'."
            )
        self.keeps = "logits_to_keep" in self.accepted and not virtual
        self.device = next(inner.parameters()).device
        self.left = padding_side == "left"

    def __call__(
        self, sequences: Sequence[_Sequence], vectors: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pair, option and log-probability of each token of each option."""
        width = max(len(sequence.ids) for sequence in sequences)
        ids = np.zeros((len(sequences), width), dtype=np.int64)  # whatever token: nothing reads the padding
        mask = np.zeros_like(ids)
        picks = []  # row, position, next token, pair, option
        for row, sequence in enumerate(sequences):
            shift = width - len(sequence.ids) if self.left else 0
            ids[row, shift : shift + len(sequence.ids)] = sequence.ids
            mask[row, shift : shift + len(sequence.ids)] = 1
            for option, tokens in sequence.options:
                for place, token in enumerate(tokens, start=shift + sequence.start):
                    picks.append((row, place, token, sequence.pair, option))
        row, place, token, pair, option = np.array(picks).T
        kept, column = np.unique(place, return_inverse=True)
        inputs = {
            "input_ids": torch.from_numpy(ids).to(self.device),
            "attention_mask": torch.from_numpy(mask).to(self.device),
            "use_cache": False,
        }
        if vectors is not None:
            inputs["demographic_embeds"] = vectors.to(self.device)
        if self.left and "position_ids" in self.accepted:  # others find their positions in the mask
            positions = (mask.cumsum(1) - 1).clip(min=0)
            inputs["position_ids"] = torch.from_numpy(positions).to(self.device)
        if self.keeps:  # logits of the other positions would be most of the memory
            inputs["logits_to_keep"] = torch.from_numpy(kept).to(self.device)
        logits = self.model(**inputs).logits
        if not self.keeps:
            logits, column = logits[:, -width:], place
        where, of_pick = np.unique(np.stack([row, column], 1), axis=0, return_inverse=True)
        where, of_pick, token = (torch.from_numpy(part).to(logits.device) for part in (where, of_pick.ravel(), token))
        logits = logits[where[:, 0], where[:, 1]]
        precise = torch.promote_types(logits.dtype, torch.float32)
        total = torch.cat([part.to(precise).logsumexp(-1) for part in logits.split(POSITIONS_PER_SUM)])
        return pair, option, (logits[of_pick, token].to(precise) - total[of_pick]).cpu().numpy()
