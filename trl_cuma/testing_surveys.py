# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Simulated surveys in the file layout of the real ones, for tests and benchmarks.

Every question, label, country and answer is invented; only names of files, columns and JSON fields are the real ones.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from .data.simulated import SETTINGS, TOPICS

__all__ = ["write_worldvaluesbench"]

# (lowest, highest) answer of a question, and how often it comes up among WorldValuesBench's 239 value questions
SCALES = {(1, 4): 91, (1, 10): 50, (1, 2): 36, (1, 5): 21, (1, 3): 20, (0, 2): 19, (1, 7): 1, (1, 8): 1}
# How often an adjustment of answers comes up, by kind and scale. The tables hold adjusted answers; the codebook keeps
# the labels of the raw codes.
ADJUSTED = {
    ("swap", (1, 3)): 1,
    ("middle", (1, 5)): 1,
    ("merge", (1, 10)): 9,
    ("drop", (1, 3)): 2,
    ("drop", (1, 2)): 1,
    ("drop", (1, 4)): 1,
}
ALWAYS = [("swap", (1, 3)), ("middle", (1, 5)), ("merge", (1, 10)), ("drop", (1, 3))]

# What is asked and what the answers are called, in scale order. The questions of a scale take these in turn.
STEMS = {
    (1, 4): [
        ("how much do you care about", ["A great deal", "Rather much", "Rather little", "Not in the least"]),
        ("would you be for or against more", ["Fully for it", "More for it", "More against it", "Fully against it"]),
        ("in the past year, how often did you hear of", ["Every week", "At times", "Once", "Never"]),
        ("how safe would you feel with", ["Very safe", "Safe enough", "Not so safe", "Not safe at all"]),
    ],
    (1, 10): [
        ("what is right when it comes to", ["Always wrong", "Always right"]),
        ("for a good society, how fitting are", ["Not fitting", "Fully fitting"]),
        ("how pleased are you with", ["Not pleased", "Wholly pleased"]),
    ],
    (1, 2): [
        ("did you ever speak up about", ["I did", "I didn't"]),
        ("which comes first when you think of", ["A: old ways", "B: new ways"]),
    ],
    (1, 5): [
        ("does everyone gain from", ["Fully agree", "Agree", "Hard to tell", "Disagree", "Fully disagree"]),
        ("how good are the rules on", ["Very good", "Good", "So-so", "Bad", "Very bad"]),
    ],
    (1, 3): [
        ("next to ten years ago, how do you see", ["Better than then", "Much the same", "Worse than then"]),
        ("do you join in when people decide on", ["Each time", "Some of the time", "Not once"]),
    ],
    (0, 2): [("what is your part in groups for", ["Don't take part", "Lend a hand", "Lead the group"])],
    (1, 7): [("how often do you visit", ["Daily", "Weekly", "Monthly", "Each season", "Yearly", "Rarely", "Never"])],
    (1, 8): [
        (
            "how often do you think of",
            ["Hourly", "Daily", "Weekly", "Monthly", "Each season", "Yearly", "Less", "Never"],
        )
    ],
}
TIMES = ("", " in lean years", " while no one is looking")
SUBJECTS = [f"{topic} {setting}{time}" for topic in TOPICS for setting in SETTINGS for time in TIMES]

NEGATIVES = {"-1": "Don't know", "-2": "No answer", "-4": "Not asked", "-5": "Missing; Not available"}
LEVELS = "No schooling,Primary,Lower secondary,Upper secondary,Trade,Short course,First degree,Second degree,Doctorate"
STARTS = "Belm Castr Dorv Elyst Farh Galdr Hesk Ilv Jor Kestr Lunm Mord"
FAITHS = "No faith,Solarist,Riverfolk,Ashen Path,Old Rite,Lantern Church,Tidewatch,Quiet Hall,Stonebound,Other"
COUNTRIES = [
    "Côte d'Arven",
    *(start + end for start in STARTS.split() for end in ("ia", "ora", "el", "an", "un")),
]
GROUPS = ("Highland", "Lowland", "River", "Coastal", "Island")


def _labels(labels: list[str], first: int = 1, step: int = 1) -> dict[str, str]:
    return {str(code): label for code, label in zip(range(first, 10**6, step), labels, strict=False)}


DEMOGRAPHICS = {  # question, and labels by code
    "A_YEAR": ("In what year was this asked?", _labels([str(year) for year in range(2017, 2023)], 2017)),
    "B_COUNTRY": ("In what country was this asked?", _labels(COUNTRIES, 8, 4)),
    "D_INTERVIEW": ("What is the number of the interview?", {}),
    "J_INTDATE": ("On what day was this asked, as YYYYMMDD?", {}),
    "S_INTLANGUAGE": (
        "In what language was this asked?",
        _labels([f"{name}ese" for name in COUNTRIES[1:21]], 100, 10),
    ),
    "Q260": ("What is your sex?", _labels(["Male", "Female"])),
    "X003R": (
        "Which age group are you in?",
        _labels([f"{age}-{age + 9} years" for age in range(15, 65, 10)] + ["65 years and more"]),
    ),
    "Q273": ("Are you married?", _labels(["Married", "As a couple", "Divorced", "Apart", "Widowed", "Unmarried"])),
    "Q275": (
        "Which schooling did you finish last?",
        _labels([f"{name} (level {i})" for i, name in enumerate(LEVELS.split(","))], 0),
    ),
    "Q279": (
        "Do you work?",
        _labels("Full time,Part time,For myself,Pensioner,At home,Student,Out of work,Other".split(",")),
    ),
    "Q288": ("On a scale of 1 to 10, 1 meaning 'Least' and 10 meaning 'Most', how much do you earn?", {}),
    "Q289": ("Do you belong to a faith?", _labels(FAITHS.split(","), 0)),
    "Q290": (
        "Which people do you belong to?",
        {
            f"{8 + 4 * country}{group:03d}": f"{name[:2].upper()}: {people}"
            for country, name in enumerate(COUNTRIES)
            for group, people in enumerate(GROUPS, 1)
        },
    ),
}
BEFORE_VALUES = list(DEMOGRAPHICS)[:5]  # these columns' questions stand before the value questions


def write_worldvaluesbench(
    folder: str | Path, *, num_people: int | Mapping[str, int] = 2000, num_questions: int = 239, seed: int = 0
) -> dict[str, int]:
    """Write a simulated WorldValuesBench: what the real project's checkout holds after its `data_preparation.py`.

        folder/WorldValuesBench/{full,train,valid,test}/{split}_demographic_qa.tsv
        folder/WorldValuesBench/{full,train,valid,test}/{split}_value_qa.tsv
        folder/WorldValuesBench/question_metadata.json
        folder/dataset_construction/{codebook,question_metadata,answer_adjustment}.json

    It has the real one's scales and difficulties: blank answers (1 to 10 % of a question, a few people's all), a
    question in twenty that one country was not asked, answers written as `3.0` (a question in twelve), texts such as
    `"No answer"` (2 %) and empty cells (1 %) among demographics, ethnic groups of few people and some without a label
    (0.5 %), two countries of at most 12 people, and answers adjusted in four ways: two swapped, one moved to the
    middle, one merged into another, one dropped. Country and, less, age bear on the answers.

    Args:
        folder (`str` or `Path`):
            Where to write; made if need be. Files of the same names are replaced.
        num_people (`int` or `Mapping[str, int]`, *optional*, defaults to `2000`):
            People altogether, dealt 70 : 15 : 15; or people of `"train"`, `"valid"` and `"test"`, 0 where absent. At
            least 100 altogether. `"full"` holds all of them.
        num_questions (`int`, *optional*, defaults to `239`):
            Value questions, 4 to 239: one for each kind of adjustment, and an even choice of the others.
        seed (`int`, *optional*, defaults to `0`):
            Seed of everything: the same arguments write the same bytes.

    Returns:
        `dict[str, int]`: People in each split's files.

    Raises:
        ValueError: for a number of people or questions out of its range, or an unknown split.
    """
    people = _people_per_split(num_people)
    if not len(ALWAYS) <= num_questions <= sum(SCALES.values()):
        raise ValueError(f"num_questions is {num_questions}: give {len(ALWAYS)} to {sum(SCALES.values())}.")
    draw = np.random.default_rng(seed)
    metadata, codebook, adjustment = _questions(num_questions, draw)
    country, age, demographics = _demographics(people["full"], draw)
    answers = _answers(demographics["D_INTERVIEW"], country, age, metadata, draw)

    folder = Path(folder)
    order = pa.array(draw.permutation(people["full"]))
    start = 0
    for split, count in people.items():
        (folder / "WorldValuesBench" / split).mkdir(parents=True, exist_ok=True)
        for name, table in (("demographic", demographics), ("value", answers)):
            part = table if split == "full" else table.take(order[start : start + count])
            _write_tsv(part, folder / "WorldValuesBench" / split / f"{split}_{name}_qa.tsv")
        start += 0 if split == "full" else count
    (folder / "dataset_construction").mkdir(exist_ok=True)
    for name, content in (
        ("WorldValuesBench/question_metadata", metadata),
        ("dataset_construction/question_metadata", metadata),
        ("dataset_construction/codebook", codebook),
        ("dataset_construction/answer_adjustment", adjustment),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
    return people


def _people_per_split(num_people: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(num_people, Mapping):
        unknown = set(num_people) - {"train", "valid", "test"}
        if unknown:
            raise ValueError(f"num_people names {sorted(unknown)}: the splits are 'train', 'valid' and 'test'.")
        parts = {split: num_people.get(split, 0) for split in ("train", "valid", "test")}
    else:  # as data_preparation.py rounds
        train, test = int(0.7 * num_people), int(0.15 * num_people)
        parts = {"train": train, "valid": num_people - train - test, "test": test}
    if min(parts.values()) < 0 or sum(parts.values()) < 100:
        raise ValueError(f"num_people is {num_people}: give at least 100 people altogether, and no split below 0.")
    return {"full": sum(parts.values()), **parts}


# ------------------------------------------------------------------------------------------------ questions
def _questions(num_questions: int, draw: np.random.Generator) -> tuple[dict, dict, dict]:
    """`question_metadata.json`, `codebook.json` and `answer_adjustment.json`."""
    adjusted = Counter(scale for _, scale in Counter(ADJUSTED).elements())
    plain = {("", scale): count - adjusted[scale] for scale, count in SCALES.items()}
    others = list((Counter(ADJUSTED | plain) - Counter(ALWAYS)).elements())
    even = np.linspace(0, len(others) - 1, num_questions - len(ALWAYS)).round().astype(int)
    chosen = ALWAYS + [others[i] for i in even]

    values: dict[str, dict[str, Any]] = {}
    codebook = {"W_WEIGHT": _described("Weight", {})}  # it describes more than the tables hold
    adjustment: dict[str, dict[str, str]] = {}
    subjects = draw.permutation(SUBJECTS)
    for number, index in enumerate(draw.permutation(num_questions)):
        kind, scale = chosen[index]
        name, stems = f"Q{number + 1}", STEMS[scale]
        stem, labels = stems[index % len(stems)]
        values[name], codebook[name], moved = _question(stem, str(subjects[number]), labels, scale, kind)
        adjustment |= {name: moved} if moved else {}

    for name, (question, choices) in DEMOGRAPHICS.items():
        codebook[name] = _described(question, choices, _negatives(name))
    about = {name: _metadata(question, "demographic") for name, (question, _) in DEMOGRAPHICS.items()}
    about["Q288"] = _metadata(about["Q288"]["question"], "demographic", (1, 10))
    return {name: about[name] for name in BEFORE_VALUES} | values | about, codebook, adjustment


def _question(
    stem: str, subject: str, labels: list[str], scale: tuple[int, int], kind: str
) -> tuple[dict, dict, dict]:
    """A value question's metadata, its codebook entry, and raw code → adjusted answer where they differ."""
    low, high = scale
    if scale == (1, 10):  # between the ends are numbers
        labels = [labels[0], *map(str, range(2, 10)), labels[1]]
    choices = _labels(labels, low)
    moved: dict[str, str] = {}
    if kind in ("swap", "middle"):
        moved, codes = ({"2": "3", "3": "2"}, "123") if kind == "swap" else ({"0": "3", "3": "4", "4": "5"}, "01234")
        choices = {code: labels[int(moved.get(code, code)) - low] for code in codes}
    elif kind == "merge":
        moved, choices = {"0": "1"}, {"0": "Beneath all of these (unprompted)"} | choices
    elif kind == "drop":
        moved, choices = {str(high + 1): ""}, choices | {str(high + 1): "Not for me to say"}
    # The real files, too, write an end in two ways: in another case, or at length and with a full stop.
    last = labels[-1].title() if kind == "swap" else labels[-1]
    last += ", even if it has a price." if last.startswith("B:") else ""
    text = f"On a scale of {low} to {high}, {low} meaning '{labels[0]}' and {high} meaning '{last}', {stem} {subject}?"
    return _metadata(text, "value", scale), _described(f"{subject}: {stem}".capitalize(), choices), moved


def _metadata(question: str, use_case: str, scale: tuple[int, int] | None = None) -> dict[str, Any]:
    low, high = scale or ("", "")
    entry = {"question": question, "category": "Invented", "use_case": use_case}
    kind = "ordinal" if scale else "non_ordinal"
    return entry | {"answer_scale_min": low, "answer_scale_max": high, "answer_data_type": kind}


def _described(question: str, choices: dict[str, str], negatives: dict[str, str] = NEGATIVES) -> dict[str, Any]:
    kind = "multiple_choice" if choices else "objective"
    return {"question": question, "question_instruction": "", "type": kind, "choices": choices | negatives}


def _negatives(name: str) -> dict[str, str]:
    return NEGATIVES | ({"-1": "Don´t know"} if name == "Q290" else {})  # the real codebook has both apostrophes


# --------------------------------------------------------------------------------------------------- people
def _demographics(count: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Each person's country and age group, `(count,)`, and the table of demographics. They come country by country."""
    rare = min(12, count // 20)
    num_countries = int(np.clip(count // 60, 4, len(COUNTRIES)))
    usual = draw.choice(num_countries - 2, size=count - 2 * rare, p=_shares(num_countries - 2, 0.97))
    country = np.sort(np.concatenate([usual, np.repeat([num_countries - 2, num_countries - 1], rare)]))
    place = np.arange(count) - np.searchsorted(country, country)  # among the people of the country
    year = country % len(DEMOGRAPHICS["A_YEAR"][1])
    date = year * 336 + draw.integers(336, size=count)
    dates = [f"{2017 + i // 336}{1 + i // 28 % 12:02d}{1 + i % 28:02d}" for i in range(6 * 336)]
    group = draw.choice(len(GROUPS), size=count, p=[0.6, 0.25, 0.1, 0.04, 0.01])

    def any_of(name: str, shift: np.ndarray | int = 0) -> np.ndarray:
        size = len(DEMOGRAPHICS[name][1])
        return (draw.choice(size, size=count, p=_shares(size, 0.8)) + shift) % size

    codes = {
        "A_YEAR": year,
        "B_COUNTRY": country,
        "J_INTDATE": date,
        "S_INTLANGUAGE": country % 20,
        **{name: any_of(name) for name in ("Q260", "X003R", "Q273", "Q275", "Q279")},
        "Q288": draw.integers(10, size=count),
        "Q289": any_of("Q289", country),
        "Q290": country * len(GROUPS) + group,
    }
    columns = {"D_INTERVIEW": pa.array((8 + 4 * country) * 10**6 + 70_001 + place)}
    for name, code in codes.items():
        labels = list(DEMOGRAPHICS[name][1].values())
        labels = dates if name == "J_INTDATE" else [str(i) for i in range(1, 11)] if name == "Q288" else labels
        texts = [*labels, *_negatives(name).values(), "999001"]  # the last: a code without a label
        chance = draw.random(count)
        empty = np.zeros(count, dtype=bool)
        if name == "Q288":
            empty = chance < 0.08  # an ordinal column: what is below 0 is blank
        elif name not in ("A_YEAR", "B_COUNTRY"):
            empty = chance < 0.01
            negative = len(labels) + draw.integers(len(NEGATIVES), size=count)
            code = np.where(chance > 0.98, negative, code)
            code = np.where((name == "Q290") & (chance > 0.5) & (chance < 0.505), len(texts) - 1, code)
        columns[name] = _texts(code, texts, empty)
    return country, codes["X003R"], pa.table(columns)


def _answers(ids: pa.ChunkedArray, country: np.ndarray, age: np.ndarray, metadata: dict, draw: Any) -> pa.Table:
    """The table of values: per question a mean that country and age move, and a spread about it."""
    count = len(country)
    silent = np.zeros(count, dtype=bool)
    silent[draw.choice(count, size=max(1, count // 500), replace=False)] = True
    columns = {"D_INTERVIEW": ids}
    values = {name: entry for name, entry in metadata.items() if entry["use_case"] == "value"}
    for number, (name, entry) in enumerate(values.items()):
        low, high = entry["answer_scale_min"], entry["answer_scale_max"]
        mean = draw.uniform(0.3, 0.7) + draw.normal(0, 0.12, size=len(COUNTRIES))[country] + draw.normal(0, 0.03) * age
        place = mean + 0.25 * draw.standard_normal(count, dtype=np.float32)
        answer = np.clip(np.floor(place * (high - low + 1)), 0, high - low).astype(np.int8)
        blank = silent | (draw.random(count, dtype=np.float32) < draw.uniform(0.01, 0.1))
        if number % 20 == 3:
            blank |= country == number // 20 % 3
        if number % 12 == 5:  # pandas turns a column with blanks to floats, and so writes it when it is saved again
            columns[name] = _texts(answer, [f"{label}.0" for label in range(low, high + 1)], blank)
        else:
            columns[name] = pa.array(answer + np.int8(low), mask=blank)
    return pa.table(columns)


def _shares(size: int, factor: float) -> np.ndarray:
    """Shares that fall by a factor from one to the next."""
    shares = factor ** np.arange(size)
    return shares / shares.sum()


def _texts(codes: np.ndarray, texts: list[str], empty: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32), mask=empty), texts).cast(pa.string())


def _write_tsv(table: pa.Table, path: Path) -> None:
    options = csv.WriteOptions(delimiter="\t", quoting_style="none", quoting_header="none")
    csv.write_csv(table, path, options)
