# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Judged by a server on loopback, whose verdicts are known."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit

from trl_cuma.evaluation.winrate import judge_agreement, judge_pairs, length_controlled_win_rate, pairwise_win_rate

from ..rewards import conftest as rewards
from ..rewards.conftest import Response, section

server, make_judge = rewards.server, rewards.make_judge
BRAZIL, JAPAN = {"country": "Brazil"}, {"country": "Japan"}
QUIET = {"description": None, "num_samples": 100}


def by_mark(question):
    """Prefers the answer that says "good"; looks at the place only where one says "first", and breaks at "broken"."""
    first, second = section(question, "answer_a"), section(question, "answer_b")
    if "broken" in first + second:
        return Response(status=500)
    if "first" in first + second or ("good" in first) > ("good" in second):
        return "[[A]]"
    return "[[B]]" if ("good" in second) > ("good" in first) else "[[C]]"


def by_length(question):
    first, second = (len(section(question, tag)) for tag in ("answer_a", "answer_b"))
    return "[[C]]" if first == second else "[[A]]" if first > second else "[[B]]"


# 5 wins, 2 losses, 2 ties (one of them by the order), 1 failure
ANSWERS = ["good"] * 5 + ["bad"] * 2 + ["so so", "first", "broken"]
OTHERS = ["bad"] * 5 + ["good"] * 2 + ["well", "second", "good"]
PROMPTS = [f"question {row // 2}" for row in range(10)]
PEOPLE = [BRAZIL, JAPAN] * 5


def test_a_win_rate_by_hand(server, make_judge):
    """
    5 wins and 2 ties of the 9 that were scored: p = 6/9. Wilson's interval, with z = 1.96: the centre is
    (p + z²/18) / (1 + z²/9) = 0.6168 and the half-width z · sqrt(p(1-p)/9 + z²/324) / (1 + z²/9) = 0.2626. Without
    ties: 5/7, centre (5/7 + z²/14) / (1 + z²/7) = 0.6384, half-width 0.2794.
    """
    server.respond = by_mark
    result = pairwise_win_rate(make_judge(max_failure_rate=1.0), PROMPTS, ANSWERS, OTHERS, PEOPLE, **QUIET)
    assert result["counts"] == {
        "rows": 10,
        "wins": 5,
        "losses": 2,
        "ties": 2,
        "order_disagreements": 1,
        "unscored": 1,
        "without_profile": 0,
        "failures": {"http_500": 2},
        "requests": 20,
        "cached_verdicts": 0,
    }
    rate = result["win_rate"]
    assert (rate["value"], rate["n"]) == (pytest.approx(6 / 9), 9)
    assert (rate["low"], rate["high"]) == pytest.approx((0.6168 - 0.2626, 0.6168 + 0.2626), abs=1e-4)
    decided = result["win_rate_decided"]
    assert (decided["value"], decided["n"]) == (pytest.approx(5 / 7), 7)
    assert (decided["low"], decided["high"]) == pytest.approx((0.6384 - 0.2794, 0.6384 + 0.2794), abs=1e-4)
    resampled = result["win_rate_resampled"]
    assert (resampled["value"], resampled["n"]) == (rate["value"], 2)  # of people
    # Of the rows that were scored: 5 · "good", 2 · "bad", "so so", "first"
    assert result["length"]["mean"] == pytest.approx((5 * 4 + 2 * 3 + 5 + 5) / 9)
    assert result["length"]["longer"] == pytest.approx(6 / 9)  # "good" than "bad", "so so" than "well"
    text = json.dumps(result).lower()
    for secret in ("brazil", "japan", "question", "good", "so so"):
        assert secret not in text


def test_a_failure_is_in_no_rate(server, make_judge):
    server.respond = lambda question: Response(status=500)
    judge = make_judge(max_failure_rate=1.0)
    result = pairwise_win_rate(judge, ["q"] * 3, list("abc"), list("xyz"), PEOPLE[:3], **QUIET)
    assert (result["counts"]["unscored"], result["counts"]["wins"], result["counts"]["ties"]) == (3, 0, 0)
    rates = ("win_rate", "win_rate_decided", "win_rate_resampled", "length_controlled")
    assert [result[name]["value"] for name in rates] == [None] * 4


def test_a_run_that_was_cut_short_asks_only_what_is_missing(server, make_judge, tmp_path):
    server.respond = by_mark
    rows = (PROMPTS[:9], ANSWERS[:9], OTHERS[:9], PEOPLE[:9])
    path = tmp_path / "verdicts"
    judge_pairs(make_judge(cache_path=path), *(column[:3] for column in rows), description=None)
    judge = make_judge(cache_path=path)
    again = judge_pairs(judge, *rows, batch_size=2, description=None)
    assert (again.stats.cache_hits, again.stats.requests) == (6, 12)
    assert len(server.bodies) == 18  # two for each row
    np.testing.assert_array_equal(again.scores, [1, 1, 1, 1, 1, 0, 0, 0.5, 0.5])
    third = judge_pairs(judge, *rows, description=None).document()  # what it did before is not counted
    assert (third["requests"], third["cached_verdicts"], third["order_disagreements"]) == (0, 18, 1)


def test_rows_that_do_not_fit_are_refused_before_the_first_request(server, make_judge):
    with pytest.raises(ValueError, match="'prompts': 2, 'answers': 1"):
        judge_pairs(make_judge(), ["q"] * 2, ["a"], ["b"] * 2, PEOPLE[:2])
    with pytest.raises(ValueError, match="Row 3 .* the other answer"):
        judge_pairs(make_judge(), ["q"] * 4, ["a"] * 4, [*"bcd", None], PEOPLE[:4], batch_size=1)
    assert not server.bodies


# ---------------------------------------------------------------------- length
def controlled(scores, lengths, others, num_samples=20):
    rows = np.arange(len(scores))
    return length_controlled_win_rate(scores, lengths, others, [rows, rows], num_samples=num_samples)


@pytest.mark.parametrize(
    ("won_longer", "won_shorter", "raw"),
    [
        (2400, 200, 2600 / 4000),  # length alone: 80 % of 3000 and 20 % of 1000
        (2700, 400, 3100 / 4000),  # better as well: 90 % and 40 %
    ],
)
def test_with_two_lengths_the_answer_is_known(won_longer, won_shorter, raw):
    """
    3000 answers are longer by 100 characters and 1000 shorter by 100, so that x is ±t. The fit meets both shares:
    θ + φt = logit(p+), θ - φt = logit(p-), hence θ = (logit p+ + logit p-)/2. The prior's pull on φ, about φ/9, is
    little against the information of 4000 rows.
    """
    scores = np.repeat([1.0, 0.0, 1.0, 0.0], [won_longer, 3000 - won_longer, won_shorter, 1000 - won_shorter])
    lengths = np.repeat([600, 400], [3000, 1000])
    assert scores.mean() == raw
    expected = expit((logit(won_longer / 3000) + logit(won_shorter / 1000)) / 2)  # 0.5 and 0.710
    assert controlled(scores, lengths, np.full(4000, 500))["value"] == pytest.approx(expected, abs=0.002)


def test_a_judge_that_only_looks_at_length_is_found_out(server, make_judge):
    """
    The differences of length are evenly spaced from -95 to 295: three of four answers win. Around 0 there are as many
    on either side, and only there, where the curve is steep, does the fit learn where it crosses 1/2: at 0.
    """
    server.respond = by_length
    answers = ["x" * (305 + 10 * step) for step in range(40)]
    others, prompts = ["y" * 400] * 40, [f"q{row}" for row in range(40)]
    result = pairwise_win_rate(make_judge(), prompts, answers, others, [BRAZIL] * 40, **QUIET)
    assert result["win_rate"]["value"] == result["length"]["longer"] == 0.75
    found = result["length_controlled"]
    assert abs(found["value"] - 0.5) < 0.1  # the prior softens the step: less so with more rows
    assert found["low"] < 0.5 < found["high"]
    assert found["length_effect"] > 3
    gap = np.arange(-99.5, 300, 1)
    many = controlled((gap > 0).astype(float), 500 + gap, np.full(400, 500))
    assert many["value"] == pytest.approx(0.5, abs=0.01)


def test_where_length_does_not_differ_it_is_the_plain_win_rate():
    scores = np.array([1, 1, 0, 0.5])
    same = controlled(scores, np.full(4, 7), np.full(4, 7))
    assert same["value"] == pytest.approx(2.5 / 4)
    assert same["length_effect"] == 0
    everything = controlled(np.ones(4), np.array([9, 8, 7, 6]), np.full(4, 7))
    assert (everything["value"], everything["low"]) == (1.0, None)
    assert "alike" in everything["note"]


def test_the_interval_covers_a_known_advantage():
    """
    True length-controlled win-rate 0.6. The standard error of a share near there is sqrt(0.24/400) = 0.025; beside the
    length it is a little more, so that the interval is 0.1 to 0.16 wide.
    """
    rng = np.random.default_rng(0)
    gap = rng.normal(100, 200, 400)
    scores = (rng.random(400) < expit(logit(0.6) + np.tanh(gap / gap.std()))).astype(float)
    result = controlled(scores, 500 + gap, np.full(400, 500), num_samples=300)
    assert result["low"] < 0.6 < result["high"]
    assert 0.1 < result["high"] - result["low"] < 0.16


# ---------------------------------------------------------------------- people
def test_agreement_with_people_and_among_people(server, make_judge):
    """
    Four people choose between the same answers: three the good one, one the bad. Each of the three has 2 of 3 others
    on their side, the fourth none: (3 · 2/3 + 0)/4 = 1/2. The judge agrees with three of four. Choices about another
    prompt are no choices between these, though the answers are the same.
    """
    server.respond = by_mark
    chosen = ["good", "good", "good", "bad", "good", "well"]
    rejected = ["bad", "bad", "bad", "good", "bad", "so so so"]
    prompts = ["q", "q", "q", "q", "z", "z"]
    people = ["a", "b", "c", "d", "a", "b"]
    result = judge_agreement(make_judge(), prompts, chosen, rejected, [BRAZIL] * 6, people, **QUIET)
    counts = result["counts"]
    assert (counts["rows"], counts["wins"], counts["losses"], counts["ties"]) == (6, 4, 1, 1)
    assert (counts["people"], counts["shared"]) == (4, 4)
    assert result["agreement"]["value"] == pytest.approx(4.5 / 6)
    assert result["agreement_decided"]["value"] == pytest.approx(4 / 5)
    assert result["chance"] == 0.5
    assert result["longer"]["value"] == pytest.approx(4 / 6)  # not "bad" than "good", "well" than "so so so"
    assert result["people"]["value"] == pytest.approx(0.5)
    assert result["agreement_shared"]["value"] == pytest.approx(3 / 4)
    for name in ("agreement", "people"):
        assert result[name]["low"] is None and "fewer than 5" in result[name]["note"]  # of four people
    assert "good" not in json.dumps(result)


def test_rows_that_the_judge_failed_on_are_in_peoples_agreement_alone(server, make_judge):
    server.respond = by_mark
    chosen, rejected = ["good", "broken", "broken"], ["bad", "bad", "bad"]
    judge = make_judge(max_failure_rate=1.0)
    result = judge_agreement(judge, ["q"] * 3, chosen, rejected, [BRAZIL] * 3, ["a", "b", "c"], **QUIET)
    assert (result["counts"]["unscored"], result["agreement"]["value"]) == (2, 1.0)
    assert result["people"]["value"] == 1.0
    assert result["agreement_shared"]["value"] is None


def test_a_person_who_comes_twice_is_one_person(server, make_judge):
    """Ann and Ben differ: neither has anybody on their side, however often Ann comes."""
    server.respond = by_mark
    rows = (["q"] * 3, ["good", "good", "bad"], ["bad", "bad", "good"], [BRAZIL] * 3)
    assert judge_agreement(make_judge(), *rows, ["ann", "ann", "ben"], **QUIET)["people"]["value"] == 0.0
    with pytest.raises(ValueError, match="`person_ids` has 2 rows"):
        judge_agreement(make_judge(), *rows, ["ann", "ben"], **QUIET)
