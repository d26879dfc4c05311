# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Sampling in which each row of a batch draws for itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def row_sampling(
    temperature: float, top_p: float, seeds: Sequence[int], *, top_k: int = 0, min_p: float = 0.0
) -> LogitsProcessorList:
    """
    Processors with which a *greedy* `generate` samples; none for a temperature of 0.

    Args:
        temperature (`float`): Divides the logits.
        top_p (`float`): Mass of the most likely tokens that are drawn from; 1 for all.
        seeds (`Sequence[int]`): One per row of the batch.
        top_k (`int`): How many of the most likely tokens are drawn from; 0 for all.
        min_p (`float`): Share of the likeliest token's probability that a token needs; 0 for none.
    """
    processors = LogitsProcessorList()
    if temperature > 0:  # in the order of `generate`
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k > 0:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        if min_p > 0:
            processors.append(MinPLogitsWarper(min_p))
        processors.append(RowNoise(seeds))
    return processors


class RowNoise(LogitsProcessor):
    """
    Adds Gumbel noise to each row's logits, so that the largest of them is a draw from their softmax (the Gumbel-max
    trick).

    Each row has a generator of its own, from which each step takes the next numbers: with one for the batch, as
    `generate` samples, a row's draws would depend on how many rows there are before it.

    Args:
        seeds (`Sequence[int]`): One per row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self.generators: list[torch.Generator] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.generators is None:  # the device of the scores need not be that of the first weight
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = [
            torch.empty_like(row).exponential_(generator=generator)
            for row, generator in zip(scores, self.generators, strict=True)
        ]
        # A zero would make its token certain, even one that is excluded.
        return scores - torch.stack(noise).clamp_min(torch.finfo(scores.dtype).tiny).log()


class MixedSampling(LogitsProcessor):
    """
    Rows of one batch, each sampled by its own settings. Rows of equal settings are processed together.

    Args:
        settings (`Sequence[tuple]`): Of each row, what [`row_sampling`] takes but for the seeds: temperature, top_p,
            top_k, min_p.
        seeds (`Sequence[int]`): One per row.
    """

    def __init__(self, settings: Sequence[tuple[float, float, int, float]], seeds: Sequence[int]) -> None:
        rows: dict[tuple[float, float, int, float], list[int]] = {}
        for row, key in enumerate(settings):
            rows.setdefault(key, []).append(row)
        self.groups: list[tuple[list[int], LogitsProcessorList]] = []
        for (temperature, top_p, top_k, min_p), members in rows.items():
            own = [seeds[row] for row in members]
            self.groups.append((members, row_sampling(temperature, top_p, own, top_k=top_k, min_p=min_p)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mixed = scores.clone()
        for members, processors in self.groups:
            if processors:  # none are greedy
                mixed[members] = processors(input_ids[members], scores[members])
        return mixed
