# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A check that training and test data share neither people nor prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from datasets import Dataset

from .splits import PROMPT_SIDE, SPLITS, TEST, TEST_COUNTRIES

_COUNTRY = "demographic.country"


def assert_disjoint(
    splits: Mapping[str, Dataset],
    split_by: Sequence[str] = ("person", "prompt"),
    holdout_combinations: tuple[str, str] | None = None,
) -> None:
    """
    Check that splits don't share what they must not.

    People (`person_id`): no two splits share any if `split_by` has "person"; else, what is held out shares none with
    training and validation. Prompts (`prompt_group`, and `question_id` and `conversation_id` where there are any), if
    `split_by` has "prompt": training, validation and the test splits, taken together, share none. Countries (of
    `demographic`): `test_countries` shares none with any other split.

    Args:
        splits (`Mapping[str, Dataset]`):
            By name, as in a `DatasetDict`. Rows of countries instead of people have no `person_id`.
        split_by (`Sequence[str]`, *optional*, defaults to `("person", "prompt")`):
            As in [`SplitOptions`].
        holdout_combinations (`tuple[str, str]`, *optional*):
            As in [`SplitOptions`]: these two fields of `demographic` have no combination in `test_combinations` that
            training or validation has, too.

    Raises:
        `AssertionError`: If two splits share a value; the message has how many, not which.
        `TypeError`: If a split is streamed.
        `ValueError`: If `split_by` or a split's name is unknown, or a column that it takes is missing or has nulls.
    """
    if unknown := [name for name in splits if name not in SPLITS]:
        raise ValueError(f"`splits` has {unknown}, expected names among {list(SPLITS)}.")
    if not set(split_by) or set(split_by) - {"person", "prompt"} or isinstance(split_by, str):
        raise ValueError(f'`split_by` is {split_by!r}, expected ("person",), ("prompt",) or both.')
    if streamed := [name for name, split in splits.items() if not isinstance(split, Dataset)]:
        raise TypeError(f"The splits {streamed} are no `Dataset`. A streamed one can't be compared: load it.")
    splits = {name: _flat(split) for name, split in splits.items()}
    if holdout_combinations is not None and "test_combinations" in splits:
        held = _combinations(splits["test_combinations"], holdout_combinations)
        for name in ("train", "validation"):
            if name in splits and (shared := len(held & _combinations(splits[name], holdout_combinations))):
                raise AssertionError(
                    f"The splits {name!r} and 'test_combinations' share {shared} combinations of "
                    f"{' and '.join(map(repr, holdout_combinations))}."
                )
    columns = {column for split in splits.values() for column in split.column_names}
    needed = {"prompt_group"} | ({"person_id"} if "person" in split_by else set())
    for column in sorted(needed | (columns & {"person_id", "question_id", "conversation_id", _COUNTRY})):
        seen: dict[str, set] = {}
        for one, other in combinations(splits, 2):
            low, high = sorted((SPLITS.index(one), SPLITS.index(other)))
            if column == "person_id":
                apart = "person" in split_by or low < TEST < high
            elif column == _COUNTRY:
                apart = high == TEST_COUNTRIES
            else:
                apart = "prompt" in split_by and PROMPT_SIDE[low] != PROMPT_SIDE[high]
            if not apart:
                continue
            for name in {one, other} - set(seen):
                if column not in splits[name].column_names:
                    raise ValueError(f"The split {name!r} has no column `{column}`. Convert with it.")
                seen[name] = set(splits[name].unique(column))
                if column == _COUNTRY:
                    seen[name] -= {None}  # a country that isn't known is not held out
                elif None in seen[name]:
                    raise ValueError(f"The split {name!r} has rows without `{column}`. Every row needs one.")
            if shared := len(seen[one] & seen[other]):
                raise AssertionError(f"The splits {one!r} and {other!r} share {shared} values of `{column}`.")


def _combinations(split: Dataset, fields: tuple[str, str]) -> set[tuple[str, str]]:
    """The combinations of two fields of which both are known."""
    columns = split.select_columns([f"demographic.{field}" for field in fields]).to_pandas().drop_duplicates().dropna()
    return set(columns.itertuples(index=False, name=None))


def _flat(split: Dataset) -> Dataset:
    """A split with the fields of `demographic` as columns."""
    if "demographic" not in split.column_names:
        return split
    names = {"person_id", "prompt_group", "question_id", "conversation_id", "demographic"} & set(split.column_names)
    return split.select_columns(sorted(names)).flatten()
