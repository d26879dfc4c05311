# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from trl_cuma.evaluation import metrics
from trl_cuma.evaluation.metrics import (
    answer_distributions,
    emd,
    entropy,
    expected_accuracy,
    gap_closed,
    kl,
    nll,
    summarise_cells,
    weighted_mean,
)


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
    # Without the division it would be ln(1e8), 1e-8 less.
    assert kl(truth, predicted, np.array([2]))[0] == pytest.approx(math.log(1e8 + 1), rel=0, abs=1e-10)


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


def test_nll_of_answers_by_hand():
    predicted = np.array([[0.25, 0.75, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    # q' of the last row is (1, 1e-8) / (1 + 1e-8): option 1 costs ln(1e8 + 1)
    expected = [-math.log(0.25), -math.log(0.5), math.log(1e8 + 1)]
    np.testing.assert_allclose(nll(np.array([0, 2, 1]), predicted, np.array([2, 3, 2])), expected, atol=1e-6)


def test_nll_under_the_truth_is_the_mean_over_its_answers():
    truth, predicted, num_options = random_cells(3)
    rows = np.arange(len(truth))
    by_option = [nll(np.minimum(rows * 0 + k, num_options - 1), predicted, num_options) for k in range(7)]
    # Beyond a cell's options the truth is 0, so that what stands there has no say.
    np.testing.assert_allclose(nll(truth, predicted, num_options), (truth * np.stack(by_option, 1)).sum(1))


def test_an_answer_that_is_no_option_is_refused():
    predicted = np.array([[0.5, 0.5, 0.0]] * 2)
    for answer in (2, -1):
        with pytest.raises(ValueError, match=f"Answer 1 is option {answer}, but its question has the options 0 to 1"):
            nll(np.array([0, answer]), predicted, np.array([2, 2]))
        with pytest.raises(ValueError, match="Answer 1 is option"):
            answer_distributions(np.array([0, 0]), np.array([0, answer]), np.array([2]))


def test_equal_weight_per_cell_and_by_people():
    # Cells with EMD 0 and 1: half, however many people are in them; by 30 and 10 people a quarter.
    truth, predicted = np.array([[1.0, 0], [1, 0]]), np.array([[1.0, 0], [0, 1]])
    values = emd(truth, predicted, np.array([2, 2]))
    assert weighted_mean(values) == 0.5
    assert weighted_mean(values, np.array([30, 10])) == 0.25


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0]], ids=str)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="`weights` must"):
        weighted_mean(np.array([0.0, 1.0]), np.array(weights))
    with pytest.raises(ValueError, match="no rows"):
        weighted_mean(np.array([]))


def test_answers_make_a_distribution_per_cell():
    cell, choice = np.array([0, 0, 0, 1, 1]), np.array([1, 1, 0, 2, 0])
    num_options = np.array([2, 3])
    shares = answer_distributions(cell, choice, num_options)
    np.testing.assert_allclose(shares, [[1 / 3, 2 / 3, 0], [0.5, 0, 0.5]])
    # Survey weights: cell 0 has 0.5 + 0.5 against 3, cell 1 has 1 against 3.
    weighted = answer_distributions(cell, choice, num_options, np.array([0.5, 0.5, 3, 1, 3]))
    np.testing.assert_allclose(weighted, [[0.75, 0.25, 0], [0.75, 0, 0.25]])
    with pytest.raises(ValueError, match="Cell 2 has no answer"):
        answer_distributions(cell, choice, np.array([2, 3, 2]))


def test_the_mean_nll_of_answers_is_that_of_their_distribution():
    rng = np.random.default_rng(0)
    _, predicted, num_options = random_cells(4, num_cells=5)
    cell = rng.integers(5, size=400)
    choice, weights = rng.integers(num_options[cell]), rng.random(400)
    shares = answer_distributions(cell, choice, num_options, weights)
    predicted = predicted[:, : shares.shape[1]]
    by_answer = weighted_mean(nll(choice, predicted[cell], num_options[cell]), weights)
    by_cell = weighted_mean(nll(shares, predicted, num_options), np.bincount(cell, weights))
    assert by_answer == pytest.approx(by_cell)


def test_the_metrics_of_cells_need_numpy_alone():
    # The quick start runs without the packages that the other metrics use.
    code = (
        "import sys; sys.modules.update({'scipy': None, 'sklearn': None})\n"
        "import numpy as np; from trl_cuma.evaluation import metrics\n"
        "p = np.eye(2); print(metrics.summarise_cells(p, p, np.array([2, 2]))['emd'])"
    )
    root = Path(metrics.__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "0.0\n", done.stderr
