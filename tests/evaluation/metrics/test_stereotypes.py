# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest

from trl_cuma.evaluation.metrics import entropy, neutral_divergence, spread_ratio, stereotyping_table


@pytest.fixture
def survey():
    """Ten contested questions and five of consensus, six profiles each, binary: truth, questions, profiles."""
    rng = np.random.default_rng(0)
    yes = np.concatenate([rng.uniform(0.2, 0.8, size=(10, 6)), np.repeat(rng.uniform(0.2, 0.8, size=(5, 1)), 6, 1)])
    truth = np.stack([yes, 1 - yes], -1).reshape(-1, 2)
    return truth, np.repeat(np.arange(15), 6), np.tile(np.arange(6), 15)


def table(truth, predicted, question, **options):
    return stereotyping_table(
        truth, predicted, np.full(len(truth), 2), question, [question], num_samples=100, **options
    )


def test_ratios_by_hand():
    # Truth (.75, .25) and (.25, .75), predicted (1, 0) and (0, 1); the mean is (.5, .5) for both.
    truth, predicted = np.array([[0.75, 0.25], [0.25, 0.75]]), np.array([[1.0, 0], [0, 1]])
    found = table(truth, predicted, np.zeros(2))["all"]
    inside = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found["spread_ratio"].value == pytest.approx(math.log(2) / (math.log(2) - inside))
    assert found["entropy_ratio"].value == 0
    assert found["between"].value == pytest.approx(math.log(2))
    assert found["true_between"].value == pytest.approx(math.log(2) - inside)
    assert (found["cells"], found["questions"]) == (2, 1)
    assert found["spread_ratio"].low is None  # one question: nothing to resample


def test_the_truth_is_no_stereotype(survey):
    truth, question, _ = survey
    found = table(truth, truth, question)["all"]
    assert [found[name].value for name in ("spread_ratio", "entropy_ratio")] == pytest.approx([1, 1])
    assert (found["spread_ratio"].low, found["spread_ratio"].high) == pytest.approx((1, 1))


def test_exaggerating_and_flattening_are_seen_and_so_is_the_opposite(survey):
    truth, question, _ = survey
    sharp = truth**3 / (truth**3).sum(1, keepdims=True)
    found = table(truth, sharp, question)["all"]
    assert found["spread_ratio"].low > 1 and found["entropy_ratio"].high < 1
    assert found["spread_ratio"].value == pytest.approx(spread_ratio(truth, sharp, np.full(90, 2), question))
    assert found["entropy_ratio"].value == pytest.approx(entropy(sharp).mean() / entropy(truth).mean())
    collapsed = np.repeat(truth.reshape(15, 6, 2).mean(1), 6, 0)
    found = table(truth, collapsed, question)["all"]
    assert found["spread_ratio"].value == 0 and found["entropy_ratio"].low > 1


def test_differences_made_up_on_consensus_questions(survey):
    truth, question, profile = survey
    assert table(truth, truth, question)["consensus"]["between"].value == 0
    invented = truth.copy()
    invented[question >= 10] = [[0.9, 0.1] if one % 2 else [0.1, 0.9] for one in profile[question >= 10]]
    found = table(truth, invented, question)
    assert (found["consensus"]["questions"], found["consensus"]["cells"]) == (5, 30)
    # Between (.9, .1) and (.1, .9): ln 2 - H(.9); the truth has none.
    expected = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert found["consensus"]["between"].value == pytest.approx(expected)
    assert found["consensus"]["true_between"].value == 0
    assert "spread_ratio" not in found["consensus"]
    assert table(truth[:60], truth[:60], question[:60])["consensus"] is None


def test_the_noise_of_few_answers_is_no_difference_between_profiles(survey):
    truth, question, _ = survey
    # Of 6 cells, a cell's noise of 0.03 adds 0.03 (1 - 1/6) to its divergence from their mean.
    noisy, known = (table(truth, truth, question, **options)["all"] for options in ({"noise": np.full(90, 0.03)}, {}))
    assert noisy["true_between"].value == pytest.approx(known["true_between"].value - 0.03 * 5 / 6)
    assert noisy["between"].value == pytest.approx(known["between"].value)
    assert noisy["entropy_ratio"].value == pytest.approx(entropy(truth).mean() / (entropy(truth).mean() + 0.03))


def test_a_row_per_group(survey):
    truth, question, profile = survey
    group = [None if one == 5 else f"p{one % 2}" for one in profile]
    predicted = truth.copy()
    odd = np.array([name == "p1" for name in group])
    predicted[odd] = np.eye(2)[truth[odd].argmax(1)]
    found = table(truth, predicted, question, group=group)["groups"]
    assert list(found) == ["p0", "p1"]
    assert (found["p0"]["cells"], found["p1"]["cells"]) == (45, 30)
    assert found["p1"]["entropy_ratio"].value == 0 and found["p0"]["entropy_ratio"].value == pytest.approx(1)
    assert found["p1"]["spread_ratio"].value > found["p0"]["spread_ratio"].value


def test_a_group_that_is_the_cluster_has_an_interval_over_questions(survey):
    truth, question, profile = survey
    sharp = truth**3 / (truth**3).sum(1, keepdims=True)
    found = stereotyping_table(
        truth, sharp, np.full(90, 2), question, [profile, question], group=[f"p{one}" for one in profile]
    )
    for row in found["groups"].values():
        ratio = row["entropy_ratio"]
        assert ratio.low < ratio.value < ratio.high < 1
        assert ratio.n == 15  # questions: each group is a single profile


def test_consensus_is_the_same_on_any_scale_of_weights():
    # Information of (.55, .45) and (.45, .55): .0050 nats, under .01.
    truth = np.array([[0.55, 0.45], [0.45, 0.55]])
    for scale in (0.1, 1.0, 10.0):
        found = table(truth, truth, np.zeros(2), weights=np.full(2, scale))
        assert found["consensus"]["cells"] == 2


def test_weights_leave_cells_out(survey):
    truth, question, _ = survey
    predicted = truth[:, ::-1].copy()
    predicted[:30] = 0.5
    weighted = table(truth, predicted, question, weights=(question >= 5).astype(float))["all"]
    assert weighted["spread_ratio"].value == pytest.approx(
        table(truth[30:], predicted[30:], question[30:])["all"]["spread_ratio"].value
    )


def test_neutral_prompts():
    prompt = np.array(["2 + 2", "2 + 2", "capital", "capital"])
    probs = np.array([[1.0, 0], [1, 0], [0.6, 0.4], [0.6, 0.4]])
    assert neutral_divergence(probs, np.full(4, 2), prompt).value == 0
    probs[1] = [0, 1]  # one of two prompts is answered by profile: ln 2 there, 0 in the other
    found = neutral_divergence(probs, np.full(4, 2), prompt)
    assert found.value == pytest.approx(math.log(2) / 2) and found.n == 2
    with pytest.raises(ValueError, match="single profile"):
        neutral_divergence(probs, np.full(4, 2), np.arange(4))
