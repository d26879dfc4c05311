# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Metrics that only make sense pooled over many cells: ratios whose denominator is near zero for single questions.

Shapes are those of `cells`: distributions `(cells, max_options)` in scale order. The caller always gives the marginal,
one row per cell, that of the cell's question. It comes from the *training* answers: a marginal of the test answers
would know something of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .cells import as_distributions, check_distributions, entropy, gap_closed, kl, weighted_mean
from .intervals import Estimate, bootstrap_interval, row_weights

MIN_INFORMATION = 0.01
"""Least mean KL(truth || marginal), in nats, of which a share is reported: of less there is nothing to explain."""

MIN_ENTROPY_GAP = 0.05
"""Least lower bound, in nats, of the collapse index's denominator: below, the index is not reported."""


def kl_explained(
    truth: np.ndarray,
    predicted: np.ndarray,
    marginal: np.ndarray,
    num_options: np.ndarray,
    weights: np.ndarray | None = None,
) -> float:
    """
    Share of what the profile tells about the answer that the prediction has learnt.

        1 - mean_c KL(p*_c || p_c) / mean_c KL(p*_c || marginal_c)

    1 is the truth, 0 no better than ignoring the profile, below 0 worse than ignoring it. It is [`gap_closed`] of KL.
    For an interval: [`bootstrap_interval`] of the two columns of KL, `lambda model, marginal: 1 - model / marginal`.

    Args:
        truth (`np.ndarray` of shape `(cells, max_options)`): True distributions `p*`.
        predicted (`np.ndarray` of shape `(cells, max_options)`): Predictions.
        marginal (`np.ndarray` of shape `(cells, max_options)`): Marginal of the training answers, by question.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's question.
        weights (`np.ndarray` of shape `(cells,)`, *optional*): As in [`weighted_mean`].

    Returns:
        `float`: `nan` where the marginal is all but the truth, less than `MIN_INFORMATION` nats from it.

    Raises:
        `ValueError`: There are no cells, or a row is not a distribution over its cell's options.
    """
    model = weighted_mean(kl(truth, predicted, num_options), weights)
    information = weighted_mean(kl(truth, marginal, num_options), weights)
    return gap_closed(model, information, 0.0) if information >= MIN_INFORMATION else float("nan")


def denominator_note(denominator: Estimate, name: str, least: float, *, bounded: bool = True) -> str | None:
    """
    Why an index is not reported: its denominator may be near zero, where the quotient means nothing.

    Args:
        denominator (`Estimate`): The denominator and its interval.
        name (`str`): What it is, for the note.
        least (`float`): Least lower bound, in nats.
        bounded (`bool`): Whether the lower bound must be known; else the value decides where clusters are too few for
            an interval.

    Returns:
        `str`, or `None` where the denominator is far enough from zero.
    """
    low = denominator.value if denominator.low is None and not bounded else denominator.low
    if low is not None and low >= least:
        return None
    bound = f"unknown ({denominator.note})" if low is None else f"{low:.3f} nats"
    return f"n/a: the lower bound of {name} is {bound}, where {least} nats are needed"


def collapse_index(
    truth: np.ndarray,
    predicted: np.ndarray,
    marginal: np.ndarray,
    num_options: np.ndarray,
    clusters: Sequence[np.ndarray],
    *,
    weights: np.ndarray | None = None,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """
    How far the predictions are spread out towards the marginal: a diagnostic, not a headline.

        (mean H(predicted) - mean H(truth)) / (mean H(marginal) - mean H(truth))

    0 is calibrated, 1 as spread as the marginal, below 0 over-confident. It says nothing of *where* the mass is: a
    confident wrong prediction scores like the truth, so read it beside [`kl_explained`]. The means are pooled: a third
    of real questions have a denominator near zero, and a mean of ratios would be made of those.

    Args:
        truth (`np.ndarray` of shape `(cells, max_options)`): True distributions; of many answers each, for the entropy
            of few is too low.
        predicted (`np.ndarray` of shape `(cells, max_options)`): Predictions.
        marginal (`np.ndarray` of shape `(cells, max_options)`): Marginal of the training answers, by question.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's question.
        clusters (sequence of `np.ndarray` of shape `(cells,)`): What to resample, see [`bootstrap_interval`].
        weights (`np.ndarray` of shape `(cells,)`, *optional*): As in [`weighted_mean`].
        level (`float`), num_samples (`int`), seed (`int`): see [`bootstrap_interval`].

    Returns:
        [`Estimate`]: without a value where the lower bound of the denominator's interval is under
        `MIN_ENTROPY_GAP` nats (or unknown, for few clusters); `note` says so.

    Raises:
        `ValueError`: There are no cells, or a row is not a distribution over its cell's options.
    """
    for name, probs in (("truth", truth), ("predicted", predicted), ("marginal", marginal)):
        check_distributions(name, probs, num_options)
    gaps = np.stack([entropy(predicted) - entropy(truth), entropy(marginal) - entropy(truth)], 1)
    options: dict[str, Any] = dict(weights=weights, level=level, num_samples=num_samples, seed=seed)
    gap = bootstrap_interval(gaps[:, 1], clusters, **options)
    if note := denominator_note(gap, "H(marginal) - H(truth)", MIN_ENTROPY_GAP):
        return Estimate(None, None, None, gap.n, note)
    return bootstrap_interval(gaps, clusters, np.divide, **options)


def profile_information(
    probs: np.ndarray, num_options: np.ndarray, question: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """
    What a cell's distribution adds to its question's mean, in nats: `KL(p_c || mean over the question's cells)`.

    Its mean over the cells of a question is the mutual information between profile and answer (the generalised
    Jensen-Shannon divergence of the profiles' distributions); over all cells, that information pooled over questions.

    Args:
        probs (`np.ndarray` of shape `(cells, max_options)`): Distributions.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's question.
        question (`np.ndarray` of shape `(cells,)`): Label of each cell's question.
        weights (`np.ndarray` of shape `(cells,)`, *optional*): As in [`weighted_mean`], also of the question's mean.

    Returns:
        `np.ndarray` of shape `(cells,)`: 0 for the only cell of a question.

    Raises:
        `ValueError`: There are no cells, a row is not a distribution, or the weights are no weights.
    """
    check_distributions("probs", probs, num_options)
    weights = row_weights(weights, len(probs))
    _, code = np.unique(question, return_inverse=True)
    sums, totals = np.zeros((code.max() + 1, probs.shape[1])), np.bincount(code, weights)
    np.add.at(sums, code, probs * weights[:, None])
    # A question whose cells all weigh nothing has no mean, and no say in any result either.
    mean = (sums / np.where(totals > 0, totals, 1.0)[:, None])[code]
    used = (probs > 0) & (mean > 0)
    divergence = np.sum(probs * np.log(np.where(used, probs, 1.0) / np.where(used, mean, 1.0)), axis=1)
    return np.where(divergence > 1e-12, divergence, 0.0)  # equal rows differ from their mean by rounding


def entropy_bias(shares: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """
    Nats by which the entropy of the shares of few answers is too low, as far as leaving out one answer tells.

        (n - 1) (H(shares) - sum_k shares_k H(shares without one answer k))        (the jackknife; Miller 1974)

    `(options - 1) / 2n` (Miller 1955) would count options that nobody chooses: of ten of which three are used, and 30
    answers, it is 0.15 nats where 0.06 are missing. KL from anything to shares of few answers is too high by the same.

    Args:
        shares (`np.ndarray` of shape `(cells, max_options)`): Of the answers of each cell.
        answers (`np.ndarray` of shape `(cells,)`): How many; of weighted ones, how many of equal weight would have
            the same variance.

    Returns:
        `np.ndarray` of shape `(cells,)`: At least 0; 0 of a single answer.
    """
    counts = shares * answers[:, None]
    left = np.maximum(counts - 1, 0)
    remaining = np.maximum(answers[:, None] - np.minimum(counts, 1), 0)
    own, without = _times_log(counts), _times_log(left)
    # Sums of x log x over all options, but for the one that lost an answer.
    sums = own.sum(1, keepdims=True) - own + without
    entropies = np.where(remaining > 0, np.log(np.where(remaining > 0, remaining, 1)), 0.0)
    entropies -= np.divide(sums, remaining, out=np.zeros_like(sums), where=remaining > 0)
    return np.maximum((answers - 1) * (entropy(shares) - (shares * entropies).sum(1)), 0.0)


def _times_log(values: np.ndarray) -> np.ndarray:
    return values * np.log(np.where(values > 0, values, 1.0))


def true_information(
    truth: np.ndarray,
    num_options: np.ndarray,
    question: np.ndarray,
    noise: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """
    [`profile_information`] of shares of few answers, less what their noise adds to it. A cell's own noise is in its
    question's mean too, so that of `n` cells, `noise (1 - 1/n)` is what it adds.

    Args:
        truth, num_options, question, weights: As in [`profile_information`].
        noise (`np.ndarray` of shape `(cells,)`): Nats by which the entropy of each row is too low.

    Returns:
        `np.ndarray` of shape `(cells,)`: May be below 0.
    """
    _, code = np.unique(question, return_inverse=True)
    found = profile_information(truth, num_options, question, weights)
    return found - noise * (1 - 1 / np.bincount(code)[code])


def spread_ratio(
    truth: np.ndarray,
    predicted: np.ndarray,
    num_options: np.ndarray,
    question: np.ndarray,
    weights: np.ndarray | None = None,
) -> float:
    """
    Predicted over true mutual information between profile and answer, pooled over questions.

        mean_c KL(p_c || p_question(c)) / mean_c KL(p*_c || p*_question(c))    (see [`profile_information`])

    0 is one answer for everybody (collapse), 1 as much difference between profiles as there is, above 1 exaggerated
    (stereotypes). It doesn't say whether the differences are the right ones: read it beside [`kl_explained`].

    Args:
        truth (`np.ndarray` of shape `(cells, max_options)`): True distributions; of many answers each, for sampling
            noise looks like a difference between profiles.
        predicted (`np.ndarray` of shape `(cells, max_options)`): Predictions.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's question.
        question (`np.ndarray` of shape `(cells,)`): Label of each cell's question.
        weights (`np.ndarray` of shape `(cells,)`, *optional*): As in [`weighted_mean`].

    Returns:
        `float`: `nan` where the truth is the same for all profiles.

    Raises:
        `ValueError`: as [`profile_information`].
    """
    true = weighted_mean(profile_information(truth, num_options, question, weights), weights)
    found = weighted_mean(profile_information(predicted, num_options, question, weights), weights)
    return found / true if true > 0 else float("nan")


def calibration(
    truth: np.ndarray,
    predicted: np.ndarray,
    num_options: np.ndarray,
    num_bins: int = 10,
    weights: np.ndarray | None = None,
) -> dict[str, Any]:
    """
    Do options that are given 30 % happen 30 % of the time? Reliability of all option probabilities, in equal bins.

        ECE = sum_b (W_b / W) |mean predicted in b - mean observed in b|

    Every (row, option) pair is one forecast, so that rare options count as much as the likely ones. The marginal is
    calibrated too: calibration alone doesn't show that a model knows anything of profiles. Noise does not cancel: on
    few answers a perfect model's ECE is above 0.

    Args:
        truth (`np.ndarray` of shape `(rows, max_options)` or `(rows,)`): True distributions, or answers as in [`nll`].
        predicted (`np.ndarray` of shape `(rows, max_options)`): Predictions.
        num_options (`np.ndarray` of shape `(rows,)`): Number of options of each row's question.
        num_bins (`int`): Bins of equal width over 0 to 1; the last one holds 1.
        weights (`np.ndarray` of shape `(rows,)`, *optional*): As in [`weighted_mean`], for all of a row's options.

    Returns:
        `dict`: `bins`, a list of `{"mean_predicted", "observed", "n"}` (n forecasts; no empty bins), and `ece`.

    Raises:
        `ValueError`: There are no rows, or a row is not a distribution over its options.
    """
    truth = as_distributions(truth, predicted.shape[1], num_options)
    check_distributions("truth", truth, num_options)
    check_distributions("predicted", predicted, num_options)
    pairs = np.arange(predicted.shape[1]) < num_options[:, None]
    mass = np.broadcast_to(row_weights(weights, len(predicted))[:, None], pairs.shape)[pairs]
    forecast, observed = predicted[pairs], truth[pairs]
    index = np.minimum((forecast * num_bins).astype(int), num_bins - 1)
    bins, ece = [], 0.0
    for current in np.unique(index[mass > 0]):
        rows = index == current
        means = [float(np.average(values[rows], weights=mass[rows])) for values in (forecast, observed)]
        bins.append({"mean_predicted": means[0], "observed": means[1], "n": int(rows.sum())})
        ece += float(mass[rows].sum() / mass.sum()) * abs(means[0] - means[1])
    return {"bins": bins, "ece": ece}
