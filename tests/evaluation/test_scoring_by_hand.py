# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A survey small enough to do by hand, with weights and questions of different scales: the whole document of it."""

import numpy as np
import pytest

from trl_cuma.evaluation.prediction import SurveyPrediction
from trl_cuma.evaluation.scoring import score_prediction

# Cells: country A and B on q1 (2 options), A and B on q2 (3 options).
PREDICTED = [[0.6, 0.4, 0], [0.2, 0.8, 0], [0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]
MARGINAL = {"q1": np.array([0.3, 0.7]), "q2": np.array([0.25, 0.25, 0.5])}


def survey(
    cell, choice, person, weight, predicted=PREDICTED, questions=("q1", "q1", "q2", "q2"), options=(2, 2, 3, 3)
):
    return SurveyPrediction(
        question_id=np.array(questions),
        num_options=np.array(options),
        demographic=[{"country": "A"}, {"country": "B"}],
        profile=np.arange(len(questions)) % 2,
        predicted=np.array(predicted, dtype=float),
        outside=np.zeros(len(questions)),
        truth=None,
        answer_cell=np.array(cell),
        answer_choice=np.array(choice),
        answer_person=np.array(person),
        answer_weight=np.array(weight, dtype=float),
        num_rows=len(cell),
    )


@pytest.fixture(scope="module")
def document():
    # p and q of A, with weights 1 and 3; r of B with weight 2. q didn't answer q2.
    answers = [(0, 0, "p", 1), (0, 1, "q", 3), (1, 0, "r", 2), (2, 2, "p", 1), (3, 1, "r", 2)]
    return score_prediction(survey(*zip(*answers, strict=True)), MARGINAL, min_group_size=1, num_samples=50)[0]


def test_answers(document):
    found = {name: entry["value"] for name, entry in document["metrics"].items()}
    # Likeliest: 0, 1, 2, 0. p is right twice, of 9 in weight; the marginal (1; 2) for q and p's second: 3 + 1.
    assert found["accuracy"] == pytest.approx(2 / 9)
    assert document["metrics"]["accuracy"]["marginal"] == pytest.approx(4 / 9)
    loss = 1 * np.log(0.6) + 3 * np.log(0.4) + 2 * np.log(0.2) + 1 * np.log(0.7) + 2 * np.log(0.3)
    assert found["nll"] == pytest.approx(-loss / 9)
    loss = 1 * np.log(0.3) + 3 * np.log(0.7) + 2 * np.log(0.3) + 1 * np.log(0.5) + 2 * np.log(0.25)
    assert document["metrics"]["nll"]["marginal"] == pytest.approx(-loss / 9)
    # A: 2 of 5 in weight, B: 0 of 4.
    assert found["country_macro_accuracy"] == pytest.approx((2 / 5 + 0) / 2)
    # q1, 0: 1 hit of 3 chosen and 4 predicted; 1: none. q2, 2: 1 hit of 1 and 1; the others: none.
    assert found["macro_f1_question"] == pytest.approx(((2 / 7 + 0) / 2 + (0 + 0 + 1) / 3) / 2)
    assert found["macro_f1_pooled"] == pytest.approx((2 * 1 / (3 + 6) + 0 + 1) / 3)
    # Not weighted. q1: answers 0, 1, 0 and predictions 0, 0, 1 are the same pile. q2: {2, 1} and {2, 0} of 0 to 2.
    assert found["wvb_emd"] == pytest.approx((0 + 0.25) / 2)


def test_cells_of_groups(document):
    found = {name: entry["value"] for name, entry in document["metrics"].items()}
    # Shares: (1/4, 3/4), (1, 0), (0, 0, 1), (0, 1, 0). Cumulated differences over the steps of the scale.
    distances = [0.35, 0.8, (0.1 + 0.3) / 2, (0.5 + 0.2) / 2]
    assert found["emd"] == pytest.approx(np.mean(distances))
    assert found["emd_population"] == pytest.approx(np.average(distances, weights=[4, 2, 1, 2]))
    groups = {entry["group"]: entry for entry in document["groups"]["country"]}
    assert groups["A"]["accuracy"]["value"] == pytest.approx(2 / 5) and groups["B"]["accuracy"]["value"] == 0
    assert groups["A"]["emd"]["value"] == pytest.approx((0.35 + 0.2) / 2)
    assert (groups["A"]["n"], groups["A"]["people"], groups["B"]["n"], groups["B"]["people"]) == (3, 2, 2, 1)


def test_stereotyping_of_a_prediction_that_is_sure():
    """Everybody's two groups of 40 answer 3 : 1 and 1 : 3 to ten questions; predicted is 1 : 0 and 0 : 1."""
    questions, people = 10, 40
    cell = np.repeat(np.arange(2 * questions), people)
    choice = ((np.arange(len(cell)) % people < 10) != (cell % 2 == 1)).astype(int)
    person = [f"{number % 2}/{row % people}" for row, number in enumerate(cell.tolist())]
    prediction = survey(
        cell,
        choice,
        person,
        np.ones(len(cell)),
        predicted=[[1, 0], [0, 1]] * questions,
        questions=[f"q{index // 2}" for index in range(2 * questions)],
        options=[2] * 2 * questions,
    )
    document, _ = score_prediction(prediction, {}, num_samples=50)

    def uncertainty(*counts):
        return -sum(count / sum(counts) * np.log(count / sum(counts)) for count in counts)

    # The noise of 40 answers, by the jackknife about 1/80 nats: by half in the divergence of two.
    uncertain = uncertainty(30, 10)
    noise = 39 * (uncertain - 0.75 * uncertainty(29, 10) - 0.25 * uncertainty(30, 9))
    assert noise == pytest.approx(1 / 80, rel=0.05)
    row = document["stereotyping"]["all"]
    assert row["entropy_ratio"]["value"] == 0
    assert row["true_between"]["value"] == pytest.approx(np.log(2) - uncertain - noise / 2)
    assert row["spread_ratio"]["value"] == pytest.approx(np.log(2) / (np.log(2) - uncertain - noise / 2))
    assert document["stereotyping"]["consensus"] is None
    # What was said to be certain came true in 3 of 4, what was said to be impossible in 1 of 4.
    assert document["calibration"]["ece"] == pytest.approx(0.25)
    assert [(each["mean_predicted"], each["observed"]) for each in document["calibration"]["bins"]] == [
        (0, pytest.approx(0.25)),
        (1, pytest.approx(0.75)),
    ]


def test_inequity_and_groups_count_answers_by_weight():
    """Of 100 people each, half are right; in A those weigh thrice as much, so that 3/4 of A and 1/2 of B are right."""
    cell, right = np.repeat([0, 1], 100), np.arange(200) % 2 == 0
    weight = np.where(right & (cell == 0), 3.0, 1.0)
    prediction = survey(
        cell,
        np.where(right, 0, 1),
        [f"p{index}" for index in range(200)],
        weight,
        predicted=[[0.6, 0.4]] * 2,
        questions=["q1", "q1"],
        options=[2, 2],
    )
    document, _ = score_prediction(prediction, {}, num_samples=50)
    groups = {entry["group"]: entry["accuracy"]["value"] for entry in document["groups"]["country"]}
    assert groups == {"A": pytest.approx(0.75), "B": pytest.approx(0.5)}
    found = document["inequity"]["country"]
    assert found["sigma_raw"] == pytest.approx(0.125)  # of 0.75 and 0.5
    assert found["worst_raw"] == pytest.approx(0.5) and found["worst_n"] == 100
