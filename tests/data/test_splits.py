# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from trl_cuma.data.leakage import assert_disjoint
from trl_cuma.data.splits import (
    ANY,
    DROPPED,
    SPLITS,
    SplitOptions,
    split_people,
    split_prompts,
    split_rows,
)

TRAIN, VALIDATION, TEST, COMBINATIONS, COUNTRIES = range(5)
FIELDS = ("country", "religion")


def make_people(number: int = 3000, seed: int = 0) -> pd.DataFrame:
    """Seven countries and four religions of unequal size; some people are "Other" or say nothing."""
    draw = np.random.default_rng(seed)
    countries = np.array(["Arvenia", "Belmora", "Castrel", "Dorvia", "Elystan", "Farholm", "Galdria", "Other", None])
    religions = np.array(["Solarist", "Riverfolk", "Ashen Path", "Lantern", "Other", None])
    return pd.DataFrame(
        {
            "country": draw.choice(countries, number, p=[0.25, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.06, 0.05]),
            "religion": draw.choice(religions, number, p=[0.4, 0.25, 0.15, 0.08, 0.07, 0.05]),
            "age": draw.choice(["16-24", "25-34"], number),
        },
        index=[f"p{n}" for n in range(number)],
        dtype=object,
    )


def make_groups(seed: int = 0) -> list[str]:
    """400 prompts in groups of 1 to 12."""
    sizes = np.random.default_rng(seed).geometric(0.4, 400).clip(max=12)
    return [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)][:400]


@pytest.mark.parametrize("validation", [0.0, 0.15])
@pytest.mark.parametrize("seed", range(3))
def test_shares_of_people(seed: int, validation: float) -> None:
    labels = split_people(make_people(), SplitOptions(seed=seed, test=0.2, validation=validation))
    assert labels.dtype == np.int8
    assert Counter(labels.tolist()) == Counter(
        {TRAIN: 2400 - round(3000 * validation), TEST: 600} | ({VALIDATION: 450} if validation else {})
    )


@pytest.mark.parametrize("by", [("person", "prompt"), ("person",), ("prompt",)])
@pytest.mark.parametrize(("share", "countries"), [(0.12, 0), (0.12, 2), (0.7, 0)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_every_guarantee_of_held_out_people(seed: int, share: float, countries: int, by: tuple[str, ...]) -> None:
    people = make_people(seed=seed)
    options = SplitOptions(
        seed=seed,
        validation=0.1,
        split_by=by,
        holdout_combinations=FIELDS,
        holdout_share=share,
        holdout_countries=countries,
    )
    labels = dict(zip(people.index, split_people(people, options), strict=True))
    drawn = dict(
        zip(
            people.index,
            split_people(people, replace(options, holdout_combinations=None, holdout_countries=0)),
            strict=True,
        )
    )
    country, religion = people["country"].to_dict(), people["religion"].to_dict()
    trains = TRAIN if "person" in by else ANY

    away = {country[person] for person in labels if labels[person] == COUNTRIES}
    held = {(country[person], religion[person]) for person in labels if labels[person] == COMBINATIONS}
    assert len(away) == countries and held
    assert not {None, "Other"} & (away | {value for pair in held for value in pair})
    for person, label in labels.items():
        if country[person] in away:
            assert label == COUNTRIES
        elif (country[person], religion[person]) in held:
            assert label == COMBINATIONS
        else:
            assert label == drawn[person]  # what is held out moves nobody else

    def training(wanted: dict[str, Any], by_label: dict[str, int]) -> int:
        profile = {"country": country, "religion": religion}
        return sum(
            by_label[person] == trains
            and country[person] not in away
            and all(profile[field][person] == value for field, value in wanted.items())
            for person in labels
        )

    def sizes(pair: tuple[str, str]) -> tuple[int, int]:
        have = sum((country[p], religion[p]) == pair and country[p] not in away for p in labels)
        return have, training(dict(zip(FIELDS, pair, strict=True)), drawn)

    room = share * training({}, drawn)
    for pair in held:
        have, out = sizes(pair)
        assert have >= 30
        assert training({"country": pair[0]}, labels) >= 50
        assert training({"religion": pair[1]}, labels) >= 50
        room -= out
    assert room >= 0
    # Nothing more would have fitted.
    known = {(country[p], religion[p]) for p in labels} - held
    for pair in known:
        if {None, "Other"} & set(pair) or pair[0] in away:
            continue
        have, out = sizes(pair)
        assert (
            have < 30
            or out > room
            or training({"country": pair[0]}, labels) - out < 50
            or training({"religion": pair[1]}, labels) - out < 50
        )


def test_the_smallest_combination_is_held_out_where_none_fits() -> None:
    people = make_people()
    options = SplitOptions(holdout_combinations=FIELDS, holdout_share=1e-6)
    labels = split_people(people, options)
    drawn = split_people(people, replace(options, holdout_combinations=None))
    pairs = list(zip(people["country"], people["religion"], strict=True))
    held = {pair for pair, label in zip(pairs, labels, strict=True) if label == COMBINATIONS}
    assert len(held) == 1
    of_pair, training = Counter(pairs), Counter(p for p, label in zip(pairs, drawn, strict=True) if label == TRAIN)
    eligible = [p for p in of_pair if of_pair[p] >= 30 and not {None, "Other"} & set(p)]  # values have 100s of people
    assert training[held.pop()] == min(training[pair] for pair in eligible)


def test_the_order_of_the_two_fields_makes_no_difference() -> None:
    people = make_people()
    one, other = (split_people(people, SplitOptions(holdout_combinations=f)) for f in (FIELDS, FIELDS[::-1]))
    assert (one == other).all()


def test_people_of_held_out_countries_are_not_in_held_out_combinations() -> None:
    people = make_people()
    options = SplitOptions(holdout_combinations=("age", "religion"), holdout_share=0.3, holdout_countries=("Arvenia",))
    labels = split_people(people, options)
    assert (labels == COMBINATIONS).any()
    assert ((labels == COUNTRIES) == (people["country"] == "Arvenia").to_numpy()).all()


def test_countries_by_name() -> None:
    people = make_people()
    labels = split_people(people, SplitOptions(holdout_countries=["Castrel", "Galdria"]))
    assert ((labels == COUNTRIES) == people["country"].isin(["Castrel", "Galdria"]).to_numpy()).all()


def test_the_sources_own_split_replaces_the_shares() -> None:
    people = make_people(2000)
    names = np.resize(["train", "train", "test", "validation"], 2000)
    given = pd.Series(names, index=people.index).sample(frac=1, random_state=0)  # aligned by id, not by place
    labels = split_people(people, SplitOptions(), given)
    assert [SPLITS[label] for label in labels] == list(names)
    held = split_people(people, SplitOptions(holdout_combinations=FIELDS), given)
    assert (held == COMBINATIONS).any() and ((held == labels) | (held == COMBINATIONS)).all()
    assert set(split_people(people, SplitOptions(split_by=("prompt",)), given)) == {ANY}


def test_people_without_a_row_to_train_on_do_not_count() -> None:
    people = make_people()
    options = SplitOptions(holdout_combinations=FIELDS, holdout_share=0.7)
    can_train = np.random.default_rng(0).random(len(people)) < 0.5
    for mask in (None, can_train):
        labels = split_people(people, options, can_train=mask)
        held = people[labels == COMBINATIONS]
        for field in FIELDS:
            counts = people[field][(labels == TRAIN) & (True if mask is None else mask)].value_counts()
            assert min(counts.get(value, 0) for value in held[field].unique()) >= 50
    everyone = split_people(people, options)
    counts = [people[field][(everyone == TRAIN) & can_train].value_counts() for field in FIELDS]
    held = people[everyone == COMBINATIONS]
    # Without the mask, some value would have kept fewer than 50 who can train.
    assert min(count.get(value, 0) for field, count in zip(FIELDS, counts, strict=True) for value in held[field]) < 50


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_prompts_stay_together_and_fill_the_shares(seed: int) -> None:
    groups = make_groups(seed)
    labels = split_prompts(groups, SplitOptions(seed=seed, test=0.2, validation=0.1))
    assert len(set(zip(groups, labels, strict=True))) == len(set(groups))
    # Groups of one prompt fill up what larger groups leave, so the shares are met to the prompt.
    assert Counter(labels.tolist()) == {TRAIN: 280, VALIDATION: 40, TEST: 80}


def test_prompts_never_exceed_the_share_unless_the_smallest_group_does() -> None:
    labels = split_prompts(["a"] * 6 + ["b"] * 5 + ["c"] * 9, SplitOptions(test=0.1))  # 2 of 20 prompts wanted
    assert labels.tolist() == [TRAIN] * 6 + [TEST] * 5 + [TRAIN] * 9
    labels = split_prompts(["a"] * 6 + ["b"] * 5 + ["c"] * 9, SplitOptions(test=0.5))  # 10: c alone or one of a and b
    assert 5 <= (labels == TEST).sum() <= 10


def test_what_is_not_split_goes_anywhere() -> None:
    assert set(split_prompts(["a", "b"], SplitOptions(split_by=("person",)))) == {ANY}
    assert set(split_people(make_people(50), SplitOptions(split_by=("prompt",)))) == {ANY}


def row_by_rule(person: int, prompt: int) -> int:
    if ANY in (person, prompt):
        return max(person, prompt) if person != prompt else TRAIN
    return person if min(person, TEST) == prompt else DROPPED


def test_rows_by_rule() -> None:
    person, prompt = np.array([*range(5), ANY], dtype=np.int8), np.array([0, 1, 2, ANY], dtype=np.int8)
    rows = split_rows(person[:, None], prompt[None])
    assert rows.dtype == np.int8
    assert rows.tolist() == [[row_by_rule(p, q) for q in prompt.tolist()] for p in person.tolist()]


def ordered(people: pd.DataFrame, options: SplitOptions) -> list[int]:
    return pd.Series(split_people(people, options), index=people.index).sort_index().tolist()


def test_splits_follow_from_seed_and_ids_alone() -> None:
    people, groups = make_people(), make_groups()
    options = SplitOptions(seed=3, validation=0.1, holdout_combinations=FIELDS, holdout_countries=1)
    shuffled = people.sample(frac=1, random_state=5)
    assert ordered(shuffled, options) == ordered(people, options)
    prompts = dict(zip(groups, split_prompts(groups, options), strict=True))
    assert dict(zip(groups[::-1], split_prompts(groups[::-1], options), strict=True)) == prompts

    other = replace(options, seed=4)
    assert ordered(people, other) != ordered(people, options)
    assert dict(zip(groups, split_prompts(groups, other), strict=True)) != prompts
    for held in ({"holdout_combinations": FIELDS}, {"holdout_countries": 1}):  # the same people would train
        apart = [split_people(people, SplitOptions(seed, split_by=("prompt",), **held)) != ANY for seed in range(4)]
        assert len({mask.tobytes() for mask in apart}) > 1


def test_splits_stay_the_same_from_release_to_release() -> None:
    # From a second implementation: `printf '0\0person\0p%d' | b2sum -l 128`, sorted. Another order would let an
    # adapter that was trained before an update be tested on people that it has seen.
    labels = split_people(make_people(20), SplitOptions(test=0.25))
    assert [n for n in range(20) if labels[n] == TEST] == [0, 1, 8, 10, 14]


@pytest.mark.slow
def test_another_process_with_another_hash_seed_agrees() -> None:
    script = (
        "from test_splits import *\n"
        "options = SplitOptions(validation=0.1, holdout_combinations=FIELDS, holdout_countries=2)\n"
        "print(split_people(make_people(), options).tolist(), split_prompts(make_groups(), options).tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {"PYTHONHASHSEED": "12", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    options = SplitOptions(validation=0.1, holdout_combinations=FIELDS, holdout_countries=2)
    mine = f"{split_people(make_people(), options).tolist()} {split_prompts(make_groups(), options).tolist()}\n"
    assert printed == mine


def make_rows(options: SplitOptions, number: int = 6000) -> dict[str, Dataset]:
    """Random people answering random prompts, by split."""
    people, groups = make_people(), make_groups()
    draw = np.random.default_rng(1)
    person, prompt = draw.integers(len(people), size=number), draw.integers(len(groups), size=number)
    rows = pd.DataFrame(
        {
            "person_id": people.index[person],
            "prompt_group": [groups[n] for n in prompt],
            "question_id": [f"q{n}" for n in prompt],
        }
    )
    split = split_rows(split_people(people, options)[person], split_prompts(groups, options)[prompt])
    return {
        SPLITS[label]: Dataset.from_pandas(rows[split == label], preserve_index=False)
        for label in sorted(set(split.tolist()) - {DROPPED})
    }


@pytest.mark.parametrize("by", [("person", "prompt"), ("person",), ("prompt",)])
def test_splits_share_nothing_that_they_must_not(by: tuple[str, ...]) -> None:
    splits = make_rows(
        SplitOptions(validation=0.2, test=0.2, split_by=by, holdout_combinations=FIELDS, holdout_countries=1)
    )
    assert list(splits) == list(SPLITS)
    assert_disjoint(splits, by)
    trained = splits["train"]
    for name in SPLITS[1:]:
        for column, kind in (("person_id", "person"), ("prompt_group", "prompt"), ("question_id", "prompt")):
            shared = set(splits[name][column][:]) & set(trained[column][:])
            always = column == "person_id" and name in ("test_combinations", "test_countries")
            assert bool(shared) == (kind not in by and not always)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 1.5}, "`seed` is 1.5"),
        ({"test": 1.0}, "`test` is 1.0"),
        ({"test": -0.1}, "`test` is -0.1"),
        ({"test": 0.6, "validation": 0.4}, "`validation` is 0.4"),
        ({"split_by": ()}, "`split_by`"),
        ({"split_by": "person"}, "`split_by` is 'person'"),
        ({"split_by": ("people",)}, "`split_by`"),
        ({"holdout_combinations": ("age",)}, "`holdout_combinations`"),
        ({"holdout_combinations": ("age", "age")}, "`holdout_combinations`"),
        ({"holdout_share": 0}, "`holdout_share` is 0"),
        ({"holdout_countries": -1}, "`holdout_countries` is -1"),
        ({"holdout_countries": True}, "`holdout_countries` is True"),
        ({"holdout_countries": "Arvenia"}, "`holdout_countries` is 'Arvenia'"),
        ({"test": 0, "holdout_countries": 1}, "`test` is 0, so there are no test prompts"),
    ],
)
def test_options_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitOptions(**fields)


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (3000, {"holdout_combinations": ("country", "income")}, "needs the profile field 'income'"),
        (3000, {"holdout_countries": ("Atlantis", "Arvenia")}, r"\['Atlantis'\], which none of the 7 countries"),
        (3000, {"holdout_countries": ("Other",)}, r"\['Other'\], which none of the 7"),
        (3000, {"holdout_countries": 7}, "takes all of the 7 countries"),
        (300, {"holdout_combinations": FIELDS}, r"of \d+ combinations [01] have 30 people"),
        (1, {}, "too few"),
        (2, {"validation": 0.1}, "too few"),
    ],
)
def test_people_that_cannot_be_split(number: int, options: dict[str, Any], message: str) -> None:
    people = make_people(number)
    with pytest.raises(ValueError, match=message) as error:
        split_people(people, SplitOptions(**options))
    named = options.get("holdout_countries", 0)
    values = set(people["country"]) | set(people["religion"])
    for value in values - {None, "Other"} - set(named if isinstance(named, tuple) else ()):
        assert value not in str(error.value)


def test_held_out_people_may_not_empty_a_split() -> None:
    people = make_people(200)
    tested = people.index[split_people(people, SplitOptions(test=0.01)) == TEST]
    people.loc[tested, "country"] = "Hallowell"
    with pytest.raises(ValueError, match=r"All people of the splits \['test'\] are held out"):
        split_people(people, SplitOptions(test=0.01, holdout_countries=("Hallowell",)))


def test_people_without_the_field_country() -> None:
    people = make_people(200).drop(columns="country")
    with pytest.raises(ValueError, match="`holdout_countries` needs the profile field 'country'"):
        split_people(people, SplitOptions(holdout_countries=1))


def test_given_splits_and_ids_are_checked() -> None:
    people = make_people(100)
    given = pd.Series("train", index=people.index)
    with pytest.raises(ValueError, match="for 2 people"):
        split_people(people, SplitOptions(), given.iloc[2:])
    given.iloc[0] = "dev"
    with pytest.raises(ValueError, match="for 1 people"):
        split_people(people, SplitOptions(), given)
    with pytest.raises(ValueError, match="repeats 1 ids"):
        split_people(pd.concat([people, people.iloc[:1]]), SplitOptions())


def test_prompts_that_cannot_be_split() -> None:
    for groups in (["a", "a", "a"], []):
        with pytest.raises(ValueError, match="too few"):
            split_prompts(groups, SplitOptions())
