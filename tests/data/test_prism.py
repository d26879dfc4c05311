# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""PRISM's layout, written by hand with every edge case."""

import json
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, Json, List, load_dataset, load_from_disk

from trl_cuma.data.leakage import assert_disjoint
from trl_cuma.data.prism import convert_prism
from trl_cuma.data.prompts import PromptFormat
from trl_cuma.data.splits import SplitOptions

from .golden_files import check_golden
from .prism_rows import SURVEY, answers, asked, conversation, edge_cases, metadata, person

FIXTURES = Path(os.environ.get("CUMA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "fixtures"
ALL_TRAIN = SplitOptions(split_by=("prompt",), test=0.0)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def write(tmp_path):
    def make(conversations=None, survey=None, with_metadata=True):
        write_lines(tmp_path / "survey.jsonl", survey or SURVEY)
        write_lines(tmp_path / "conversations.jsonl", conversations or edge_cases())
        if with_metadata:
            write_lines(tmp_path / "metadata.jsonl", metadata())
        (tmp_path / "survey_question_mapping.json").write_text("[]")  # is in the published folder, too
        return tmp_path

    return make


def convert(source, **options):
    made = convert_prism(source, **({"splits": ALL_TRAIN, "min_count": 1, "keep_unknown": True} | options))
    return made.datasets()["train"].to_list(), made.report


def test_sft_rows_are_the_usable_turns(write):
    rows, report = convert(write())
    assert [(row["conversation_id"], row["turn"], row["completion"][0]["content"]) for row in rows] == [
        ("c0", 0, "b0"),
        ("c0", 1, "f0"),
        ("c1", 0, "a1"),
        ("c1", 1, "same"),
        ("c2", 0, "b2"),
        ("c3", 0, "a3"),
        ("c6", 0, "a6"),
    ]
    assert rows[1]["prompt"] == [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "b0"},
        {"role": "user", "content": "More?"},
    ]
    assert report.units["conversations"] == 8 and report.kept("conversations") == 5
    assert dict(report.drops["conversations"]) == {
        "the person is not in the survey": 1,
        "no opening prompt": 1,
        "no turn can be used": 1,
    }
    # Turns of conversations 0, 1, 2, 3, 6 and 7: 2 + 2 + 3 + 2 + 2 + 1.
    assert report.units["turns"] == 12 and report.kept("turns") == 7 == report.rows["train"]
    assert dict(report.drops["turns"]) == {
        "no chosen answer": 1,  # of 2
        "after a turn that is missing or can't be used": 2,  # of 2 and of 6
        "several chosen answers with different texts": 1,  # of 3
        "the chosen answer has no text": 1,  # of 7
    }
    assert report.notes["turns whose chosen answer has a lower score than another, kept"] == 1
    assert report.notes["turns with several chosen answers of one text, taken as one"] == 1
    assert report.notes["candidates without text, left out"] == 2


def test_pairs(write):
    rows, report = convert(write(), task="dpo")
    pairs = [(row["conversation_id"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert pairs == [
        *(("c0", "b0", "a0"), ("c0", "b0", "c0"), ("c0", "b0", "d0"), ("c0", "f0", "e0")),
        ("c1", "a1", "c1"),
        ("c3", "a3", "c3"),
        ("c6", "a6", "b6"),
    ]
    # Other candidates with a text: 3 + 1 of 0, 2 + 1 of 1, none of 2, 2 of 3, 1 of 6.
    assert report.units["pairs"] == 10 and report.kept("pairs") == 7
    assert dict(report.drops["pairs"]) == {
        "both have the same score": 1,
        "the rejected text is the chosen one": 1,
        "the rejected answer has the higher score": 1,
    }


def test_of_equal_chosen_texts_the_highest_score_counts(write):
    history = [asked(0, "?"), answers(0, ("same", 40, True), ("same", 60, True), ("other", 50, False))]
    rows, report = convert(write([conversation(0, "user0", *history)]), task="dpo")
    assert [row["rejected"][0]["content"] for row in rows] == ["other"]  # 60 > 50, though 40 < 50
    assert report.drops["pairs"] == {"the rejected text is the chosen one": 1}


def test_turns_and_candidates_in_any_order_give_the_same_rows(write):
    expected, _ = convert(write(), task="dpo")
    rows = edge_cases()
    for row in rows:
        row["conversation_history"].reverse()
    assert rows != edge_cases()
    assert convert(write(rows), task="dpo")[0] == expected


def test_profiles(write):
    rows, report = convert(write())
    profiles = {row["person_id"]: row["demographic"] for row in rows}
    assert profiles["user0"] == {
        "country": "Alba",
        "age": "25-34 years old",
        "gender": "Female",
        "education": "Some Primary",
        "religion": "No Affiliation",  # an answer
        "ethnicity": "Asian",
        "employment": "Retired",
    }
    assert list(profiles["user0"]) == ["country", "age", "gender", "education", "religion", "ethnicity", "employment"]
    assert [profiles["user1"][field] for field in ("religion", "ethnicity", "age", "country")] == [None] * 3 + ["Alba"]
    assert set(profiles["user3"].values()) == {None}  # kept, and counted
    assert report.notes["people of whom nothing is known, kept"] == 1
    assert report.units["people"] == 4 and report.drops["people"] == {"no conversation of theirs can be split": 1}


def test_nothing_in_a_persons_own_words_but_prompts_is_kept(write):
    source = write()
    made = convert_prism(source, splits=ALL_TRAIN, min_count=1)
    text = json.dumps(made.datasets()["train"].to_list())
    assert "Hello?" in text
    for unwanted in ("SELF-DESCRIBED", "Shinto", "Black", "Belo", "Married"):
        assert unwanted not in text


def test_the_language_is_that_of_the_opening_prompt(write):
    rows, _ = convert(write())
    assert {row["conversation_id"]: row["language"] for row in rows} == {
        **{"c0": "en", "c6": "pt"},
        **dict.fromkeys(["c1", "c2", "c3"]),  # none in the metadata
    }
    rows, report = convert(write(), languages=["en"])
    assert {row["conversation_id"] for row in rows} == {"c0"}
    assert (
        report.drops["conversations"]["of another language, or of none"] == 5
    )  # all but c0 and c4, and one without its person


def test_metadata_is_optional_unless_languages_are_chosen(write, tmp_path):
    source = write(with_metadata=False)
    assert {row["language"] for row in convert(source)[0]} == {None}
    with pytest.raises(FileNotFoundError, match="metadata"):
        convert_prism(source, languages=["en"])
    (source / "survey.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no folder with survey\.jsonl"):
        convert_prism(source)


def test_the_balanced_subset(write):
    rows, report = convert(write(), subset="included_in_balanced_subset")
    assert "c6" not in {row["conversation_id"] for row in rows}
    assert report.drops["conversations"]["not in the subset `included_in_balanced_subset`"] == 1
    with pytest.raises(ValueError, match="`subset`"):
        convert_prism(write(), subset="balanced")


def test_every_form_of_the_tables_reads_the_same(write, tmp_path, monkeypatch):
    expected, _ = convert(write(), task="dpo")
    tables = {
        "survey": Dataset.from_list(SURVEY),
        "conversations": Dataset.from_list(edge_cases()),
        "metadata": Dataset.from_list(metadata()),
    }
    for name, table in tables.items():
        (tmp_path / "parquet").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "parquet" / f"{name}.parquet")
        table.save_to_disk(tmp_path / "saved" / name)
    assert convert(tmp_path / "parquet", task="dpo")[0] == expected
    assert convert(tmp_path / "saved", task="dpo")[0] == expected
    asked_for = []
    monkeypatch.setattr(
        "trl_cuma.data.reading.load_dataset",
        lambda source, config, split: asked_for.append((source, config, split)) or tables[config],
    )
    assert convert("HannahRoseKirk/prism-alignment", task="dpo")[0] == expected
    assert asked_for == [("HannahRoseKirk/prism-alignment", name, "train") for name in tables]


def test_tables_as_the_hub_serves_them(write, tmp_path, monkeypatch):
    """JSON Lines through `load_dataset`: entries of a history have not the same keys, and are kept as JSON."""
    expected, _ = convert(write(), task="dpo")
    cache = str(tmp_path / "cache")
    tables = {
        name: load_dataset("json", data_files=str(tmp_path / f"{name}.jsonl"), split="train", cache_dir=cache)
        for name in ("survey", "conversations", "metadata")
    }
    assert tables["conversations"].features["conversation_history"] == List(Json())
    monkeypatch.setattr("trl_cuma.data.reading.load_dataset", lambda source, config, split: tables[config])
    assert convert("HannahRoseKirk/prism-alignment", task="dpo")[0] == expected
    for name, table in tables.items():
        (tmp_path / "parquet").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "parquet" / f"{name}.parquet")
        table.save_to_disk(tmp_path / "saved" / name)
    assert load_from_disk(tmp_path / "saved" / "conversations").features["conversation_history"] == List(Json())
    assert convert(tmp_path / "parquet", task="dpo")[0] == expected
    assert convert(tmp_path / "saved", task="dpo")[0] == expected


def test_numbers_as_tables_with_gaps_write_them(write):
    history = [asked(0, "?"), answers(0, ("a", float("nan"), True), ("b", 50, False), ("c", float("nan"), False))]
    for entry in history[1]:
        entry["within_turn_id"] = float(entry["within_turn_id"])
    rows, report = convert(write([conversation(0, "user0", *history)]), task="dpo")
    assert [row["rejected"][0]["content"] for row in rows] == ["b", "c"]  # an unknown score denies nothing
    history[1][0]["score"], history[1][2]["if_chosen"], history[1][2]["content"] = 60, True, "a"
    rows, report = convert(write([conversation(0, "user0", *history)]), task="dpo")
    assert [row["rejected"][0]["content"] for row in rows] == ["b"]  # 60 > 50, whichever of the two came first
    history[1][0], history[1][2] = history[1][2] | {"within_turn_id": 0.0}, history[1][0] | {"within_turn_id": 2.0}
    assert convert(write([conversation(0, "user0", *history)]), task="dpo")[0] == rows


def test_candidates_go_by_number_and_not_by_text(write):
    texts = [f"candidate {number}" for number in range(12)]
    history = [asked(0, "?"), answers(0, *((text, 50 - number, number == 0) for number, text in enumerate(texts)))]
    for form in (int, float, str):
        for number, entry in enumerate(history[1]):
            entry["within_turn_id"] = form(number)
        rows, _ = convert(write([conversation(0, "user0", *history)]), task="dpo")
        assert [row["rejected"][0]["content"] for row in rows] == texts[1:]


def test_values_of_few_people_are_grouped(write):
    rows, _ = convert(write(), min_count=2)
    assert {row["demographic"]["country"] for row in rows if row["person_id"] == "user0"} == {"Alba"}
    assert {row["demographic"]["age"] for row in rows} == {None}  # held by user0 alone


@pytest.mark.parametrize("source", [Path("no_such_folder"), "no_such_folder"])
def test_no_such_folder(source):
    with pytest.raises(FileNotFoundError, match="no_such_folder is neither a file, nor a folder"):
        convert_prism(source)


def test_a_loaded_table_is_not_the_whole_data_set():
    with pytest.raises(TypeError, match="`source` is a Dataset, expected"):
        convert_prism(Dataset.from_list(SURVEY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "assistant"}, "the `role` of entry 1 is neither 'user' nor 'model'"),
        ({"turn": "0"}, "the `turn` of entry 1 is no integer"),
        ({"if_chosen": None}, "`if_chosen` of entry 1 is neither true nor false"),
        ({"score": "17"}, "the `score` of entry 1 is no number"),
        ({"within_turn_id": None}, "`within_turn_id` of entry 1 is no integer"),
        ({"within_turn_id": 1.5}, "`within_turn_id` of entry 1 is no integer"),
        ({"within_turn_id": float("nan")}, "`within_turn_id` of entry 1 is no integer"),
        ({"content": 17}, "expected text, got int"),
    ],
)
def test_a_malformed_entry_is_named(write, change, message):
    rows = edge_cases()
    rows[2]["conversation_history"][1] |= change
    with pytest.raises(ValueError, match=rf"conversations\.jsonl, row 3, column `conversation_history`: {message}"):
        convert(write(rows))


@pytest.mark.parametrize(
    ("survey", "message"),
    [
        ([person("user0"), person("user0")], "row 2, column `user_id`: an earlier row has the same id"),
        ([person("user0", religion=17)], "row 1, column `religion.simplified`: expected text, got int"),
        ([person("user0") | {"location": {}}], "row 1, column `location.reside_country`: there is no such column"),
    ],
)
def test_a_malformed_survey_is_named_without_its_content(write, survey, message):
    with pytest.raises(ValueError, match=rf"survey\.jsonl, {message}"):
        convert(write(survey=survey))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversation_id": "c0"}, r"conversations\.jsonl, row 2, column `conversation_id`: an earlier row"),
        ({"conversation_history": None}, "row 2, column `conversation_history`: expected a list, got NoneType"),
        ({"conversation_history": ["x"]}, "entry 0 is no object but str"),
        ({"user_id": None}, "row 2, column `user_id`: is missing"),
    ],
)
def test_a_malformed_conversation_is_named(write, change, message):
    rows = edge_cases()
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        convert(write(rows))


def test_a_malformed_interaction_id_is_named(write):
    source = write()
    write_lines(source / "metadata.jsonl", [*metadata(), metadata()[0] | {"interaction_id": "ut7"}])
    with pytest.raises(ValueError, match=r"metadata\.jsonl, row 6, column `interaction_id`"):
        convert(source)


def test_splits_share_nothing(write):
    # six words that no other prompt has
    prompts = [" ".join(f"{number:02}word{place}" for place in range(6)) for number in range(30)]
    rows = [
        conversation(
            number,
            f"user{number % 15}",
            asked(0, prompts[number * 7 % 30]),
            answers(0, ("a", 9, True), ("b", 8, False)),
            asked(1, "And?"),
            answers(1, ("c", 9, True), ("d", 8, False)),
        )
        for number in range(120)
    ]
    source = write(rows, survey=[person(f"user{number}") for number in range(15)])
    made = convert_prism(source, task="dpo", splits=SplitOptions(test=0.3, validation=0.2), min_count=1)
    splits = made.datasets()
    assert_disjoint(splits)
    assert list(splits) == ["train", "validation", "test"]
    assert sum(map(len, splits.values())) == made.report.kept("pairs") == 2 * made.report.kept("conversations")


def test_golden(write):
    """`CUMA_UPDATE_GOLDEN=1 pytest` writes the file anew: read the difference before you keep it."""
    source = write()
    made = {}
    for task, prompts in {
        "sft": PromptFormat(demographics="system", template="paper"),
        "dpo": PromptFormat(demographics="user"),
    }.items():
        splits = SplitOptions(split_by=("prompt",), test=0.3)
        conversion = convert_prism(source, task=task, prompts=prompts, splits=splits, min_count=2, keep_unknown=True)
        made[task] = {name: data.to_list() for name, data in conversion.datasets().items()}
        made[task]["report"] = conversion.report.to_dict()
    check_golden("prism", made)


def test_the_shared_synthetic_rows(tmp_path):
    if not FIXTURES.is_dir():
        pytest.skip("needs the synthetic rows (CUMA_DATA)")
    for name in ("survey", "conversations"):
        shutil.copyfile(FIXTURES / f"prism_{name}.jsonl", tmp_path / f"{name}.jsonl")
    # c0: both turns, 3 + 1 pairs. c1: a tie and twice the same text: both turns, no pair. c2: an empty candidate, then
    # no choice: one turn, no pair.
    rows, _ = convert(tmp_path)
    assert [(row["conversation_id"], row["turn"]) for row in rows] == [
        ("c0", 0),
        ("c0", 1),
        ("c1", 0),
        ("c1", 1),
        ("c2", 0),
    ]
    assert [row["conversation_id"] for row in convert(tmp_path, task="dpo")[0]] == ["c0"] * 4
