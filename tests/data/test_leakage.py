# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
from itertools import combinations

import pytest
from datasets import Dataset

from trl_cuma.data.leakage import assert_disjoint
from trl_cuma.data.splits import SPLITS, TEST

COLUMNS = ("person_id", "prompt_group", "question_id", "conversation_id")


def clean_splits() -> dict[str, dict[str, list[str]]]:
    """One row per split, nothing in common but the prompts of the three test splits."""
    side = {name: min(number, TEST) for number, name in enumerate(SPLITS)}
    return {
        name: {"person_id": [f"p-{name}"]} | {column: [f"{column}-{side[name]}"] for column in COLUMNS[1:]}
        for name in SPLITS
    }


@pytest.mark.parametrize("by", [("person", "prompt"), ("person",), ("prompt",)])
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(("one", "other"), [*combinations(SPLITS, 2)])
def test_a_planted_leak_is_found(one: str, other: str, column: str, by: tuple[str, ...]) -> None:
    splits = clean_splits()
    assert_disjoint({name: Dataset.from_dict(rows) for name, rows in splits.items()}, by)
    for name in (one, other):
        for key in COLUMNS:
            splits[name][key] = splits[name][key] + (["the-leak"] if key == column else [f"{key} {name}, another"])
    data = {name: Dataset.from_dict(rows) for name, rows in splits.items()}
    tests, held = SPLITS[TEST:], ("test_combinations", "test_countries")
    if column == "person_id":
        leak = "person" in by or (other in held and one in ("train", "validation"))
    else:
        leak = "prompt" in by and not (one in tests and other in tests)
    if leak:
        with pytest.raises(AssertionError, match=f"'{one}' and '{other}' share 1 values of `{column}`") as error:
            assert_disjoint(data, by)
        assert "the-leak" not in str(error.value)
    else:
        assert_disjoint(data, by)


def test_the_check_needs_its_columns() -> None:
    rows = {"person_id": ["p"], "prompt_group": ["g"]}
    other = {"person_id": ["p2"], "prompt_group": ["g2"]}
    for column in rows:
        splits = {"train": Dataset.from_dict(rows), "test": Dataset.from_dict(other).remove_columns(column)}
        with pytest.raises(ValueError, match=f"'test' has no column `{column}`"):
            assert_disjoint(splits)
        splits["test"] = Dataset.from_dict(other | {column: [None]})
        splits["train"] = Dataset.from_dict(rows | {column: ["x"]})
        with pytest.raises(ValueError, match=f"'test' has rows without `{column}`"):
            assert_disjoint(splits)
    with pytest.raises(ValueError, match="dev"):
        assert_disjoint({"train": Dataset.from_dict(rows), "dev": Dataset.from_dict(other)})
    only_prompts = {name: Dataset.from_dict({"prompt_group": [name]}) for name in ("train", "test")}
    assert_disjoint(only_prompts, ("prompt",))


@pytest.mark.parametrize("by", [("person", "prompt"), ("person",), ("prompt",)])
@pytest.mark.parametrize("other", SPLITS[:-1])
def test_a_held_out_country_is_in_no_other_split(other: str, by: tuple[str, ...]) -> None:
    splits = clean_splits()
    for name, rows in splits.items():
        rows["demographic"] = [{"country": None if name == "train" else name, "age": "same"}]
    assert_disjoint({name: Dataset.from_dict(rows) for name, rows in splits.items()}, by)
    splits[other]["demographic"] = [{"country": "test_countries", "age": "same"}]
    with pytest.raises(
        AssertionError, match=f"'{other}' and 'test_countries' share 1 values of `demographic.country`"
    ):
        assert_disjoint({name: Dataset.from_dict(rows) for name, rows in splits.items()}, by)


def test_a_held_out_combination_is_in_no_training_row() -> None:
    people = {"train": [("X", "a"), ("Y", "b"), (None, "c")], "test_combinations": [("X", "b"), (None, "c")]}

    def data() -> dict[str, Dataset]:
        return {
            name: Dataset.from_dict(
                {
                    "person_id": [f"{name}{row}" for row in range(len(pairs))],
                    "prompt_group": [name] * len(pairs),
                    "demographic": [{"country": country, "religion": religion} for country, religion in pairs],
                }
            )
            for name, pairs in people.items()
        }

    assert_disjoint(data(), holdout_combinations=("country", "religion"))
    people["train"].append(("X", "b"))
    assert_disjoint(data())
    with pytest.raises(AssertionError, match="share 1 combinations of 'country' and 'religion'"):
        assert_disjoint(data(), holdout_combinations=("country", "religion"))


def test_what_cannot_be_compared_is_an_error() -> None:
    split = Dataset.from_dict({"person_id": ["a"], "prompt_group": ["g"]})
    for by in (("persn",), (), "person"):
        with pytest.raises(ValueError, match="`split_by` is"):
            assert_disjoint({"train": split}, by)
    with pytest.raises(TypeError, match=r"\['train'\] are no `Dataset`"):
        assert_disjoint({"train": split.to_iterable_dataset()})


def test_rows_of_countries_have_no_people() -> None:
    splits = {
        name: Dataset.from_dict({"prompt_group": [name], "demographic": [{"country": name}]})
        for name in ("train", "test", "test_countries")
    }
    assert_disjoint(splits, ("prompt",))
    with pytest.raises(ValueError, match="has no column `person_id`"):
        assert_disjoint(splits)
