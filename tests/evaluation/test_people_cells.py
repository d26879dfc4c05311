# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Cells of people's answers: what few answers per cell and few groups do to the document."""

from dataclasses import replace

import numpy as np
import pytest

from trl_cuma.evaluation.prediction import SurveyPrediction
from trl_cuma.evaluation.scoring import score_prediction


def values(document):
    return {name: entry["value"] for name, entry in document["metrics"].items()}


def survey(groups, questions, size, seed=0, spread=20.0, truth=None):
    """Everybody of `groups` groups of `size` people answers all questions of 4 options; predicted is the truth."""
    rng = np.random.default_rng(seed)
    if truth is None:
        base = rng.dirichlet(np.full(4, 3.0), questions)
        truth = np.stack([[rng.dirichlet(spread * probs) for probs in base] for _ in range(groups)])
    options = truth.shape[-1]
    cell = np.repeat(np.arange(groups * questions), size)
    probs = truth.reshape(-1, options)
    choice = (rng.random(len(cell))[:, None] > probs.cumsum(1)[cell]).sum(1).clip(max=options - 1)
    person = np.array([f"{index // questions}/{who}" for index in range(groups * questions) for who in range(size)])
    prediction = SurveyPrediction(
        question_id=np.array([f"q{index}" for index in range(questions)] * groups),
        num_options=np.full(len(probs), options),
        demographic=[{"country": f"c{index}"} for index in range(groups)],
        profile=np.repeat(np.arange(groups), questions),
        predicted=probs,
        outside=np.zeros(len(probs)),
        truth=None,
        answer_cell=cell,
        answer_choice=choice,
        answer_person=person,
        answer_weight=np.ones(len(cell)),
        num_rows=len(cell),
    )
    return prediction, {f"q{index}": truth[:, index].mean(0) for index in range(questions)}


def test_few_people_per_cell_do_not_pass_as_collapse():
    """The truth itself, held against 30 answers per cell: without a correction an index of 0.2, and 0.8 explained."""
    document, tables = score_prediction(*survey(groups=12, questions=40, size=30, spread=8), num_samples=200)
    found = values(document)
    # Of options that are all used about (4 - 1) / 2n nats.
    assert tables["cells"].columns["noise"].mean() == pytest.approx(3 / 60, rel=0.1)
    assert found["collapse_index"] == pytest.approx(0, abs=0.1)
    assert found["kl_explained"] == pytest.approx(1, abs=0.06)
    assert found["spread_ratio"] == pytest.approx(1, abs=0.1)
    assert found["kl"] == pytest.approx(0, abs=0.005)
    for name in ("collapse_index", "kl", "kl_explained", "spread_ratio"):
        assert "less the expected noise" in document["metrics"][name]["note"]
    # The same number as among the metrics, from the same cells.
    assert document["stereotyping"]["all"]["spread_ratio"]["value"] == pytest.approx(found["spread_ratio"])
    assert document["stereotyping"]["all"]["entropy_ratio"]["value"] == pytest.approx(1, abs=0.05)


def test_noise_does_not_open_the_guard_of_the_collapse_index():
    # All groups alike: H(marginal) - H(truth) is 0, and 3 / 50 = 0.06 nats on the shares of 25 answers.
    document, _ = score_prediction(
        *survey(groups=12, questions=30, size=25, spread=1e6), min_group_size=20, num_samples=200
    )
    entry = document["metrics"]["collapse_index"]
    assert entry["value"] is None and "where 0.05 nats are needed" in entry["note"]
    # Nothing tells the groups apart, so that there is nothing to explain and no spread to have.
    for name in ("kl_explained", "spread_ratio"):
        entry = document["metrics"][name]
        assert entry["value"] is None and "where 0.01 nats are needed" in entry["note"]
    metrics = document["metrics"]
    assert abs(metrics["kl"]["value"]) < 0.01
    assert ("as near as the noise can tell" in metrics["kl"]["note"]) == (metrics["kl"]["value"] < 0)


def test_a_field_of_small_groups_does_not_lose_the_headline():
    """Nobody has enough compatriots to be shown; cells are then of the next field."""
    prediction, marginal = survey(groups=6, questions=20, size=30)
    profiles = [{"country": f"c{index}", "sex": "fm"[index % 2]} for index in range(6)]
    prediction = replace(prediction, demographic=profiles)
    document, tables = score_prediction(prediction, marginal, min_group_size=50, num_samples=50)
    assert {entry["group"] for entry in document["groups"]["sex"]} == {"f", "m"}
    assert tables["cells"].units == ("sex", "question") and len(tables["cells"].weights) == 40
    assert document["metrics"]["emd"]["value"] is not None


def test_two_groups_of_people_are_no_sample_of_groups():
    document, _ = score_prediction(*survey(groups=2, questions=20, size=30), num_samples=100)
    for name in ("emd", "kl", "kl_explained"):
        entry = document["metrics"][name]
        assert (entry["unit"], entry["n"], entry["low"]) == ("cell", 40, None) and entry["value"] is not None
        assert "for these 2 groups of country; no interval" in entry["note"]
    for rows in (document["groups"]["country"], document["stereotyping"]["groups"].values()):
        assert all(row[name]["low"] is None for row in rows for name in ("emd", "entropy_ratio") if name in row)
    # Answers are people's, who can be resampled.
    assert document["metrics"]["nll"]["unit"] == "person × question" and document["metrics"]["nll"]["low"] is not None


def test_metrics_per_question_have_no_interval_that_leaves_the_people_out():
    document, _ = score_prediction(*survey(groups=2, questions=20, size=30), num_samples=100)
    for name in ("macro_f1_question", "wvb_emd"):
        entry = document["metrics"][name]
        assert entry["value"] is not None and entry["low"] is None and "people and questions" in entry["note"]
    assert "above 0 for a perfect sampler" in document["metrics"]["wvb_emd"]["note"]


def test_options_that_nobody_chooses_are_no_noise():
    """
    The truth itself, of which most options of ten are hardly used, held against 35 people per cell: with (10 - 1) / 2n
    of noise taken out it would explain 1.3 of what there is, exaggerate and flatten.
    """
    rng = np.random.default_rng(0)
    used = np.array([0.9, 0.06, 0.02, 0.02, 0, 0, 0, 0, 0, 0])
    base = np.array([rng.permutation(used) for _ in range(30)])
    truth = np.stack([0.8 * base + 0.2 * base[rng.permutation(30)] for _ in range(12)])
    prediction, _ = survey(groups=12, questions=30, size=35, truth=truth)
    document, _ = score_prediction(prediction, {f"q{q}": truth[:, q].mean(0) for q in range(30)}, num_samples=100)
    found = document["metrics"]
    assert found["kl_explained"]["value"] == pytest.approx(1, abs=0.1)
    assert found["kl"]["low"] < 0 < found["kl"]["high"] or abs(found["kl"]["value"]) < 0.02
    assert found["spread_ratio"]["value"] == pytest.approx(1, abs=0.12)
    assert document["stereotyping"]["all"]["entropy_ratio"]["value"] == pytest.approx(1, abs=0.05)


def test_consensus_is_not_told_from_noise():
    """Everybody answers alike; of 30 answers per cell the noise is more than what would be a difference."""
    document, _ = score_prediction(*survey(groups=12, questions=20, size=30, spread=1e6), num_samples=50)
    table = document["stereotyping"]
    assert table["consensus"] is None
    for row in (table["all"], *table["groups"].values()):
        assert row["spread_ratio"]["value"] is None and "0.01 nats are needed" in row["spread_ratio"]["note"]


def test_weights_make_the_answers_fewer():
    """40 answers, of which 4 have all but all of the weight, are as noisy as 4."""
    prediction, marginal = survey(groups=2, questions=10, size=40)
    heavy = np.tile(np.r_[np.full(4, 1.0), np.full(36, 1e-9)], 20)
    few = replace(prediction, answer_weight=heavy)
    noise = {
        name: score_prediction(each, marginal, num_samples=20)[1]["cells"].columns["noise"].mean()
        for name, each in (("few", few), ("many", prediction))
    }
    assert noise["few"] > 4 * noise["many"]
