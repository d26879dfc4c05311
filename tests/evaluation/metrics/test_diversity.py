# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest

from trl_cuma.evaluation.metrics import distinct_n, distinct_ratio


def test_distinct_n_by_hand():
    texts = ["the cat sat", "The cat ran"]
    assert distinct_n(texts, 1) == pytest.approx(4 / 6)  # the, cat, sat, ran of six words
    assert distinct_n(texts, 2) == pytest.approx(3 / 4)  # "the cat" twice; no pair "sat The" across texts
    assert distinct_n(texts, 3) == 1
    assert distinct_n(texts, 4) == 0
    assert distinct_n(["", " "], 1) == 0


def table(cells: list[list[list[str]]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts by prompt and profile, laid out as rows."""
    rows = [
        (text, about, who) for about, people in enumerate(cells) for who, same in enumerate(people) for text in same
    ]
    texts, prompt, profile = zip(*rows, strict=True)
    return list(texts), np.array(prompt), np.array(profile)


def test_a_text_of_ones_own_per_profile():
    # Within a profile both texts are the same two words: 2 of 4. Between two profiles all four differ: 4 of 4.
    cells = [[["a b", "a b"], ["c d", "c d"]], [["e f", "e f"], ["g h", "g h"], ["i j", "i j"]]]
    found = distinct_ratio(*table(cells), n=1)
    assert (found.value, found.low, found.n) == (pytest.approx(2), None, 2)  # of two prompts no interval


def test_profiles_that_make_no_difference_give_one_whatever_the_temperature():
    rng = np.random.default_rng(0)
    for words in (4, 40):  # little and much variety
        cells = [
            [[" ".join(rng.integers(words, size=8).astype(str)) for _ in range(4)] for _ in range(6)]
            for _ in range(25)
        ]
        found = distinct_ratio(*table(cells), n=2, draws=40, num_samples=200)
        assert found.low < 1 < found.high
        assert found.value == pytest.approx(1, abs=0.05)


def test_more_texts_on_one_side_do_not_count():
    # Twelve profiles with three identical texts each: sets of 3 on both sides, 3 of 9 words against 9 of 9.
    cells = [[[f"a{who} b{who} c{who}"] * 3 for who in range(12)]] * 2
    assert distinct_ratio(*table(cells), n=1).value == pytest.approx(3)


def test_texts_without_an_n_gram_have_no_ratio():
    found = distinct_ratio(*table([[["a", "a"], ["b", "b"]]] * 2), n=2)
    assert found.value is None and "denominator is zero" in found.note


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="the fewest are 2 and 1"):
        distinct_ratio(*table([[["a b"], ["c d", "e f"]]]))
    with pytest.raises(ValueError, match="the fewest are 1 and 2"):
        distinct_ratio(*table([[["a b", "c d"]]]))
    with pytest.raises(ValueError, match="one entry per text"):
        distinct_ratio(["a"], np.array([0]), np.array([]))
