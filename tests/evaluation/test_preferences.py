# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest

from trl_cuma.evaluation.preferences import implicit_margin, oracle_margin, pair_metrics, pair_weights


def test_pair_metrics_by_brute_force():
    truth, mask = np.array([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]]), np.array([[1, 1, 1], [1, 1, 0]], dtype=bool)
    policy, reference = np.log([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]), np.log([[0.4, 0.3, 0.3], [0.6, 0.3, 0.1]])
    policy[1, 2] = reference[1, 2] = -np.inf
    beta, losses, hits = 0.5, [], []
    for cell in range(2):
        options = np.flatnonzero(mask[cell])
        loss = hit = 0.0
        for a in options:
            for b in options:
                if a != b:
                    weight = truth[cell, a] / (len(options) - 1)
                    margin = beta * ((policy - reference)[cell, a] - (policy - reference)[cell, b])
                    loss += weight * math.log(1 + math.exp(-margin))
                    hit += weight * (margin > 0)
        losses.append(loss)
        hits.append(hit)
    scores = pair_metrics(implicit_margin(policy, reference, beta), pair_weights(truth, mask))
    assert scores["pair_log_loss"] == pytest.approx(np.mean(losses))
    assert scores["pair_accuracy"] == pytest.approx(np.mean(hits))


def test_a_policy_equal_to_its_reference_scores_ln_2_and_the_oracle_less():
    truth, mask = np.array([[0.7, 0.2, 0.1]]), np.ones((1, 3), dtype=bool)
    weights = pair_weights(truth, mask)
    same = implicit_margin(np.log(truth), np.log(truth), beta=0.1)
    assert pair_metrics(same, weights) == {"pair_log_loss": pytest.approx(math.log(2)), "pair_accuracy": 0.5}
    # P(a is chosen | the pair {a, b}) = p_a / (p_a + p_b): its entropy, weighted by how often the pair comes up
    best = sum(
        (truth[0, a] + truth[0, b]) / 2 * -sum(x * math.log(x) for x in (s, 1 - s))
        for a, b in ((0, 1), (0, 2), (1, 2))
        for s in [truth[0, a] / (truth[0, a] + truth[0, b])]
    )
    assert pair_metrics(oracle_margin(weights), weights)["pair_log_loss"] == pytest.approx(best)


def test_pairs_with_rejected_options_from_the_reference():
    """p(a) · ref(b) without a == b, by hand: 0.75·0.5 to 0.25·0.5, normalised."""
    weights = pair_weights(np.array([[0.75, 0.25]]), np.ones((1, 2), dtype=bool), reference=np.array([[0.5, 0.5]]))
    np.testing.assert_allclose(weights, [[[0, 0.75], [0.25, 0]]])
