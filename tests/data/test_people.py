# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pandas as pd
import pytest

from trl_cuma.data.people import canonical_people
from trl_cuma.data.report import Report


def people(**columns):
    return pd.DataFrame(columns, index=[f"p{row}" for row in range(len(next(iter(columns.values()))))])


def grouped(values, min_count=30):
    return canonical_people(people(field=values), Report(""), min_count, keep_unknown=True)["field"].tolist()


@pytest.mark.parametrize("text", ["nan", "Prefer not to say", "No answer", "Missing; Not available", "", None, np.nan])
def test_what_says_nothing_becomes_none(text):
    assert grouped([text, "A", "A"], min_count=1) == [None, "A", "A"]


def test_values_of_fewer_than_thirty_people_are_grouped():
    assert grouped(["A"] * 30 + ["B"] * 29 + ["C"]) == ["A"] * 30 + ["Other"] * 30
    assert grouped(["A"] * 29 + ["B"] * 30) == [None] * 29 + ["B"] * 30  # 29 "Other" would be as rare


def test_the_sources_own_other_is_one_group_with_them():
    assert grouped(["A"] * 40 + ["Other"] * 20 + ["B"] * 10) == ["A"] * 40 + ["Other"] * 30
    assert grouped(["A"] * 40 + ["Other"] * 29) == ["A"] * 40 + [None] * 29


def test_min_count_one_groups_nothing():
    assert grouped(["A", "B", "Other"], min_count=1) == ["A", "B", "Other"]


def test_numbers_are_texts_and_a_column_may_be_all_missing():
    result = canonical_people(people(age=[30.0, np.nan], unknown=[None, np.nan]), Report(""), 1, keep_unknown=True)
    assert result["age"].tolist() == ["30", None]
    assert result["unknown"].tolist() == [None, None]


def test_the_report_counts_and_names_no_value():
    report = Report("")
    canonical_people(people(country=["Ruritania"] * 5 + [None], age=["18-24"] * 5 + [None]), report, 3)
    canonical_people(people(country=["Ruritania"] * 2 + ["Elbonia"] * 3), report, 3)
    assert report.notes == {"values of `country` that fewer than 3 people hold, grouped": 1}
    assert report.drops == {"people": {"nothing is known of them": 3}}


def test_people_of_whom_nothing_is_known_are_left_out():
    given = people(country=["A", "No answer", None, "A"], age=[None, "nan", "25-34", None])
    for keep, rows in ((False, ["p0", "p2", "p3"]), (True, ["p0", "p1", "p2", "p3"])):
        report = Report("")
        report.read("people", 4)
        assert canonical_people(given, report, 1, keep_unknown=keep).index.tolist() == rows
        assert report.kept("people") == len(rows)


def test_a_person_who_comes_twice_is_an_error():
    with pytest.raises(ValueError, match="1 rows repeat the id"):
        canonical_people(pd.DataFrame({"age": ["a", "b"]}, index=["same", "same"]), Report(""))


@pytest.mark.parametrize("min_count", [0, -1, 2.5, True])
def test_min_count_is_a_positive_integer(min_count):
    with pytest.raises(ValueError, match="min_count"):
        canonical_people(people(age=["a"]), Report(""), min_count)
