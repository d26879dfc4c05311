# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Whom an export speaks for."""

import pytest

from trl_cuma.demographics import DemographicProfile
from trl_cuma.export.people import check_people, count_people


@pytest.fixture
def counted(people):
    return lambda *profiles: count_people([DemographicProfile.from_value(profile) for profile in profiles], people)


def test_people_are_counted_by_everything_that_the_profile_says(counted):
    found = counted({"country": "Kenya"}, {"country": "Kenya", "age": "30+"}, {"country": "Japan", "age": "18-29"})
    assert [(each.people, each.rarest) for each in found] == [(120, 120), (60, 120), (0, 110)]


def test_a_group_of_few_is_refused_and_an_unseen_combination_of_many_is_not(counted):
    check_people(["kenya", "young in japan"], counted({"country": "Kenya"}, {"country": "Japan", "age": "18-29"}), 100)
    with pytest.raises(ValueError, match="`--min_people` is 100, and fewer training people have all of it for a, b"):
        check_people(["a", "b"], counted({"country": "Kenya", "age": "30+"}, {"country": "Peru"}), 100)
    with pytest.raises(ValueError, match="fewer have one of its values for c"):
        check_people(["c"], counted({"country": "Peru", "age": "30+"}), 100)  # nobody, and Peru has 50
