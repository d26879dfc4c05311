# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The people of a data set: profile fields with missing values known as such and rare values grouped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..demographics import DemographicProfile
from ..demographics.field_encoder import check_min_count
from .report import Report

MIN_COUNT = 30
"""Fewer people than this never show by a value of their own."""

OTHER = "Other"
"""What stands for the values that too few people hold."""


def canonical_people(
    people: pd.DataFrame, report: Report, min_count: int = MIN_COUNT, *, keep_unknown: bool = False
) -> pd.DataFrame:
    """
    Profiles as every arm of a comparison gets them.

    A text that says nothing ("Prefer not to say", "No answer", "nan") becomes `None`, as [`DemographicProfile`] reads
    it. A value that fewer than `min_count` people hold becomes `"Other"`, together with the people whose answer was
    "Other"; where all of these are still too few, it becomes `None`. People of whom nothing is known then are left
    out: training stops at them, unless the adapter has `missing_demographics="zero"`.

    Args:
        people (`pd.DataFrame`): One row per person, index `person_id`, one column per profile field: text, number or
            missing.
        report (`Report`): Gets the counts; people who are left out are dropped from its unit "people".
        min_count (`int`, defaults to `30`): 1 groups nothing.
        keep_unknown (`bool`, defaults to `False`): Keep the people of whom nothing is known.

    Returns:
        `pd.DataFrame`: The people who are kept, in their order; each entry a text or `None`.

    Raises:
        `ValueError`: A person comes twice, or `min_count` is not positive.
    """
    check_min_count(min_count)
    if not people.index.is_unique:
        repeated = int(people.index.duplicated().sum())
        raise ValueError(f"{repeated} rows repeat the id of an earlier person. Keep one row per person.")
    columns = {field: grouped(people[field], report, min_count) for field in people.columns}
    result = pd.DataFrame(columns, index=people.index, dtype=object)
    unknown = result.isna().all(axis=1)
    if keep_unknown:
        report.note("people of whom nothing is known, kept", unknown.sum())
        return result
    report.drop("people", "nothing is known of them", unknown.sum())
    return result[~unknown]


def grouped(values: pd.Series, report: Report, min_count: int) -> np.ndarray:
    """One column of [`canonical_people`]: texts or `None`, those of fewer than `min_count` people grouped."""
    codes, distinct = pd.factorize(values.astype(object))  # -1: missing
    texts = [known_text(values.name, value) for value in distinct]
    column = pd.Series(np.array([*texts, None], dtype=object)[codes], dtype=object)
    counts = column.value_counts()
    rare = set(counts.index[counts < min_count]) - {OTHER}
    column[column.isin(rare)] = OTHER
    if (column == OTHER).sum() < min_count:
        column[column == OTHER] = None
    report.note(f"values of `{values.name}` that fewer than {min_count} people hold, grouped", len(rare))
    return column.to_numpy(dtype=object)


def known_text(field: str, value: Any) -> str | None:
    """What a field's value says about a person, as text; `None` where it says nothing."""
    return DemographicProfile.from_value({field: value}).fields.get(field)
