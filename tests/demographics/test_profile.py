# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from trl_cuma.demographics import DemographicProfile

SECRET = "Xyzzyland"  # stands for a person's value: it must not show up anywhere
read = DemographicProfile.from_value


def test_canonical_text_does_not_depend_on_order_or_blanks():
    profile = read({"country": " JP ", "age": 30})
    assert profile.text == "age: 30; country: JP"
    assert list(profile.fields.items()) == [("age", "30"), ("country", "JP")]
    assert profile == read({" age": "30", "country": "JP"})
    assert hash(profile) == hash(read({" age": "30", "country": "JP"}))
    assert profile != read({"country": "JP"})


@pytest.mark.parametrize("value", [30, 30.0, "30", " 30 ", np.int64(30), np.float32(30.0)])
def test_one_number_has_one_text(value):
    assert read({"age": value}).text == "age: 30"


def test_other_scalars():
    assert (
        read({"score": 2.5, "urban": True, "child": np.bool_(False)}).text == "child: false; score: 2.5; urban: true"
    )


def test_absent_and_unknown_fields_are_the_same():
    # Arrow fills the fields that a row lacks with None.
    known = read({"country": "JP"})
    assert read({"country": "JP", "age": None, "income": float("nan")}) == known
    assert hash(read({"country": "JP", "age": None})) == hash(known)
    assert read({"country": "JP", "age": None}).names == {"country", "age"}


@pytest.mark.parametrize(
    "value",
    [
        None,
        float("nan"),
        np.float32("nan"),
        "",
        "  ",
        "NaN",
        "n/a",
        "Prefer not to say",
        "PREFER NOT TO SAY.",
        "No answer",
        "Don't know",
        "Don\N{RIGHT SINGLE QUOTATION MARK}t know",
        "Don\N{ACUTE ACCENT}t know",
        "Not asked",
        "Missing",
        "Missing; Not available",
        "Missing;Unknown",
        "Missing, Not available",
        "No answer/ refused",
        "unknown",
    ],
)
def test_missing_values(value):
    assert read(value).is_missing
    assert read({"age": value}).is_missing
    assert read({"age": value}).text == ""
    assert read({"age": value, "country": "JP"}).text == "country: JP"


@pytest.mark.parametrize("value", ["none", "None", "NA", "Other", "0", 0, False, "missing teeth"])
def test_real_answers_that_look_missing_are_kept(value):
    # religion: none; country: NA (Namibia); children: 0
    assert not read({"field": value}).is_missing


def test_empty_mapping_is_missing():
    assert read({}).is_missing
    assert read({}) == read(None) == read("")


def test_plain_text_has_no_fields():
    profile = read("  A nurse from Osaka. ")
    assert profile.text == "A nurse from Osaka."
    assert profile.fields == {}
    assert profile != read(None)
    assert read(profile) is profile


def test_pickles():
    profile = read({"country": "JP"})
    assert pickle.loads(pickle.dumps(profile)) == profile


def test_is_frozen():
    profile = read({"country": "JP"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.text = "age: 3"
    profile.fields["country"] = "FR"
    assert profile.fields == {"country": "JP"}


@pytest.mark.parametrize("value", [{"country": SECRET}, SECRET, None])
def test_shows_no_value(value):
    assert SECRET not in f"{read(value)!r} {read(value)} {[read(value)]}"
    assert "country" in repr(read({"country": SECRET}))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"home": {"country": SECRET}}, TypeError, "field 'home' of a demographic profile is a dict"),
        ({"langs": [SECRET]}, TypeError, "field 'langs' of a demographic profile is a list"),
        ({"langs": np.array([SECRET, SECRET])}, TypeError, "field 'langs' of a demographic profile is a ndarray"),
        ({"age": float("inf")}, ValueError, "field 'age' of a demographic profile is infinite"),
        ({3: SECRET}, TypeError, "field name of a demographic profile is text, got int"),
        ({" ": SECRET}, ValueError, "a field without a name"),
        ({"age": SECRET, " age": SECRET}, ValueError, "the field 'age' twice"),
        ([0.1, 0.2], TypeError, "got list. A list of numbers is a vector, not a profile"),
        (np.zeros(3), TypeError, "got ndarray. A list of numbers is a vector"),
        (30, TypeError, "got int"),
    ],
)
def test_bad_profiles(value, error, message):
    with pytest.raises(error, match=message) as caught:
        read(value)
    assert SECRET not in str(caught.value)


def test_every_missing_code_of_the_world_values_survey_is_read_as_missing():
    data = Path(os.environ.get("CUMA_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = data / "wvb" / "codebook.json"
    if not path.exists():
        pytest.skip(f"{path} is absent (set CUMA_DATA)")
    codebook = json.loads(path.read_text())
    # Age group, sex, education, marital status, religion, ethnicity, employment. Negative codes mean: not known.
    for question in ["X003R", "Q260", "Q275", "Q273", "Q289", "Q290", "Q279"]:
        for code, label in codebook[question]["choices"].items():
            assert read({"field": label}).is_missing == code.startswith("-"), (question, code)
