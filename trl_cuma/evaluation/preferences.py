# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Preference metrics over cells with a known truth, exact: expectations over all pairs instead of a sample of them.

A pair is a person's answer `a ~ p(. | q, d)` over another option `b`, uniform over the others or drawn from the
reference's own distribution, equal draws dropped. A policy's implicit reward margin (DPO, arXiv 2305.18290,
equation 5) is `m(a, b) = beta · [log pi(a)/pi_ref(a) - log pi(b)/pi_ref(b)]`.
"""

from __future__ import annotations

import numpy as np


def pair_weights(truth: np.ndarray, option_mask: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """
    Probability of each (chosen, rejected) pair.

    Args:
        truth (`np.ndarray` of shape `(cells, options)`): true distributions p.
        option_mask (`np.ndarray` of shape `(cells, options)`): the options that the cell's question has.
        reference (`np.ndarray` of shape `(cells, options)`, *optional*): distribution that rejected options are drawn
            from; by default uniform over the other options.

    Returns:
        `np.ndarray` of shape `(cells, options, options)`: sums to 1 per cell, zero on the diagonal.
    """
    if reference is None:
        rejected = option_mask / (option_mask.sum(1, keepdims=True) - 1)
    else:
        rejected = reference
    weights = truth[:, :, None] * rejected[:, None, :] * ~np.eye(truth.shape[1], dtype=bool)
    return weights / weights.sum((1, 2), keepdims=True)


def pair_metrics(margin: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """
    Args:
        margin (`np.ndarray` of shape `(cells, options, options)`): reward of the first option minus the second's.
        weights (`np.ndarray` of the same shape): see [`pair_weights`].

    Returns:
        `pair_log_loss`, the mean of `-log sigmoid(margin)` (ln 2 for a policy equal to its reference), and
        `pair_accuracy`, the share of pairs with a positive margin (a tie counts half).
    """
    used = weights > 0
    margin = np.where(used, margin, 0.0)
    log_loss = weights * np.logaddexp(0.0, -margin)
    accuracy = weights * ((margin > 0) + 0.5 * (margin == 0))
    return {
        "pair_log_loss": float(log_loss.sum((1, 2)).mean()),
        "pair_accuracy": float(accuracy.sum((1, 2)).mean()),
    }


def implicit_margin(policy: np.ndarray, reference: np.ndarray, beta: float) -> np.ndarray:
    """Log-probabilities of policy and reference `(cells, options)` → margins `(cells, options, options)`."""
    finite = np.isfinite(policy) & np.isfinite(reference)
    reward = np.where(finite, beta * np.subtract(policy, reference, where=finite, out=np.zeros_like(policy)), 0.0)
    return reward[:, :, None] - reward[:, None, :]


def oracle_margin(weights: np.ndarray) -> np.ndarray:
    """The margin with the least log-loss: the log-odds that the first option is the chosen one of the pair."""
    floored = np.maximum(weights, 1e-300)
    return np.where(weights + weights.transpose(0, 2, 1) > 0, np.log(floored) - np.log(floored).transpose(0, 2, 1), 0)
