# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Comparisons by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from trl_cuma.bench.comparison import Comparison, compare_cells, compare_worlds, detectable
from trl_cuma.bench.runner import SFTRun
from trl_cuma.data.survey import Cells
from trl_cuma.evaluation.metrics.intervals import Estimate


def test_a_comparison_is_paired_by_world():
    # Worlds differ tenfold, the ratio hardly: log ratios log(.5) and log(.5) ± .01.
    second = {"0": 0.01, "1": 0.1, "2": 1.0}
    first = {
        world: emd * 0.5 * math.exp(shift)
        for (world, emd), shift in zip(second.items(), (-0.01, 0, 0.01), strict=True)
    }
    found = compare_worlds(first, second)
    half = 4.302653 * 0.01 / math.sqrt(3)  # t_{2, .975} s / sqrt(n), s = .01
    assert found.ratio == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5 * math.exp(-half), 0.5 * math.exp(half)), rel=1e-6)
    assert found.p == 2 / 8  # of 2³ sign patterns two are as far from 0
    assert found.verdict == "better by a fifth"


def test_a_fifth_is_claimed_by_the_upper_limit_only():
    second = {str(world): 1.0 for world in range(5)}
    first = {world: 0.79 * math.exp(shift) for world, shift in zip(second, (-0.04, -0.02, 0, 0.02, 0.04), strict=True)}
    found = compare_worlds(first, second)
    assert found.ratio < 0.8 < found.high
    assert found.verdict == "better"


def test_worlds_to_plan_for():
    """d = log(1 / .8) / .2 = 1.116: ((1.960 + 1.282) / 1.116)² = 8.4, and two more as the spread is estimated."""
    second = {"0": 1.0, "1": 1.0, "2": 1.0}
    first = {"0": math.exp(-0.2), "1": 1.0, "2": math.exp(0.2)}
    assert compare_worlds(first, second).needed == 11
    assert compare_worlds(second, second).needed == 2


def test_only_shared_worlds_count():
    assert compare_worlds({"0": 1.0, "1": 1.1, "5": 9.0}, {"0": 1.0, "1": 1.0, "2": 4.0}).ratio == pytest.approx(
        1.1**0.5
    )
    with pytest.raises(ValueError, match="share 1"):
        compare_worlds({"0": 1.0, "1": 1.0}, {"0": 1.0})


def test_verdicts_need_the_whole_interval():
    assert Comparison(0.9, 0.8, 1.01, 0.9).verdict == "no difference shown"
    assert Comparison(1.1, 1.01, 1.2, 0.9).verdict == "worse"


def test_what_is_detectable_follows_from_the_interval():
    """Of very many clusters it is z_.975 + z_.90 standard errors, 1.960 + 1.282; half the interval is 1.960."""
    assert detectable(Estimate(0.0, -0.0196, 0.0196, 100_000)) == pytest.approx(0.03242, rel=1e-3)
    # of nine clusters more: 3.24 times the same standard error, and what the t distribution adds
    assert 0.0324 < detectable(Estimate(1.0, 1 - 0.0196, 1 + 0.0196, 9)) < 0.042
    assert detectable(Estimate(1.0, 1.0, 1.0, 9)) == 0


# ------------------------------------------------------------------------------------------------ cells
def finished_cells(folder, emds: np.ndarray) -> tuple[SimpleNamespace, dict]:
    """
    A finished suite of one world whose arm `a` has these EMDs, `(countries, questions)`, and arm `b` and the marginal
    0.5: of two options the first is true, so that a cell's EMD is what the second one gets.
    """
    country, question = (index.ravel() for index in np.indices(emds.shape))
    truth = np.tile([1.0, 0.0], (len(country), 1))
    survey = SimpleNamespace(
        questions=[SimpleNamespace(question_id=f"Q{number}") for number in range(emds.shape[1])],
        profiles=[{"country": f"C{number}"} for number in range(emds.shape[0])],
        num_options=np.full(emds.shape[1], 2),
        training_marginal=np.full((emds.shape[1], 2), 0.5),
    )
    world = SimpleNamespace(seed=0, cells={"held_out_cells": Cells(question, country, truth)}, survey=survey)
    for arm, of_arm in (("a", emds.ravel()), ("b", np.full(len(country), 0.5))):
        path = folder / SFTRun(arm, 0, 1e-3, 2, 4).folder
        path.mkdir(parents=True)
        np.savez(path / "predictions.npz", **{"2/held_out_cells": np.log(np.stack([1 - of_arm, of_arm], 1))})
    runner = SimpleNamespace(
        output_dir=folder, longest=4, suite=SimpleNamespace(worlds=(0,)), world=lambda seed: world
    )
    return runner, {"chosen": {arm: {"settings": [1e-3, 2]} for arm in "ab"}}


def test_the_ratio_of_cells_is_of_their_means(tmp_path):
    finished = finished_cells(tmp_path, np.array([[0.1, 0.2], [0.3, 0.4]]))
    for second in ("b", "marginal"):
        found = compare_cells(*finished, "a", second, 2, "held_out_cells")
        assert found.ratio == pytest.approx(0.25 / 0.5)  # the mean of the logarithms would give .44
        assert compare_cells(*finished, second, "a", 2, "held_out_cells").ratio == pytest.approx(2)
        assert (found.low, found.high, found.verdict) == (None, None, "n/a")  # two countries: too few to resample


@pytest.mark.parametrize("varying", ["countries", "questions"])
def test_countries_and_questions_are_both_resampled(tmp_path, varying):
    """What differs between countries alone would be certain if only questions were resampled, and vice versa."""
    emds = np.tile(np.array([0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3, 0.4])[:, None], (1, 8))
    finished = finished_cells(tmp_path, emds if varying == "countries" else emds.T)
    found = compare_cells(*finished, "a", "b", 2, "held_out_cells")
    # s of the eight is .12, so that their mean's standard error is .042, of the ratio .085: ± t_{7, .975} of it is .2
    assert found.ratio == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.3, 0.7), abs=0.06)
    assert found.verdict == "better by a fifth"
