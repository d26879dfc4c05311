# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Does a model tell profiles apart by what they answer, or by more than that?

Shapes are those of `cells`. "Between" is the divergence of profiles from their question's mean
([`profile_information`]), "within" the entropy of one profile's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .cells import check_distributions, entropy
from .intervals import Estimate, bootstrap_interval, row_weights
from .pooled import MIN_INFORMATION, denominator_note, profile_information, true_information

CONSENSUS = 0.01
"""Most true mutual information between profile and answer, in nats, of a question that counts as consensus."""


def stereotyping_table(
    truth: np.ndarray,
    predicted: np.ndarray,
    num_options: np.ndarray,
    question: np.ndarray,
    clusters: Sequence[np.ndarray],
    *,
    group: Sequence[str | None] | None = None,
    weights: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Stereotypes as numbers: differences between profiles exaggerated, differences within a profile flattened.

        spread_ratio  = mean KL(p_c || p_q) / mean KL(p*_c || p*_q)    above 1: exaggerates what sets profiles apart
        entropy_ratio = mean H(p_c) / mean H(p*_c)                     below 1: flattens the differences inside one

    each pooled over cells. On consensus questions, those with less than 0.01 nats of true information, the ratio's
    denominator is zero by definition: there the predicted `between` divergence itself, in nats, beside the true one.
    Where the noise of few answers is more than half of that, consensus can't be told, and a question isn't among them.
    A ratio is not reported where the (lower bound of the) denominator is under 0.01 nats.

    The intervals resample the cells with each question's mean held fixed. Resample questions where there are many.

    Args:
        truth (`np.ndarray` of shape `(cells, max_options)`): True distributions, of many answers each.
        predicted (`np.ndarray` of shape `(cells, max_options)`): Predictions.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's question.
        question (`np.ndarray` of shape `(cells,)`): Label of each cell's question.
        clusters (sequence of `np.ndarray` of shape `(cells,)`): What to resample, see [`bootstrap_interval`]. In rows
            of the result whose cells share one label of a column, the other columns alone.
        group (sequence of `str` or `None`, *optional*): Each cell's group, for a row per group; `None` is left out.
            Give only groups of enough people to be named.
        weights (`np.ndarray` of shape `(cells,)`, *optional*): As in [`weighted_mean`].
        noise (`np.ndarray` of shape `(cells,)`, *optional*): Nats by which the entropy of `truth` is too low, as of
            the shares of few answers. It looks like a difference between profiles, and is taken out of both.
        level (`float`), num_samples (`int`), seed (`int`): see [`bootstrap_interval`].

    Returns:
        `dict`: `all` and `consensus` (`None` without such questions), and with `group` `groups`, a dict by name. Each
        is a dict of `spread_ratio` (not in `consensus`), `entropy_ratio`, `between`, `true_between` ([`Estimate`]s, in
        nats), `cells` and `questions`.

    Raises:
        `ValueError`: There are no cells, or a row is not a distribution over its cell's options.
    """
    check_distributions("truth", truth, num_options)
    check_distributions("predicted", predicted, num_options)
    weights = row_weights(weights, len(truth))
    between = profile_information(predicted, num_options, question, weights)
    noise = np.zeros(len(truth)) if noise is None else noise
    true_between = true_information(truth, num_options, question, noise, weights)
    values = np.stack([between, true_between, entropy(predicted), entropy(truth) + noise], 1)

    def row(cells: np.ndarray, ratio: bool = True) -> dict[str, Any]:
        own = [column[cells] for column in clusters]
        # A group's own rows may be of one label, the group: the other column is still there to resample.
        own = [column for column in own if len(np.unique(column)) > 1] or own[:1]

        def estimate(columns: list[int]) -> Estimate:
            return bootstrap_interval(
                values[cells][:, columns],
                own,
                np.divide if len(columns) == 2 else None,
                weights=weights[cells],
                level=level,
                num_samples=num_samples,
                seed=seed,
            )

        def quotient(columns: list[int], denominator: Estimate, what: str) -> Estimate:
            note = denominator_note(denominator, what, MIN_INFORMATION, bounded=False)
            return Estimate(None, None, None, denominator.n, note) if note else estimate(columns)

        between, true_between, true_entropy = (estimate([column]) for column in (0, 1, 3))
        result: dict[str, Any] = {}
        if ratio:
            result["spread_ratio"] = quotient([0, 1], true_between, "the truth's divergence between profiles")
        result |= {"entropy_ratio": quotient([2, 3], true_entropy, "H(truth)")}
        result |= {"between": between, "true_between": true_between}
        return result | {"cells": int(cells.sum()), "questions": len(np.unique(question[cells]))}

    _, code = np.unique(question, return_inverse=True)
    masses = np.bincount(code, weights)
    information = np.bincount(code, weights * true_between) / np.where(masses > 0, masses, 1.0)
    blurred = np.bincount(code, weights * noise) / np.where(masses > 0, masses, 1.0) > CONSENSUS / 2
    consensus = ((information < CONSENSUS) & (masses > 0) & ~blurred)[code]
    table: dict[str, Any] = {"all": row(np.ones(len(truth), dtype=bool))}
    table["consensus"] = row(consensus, ratio=False) if consensus.any() else None
    if group is not None:
        label = np.array(group, dtype=object)
        table["groups"] = {name: row(label == name) for name in sorted({name for name in group if name is not None})}
    return table


def neutral_divergence(
    predicted: np.ndarray,
    num_options: np.ndarray,
    prompt: np.ndarray,
    *,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """
    How much the profile changes answers that it has no bearing on (arithmetic, facts), in nats; ideally 0.

    Mean over cells of `KL(p_c || mean over the prompt's profiles)`: the mutual information between profile and answer.
    The interval resamples prompts.

    Args:
        predicted (`np.ndarray` of shape `(cells, max_options)`): Predictions for (prompt, profile) pairs.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's prompt.
        prompt (`np.ndarray` of shape `(cells,)`): Label of each cell's prompt.
        level (`float`), num_samples (`int`), seed (`int`): see [`bootstrap_interval`].

    Raises:
        `ValueError`: There are no cells, a row is not a distribution, or every prompt has a single profile.
    """
    if len(np.unique(prompt)) == len(prompt):
        raise ValueError(
            "Every `prompt` has a single profile: give each at least two, or there is nothing to compare."
        )
    values = profile_information(predicted, num_options, prompt)
    return bootstrap_interval(values, [prompt], level=level, num_samples=num_samples, seed=seed)
