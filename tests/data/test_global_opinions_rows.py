# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Every question, country and share here is invented, but for the names that the source spells in two ways."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from trl_cuma.data import global_opinions_source, reading
from trl_cuma.data.global_opinions_rows import convert_global_opinions
from trl_cuma.data.leakage import assert_disjoint
from trl_cuma.data.prompts import PromptFormat
from trl_cuma.data.splits import SplitOptions

from .golden_files import check_golden

DATA = Path(os.environ.get("CUMA_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL_FILE = DATA / "goqa" / "goqa_ordinal.jsonl"
NO_TEST = SplitOptions(split_by=("prompt",), test=0.0)
SCALE = ["Good", "Fair", "Bad"]


def hub_row(question: str | None, shares: dict, options: list, source: str = "GAS") -> dict:
    """A row as the Hub has it: Python's notation as text."""
    return {
        "question": question,
        "selections": f"defaultdict(<class 'list'>, {shares!r})",
        "options": repr(options),
        "source": source,
    }


def edge_cases() -> list[dict]:
    nan = float("nan")
    return [
        hub_row(  # every rule about cells
            "How are the  roads?\n",
            {
                "Alba": [0.3, 0.5, 0.1, 0.1],
                "Belo": [0.2, 0.2, 0.0, 0.6],
                "Nobody": [0.0, 0.0, 0.0, 1.0],
                "Zero": [0.0, 0.0, 0.0, 0.0],
                "Short": [0.5, 0.5],
                "Percent": [30.0, 50.0, 10.0, 10.0],
                "Gap": [nan, 0.5, 0.3, 0.2],
                "Czech Rep.": [0.25, 0.25, 0.5, 0.0],
                "Coro (Current national sample)": [0.1, 0.2, 0.7, 0.0],
                "Coro (Old national sample)": [0.7, 0.2, 0.1, 0.0],
                "Coro (Non-national sample)": [1.0, 0.0, 0.0, 0.0],
                "Dano (Old national sample)": [0.6, 0.2, 0.2, 0.0],
                "Elta (Non-national sample)": [1.0, 0.0, 0.0, 0.0],
            },
            [*SCALE, "DK/Refused"],
        ),
        # the same question in another year: Alba once more, 0.5 on average with 0.3333 / 0.5556 / 0.1111
        hub_row("How are the roads?", {"Alba": [0.5, 0.0, 0.5], "Fero": [0.0, 1.0, 0.0]}, SCALE),
        hub_row(  # numbers, and an option between the two that is no answer
            "Is it right to whistle?",
            {"Alba": [0.25, 0.25, 0.25, 0.25, 0.0], "Belo": [0.0, 0.4, 0.0, 0.4, 0.2]},
            ["Never", 2.0, nan, 3.0, "Always"],
            "WVS",
        ),
        hub_row("Is the sea blue?", {"Alba": [0.9, 0.1], "Belo": [0.2, 0.8]}, ["Yes", "No"]),
        hub_row(None, {"Alba": [0.9, 0.1], "Belo": [0.2, 0.8]}, ["Yes", "No"]),
        hub_row("One country?", {"Alba": [0.9, 0.1]}, ["Yes", "No"]),
        hub_row("One option?", {"Alba": [0.9, 0.1], "Belo": [0.2, 0.8]}, ["Yes", "Don’t know"]),
        hub_row("Twelve?", {"Alba": [1 / 12] * 12, "Belo": [1 / 12] * 12}, list(range(12))),
        hub_row("The same twice?", {"Alba": [0.5, 0.5], "Belo": [0.5, 0.5]}, ["Other", "Other"]),
        {"question": "Blank cells?", "selections": None, "options": None, "source": "GAS"},
    ]


def many(num_questions: int = 20, num_countries: int = 6) -> list[dict]:
    rng = np.random.default_rng(0)
    words = ["roads", "schools", "rain", "bread", "music", "boats", "clocks", "forests", "taxes", "stamps"]
    words += ["rivers", "kites", "shoes", "lamps", "gardens", "pens", "bells", "horses", "maps", "soups"]
    ask = ["How are the {}?", "Would you rather do without {} in your own town?"]
    return [
        hub_row(
            ask[number % 2].format(words[number]),
            {f"Land {country}": rng.dirichlet([1, 1, 1]).tolist() for country in range(num_countries)},
            SCALE,
        )
        for number in range(num_questions)
    ]


def to_csv(path: Path, rows: list[dict]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def to_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def edges(tmp_path) -> Path:
    return to_csv(tmp_path / "global_opinions.csv", edge_cases())


def by_cell(dataset: Dataset) -> dict[tuple[str, str], dict]:
    return {(row["prompt"][-1]["content"].split("\n")[0], row["demographic"]["country"]): row for row in dataset}


def answers(dataset: Dataset) -> pd.DataFrame:
    """Of each row the text of its last message per column, without going through a Python object per row."""
    table = dataset.data.table.combine_chunks()
    columns = {name: table[name].to_pandas() for name in ("question_id", "person_id")}
    columns["country"] = table["demographic"].chunk(0).field("country").to_pandas()
    for name in {"completion", "chosen", "rejected"} & set(table.column_names):
        columns[name] = table[name].chunk(0).flatten().field("content").to_pandas()
    return pd.DataFrame(columns)


def test_every_rule_about_cells(edges):
    conversion = convert_global_opinions(edges, splits=NO_TEST)
    rows = by_cell(conversion.datasets()["train"])
    roads = {country: row["distribution"] for (text, country), row in rows.items() if text == "How are the roads?"}
    expected = {
        "Alba": [(0.3 / 0.9 + 0.5) / 2, 0.5 / 0.9 / 2, (0.1 / 0.9 + 0.5) / 2],
        "Belo": [0.5, 0.5, 0.0],  # 0.4 of the people answered
        "Coro": [0.1, 0.2, 0.7],
        "Czechia": [0.25, 0.25, 0.5],
        "Dano": [0.6, 0.2, 0.2],
        "Fero": [0.0, 1.0, 0.0],
    }
    assert set(roads) == set(expected)
    for country, shares in expected.items():
        np.testing.assert_allclose(roads[country], shares, rtol=1e-12)

    whistle = rows["Is it right to whistle?", "Alba"]
    assert whistle["options"] == ["Never", "2", "3", "Always"]
    np.testing.assert_allclose(whistle["distribution"], [1 / 3, 1 / 3, 1 / 3, 0])
    assert whistle["num_options"] == 4
    assert whistle["prompt"][-1]["content"].split("\n")[2:6] == ["A. Never", "B. 2", "C. 3", "D. Always"]


def test_every_drop_is_counted(edges):
    conversion = convert_global_opinions(edges, splits=NO_TEST)
    conversion.datasets()
    report = conversion.report.to_dict()
    assert report["units"]["questions"] == {
        "read": 10,
        "kept": 3,
        "dropped": {
            "the same as another, merged": 1,
            "without a text": 1,
            "fewer than 2 options": 2,  # one that has a single answer, and one that is blank
            "more than 11 options": 1,
            "two options of the same text": 1,
            "fewer than 2 countries": 1,
        },
    }
    assert report["units"]["cells"] == {
        "read": 13 + 2 + 2 + 2 + 2 + 1 + 2 + 2 + 2,
        "kept": 6 + 2 + 2,
        "dropped": {
            "nobody gave an answer": 2,
            "not one share per option": 1,
            "shares that don't sum to 1": 1,
            "a share is missing": 1,
            "sample that is not national": 2,
            "of a question that is left out": 8,
            "of a question with fewer than 2 countries": 1,
            "older sample beside a current one": 1,
            "the same question and country as another, averaged": 1,
        },
    }
    assert report["rows"] == {"train": 10}
    assert "Alba" not in str(conversion.report)


def test_golden(tmp_path):
    """`CUMA_UPDATE_GOLDEN=1 pytest` writes the file anew: read the difference before you keep it."""
    source = to_csv(tmp_path / "global_opinions.csv", edge_cases())
    splits = SplitOptions(split_by=("prompt",), test=0.3)
    made = {}
    for task, prompts in {
        "distribution": PromptFormat(),
        "sft": PromptFormat(demographics="system", template="paper"),
        "dpo": PromptFormat(demographics="user"),
    }.items():
        conversion = convert_global_opinions(source, task=task, prompts=prompts, splits=splits, answers_per_cell=2)
        rows = {split: dataset.to_list() for split, dataset in conversion.datasets().items()}
        made[task] = rows | {"report": conversion.report.to_dict()}
    check_golden("global_opinions", made)


def test_both_layouts_say_the_same(tmp_path):
    rows = many(4, 3)
    lines = [
        {"qid": f"q{number}", "question": row["question"], "country": country, "options": SCALE, "dist": shares}
        for number, row in enumerate(rows)
        for country, shares in eval(row["selections"][len("defaultdict(<class 'list'>, ") : -1]).items()
    ]
    hub = convert_global_opinions(to_csv(tmp_path / "a.csv", rows), splits=NO_TEST).datasets()["train"]
    own = convert_global_opinions(to_jsonl(tmp_path / "b.jsonl", lines), splits=NO_TEST).datasets()["train"]
    hub_rows, own_rows = by_cell(hub), by_cell(own)
    assert len(own_rows) == 12 and set(hub_rows) == set(own_rows)
    for cell, row in own_rows.items():
        assert row["question_id"] in {"q0", "q1", "q2", "q3"}  # the source's own
        for column in ("prompt", "options", "distribution", "demographic", "num_options"):
            assert row[column] == hub_rows[cell][column]


def test_every_form_of_a_local_copy(tmp_path, monkeypatch):
    rows = edge_cases()
    expected = convert_global_opinions(to_csv(tmp_path / "a.csv", rows), splits=NO_TEST).datasets()["train"].to_list()
    Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved_dict")
    (tmp_path / "clone" / "data").mkdir(parents=True)
    to_csv(tmp_path / "clone" / "data" / "global_opinions.csv", rows)
    for name in ("b.parquet", "saved", "saved_dict", "clone"):
        assert convert_global_opinions(tmp_path / name, splits=NO_TEST).datasets()["train"].to_list() == expected, name

    loaded = Dataset.from_list(rows)
    assert convert_global_opinions(loaded, splits=NO_TEST).datasets()["train"].to_list() == expected

    asked = []
    monkeypatch.setattr(reading, "load_dataset", lambda *args, split: asked.append((args[0], split)) or loaded)
    hub = convert_global_opinions(splits=NO_TEST).datasets()["train"]
    assert hub.to_list() == expected and asked == [("Anthropic/llm_global_opinions", "train")]


def test_a_dictionary_of_splits(tmp_path):
    rows = edge_cases()
    expected = convert_global_opinions(to_csv(tmp_path / "a.csv", rows), splits=NO_TEST).datasets()["train"].to_list()
    loaded = DatasetDict({"train": Dataset.from_list(rows), "other": Dataset.from_list(rows[:1])})
    assert convert_global_opinions(loaded, splits=NO_TEST).datasets()["train"].to_list() == expected


def test_only_a_missing_number_is_missing(tmp_path):
    """`nan` inside a text is a text, beside numbers that are missing, too."""
    whole = hub_row("Who?", {"Alba": [0.5, 0.5], "Belo": [0.2, 0.8]}, ["Ask nan, then", "Or [nan] then"])
    gaps = hub_row(
        "Whom?", {"Alba (nan)": [0.5, 0.5, 0.0], "Belo": [0.1, 0.9, 0.0]}, ["My nan, yes", "No", float("nan")]
    )
    data = convert_global_opinions(to_csv(tmp_path / "a.csv", [whole, gaps]), splits=NO_TEST).datasets()["train"]
    rows = by_cell(data)
    assert rows["Who?", "Alba"]["options"] == ["Ask nan, then", "Or [nan] then"]
    assert rows["Whom?", "Alba (nan)"]["options"] == ["My nan, yes", "No"]


def test_shares_are_rounded(tmp_path):
    """Percentages that are rounded one by one: their sum may be off by 0.05 and no more."""
    shares = {"Alba": [0.649, 0.4], "Belo": [0.551, 0.4], "Coro": [0.651, 0.4], "Dano": [0.549, 0.4]}
    source = to_csv(tmp_path / "a.csv", [hub_row("Good?", shares, ["Yes", "No"])])
    conversion = convert_global_opinions(source, splits=NO_TEST)
    rows = by_cell(conversion.datasets()["train"])
    assert {country for _, country in rows} == {"Alba", "Belo"}
    np.testing.assert_allclose(rows["Good?", "Alba"]["distribution"], [0.649 / 1.049, 0.4 / 1.049])
    assert conversion.report.drops["cells"] == {"shares that don't sum to 1": 2}


def test_a_country_of_two_names(tmp_path):
    """It is counted in both layouts, and held out under either name."""
    countries = ["S. Korea", "Land 1", "Land 2", "Land 3"]
    hub = [row | {"selections": repr({country: [0.2, 0.3, 0.5] for country in countries})} for row in many(8)]
    lines = [
        {
            "qid": f"q{number}",
            "question": row["question"],
            "country": country,
            "options": SCALE,
            "dist": [0.2, 0.3, 0.5],
        }
        for number, row in enumerate(hub)
        for country in countries
    ]
    for source in (to_csv(tmp_path / "a.csv", hub), to_jsonl(tmp_path / "b.jsonl", lines)):
        for names in (("S. Korea",), ("South Korea",), ("S. Korea", "South Korea")):
            splits = SplitOptions(split_by=("prompt",), test=0.3, holdout_countries=names)
            conversion = convert_global_opinions(source, splits=splits)
            data = conversion.datasets()
            assert {row["demographic"]["country"] for row in data["test_countries"]} == {"South Korea"}
            assert conversion.report.notes["cells whose country has another name"] == 8


@pytest.mark.parametrize("source", ["no_such.csv", "no_such.jsonl", "no_such.parquet", "no_such_folder"])
def test_a_missing_source(tmp_path, source):
    with pytest.raises(FileNotFoundError, match="no_such"):
        convert_global_opinions(tmp_path / source).datasets()


HUB = "data.csv, row 2, column `{}`: "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selections": "{'Land 7': [0.5, 0.5"}, HUB.format("selections") + "not a dict in Python's notation"),
        ({"selections": "defaultdict(<class 'list'>, {'Land 7': print(1)})"}, HUB.format("selections") + "not a dict"),
        ({"selections": "[0.5, 0.5]"}, HUB.format("selections") + "expected a dict .* got a list"),
        ({"selections": "{'Land 7': 0.5}"}, HUB.format("selections") + "a country's value is not a list"),
        ({"selections": "{'Land 7': ['0.5', 0.5]}"}, HUB.format("selections") + "a country's value is not a list"),
        ({"selections": "{'Land 7': [True, 0]}"}, HUB.format("selections") + "a country's value is not a list"),
        ({"selections": "{'Land 7': [1.5, -0.5]}"}, HUB.format("selections") + "a share is negative"),
        ({"selections": "{'Land 7': [1e999, 0]}"}, HUB.format("selections") + "a share is negative or infinite"),
        ({"selections": "{7: [0.5, 0.5]}"}, HUB.format("selections") + "expected text, got int"),
        ({"selections": "{' ': [0.5, 0.5]}"}, HUB.format("selections") + "the name of a country is blank"),
        ({"selections": "{'\\ud800': [0.5, 0.5]}"}, HUB.format("selections") + "has half of a surrogate pair"),
        ({"options": "['\\ud800', 'No']"}, HUB.format("options") + "has half of a surrogate pair"),
        ({"selections": "[" * 5000}, HUB.format("selections") + "not a dict"),
        ({"options": "Yes, No"}, HUB.format("options") + "not a list in Python's notation"),
        ({"options": "{'Yes': 1}"}, HUB.format("options") + "expected a list .* got a dict"),
        ({"options": "[['Yes'], 'No']"}, HUB.format("options") + "an option is a list"),
    ],
)
def test_a_malformed_row_is_named_by_file_row_and_column(tmp_path, change, message):
    rows = many(3)
    rows[1] |= change
    with pytest.raises(ValueError, match=message) as error:
        convert_global_opinions(to_csv(tmp_path / "data.csv", rows)).datasets()
    assert "Land" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_a_malformed_file_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("question,selections,options\na,,\na,b,c,d\n")
    with pytest.raises(ValueError, match="a.csv, row 2: 4 cells, but 3 in the header"):
        convert_global_opinions(tmp_path / "a.csv").datasets()
    (tmp_path / "b.csv").write_text("question,answers\na,b\n")
    with pytest.raises(ValueError, match="b.csv, row 1, column `options`: there is no such column"):
        convert_global_opinions(tmp_path / "b.csv").datasets()
    row = {"qid": "q", "question": "Good?", "country": "Land 1", "options": SCALE, "dist": [0.2, 0.3, 0.5]}
    lines = [row, row | {"country": "Land 2", "question": "Bad?"}]
    with pytest.raises(ValueError, match="c.jsonl, line 2: field `question` differs") as error:
        convert_global_opinions(to_jsonl(tmp_path / "c.jsonl", lines)).datasets()
    assert "Land" not in str(error.value)
    lines[1] = row | {"country": "Land 2", "dist": [0.2, 0.3]}
    with pytest.raises(ValueError, match="c.jsonl, line 2: field `dist` holds 2 numbers for 3 `options`"):
        convert_global_opinions(to_jsonl(tmp_path / "c.jsonl", lines)).datasets()


def test_nothing_left_is_an_error_with_the_counts(tmp_path):
    with pytest.raises(ValueError, match="Lower `min_countries`(.|\n)*fewer than 7 countries +-3"):
        convert_global_opinions(to_csv(tmp_path / "a.csv", many(3)), min_countries=7).datasets()


def test_held_out_countries_meet_test_questions_only(tmp_path):
    source = to_csv(tmp_path / "a.csv", many())
    splits = SplitOptions(split_by=("prompt",), test=0.25, validation=0.1, holdout_countries=2)
    conversion = convert_global_opinions(source, task="sft", splits=splits, answers_per_cell=3)
    data = conversion.datasets()
    assert_disjoint(data, ("prompt",))
    country = {split: set(pd.DataFrame(list(part["demographic"]))["country"]) for split, part in data.items()}
    assert len(country["test_countries"]) == 2
    assert country["train"] == country["test"] == {f"Land {index}" for index in range(6)} - country["test_countries"]
    assert set(data["test_countries"]["question_id"]) == set(data["test"]["question_id"])
    # 20 questions, 5 of them for testing: 15 * 2 cells of the held-out countries are in no split
    dropped = conversion.report.to_dict()["units"]["cells"]["dropped"]
    assert dropped == {"of a held-out country and a question that is not for testing": 30}
    assert conversion.report.kept("questions") == 20
    named = SplitOptions(split_by=("prompt",), test=0.25, holdout_countries=("Land 4",))
    data = convert_global_opinions(source, splits=named).datasets()
    assert {row["demographic"]["country"] for row in data["test_countries"]} == {"Land 4"}
    assert "Land 4" not in {row["demographic"]["country"] for split in ("train", "test") for row in data[split]}


def test_cells_can_be_held_out_of_questions_that_are_trained_on(tmp_path):
    """So that there is a training marginal: of the questions, by other countries' answers."""
    source = to_csv(tmp_path / "a.csv", many())
    splits = SplitOptions(split_by=("person",), test=0.25, holdout_countries=("Land 4",))
    conversion = convert_global_opinions(source, splits=splits)
    cells = {
        split: {(row["question_id"], row["demographic"]["country"]) for row in part}
        for split, part in conversion.datasets().items()
    }
    # 30 of the 120 cells are drawn for testing, 9 of which are of the held-out country.
    assert {split: len(part) for split, part in cells.items()} == {"train": 79, "test": 21, "test_countries": 20}
    assert not cells["train"] & cells["test"]
    questions = {split: {question for question, _ in part} for split, part in cells.items()}
    assert questions["train"] == questions["test_countries"] and questions["test"] <= questions["train"]
    assert conversion.report.kept("cells") == 120
    answers = convert_global_opinions(source, task="sft", splits=splits, answers_per_cell=3).datasets()
    assert_disjoint(answers, ("person",))
    asked = {split: {(r["question_id"], r["demographic"]["country"]) for r in part} for split, part in answers.items()}
    assert asked == cells


def test_questions_of_held_out_countries_alone_are_not_kept(tmp_path):
    """They have a row where they are for testing, and none where they are not."""
    rows = many()
    for row in rows[10:]:
        row["selections"] = repr({"Land 0": [0.2, 0.3, 0.5], "Land 1": [0.5, 0.3, 0.2]})
    splits = SplitOptions(split_by=("prompt",), test=0.25, holdout_countries=("Land 0", "Land 1"))
    conversion = convert_global_opinions(to_csv(tmp_path / "a.csv", rows), splits=splits)
    questions = {row["question_id"] for part in conversion.datasets().values() for row in part}
    assert conversion.report.kept("questions") == len(questions) < 20
    assert conversion.report.drops["questions"] == {"no cell of theirs is in a split": 20 - len(questions)}


def test_questions_of_nearly_the_same_text_stay_together(tmp_path):
    shares = {"Alba": [0.5, 0.5], "Belo": [0.2, 0.8]}
    rows = [
        hub_row(text, shares, options)
        for row in many(12)
        for text, options in [
            (row["question"], ["Well", "Badly"]),
            (row["question"], ["Not well in any way", "In a way that leaves me wholly content"]),
            (row["question"].upper().replace("?", " ..."), ["Well", "Badly"]),
        ]
    ]
    splits = SplitOptions(split_by=("prompt",), test=0.3)
    data = convert_global_opinions(to_csv(tmp_path / "a.csv", rows), splits=splits).datasets()
    assert_disjoint(data, ("prompt",))
    sizes = pd.concat(part.to_pandas() for part in data.values()).groupby("prompt_group")["question_id"].nunique()
    assert set(sizes % 3) == {0} and len(sizes) > 3
    assert sizes.sum() == 36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"splits": SplitOptions(split_by=("prompt",), holdout_combinations=("country", "age"))},
            "`holdout_combinations` .* `holdout_countries`",
        ),
        ({"task": "choice"}, "`task` is 'choice'"),
        ({"prompts": PromptFormat(messages=True)}, "`messages` is for the task 'sft' only"),
        ({"answers_per_cell": 0}, "`answers_per_cell` is 0"),
        ({"min_countries": 1.5}, "`min_countries` is 1.5"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_global_opinions("no_such.csv", **arguments)


@pytest.mark.parametrize("task", ["distribution", "dpo"])
@pytest.mark.parametrize("layout", ["csv", "jsonl"])
def test_rows_do_not_depend_on_the_order_of_the_source(tmp_path, layout, task):
    rows = edge_cases()
    # three rows of a country, of which 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floating point
    rows += [hub_row("How are the roads?", {"Gamo": [x / 10, 1 - x / 10, 0.0]}, SCALE) for x in (1, 2, 3)]
    if layout == "jsonl":  # twice each, under two ids
        questions = [row["question"] for row in many(6)] * 2
        shares = ([0.1, 0.7, 0.2], [0.3, 0.3, 0.4], [0.6, 0.2, 0.2])
        rows = [
            {"qid": f"q{index:02d}", "question": text, "country": f"Land {country}", "options": SCALE, "dist": dist}
            for index, text in enumerate(questions)
            for country, dist in enumerate(shares)
        ]
    write = {"csv": to_csv, "jsonl": to_jsonl}[layout]
    splits = SplitOptions(split_by=("prompt",), test=0.3)
    first, second = (
        {
            name: part.to_list()
            for name, part in convert_global_opinions(path, task=task, splits=splits).datasets().items()
        }
        for path in (write(tmp_path / f"a.{layout}", rows), write(tmp_path / f"b.{layout}", rows[::-1]))
    )
    assert first == second


def test_answers_follow_the_distribution_and_the_seed(tmp_path):
    source = to_csv(tmp_path / "a.csv", many(4))
    cells = convert_global_opinions(source, splits=NO_TEST).datasets()["train"]
    pairs = answers(
        convert_global_opinions(source, task="dpo", splits=NO_TEST, answers_per_cell=2000).datasets()["train"]
    )
    assert pairs["person_id"].nunique() == len(pairs) == 4 * 6 * 2000
    assert pairs["person_id"].str.startswith("simulated-").all()
    shares = pd.crosstab([pairs["question_id"], pairs["country"]], pairs["chosen"]) / 2000
    for cell in cells:
        drawn = shares.loc[cell["question_id"], cell["demographic"]["country"]]
        np.testing.assert_allclose(drawn, cell["distribution"], atol=0.056)  # 5 standard errors at a share of 1/2
    # The rejected option is either of the two others, each in half of the pairs: 48,000 of them, 5 standard errors.
    step = pd.Series([(ord(b) - ord(a)) % 3 for a, b in zip(pairs["chosen"], pairs["rejected"], strict=True)])
    assert set(step) == {1, 2}
    assert abs((step == 1).mean() - 0.5) < 0.0115

    def drawn_with(seed: int, source: Path = source) -> pd.DataFrame:
        options = SplitOptions(split_by=("prompt",), test=0.0, seed=seed)
        data = convert_global_opinions(source, task="sft", splits=options, answers_per_cell=50).datasets()["train"]
        return answers(data).drop(columns="person_id").set_index(["question_id", "country"])

    first = drawn_with(0)
    assert first.equals(drawn_with(0)) and not first.equals(drawn_with(1))
    # what others were asked makes no difference to a cell's answers
    fewer = drawn_with(0, to_csv(tmp_path / "b.csv", many(4)[2:]))
    assert len(fewer) == 2 * 6 * 50
    pd.testing.assert_frame_equal(fewer, first[first.index.isin(fewer.index)])


def test_the_profile_in_the_prompt_or_not(tmp_path):
    source = to_csv(tmp_path / "a.csv", many(2))

    def first(**settings) -> dict:
        prompts = PromptFormat(**settings)
        data = convert_global_opinions(
            source, task="sft", prompts=prompts, splits=NO_TEST, answers_per_cell=1
        ).datasets()
        return data["train"][0]

    plain, system, user = first(), first(demographics="system"), first(demographics="user")
    country = plain["demographic"]["country"]
    assert [message["role"] for message in plain["prompt"]] == ["user"]
    assert country not in plain["prompt"][0]["content"]
    assert [message["role"] for message in system["prompt"]] == ["system", "user"]
    assert country in system["prompt"][0]["content"] and system["prompt"][1] == plain["prompt"][0]
    assert user["prompt"][0]["content"].endswith("\n\n" + plain["prompt"][0]["content"])
    assert country in user["prompt"][0]["content"]
    whole = first(demographics="system", messages=True)
    assert "prompt" not in whole and "completion" not in whole
    assert whole["messages"] == system["prompt"] + system["completion"]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_FILE.exists(), reason=f"GlobalOpinionQA rows not found at {REAL_FILE}; set CUMA_DATA")
def test_the_published_rows():
    published = [json.loads(line) for line in REAL_FILE.read_text(encoding="utf-8").splitlines()]
    aliases = global_opinions_source.COUNTRY_ALIASES
    dist = {(row["qid"], aliases.get(row["country"], row["country"])): row["dist"] for row in published}
    splits = SplitOptions(split_by=("prompt",), validation=0.1, holdout_countries=5)
    conversion = convert_global_opinions(REAL_FILE, splits=splits, min_countries=1)
    data = conversion.datasets()
    assert conversion.report.kept("questions") == len({row["qid"] for row in published})
    rows = [row for part in data.values() for row in part]
    for row in rows:
        # published with 6 digits, whose sum is 1 within 11 * 5e-7
        np.testing.assert_allclose(
            row["distribution"], dist[row["question_id"], row["demographic"]["country"]], rtol=6e-6
        )
    held_out = {row["demographic"]["country"] for row in data["test_countries"]}
    assert len(rows) + sum(conversion.report.drops["cells"].values()) == len(published)
    assert not held_out & {row["demographic"]["country"] for split in ("train", "test") for row in data[split]}

    sampled = convert_global_opinions(REAL_FILE, task="sft", splits=splits, min_countries=1).datasets()
    assert_disjoint(sampled, ("prompt",))
    assert_disjoint(sampled)  # each answer is a person's of its own
    excess = []
    for split, part in sampled.items():
        truth = {(row["question_id"], row["demographic"]["country"]): row["distribution"] for row in data[split]}
        drawn = answers(part)
        shares = pd.crosstab([drawn["question_id"], drawn["country"]], drawn["completion"]) / 200
        for key, row in zip(shares.index, shares.to_dict("records"), strict=True):
            p = np.array(truth[key])
            q = np.array([row.get(letter, 0.0) for letter in "ABCDEFGHIJK"[: len(p)]])
            assert (q[p == 0] == 0).all()
            excess.append((((q - p) ** 2)[p > 0] / p[p > 0]).sum() * 200 - ((p > 0).sum() - 1))
    # Pearson's statistic of a cell has its degrees of freedom as its mean and about 2 * 3 as its variance; over 2,000
    # cells its mean excess has a standard error of about sqrt(6 / 2000) = 0.055.
    assert abs(np.mean(excess)) < 0.3
