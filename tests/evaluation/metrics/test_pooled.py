# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest

from trl_cuma.evaluation.metrics import (
    calibration,
    collapse_index,
    entropy,
    entropy_bias,
    kl,
    kl_explained,
    profile_information,
    spread_ratio,
)


@pytest.fixture
def survey():
    """Twelve questions with three options, eight profiles each: truth, marginal, question labels."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet([0.6, 0.6, 0.6], size=(12, 8))
    marginal = np.broadcast_to(truth.mean(1, keepdims=True), truth.shape)
    return truth.reshape(-1, 3), marginal.reshape(-1, 3), np.repeat(np.arange(12), 8)


def options(rows: np.ndarray) -> np.ndarray:
    return np.full(len(rows), rows.shape[1])


def test_kl_explained_by_hand():
    truth, marginal = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.5, 0.5]])
    predicted = np.array([[0.8, 0.2], [0.5, 0.5]])
    # KL of the marginal: ln 2 and 0; of the prediction: ln 1.25 and 0. A mean of ratios would be 0/0 in the second.
    expected = 1 - math.log(1.25) / math.log(2)
    assert kl_explained(truth, predicted, marginal, options(truth)) == pytest.approx(expected)
    assert kl_explained(truth, predicted, marginal, options(truth), np.array([2.0, 5])) == pytest.approx(expected)
    assert kl_explained(truth, truth, marginal, options(truth)) == pytest.approx(1, abs=1e-6)
    assert kl_explained(truth, marginal, marginal, options(truth)) == 0
    assert kl_explained(truth, 1 - predicted, marginal, options(truth)) < 0
    assert math.isnan(kl_explained(marginal, predicted, marginal, options(truth)))


def test_kl_explained_has_no_share_of_next_to_nothing():
    # KL((.5 + d, .5 - d) || (.5, .5)) is 2 d² and a little: .0050 for d = .05, .0201 for d = .1.
    marginal = np.array([[0.5, 0.5]] * 2)
    for spread, known in ((0.05, False), (0.1, True)):
        truth = np.array([[0.5 + spread, 0.5 - spread], [0.5 - spread, 0.5 + spread]])
        found = kl_explained(truth, np.array([[0.9, 0.1]] * 2), marginal, options(truth))
        assert (found < -10) if known else math.isnan(found)


def test_collapse_index_runs_from_the_truth_to_the_marginal(survey):
    truth, marginal, question = survey
    index = [collapse_index(truth, p, marginal, options(truth), [question]) for p in (truth, marginal)]
    assert [round(found.value, 9) for found in index] == [0, 1]
    sharp = truth**4 / (truth**4).sum(1, keepdims=True)
    assert collapse_index(truth, sharp, marginal, options(truth), [question]).value < 0


def test_collapse_index_is_pooled(survey):
    truth, marginal, question = survey
    predicted = (truth + marginal) / 2
    found = collapse_index(truth, predicted, marginal, options(truth), [question])
    h_predicted, h_truth, h_marginal = (entropy(p).mean() for p in (predicted, truth, marginal))
    assert found.value == pytest.approx((h_predicted - h_truth) / (h_marginal - h_truth))
    assert found.low < found.value < found.high and found.n == 12


def test_collapse_index_without_a_denominator(survey):
    truth, marginal, question = survey
    near = 0.9 * marginal + 0.1 * truth  # a truth that hardly depends on the profile
    found = collapse_index(near, truth, marginal, options(truth), [question])
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "0.05 nats are needed" in found.note
    one = collapse_index(truth, truth, marginal, options(truth), [np.zeros(len(truth))])
    assert one.value is None and "unknown (fewer than 5 clusters" in one.note


def test_collapse_index_does_not_see_where_the_mass_is(survey):
    truth, marginal, question = survey
    wrong = truth[:, [1, 2, 0]]
    assert collapse_index(truth, wrong, marginal, options(truth), [question]).value == pytest.approx(0, abs=1e-9)
    assert kl_explained(truth, wrong, marginal, options(truth)) < 0  # which is why it stands beside this one


def test_profile_information_by_hand():
    # Two opposite profiles: the mean is (1/2, 1/2), each is ln 2 from it. A lone profile is its question's mean.
    probs = np.array([[1.0, 0], [0, 1], [0.3, 0.7]])
    np.testing.assert_allclose(
        profile_information(probs, options(probs), np.array(["a", "a", "b"])), [math.log(2), math.log(2), 0]
    )
    # Weights 3 and 1: the mean is (3/4, 1/4).
    weighted = profile_information(probs[:2], options(probs[:2]), np.zeros(2), np.array([3.0, 1]))
    np.testing.assert_allclose(weighted, [math.log(4 / 3), math.log(4)])


def test_profile_information_is_the_mutual_information(survey):
    truth, marginal, question = survey
    information = profile_information(truth, options(truth), question)
    # I(profile; answer | question) = H(answer | question) - H(answer | question, profile)
    assert information.mean() == pytest.approx(entropy(marginal).mean() - entropy(truth).mean())
    np.testing.assert_allclose(information, kl(truth, marginal, options(truth)), atol=1e-6)


def test_spread_ratio(survey):
    truth, marginal, question = survey
    arguments = (options(truth), question)
    assert spread_ratio(truth, truth, *arguments) == pytest.approx(1)
    assert spread_ratio(truth, marginal, *arguments) == 0
    assert spread_ratio(truth, truth[:, [1, 2, 0]], *arguments) == pytest.approx(1)  # as much, though the wrong ones
    certain = np.eye(3)[truth.argmax(1)]
    assert spread_ratio(truth, certain, *arguments) > 1
    assert math.isnan(spread_ratio(marginal, truth, *arguments))


def test_calibration_by_hand():
    predicted = np.array([[0.92, 0.08], [0.92, 0.08], [0.6, 0.4]])
    answers = np.array([0, 1, 0])
    # Forecasts .08, .08 (half happened), .4 (no), .6 (yes), .92, .92 (half):
    # ECE = (2·|.08 - .5| + |.4 - 0| + |.6 - 1| + 2·|.92 - .5|) / 6
    found = calibration(answers, predicted, np.array([2, 2, 2]))
    assert [round(part["mean_predicted"], 9) for part in found["bins"]] == [0.08, 0.4, 0.6, 0.92]
    assert [part["observed"] for part in found["bins"]] == [0.5, 0, 1, 0.5]
    assert [part["n"] for part in found["bins"]] == [2, 1, 1, 2]
    assert found["ece"] == pytest.approx((2 * 0.42 + 0.4 + 0.4 + 2 * 0.42) / 6)


def test_certain_forecasts_are_in_the_last_bin():
    found = calibration(np.array([0, 0]), np.array([[1.0, 0], [0.92, 0.08]]), np.array([2, 2]))
    assert [part["mean_predicted"] for part in found["bins"]] == pytest.approx([0.04, 0.96])
    assert [part["n"] for part in found["bins"]] == [2, 2]


def test_calibration_of_the_truth_and_of_the_marginal(survey):
    truth, marginal, _ = survey
    assert calibration(truth, truth, options(truth))["ece"] == pytest.approx(0)
    assert calibration(truth, marginal, options(truth))["ece"] == pytest.approx(0, abs=1e-9)
    over = truth**4 / (truth**4).sum(1, keepdims=True)
    assert calibration(truth, over, options(truth))["ece"] > 0.05


def test_calibration_ignores_what_is_no_option_and_weighs_rows():
    truth, predicted = np.array([[1.0, 0, 0], [0, 0, 1]]), np.array([[1.0, 0, 0], [0.2, 0.3, 0.5]])
    found = calibration(truth, predicted, np.array([2, 3]))
    assert sum(part["n"] for part in found["bins"]) == 5
    assert found["bins"][-1] == {"mean_predicted": 1.0, "observed": 1.0, "n": 1}  # 1 is in the last bin
    assert calibration(truth, predicted, np.array([2, 3]), weights=np.array([1.0, 0]))["ece"] == 0


# ------------------------------------------------------------------------------------------------ few answers
def test_the_bias_of_an_entropy_is_the_jackknifes():
    counts = np.array([[3, 1, 0, 2], [5, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    total = counts.sum(1)
    found = entropy_bias(counts / total[:, None], total.astype(float))
    for row, n, bias in zip(counts, total, found, strict=True):
        without = [row - np.eye(4)[option] for option in np.repeat(np.arange(4), row)]
        mean = np.mean([entropy((each / max(each.sum(), 1))[None])[0] for each in without])
        assert bias == pytest.approx((n - 1) * (entropy((row / n)[None])[0] - mean))
    assert found[1] == found[2] == 0 < found[0]


@pytest.mark.parametrize("probs", [[0.93, 0.04, 0.01, 0.01, 0.01, 0, 0, 0, 0, 0], [0.1] * 10, [0.5, 0.3, 0.2]])
def test_entropies_of_thirty_answers_are_right_on_average(probs):
    probs = np.array(probs)
    shares = np.random.default_rng(0).multinomial(30, probs, size=4000) / 30
    missing = entropy(probs[None])[0] - entropy(shares).mean()
    left = missing - entropy_bias(shares, np.full(4000, 30.0)).mean()
    assert missing > 0.03 and abs(left) < 0.35 * missing
