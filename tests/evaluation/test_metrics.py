# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from trl_cuma.evaluation import emd, entropy, expected_accuracy, gap_closed, kl, summarise_cells


def random_cells(seed: int, num_cells: int = 50, max_options: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    num_options = rng.integers(2, max_options + 1, size=num_cells)
    mask = np.arange(max_options) < num_options[:, None]
    truth, predicted = (rng.gamma(0.5, size=mask.shape) * mask for _ in range(2))
    return truth / truth.sum(1, keepdims=True), predicted / predicted.sum(1, keepdims=True), num_options


def test_emd_is_the_wasserstein_distance_on_the_unit_scale():
    truth, predicted, num_options = random_cells(0)
    expected = []
    for p, q, options in zip(truth, predicted, num_options, strict=True):
        places = np.linspace(0, 1, options)
        expected.append(wasserstein_distance(places, places, p[:options], q[:options]))
    np.testing.assert_allclose(emd(truth, predicted, num_options), expected, atol=1e-12)


def test_emd_from_one_end_to_the_other_is_one_on_every_scale():
    truth = np.array([[1.0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    predicted = np.array([[0, 1.0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(emd(truth, predicted, np.array([2, 3, 4])), 1.0)


def test_kl_by_hand():
    truth, predicted = np.array([[0.5, 0.5, 0.0]]), np.array([[0.25, 0.75, 0.0]])
    # 0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75) = 0.5 ln(4/3)
    assert kl(truth, predicted, np.array([2]))[0] == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)


def test_kl_floors_a_confident_mistake():
    truth, predicted = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    # q' = (1e-8, 1) / (1 + 1e-8), so KL = ln(1e8 + 1)
    assert kl(truth, predicted, np.array([2]))[0] == pytest.approx(math.log(1e8 + 1))


def test_kl_of_the_truth_is_zero_and_otherwise_positive():
    truth, predicted, num_options = random_cells(1)
    np.testing.assert_allclose(kl(truth, truth, num_options), 0, atol=1e-6)
    assert (kl(truth, predicted, num_options) > 0).all()


def test_entropy():
    probs = np.array([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]])
    np.testing.assert_allclose(entropy(probs), [math.log(4), 0])


def test_expected_accuracy_is_the_true_share_of_the_predicted_option():
    truth = np.array([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]])
    predicted = np.array([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(expected_accuracy(truth, predicted), [0.3, 0.2])  # a tie: the first option


def test_gap_closed():
    assert gap_closed(0.05, marginal=0.2, oracle=0.0) == pytest.approx(0.75)  # EMD: lower is better
    assert gap_closed(0.6, marginal=0.4, oracle=0.65) == pytest.approx(0.8)  # accuracy: higher is better
    assert gap_closed(0.3, marginal=0.2, oracle=0.0) == pytest.approx(-0.5)
    assert math.isnan(gap_closed(0.2, marginal=0.2, oracle=0.2))


def test_summary_is_the_mean_over_cells():
    truth, predicted, num_options = random_cells(2)
    outside = np.linspace(0, 0.1, len(truth))
    summary = summarise_cells(truth, predicted, num_options, outside)
    assert set(summary) == {"emd", "kl", "accuracy", "entropy", "outside"}
    assert summary["emd"] == pytest.approx(emd(truth, predicted, num_options).mean())
    assert summary["outside"] == pytest.approx(0.05)
    oracle = summarise_cells(truth, truth, num_options)
    assert oracle["emd"] == 0
    assert oracle["accuracy"] == pytest.approx(truth.max(1).mean())
    assert "outside" not in oracle


@pytest.mark.parametrize(
    "row", [[0.5, 0.4, 0.0], [0.5, 0.4, 0.1], [1.5, -0.5, 0.0], [float("nan"), 1.0, 0.0]], ids=str
)
def test_what_is_no_distribution_over_the_options_is_refused(row):
    good = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    bad = np.array([[0.5, 0.5, 0.0], row])
    for metric in (emd, kl):
        with pytest.raises(ValueError, match="`predicted` row 1 is not a distribution over its 2 options"):
            metric(good, bad, np.array([2, 2]))
        with pytest.raises(ValueError, match="`truth` row 1"):
            metric(bad, good, np.array([2, 2]))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="one row per entry of `num_options`"):
        emd(np.eye(3), np.eye(3), np.array([3, 3]))
    with pytest.raises(ValueError, match="holds no cells"):
        summarise_cells(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0, dtype=int))
