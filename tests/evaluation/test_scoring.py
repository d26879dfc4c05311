# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""From predictions to the document: hand-computed values, and what each metric is held against."""

from dataclasses import replace

import numpy as np
import pytest

from trl_cuma.evaluation.cell_scores import Scores, measure
from trl_cuma.evaluation.metrics import macro_f1
from trl_cuma.evaluation.prediction import SurveyPrediction
from trl_cuma.evaluation.scoring import score_prediction

NOBODY = np.zeros(0, dtype=np.int64)


def published(predicted, truth, countries, questions):
    """Cells of countries with a known truth, in pairs of country and question."""
    return SurveyPrediction(
        question_id=np.array(questions),
        num_options=np.full(len(questions), len(truth[0])),
        demographic=[{"country": name} for name in sorted(set(countries))],
        profile=np.array([sorted(set(countries)).index(name) for name in countries]),
        predicted=np.array(predicted, dtype=float),
        outside=np.full(len(questions), 0.25),
        truth=np.array(truth, dtype=float),
        answer_cell=NOBODY,
        answer_choice=NOBODY,
        answer_person=np.zeros(0, dtype=str),
        answer_weight=np.zeros(0),
        num_rows=len(questions),
    )


TRUTH = [[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.4, 0.6]]
CELLS = (["A", "B", "A", "B"], ["q1", "q1", "q2", "q2"])
MARGINAL = {"q1": np.array([0.7, 0.3]), "q2": np.array([0.3, 0.7])}


def people(choices, countries, persons, weights=None, predicted=None):
    """One question of three options; each profile is a country, predicted 0.5, 0.3, 0.2."""
    names = sorted(set(countries))
    probs = np.tile([0.5, 0.3, 0.2], (len(names), 1)) if predicted is None else np.array(predicted, dtype=float)
    return SurveyPrediction(
        question_id=np.full(len(names), "q"),
        num_options=np.full(len(names), 3),
        demographic=[{"country": name} for name in names],
        profile=np.arange(len(names)),
        predicted=probs,
        outside=np.full(len(names), np.nan),
        truth=None,
        answer_cell=np.array([names.index(name) for name in countries]),
        answer_choice=np.array(choices),
        answer_person=np.array(persons),
        answer_weight=np.ones(len(choices)) if weights is None else np.array(weights, dtype=float),
        num_rows=len(choices),
    )


def values(document):
    return {name: entry["value"] for name, entry in document["metrics"].items()}


def test_cells_with_a_truth():
    predicted = [[0.8, 0.2], [0.7, 0.3], [0.3, 0.7], [0.3, 0.7]]
    document, tables = score_prediction(published(predicted, TRUTH, *CELLS), MARGINAL, num_samples=50)
    found = values(document)
    # Of two options the EMD is the difference of a share: 0.1, 0.2, 0.1, 0.1; the marginal's 0.2, 0.2, 0.1, 0.1.
    assert found["emd"] == pytest.approx(0.125)
    assert document["metrics"]["emd"]["marginal"] == pytest.approx(0.15)
    assert document["metrics"]["emd"]["unit"] == "country × question" and document["metrics"]["emd"]["n"] == 2
    # The likelier option of each prediction: 0.9, 0.5, 0.8, 0.6 of the people choose it.
    assert found["accuracy"] == pytest.approx(0.7)

    def divergence(p, q):
        return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))

    own = np.mean([divergence(p, q) for p, q in zip(TRUTH, predicted, strict=True)])
    blind = np.mean([divergence(p, MARGINAL[q]) for p, q in zip(TRUTH, CELLS[1], strict=True)])
    assert found["kl"] == pytest.approx(own)
    assert found["kl_explained"] == pytest.approx(1 - own / blind)
    assert found["outside"] == pytest.approx(0.25)
    assert "emd_population" not in found and "macro_f1_pooled" not in found  # there are no people
    assert "inequity" not in document
    assert tables.keys() == {"cells"}
    assert document["counts"] == {
        "rows": 4,
        "cells": 4,
        "answers": 0,
        "people": 0,
        "profiles": 2,
        "questions": 2,
        "bad_rows": {},
    }
    # Countries are no people: both are named. A: 0.9 and 0.8 of accuracy; B, the worse, is first.
    groups = document["groups"]["country"]
    assert [entry["group"] for entry in groups] == ["B", "A"]
    assert groups[1]["accuracy"]["value"] == pytest.approx(0.85)
    assert groups[1]["emd"]["value"] == pytest.approx(0.1)


@pytest.mark.parametrize(("which", "explained"), [("truth", 1.0), ("marginal", 0.0)])
def test_truth_and_marginal_are_the_ends_of_the_scale(which, explained):
    predicted = TRUTH if which == "truth" else [MARGINAL[question] for question in CELLS[1]]
    found = values(score_prediction(published(predicted, TRUTH, *CELLS), MARGINAL, num_samples=50)[0])
    assert found["kl_explained"] == pytest.approx(explained)
    assert found["spread_ratio"] == pytest.approx(explained)


def test_questions_without_training_answers_have_no_marginal():
    document, _ = score_prediction(published(TRUTH, TRUTH, *CELLS), {"q1": MARGINAL["q1"]}, num_samples=50)
    assert document["metrics"]["kl_explained"]["note"].endswith("over the 2 of 4 cells with training answers")
    assert document["metrics"]["emd"]["marginal"] is None  # of half of the cells it would be no comparison
    assert [panel["marginal"] is None for panel in document["distributions"]] == [
        panel["question"] == "q2" for panel in document["distributions"]
    ]
    document, _ = score_prediction(published(TRUTH, TRUTH, *CELLS), {}, num_samples=50)
    assert document["metrics"]["kl_explained"]["value"] is None
    assert document["metrics"]["kl_explained"]["note"] == "no training answers to these questions"


def test_answers_of_people():
    # Weights 1, 3; both of country A. Predicted is option 0, so 1 of 4 is right.
    prediction = people([0, 2], ["A", "A"], ["p", "q"], weights=[1, 3])
    document, tables = score_prediction(
        prediction, {"q": np.array([0.25, 0.25, 0.5])}, min_group_size=1, num_samples=50
    )
    found = values(document)
    assert found["accuracy"] == pytest.approx(0.25)
    assert document["metrics"]["accuracy"]["marginal"] == pytest.approx(0.75)
    assert found["nll"] == pytest.approx(-(np.log(0.5) + 3 * np.log(0.2)) / 4)
    assert document["metrics"]["nll"]["marginal"] == pytest.approx(-(np.log(0.25) + 3 * np.log(0.5)) / 4)
    # The group's answers are (1/4, 0, 3/4); cumulated differences 0.25 and 0.55 over 2 steps.
    assert found["emd"] == pytest.approx((0.25 + 0.55) / 2)
    assert found["outside"] is None
    assert document["metrics"]["outside"]["note"] == "every question has an option of several tokens"
    assert tables["answers"].units == ("person", "question")


def test_the_pooled_f1_is_scikit_learn_s():
    rng = np.random.default_rng(0)
    choices, persons = rng.integers(3, size=60), [f"p{i % 20}" for i in range(60)]
    countries = [f"c{i % 4}" for i in range(60)]
    predicted = np.eye(3)[[0, 1, 1, 2]] * 0.8 + 0.2 / 3
    weights = rng.uniform(0.5, 2, 60)
    prediction = people(choices, countries, persons, weights, predicted)
    found = values(score_prediction(prediction, {}, min_group_size=2, num_samples=50)[0])
    said = predicted.argmax(1)[prediction.answer_cell]
    assert found["macro_f1_pooled"] == pytest.approx(macro_f1(choices, said, weights=weights))
    assert found["macro_f1_question"] == pytest.approx(macro_f1(choices, said, weights=weights))  # one question
    right = [np.average(said[own] == choices[own], weights=weights[own]) for own in np.arange(60).reshape(-1, 4).T]
    assert found["country_macro_accuracy"] == pytest.approx(np.mean(right))


def test_small_groups_are_other():
    # 4 people of A, 3 of B, 2 of C and 1 of whom nothing is known. With 3 as the least, C and the unknown are "Other".
    countries = [*"AAAABBBCC", None]
    prediction = people([0] * 10, [name or "?" for name in countries], [f"p{i}" for i in range(10)])
    prediction.demographic[0]["country"] = None  # "?" sorts first
    document, _ = score_prediction(prediction, {}, min_group_size=3, num_samples=50)
    found = {entry["group"]: entry["people"] for entry in document["groups"]["country"]}
    assert found == {"A": 4, "B": 3, "Other": 3}
    assert "small groups count as one" in document["inequity"]["country"]["note"]
    # With 4, "Other" would be B, C and the unknown: 6.
    document, _ = score_prediction(prediction, {}, min_group_size=4, num_samples=50)
    assert {entry["group"]: entry["people"] for entry in document["groups"]["country"]} == {"A": 4, "Other": 6}


def test_nobody_is_told_by_subtraction():
    # 5 of A and 1 of B: A's numbers and everybody's would give B's.
    prediction = people([0] * 6, [*"AAAAAB"], [f"p{i}" for i in range(6)])
    document, _ = score_prediction(prediction, {}, min_group_size=3, num_samples=50)
    assert document["groups"]["country"] == []
    assert document["metrics"]["emd"]["note"] == "no question was answered by 3 people of one group"


def test_answers_without_a_person_are_not_counted_as_people():
    # Four answers of profile A without a person may be one person's: nobody is named by them.
    prediction = people([0, 1, 2, 0, 0, 0], [*"AAAABB"], ["", "", "", "", "p", "q"])
    document, _ = score_prediction(prediction, {}, min_group_size=2, num_samples=50)
    assert document["counts"]["people"] == 3 and document["counts"]["answers without a person"] == 4
    assert document["groups"]["country"] == []
    assert "4 answers without a person" in document["metrics"]["accuracy"]["note"]
    # Nor do they add to the people that are known.
    prediction = people([0, 1, 2, 0], [*"AABB"], ["", "r", "p", "q"])
    assert score_prediction(prediction, {}, min_group_size=1, num_samples=50)[0]["counts"]["people"] == 3


def test_a_field_tells_nobody_of_another():
    # Oceania's 6 less Australia's 5 would be the one person of Fiji; Europe has 8 people in 2 countries.
    profiles = [("Oceania", "Australia", 5), ("Oceania", "Fiji", 1), ("Europe", "Italy", 4), ("Europe", "Spain", 4)]
    prediction = people([0] * 14, [name for _, name, count in profiles for _ in range(count)], range(14))
    continent = {name: area for area, name, _ in profiles}
    for profile in prediction.demographic:
        profile["area"] = continent[profile["country"]]
    prediction = replace(prediction, answer_person=np.array([f"p{i}" for i in range(14)]))

    def shown(fields):
        document, _ = score_prediction(prediction, {}, group_by=fields, min_group_size=3, num_samples=50)
        return {name: {row["group"]: row["people"] for row in rows} for name, rows in document["groups"].items()}

    # Fiji goes with the smallest country. Oceania less Australia would be Fiji, as would everybody less Europe.
    assert shown(["country", "area"]) == {"country": {"Australia": 5, "Spain": 4, "Other": 5}, "area": {}}
    # The first field keeps its groups.
    found = shown(["area", "country"])
    assert found == {"area": {"Europe": 8, "Oceania": 6}, "country": {"Italy": 4, "Spain": 4, "Other": 6}}


def test_answers_of_weight_zero_are_left_out_and_counted():
    prediction = people([0, 2, 1], ["A", "A", "B"], ["p", "q", "r"], weights=[1, 3, 0])
    document, _ = score_prediction(prediction, {}, min_group_size=1, num_samples=50)
    assert document["counts"]["answers"] == 2 and document["counts"]["answers of weight 0"] == 1
    assert document["metrics"]["accuracy"]["value"] == pytest.approx(0.25)
    assert [entry["group"] for entry in document["groups"]["country"]] == ["A"]  # nobody is of B
    with pytest.raises(ValueError, match="`weight` is 0 in all rows"):
        score_prediction(people([0], ["A"], ["p"], weights=[0]), {}, min_group_size=1)


def test_a_question_with_other_options_in_training_has_no_marginal():
    prediction = people([0, 2], ["A", "A"], ["p", "q"])
    document, _ = score_prediction(prediction, {"q": np.array([0.4, 0.6])}, min_group_size=1, num_samples=50)
    assert document["metrics"]["nll"]["marginal"] is None
    assert "1 questions have other options in the training answers" in document["metrics"]["nll"]["note"]
    # The same id with 2 and with 3 options: two questions, of which one is that of the training answers.
    prediction = people([0, 2, 1], ["A", "A", "B"], ["p", "q", "r"], predicted=[[0.5, 0.3, 0.2], [0.5, 0.5, 0]])
    prediction = replace(prediction, num_options=np.array([3, 2]))
    document, tables = score_prediction(prediction, {"q": np.array([0.4, 0.6])}, min_group_size=1, num_samples=50)
    assert document["counts"]["questions"] == 2
    assert tables["answers"].columns["nll_marginal"] == pytest.approx([np.nan, np.nan, -np.log(0.6)], nan_ok=True)


def test_a_person_may_have_moved():
    prediction = people([0, 1, 2, 0], [*"AABB"], ["p", "q", "p", "r"])
    document, _ = score_prediction(prediction, {}, min_group_size=1, num_samples=50)
    assert document["counts"]["people"] == 3
    assert {entry["group"]: entry["people"] for entry in document["groups"]["country"]} == {"A": 2, "B": 2}
    assert document["inequity"]["country"]["sigma"] is None


def test_fields_to_group_by():
    prediction = published(TRUTH, TRUTH, *CELLS)
    prediction = replace(prediction, demographic=[{"age": "old", "country": "A"}, {"age": None, "country": "B"}])
    document, tables = score_prediction(prediction, MARGINAL, num_samples=50)
    assert list(document["groups"]) == ["country", "age"]
    assert tables["cells"].units == ("profile", "question")  # a profile is more than its country
    assert list(score_prediction(prediction, MARGINAL, group_by=["age"], num_samples=50)[0]["groups"]) == ["age"]
    with pytest.raises(ValueError, match="'size', which no profile has"):
        score_prediction(prediction, MARGINAL, group_by=["size"])


def test_cells_of_a_profile_are_not_called_by_the_only_field_asked_for():
    profiles = [{"age": "old", "country": "A"}, {"age": None, "country": "B"}]
    prediction = replace(published(TRUTH, TRUTH, *CELLS), demographic=profiles)
    _, tables = score_prediction(prediction, MARGINAL, group_by=["country"], num_samples=50)
    assert tables["cells"].units == ("profile", "question")


def test_panels_show_where_groups_differ_and_where_they_agree():
    countries, questions = [*"ABABAB"], ["q1", "q1", "q2", "q2", "q3", "q3"]
    truth = [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], [0.5, 0.5], [0.8, 0.2], [0.4, 0.6]]
    texts = {"q1": ("Tea?", ["no", "yes"])}
    document, _ = score_prediction(published(truth, truth, countries, questions), {}, questions=texts, num_samples=50)
    assert [(panel["question"], panel["group"]) for panel in document["distributions"]] == [
        ("Tea?", "A"),
        ("Tea?", "B"),
        ("q3", "A"),
        ("q3", "B"),
        ("q2", "A"),
        ("q2", "B"),
    ]
    assert document["distributions"][0]["options"] == ["no", "yes"]
    assert document["distributions"][2]["options"] == ["1", "2"]


def test_a_paired_difference_is_narrower_than_two_intervals():
    """Two runs that differ by the same amount in every row: the difference has no noise at all."""
    rng = np.random.default_rng(0)
    rows, clusters = rng.normal(1, 1, 200), (np.arange(200) // 10, np.arange(200) % 10)
    one, other = (
        {"cells": Scores({"emd": rows + shift}, clusters, ("country", "question"), np.ones(200))} for shift in (0.5, 0)
    )
    alone, unit = measure("emd", one, num_samples=200)
    apart, _ = measure("emd", one, other, num_samples=200)
    assert unit == "country × question"
    assert alone.high - alone.low > 0.2
    assert (apart.value, apart.low, apart.high) == pytest.approx((0.5, 0.5, 0.5))


def test_scores_survive_the_file(tmp_path):
    _, tables = score_prediction(published(TRUTH, TRUTH, *CELLS), MARGINAL, num_samples=50)
    np.savez(tmp_path / "cells.npz", **tables["cells"].arrays("test/cells"))
    with np.load(tmp_path / "cells.npz", allow_pickle=False) as arrays:
        back = Scores.from_arrays(arrays, "test/cells")
        assert Scores.from_arrays(arrays, "dev/cells") is None
    assert measure("kl_explained", {"cells": back}) == measure("kl_explained", tables)
