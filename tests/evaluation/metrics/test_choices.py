# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from trl_cuma.evaluation.metrics import accuracy, country_macro_accuracy, macro_f1, wvb_emd

DATA = Path(os.environ.get("CUMA_DATA", Path(__file__).parents[4] / "shared" / "data"))
GOLDEN = DATA / "golden_emd.json"

TRUTH = np.array([0, 0, 1, 1, 2, 0])
PREDICTED = np.array([0, 1, 1, 1, 0, -1])


def test_accuracy_counts_an_invalid_prediction_as_wrong():
    assert accuracy(TRUTH, PREDICTED) == pytest.approx(3 / 6)
    # Survey weights: right are rows 0, 2 and 3.
    assert accuracy(TRUTH, PREDICTED, np.array([3.0, 1, 1, 1, 1, 1])) == pytest.approx(5 / 8)


def test_macro_f1_by_hand():
    # Option 0: 1 hit, 1 false, 2 missed: 2/(2+1+2) = 0.4. Option 1: 2 hits, 1 false: 4/5. Option 2: missed, 0.
    assert macro_f1(TRUTH, PREDICTED) == pytest.approx((0.4 + 0.8 + 0) / 3)


def test_macro_f1_per_question():
    question = np.array(["a", "a", "a", "b", "b", "b"])
    # a: option 0 one hit, one missed: 2/3; option 1 one hit, one false: 2/3.
    # b: truth 1, 2, 0, predicted 1, 0, invalid: option 1 is 1, option 2 is 0, option 0 (one false, one missed) 0.
    assert macro_f1(TRUTH, PREDICTED, question) == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_macro_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth, predicted, weights = rng.integers(5, size=300), rng.integers(5, size=300), rng.random(300)
    assert macro_f1(truth, predicted, weights=weights) == pytest.approx(
        f1_score(truth, predicted, average="macro", sample_weight=weights)
    )


def test_country_macro_accuracy_weighs_countries_alike():
    country = ["x", "x", "x", "x", "y", None]
    # x: 3 of 4, y: 0 of 1; the row without a country is left out.
    assert country_macro_accuracy(TRUTH, PREDICTED, country) == pytest.approx((3 / 4 + 0) / 2)
    with pytest.raises(ValueError, match="missing in every row"):
        country_macro_accuracy(TRUTH, PREDICTED, [None] * 6)


@pytest.mark.parametrize("metric", [accuracy, macro_f1])
def test_what_are_no_answers_is_refused(metric):
    with pytest.raises(ValueError, match="`truth` row 1 is no option"):
        metric(np.array([0, -1]), np.array([0, 1]))
    with pytest.raises(ValueError, match="one option per answer"):
        metric(np.array([0, 1]), np.array([0]))
    with pytest.raises(ValueError, match="no rows"):
        metric(np.array([], dtype=int), np.array([], dtype=int))


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"{GOLDEN} is absent; set CUMA_DATA")
def test_wvb_emd_reproduces_the_benchmarks_script():
    cases = json.loads(GOLDEN.read_text())["cases"]
    assert len(cases) == 7
    for case in cases:
        found = wvb_emd(case["gt_answers"], case["model_scores"], *case["scale"])
        assert found == pytest.approx(case["expected_emd"], abs=1e-9), case["name"]


def test_wvb_emd_by_hand():
    assert wvb_emd([1, 1, 2, 3], [2, 2, 3, 4], 1, 4) == pytest.approx(1 / 3)  # all one step of three up
    assert wvb_emd([1, 2, 3, 4], [4, 3, 2, 1], 1, 4) == 0  # who gave which answer is forgotten
    assert wvb_emd([1, 2], [1.9, 2.9], 1, 4) == 0  # truncated towards 0
    assert wvb_emd([0, 0], [-0.5, 0], 0, 2) == 0
    assert wvb_emd([1, 1], [15, 15], 1, 2) == pytest.approx(14)  # outside the scale is kept
    # An invalid score leaves its person's answer in: (0, 0, 1) against (0, 0) is 1/3 away from 0.
    assert wvb_emd([1, 1, 2], [1, 1, None], 1, 2) == pytest.approx(1 / 3)
    assert wvb_emd([1, 1, 2], [1, 1, float("nan")], 1, 2) == pytest.approx(1 / 3)


def test_wvb_emd_of_a_perfect_sampler_is_not_zero_on_few_people():
    # The benchmark's probe has about 21 people per question and cell: the reason to read the corrected form.
    rng = np.random.default_rng(0)
    draws = [wvb_emd(*rng.integers(1, 5, size=(2, 21)).tolist(), 1, 4) for _ in range(400)]
    assert 0.08 < np.mean(draws) < 0.12


@pytest.mark.parametrize(
    ("truth", "predicted", "scale", "message"),
    [
        ([1, 2], [None, None], (1, 4), "no valid score among 2"),
        ([], [1], (1, 4), "at least one answer"),
        ([1, float("nan")], [1, 1], (1, 4), "none missing"),
        ([1], [1], (4, 4), "`low` must be below `high`"),
    ],
)
def test_wvb_emd_refuses(truth, predicted, scale, message):
    with pytest.raises(ValueError, match=message):
        wvb_emd(truth, predicted, *scale)
