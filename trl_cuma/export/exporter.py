# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Profiles' LoRAs of one routed model, all of one rank, each with its distance from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..adapter.export import Factors, adapted_layers, collapse, exported_adapter, is_exact, to_rank
from ..generation.batches import check_length
from .distill import Answered, Distance, Distillation, answer, average, distill, measure

MAX_DEFAULT_RANK = 64


@dataclass(frozen=True)
class Exported:
    """
    A profile's LoRA.

    Args:
        factors (`dict[str, Factors]`): Layer → A and B.
        distance (`Distance`): From the routed model.
        averaged (`Distance`, *optional*): The same of the mean gates alone, before the distillation.
    """

    factors: dict[str, Factors]
    distance: Distance
    averaged: Distance | None = None


class Exporter:
    """
    Makes the LoRAs of one model. Where the profile alone decides its gates they are the adapter itself; otherwise they
    are distilled on the user's prompts, and measured on others of them.

    Args:
        model (`PeftModel`): With one active CuMA adapter, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        encoded (`Sequence`): Tokens of the user's prompts, each different. Without any an exact export is measured on
            random tokens.
        rank (`int`, *optional*): Of all layers of all exports. By default the least that holds an exact one; of the
            others the rank of all experts, 64 at most.
        how (`Distillation`): How it is fitted and measured.

    Attributes:
        exact (`bool`): Whether exports are the adapter itself.

    Raises:
        ValueError: The adapter can't be exported (see [`~trl_cuma.adapter.export.exported_adapter`]), or there are too
            few prompts.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        encoded: Sequence[Sequence[int]] = (),
        *,
        rank: int | None = None,
        how: Distillation | None = None,
    ) -> None:
        if model.training:
            raise ValueError("The model is in training mode, where dropout is on. Call `model.eval()` first.")
        self.model, self.tokenizer, self.encoded, self.how = model, tokenizer, list(encoded), how or Distillation()
        adapter_name, config = exported_adapter(model)
        ranks = [layer.r[adapter_name] for layer in adapted_layers(model, adapter_name).values()]
        one_a = config.share_a and config.film_hidden is None
        # With a router that reads tokens, no expert's mean gate need be zero.
        used = config.experts_per_token if config.routing == "demographic" else config.num_experts
        natural = max(ranks) * (1 if one_a else used)
        if rank is not None and rank < 1:
            raise ValueError(f"`rank` is {rank}, expected at least 1.")
        self.exact = is_exact(config) and (rank is None or rank >= natural)
        self.rank = rank or (natural if self.exact else min(natural, MAX_DEFAULT_RANK))
        for number, tokens in enumerate(self.encoded):
            check_length(model, tokens, self.how.max_new_tokens, f"Prompt {number}")
        if self.encoded:
            self.fitted, self.held_out = self.how.split(len(self.encoded))
        elif not self.exact:
            raise ValueError(
                "This adapter's LoRA for a profile is an approximation, fitted to prompts: its router reads the "
                "token, or the profile shifts the experts (FiLM), or `rank` is below what an exact one takes. Pass "
                "`prompts`."
            )

    def export(self, embeds: torch.Tensor, description: str | None = None) -> Exported:
        """
        The LoRA of one profile.

        Args:
            embeds (`torch.Tensor` of shape `(demographic_dim,)`): Its vector.
            description (`str`, *optional*): Name of the progress bar over steps; `None` for none.
        """
        model, how = self.model, self.how
        embeds = embeds.to(next(model.parameters()).device)
        if self.exact:
            factors = {name: to_rank(pair, self.rank) for name, pair in collapse(model, embeds).items()}
            rows = self._random()
            if self.encoded:
                rows = answer(model, self.tokenizer, [self.encoded[row] for row in self.held_out], embeds, how)
            return Exported(factors, measure(model, rows, embeds, factors, how.batch_size))
        answered = answer(model, self.tokenizer, self.encoded, embeds, how)
        fitted, held_out = answered.select(self.fitted), answered.select(self.held_out)
        started = average(model, fitted, embeds, self.rank, how)
        factors = distill(model, fitted, embeds, started, how, description)
        before, after = (measure(model, held_out, embeds, each, how.batch_size) for each in (started, factors))
        return Exported(factors, after, before)

    def _random(self, rows: int = 8, tokens: int = 16) -> Answered:
        """Rows of random tokens, each place after the first an answer's: for exact exports they do as well as any."""
        vocabulary = self.model.get_base_model().get_input_embeddings().num_embeddings
        drawn = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(self.how.seed))
        return Answered(drawn.tolist(), [1] * rows)
