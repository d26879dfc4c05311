# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Comparisons by hand."""

import math

import pytest

from trl_cuma.bench.comparison import Comparison, compare_worlds


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


def test_only_shared_worlds_count():
    assert compare_worlds({"0": 1.0, "1": 1.1, "5": 9.0}, {"0": 1.0, "1": 1.0, "2": 4.0}).ratio == pytest.approx(
        1.1**0.5
    )
    with pytest.raises(ValueError, match="share 1"):
        compare_worlds({"0": 1.0, "1": 1.0}, {"0": 1.0})


def test_verdicts_need_the_whole_interval():
    assert Comparison(0.9, 0.8, 1.01, 0.9).verdict == "no difference shown"
    assert Comparison(1.1, 1.01, 1.2, 0.9).verdict == "worse"
