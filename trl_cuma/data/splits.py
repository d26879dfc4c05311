# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Training and test data that share neither people nor prompts.

People and prompts are assigned to splits each on their own, and a row is kept where its person's split and its
prompt's agree. On top of it, all people who combine two values (a country and a religion, say) or who live in one
country can be held out, to see what becomes of profiles that were never trained on. The splits follow from the seed
and the ids alone: not from the order of rows, the process or the platform.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .keyed import keyed_digest
from .people import OTHER

SPLITS = ("train", "validation", "test", "test_combinations", "test_countries")
TRAIN, VALIDATION, TEST, TEST_COMBINATIONS, TEST_COUNTRIES = range(len(SPLITS))
DROPPED, ANY = -1, -2
"""Of a row: in no split. Of a person or a prompt: in whichever split the other one is."""

MIN_TRAINING_PEOPLE = 50
"""Each value of a held-out combination keeps at least so many training people."""

MIN_HELD_OUT_PEOPLE = 30
"""A combination is held out only if at least so many people have it: fewer would tell little about it."""

PROMPT_SIDE = np.array([TRAIN, VALIDATION, TEST, TEST, TEST])
"""Of each split: the split whose prompts it has."""


@dataclass(frozen=True)
class SplitOptions:
    """
    How people and prompts are assigned to splits.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Another seed gives other splits.
        test (`float`, *optional*, defaults to `0.1`):
            Share of the people, and of the prompts. Unless it is 0, at least one of each.
        validation (`float`, *optional*, defaults to `0.0`):
            The same for validation.
        split_by (`tuple[str, ...]`, *optional*, defaults to `("person", "prompt")`):
            What training and test must not share.
        holdout_combinations (`tuple[str, str]`, *optional*):
            Two profile fields: some combinations of their values go to `test_combinations`.
        holdout_share (`float`, *optional*, defaults to `0.1`):
            Share of the training people to hold out as combinations, at most; more only where the smallest
            combination is larger.
        holdout_countries (`int` or `tuple[str, ...]`, *optional*, defaults to `0`):
            How many countries, or which ones, go to `test_countries`.

    Raises:
        `ValueError`: If a field is out of range, or people are held out while there are no test prompts.
    """

    seed: int = 0
    test: float = 0.1
    validation: float = 0.0
    split_by: tuple[str, ...] = ("person", "prompt")
    holdout_combinations: tuple[str, str] | None = None
    holdout_share: float = 0.1
    holdout_countries: int | tuple[str, ...] = 0

    def __post_init__(self) -> None:
        for name in ("split_by", "holdout_combinations", "holdout_countries"):
            if isinstance(getattr(self, name), list):  # as YAML has them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        pair, countries = self.holdout_combinations, self.holdout_countries
        by_number = isinstance(countries, int) and not isinstance(countries, bool) and countries >= 0
        by_name = isinstance(countries, tuple) and all(isinstance(name, str) for name in countries)
        for name, valid, expected in (
            ("seed", isinstance(self.seed, int) and not isinstance(self.seed, bool), "an integer"),
            ("test", 0 <= self.test < 1, "a share from 0 to below 1"),
            ("validation", 0 <= self.validation < 1 - self.test, "a share from 0 to below 1 - `test`"),
            (
                "split_by",
                isinstance(self.split_by, tuple) and {"person", "prompt"} >= set(self.split_by) > set(),
                '("person",), ("prompt",) or ("person", "prompt")',
            ),
            (
                "holdout_combinations",
                pair is None or (isinstance(pair, tuple) and len(pair) == len(set(pair)) == 2),
                "two different profile fields",
            ),
            ("holdout_share", 0 < self.holdout_share < 1, "a share above 0 and below 1"),
            ("holdout_countries", by_number or by_name, "a number of countries, or a tuple of their names"),
        ):
            if not valid:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected {expected}.")
        if "prompt" in self.split_by and not self.test and (pair or countries):
            raise ValueError(
                "`test` is 0, so there are no test prompts to try people on who are held out. Raise it, or set "
                '`split_by=("person",)` to try them on all prompts.'
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The splits that these options ask for."""
        asked = (True, self.validation, self.test, self.holdout_combinations, self.holdout_countries)
        return tuple(name for name, wanted in zip(SPLITS, asked, strict=True) if wanted)


def split_people(
    people: pd.DataFrame,
    options: SplitOptions,
    given: pd.Series | None = None,
    can_train: np.ndarray | None = None,
) -> np.ndarray:
    """
    The split of each person: held-out country, else held-out combination, else as drawn by the shares.

    Combinations are walked in an order drawn by the seed. One is held out if both values are known and not "Other", at
    least 30 people have it, each of its two values keeps at least 50 training people, and it still fits into
    `holdout_share`. All people who have it are held out, whether drawn for training or test.

    Args:
        people (`pd.DataFrame`):
            Index: the people's ids. Columns: profile fields, each text or `None`.
        options (`SplitOptions`):
            Shares, and what is held out.
        given (`pd.Series`, *optional*):
            The source's own split of each id, "train", "validation" or "test", in place of the shares. Of no effect
            where `split_by` leaves out "person".
        can_train (`np.ndarray`, *optional*):
            bool, `(people,)`: who has a row with a training prompt, if not everybody: only they count as training
            people of a value.

    Returns:
        `np.ndarray`: int8, `(people,)`: an index into `SPLITS`. Where `split_by` leaves out "person", `ANY` for all
        who aren't held out.

    Raises:
        `ValueError`: If an id comes twice, a field or a country is not there, nothing can be held out, or a split
        would be empty.
    """
    if not people.index.is_unique:
        raise ValueError(f"`people` repeats {people.index.duplicated().sum()} ids. Keep one row per person.")
    if "person" not in options.split_by:
        labels = np.full(len(people), ANY, dtype=np.int8)
    elif given is None:
        labels = _draw([str(person) for person in people.index], "person", options)
    else:
        labels = _read(given.reindex(people.index))
    drawn = set(labels.tolist())
    if options.holdout_countries:
        labels[_in_countries(people, options)] = TEST_COUNTRIES
    if options.holdout_combinations:
        training = ((labels == TRAIN) | (labels == ANY)) & (True if can_train is None else can_train)
        labels[_in_combinations(people, labels, training, options)] = TEST_COMBINATIONS
    if emptied := drawn - set(labels.tolist()):
        names = [SPLITS[label] if label != ANY else "train" for label in sorted(emptied)]
        raise ValueError(f"All people of the splits {names} are held out. Hold out fewer, or raise their share.")
    return labels


def split_prompts(groups: Sequence[str], options: SplitOptions) -> np.ndarray:
    """
    The split of each prompt; prompts of a group stay together. Groups are walked in an order drawn by the seed, and
    one is taken where it still fits into the share; the smallest where none does.

    Args:
        groups (`Sequence[str]`):
            Group id of each prompt.
        options (`SplitOptions`):
            Shares.

    Returns:
        `np.ndarray`: int8, `(prompts,)`: 0 train, 1 validation, 2 test; `ANY` where `split_by` leaves out "prompt".

    Raises:
        `ValueError`: If a split would be empty.
    """
    if "prompt" not in options.split_by:
        return np.full(len(groups), ANY, dtype=np.int8)
    return _draw(groups, "prompt", options)


def split_rows(person: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """
    The split of each row: kept where its person's and its prompt's agree. Held-out people go with test prompts, `ANY`
    goes with everything.

    Args:
        person (`np.ndarray`):
            Of each row's person, from [`split_people`].
        prompt (`np.ndarray`):
            Of each row's prompt, from [`split_prompts`]; broadcast against `person`.

    Returns:
        `np.ndarray`: int8: an index into `SPLITS`, or `DROPPED`.
    """
    return _ROWS[person, prompt]


def _row_table() -> np.ndarray:
    """Split of a row by its person's and its prompt's; `ANY` and `DROPPED` count from the table's end."""
    table = np.full((len(SPLITS) + 2, len(SPLITS) + 2), DROPPED, dtype=np.int8)
    for split, prompt in enumerate(PROMPT_SIDE):
        table[split, [prompt, ANY]] = split
    table[ANY, : TEST + 1] = range(TEST + 1)
    table[ANY, ANY] = TRAIN
    return table


_ROWS = _row_table()


def _shuffled(ids: Iterable[str], kind: str, seed: int) -> list[str]:
    """`ids` by a hash of seed and id, whatever order they come in."""
    return sorted(ids, key=lambda name: keyed_digest(seed, kind, name))


def _draw(ids: Sequence[str], kind: str, options: SplitOptions) -> np.ndarray:
    """Test, validation or train for each entry of `ids`, the same for the same id."""
    size = Counter(ids)
    rest = _shuffled(size, kind, options.seed)
    split_of: dict[str, int] = {}
    for split, share in ((TEST, options.test), (VALIDATION, options.validation)):
        room = max(round(share * len(ids)), min((size[name] for name in rest), default=0)) if share else 0
        for name in rest:
            if size[name] <= room:
                split_of[name] = split
                room -= size[name]
        rest = [name for name in rest if name not in split_of]
    if not rest:
        raise ValueError(
            f"{len(ids)} entries of {len(size)} {kind} ids are too few for `test`={options.test} and "
            f"`validation`={options.validation} with some left for training. Lower the shares."
        )
    return np.array([split_of.get(name, TRAIN) for name in ids], dtype=np.int8)


def _read(given: pd.Series) -> np.ndarray:
    labels = given.astype(object).map({name: label for label, name in enumerate(SPLITS[: TEST + 1])})
    if missing := int(labels.isna().sum()):
        raise ValueError(f"`given` has no split, or one not among {list(SPLITS[: TEST + 1])}, for {missing} people.")
    return labels.to_numpy(dtype=np.int8)


def _known(people: pd.DataFrame, field: str, option: str) -> pd.Series:
    """A column whose "Other" is missing, too: it is no value in common."""
    if field not in people.columns:
        raise ValueError(f"`{option}` needs the profile field {field!r}, but there are {list(people.columns)}.")
    column = people[field].astype(object)
    return column.where(column.notna() & (column != OTHER), None)


def _in_countries(people: pd.DataFrame, options: SplitOptions) -> np.ndarray:
    column, chosen = _known(people, "country", "holdout_countries"), options.holdout_countries
    countries = set(column.dropna())
    names = _shuffled(countries, "country", options.seed)[:chosen] if isinstance(chosen, int) else list(chosen)
    if unknown := [name for name in names if name not in countries]:
        raise ValueError(
            f"`holdout_countries` has {unknown}, which none of the {len(countries)} countries is called. Write them "
            'as the source does; countries of few people are together as "Other".'
        )
    if countries <= set(names):
        raise ValueError(f"`holdout_countries` takes all of the {len(countries)} countries. Leave one to train on.")
    return column.isin(names).to_numpy()


def _in_combinations(
    people: pd.DataFrame, labels: np.ndarray, training: np.ndarray, options: SplitOptions
) -> np.ndarray:
    fields = sorted(options.holdout_combinations or ())
    first, second = (_known(people, field, "holdout_combinations") for field in fields)
    left = [Counter(column[training]) for column in (first, second)]  # training people of each value
    both = (first.notna() & second.notna()).to_numpy() & (labels != TEST_COUNTRIES)
    pairs = [(a, b) if there else None for a, b, there in zip(first, second, both, strict=True)]
    have = Counter(pair for pair in pairs if pair)
    train = Counter(pair for pair, trains in zip(pairs, training, strict=True) if pair and trains)

    def spares_enough(pair: tuple[str, str]) -> bool:
        return all(count[value] - train[pair] >= MIN_TRAINING_PEOPLE for count, value in zip(left, pair, strict=True))

    large = [pair for pair in have if have[pair] >= MIN_HELD_OUT_PEOPLE]
    possible = {"\0".join(pair): pair for pair in large if spares_enough(pair)}
    if not possible:
        raise ValueError(
            f"`holdout_combinations` is {options.holdout_combinations!r}: of {len(have)} combinations {len(large)} "
            f"have {MIN_HELD_OUT_PEOPLE} people, and none of these leaves {MIN_TRAINING_PEOPLE} training people to "
            "both of its values. Name other fields."
        )
    room = max(options.holdout_share * training.sum(), min(train[pair] for pair in possible.values()))
    held = set()
    for name in _shuffled(possible, "\0".join(("combination", *fields)), options.seed):
        pair = possible[name]
        if train[pair] <= room and spares_enough(pair):
            held.add(pair)
            room -= train[pair]
            for count, value in zip(left, pair, strict=True):
                count[value] -= train[pair]
    return np.array([pair in held for pair in pairs])
