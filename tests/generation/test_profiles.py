# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What people type as a profile, and what they are told of it: names and what is known, never what they typed."""

import pytest

from trl_cuma import DemographicTable, FieldEncoder, TextEncoder
from trl_cuma.generation.profiles import check_profile, parse_profile

PEOPLE = [{"country": "Kenya", "age": "18"}, {"country": "Japan", "age": "70"}]


@pytest.fixture
def table():
    return DemographicTable(FieldEncoder(min_count=1).fit(PEOPLE))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("country=Kenya,age=25-34", {"country": "Kenya", "age": "25-34"}),
        (" country = South Korea , age=30", {"country": "South Korea", "age": "30"}),
        ("formula=a=b", {"formula": "a=b"}),
        ("age=", {"age": ""}),
        ('{"country": "Korea, South", "age": 30}', {"country": "Korea, South", "age": 30}),
        ('"a nurse from Nairobi, 30"', "a nurse from Nairobi, 30"),
        ("  ", None),
    ],
)
def test_a_profile_is_fields_or_json(text, expected):
    assert parse_profile(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("country=Korea, South", "part 2, between commas, is no `field=value`. Where a value contains a comma, write"),
        ("Zanzibar", "part 1, between commas, is no `field=value`"),
        ("=Zanzibar", "part 1, between commas, is no `field=value`"),
        ("country=Zanzibar,country=Zanzibar", "has the field 'country' twice"),
        ('{"country": "Zanzibar"', "is no JSON: Expecting ',' delimiter at character 23"),
        ('["Zanzibar"]', "is a mapping of fields, a text or None, got list"),
        ('{"country": {"born": "Zanzibar"}}', "field 'country' of a demographic profile is a dict"),
    ],
)
def test_what_cannot_be_read_is_said_without_its_values(text, message):
    with pytest.raises(ValueError) as caught:
        parse_profile(text, "`--profile` number 2")
    said = str(caught.value)
    assert said.startswith("`--profile` number 2") and message in said and "Zanzibar" not in said


def test_known_profiles_need_no_word(table):
    assert check_profile(table, PEOPLE[0]) == []
    assert check_profile(table, {"country": "Japan"}) == []  # a field may be missing


def test_unknown_fields_and_values_come_with_the_known_ones(table):
    warnings = check_profile(table, {"country": "Zanzibar", "age": "18", "planet": "Zanzibar"}, "Profile 3")
    assert warnings == [
        "Profile 3 has the field planet, which the adapter doesn't know and leaves out. It knows the fields age, "
        "country.",
        "Profile 3 has a value of the field country that the adapter doesn't know; it counts as not given. It knows "
        "Japan; Kenya.",
    ]
    assert "nobody in particular" in check_profile(table, {"country": "Zanzibar"})[-1]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"planet": "Zanzibar"}, "has no field that the adapter knows. It knows the fields age, country."),
        (None, "is missing or says nothing, and the adapter needs one. It knows the fields age, country."),
        ({"country": "unknown"}, "is missing or says nothing"),
        ("Zanzibar", "is a plain text, and the adapter reads fields. It knows the fields age, country."),
    ],
)
def test_a_profile_that_cannot_be_used_is_an_error(table, profile, message):
    with pytest.raises(ValueError) as caught:
        check_profile(table, profile)
    assert message in str(caught.value) and "Zanzibar" not in str(caught.value)


def test_where_a_missing_profile_means_the_average_none_is_needed():
    table = DemographicTable(FieldEncoder(min_count=1).fit(PEOPLE), missing="zero")
    assert check_profile(table, None) == []
    with pytest.raises(ValueError, match="has no field that the adapter knows"):
        check_profile(table, {"planet": "Mars"})


def test_a_text_encoder_reads_any_text():
    table = DemographicTable(TextEncoder("some/encoder"))
    assert check_profile(table, "a nurse") == check_profile(table, {"planet": "Mars"}) == []
    with pytest.raises(ValueError, match="is missing, and the adapter needs one"):
        check_profile(table, None)


def test_a_model_that_reads_no_profile_takes_none():
    assert check_profile(None, None) == []
    with pytest.raises(ValueError, match="the model reads no profile. Leave it out."):
        check_profile(None, PEOPLE[0])
