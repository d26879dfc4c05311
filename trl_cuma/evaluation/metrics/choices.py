# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Metrics of predicted answers against the answers that individuals gave.

Answers are options in scale order, from 0. A prediction of -1 is *invalid*: no option could be read from it. It counts
as wrong, and is never left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...extras import needs_extra
from .intervals import row_weights

INVALID = -1
"""The prediction that is no option."""


def accuracy(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> float:
    """
    Share of answers that are predicted: `sum_i w_i [a_i = â_i] / sum_i w_i`.

    Args:
        truth (`np.ndarray` of shape `(answers,)`): Options that people chose.
        predicted (`np.ndarray` of shape `(answers,)`): Options predicted, -1 where invalid.
        weights (`np.ndarray` of shape `(answers,)`, *optional*): Survey weights; by default equal.

    Raises:
        `ValueError`: There are no answers, the lengths differ, or `truth` holds an invalid answer.
    """
    truth, predicted, weights = _check(truth, predicted, weights)
    return float(np.average(truth == predicted, weights=weights))


def macro_f1(
    truth: np.ndarray,
    predicted: np.ndarray,
    question: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> float:
    """
    F1 of each option, averaged over the options that occur (chosen or predicted): pooled, or per question.

    Pooled over questions, as published, option 1 of one question is the same class as option 1 of another, whatever
    they mean. With `question` it is the mean over questions of each question's own macro-F1.

    Args:
        truth (`np.ndarray` of shape `(answers,)`): Options that people chose.
        predicted (`np.ndarray` of shape `(answers,)`): Options predicted, -1 where invalid: a missed answer of the
            option chosen, but no class of its own.
        question (`np.ndarray` of shape `(answers,)`, *optional*): Labels of the questions.
        weights (`np.ndarray` of shape `(answers,)`, *optional*): Survey weights; by default equal.

    Raises:
        `ValueError`: as [`accuracy`].
    """
    # Here and below, not above: the quick start's metrics need numpy alone.
    with needs_extra("evaluation", "The macro F1"):
        from sklearn.metrics import f1_score

    truth, predicted, weights = _check(truth, predicted, weights)
    if question is not None:
        parts = [question == label for label in np.unique(question)]
        return float(np.mean([macro_f1(truth[part], predicted[part], weights=weights[part]) for part in parts]))
    labels = np.setdiff1d(np.union1d(truth, predicted), [INVALID])
    return float(f1_score(truth, predicted, labels=labels, average="macro", sample_weight=weights, zero_division=0.0))


def country_macro_accuracy(
    truth: np.ndarray, predicted: np.ndarray, country: Sequence[str | None], weights: np.ndarray | None = None
) -> float:
    """
    Mean over countries of each country's [`accuracy`]: small countries count as much as large ones.

    Args:
        truth (`np.ndarray` of shape `(answers,)`): Options that people chose.
        predicted (`np.ndarray` of shape `(answers,)`): Options predicted, -1 where invalid.
        country (sequence of `str` or `None`): Each answer's country (or another group); `None` is left out.
        weights (`np.ndarray` of shape `(answers,)`, *optional*): Survey weights within a country; by default equal.

    Raises:
        `ValueError`: as [`accuracy`], or no answer has a country.
    """
    found = country_accuracies(truth, predicted, country, weights)
    if not len(found):
        raise ValueError("`country` is missing in every row, so there is no mean over countries.")
    return float(np.mean(found))


def country_accuracies(
    truth: np.ndarray, predicted: np.ndarray, country: Sequence[str | None], weights: np.ndarray | None = None
) -> np.ndarray:
    """Each country's [`accuracy`], `(countries,)`; see [`country_macro_accuracy`] for the arguments."""
    truth, predicted, weights = _check(truth, predicted, weights)
    labels = np.array(country, dtype=object)
    parts = [labels == name for name in dict.fromkeys(name for name in country if name is not None)]
    return np.array([accuracy(truth[part], predicted[part], weights[part]) for part in parts])


def wvb_emd(truth: Sequence[float], predicted: Sequence[float | None], low: float, high: float) -> float:
    """
    Earth mover's distance of one question as WorldValuesBench's own script computes it (`evaluation/evaluate.py`).

    The Wasserstein-1 distance between all people's answers and all valid scores, both as `(s - low) / (high - low)`.
    As in that script: scores are truncated towards 0, those outside the scale are kept, and people whose score is
    invalid stay on the side of the truth. The benchmark reports the mean over questions.

    It compares two piles of answers and forgets who gave which: predictions that ignore the profile can score 0, and
    with 21 people per question even draws from the truth score about 0.10. For comparison with published numbers only;
    [`emd`] per cell is the corrected form.

    Args:
        truth (sequence of `float`): People's answers on the question's scale.
        predicted (sequence of `float` or `None`): The model's scores, `None` (or `nan`) where invalid.
        low (`float`): Least answer of the scale.
        high (`float`): Greatest answer of the scale.

    Raises:
        `ValueError`: There are no answers or no valid score, an answer is missing, or the scale is empty.
    """
    with needs_extra("evaluation", "The pooled EMD"):
        from scipy.stats import wasserstein_distance

    answers = np.array(truth, dtype=float)
    scores = np.array([np.nan if score is None else score for score in predicted], dtype=float)
    scores = scores[~np.isnan(scores)]
    if not low < high:
        raise ValueError(f"`low` must be below `high`, got {low} and {high}.")
    if len(answers) == 0 or np.isnan(answers).any():
        raise ValueError("`truth` must hold at least one answer and none missing: drop people without an answer.")
    if len(scores) == 0:
        raise ValueError(f"`predicted` has no valid score among {len(predicted)}: report the question as failed.")
    places = [(np.trunc(values) - low) / (high - low) for values in (answers, scores)]
    return float(wasserstein_distance(*places))


def _check(
    truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise ValueError(
            f"`truth` and `predicted` must have one option per answer, got shapes {truth.shape}, {predicted.shape}."
        )
    if (truth < 0).any():
        raise ValueError(f"`truth` row {int((truth < 0).argmax())} is no option: leave out people without an answer.")
    return truth, predicted, row_weights(weights, len(truth))
