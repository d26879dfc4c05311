# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
A LoRA that answers as the routed model does for one profile, where no LoRA can be equal to it: the experts under their
mean gates, refined by a short distillation on the user's prompts; and how far it is, on prompts held out from that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..adapter.export import Factors, collapse, in_place_of_experts, mean_gates, to_rank
from ..generation.batches import answer_end, end_tokens, generate_batch, greedy_config
from ..generation.row_sampling import row_sampling

LEAST_PROMPTS = 8
"""Different prompts without which nothing is distilled or measured."""


@dataclass(frozen=True)
class Distillation:
    """
    How LoRAs are fitted and measured.

    Args:
        steps (`int`): Of the distillation.
        learning_rate (`float`): Of Adam at its first step; it falls linearly.
        batch_size (`int`): Prompts of a step.
        max_new_tokens (`int`): Length of an answer, at most.
        held_out (`float`): Share of the prompts that an export is measured on, and never fitted to.
        seed (`int`): Of the answers, the split and the order.

    Raises:
        ValueError: A number is out of its range.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    batch_size: int = 8
    max_new_tokens: int = 32
    held_out: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {least}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` is {self.learning_rate}, expected a positive number.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"`held_out` is {self.held_out}, expected a share above 0 and below 1.")

    def split(self, prompts: int) -> tuple[list[int], list[int]]:
        """
        Numbers of the prompts to fit to, and of those held out.

        Raises:
            ValueError: There are too few.
        """
        if prompts < LEAST_PROMPTS:
            raise ValueError(
                f"`prompts` has {prompts} different prompts; it takes at least {LEAST_PROMPTS} to fit an export to "
                "some and measure it on others. Pass prompts as the export will get them."
            )
        order = np.random.default_rng(self.seed).permutation(prompts).tolist()
        number = min(max(2, round(self.held_out * prompts)), prompts - 2)
        return sorted(order[number:]), sorted(order[:number])


@dataclass(frozen=True)
class Distance:
    """
    How far an export is from the routed model, over the tokens of answers to held-out prompts.

    Args:
        mean_kl (`float`): `KL(routed ‖ export)` of the next token, in nats: mean over prompts of each one's mean.
        worst_kl (`float`): The prompt's that is farthest.
        top1_agreement (`float`): Share of tokens whose most likely one is the same.
        prompts (`int`), tokens (`int`): That it was measured on.
    """

    mean_kl: float
    worst_kl: float
    top1_agreement: float
    prompts: int
    tokens: int

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answered:
    """
    Prompts with an answer each of the routed model.

    Args:
        tokens (`list[list[int]]`): Prompt and answer.
        starts (`list[int]`): Where the answer begins.
    """

    tokens: list[list[int]]
    starts: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Sequence[int]) -> Answered:
        return Answered([self.tokens[row] for row in rows], [self.starts[row] for row in rows])

    def batches(self, size: int) -> Iterator[Answered]:
        """By length, so that little is padded."""
        order = sorted(range(len(self)), key=lambda row: len(self.tokens[row]))
        for start in range(0, len(order), size):
            yield self.select(order[start : start + size])

    def tensors(self, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The model's inputs, padded on the right, and the `(rows, seq)` places that predict an answer's token."""
        rows = [torch.tensor(tokens) for tokens in self.tokens]
        ids = pad_sequence(rows, batch_first=True)
        place = torch.arange(ids.shape[1])
        lengths = torch.tensor([[len(tokens)] for tokens in self.tokens])
        starts = torch.tensor(self.starts).unsqueeze(1)
        inputs = {"input_ids": ids.to(device), "attention_mask": (place < lengths).long().to(device)}
        return inputs, ((place >= starts - 1) & (place < lengths - 1)).to(device)


@torch.no_grad()
def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    embeds: torch.Tensor,
    how: Distillation,
) -> Answered:
    """
    Draw an answer of the routed model to each prompt, at temperature 1: what the export has to be near to.

    Args:
        encoded (`Sequence`): Tokens of the prompts.
        embeds (`torch.Tensor` of shape `(demographic_dim,)`): The profile's vector.
    """
    config = greedy_config(model, tokenizer, how.max_new_tokens)
    ends = end_tokens(config)
    tokens: list[list[int]] = [[] for _ in encoded]
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    for start in range(0, len(order), how.batch_size):
        rows = order[start : start + how.batch_size]
        draws = row_sampling(1.0, 1.0, [how.seed + row for row in rows])
        profiles = embeds.expand(len(rows), -1)
        made = generate_batch(model, [encoded[row] for row in rows], profiles, config, draws)
        for row, new in zip(rows, made, strict=True):
            tokens[row] = [*encoded[row], *new[: answer_end(new, ends)]]
    return Answered(tokens, [len(each) for each in encoded])


@torch.no_grad()
def average(
    model: PeftModel, rows: Answered, embeds: torch.Tensor, rank: int, how: Distillation
) -> dict[str, Factors]:
    """The experts under their mean gates over these rows' tokens, at a rank."""
    with mean_gates(model) as gates:
        for batch in rows.batches(how.batch_size):
            _routed(model, batch, embeds)
    return {name: to_rank(factors, rank) for name, factors in collapse(model, embeds, gates).items()}


def distill(
    model: PeftModel,
    rows: Answered,
    embeds: torch.Tensor,
    factors: Mapping[str, Factors],
    how: Distillation,
    description: str | None = None,
) -> dict[str, Factors]:
    """
    Adam on `KL(routed ‖ export)` over the answers' tokens.

    Args:
        model (`PeftModel`): The routed one; it stays as it is.
        rows (`Answered`): To fit to.
        embeds (`torch.Tensor` of shape `(demographic_dim,)`): The profile's vector.
        factors (`Mapping[str, Factors]`): Where to begin.
        how (`Distillation`): Steps, rate, batches and their order.
        description (`str`, *optional*): Name of the progress bar; `None` for none.

    Returns:
        `dict`: Layer → factors.
    """
    trained = {name: tuple(nn.Parameter(factor.detach().clone()) for factor in pair) for name, pair in factors.items()}
    optimizer = torch.optim.Adam([factor for pair in trained.values() for factor in pair], lr=how.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / how.steps)
    draws = np.random.default_rng(how.seed)
    order: list[int] = []
    for _ in tqdm(range(how.steps), desc=description, unit="step", leave=False, disable=description is None):
        if len(order) < min(how.batch_size, len(rows)):
            order = draws.permutation(len(rows)).tolist()
        batch, order = rows.select(order[: how.batch_size]), order[how.batch_size :]
        kl, _, _ = _compare(model, batch, embeds, trained)
        optimizer.zero_grad()
        kl.mean().backward()
        optimizer.step()
        schedule.step()
    return {name: tuple(factor.detach() for factor in pair) for name, pair in trained.items()}


@torch.no_grad()
def measure(
    model: PeftModel, rows: Answered, embeds: torch.Tensor, factors: Mapping[str, Factors], batch_size: int
) -> Distance:
    """
    How far a LoRA with these factors is from the routed model.

    Raises:
        ValueError: One of them has logits that are not finite.
    """
    sums, counts, agreed = [], [], 0
    for batch in rows.batches(batch_size):
        kl, same, row = _compare(model, batch, embeds, factors)
        sums += kl.new_zeros(len(batch)).index_add_(0, row, kl).tolist()
        counts += row.bincount(minlength=len(batch)).tolist()
        agreed += int(same.sum())
    means = np.array(sums) / np.array(counts)
    if not np.isfinite(means).all():
        raise ValueError("The export or the routed model has logits that are not finite: there is no distance.")
    # Rounding makes a KL of equal distributions a little negative.
    mean, worst = (max(0.0, float(value)) for value in (np.mean(means), np.max(means)))
    return Distance(mean, worst, agreed / sum(counts), len(counts), sum(counts))


def _routed(model: PeftModel, rows: Answered, embeds: torch.Tensor) -> torch.Tensor:
    inputs, _ = rows.tensors(_device(model))
    profiles = embeds.to(_device(model)).expand(len(rows), -1)
    return model(**inputs, demographic_embeds=profiles, use_cache=False).logits


def _compare(
    model: PeftModel, rows: Answered, embeds: torch.Tensor, factors: Mapping[str, Factors]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token of the answers `(tokens,)`: KL, whether both have the same most likely token, and its row."""
    inputs, places = rows.tensors(_device(model))
    with torch.no_grad():
        routed = _routed(model, rows, embeds)[places].float().log_softmax(-1)
    with in_place_of_experts(model, factors):
        exported = model(**inputs, use_cache=False).logits[places].float().log_softmax(-1)
    kl = (routed.exp() * (routed - exported)).sum(-1)
    return kl, routed.argmax(-1) == exported.argmax(-1), places.nonzero()[:, 0]


def _device(model: PeftModel) -> torch.device:
    return next(model.parameters()).device
