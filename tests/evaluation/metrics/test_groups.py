# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import math

import numpy as np
import pytest

from trl_cuma.evaluation.metrics import accuracy, inequity, inequity_table, scores_by_group


def draw(accuracies: list[float], people: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One answer each of `people` people per group: scores, groups, persons."""
    group = np.repeat([f"g{index:03d}" for index in range(len(accuracies))], people)
    right = np.random.default_rng(seed).random(len(group)) < np.repeat(accuracies, people)
    return right.astype(float), group, np.arange(len(group))


def test_scores_by_group():
    scores = np.array([1.0, 1, 0, 1, 0, 0, 1, 0])
    group = ["a", "a", "a", "a", "b", "b", None, "c"]
    person = np.array([1, 1, 2, 3, 4, 5, 6, 7])
    found = scores_by_group(scores, group, person, min_people=2, num_samples=200)
    assert list(found) == ["a", "b"]  # one person is no group to name
    assert (found["a"].value, found["a"].n) == (0.75, 3)
    assert (found["b"].value, found["b"].low, found["b"].high) == (0, None, None)  # of two people no interval
    # Survey weights: (2 + 2 + 0 + 1) / (2 + 2 + 1 + 1)
    weights = np.array([2.0, 2, 1, 1, 1, 1, 1, 1])
    assert scores_by_group(scores, group, person, weights=weights, min_people=3)["a"].value == pytest.approx(5 / 6)


def test_rows_of_one_person_are_no_independent_evidence():
    scores, group, person = draw([0.5], 200, seed=0)
    once = scores_by_group(scores, group, person)["g000"]
    repeated = scores_by_group(np.repeat(scores, 9), np.repeat(group, 9), np.repeat(person, 9))["g000"]
    assert (repeated.low, repeated.high, repeated.n) == pytest.approx((once.low, once.high, once.n))


def test_sigma_by_hand():
    # Two groups of two people with one answer each, accuracies 1/2 and 1: the spread is 1/4² = 1/16.
    # v = n/(n-1) · sum of squares / n²: group a 2 · (2 · 1/4) / 4 = 1/4, group b 0; half of their mean is 1/16.
    found = inequity(np.array([1.0, 0, 1, 1]), ["a", "a", "b", "b"], np.arange(4), min_people=2, num_samples=50)
    assert found["variance"] == pytest.approx(1 / 16 - 1 / 2 * 1 / 8)
    assert found["sigma"] == pytest.approx(0, abs=1e-8)
    assert (found["groups"], found["people"], found["sigma_raw"], found["groups_raw"]) == (2, 4, None, 0)


def test_sigma_raw_is_the_population_standard_deviation_of_groups_with_five_rows():
    right = {"a": [1, 1, 1, 1, 0], "b": [1, 0, 0, 0, 0], "c": [1, 1, 1, 1]}
    scores = np.concatenate(list(right.values())).astype(float)
    group = [name for name, rows in right.items() for _ in rows]
    found = inequity(scores, group, np.arange(len(scores)))
    assert found["sigma_raw"] == pytest.approx((0.8 - 0.2) / 2)
    assert (found["groups_raw"], found["groups"], found["left_out"]) == (2, 0, 3)
    assert found["sigma"] is None and found["worst"] is None and "fewer than two groups" in found["note"]


def test_a_fair_model_on_418_small_groups_is_unfair_only_as_published():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 12, size=418)
    group = np.repeat([f"ethnicity {index}" for index in range(418)], sizes)
    scores = (rng.random(len(group)) < 0.5).astype(float)
    found = inequity(scores, group, np.arange(len(group)), min_people=5, num_samples=100)
    # One group of n: variance 1/4n; the mean over n = 5 … 11 is 0.0341, its root 0.185 (the few groups add noise).
    assert found["sigma_raw"] == pytest.approx(0.18, abs=0.02)
    assert found["sigma"] < 0.05


def test_a_fair_model_on_418_groups_of_100_has_no_inequity():
    scores, group, person = draw([0.5] * 418, 100, seed=1)
    found = inequity(scores, group, person, num_samples=60)
    # Raw: sqrt(1/4 / 100) = 0.05. Corrected: the variance's standard error is 0.0025 · sqrt(2/418) = 0.013².
    assert found["sigma_raw"] == pytest.approx(0.05, abs=0.005)
    assert found["sigma"] < 0.02
    assert found["low"] == 0
    # The lowest observed accuracy is about 3 standard errors below the truth; shrunken it isn't.
    assert found["worst_raw"] < 0.4
    assert found["worst_value"] > 0.47
    assert found["worst_low"] < 0.5 < found["worst_high"] and found["worst_n"] == 100


def test_the_corrected_variance_is_unbiased_and_its_interval_covers():
    levels = np.linspace(0.35, 0.65, 15)
    sigma = np.std(levels)
    found = [inequity(*draw(levels, 120, seed), num_samples=80) for seed in range(60)]
    variances = np.array([run["variance"] for run in found])
    assert abs(variances.mean() - sigma**2) < 3 * variances.std() / 60**0.5
    # The raw one is too great by the sampling variance: (1 - 1/15) · mean of p(1 - p) / 120
    excess = np.mean([run["sigma_raw"] ** 2 for run in found]) - variances.mean()
    assert excess == pytest.approx(14 / 15 * np.mean(levels * (1 - levels)) / 120, rel=0.02)
    # 95 % coverage; 60 runs have a standard error of 2.8 %
    assert np.mean([run["low"] <= sigma <= run["high"] for run in found]) > 0.88
    # the worst group's interval holds whichever group comes out as the worst
    held = [run["worst_low"] <= levels[int(run["worst"][1:])] <= run["worst_high"] for run in found]
    assert np.mean(held) > 0.9


def test_the_worst_group_is_found_and_noise_of_a_smaller_one_is_not():
    scores, group, person = draw([0.5] * 10 + [0.2], 2000, seed=0)
    # A small fair group that happens to have 19 of 100 right.
    scores = np.concatenate([scores, np.arange(100) < 19])
    group = np.concatenate([group, ["small"] * 100])
    found = inequity(scores, group, np.arange(len(scores)), num_samples=100)
    assert found["worst"] == "g010"
    assert found["worst_value"] == pytest.approx(0.2, abs=0.02)
    assert found["worst_n"] == 2000


def test_people_with_several_rows_are_the_unit():
    # Ten identical answers per person carry as much as one: the same variance, not a tenth of it.
    scores, group, person = draw([0.5] * 50, 100, seed=3)
    once = inequity(scores, group, person, num_samples=50)
    repeated = inequity(np.repeat(scores, 10), np.repeat(group, 10), np.repeat(person, 10), num_samples=50)
    assert repeated["variance"] == pytest.approx(once["variance"])
    assert repeated["people"] == 5000


def test_survey_weights_count_as_people_do():
    scores, group, person = draw([0.4, 0.6], 150, seed=0)
    weights = np.where(scores > 0, 3.0, 1.0)
    found = inequity(scores, group, person, weights=weights, num_samples=50)
    for_group = [
        accuracy(scores[group == g] * 0, 1 - scores[group == g], weights[group == g]) for g in ("g000", "g001")
    ]
    assert found["sigma_raw"] == pytest.approx(abs(for_group[0] - for_group[1]) / 2)
    assert found["worst_raw"] == pytest.approx(min(for_group))


def test_intersections_show_what_single_fields_hide():
    # Right for (x, u) and (y, v), wrong for the others: each field alone is perfectly fair.
    country, sex = np.repeat(["x", "x", "y", "y"], 200), np.repeat(["u", "v", "u", "v"], 200)
    scores = (np.arange(800) % 10 < np.repeat([8, 2, 2, 8], 200)).astype(float)
    table = inequity_table(scores, {"country": country, "sex": sex}, np.arange(800), num_samples=100)
    assert list(table) == ["country", "sex", "country × sex"]
    assert table["country"]["sigma"] == table["sex"]["sigma"] == 0
    assert table["country × sex"]["sigma"] == pytest.approx(0.3, abs=0.01)
    assert table["country × sex"]["worst"] in ("x × v", "y × u")
    assert table["country × sex"]["low"] > 0.25
    # A pair's own numbers beside those of the fields would tell of fewer people than are ever shown.
    hidden = ("worst_raw", "worst_low", "worst_high", "worst_n", "people", "sigma_raw")
    assert [table["country × sex"][name] for name in hidden] == [None] * 6
    assert table["country"]["worst_n"] == 400
    json.dumps(table)


def test_a_missing_value_is_in_no_group_and_no_intersection():
    country, sex = ["x"] * 120 + ["y"] * 120 + [None] * 50, ["u"] * 240 + ["v"] * 50
    table = inequity_table(np.ones(290), {"country": country, "sex": sex}, np.arange(290), num_samples=20)
    assert table["country"]["people"] == 240 and table["country × sex"]["groups"] == 2
    assert table["country"]["sigma"] == 0  # all right: nothing to shrink, and no division by zero
    assert math.isclose(table["country"]["worst_value"], 1)
    empty = inequity(np.ones(3), [None] * 3, np.arange(3))
    assert (empty["sigma"], empty["sigma_raw"], empty["groups"]) == (None, None, 0)


def test_what_is_no_table_of_people_is_refused_without_naming_a_value():
    with pytest.raises(ValueError, match="same in all rows of a person") as error:
        inequity(np.ones(2), ["secret a", "secret b"], np.array([7, 7]))
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="one entry per row"):
        inequity(np.ones(3), ["a", "b"], np.arange(3))
    with pytest.raises(ValueError, match="`scores` row 1 is not finite"):
        scores_by_group(np.array([1, np.nan]), ["a", "a"], np.arange(2))
