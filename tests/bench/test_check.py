# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`--check` by hand: one more world is held against what one more world would be, and not against the mean."""

import math
from types import SimpleNamespace

import pytest

from trl_cuma.bench.check import check, table

SUITE = SimpleNamespace(data=SimpleNamespace(headline="emd"), arms=[SimpleNamespace(key="cuma")])


def results(emds: dict[str, float]) -> dict:
    runs = {world: {"budgets": {"400": {"splits": {"held_out_people": {"emd": emd}}}}} for world, emd in emds.items()}
    return {"sft": {"cuma": runs}}


def test_a_new_world_is_held_against_the_prediction_interval():
    published = results({"0": 0.1, "1": 0.2, "2": 0.3})  # mean .2, s = .1
    half = 4.302653 * 0.1 * math.sqrt(1 + 1 / 3)  # t_{2, .975} s sqrt(1 + 1/n) = .497; a t interval's half is .248
    inside, outside = check(SUITE, published, results({"7": 0.2 + half - 1e-3, "8": 0.2 + half + 1e-3}))
    assert (inside.world, inside.value, inside.published) == ("7", 0.2 + half - 1e-3, pytest.approx(0.2))
    assert (inside.low, inside.high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-6)
    assert inside.inside and not outside.inside
    assert "1 of 2 inside" in table(SUITE, [inside, outside])


def test_what_was_published_checks_nothing():
    published = results({"0": 0.1, "1": 0.2})
    with pytest.raises(ValueError, match="World 1 is published"):
        check(SUITE, published, results({"1": 0.2}))
    with pytest.raises(ValueError, match="no two worlds of arm 'cuma'"):
        check(SUITE, results({"0": 0.1}), results({"1": 0.2}))
