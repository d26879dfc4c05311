# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
A LoRA that answers as the routed model does for one profile, where no LoRA can be equal to it: the experts under their
mean gates, refined by a short distillation on the user's prompts; and how far it is, on prompts held out from that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

LEAST_PROMPTS = 8
"""Different prompts without which nothing is distilled or measured."""


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
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Answered:
    """
    Draw an answer of the routed model to each prompt, at temperature 1: what the export has to be near to.

    Args:
        encoded (`Sequence`): Tokens of the prompts.
        embeds (`torch.Tensor` of shape `(demographic_dim,)`): The profile's vector.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    tokens: list[list[int]] = [[] for _ in encoded]
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(len(encoded[row]) for row in rows)
            ids = torch.full((len(rows), width), pad)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, width - len(encoded[row]) :] = torch.tensor(encoded[row])
                mask[place, width - len(encoded[row]) :] = 1
            made = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                demographic_embeds=embeds.to(device).expand(len(rows), -1),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=pad,
            )
            ends = model.generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [ends]
            for row, new in zip(rows, made[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(new, 1) if token in ends), len(new))
                tokens[row] = [*encoded[row], *new[:end]]
    return Answered(tokens, [len(each) for each in encoded])


class Distiller:
    """
    Makes and measures LoRAs of one model, profile by profile.

    Args:
        model (`PeftModel`): With the CuMA adapter.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        encoded (`Sequence`): Tokens of the user's prompts, each different.
        steps (`int`): Of the distillation.
        learning_rate (`float`): Of Adam at its first step; it falls linearly.
        batch_size (`int`): Prompts of a step.
        max_new_tokens (`int`): Length of an answer, at most.
        held_out (`float`): Share of the prompts that an export is measured on, and never fitted to.
        seed (`int`): Of the answers, the split and the order.

    Raises:
        ValueError: There are too few prompts.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        encoded: Sequence[Sequence[int]],
        *,
        steps: int = 200,
        learning_rate: float = 1e-3,
        batch_size: int = 8,
        max_new_tokens: int = 32,
        held_out: float = 0.25,
        seed: int = 0,
    ) -> None:
        if len(encoded) < LEAST_PROMPTS:
            raise ValueError(
                f"`prompts` has {len(encoded)} different prompts; it takes at least {LEAST_PROMPTS} to fit an export "
                "to some and measure it on others. Pass prompts as the export will get them."
            )
        self.model, self.tokenizer, self.encoded = model, tokenizer, encoded
        self.steps, self.learning_rate, self.batch_size = steps, learning_rate, batch_size
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.device = next(model.parameters()).device
        order = np.random.default_rng(seed).permutation(len(encoded)).tolist()
        number = max(2, round(held_out * len(order)))
        self.held_out, self.fitted = sorted(order[:number]), sorted(order[number:])

    def answers(self, embeds: torch.Tensor) -> tuple[Answered, Answered]:
        """To the prompts to fit to, and to those held out."""
        found = answer(
            self.model, self.tokenizer, self.encoded, embeds, self.max_new_tokens, self.batch_size, self.seed
        )
        return found.select(self.fitted), found.select(self.held_out)

    @torch.no_grad()
    def start(self, embeds: torch.Tensor, rows: Answered, rank: int) -> dict[str, Factors]:
        """The experts under their mean gates over these rows, at a rank."""
        with mean_gates(self.model) as gates:
            for batch in rows.batches(self.batch_size):
                self._routed(batch, embeds)
        collapsed = collapse(self.model, embeds.to(self.device), gates)
        return {name: to_rank(factors, rank) for name, factors in collapsed.items()}

    def distill(
        self, embeds: torch.Tensor, rows: Answered, factors: Mapping[str, Factors], description: str | None = None
    ) -> dict[str, Factors]:
        """
        Adam on `KL(routed ‖ export)` over the answers' tokens.

        Args:
            embeds (`torch.Tensor` of shape `(demographic_dim,)`): The profile's vector.
            rows (`Answered`): To fit to.
            factors (`Mapping[str, Factors]`): Where to begin.
            description (`str`, *optional*): Name of the progress bar; `None` for none.

        Returns:
            `dict`: Layer → factors.
        """
        trained = {name: tuple(nn.Parameter(f.detach().clone()) for f in pair) for name, pair in factors.items()}
        optimizer = torch.optim.Adam([factor for pair in trained.values() for factor in pair], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        draws = np.random.default_rng(self.seed)
        order: list[int] = []
        for _ in tqdm(range(self.steps), desc=description, unit="step", leave=False, disable=description is None):
            if len(order) < min(self.batch_size, len(rows)):
                order = draws.permutation(len(rows)).tolist()
            batch, order = rows.select(order[: self.batch_size]), order[self.batch_size :]
            kl, _, places = self._compare(batch, embeds, trained)
            loss = (kl * places).sum() / places.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return {name: tuple(factor.detach() for factor in pair) for name, pair in trained.items()}

    @torch.no_grad()
    def measure(self, embeds: torch.Tensor, rows: Answered, factors: Mapping[str, Factors]) -> Distance:
        """How far a LoRA with these factors is from the routed model."""
        means, agreed, tokens = [], 0, 0
        for batch in rows.batches(self.batch_size):
            kl, same, places = self._compare(batch, embeds, factors)
            means += ((kl * places).sum(1) / places.sum(1)).tolist()
            agreed += int((same & places).sum())
            tokens += int(places.sum())
        # Rounding makes a KL of equal distributions a little negative.
        mean, worst = (max(0.0, float(value)) for value in (np.mean(means), np.max(means)))
        if not math.isfinite(worst):
            raise ValueError(
                "The export's distance from the routed model is not finite: one of them has no finite logits."
            )
        return Distance(mean, worst, agreed / tokens, len(means), tokens)

    def _routed(self, rows: Answered, embeds: torch.Tensor) -> torch.Tensor:
        inputs, _ = rows.tensors(self.device)
        profiles = embeds.to(self.device).expand(len(rows), -1)
        return self.model(**inputs, demographic_embeds=profiles, use_cache=False).logits

    def _compare(
        self, rows: Answered, embeds: torch.Tensor, factors: Mapping[str, Factors]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(rows, seq)`: KL, whether both have the same most likely token, and the answers' places."""
        inputs, places = rows.tensors(self.device)
        with _evaluating(self.model):
            with torch.no_grad():
                routed = self._routed(rows, embeds).float().log_softmax(-1)
            with in_place_of_experts(self.model, factors):
                exported = self.model(**inputs, use_cache=False).logits.float().log_softmax(-1)
        kl = (routed.exp() * (routed - exported)).sum(-1)
        return kl, routed.argmax(-1) == exported.argmax(-1), places


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
