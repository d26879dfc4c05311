# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest
from scipy import stats

from trl_cuma.evaluation.metrics import (
    bootstrap_interval,
    bootstrap_weights,
    cluster_draws,
    detectable_effect,
    intervals,
    prediction_interval,
    sign_flip_test,
    t_interval,
    wilson_interval,
    worlds_needed,
)


def test_bootstrap_weights_draw_clusters_whole_and_crossed_ones_independently():
    person, question = np.repeat(["p", "q", "r"], 2), np.tile([10, 20], 3)
    for weights in bootstrap_weights([person], 20):
        assert (weights[::2] == weights[1::2]).all() and weights[::2].sum() == 3
    grids = [weights.reshape(3, 2) for weights in bootstrap_weights([person, question], 20)]
    for grid in grids:
        assert np.linalg.matrix_rank(grid) == 1 and grid.sum() == 3 * 2  # a product of three and of two draws
    assert any((grid[0] != grid[1]).any() for grid in grids) and any(
        (grid[:, 0] != grid[:, 1]).any() for grid in grids
    )


def test_one_row_per_cluster_is_the_textbook_interval():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    found = bootstrap_interval(values, [np.arange(400)], num_samples=4000)
    expected = t_interval(values)
    assert (found.value, found.n) == (pytest.approx(expected.value), 400)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_copies_of_a_row_in_its_cluster_change_nothing():
    values = np.random.default_rng(0).normal(size=30)
    once = bootstrap_interval(values, [np.arange(30)])
    copied = bootstrap_interval(np.repeat(values, 5), [np.repeat(np.arange(30), 5)])
    assert (copied.low, copied.high, copied.n) == pytest.approx((once.low, once.high, 30))


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    world = rng.normal(0, 1, size=100)
    first, second = world + rng.normal(0, 0.1, size=100), world + 0.2 + rng.normal(0, 0.1, size=100)
    rows = [np.arange(100)]
    assert bootstrap_interval(second - first, rows).low > 0
    assert bootstrap_interval(first, rows).high > bootstrap_interval(second, rows).low


def test_a_function_of_means_is_taken_after_averaging():
    values = np.array([[1.0, 2], [3, 2], [2, 8]])
    found = bootstrap_interval(values, [np.arange(3)], lambda a, b: np.log(a / b))
    assert found.value == pytest.approx(math.log(2 / 4))  # not the mean of log(1/2), log(3/2), log(1/4)
    weighted = bootstrap_interval(values, [np.arange(3)], np.divide, weights=np.array([1.0, 1, 0]))
    assert weighted.value == pytest.approx(4 / 4)


def test_the_same_seed_pairs_two_calls():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, [np.arange(50)]) == bootstrap_interval(values, [np.arange(50)])
    assert bootstrap_interval(values, [np.arange(50)]) != bootstrap_interval(values, [np.arange(50)], seed=1)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("cells", [8, 3000])
def test_sums_of_clusters_give_the_interval_of_the_rows(columns, cells, monkeypatch):
    """Against every row's weight in every draw; rows of the same clusters come often, and seldom. Some draw no row."""
    rng = np.random.default_rng(0)
    rows = 40 if cells == 8 else 400
    monkeypatch.setattr(intervals, "MIN_CLUSTERS", 2)
    clusters = [rng.permutation(cells)[rng.integers(size, size=rows)] for size in (cells, cells // 2, 3)][:columns]
    values, survey = rng.normal(size=(rows, 2)), rng.random(rows)
    monkeypatch.setattr(cluster_draws, "COUNTS_AT_ONCE", 3 * cells)  # several chunks, the last one shorter
    table = np.column_stack([values, np.ones(rows)]) * survey[:, None]
    sums = np.stack([weights @ table for weights in bootstrap_weights(clusters, 50, seed=4)])
    found = cluster_draws.drawn_sums(table, cluster_draws.cluster_codes(clusters), 50, 4)
    np.testing.assert_allclose(found, sums, rtol=1e-12, atol=1e-12)
    assert ((found == 0) == (sums == 0)).all()
    interval = bootstrap_interval(values, clusters, np.subtract, weights=survey, num_samples=50, seed=4)
    with np.errstate(invalid="ignore"):
        means = sums[:, :2] / sums[:, 2:]
    expected = intervals.percentiles(means[:, 0] - means[:, 1], interval.n, 0.95)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)


def coverage(num_people: int, num_questions: int, spread: tuple[float, float, float], crossed: bool) -> float:
    """Share of 80 simulated surveys (person, question and own noise around 0) whose interval holds the 0."""
    rng = np.random.default_rng(0)
    person, question = np.repeat(np.arange(num_people), num_questions), np.tile(np.arange(num_questions), num_people)
    clusters = [person, question] if crossed else [np.arange(len(person))]
    hits = []
    for seed in range(80):
        values = rng.normal(0, spread[0], num_people)[person] + rng.normal(0, spread[1], num_questions)[question]
        values = values + rng.normal(0, spread[2], len(person))
        found = bootstrap_interval(values, clusters, num_samples=150, seed=seed)
        hits.append(found.low <= 0 <= found.high)
    return float(np.mean(hits))


def test_crossed_clusters_cover_where_rows_do_not():
    # 95 % asked; 80 simulations have a standard error of 2.4 %.
    assert 0.90 <= coverage(30, 12, (0.5, 0.5, 0.5), crossed=True)
    assert coverage(30, 12, (0.5, 0.5, 0.5), crossed=False) < 0.6


def test_few_clusters_cover():
    # Ten people: without the correction for few clusters 95 % would be about 90 %.
    rng = np.random.default_rng(1)
    runs = [bootstrap_interval(rng.normal(size=10), [np.arange(10)], num_samples=150, seed=s) for s in range(120)]
    assert np.mean([run.low <= 0 <= run.high for run in runs]) >= 0.92


def test_percentiles_move_out_for_few_clusters():
    # Five clusters: the 97.5 % point of t with 4 degrees of freedom is 2.776445, times sqrt(5/4).
    edge = math.erfc(2.776445 * math.sqrt(5 / 4) / math.sqrt(2)) / 2
    assert intervals.percentiles(np.linspace(0, 1, 100_001), 5, 0.95) == pytest.approx((edge, 1 - edge), rel=1e-4)


def test_what_has_no_interval_says_so():
    single = bootstrap_interval(np.array([1.0, 3]), [np.zeros(2)])
    assert (single.value, single.low, single.high, single.n) == (2, None, None, 1) and "fewer than 5" in single.note
    four, five = np.arange(20) % 4, np.arange(20) % 5
    for clusters in ([four], [np.arange(20), four], [four, np.arange(20)]):  # the smaller number of crossed columns
        found = bootstrap_interval(np.arange(20.0), clusters)
        assert (found.value, found.low, found.high, found.n) == (9.5, None, None, 4)
    assert bootstrap_interval(np.arange(20.0), [five]).low < 9.5
    alike = bootstrap_interval(np.r_[np.ones(9), 5], [np.arange(10)], weights=np.r_[np.ones(9), 0])
    assert (alike.value, alike.low, alike.high, alike.n) == (1, None, None, 10) and "alike" in alike.note
    zero = bootstrap_interval(np.array([[1.0, 0], [2, 0]]), [np.arange(2)], np.divide)
    assert (zero.value, zero.low) == (None, None) and "denominator" in zero.note


def test_what_cannot_be_averaged_is_refused():
    rows = [np.arange(2)]
    with pytest.raises(ValueError, match="row 1 is .*nan"):
        bootstrap_interval(np.array([1.0, np.nan]), rows)
    with pytest.raises(ValueError, match="give the `function`"):
        bootstrap_interval(np.ones((2, 2)), rows)
    with pytest.raises(ValueError, match="`clusters` must hold"):
        bootstrap_interval(np.ones(3), rows)
    with pytest.raises(ValueError, match="`clusters` must hold"):
        bootstrap_interval(np.ones(3), [])
    with pytest.raises(ValueError, match="no rows"):
        bootstrap_interval(np.array([]), [np.array([])])


def test_t_and_prediction_intervals_by_hand():
    # Mean 2, s = 1, n = 3; the 97.5 % point of t with 2 degrees of freedom is 4.302653 in any table.
    values = np.array([1.0, 2, 3])
    found = t_interval(values)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    found = prediction_interval(values)
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 * (4 / 3) ** 0.5, 2 + 4.302653 * (4 / 3) ** 0.5))
    assert found.n == 3


def test_t_interval_is_scipys_and_the_next_draw_falls_into_the_prediction_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(size=7)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (t_interval(values, 0.9).low, t_interval(values, 0.9).high) == pytest.approx(tuple(expected))
    draws = rng.normal(size=(1000, 6))
    inside = [found.low <= new <= found.high for *old, new in draws for found in [prediction_interval(np.array(old))]]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("function", [t_interval, prediction_interval, sign_flip_test])
def test_values_must_be_numbers(function):
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="non-empty row of finite numbers"):
            function(np.array(bad))


def test_one_world_has_no_interval():
    assert (t_interval(np.array([0.3])).value, t_interval(np.array([0.3])).low) == (0.3, None)


def test_sign_flips_by_hand():
    assert sign_flip_test(np.full(10, -0.1)) == 2 / 1024  # only all plus and all minus are as extreme
    # (3, 1, 1): the sums are ±5, ±3, ±3, ±1; 3 - 1 + 1 = 3 or more in absolute value in 6 of 8
    assert sign_flip_test(np.array([3.0, 1, -1])) == 6 / 8
    assert sign_flip_test(np.array([1.0, -1])) == 1


def test_sign_flips_are_scipys_permutation_test():
    differences = np.random.default_rng(0).normal(0.4, 1, size=12)
    expected = stats.permutation_test(
        (differences, np.zeros(12)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=2**12
    )
    assert sign_flip_test(differences) == pytest.approx(expected.pvalue)


def test_sign_flips_are_drawn_where_there_are_too_many():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.3, 1, size=40)
    found = sign_flip_test(differences)
    assert found == sign_flip_test(differences)
    # In large samples the test is the one of the normal distribution with the root of the sum of squares.
    normal = 2 * stats.norm.sf(abs(differences.sum()) / np.sqrt(np.sum(differences**2)))
    assert found == pytest.approx(normal, abs=0.01)
    assert sign_flip_test(np.ones(40)) == pytest.approx(1 / (2**16 + 1))  # never 0: the observed signs are one


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (7, 12), (530, 1000)])
def test_wilson_is_scipys(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    found = wilson_interval(successes, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == successes / n


def test_wilson_takes_half_wins_and_no_trials():
    # p = 1/2, n = 1, z = 1.959964: 1/2 ± z/2 · sqrt(1 + z²) / (1 + z²) = 1/2 ± z / (2 sqrt(1 + z²))
    half = 1.959964 / (2 * math.sqrt(1 + 1.959964**2))
    found = wilson_interval(0.5, 1)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))
    nothing = wilson_interval(0, 0)
    assert (nothing.value, nothing.low, nothing.high) == (None, 0, 1)
    with pytest.raises(ValueError, match="between 0 and n = 3"):
        wilson_interval(4, 3)


@pytest.mark.parametrize(("power", "n"), [(0.8, 34), (0.9, 44), (0.95, 54)])
def test_worlds_needed_for_half_a_standard_deviation(power, n):
    # The textbook numbers for d = 0.5, two-sided 5 %; the sign of the effect plays no part.
    assert worlds_needed(2.0, 1.0, power) == worlds_needed(2.0, -1.0, power) == n


def test_the_power_is_there_in_simulation():
    n = worlds_needed(0.06, 0.05)
    draws = np.random.default_rng(0).normal(0.05, 0.06, size=(4000, n))
    found = np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05)
    assert 0.9 - 0.015 < found < 0.95
    fewer = np.mean(stats.ttest_1samp(draws[:, :-1], 0, axis=1).pvalue < 0.05)
    assert fewer < 0.9 + 0.015


def test_worlds_needed_at_the_edges():
    assert worlds_needed(0.0, 0.1) == 2
    assert worlds_needed(1.0, 100.0) == 2
    with pytest.raises(ValueError, match="more than a million"):
        worlds_needed(1.0, 1e-4)
    with pytest.raises(ValueError, match="`effect` not 0"):
        worlds_needed(1.0, 0.0)


def test_detectable_effect_is_the_inverse():
    effect = detectable_effect(2.0, 44)
    assert worlds_needed(2.0, effect * 1.0001) == 44 and worlds_needed(2.0, effect * 0.999) == 45
    # In large samples (1.959964 + 1.281552) standard errors
    assert detectable_effect(1.0, 10000) == pytest.approx(0.03241516, rel=1e-3)
    with pytest.raises(ValueError, match="`n` must be at least 2"):
        detectable_effect(1.0, 1)
