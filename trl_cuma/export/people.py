# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Whom an export speaks for: how many training people had its profile. A LoRA of a few people would be of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..demographics import DemographicProfile
from ..demographics.profile import is_vector, read_profiles

MIN_PEOPLE = 100


@dataclass(frozen=True)
class TrainingPeople:
    """
    Args:
        people (`int`): Training people of whom everything in the profile is true.
        rarest (`int`): Those who share its rarest value alone.
    """

    people: int
    rarest: int


def count_people(profiles: Sequence[DemographicProfile], people: Sequence[Any]) -> list[TrainingPeople]:
    """
    Count each profile's people. A profile need not name every field: `{country}` is everybody of the country.

    Args:
        profiles (`Sequence[DemographicProfile]`): Of fields, each with one at least.
        people (`Sequence`): Each training person's profile, once.
    """
    known = read_profiles(None if is_vector(value) else value for value in people)
    wanted = {pair for profile in profiles for pair in profile.fields.items()}
    has = {pair: np.zeros(len(known), dtype=bool) for pair in wanted}
    for row, person in enumerate(known):
        for pair in wanted.intersection(person.fields.items()):
            has[pair][row] = True
    return [
        TrainingPeople(
            people=int(np.logical_and.reduce([has[pair] for pair in profile.fields.items()]).sum()),
            rarest=min(int(has[pair].sum()) for pair in profile.fields.items()),
        )
        for profile in profiles
    ]


def check_people(names: Sequence[str], counts: Sequence[TrainingPeople], min_people: int) -> None:
    """
    Refuse a group of a few people. A combination that nobody in training had speaks for nobody in particular, and is
    what routing by profile is for; each of its values must still be many people's.

    Args:
        names (`Sequence[str]`): Of the exports, for the error.
        counts (`Sequence[TrainingPeople]`): Theirs.
        min_people (`int`): The least.

    Raises:
        ValueError: Some are too few.
    """
    few = [name for name, count in zip(names, counts, strict=True) if 0 < count.people < min_people]
    rare = [name for name, count in zip(names, counts, strict=True) if count.rarest < min_people and name not in few]
    for found, what in ((few, "fewer training people have all of it"), (rare, "fewer have one of its values")):
        if found:
            raise ValueError(
                f"`--min_people` is {min_people}, and {what} for {_listed(found)}. What is exported for a few people "
                "would be of them: export a coarser profile."
            )


def _listed(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
