# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Community Alignment's layout, written by hand with every edge case."""

import json
import os
import random
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from trl_cuma.data.community_alignment import convert_community_alignment
from trl_cuma.data.leakage import assert_disjoint
from trl_cuma.data.prompts import PromptFormat
from trl_cuma.data.splits import SplitOptions

from .golden_files import check_golden

DATA = Path(os.environ.get("CUMA_DATA", Path(__file__).parents[3] / "shared" / "data"))
ALL_TRAIN = SplitOptions(split_by=("prompt",), test=0.0)
ORDINALS = ("first", "second", "third", "fourth")
COLUMNS = ("prompt", "response_a", "response_b", "response_c", "response_d", "preferred_response", "feedback")

ANN = {
    "annotator_id": "ann",
    "annotator_age": "18-34",
    "annotator_gender": "female",
    "annotator_education_level": "Some post-secondary",
    "annotator_political": "I don't think of myself in this way",
    "annotator_ethnicity": None,
    "annotator_country": "india",
}
BEN = ANN | {
    "annotator_id": "ben",
    "annotator_age": "55+",
    "annotator_political": "Prefer not to say",
    "annotator_ethnicity": "Asian",
}
EVE = dict.fromkeys(ANN) | {"annotator_id": "eve"}  # nothing is known


def conversation(number, person, *turns, language="en", **columns):
    """A row. A turn is `None`, or its prompt, its four responses and the letter of the preferred one."""
    row = {"conversation_id": number, "assigned_lang": language} | person
    row |= {"is_pregenerated_first_prompt": True, "in_balanced_subset": True, "in_balanced_subset_10": False}
    for ordinal, turn in zip(ORDINALS, [*turns, None, None, None, None], strict=False):
        cells = [None] * 7
        if turn is not None:
            prompt, responses, letter = turn
            cells = [prompt, *responses, letter and f"response_{letter}", "FEEDBACK"]
        row |= {f"{ordinal}_turn_{column}": cell for column, cell in zip(COLUMNS, cells, strict=True)}
    return row | columns


def edge_cases():
    return [
        conversation(1, ANN, ("Hello?", ["a1", "b1<|end_of_text|>", "c1", "d1"], "b"), ("More?", list("efgh"), "d")),
        conversation(2, BEN, ("Same twice?", ["Yes", "Yes", "No", "No"], "b")),
        conversation(3, EVE, ("Gap?", ["a3", "EMPTY STRING", "", "d3"], "a"), None, ("After?", list("ijkl"), "a")),
        conversation(
            4, ANN, ("No preference then?", list("mnop"), "c"), ("x", list("qrst"), None), ("y", list("q" * 4), "a")
        ),
        conversation(5, BEN, ("Unknown preference?", list("abcd"), "e")),
        conversation(6, BEN, ("Preferred nothing?", ["a6", None, "c6", "d6"], "b")),
        conversation(7, EVE, (None, list("abcd"), "a")),
        conversation(8, BEN, ("HELLO", list("uvwx"), "a"), language="pt"),  # near-duplicate of conversation 1
    ]


@pytest.fixture
def write(tmp_path):
    def make(rows, name="ca.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


def convert(source, **options):
    options = {"splits": ALL_TRAIN, "min_count": 1, "keep_unknown": True} | options
    made = convert_community_alignment(source, **options)
    return made.datasets()["train"].to_list(), made.report


def test_sft_rows_are_the_usable_turns(write):
    rows, report = convert(write(edge_cases()))
    assert [(row["conversation_id"], row["turn"], row["completion"][0]["content"]) for row in rows] == [
        ("1", 0, "b1"),  # the mark of the text's end is cut off
        ("1", 1, "h"),
        ("2", 0, "Yes"),
        ("3", 0, "a3"),
        ("4", 0, "o"),
        ("8", 0, "u"),
    ]
    assert [message["content"] for message in rows[1]["prompt"]] == ["Hello?", "b1", "More?"]
    # Conversations: 8 rows; 7 has no opening prompt, 5 and 6 no usable turn.
    assert report.units["conversations"] == 8 and report.kept("conversations") == 5
    assert dict(report.drops["conversations"]) == {"no opening prompt": 1, "no turn can be used": 2}
    # Turns: 2 + 1 + 2 + 3 + 1 + 1 + 1 of the seven conversations that are left.
    assert report.units["turns"] == 11 and report.kept("turns") == 6 == report.rows["train"]
    assert dict(report.drops["turns"]) == {
        "after a turn that is missing or can't be used": 2,  # of 3 and of 4
        "no preferred response": 1,
        "an unknown preferred response": 1,
        "the preferred response has no text": 1,
    }
    assert report.notes["candidates without text, left out"] == 3  # two of 3, one of 6


def test_turns_of_empty_texts_are_not_there(write):
    padded = conversation(1, ANN, ("Hello?", list("abcd"), "a"))
    padded |= {column: "EMPTY STRING" for column in padded if column.startswith(("second_", "third_", "fourth_"))}
    half = conversation(2, ANN, ("Hello there, you?", list("abcd"), "a"), ("EMPTY STRING", list("efgh"), "a"))
    blank = conversation(3, ANN, ("And who else?", list("abcd"), "a"), ("Hm.<|end_of_text|>", list("efgh"), "a"))
    blank |= {"second_turn_preferred_response": "EMPTY STRING"}
    rows, report = convert(write([padded, half, blank]))
    assert len(rows) == 3
    assert report.units["turns"] == 5 and report.drops["turns"] == {"no prompt": 1, "no preferred response": 1}
    assert report.notes["candidates without text, left out"] == 0
    blank |= {"second_turn_preferred_response": "response_a<|end_of_text|>"}
    rows, _ = convert(write([blank]))
    assert [message["content"] for message in rows[1]["prompt"]] == ["And who else?", "a", "Hm."]


def test_people_of_whom_nothing_is_known_are_left_out(write):
    """Eve: conversation 3 (her other one has no opening prompt). Training would stop at her."""
    everyone, _ = convert(write(edge_cases()))
    rows, report = convert(write(edge_cases()), keep_unknown=False)
    assert {row["conversation_id"] for row in everyone} - {row["conversation_id"] for row in rows} == {"3"}
    assert report.drops["people"]["nothing is known of them"] == 1
    assert report.drops["conversations"]["nothing is known of the person"] == 1
    assert report.kept("turns") == sum(report.rows.values()) == len(rows)


def test_pairs(write):
    rows, report = convert(write(edge_cases()), task="dpo")
    of_two = [row for row in rows if row["conversation_id"] == "2"]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in of_two] == [("Yes", "No")]
    assert [row["rejected"][0]["content"] for row in rows if row["conversation_id"] == "3"] == ["d3"]
    # 3 each of the turns of 1 (two), 2, 4 and 8, and 1 of 3; without the equal texts of 2
    assert report.units["pairs"] == 16 and report.kept("pairs") == 14 == len(rows)
    assert dict(report.drops["pairs"]) == {
        "the rejected text is the chosen one": 1,
        "the rejected text comes twice in the turn": 1,
    }


def test_choice(write):
    rows, report = convert(write(edge_cases()), task="choice")
    assert [(row["conversation_id"], row["turn"]) for row in rows] == [("1", 0), ("1", 1), ("4", 0), ("8", 0)]
    assert report.drops["turns"]["not 4 different candidates to choose from"] == 2  # 2 and 3
    for row, text in zip(rows, ["b1", "h", "o", "u"], strict=True):
        assert f"{row['completion'][0]['content']}. {text}\n" in row["prompt"][-1]["content"]


def test_profiles(write):
    rows, report = convert(write(edge_cases()))
    profiles = {row["person_id"]: row["demographic"] for row in rows}
    assert profiles["ann"] == {
        "age": "18-34",
        "gender": "female",
        "country": "india",
        "political": "I don't think of myself in this way",  # an answer
        "ethnicity": None,
        "education": "Some post-secondary",
    }
    assert list(profiles["ann"]) == ["age", "gender", "country", "political", "ethnicity", "education"]
    assert profiles["ben"]["political"] is None  # "Prefer not to say"
    assert set(profiles["eve"].values()) == {None}
    assert report.notes["people of whom nothing is known, kept"] == 1


def test_a_field_that_differs_between_rows_is_unknown(write):
    source = write(
        [
            conversation(1, ANN, ("One?", list("abcd"), "a")),
            conversation(2, ANN | {"annotator_age": "35-45", "annotator_gender": None}, ("Two?", list("abcd"), "a")),
            conversation(3, ANN | {"annotator_gender": "Prefer not to say"}, ("Three?", list("abcd"), "a")),
        ]
    )
    rows, report = convert(source)
    assert [row["demographic"]["age"] for row in rows] == [None] * 3
    assert [row["demographic"]["gender"] for row in rows] == ["female"] * 3  # the only answer
    assert report.notes["people whose rows differ in `age`, which becomes unknown"] == 1


def test_a_field_that_is_written_in_two_ways_is_known(write):
    source = write(
        [
            conversation(number, ANN | {"annotator_gender": gender}, (f"{number} who?", list("abcd"), "a"))
            for number, gender in enumerate(["female", "Female", "FEMALE"])
        ]
    )
    rows, report = convert(source)
    assert [row["demographic"]["gender"] for row in rows] == ["FEMALE"] * 3  # the first in the order of texts
    assert not any("differ" in note for note in report.notes)


def test_values_of_few_people_are_grouped(write):
    rows, _ = convert(write(edge_cases()), min_count=2)
    assert [row["demographic"]["country"] for row in rows if row["person_id"] == "ann"] == ["india"] * 3  # two people
    assert [row["demographic"]["age"] for row in rows if row["person_id"] == "ann"] == ["Other"] * 3  # one each


def test_the_split_of_the_source(write, tmp_path, monkeypatch):
    (tmp_path / "clone").mkdir()
    write(edge_cases(), "clone/full_community_alignment.jsonl")
    write(edge_cases()[:1], "clone/filtered_community_alignment.jsonl")
    assert {row["conversation_id"] for row in convert(tmp_path / "clone", source_split="filtered")[0]} == {"1"}
    assert len(convert(tmp_path / "clone", source_split="full")[0]) == 6
    with pytest.raises(ValueError, match="several files that could be meant: filtered_.*full_"):
        convert(tmp_path / "clone")
    with pytest.raises(ValueError, match="no file of split 'test'"):
        convert(tmp_path / "clone", source_split="test")

    asked, data = [], Dataset.from_list(edge_cases())
    monkeypatch.setattr(
        "trl_cuma.data.reading.load_dataset", lambda *names, **options: asked.append((names, options)) or data
    )
    convert("a/b", config="benchmark", source_split="filtered")
    convert("a/b")
    assert asked == [(("a/b", "benchmark"), {"split": "filtered"}), (("a/b", None), {"split": "train"})]


def test_languages_and_subsets_are_kept_or_counted(write):
    source = write([*edge_cases(), conversation(9, BEN, ("?", list("abcd"), "a"), in_balanced_subset=False)])
    rows, report = convert(source, languages=["pt", "fr"])
    assert [(row["conversation_id"], row["language"]) for row in rows] == [("8", "pt")]
    assert report.drops["conversations"]["of another language, or of none"] == 7  # and one has no prompt
    assert report.drops["people"] == {"none of their conversations gave a row": 2}
    _, report = convert(source, subset="in_balanced_subset")
    assert report.drops["conversations"]["not in the subset `in_balanced_subset`"] == 1
    with pytest.raises(ValueError, match="No conversation is left"):
        convert(source, subset="in_balanced_subset_10")
    with pytest.raises(ValueError, match="`subset` is 'all'"):
        convert_community_alignment(source, subset="all")


def test_neither_feedback_nor_other_columns_are_written(write, tmp_path):
    rows = [row | {"first_turn_responses": "FEEDBACK", "wave": "FEEDBACK"} for row in edge_cases()]
    convert_community_alignment(write(rows), splits=ALL_TRAIN, min_count=1, keep_unknown=True).save(tmp_path / "out")
    made = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(made) == 6
    assert made.column_names == [
        *("prompt", "completion", "demographic", "person_id"),
        *("conversation_id", "turn", "prompt_group", "language"),
    ]
    assert "FEEDBACK" not in json.dumps(made.to_list())


def test_every_form_of_the_file_reads_the_same(write, tmp_path, monkeypatch):
    expected, _ = convert(write(edge_cases()), task="dpo")
    data = Dataset.from_list(edge_cases())
    data.to_parquet(tmp_path / "ca.parquet")
    data.to_csv(tmp_path / "ca.csv")  # where every cell is text
    monkeypatch.setattr("trl_cuma.data.reading.load_dataset", lambda *names, **options: data)
    for source in (tmp_path / "ca.parquet", tmp_path / "ca.csv", data, "facebook/community-alignment-dataset"):
        assert convert(source, task="dpo")[0] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second_turn_response_c": 3}, "row 2, column `second_turn_response_c`: expected text, got int"),
        ({"first_turn_preferred_response": ["a"]}, "row 2, column `first_turn_preferred_response`: expected text"),
        ({"annotator_political": 17}, "row 2, column `annotator_political`: expected text, got int"),
        ({"annotator_id": None}, "row 2, column `annotator_id`: is missing"),
        ({"conversation_id": 1}, "row 2, column `conversation_id`: an earlier row has the same id"),
        ("annotator_age", "row 2, column `annotator_age`: there is no such column"),
    ],
)
def test_a_malformed_row_is_named_without_its_content(write, tmp_path, change, message):
    rows = edge_cases()
    if isinstance(change, str):
        del rows[1][change]
    else:
        rows[1] |= change
    with pytest.raises(ValueError, match=message) as error:
        convert_community_alignment(write(rows), splits=ALL_TRAIN, keep_unknown=True).save(tmp_path / "out")
    assert "17" not in str(error.value).partition("row 2")[2]
    assert not (tmp_path / "out").exists()


def many():
    """24 people who each answered 12 of 36 prompts: the same prompt and responses go to many people."""
    people = [ANN | {"annotator_id": f"ann{number}"} for number in range(24)]
    # twelve words that no other prompt has
    prompts = [" ".join(f"{number:02}word{place}" for place in range(12)) for number in range(36)]
    return [
        conversation(
            f"{number}-{place}",
            person,
            (
                prompts[(number * 5 + place) % 36],
                [f"{letter} of {(number * 5 + place) % 36}" for letter in "abcd"],
                "a",
            ),
            ("And?", list("abcd"), "b"),
        )
        for number, person in enumerate(people)
        for place in range(12)
    ]


def test_splits_share_nothing_and_do_not_depend_on_the_order_of_rows(write):
    rows = many()
    made = convert_community_alignment(write(rows), task="choice", splits=SplitOptions(test=0.25), min_count=1)
    splits = made.datasets()
    assert_disjoint(splits)
    assert len(splits["train"]) + len(splits["test"]) == made.report.kept("turns")
    assert made.report.kept("turns") == 2 * made.report.kept("conversations") < 2 * 24 * 12
    random.Random(0).shuffle(rows)
    again = convert_community_alignment(
        write(rows), task="choice", splits=SplitOptions(test=0.25), min_count=1
    ).datasets()
    for name, data in splits.items():
        by_id = {(row["conversation_id"], row["turn"]): row for row in data}
        assert {(row["conversation_id"], row["turn"]): row for row in again[name]} == by_id


def test_golden(write):
    """`CUMA_UPDATE_GOLDEN=1 pytest` writes the file anew: read the difference before you keep it."""
    source = write(edge_cases())
    made = {}
    for task, prompts in {
        "sft": PromptFormat(demographics="user"),
        "sft messages": PromptFormat(demographics="system", messages=True),
        "dpo": PromptFormat(),
        "choice": PromptFormat(demographics="system", template="paper"),
    }.items():
        splits = SplitOptions(split_by=("prompt",), test=0.3)
        conversion = convert_community_alignment(
            source, task=task.split()[0], prompts=prompts, splits=splits, min_count=2, keep_unknown=True
        )
        made[task] = {name: data.to_list() for name, data in conversion.datasets().items()}
        made[task]["report"] = conversion.report.to_dict()
    check_golden("community_alignment", made)


def test_the_shared_synthetic_rows():
    source = DATA / "fixtures" / "community_alignment.jsonl"
    if not source.is_file():
        pytest.skip("needs the synthetic rows (CUMA_DATA)")
    # Usable turns: both of the first conversation, the only one of the second and third, none of the fourth (no
    # preferred response), the one before the gap of the fifth.
    rows, report = convert(source)
    assert [(row["conversation_id"], row["turn"]) for row in rows] == [
        ("1", 0),
        ("1", 1),
        ("2", 0),
        ("3", 0),
        ("5", 0),
    ]
    # 3 + 3 pairs, 2 (a duplicate of the chosen one), 1 (two candidates without text), 3
    assert len(convert(source, task="dpo")[0]) == 12
    assert len(convert(source, task="choice")[0]) == 3
