# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Position bias: questions asked with their options in several orders, and what the orders have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .option_tokens import EncodedOptions, Prompt, encode_options
from .options import score_options, split_options

Order = tuple[int, ...]
"""Which option stands at each place: `(2, 0, 1)` is the last of three first."""


def option_orders(num_options: int, permutations: int) -> list[Order]:
    """
    The orders in which a question is asked: its own, the reverse, and then rotations of it, each with its reverse.

    With an even number of orders, every option stands as far in front in one order as it stands behind in another.
    With `2 * num_options` (the most that there are), every option is at each place equally often.

    Args:
        num_options (`int`): Options of the question.
        permutations (`int`): How many orders; 0 or 1 is its own order alone. Fewer where there are not so many.

    Raises:
        `ValueError`: `permutations` is negative.
    """
    if permutations < 0:
        raise ValueError(
            f"`permutations` is {permutations}, expected 0 (options in their own order) or a number of 2."
        )
    pairs = min(-(-permutations // 2), num_options) or 1
    orders: list[Order] = []
    for pair in range(pairs):
        shift = pair * num_options // pairs  # spread over the scale
        order = tuple((place + shift) % num_options for place in range(num_options))
        orders += [order, order[::-1]]
    return list(dict.fromkeys(orders))[: max(permutations, 1)]


class AskedPrompts(NamedTuple):
    """
    Prompts, each in all its orders.

    Attributes:
        encoded (`list[EncodedOptions]`): Of every prompt in every order, prompt by prompt.
        order (`np.ndarray` of shape `(asked, max_options)`): Which option stands at each place.
        num_options (`np.ndarray` of shape `(prompts,)`): Options of each prompt.
        first (`np.ndarray` of shape `(prompts + 1,)`): Where each prompt's orders begin.
    """

    encoded: list[EncodedOptions]
    order: np.ndarray
    num_options: np.ndarray
    first: np.ndarray

    def longest(self) -> np.ndarray:
        """Tokens of each prompt with its longest option, in the longest of its orders, `(prompts,)`."""
        lengths = np.array([entry.length for entry in self.encoded], dtype=np.int64)
        return np.maximum.reduceat(lengths, self.first[:-1]) if len(lengths) else lengths


def ask(
    tokenizer: PreTrainedTokenizerBase,
    options: Sequence[Sequence[str]],
    prompt: Callable[[int, Order], Prompt],
    *,
    permutations: int,
    by_letter: bool,
    show_progress: bool = False,
) -> AskedPrompts:
    """
    Encode prompts in several orders of their options.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        options (`Sequence[Sequence[str]]`): Completions of each prompt, in the order of the scale.
        prompt (`Callable[[int, Order], Prompt]`): The prompt with this number, in this order.
        permutations (`int`): See [`option_orders`].
        by_letter (`bool`): Whether completions are the places' letters, which stay in place, or move with the options.
        show_progress (`bool`, defaults to `False`): Show a progress bar over many prompts.
    """
    orders = [option_orders(len(some), permutations) for some in options]
    asked = [(number, order) for number, some in enumerate(orders) for order in some]
    texts = [options[number] if by_letter else [options[number][k] for k in order] for number, order in asked]
    encoded = encode_options(tokenizer, [prompt(*each) for each in asked], texts, show_progress=show_progress)
    table = np.tile(np.arange(max((len(some) for some in options), default=0)), (len(asked), 1))
    for row, (_, order) in enumerate(asked):
        table[row, : len(order)] = order
    first = np.cumsum([0, *map(len, orders)])
    return AskedPrompts(encoded, table, np.array([len(some) for some in options], dtype=np.int64), first)


def predict(
    model: torch.nn.Module, asked: AskedPrompts, prompt: np.ndarray, profile: np.ndarray | None, **kwargs: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """
    Option distributions of cells, averaged over the orders.

    Args:
        model (`torch.nn.Module`): A causal language model.
        asked (`AskedPrompts`): The prompts.
        prompt (`np.ndarray` of shape `(cells,)`): Each cell's prompt.
        profile (`np.ndarray` of shape `(cells,)`, *optional*): Each cell's row of `demographic_embeds`.
        kwargs: For [`score_options`].

    Returns:
        `tuple`: `predicted` `(cells, max_options)` in the order of the scale, renormalised over the options; `outside`
        `(cells,)`, the probability of anything else, `nan` where an option is several tokens; and the position bias
        `(cells,)`, see [`position_bias`], or `None` if no prompt has several orders.
    """
    count = (asked.first[1:] - asked.first[:-1])[prompt]
    cell = np.repeat(np.arange(len(prompt)), count)
    start = np.cumsum(count) - count
    pair = np.arange(len(cell)) - start[cell] + asked.first[prompt][cell]
    scored = score_options(model, asked.encoded, pair, profile=None if profile is None else profile[cell], **kwargs)
    probs, outside = split_options(scored.log_probs)
    outside[~scored.single_token] = np.nan
    by_scale = np.zeros_like(probs)
    np.put_along_axis(by_scale, asked.order[pair][:, : probs.shape[1]], probs, axis=1)
    predicted = np.zeros((len(prompt), probs.shape[1]))
    np.add.at(predicted, cell, by_scale / count[cell][:, None])
    mean_outside = np.zeros(len(prompt))
    np.add.at(mean_outside, cell, outside / count[cell])
    bias = position_bias(by_scale, count) if (np.diff(asked.first) > 1).any() else None
    return predicted, mean_outside, bias


def position_bias(by_order: np.ndarray, count: np.ndarray) -> np.ndarray:
    """
    How far the order of the options changes the answer: the mean over all pairs of orders of the total variation
    distance `½ Σ |p - p'|` between the two distributions. 0: not at all; 1: it alone decides.

    Args:
        by_order (`np.ndarray` of shape `(asked, max_options)`): Distributions in the order of the scale, cell by cell.
        count (`np.ndarray` of shape `(cells,)`): Orders of each cell.

    Returns:
        `np.ndarray` of shape `(cells,)`.
    """
    bias = np.zeros(len(count))
    start = np.cumsum(count) - count
    for orders in np.unique(count[count > 1]):
        cells = np.flatnonzero(count == orders)
        probs = by_order[start[cells][:, None] + np.arange(orders)]
        pairs = [(i, j) for i in range(orders) for j in range(i)]
        bias[cells] = np.mean([np.abs(probs[:, i] - probs[:, j]).sum(1) / 2 for i, j in pairs], axis=0)
    return bias
