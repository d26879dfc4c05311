# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from trl_cuma.data import Survey, load_global_opinions, to_sft_dataset

DATA = Path(os.environ.get("CUMA_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL_FILE = DATA / "goqa" / "goqa_ordinal.jsonl"


def make_rows() -> list[dict]:
    """24 questions x 10 countries. On the first 8 questions the countries differ most, on the last 8 not at all."""
    rows = []
    for question in range(24):
        for country in range(10):
            tilt = (0.4, 0.2, 0.0)[question // 8] * (1 if country % 2 else -1)
            rows.append(
                {
                    "qid": f"g{question:02d}",
                    "question": f"How  good is thing {question}?\n",
                    "country": f"Land {country}",
                    "options": ["Good", "Fair", "Bad"],
                    "dist": [0.4 + tilt, 0.2, 0.4 - tilt],
                    "sources": ["made"],
                }
            )
    return rows


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def rows() -> list[dict]:
    return make_rows()


def cell_keys(survey: Survey, split: str) -> set[tuple[int, int]]:
    part = survey.cells[split] if split != "train" else survey.answers["train"]
    return set(zip(part.question.tolist(), part.profile.tolist(), strict=True))


def test_cells_are_split_and_every_country_and_question_keeps_three(tmp_path, rows):
    survey = load_global_opinions(write(tmp_path / "rows.jsonl", rows), answers_per_cell=30)
    keys = {split: cell_keys(survey, split) for split in ("train", "validation", "held_out_cells")}
    assert [len(keys[split]) for split in keys] == [168, 24, 48]  # 70 / 10 / 20 % of 240
    assert len(set.union(*keys.values())) == 240
    assert min(Counter(question for question, _ in keys["train"]).values()) >= 3
    assert min(Counter(profile for _, profile in keys["train"]).values()) >= 3
    assert survey.fields == ("country",)
    assert survey.questions[0].text == "How good is thing 0?"


def test_truth_is_the_rows_distribution_and_answers_follow_it(tmp_path, rows):
    survey = load_global_opinions(write(tmp_path / "rows.jsonl", rows), answers_per_cell=4000)
    cells, answers = survey.cells["held_out_cells"], survey.answers["held_out_cells"]
    dists = {(row["qid"], row["country"]): row["dist"] for row in rows}
    for question, profile, truth in zip(cells.question, cells.profile, cells.truth, strict=True):
        key = (survey.questions[question].question_id, survey.profiles[profile]["country"])
        np.testing.assert_allclose(truth, dists[key])
        chosen = answers.choice[(answers.question == question) & (answers.profile == profile)]
        assert len(chosen) == 4000
        np.testing.assert_allclose(np.bincount(chosen, minlength=3) / 4000, truth, atol=0.04)  # 5 standard errors


def test_each_answer_has_a_person_of_its_own(tmp_path, rows):
    survey = load_global_opinions(write(tmp_path / "rows.jsonl", rows), answers_per_cell=5)
    people = np.concatenate([answers.person for answers in survey.answers.values()])
    assert len(people) == len(np.unique(people)) == 240 * 5
    dataset = to_sft_dataset(survey, "train", prompt_profile=True)
    assert dataset[0]["prompt"].startswith(f"country {dataset[0]['demographic']['country']} . How good is thing")


def test_the_seed_decides_split_and_answers(tmp_path, rows):
    path = write(tmp_path / "rows.jsonl", rows)
    first, again, other = (load_global_opinions(path, seed=seed, answers_per_cell=20) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.answers["train"].choice, again.answers["train"].choice)
    assert cell_keys(first, "held_out_cells") == cell_keys(again, "held_out_cells")
    assert cell_keys(first, "held_out_cells") != cell_keys(other, "held_out_cells")


def test_max_questions_keeps_the_most_divided_by_training_cells_only(tmp_path, rows):
    path = write(tmp_path / "rows.jsonl", rows)
    survey = load_global_opinions(path, max_questions=8, answers_per_cell=5)
    assert [question.question_id for question in survey.questions] == [f"g{index:02d}" for index in range(8)]

    # The held-out cells of an undivided question made extreme. Over all cells its mutual information would be 0.18 or
    # more (2 of 10 countries at the poles), above the 0.11 of the moderately divided questions g08 to g15.
    full = load_global_opinions(path, max_questions=None, answers_per_cell=5)
    cells = full.cells["held_out_cells"]
    held_out = sorted(full.profiles[profile]["country"] for profile in cells.profile[cells.question == 23])
    assert len(held_out) >= 2
    for row in rows:
        if row["qid"] == "g23" and row["country"] in held_out:
            row["dist"] = [1.0, 0.0, 0.0] if held_out.index(row["country"]) % 2 else [0.0, 0.0, 1.0]
    survey = load_global_opinions(write(path, rows), max_questions=9, answers_per_cell=5)
    assert "g08" <= survey.questions[8].question_id <= "g15"


def test_questions_of_few_countries_are_left_out(tmp_path, rows):
    rows = [row for row in rows if row["qid"] != "g00" or row["country"] < "Land 5"]
    survey = load_global_opinions(write(tmp_path / "rows.jsonl", rows), answers_per_cell=5)
    assert "g00" not in {question.question_id for question in survey.questions}
    with pytest.raises(ValueError, match="Lower `min_countries`"):
        load_global_opinions(tmp_path / "rows.jsonl", min_countries=11)


def test_two_names_of_one_country_are_one_profile(tmp_path, rows):
    for row in rows:
        if row["country"] == "Land 0":
            row["country"] = "S. Korea" if row["qid"] < "g12" else "South Korea"
    survey = load_global_opinions(write(tmp_path / "rows.jsonl", rows), answers_per_cell=5)
    assert len(survey.profiles) == 10
    assert {"country": "South Korea"} in survey.profiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: "{not json", "line 3: not a JSON object"),
        (lambda row: "[1, 2]", "line 3: not a JSON object but a list"),
        (lambda row: row | {"country": "\ud800"}, "line 3: has half of a surrogate pair"),
        (lambda row: {key: row[key] for key in row if key != "dist"}, "line 3: field `dist` is missing"),
        (lambda row: row | {"country": ""}, "line 3: field `country` must be a text"),
        (lambda row: row | {"country": 7}, "line 3: field `country` must be a text"),
        (lambda row: row | {"options": "Good"}, "line 3: field `options` must be a list of texts"),
        (
            lambda row: row | {"options": ["Good"], "dist": [1.0]},
            "line 3: field `options` must hold 2 to 11 texts, got 1",
        ),
        (lambda row: row | {"dist": ["0.5", 0.2, 0.3]}, "line 3: field `dist` must be a list of numbers"),
        (lambda row: row | {"dist": [0.5, 0.5]}, "line 3: field `dist` holds 2 numbers for 3 `options`"),
        (lambda row: row | {"dist": [1.2, -0.2, 0.0]}, "line 3: field `dist` must not be negative, got -0.2"),
        (lambda row: row | {"dist": [float("nan"), 0.5, 0.5]}, "line 3: field `dist` must not be negative"),
        (lambda row: row | {"dist": [0.5, 0.2, 0.2]}, "line 3: field `dist` must sum to 1 .* got 0.9000"),
        (lambda row: row | {"country": "Land 0"}, "line 3: fields `qid` and `country` repeat those of line 1"),
        (
            lambda row: row | {"options": ["Bad", "Fair", "Good"]},
            "line 3: field `options` differs from that of line 1",
        ),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path, rows, change, message):
    rows[2] = change(rows[2])
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        load_global_opinions(path)
    assert "rows.jsonl, line 3" in str(error.value)
    assert "Land" not in str(error.value)  # no one's country in an error


@pytest.mark.parametrize("shares", [(0.0, 0.1), (0.2, 0.0), (0.6, 0.4)])
def test_shares_are_checked(tmp_path, rows, shares):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="`holdout` and `validation`"):
        load_global_opinions(path, holdout=shares[0], validation=shares[1])


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="the file holds no rows"):
        load_global_opinions(write(tmp_path / "rows.jsonl", []))


@pytest.mark.skipif(not REAL_FILE.exists(), reason=f"GlobalOpinionQA rows not found at {REAL_FILE}; set CUMA_DATA")
def test_the_published_rows_load():
    survey = load_global_opinions(REAL_FILE, answers_per_cell=50)
    assert len(survey.questions) == 100
    train = np.unique(np.stack([survey.answers["train"].question, survey.answers["train"].profile], 1), axis=0)
    for split in ("validation", "held_out_cells"):
        cells = survey.cells[split]
        assert not cell_keys(survey, split) & set(map(tuple, train.tolist()))
        assert np.bincount(train[:, 1], minlength=len(survey.profiles))[cells.profile].min() >= 3
        assert np.bincount(train[:, 0], minlength=100)[cells.question].min() >= 3
