# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""WorldValuesBench's layout, written by hand with every edge case; and its real metadata, where it is at hand."""

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trl_cuma.data.leakage import assert_disjoint
from trl_cuma.data.prompts import PromptFormat
from trl_cuma.data.splits import SplitOptions
from trl_cuma.data.worldvaluesbench import convert_worldvaluesbench
from trl_cuma.data.worldvaluesbench_files import FIELDS, read_questions
from trl_cuma.testing_surveys import write_worldvaluesbench

from .golden_files import check_golden

REAL = Path(os.environ.get("CUMA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "wvb"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real metadata (CUMA_DATA)")

NEGATIVES = {"-1": "Don't know", "-2": "No answer"}


def scale(low, high, first, last, question):
    text = f"On a scale of {low} to {high}, {low} meaning '{first}' and {high} meaning '{last}', {question}"
    return {"question": text, "use_case": "value", "answer_scale_min": low, "answer_scale_max": high}


def codes(short, *labels, low=1):
    choices = {str(low + place): label for place, label in enumerate(labels)}
    return {"question": short, "choices": choices | NEGATIVES}


# One question of each kind of adjustment, with the raw codes of the real one of that kind, shortened.
METADATA = {
    "Q1": scale(1, 2, "Yes", "No", "do you like salt?"),
    "Q2": scale(1, 3, "Better", "Worse", "how do you fare next to your parents?"),
    "Q3": scale(1, 5, "Agree!", "Disagree!", 'do you agree: "rivers are deep"?'),
    "Q4": scale(1, 3, "Not essential", "Essential", "how essential are elections?"),
    "Q5": scale(0, 2, "Never", "Daily", "how often do you whistle?"),
    "B_COUNTRY": {"question": "Where?", "use_case": "demographic", "answer_scale_min": "", "answer_scale_max": ""},
}
CODEBOOK = {
    "Q1": codes("Salt", "Important", "Not mentioned", "Not allowed"),  # 3 → taken out
    "Q2": codes("Parents", "Better off", "Worse off", "About the same"),  # 2 and 3 change places
    "Q3": codes("Rivers", "Hard to say", "Strongly agree", "Agree", "Disagree", "Strongly disagree", low=0),
    "Q4": codes("Elections", "Against it (spontaneous)", "Inessential", "2", "Essential", low=0),  # 0 → 1
    "Q5": codes("Whistling", "Never", "At times", "Daily", low=0),
}
ADJUSTMENT = {
    "Q1": {"3": ""},
    "Q2": {"2": "3", "3": "2"},
    "Q3": {"0": "3", "3": "4", "4": "5"},
    "Q4": {"0": "1"},
}
HEADER = ["D_INTERVIEW", *FIELDS.values(), "S_INTLANGUAGE"]
ANN = [
    "101",
    "Ruritania",
    "16-24 years",
    "Female",
    "Primary",
    "Single",
    "Solarist",
    "RU: Hill",
    "Full time",
    "English",
]
BO = ["102", "Ruritania", "No answer", "Male", "nan", "", "Don't know", "643999", "Missing; Not available", "Spanish"]
CY = ["103", "Elbonia", "65 and over", "Male", "Primary", "Single", "Solarist", "EL: Dale", "Retired", "English"]
DI = ["104", "Elbonia", "65 and over", "Female", "Primary", "Single", "Solarist", "EL: Dale", "Retired", "French"]
ANSWERS = {
    "101": ["1", "2", "3", "1", "0"],
    "102": ["2.0", "", "nan", "3", "-2"],  # as pandas writes a column with gaps, and a negative code
    "103": ["1", "3", "5", "2", "2"],
    "104": ["2", "1", "4", "1", "1"],
}


def tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows))


def write(folder, people, answers=None, metadata=METADATA, adjustment=ADJUSTMENT):
    """The benchmark's two folders; `people`: rows by split."""
    for name, rows in people.items():
        data = folder / "WorldValuesBench" / name
        tsv(data / f"{name}_demographic_qa.tsv", [HEADER, *rows])
        table = [[row[0], *(answers or ANSWERS)[row[0]]] for row in rows if row[0] in (answers or ANSWERS)]
        questions = [question for question in metadata if question.startswith("Q")]
        tsv(data / f"{name}_value_qa.tsv", [["D_INTERVIEW", *questions], *table])
    made = folder / "dataset_construction"
    made.mkdir(exist_ok=True)
    for name, content in (
        ("question_metadata", metadata),
        ("codebook", CODEBOOK),
        ("answer_adjustment", adjustment),
    ):
        (made / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "wvb", {"train": [ANN, BO], "valid": [DI], "test": [CY]})


BY_PERSON = SplitOptions(split_by=("person",))


def convert(folder, **options):
    return convert_worldvaluesbench(folder, **({"splits": BY_PERSON, "min_count": 1} | options))


def answers_of(dataset):
    """(person, question) → the text of the option whose letter is the answer."""
    found = {}
    for row in dataset:
        options = dict(re.findall(r"^([A-K])\. (.*)$", row["prompt"][-1]["content"], re.MULTILINE))
        assert len(options) == row["num_options"]
        found[row["person_id"], row["question_id"]] = options[row["completion"][0]["content"]]
    return found


def test_an_answer_is_the_text_that_it_means(folder):
    """By hand: the answers of the files above on the adjusted scales."""
    made = convert(folder).datasets()
    assert answers_of(made["train"]) == {
        ("101", "Q1"): "Yes",
        ("101", "Q2"): "About the same",  # raw 3, adjusted 2
        ("101", "Q3"): "Hard to say",  # raw 0, adjusted 3
        ("101", "Q4"): "Not essential",  # raw 0 or 1, adjusted 1
        ("101", "Q5"): "Never",
        ("102", "Q1"): "No",
        ("102", "Q4"): "Essential",
    }
    assert answers_of(made["test"]) == {
        ("103", "Q1"): "Yes",
        ("103", "Q2"): "Worse",  # raw 2, adjusted 3, in the question's own word
        ("103", "Q3"): "Disagree!",
        ("103", "Q4"): "2",
        ("103", "Q5"): "Daily",
    }


def test_the_codebooks_own_words_are_adjusted_too(folder):
    made = convert(folder, prompts=PromptFormat(template="paper")).datasets()["train"]
    texts = {row["question_id"]: row["prompt"][-1]["content"] for row in made}
    end = " You can only choose one option."
    assert texts["Q2"] == f"Parents? A. Better off B. About the same C. Worse off.{end}"
    assert texts["Q3"] == (f"Rivers? A. Strongly agree B. Agree C. Hard to say D. Disagree E. Strongly disagree.{end}")
    assert texts["Q4"] == f"Elections? A. Inessential B. 2 C. Essential.{end}"
    assert texts["Q1"] == f"Salt? A. Important B. Not mentioned.{end}"


def test_profiles_and_languages(folder):
    made = convert(folder).datasets()["train"]
    by_person = {row["person_id"]: row for row in made}
    assert by_person["101"]["demographic"] == dict(zip(FIELDS, ANN[1:-1], strict=True))
    # "No answer", "nan", "", "Don't know", a code that the codebook doesn't name, "Missing; …": all unknown.
    unknown = dict.fromkeys(FIELDS) | {"country": "Ruritania", "gender": "Male"}
    assert by_person["102"]["demographic"] == unknown
    assert by_person["101"]["language"] == "English" and by_person["102"]["language"] == "Spanish"


def test_every_answer_is_counted_once(folder):
    conversion = convert(folder)
    made = conversion.datasets()
    report = conversion.report.to_dict()
    assert report["units"]["people"] == {"read": 3, "kept": 3, "dropped": {}}
    assert report["units"]["answers"] == {"read": 15, "kept": 12, "dropped": {"blank": 3}}
    assert report["rows"] == {"train": 7, "test": 5} == {name: len(made[name]) for name in made}
    assert report["notes"] == {"codes without a label, taken as unknown": 1}
    assert not any(word in str(conversion.report) for word in ("Ruritania", "Hill", "Solarist", "101"))


def test_an_unknown_language_is_no_unknown_person(tmp_path):
    folder = write(tmp_path / "wvb", {"train": [[*ANN[:-1], "No answer"], BO], "test": [CY]})
    conversion = convert(folder)
    by_person = {row["person_id"]: row["language"] for row in conversion.datasets()["train"]}
    assert by_person == {"101": None, "102": "Spanish"}
    assert conversion.report.notes == {"codes without a label, taken as unknown": 1}


def test_validation_people_are_used_where_validation_is_asked_for(folder):
    made = convert(folder, splits=SplitOptions(split_by=("person",), validation=0.1)).datasets()
    assert list(made) == ["train", "validation", "test"]
    assert set(made["validation"]["person_id"]) == {"104"}


def test_people_split_anew(folder):
    made = convert(folder, people_split="random", splits=SplitOptions(split_by=("person",), test=0.5)).datasets()
    assert len(set(made["train"]["person_id"])) == len(set(made["test"]["person_id"])) == 2
    assert_disjoint(made, ("person",))


def test_dpo_rejects_another_option(folder):
    sft = answers_of(convert(folder).datasets()["train"])
    rejected = Counter()
    for seed in range(24):
        splits = SplitOptions(split_by=("person",), seed=seed)
        made = convert(folder, task="dpo", splits=splits).datasets()["train"]
        chosen = made.map(lambda row: {"completion": row["chosen"]})
        assert answers_of(chosen) == sft
        for row in made:
            assert row["rejected"][0]["content"] in "ABCDE"[: row["num_options"]]
            assert row["rejected"][0]["content"] != row["chosen"][0]["content"]
            if row["person_id"] == "101" and row["question_id"] == "Q3":
                rejected[row["rejected"][0]["content"]] += 1
    # Four others, each with probability 1/4: of 24 draws, 2 or more of each with probability 0.96 (24 fixed seeds).
    assert set(rejected) == set("ABDE") and min(rejected.values()) >= 2


def test_messages(folder):
    made = convert(folder, prompts=PromptFormat(demographics="system", messages=True)).datasets()["train"]
    assert "prompt" not in made.column_names
    assert [message["role"] for message in made[0]["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize("where", ["none", "system", "user"])
def test_where_the_profile_is(folder, where):
    for row in convert(folder, prompts=PromptFormat(demographics=where)).datasets()["train"]:
        text = {message["role"]: message["content"] for message in row["prompt"]}
        assert ("Ruritania" in text.get("system", "")) == (where == "system")
        assert ("Ruritania" in text["user"]) == (where == "user")


def test_weights(folder, tmp_path):
    (tmp_path / "wvs.csv").write_text("version,D_INTERVIEW,W_WEIGHT\nv5,101,0.5\nv5,103,1.25\nv5,999,3\n")
    made = convert(folder, weights=tmp_path / "wvs.csv").datasets()
    assert dict(zip(made["train"]["person_id"], made["train"]["weight"], strict=True)) == {"101": 0.5, "102": None}
    assert set(made["test"]["weight"]) == {1.25}
    (tmp_path / "wvs.csv").write_text("D_INTERVIEW;W_WEIGHT\n101;0.5\n103;heavy\n")
    with pytest.raises(ValueError, match=r"wvs.csv, line 3, column W_WEIGHT: not a positive number"):
        convert(folder, weights=tmp_path / "wvs.csv").datasets()
    (tmp_path / "wvs.csv").write_text("D_INTERVIEW,W_WEIGHT\n999,1\n")
    with pytest.raises(ValueError, match="a weight of none of the people"):
        convert(folder, weights=tmp_path / "wvs.csv").datasets()


def test_questions_and_languages(folder):
    conversion = convert(folder, questions=["Q5", "Q1"], languages=["English"])
    made = conversion.datasets()
    assert set(made["train"]["question_id"]) == {"Q1", "Q5"}
    assert set(made["train"]["person_id"]) == {"101"}
    assert conversion.report.drops["people"] == {"interview in another language": 1}
    with pytest.raises(ValueError, match=r"\['Q6'\], which are no value questions"):
        convert(folder, questions=["Q1", "Q6"])
    with pytest.raises(ValueError, match=r"\['Klingon'\], in which no interview was held"):
        convert(folder, languages=["Klingon"]).datasets()


def test_what_is_chosen_changes_no_ones_split(tmp_path):
    splits = SplitOptions(test=0.3, holdout_combinations=("gender", "age"))
    everything = simulated(tmp_path, people_split="random", splits=splits).datasets()
    languages = sorted(set(everything["train"]["language"]) - {None, "Other"})[:2]
    questions = (
        sorted(set(everything["train"]["question_id"]))[:4] + sorted(set(everything["test"]["question_id"]))[:2]
    )
    some = convert_worldvaluesbench(
        tmp_path / "wvb",
        people_split="random",
        splits=replace(splits, holdout_combinations=None),
        languages=languages,
        questions=questions,
    ).datasets()
    for column in ("person_id", "question_id"):
        for here, there in (("train", "test"), ("test", "train")):
            assert not set(some[here][column]) & set(everything[there][column])


def test_questions_that_share_their_text_are_worded_by_the_codebook(tmp_path):
    metadata = METADATA | {"Q2": METADATA["Q2"] | {"question": METADATA["Q4"]["question"]}}
    folder = write(tmp_path / "wvb", {"train": [ANN], "test": [CY]}, metadata=metadata)
    texts = {name: asked.question.text for name, asked in read_questions(folder).items()}
    assert (texts["Q2"], texts["Q4"], texts["Q5"]) == ("Parents", "Elections", "How often do you whistle?")


def test_people_with_nothing_but_blanks_and_rows_without_people_are_counted(tmp_path):
    answers = ANSWERS | {"102": [""] * 5, "104": ["1", "1", "1", "1", "1"]}
    folder = write(tmp_path / "wvb", {"train": [ANN, BO], "test": [CY]}, answers)
    with open(folder / "WorldValuesBench" / "train" / "train_value_qa.tsv", "a") as file:
        file.write("104\t1\t1\t1\t1\t1\n")
    conversion = convert(folder)
    assert set(conversion.datasets()["train"]["person_id"]) == {"101"}
    assert conversion.report.drops["people"] == {"only blank answers": 1}
    assert conversion.report.notes["rows of answers without a person, left out"] == 1


@pytest.mark.parametrize(
    ("file", "name", "entry", "message"),
    [
        ("question_metadata", "Q1", {"use_case": "value", "answer_scale_min": 1, "answer_scale_max": 2}, "no text"),
        ("question_metadata", "Q1", [], "entry Q1 is no JSON object"),
        ("codebook", "Q1", {"question": "Salt", "choices": {"1": None, "2": "No"}}, "'1' must be a whole number"),
        ("codebook", "Q1", {"question": "Salt", "choices": {"a": "Yes"}}, "'a' must be a whole number"),
        ("codebook", "Q1", {"question": "Salt"}, "expected a JSON object"),
        ("answer_adjustment", "Q1", ["3"], "expected a JSON object"),
        ("answer_adjustment", "Q1", {"3": None}, "'3' must be a whole number"),
    ],
)
def test_a_malformed_entry_of_the_metadata_is_named(folder, file, name, entry, message):
    path = folder / "dataset_construction" / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: entry}))
    with pytest.raises(ValueError, match=f"{file}.json.*{message}"):
        convert(folder)


@pytest.mark.parametrize(
    "options",
    [{"min_count": 0}, {"max_train_rows": 0}, {"max_train_rows": 1.5}, {"questions": "Q1"}, {"questions": []},
     {"people_split": "mine"}, {"task": "choice"}],
)  # fmt: skip
def test_options_are_checked_before_anything_is_read(folder, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        convert(folder, **options)


def test_an_id_of_two_people_is_left_out(tmp_path):
    twin = ["101", *DI[1:]]
    folder = write(tmp_path / "wvb", {"train": [ANN, BO, twin], "test": [CY]})
    conversion = convert(folder)
    assert set(conversion.datasets()["train"]["person_id"]) == {"102"}
    assert conversion.report.drops["people"] == {"id shared with another person": 2}


def test_a_person_in_training_and_test_is_left_out(tmp_path):
    folder = write(tmp_path / "wvb", {"train": [ANN, BO], "test": [CY, ANN]})
    made = convert(folder).datasets()
    assert set(made["train"]["person_id"]) == {"102"} and set(made["test"]["person_id"]) == {"103"}


def test_people_without_answers_are_counted(tmp_path):
    folder = write(tmp_path / "wvb", {"train": [ANN, BO], "test": [CY]}, {id: ANSWERS[id] for id in ("101", "103")})
    conversion = convert(folder)
    conversion.datasets()
    assert conversion.report.drops["people"] == {"no row of answers": 1}


def test_people_of_whom_nothing_is_known_are_left_out(tmp_path):
    """Training would stop at them: a missing profile is an error."""
    nobody = ["105", *["No answer"] * len(FIELDS), "English"]
    folder = write(tmp_path / "wvb", {"train": [nobody, ANN, BO], "test": [CY]}, ANSWERS | {"105": ["1"] * 5})
    conversion = convert(folder)
    assert answers_of(conversion.datasets()["train"])["101", "Q2"] == "About the same"  # and no one else's answers
    assert conversion.report.drops["people"] == {"nothing is known of them": 1}
    kept = convert(folder, keep_unknown=True).datasets()["train"]
    assert set(kept["person_id"]) == {"105", "101", "102"}


@pytest.mark.parametrize(
    ("answer", "shown"), [("3", "3"), ("0", "0"), ("yes", "yes"), ("1.5", "1.5"), ("inf", "inf"), ("1e3", "1e3")]
)
def test_a_cell_that_is_no_answer_names_file_line_and_column(tmp_path, answer, shown):
    folder = write(
        tmp_path / "wvb", {"train": [ANN, BO], "test": [CY]}, ANSWERS | {"102": [answer, "1", "1", "1", "1"]}
    )
    with pytest.raises(ValueError, match=rf"train_value_qa.tsv, line 3, column Q1: '{re.escape(shown)}' is no whole"):
        convert(folder).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_malformed_files_are_named_without_a_profile(folder):
    data = folder / "WorldValuesBench" / "train"
    demographic = data / "train_demographic_qa.tsv"
    good = demographic.read_text()
    for bad, message in (
        (good.replace("Solarist\t", "Solarist\tmore\t"), r"Row #2: Expected 10 columns, got 11\.$"),
        (good.replace("B_COUNTRY", "COUNTRY"), "Column 'B_COUNTRY'"),
        (good.replace("101\t", "one\t"), "line 2, column D_INTERVIEW: not a whole number"),
        ("", "Empty CSV file"),
    ):
        demographic.write_text(bad)
        with pytest.raises(ValueError, match=message) as error:
            convert(folder).datasets()
        assert "train_demographic_qa.tsv" in str(error.value) and "Solarist" not in str(error.value)
    demographic.write_text(good)
    demographic.unlink()
    with pytest.raises(FileNotFoundError, match="train_demographic_qa.tsv"):
        convert(folder)


def test_files_that_disagree_about_a_scale_are_an_error(tmp_path):
    """The codebook with raw codes only: Q2 and Q3 without their adjustment are on other scales than the answers."""
    folder = write(tmp_path / "wvb", {"train": [ANN], "test": [CY]}, adjustment={})
    with pytest.raises(ValueError, match=r"adjusted codes of question Q1 are \[1, 2, 3\], .* goes from 1 to 2"):
        convert(folder)


def test_rare_values_are_grouped(tmp_path):
    write_worldvaluesbench(tmp_path / "wvb", num_people=600, num_questions=20, seed=1)
    made = convert_worldvaluesbench(tmp_path / "wvb", splits=BY_PERSON).datasets()
    people = {
        row["person_id"]: row["demographic"]
        for split in made.values()
        for row in split.select_columns(["person_id", "demographic"])
    }
    for field in FIELDS:
        held = Counter(profile[field] for profile in people.values())
        assert all(count >= 30 for value, count in held.items() if value is not None), field
    assert any(profile["ethnicity"] == "Other" for profile in people.values())


def simulated(tmp_path, **options):
    write_worldvaluesbench(tmp_path / "wvb", num_people=1200, num_questions=24, seed=0)
    return convert_worldvaluesbench(tmp_path / "wvb", **options)


def test_splits_share_neither_people_nor_questions(tmp_path):
    splits = SplitOptions(
        test=0.2, validation=0.2, holdout_combinations=("gender", "age"), holdout_share=0.05, holdout_countries=1
    )
    conversion = simulated(tmp_path, people_split="random", splits=splits)
    made = conversion.datasets()
    assert list(made) == ["train", "validation", "test", "test_combinations", "test_countries"]
    assert_disjoint(made)
    report = conversion.report
    assert report.kept("answers") == sum(report.rows.values()) == sum(map(len, made.values()))
    assert report.drops["answers"]["person and question in different splits"] > 0
    trained = {(row["gender"], row["age"]) for row in made["train"]["demographic"]}
    tested = {(row["gender"], row["age"]) for row in made["test_combinations"]["demographic"]}
    away = {row["country"] for row in made["test_countries"]["demographic"]}
    assert not trained & tested and not away & {row["country"] for row in made["train"]["demographic"]}


def test_the_source_split_of_people_is_kept(tmp_path):
    made = simulated(tmp_path, splits=SplitOptions(test=0.2)).datasets()
    assert_disjoint(made)
    data = tmp_path / "wvb" / "WorldValuesBench"
    for split in ("train", "test"):
        lines = (data / split / f"{split}_value_qa.tsv").read_text().splitlines()[1:]
        assert set(made[split]["person_id"]) <= {line.split("\t")[0] for line in lines}


def test_the_order_of_the_files_rows_makes_no_difference(tmp_path):
    options = {"task": "dpo", "people_split": "random", "splits": SplitOptions(test=0.2), "max_train_rows": 500}
    first = simulated(tmp_path, **options).datasets()
    for path in (tmp_path / "wvb" / "WorldValuesBench").rglob("*.tsv"):
        head, *lines = path.read_text().splitlines()
        path.write_text("\n".join([head, *np.random.default_rng(1).permutation(lines)]) + "\n")
    second = convert_worldvaluesbench(tmp_path / "wvb", **options).datasets()
    assert len(first["train"]) == 500
    for split in first:
        rows = [{json.dumps(row, sort_keys=True) for row in made[split]} for made in (first, second)]
        assert rows[0] == rows[1]


def test_a_sample_of_the_training_rows(tmp_path):
    whole = simulated(tmp_path).datasets()
    conversion = convert_worldvaluesbench(tmp_path / "wvb", max_train_rows=1000)
    some = conversion.datasets()
    keys = lambda rows: set(zip(rows["person_id"], rows["question_id"], strict=True))  # noqa: E731
    assert len(some["train"]) == 1000 and keys(some["train"]) < keys(whole["train"])
    assert some["test"].to_list() == whole["test"].to_list()
    # Uniform over people: of ~840 training people, 1000 draws meet about 840 · (1 − e^(−1000/840)) = 585.
    assert 500 < len(set(some["train"]["person_id"])) < 670


def test_golden(folder):
    made = {}
    for name, options in {
        "sft": {"prompts": PromptFormat("user")},
        "dpo": {"task": "dpo", "prompts": PromptFormat("system", "paper")},
    }.items():
        conversion = convert(folder, **options)
        made[name] = {split: rows.to_list() for split, rows in conversion.datasets().items()}
        made[name]["report"] = conversion.report.to_dict()
    check_golden("worldvaluesbench", made)


@needs_real
def test_every_answer_of_the_real_questions_has_a_text_that_means_it():
    questions = read_questions(REAL)
    assert len(questions) == 239
    adjusted = json.loads((REAL / "answer_adjustment.json").read_text())
    metadata = json.loads((REAL / "question_metadata.json").read_text())
    choices = {name: entry["choices"] for name, entry in json.loads((REAL / "codebook.json").read_text()).items()}
    for name, asked in questions.items():
        question, entry = asked.question, metadata[name]
        assert len(question.options) == entry["answer_scale_max"] - entry["answer_scale_min"] + 1
        # The ends are those that the question itself names.
        low, high = re.search(r"meaning '(.*?)' and \d+ meaning '(.*?)',", entry["question"]).groups()
        assert (question.options[0], question.options[-1]) == (low.strip(), high.strip())
        assert not question.text.startswith("On a scale")
        for raw, label in choices[name].items():
            if int(raw) < 0 or adjusted.get(name, {}).get(raw) == "":
                continue
            place = int(adjusted.get(name, {}).get(raw, raw)) - asked.low
            label = " ".join(label.split())
            # Only the spontaneous "against democracy" shares its place, with "Not an essential characteristic".
            merged = raw == "0" and name in [f"Q{number}" for number in range(241, 250)]
            assert (question.short_options[place] == label) != merged
    assert len({(asked.question.text, asked.question.options) for asked in questions.values()}) == 239
    assert questions["Q56"].question.options == ("Better off", "Or about the same", "Worse Off")
    assert questions["Q119"].question.options == (
        "Strongly agree",
        "Agree",
        "Hard to say",
        "Disagree",
        "Strongly disagree",
    )
    assert questions["Q222"].question.options == ("Always", "Usually", "Never")
    assert questions["Q241"].question.short_options[0] == "Not an essential characteristic of democracy"


@needs_real
def test_the_real_questions_convert(tmp_path):
    """The real metadata with people of our own, who answer each question with each of its options in turn."""
    questions = read_questions(REAL)
    answers = {
        str(1000 + person): [str(asked.low + person % len(asked.question.options)) for asked in questions.values()]
        for person in range(40)
    }
    people = [[id, *CY[1:]] for id in answers]
    data = tmp_path / "WorldValuesBench"
    for split, some in {"train": people[:30], "test": people[30:]}.items():
        tsv(data / split / f"{split}_demographic_qa.tsv", [HEADER, *some])
        table = [[row[0], *answers[row[0]]] for row in some]
        tsv(data / split / f"{split}_value_qa.tsv", [["D_INTERVIEW", *questions], *table])
    (tmp_path / "dataset_construction").symlink_to(REAL)
    made = convert_worldvaluesbench(tmp_path).datasets()
    assert_disjoint(made)
    assert len(made["train"]) == 30 * len(set(made["train"]["question_id"]))
    for (person, name), option in (answers_of(made["train"]) | answers_of(made["test"])).items():
        options = questions[name].question.options
        assert option == options[(int(person) - 1000) % len(options)]
