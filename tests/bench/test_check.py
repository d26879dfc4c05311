# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`--check` by hand: one more world is held against what one more world would be, and not against the mean."""

import json
import math
from types import SimpleNamespace

import pytest

from trl_cuma.bench.check import check, read_published, table

SUITE = SimpleNamespace(
    data=SimpleNamespace(headline="emd"),
    arms=[SimpleNamespace(key="cuma")],
    compare=[],
    worlds=(1, 2),
    training=SimpleNamespace(steps=400, factors=(1,)),
)


def results(emds: dict[str, float]) -> dict:
    runs = {world: {"budgets": {"400": {"splits": {"held_out_people": {"emd": emd}}}}} for world, emd in emds.items()}
    return {"chosen": {"cuma": {"settings": [1e-3, 2]}}, "sft": {"cuma": runs}}


def test_a_new_world_is_held_against_the_prediction_interval():
    published = results({"0": 0.1, "1": 0.2, "2": 0.3})  # mean .2, s = .1
    half = 4.302653 * 0.1 * math.sqrt(1 + 1 / 3)  # t_{2, .975} s sqrt(1 + 1/n) = .497; a t interval's half is .248
    inside, outside = check(SUITE, published, results({"7": 0.2 + half - 1e-3, "8": 0.2 + half + 1e-3}))
    assert (inside.world, inside.value, inside.published) == ("7", 0.2 + half - 1e-3, pytest.approx(0.2))
    assert (inside.low, inside.high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-6)
    assert inside.inside and not outside.inside
    assert "1 of 2 inside" in table(SUITE, [inside, outside])


def test_a_compared_pair_is_held_against_the_interval_of_its_ratios():
    pair = SimpleNamespace(**{**vars(SUITE), "arms": [SimpleNamespace(key=key) for key in ("cuma", "film")]})
    pair.compare = [["cuma", "film"], ["cuma", "marginal"]]

    def of_both(cuma: dict[str, float], film: dict[str, float]) -> dict:
        return {"chosen": {}, "sft": {**results(cuma)["sft"], "film": results(film)["sft"]["cuma"]}}

    # log ratios -1, 0, 1: mean 0, s = 1. Both arms of the new world are far outside, their ratio is not.
    published = of_both({"0": math.exp(-1), "1": 0.5, "2": 0.5}, {"0": 1.0, "1": 0.5, "2": 0.5 / math.e})
    checked = check(pair, published, of_both({"7": 80.0}, {"7": 40.0}))
    assert [one.what for one in checked] == ["cuma", "film", "cuma ÷ film"]
    assert [one.inside for one in checked] == [False, False, True]
    half = 4.302653 * math.sqrt(1 + 1 / 3)
    assert (checked[2].value, checked[2].published) == pytest.approx((2.0, 1.0))
    assert (checked[2].low, checked[2].high) == pytest.approx((math.exp(-half), math.exp(half)), rel=1e-6)


PUBLISHED = results({"7": 0.1, "8": 0.2})


def test_published_results_are_read(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(PUBLISHED))
    assert read_published(tmp_path / "results.json", SUITE) == PUBLISHED


@pytest.mark.parametrize(
    ("published", "message"),
    [
        (results({"0": 0.1, "2": 0.2}), "World 2 is published"),
        (results({"7": 0.1}), "no two worlds of arm 'cuma'"),
        ({**PUBLISHED, "sft": {}}, "no two worlds of arm 'cuma'"),
        ({**PUBLISHED, "chosen": {}}, "no two worlds of arm 'cuma'"),
        ({"sft": PUBLISHED["sft"]}, "is no results.json of a finished suite"),
        ([1, 2], "is no results.json of a finished suite"),
        (json.loads(json.dumps(PUBLISHED).replace('"400"', '"200"')), "no budget of 400 steps of arm 'cuma'"),
    ],
)
def test_what_nothing_can_be_checked_by_is_named(tmp_path, published, message):
    (tmp_path / "results.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match=message):
        read_published(tmp_path / "results.json", SUITE)
    (tmp_path / "results.json").write_text("# Tables")
    with pytest.raises(ValueError, match="results.json is no JSON"):
        read_published(tmp_path / "results.json", SUITE)
