# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Metrics of a predicted option distribution against the true one, per (question, profile) cell.

Distributions are arrays `(cells, max_options)` over a question's options in scale order, zero beyond the cell's own
`num_options` and summing to 1 over them. A mean over cells weighs every cell the same: it is *group-conditional*,
unlike a distance between answers pooled over people, where a prediction that ignores the profile can score perfectly.
"""

from __future__ import annotations

import numpy as np

from .intervals import row_weights

PROBABILITY_FLOOR = 1e-8
"""Least predicted probability of an option in `kl`, so that one confident mistake cannot make a mean infinite."""


def emd(truth: np.ndarray, predicted: np.ndarray, num_options: np.ndarray) -> np.ndarray:
    """
    Earth mover's distance between two distributions over an ordered scale, 0 to 1.

    The Wasserstein-1 distance with the options at `0, 1/(K-1), …, 1`:

        EMD = sum_{k=1}^{K-1} |F_truth(k) - F_predicted(k)| / (K - 1),    F: cumulative distribution, K = num_options

    Args:
        truth (`np.ndarray` of shape `(cells, max_options)`): True distributions.
        predicted (`np.ndarray` of shape `(cells, max_options)`): Predicted distributions.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's question.

    Returns:
        `np.ndarray` of shape `(cells,)`.

    Raises:
        `ValueError`: A row is not a distribution over its cell's options.
    """
    check_distributions("truth", truth, num_options)
    check_distributions("predicted", predicted, num_options)
    gaps = np.abs(np.cumsum(truth - predicted, 1))
    inner = np.arange(truth.shape[1]) < num_options[:, None] - 1
    return (gaps * inner).sum(1) / (num_options - 1)


def kl(truth: np.ndarray, predicted: np.ndarray, num_options: np.ndarray) -> np.ndarray:
    """
    Kullback-Leibler divergence of the prediction from the truth, in nats.

        KL(p || q) = sum_k p_k log(p_k / q'_k),    q'_k = max(q_k, 1e-8) / sum_j max(q_j, 1e-8)

    The floor `PROBABILITY_FLOOR` bounds a cell's value at `log 1e8 ≈ 18.4`; options with `p_k = 0` add nothing.

    Args:
        truth (`np.ndarray` of shape `(cells, max_options)`): True distributions `p`.
        predicted (`np.ndarray` of shape `(cells, max_options)`): Predicted distributions `q`.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's question.

    Returns:
        `np.ndarray` of shape `(cells,)`.

    Raises:
        `ValueError`: A row is not a distribution over its cell's options.
    """
    check_distributions("truth", truth, num_options)
    check_distributions("predicted", predicted, num_options)
    floored = np.maximum(predicted, PROBABILITY_FLOOR) * (np.arange(truth.shape[1]) < num_options[:, None])
    floored = floored / floored.sum(1, keepdims=True)
    chosen = truth > 0
    return np.sum(truth * np.log(np.where(chosen, truth, 1.0) / np.where(chosen, floored, 1.0)), axis=1)


def entropy(probs: np.ndarray) -> np.ndarray:
    """
    Entropy in nats: `H(p) = -sum_k p_k log p_k`, with `0 log 0 = 0`.

    Args:
        probs (`np.ndarray` of shape `(cells, max_options)`): Distributions.

    Returns:
        `np.ndarray` of shape `(cells,)`.
    """
    return -np.sum(probs * np.log(np.where(probs > 0, probs, 1.0)), axis=1)


def expected_accuracy(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """
    Probability that the predicted option is the one that a person of the cell chooses: `p[argmax_k q_k]`.

    This is the mean of the accuracy over answers drawn from the truth, without their sampling noise. Of equally
    probable options the first is predicted.

    Args:
        truth (`np.ndarray` of shape `(cells, max_options)`): True distributions `p`.
        predicted (`np.ndarray` of shape `(cells, max_options)`): Predicted distributions `q`.

    Returns:
        `np.ndarray` of shape `(cells,)`.
    """
    return truth[np.arange(len(truth)), predicted.argmax(1)]


def gap_closed(value: float, marginal: float, oracle: float) -> float:
    """
    Share of the way from the training marginal to the oracle: `(marginal - value) / (marginal - oracle)`.

    0 is no better than ignoring the profile, 1 is the truth, below 0 is worse than ignoring it. For a metric that is
    better when lower (with EMD and KL the oracle is 0) and for one that is better when higher alike.

    Args:
        value (`float`): The metric's mean for the model.
        marginal (`float`): The metric's mean for the training marginal.
        oracle (`float`): The metric's mean for the truth.

    Returns:
        `float`: `nan` where marginal and oracle are equal: the profile has no bearing on the answer.
    """
    return float("nan") if marginal == oracle else (marginal - value) / (marginal - oracle)


def nll(truth: np.ndarray, predicted: np.ndarray, num_options: np.ndarray) -> np.ndarray:
    """
    Negative log-likelihood in nats: of individuals' answers, or expected under the true distribution.

        NLL = -log q'_a    or    NLL = -sum_k p_k log q'_k = H(p) + KL(p || q),    q' as in [`kl`]

    Args:
        truth (`np.ndarray` of shape `(rows,)` or `(rows, max_options)`): The option `a` that each person chose, an
            integer from 0 in scale order; or true distributions `p`.
        predicted (`np.ndarray` of shape `(rows, max_options)`): Predicted distributions `q`. For answers of
            individuals one row per answer: `predicted[answer_cell]`.
        num_options (`np.ndarray` of shape `(rows,)`): Number of options of each row's question.

    Returns:
        `np.ndarray` of shape `(rows,)`.

    Raises:
        `ValueError`: An answer is not one of the options, or a row is not a distribution over its options.
    """
    truth = as_distributions(truth, predicted.shape[1], num_options)
    return entropy(truth) + kl(truth, predicted, num_options)


def weighted_mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """
    Mean over cells: `sum_c w_c v_c / sum_c w_c`.

    With equal weights a metric is group-conditional: each (question, profile) cell counts once. With the number of
    people (or the sum of their survey weights) in each cell it is population-weighted: large groups count more.

    Args:
        values (`np.ndarray` of shape `(cells,)`): A metric per cell.
        weights (`np.ndarray` of shape `(cells,)`, *optional*): Non-negative weights; by default equal.

    Raises:
        `ValueError`: There are no cells, or the weights are no weights.
    """
    return float(np.average(values, weights=row_weights(weights, len(values))))


def answer_distributions(
    cell: np.ndarray, choice: np.ndarray, num_options: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """
    The distributions of individuals' answers per cell: `p[c, k] = sum_{i in c, a_i = k} w_i / sum_{i in c} w_i`.

    Of few answers they are noisy: their entropy is too low and the divergence between their cells too high, by about
    `(K - 1) / 2n` nats with n answers to K options (Miller 1955), and a perfect prediction has an EMD above 0. Use
    cells with many answers, or metrics of single answers ([`nll`], accuracy).

    Args:
        cell (`np.ndarray` of shape `(answers,)`): Index of each answer's cell.
        choice (`np.ndarray` of shape `(answers,)`): The option chosen, from 0 in scale order.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's question.
        weights (`np.ndarray` of shape `(answers,)`, *optional*): Survey weights; by default equal.

    Returns:
        `np.ndarray` of shape `(cells, max(num_options))`.

    Raises:
        `ValueError`: A cell has no answer (or none with a weight), or an answer is not one of the options.
    """
    _check_choices(choice, num_options[cell])
    counts = np.zeros((len(num_options), int(num_options.max())))
    np.add.at(counts, (cell, choice), row_weights(weights, len(choice)))
    totals = counts.sum(1, keepdims=True)
    if (totals == 0).any():
        raise ValueError(f"Cell {int(totals.argmin())} has no answer with a positive weight: leave such cells out.")
    return counts / totals


def summarise_cells(
    truth: np.ndarray, predicted: np.ndarray, num_options: np.ndarray, outside: np.ndarray | None = None
) -> dict[str, float]:
    """
    Means over cells.

    Args:
        truth (`np.ndarray` of shape `(cells, max_options)`): True distributions.
        predicted (`np.ndarray` of shape `(cells, max_options)`): Predictions, renormalised over the options.
        num_options (`np.ndarray` of shape `(cells,)`): Number of options of each cell's question.
        outside (`np.ndarray` of shape `(cells,)`, *optional*): Probability that the model gave to anything but an
            option, before renormalisation.

    Returns:
        `dict[str, float]`: `emd`, `kl`, `accuracy` (expected), `entropy` (of the prediction) and, where given,
        `outside`.

    Raises:
        `ValueError`: There are no cells, or a row is not a distribution over its cell's options.
    """
    if len(truth) == 0:
        raise ValueError("`truth` holds no cells, so there is no mean to take.")
    summary = {
        "emd": emd(truth, predicted, num_options),
        "kl": kl(truth, predicted, num_options),
        "accuracy": expected_accuracy(truth, predicted),
        "entropy": entropy(predicted),
    }
    if outside is not None:
        summary["outside"] = outside
    return {name: float(np.mean(values)) for name, values in summary.items()}


def as_distributions(truth: np.ndarray, max_options: int, num_options: np.ndarray) -> np.ndarray:
    """Answers `(rows,)` as distributions with all mass on the answer, `(rows, max_options)`; else `truth` itself."""
    truth = np.asarray(truth)
    if truth.ndim != 1:
        return truth
    _check_choices(truth, num_options)
    return np.eye(max_options)[truth]


def _check_choices(choice: np.ndarray, num_options: np.ndarray) -> None:
    wrong = (choice < 0) | (choice >= num_options)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"Answer {row} is option {choice[row]}, but its question has the options 0 to {num_options[row] - 1}. "
            f"Leave rows without a valid answer out, and report how many."
        )


def check_distributions(name: str, probs: np.ndarray, num_options: np.ndarray) -> None:
    if probs.ndim != 2 or len(probs) != len(num_options):
        raise ValueError(
            f"`{name}` must have the shape (cells, max_options) with one row per entry of `num_options` "
            f"({len(num_options)}), got {probs.shape}."
        )
    beyond = np.arange(probs.shape[1]) >= num_options[:, None]
    wrong = (probs < 0).any(1) | ((probs * beyond).sum(1) != 0) | ~(np.abs(probs.sum(1) - 1) <= 1e-4)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"`{name}` row {row} is not a distribution over its {num_options[row]} options: it must be non-negative, "
            f"zero beyond them and sum to 1, but sums to {probs[row].sum():.6f}. Renormalise over the options first."
        )
